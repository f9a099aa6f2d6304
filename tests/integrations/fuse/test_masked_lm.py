"""Losses of masked language modelling: what the models compute, without logits."""

import copy
import pickle
import unittest.mock

import pytest
import torch

import sclkern
from sclkern import ops
from sclkern.integrations.fuse import masked_lm
from sclkern.integrations.source import known
from swapped_models.checks import agree, compute, learn, seed
from swapped_models.masked import build, without_logits
from swapped_models.table import MASKED_LM

transformers = pytest.importorskip("transformers")


@pytest.mark.parametrize(
    ("family", "path"),
    [(family, "cpu") for family in MASKED_LM.split()] + [("Bert", "kernels"), ("BridgeTower", "kernels")],
)
def test_loss_and_gradients(family, path, request):
    model, inputs = build(family)
    ours, report = without_logits(model)
    assert [(one.path, one.by) for one in report.replaced] == [("", "ops.linear_cross_entropy")] and not report.left
    if path == "kernels":
        request.getfixturevalue("kernels")
    with unittest.mock.patch.object(ops, "linear_cross_entropy", wraps=ops.linear_cross_entropy) as op:
        results = learn(ours, inputs)
        assert op.call_count == 1
        labels = op.call_args.args[3]
        assert (labels != -100).all() and labels.numel() == (inputs["labels"] != -100).sum()
        agree(results, learn(model, inputs), 1e-9)
        assert ours(**inputs).logits is None
        # Everything else is the model's own.
        op.reset_mock()
        for one in (model.eval(), ours.eval()):
            one.zero_grad()
        agree(compute(ours, inputs), compute(model, inputs), 0)
        for one in (model.train(), ours.train()):
            one.zero_grad()
        unlabelled = {name: value for name, value in inputs.items() if name != "labels"}
        agree(compute(ours, unlabelled), compute(model, unlabelled), 0)
        with torch.no_grad():
            tuples = []
            for one in (ours, model):
                seed()  # ViLT draws its patches
                tuples.append(one(**inputs, return_dict=False))
            assert all(torch.equal(a, b) for a, b in zip(*tuples, strict=True) if isinstance(a, torch.Tensor))
        assert not op.called
    report.revert()
    assert not any("_sclkern" in vars(module) for module in ours.modules()) and type(ours) is type(model)
    agree(learn(ours, inputs), learn(model, inputs), 0)


def test_other_outputs_stay():
    model, inputs = build("Bert", attn_implementation="eager")
    ours, _ = without_logits(model)
    options = {"output_hidden_states": True, "output_attentions": True}
    out, expected = ours(**inputs, **options), model(**inputs, **options)
    assert type(out) is type(expected) and len(out.hidden_states) == len(expected.hidden_states) == 3
    for kind in ("hidden_states", "attentions"):
        for value, truth in zip(out[kind], expected[kind], strict=True):
            assert torch.equal(value, truth)
    # By position, as BERT's forward has its arguments.
    call = inputs["input_ids"], inputs["attention_mask"], None, None, None, None, None, inputs["labels"]
    assert torch.equal(ours(*call).loss, out.loss) and ours(*call).logits is None


def test_no_label_at_all_is_no_number():
    model, inputs = build("Bert")
    ours, _ = without_logits(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    results = learn(ours, inputs)
    assert results["loss"].isnan()
    agree(results, learn(model, inputs), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_loss(dtype):
    model, inputs = build("Bert", dtype)
    ours, _ = without_logits(model)
    loss, expected = ours(**inputs).loss, model(**inputs).loss
    assert loss.dtype == expected.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=3e-2 if dtype != torch.float32 else 1e-5, atol=0)


def test_autocast():
    model, inputs = build("Bert", torch.float32)
    ours, _ = without_logits(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.double()(**inputs).loss.dtype == torch.float64
        loss, expected = ours.float()(**inputs).loss, model(**inputs).loss
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("labelled", [True, False])
def test_compiled(labelled, kernels):
    model, inputs = build("Bert")
    ours, _ = without_logits(model)
    if not labelled:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    expected = learn(model, inputs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    agree(learn(compiled, inputs), compiled_names(expected), 1e-9)


PARTS = {
    "head": lambda model: model.cls.compile(backend="eager"),
    "linear layer": lambda model: model.cls.predictions.decoder.compile(backend="eager"),
    "all but a hook": lambda model: model.bert.register_forward_hook(lambda *_: torch._dynamo.graph_break()),
}


@pytest.mark.parametrize("part", PARTS)
def test_compiled_in_part(part):
    model, inputs = build("Bert")
    ours, _ = without_logits(model)
    PARTS[part](ours)
    compiled = torch.compile(ours, backend="eager") if part == "all but a hook" else ours
    out = compiled(**inputs)
    assert out.logits is None
    torch.testing.assert_close(out.loss, model(**inputs).loss)


def compiled_names(results):
    return {name.replace("grad ", "grad _orig_mod."): value for name, value in results.items()}


def test_copied_pickled_and_fused_with_the_rest(kernels):
    model, inputs = build("Bert")
    expected = learn(model, inputs)
    ours = copy.deepcopy(model)
    report = sclkern.fuse(ours, skip_logits=True)
    assert {"ops.linear_cross_entropy", "ops.bias_gelu (none)"} <= {one.by for one in report.replaced}
    assert not any(one.why == "fused already" for one in report.left)
    for one in (ours, copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        agree(learn(one, inputs), expected, 1e-6)
        assert one(**inputs).logits is None
    # Only where it is asked for.
    plain = copy.deepcopy(model)
    assert "ops.linear_cross_entropy" not in {one.by for one in sclkern.fuse(plain).replaced}
    assert plain(**inputs).logits is not None


def test_trainer(tmp_path):
    """Which reads the columns that it needs from the signature of the forward."""
    pytest.importorskip("accelerate")
    losses = {}
    for kind in ("own", "fused"):
        model, inputs = build("Bert", torch.float32)
        if kind == "fused":
            model, _ = without_logits(model)
        rows = [dict(zip(inputs, row, strict=True), unused=0) for row in zip(*inputs.values(), strict=True)]
        arguments = transformers.TrainingArguments(
            str(tmp_path), per_device_train_batch_size=3, max_steps=4, logging_steps=1, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, learning_rate=1e-2, seed=1, gradient_accumulation_steps=2,
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=rows * 2, eval_dataset=rows)
        trainer.train()
        losses[kind] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        predicted = trainer.predict(rows)
        assert predicted.predictions.shape == (3, 8, 64)
        losses[kind].append(predicted.metrics["test_loss"])
    assert losses["own"][0] != losses["own"][-1]
    assert losses["fused"] == pytest.approx(losses["own"], rel=1e-4)


def test_every_form_is_in_the_table():
    forms = {entry["form"] for entry in known("forwards").values()}
    wanted = {*masked_lm.MODELS, *masked_lm.HEADS, masked_lm.BIASED_HEAD}
    assert {form for form in forms if form.startswith(("masked", "head"))} == wanted
