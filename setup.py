from pathlib import Path

from setuptools import find_namespace_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path("sclkern/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)

setup(
    name="sclkern",
    version=VERSION,
    description="Vision-language pre-training with Semantic Completion Learning: fused kernels, model and script",
    long_description=Path("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    # Namespace packages, because kernels/ has no __init__.py (see CONTRIBUTING.md).
    packages=find_namespace_packages(include=["sclkern", "sclkern.*"]),
    package_data={"sclkern": ["py.typed"], "sclkern.data.demo": ["*", "tokenizer/*"]},
    entry_points={"console_scripts": ["sclkern = sclkern.cli:main"]},
    install_requires=[
        "torch>=2.11",
        "torchvision",
        "transformers>=5",
        "tokenizers",
        "timm>=1",
        "safetensors",
        "numpy",
        "pyarrow",
        "pillow",
        "pydantic>=2",
        "pyyaml",
        "tensorboard",
        "matplotlib",
        "tqdm",
        "nvtx",
    ],
    # kernels: Hugging Face's, to prove that our folder of that name does not get in its way.
    extras_require={
        "test": [
            "pytest",
            "pytest-benchmark",
            "hypothesis",
            "kernels",
            "ruff",
            "pytest-xdist",
            "mypy",
            "pydoclint",
            "codespell",
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": ["pdoc"],
    },
)
