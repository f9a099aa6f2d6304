"""What is installed, what is imported, and what must never be."""

import re
import runpy
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

import pytest
import setuptools

ROOT = Path(__file__).parent.parent


def run(code, *, cwd=ROOT, path=None):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(path or ROOT), "HOME": str(cwd), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel, built from a copy so that nothing is left in the tree."""
    directory = tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    source = directory / "source"
    for name in filter(None, files.split("\0")):
        if name.startswith(("tests/golden", "benchmarks/results")) or not (ROOT / name).exists():
            continue
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_symlink():
            target.symlink_to((ROOT / name).readlink())
        else:
            target.write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(directory), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    return next(directory.glob("*.whl"))


def test_only_sclkern_is_installed(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sclkern"}
    for needed in (
        "py.typed",
        "reference/__init__.py",
        "data/demo/pairs.arrow",
        "data/demo/tokenizer/tokenizer.json",
        "cli/parser.py",
        "configs/pretrain_base.yaml",
        "kernels/attention.py",
        "tools/bench/published.json",
        "visualize/page.css",
        "visualize/page.js",
    ):
        assert f"sclkern/{needed}" in names, needed
    assert any(name.endswith("NOTICE") for name in names) and any(name.endswith("LICENSE") for name in names)


@pytest.fixture(scope="module")
def site(wheel, tmp_path_factory):
    """A folder with nothing but the installed wheel."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def test_the_installed_package_works_away_from_the_tree(site, tmp_path):
    code = """
import sclkern
from sclkern.data import open_pairs
from sclkern.data.tokenizer import CaptionTokenizer
assert "site" in sclkern.__file__
print(open_pairs("demo", ["pairs"]).num_images, CaptionTokenizer.from_pretrained("demo").vocab_size)
"""
    assert run(code, cwd=tmp_path, path=site) == "1258 2048"


def test_installed_configurations_are_found_by_name(site, tmp_path):
    code = """
from sclkern.cli import main
assert main(["plan", "--config", "pretrain_base", "--json"]) == 0
assert main(["plan", "--config", "unknown"]) == 2
main(["configs"])
"""
    names = {file.stem for file in (ROOT / "configs").glob("*.yaml")}
    lines = run(code, cwd=tmp_path, path=site).splitlines()
    assert lines[0] == "{" and names == {line.split()[0] for line in lines[lines.index("}") + 1 :]}


def test_the_entry_point_is_installed(site, tmp_path):
    environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(site), "HOME": str(tmp_path)}
    command = [sys.executable, site / "bin" / "sclkern", "--version"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "sclkern 0.1.0\n"), done.stderr


LINK = re.compile(r"\]\((?!https?:|#)[^)]*\)")


def test_the_description_of_the_wheel_has_no_link_into_the_tree(wheel):
    archive = zipfile.ZipFile(wheel)
    (file,) = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
    text = message_from_bytes(archive.read(file)).get_payload()
    readme = (ROOT / "README.md").read_text()
    pictures = re.findall(r"!\[([^\]]*)\]\(([^)]*)\)", readme)
    assert pictures and all(f"{caption}: {file} of the source tree" in text for caption, file in pictures)
    assert LINK.findall(readme) and not LINK.findall(text)


def test_pictures_of_the_description_show_where_the_source_is_public(monkeypatch):
    described = {}
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(setuptools, "setup", described.update)
    monkeypatch.setenv("SCLKERN_SOURCE_URL", "https://example.org/sclkern/raw/v1")
    runpy.run_path("setup.py")
    text = described["long_description"]
    assert not LINK.findall(text) and "(https://arxiv.org/abs/2211.13437)" in text
    pictures = re.findall(r"!\[[^\]]*\]\(https://example.org/sclkern/raw/v1/([^)]*)\)", text)
    assert pictures and all((ROOT / picture).is_file() for picture in pictures)


def test_import_is_light():
    code = """
import sys, sclkern
assert "torch" not in sys.modules and "transformers" not in sys.modules
print(sclkern.__version__, "SCLModel" in dir(sclkern))
from sclkern import SCLModel
for heavy in ("transformers", "timm", "torchvision", "matplotlib", "triton", "pyarrow", "tensorboard"):
    assert heavy not in sys.modules, heavy
"""
    assert run(code) == "0.1.0 True"


def test_unknown_attribute_is_an_attribute_error():
    import sclkern

    with pytest.raises(AttributeError, match=r"no attribute 'SCLModle'"):
        _ = sclkern.SCLModle


def test_the_model_works_without_triton_and_without_a_gpu():
    code = """
import sys
sys.modules["triton"] = None
import torch
from sclkern import SCLConfig, SCLModel
torch.cuda.is_available = lambda: False
model = SCLModel(SCLConfig.preset("tiny"))
ids = torch.tensor([[0, 7, 8, 2], [0, 9, 2, 1]])
losses = model({"image": torch.zeros(2, 3, 32, 32), "text_ids": ids, "text_mask": ids != 1}, seed=0)
losses.total.backward()
print(bool(torch.isfinite(losses.total)))
"""
    assert run(code) == "True"


def test_kernels_is_never_ours():
    # From the root of the tree, where the folder kernels/ lies beside the caller.
    code = """
import importlib.util, os, sclkern
spec = importlib.util.find_spec("kernels")
assert spec is None or spec.origin is None or os.path.dirname(spec.origin) != os.path.abspath("kernels"), spec
import sclkern.kernels
print(importlib.util.find_spec("sclkern.kernels").origin)
"""
    assert run(code) == "None"


def test_transformers_models_import_beside_the_kernels_folder():
    """Hugging Face's ``kernels`` must win over the folder of that name, or transformers cannot import any model."""
    pytest.importorskip("kernels", reason="Hugging Face's kernels is not installed")
    code = """
import sclkern, sys
from transformers import BertModel, CLIPModel, RobertaModel
import kernels
assert sys.path[1] == ROOT, sys.path
print("site-packages" in kernels.__file__, hasattr(kernels, "LayerRepository"))
"""
    assert run(f"ROOT = {str(ROOT)!r}" + code) == "True True"


def test_no_source_imports_kernels():
    import re

    wrong = re.compile(r"^\s*(import kernels\b|from kernels\b)", re.M)
    for folder in ("sclkern", "kernels", "benchmarks"):
        for file in (ROOT / folder).rglob("*.py"):
            assert not wrong.search(file.read_text()), file
