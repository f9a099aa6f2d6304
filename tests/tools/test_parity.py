"""The reference's recorded numbers, through the command a user runs."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sclkern.cli import main
from sclkern.errors import UserError
from sclkern.tools.parity import compute, run_parity

GOLDEN = Path(__file__).parents[1] / "golden"


@pytest.mark.parametrize("case", ["image", "video"])
def test_every_recorded_number_holds(case, capsys):
    assert main(["parity", str(GOLDEN / f"{case}.safetensors"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    recorded = load_file(GOLDEN / f"{case}.safetensors")
    norms = json.loads((GOLDEN / f"{case}.json").read_text())["grad_norms_scl_step"]
    expected = {name for name in recorded if name.startswith(("out.", "loss.", "grad."))} | {f"norm.{n}" for n in norms}
    assert {row["name"] for row in report["comparisons"]} == expected
    lacking = "gradients of 2 parameters: image.json does not have them in grad_norms_scl_step"
    assert report["not_compared"] == {
        "image": [f"{lacking} (itm_score.fc.weight, itm_score.fc.bias)"], "video": []
    }[case]  # fmt: skip


@pytest.mark.parametrize("case", ["image", "video"])
def test_only_weights_and_inputs_are_read(case):
    recorded = load_file(GOLDEN / f"{case}.safetensors")
    weights = {k[2:]: v for k, v in recorded.items() if k.startswith("w.")}
    given = {k[3:]: v for k, v in recorded.items() if k.startswith("in.")}
    computed = compute(weights, given)
    name = "loss.scl_step_total"
    torch.testing.assert_close(computed[name].detach(), recorded[name][0], atol=1e-3, rtol=0)


@pytest.mark.parametrize("prefix", ["out.complete.text_feats", "loss.mlm_loss", "grad.scl_step"])
def test_a_changed_record_fails(tmp_path, prefix, capsys):
    tensors = load_file(GOLDEN / "image.safetensors")
    name = next(n for n in tensors if n.startswith(prefix))
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, tmp_path / "case.safetensors")
    assert main(["parity", str(tmp_path / "case.safetensors")]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("NO")]
    assert [line.split()[1] for line in failed] == [name]


def test_a_changed_weight_fails(tmp_path):
    tensors = load_file(GOLDEN / "video.safetensors")
    tensors["w.cross_modal_text_layers.0.attention.self.query.weight"][0, 0] += 1
    save_file(tensors, tmp_path / "case.safetensors")
    assert not run_parity(tmp_path / "case.safetensors").ok


def test_a_wrong_gradient_norm_fails(tmp_path):
    shutil.copy(GOLDEN / "image.safetensors", tmp_path / "case.safetensors")
    norms = json.loads((GOLDEN / "image.json").read_text())
    norms["grad_norms_scl_step"]["cl_temp"] *= 1.01
    (tmp_path / "case.json").write_text(json.dumps(norms))
    assert [r.name for r in run_parity(tmp_path / "case.safetensors").comparisons if not r.ok] == ["norm.cl_temp"]


def test_padding_is_not_compared(tmp_path):
    tensors = load_file(GOLDEN / "image.safetensors")
    tensors["out.complete.text_feats"][tensors["in.text_mask"] == 0] = 1e6
    save_file(tensors, tmp_path / "case.safetensors")
    assert run_parity(tmp_path / "case.safetensors").ok


def test_a_file_without_a_case_is_a_user_error(tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, tmp_path / "case.safetensors")
    assert main(["parity", str(tmp_path / "case.safetensors")]) == 2
    error = capsys.readouterr().err
    assert "case.safetensors" in error and "'w.'" in error and len(error.strip().splitlines()) == 1


def edited(tmp_path, case, **changes):
    """A golden file with tensors put in, or taken out where None is given; no JSON beside it."""
    tensors = load_file(GOLDEN / f"{case}.safetensors")
    for name, tensor in changes.items():
        tensors.pop(name, None)
        if tensor is not None:
            tensors[name] = tensor.contiguous()
    save_file(tensors, tmp_path / "case.safetensors")
    return tmp_path / "case.safetensors"


def test_captions_longer_than_fifty_tokens(tmp_path):
    tensors = load_file(GOLDEN / "image.safetensors")
    table = "w.text_transformer.embeddings.position_embeddings.weight"
    wider = {table: torch.cat([tensors[table], torch.zeros(50, 128, dtype=tensors[table].dtype)])}
    for name, tensor in tensors.items():
        if name.startswith("in.text"):
            fill = {"in.text_mask": 0, "in.text_labels_mlm": -100, "in.text_scl_mask": False}.get(name, 1)
            wider[name] = torch.nn.functional.pad(tensor, (0, 44), value=fill)
        if name.endswith((".text_feats", "position_embeddings.weight")) and name != table:
            wider[name] = None  # recorded at the old width
    assert run_parity(edited(tmp_path, "image", **wider)).ok


@pytest.mark.parametrize("name", ["in.vqa_targets", "in.text_scl_mask"])
def test_inputs_that_are_not_needed_may_be_missing(tmp_path, name):
    path = edited(tmp_path, "image", **{name: None, "loss.vqa_loss": None})
    assert run_parity(path).ok


@pytest.mark.parametrize("name", ["in.keep_ids", "in.false_image", "in.text_ids_mlm"])
def test_an_input_that_is_needed_is_named(tmp_path, name):
    with pytest.raises(UserError, match=f"no tensor '{name}'"):
        run_parity(edited(tmp_path, "image", **{name: None}))


def test_integer_masks_are_taken(tmp_path):
    mask = load_file(GOLDEN / "image.safetensors")["in.patch_token_mask"].long()
    assert run_parity(edited(tmp_path, "image", **{"in.patch_token_mask": mask})).ok


def test_what_has_no_record_is_listed(tmp_path, capsys):
    outputs = dict.fromkeys(n for n in load_file(GOLDEN / "video.safetensors") if n.startswith("out."))
    path = edited(tmp_path, "video", **{"loss.con_loss": None, **outputs})
    assert main(["parity", str(path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    listed = [line.removeprefix("not compared: ") for line in lines if line.startswith("not compared: ")]
    assert listed[:2] == ["loss.con_loss: not in the file", "outputs: the file has none"]
    assert re.fullmatch(
        r"gradients of \d+ parameters: there is no case.json beside the file \(.* and \d+ more\)", listed[2]
    )
    assert len(listed) == 3 and lines[-1].endswith("hold, 3 of what was computed could not be compared")

    for content, reason in (
        ({}, "case.json does not have them"),
        ({"grad_norms_scl_step": {"cl_temp": 0.0}}, "case.json does not have them"),
    ):
        path.with_suffix(".json").write_text(json.dumps(content))
        main(["parity", str(path), "--json"])
        report = json.loads(capsys.readouterr().out)
        assert reason in report["not_compared"][-1] and len(report["not_compared"]) == 3
        assert report["ok"] == (not content)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in.text_ids": torch.full((4, 6), 10**6)}, "case.safetensors: .*(shape|ids: got 1000000, expected 0 to)"),
        ({"in.text_mask": torch.zeros(4, 6)}, "case.safetensors: .*(shape|no token in caption 0)"),
        ({"in.vqa_targets": None}, "'loss.vqa_loss' is recorded, but .* lacks an input 'in.' for it"),
        ({"w.cl_temp": torch.ones(3)}, "case.safetensors: state_dict: cl_temp has shape"),
    ],
)
def test_a_case_that_cannot_be_computed_is_a_user_error(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        run_parity(edited(tmp_path, "image", **changes))


def test_nothing_masked(tmp_path):
    """No logits at labels: an empty record is equal to an empty result."""
    labels = load_file(GOLDEN / "image.safetensors")["in.text_labels_mlm"]
    nothing = {"in.text_labels_mlm": torch.full_like(labels, -100), "out.mlm_logits_at_labels": torch.ones(0, 600)}
    rows = {row.name: row for row in run_parity(edited(tmp_path, "image", **nothing)).comparisons}
    assert rows["out.mlm_logits_at_labels"].ok


@pytest.mark.parametrize("text", ["{broken", "[]", '{"grad_norms_scl_step": {"cl_temp": null}}',
                                  '{"grad_norms_scl_step": {"nothing": 1.0}}'])  # fmt: skip
def test_broken_norms_are_a_user_error(tmp_path, text):
    path = edited(tmp_path, "video")
    path.with_suffix(".json").write_text(text)
    with pytest.raises(UserError, match=r"case\.json"):
        run_parity(path)


@pytest.mark.parametrize("case", ["image", "video"])
def test_every_recorded_number_holds_with_the_kernels_interpreted(case):
    """In a process whose Triton interprets the kernels."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = (
        "import sys, torch; from sclkern import cli, ops;"
        "assert str(ops.explain('attention', torch.ones(1, 1, 1, 64))).startswith('triton');"
        "sys.exit(cli.main(['parity', sys.argv[1]]))"
    )
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(GOLDEN.parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(GOLDEN / f"{case}.safetensors")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]
