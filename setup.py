import os
import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

VERSION = next(
    line.split('"')[1]
    for line in Path("sclkern/__init__.py").read_text().splitlines()
    if line.startswith("__version__")
)


def long_description(readme: str, url: str) -> str:
    """README for a package index, which has none of the files that relative links and pictures lead to.

    Args:
        readme: Markdown with links relative to the root of the source tree.
        url: where that tree can be read, without a slash at the end, such as https://HOST/OWNER/sclkern/raw/v0.1.0;
            empty if it is not public.

    Returns:
        Markdown whose relative links are absolute, or, without a ``url``, text that names the file. (A package index
        removes pictures that are embedded as data: URIs.)
    """

    def absolute(match: re.Match[str]) -> str:
        picture, text, target = match.groups()
        if url:
            return f"{picture}[{text}]({url}/{target})"
        return f"*{text}: {target} of the source tree.*" if picture else text

    return re.sub(r"(!?)\[([^\]]*)\]\((?!https?:|#)([^)\s]+)\)", absolute, readme)


# The data of `make demo-tasks`, of which tests make small parts.
EXAMPLES = ["easy-vqa==1.0", "minigrid==3.2.0"]

setup(
    name="sclkern",
    version=VERSION,
    description="Vision-language pre-training with Semantic Completion Learning: fused kernels, model and script",
    long_description=long_description(Path("README.md").read_text(), os.environ.get("SCLKERN_SOURCE_URL", "")),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "NOTICE"],
    python_requires=">=3.11",
    # Namespace packages, because kernels/ and configs/ have no __init__.py (see CONTRIBUTING.md).
    packages=find_namespace_packages(include=["sclkern", "sclkern.*"]),
    package_data={
        "sclkern": ["py.typed"],
        "sclkern.configs": ["*.yaml"],
        "sclkern.data.demo": ["*", "tokenizer/*"],
        "sclkern.integrations.fuse": ["known.json"],
        "sclkern.tools.bench": ["published.json"],
        "sclkern.visualize": ["page.css", "page.js"],
    },
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
        "fsspec",
        "av",
        "pillow>=10.1",
        "pydantic>=2",
        "pyyaml",
        "tensorboard",
        "matplotlib",
        "tqdm",
        "nvtx",
    ],
    # flash and liger: what run.backend=flash and the benchmarks call, in versions whose functions were read beside the
    # calls. NVIDIA's apex is no package of the index: docs/pretraining.md says how to build it.
    # kernels: Hugging Face's, to prove that our folder of that name does not get in its way. open_clip_torch: ops are
    # swapped into its models, and its losses are what ours are compared with; sentence-transformers likewise, with what
    # its trainer needs.
    # docs: Sphinx with MyST-Parser, because MkDocs is no longer maintained.
    extras_require={
        "flash": ["flash-attn>=2.8,<3"],
        "liger": ["liger-kernel>=0.8"],
        "examples": EXAMPLES,
        "test": [
            *EXAMPLES,
            "pytest",
            # transformers' Trainer needs it.
            "accelerate>=1.1",
            "pytest-benchmark",
            "hypothesis",
            "kernels",
            "open_clip_torch",
            "sentence-transformers[train]>=6",
            "ruff",
            "pytest-xdist",
            "mypy",
            "pydoclint",
            "codespell",
            "types-PyYAML",
            "types-tqdm",
        ],
        "docs": ["sphinx>=9", "myst-parser>=5", "furo"],
    },
)
