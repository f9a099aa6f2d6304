"""``sclkern doctor``: what it reports, and that it requires torch only."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stand_ins
from sclkern import ops
from sclkern.cli import main
from sclkern.libraries import apex
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted
from sclkern.tools import doctor

ROOT = Path(__file__).parents[2]


def test_json_holds_everything(capsys, monkeypatch):
    monkeypatch.setenv("SCLKERN_DEBUG", "1")
    assert main(["doctor", "--json"]) == 0
    findings = json.loads(capsys.readouterr().out)
    assert findings["torch"] == torch.__version__ and findings["python"] == sys.version.split()[0]
    assert findings["environment"]["SCLKERN_DEBUG"] == "1"
    assert set(findings["ops"]) == set(ops.OPS)
    for choices in findings["ops"].values():
        assert set(choices) == {"float32", "float16", "bfloat16"}
        assert all(choice.startswith(("triton: ", "eager: ")) for choice in choices.values())


@pytest.mark.skipif(not TRITON_INSTALLED or interpreted() or torch.cuda.is_available(), reason="the plain CPU case")
def test_the_text_has_a_line_for_each_op_with_its_reason(capsys):
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("sclkern ") and f"torch {torch.__version__}" in lines[0]
    assert "devices: torch sees no GPU" in lines
    for op in ops.OPS:
        (line,) = [line for line in lines if line.startswith(f"  {op} ")]
        assert "float32, float16, bfloat16: eager: tensors on cpu, kernels need a GPU" in line


def test_libraries_that_are_chosen_by_name(monkeypatch, capsys):
    stand_ins.install(monkeypatch)
    monkeypatch.delitem(sys.modules, "amp_C")
    assert main(["doctor", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)["chosen_by_name"]
    assert (chosen["run.backend=flash"], chosen["run.layer_norm=apex"]) == ([], [])
    lines = doctor.format_report(doctor.examine()).splitlines()
    assert "  run.layer_norm=apex  can run" in lines
    (line,) = [line for line in lines if line.startswith("  optimizer.name=apex  cannot run: apex is installed, but ")]
    assert "No module named 'amp_C'" in line and apex.REMEDY in line


def test_devices_are_listed(monkeypatch):
    class Properties:
        name, major, minor, total_memory = "H200", 9, 0, 140 * 2**30

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: Properties)
    monkeypatch.setattr(doctor, "_choice", lambda op, dtype, device: f"triton: tensors on {device}")
    text = doctor.format_report(doctor.examine())
    assert "device 0: H200, compute capability 9.0, 140.0 GiB" in text and "triton: tensors on cuda" in text


def test_a_backend_that_cannot_be_selected_is_reported(monkeypatch):
    monkeypatch.setenv("SCLKERN_BACKEND", "cuda")
    assert "error: SCLKERN_BACKEND: got 'cuda', expected one of auto" in doctor.format_report(doctor.examine())


@pytest.mark.parametrize(("kind", "network"), [("nfs4", True), ("fuse.sshfs", True), ("ext4", False)])
def test_a_cache_on_a_network_is_reported(monkeypatch, tmp_path, kind, network):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    mounts = f"rootfs / rootfs rw 0 0\nsome:/where {tmp_path} {kind} rw 0 0\n/dev/x /tm ext4 rw 0 0\n"
    monkeypatch.setattr(doctor, "MOUNTS", tmp_path / "mounts")
    (tmp_path / "mounts").write_text(mounts)
    cache = doctor.examine()["triton_cache"]
    assert cache == {"path": str(tmp_path / "cache"), "file_system": kind, "network": network}


def test_an_apex_that_is_not_nvidias_does_not_count(monkeypatch, tmp_path):
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    assert doctor.examine()["optional"]["apex"] is False
    (tmp_path / "apex" / "normalization.py").write_text("")
    importlib.invalidate_caches()  # a folder that changed twice in an instant looks unchanged
    assert doctor.examine()["optional"]["apex"] is True
    del sys.modules["apex"], sys.modules["apex.normalization"]


def test_nothing_but_torch_is_needed():
    code = """
import sys
from importlib import metadata
for name in ("triton", "transformers", "timm", "torchvision", "pydantic", "yaml", "pyarrow", "PIL", "matplotlib"):
    sys.modules[name] = None
absent = metadata.PackageNotFoundError
def version(name):
    raise absent(name)
metadata.version = version
from sclkern.cli import main
sys.exit(main(["doctor"]))
"""
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HOME": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {name: os.environ[name] for name in ("LD_LIBRARY_PATH",) if name in os.environ}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "triton not installed" in done.stdout and "eager: Triton is not installed" in done.stdout
