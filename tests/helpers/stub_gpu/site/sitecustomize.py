"""Python imports this first, where its folder is on PYTHONPATH."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

if os.environ.get("SCLKERN_STUB_GPU") == "1":
    import stub_gpu

    stub_gpu.install()
