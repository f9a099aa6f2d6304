"""The ways to add something that CONTRIBUTING describes, tried: a patch adds one thing to a copy of the tree.

The patches are throwaway examples. What they add works in every place that CONTRIBUTING promises: that is run in the
copy, in processes of their own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
# Files that a contributor edits by hand, at most, as CONTRIBUTING says.
MOST_FILES = {"op": 7, "objective": 2, "data_source": 1}


def edited_files(patch: Path) -> list[str]:
    return re.findall(r"^\+\+\+ b/(.+)$", patch.read_text(), re.M)


@pytest.fixture
def copy(tmp_path):
    """(patch name) -> the tree, patched; ``run(*command)`` runs Python in it and returns what it prints."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, listed.split("\0")):
        source, target = ROOT / name, tmp_path / name
        if name.startswith(("tests/golden", "benchmarks/results", "docs/report")) or not source.exists():
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())

    def patched(name: str):
        patch = HERE / f"{name}.patch"
        subprocess.run(["git", "apply", "--whitespace=nowarn", str(patch)], cwd=tmp_path, check=True)

        def run(*arguments: str, **variables: str) -> str:
            environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1", **variables}
            command = [sys.executable, *arguments]
            done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
            return done.stdout

        return run

    return patched


@pytest.mark.parametrize("name", MOST_FILES)
def test_a_patch_edits_few_files(name):
    files = edited_files(HERE / f"{name}.patch")
    assert 1 <= len(files) <= MOST_FILES[name], files
    contributing = (ROOT / "CONTRIBUTING.md").read_text()
    assert f"At most {MOST_FILES[name]} " in contributing


def test_an_op(copy):
    """Seven files: own and contract tests, ``explain``, benchmarks and the static check follow from them."""
    pytest.importorskip("triton", reason="Triton is not installed")
    run = copy("op")
    test = ("-m", "pytest", "-q", "-p", "no:cacheprovider")
    contract = (*test, "tests/ops/test_rms_norm.py", "tests/ops/test_every_op.py", "-k", "rms_norm")
    # The first runs the op's own tests in the interpreter as well.
    assert " passed" in run(*contract)
    assert " passed" in run(*contract, "--sanitize", TRITON_INTERPRET="1")
    cases = run(*test, "benchmarks/cases/test_ops.py", "--collect-only", "-k", "rms_norm")
    assert "rms_norm/4x325/float32/both/sclkern" in cases
    output = run(
        "-c",
        """
import torch
from sclkern import ops
from sclkern.tools.static import budget

print(ops.explain("rms_norm", torch.randn(3, 8), torch.ones(8)))
rows = budget.measure([one for one in budget.compilations() if "rms_norm" in one.name])
print(len(rows), [problem for row in rows for problem in budget.broken_rules(row)])
""",
    )
    assert output.splitlines() == ["eager: tensors on cpu, kernels need a GPU", "2 []"]


def test_a_data_source(copy):
    """One file: ``open_pairs`` recognises the format, and the training script reads it."""
    run = copy("data_source")
    output = run(
        "-c",
        """
import torch
from pathlib import Path
from PIL import Image
from sclkern.cli import main
from sclkern.data import open_pairs

root = Path("pairs")
root.mkdir()
for table, count in (("train", 12), ("val", 4)):
    lines = []
    for i in range(count):
        Image.new("RGB", (40, 40), (20 * i, 40, 90)).save(root / f"{table}{i}.png")
        lines.append(f"{table}{i}.png\\tan image of number {i}\\n")
    (root / f"{table}.txt").write_text("".join(lines))
source = open_pairs(root, ["train"])
print(type(source).__name__, source.num_images, source.caption(3))
settings = (
    "data.root=pairs data.train_tables=[train] data.val_tables=[val] data.train_split=null data.val_split=null "
    "model.preset=tiny model.vocab_size=2048 model.mask_id=2047 model.patch_size=16 run.batch_size=4 run.max_steps=2 "
    "evaluation.rerank=2 evaluation.train_images=4 evaluation.attention_images=0 run.output_dir=run"
)
print(main(["pretrain", *settings.split()]), Path("run/model/model.safetensors").exists())
""",
    )
    lines = output.splitlines()
    assert (lines[0], lines[-1]) == ("TextPairs 12 an image of number 3", "0 True")


def test_an_objective(copy):
    """Two files: the plan, the losses, the total, the script's logs and the report follow from the table."""
    run = copy("objective")
    output = run(
        "-c",
        """
import json
from pathlib import Path
import torch
import sclkern.cli
from sclkern import ObjectiveConfig, SCLConfig, SCLModel
from sclkern.step import StepConfig, make_plan

plan = make_plan(ObjectiveConfig(recipe=("caption_agreement",)), StepConfig())
print(sorted(view.name for view in plan.views))
model = SCLModel(SCLConfig.preset("tiny"), ObjectiveConfig(recipe=("itm", "caption_agreement")))
ids = torch.tensor([[0, 17, 42, 2], [0, 23, 2, 1]])
batch = {"image": torch.randn(2, 3, 32, 32), "text_ids": ids, "text_mask": ids != 1}
losses = model(batch, seed=0)
losses.total.backward()
print(list(losses.named()), torch.allclose(losses.total, losses.itm + 0.1 * losses.caption_agreement))
settings = (
    "objectives.recipe=[mlm,caption_agreement] objectives.itm_negatives=dataset data.val_split=test "
    "model.preset=tiny model.vocab_size=2048 model.mask_id=2047 model.patch_size=16 run.batch_size=4 run.max_steps=2 "
    "run.log_every=1 evaluation.rerank=0 evaluation.train_images=0 evaluation.attention_images=0 run.output_dir=run"
)
assert sclkern.cli.main(["pretrain", *settings.split()]) == 0
rows = map(json.loads, Path("run/metrics.jsonl").read_text().splitlines())
row = next(row for row in rows if row["kind"] == "train")
print("caption_agreement" in row, "caption agreement" in Path("run/report.md").read_text())
""",
    )
    lines = [line for line in output.splitlines() if line.startswith(("[", "True"))]
    assert lines == ["['masked_image', 'masked_text']", "['total', 'itm', 'caption_agreement'] True", "True True"]
