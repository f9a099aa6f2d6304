"""Losses of masked language modelling: what the models compute, without logits, and only where that is asked for."""

import copy
import functools
import pickle
import sys
import threading
import unittest.mock
import warnings

import pytest
import torch
from torch import nn

import sclkern
from sclkern import ops
from sclkern.errors import UserError
from sclkern.integrations.fuse import masked_lm
from sclkern.integrations.source import known
from swapped_models import inputs as make
from swapped_models.checks import agree, compute, learn, seed
from swapped_models.table import MASKED_LM, MODELS
from swapped_models.tiny import stir, tiny

transformers = pytest.importorskip("transformers")

# What only newer versions of transformers have.
NEWER = ("Gte", "JinaEmbeddingsV3", "NomicBert")


def build(family, dtype=torch.float64, **options):
    """A model in training mode without dropout, and inputs of which every third token has a label."""
    cls = getattr(transformers, f"{family}ForMaskedLM", None)
    if cls is None and family in NEWER:
        pytest.skip(f"this transformers has no {family}")
    torch.manual_seed(0)
    config = tiny(cls.config_class, **MODELS[f"{family}ForMaskedLM"].sizes)
    model = stir(cls._from_config(config, **options).to(dtype)).train()
    torch.set_default_dtype(dtype)
    try:
        inputs = make.make_inputs(model, {})
    finally:
        torch.set_default_dtype(torch.float32)
    ids = inputs["input_ids"]
    labels = torch.where(torch.arange(ids.numel()).view_as(ids) % 3 == 0, ids, -100)
    return model, {**inputs, "labels": labels}


def fused(model, **options):
    ours = copy.deepcopy(model)
    return ours, sclkern.fuse(ours, only="linear_cross_entropy", skip_logits=True, **options)


@pytest.mark.parametrize(
    ("family", "path"),
    [(family, "cpu") for family in MASKED_LM.split()] + [("Bert", "kernels"), ("BridgeTower", "kernels")],
)
def test_loss_and_gradients(family, path, request):
    model, inputs = build(family)
    ours, report = fused(model)
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
    ours, _ = fused(model)
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
    ours, _ = fused(model)
    inputs["labels"] = torch.full_like(inputs["labels"], -100)
    results = learn(ours, inputs)
    assert results["loss"].isnan()
    agree(results, learn(model, inputs), 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_of_the_loss(dtype):
    model, inputs = build("Bert", dtype)
    ours, _ = fused(model)
    loss, expected = ours(**inputs).loss, model(**inputs).loss
    assert loss.dtype == expected.dtype == dtype
    torch.testing.assert_close(loss, expected, rtol=3e-2 if dtype != torch.float32 else 1e-5, atol=0)


def test_autocast():
    model, inputs = build("Bert", torch.float32)
    ours, _ = fused(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert ours.double()(**inputs).loss.dtype == torch.float64
        loss, expected = ours.float()(**inputs).loss, model(**inputs).loss
    assert loss.dtype == expected.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("labelled", [True, False])
def test_compiled(labelled, kernels):
    model, inputs = build("Bert")
    ours, _ = fused(model)
    if not labelled:
        inputs["labels"] = torch.full_like(inputs["labels"], -100)
    expected = learn(model, inputs)
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    agree(learn(compiled, inputs), compiled_names(expected), 1e-9)


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


def halve(module):
    forward = module.forward
    module.forward = lambda *args: forward(*args) / 2


CHANGES = {
    "hook on the way": lambda model: model.cls.register_forward_hook(lambda module, args, out: out / 2),
    "forward on the way": lambda model: halve(model.cls.predictions),
    "class on the way": lambda model: setattr(model.cls, "__class__", type("Other", (type(model.cls),), {})),
    "spectral norm": lambda model: nn.utils.parametrizations.spectral_norm(model.cls.predictions.decoder),
    "hook": lambda model: model.cls.predictions.decoder.register_forward_hook(lambda module, args, out: 2 * out),
    "decoder": lambda model: setattr(model.cls.predictions, "decoder", nn.Linear(64, 64).double()),
    "head": lambda model: setattr(model, "cls", nn.Linear(64, 64).double()),
    "tokens": lambda model: model.resize_token_embeddings(80),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_is_changed_later_is_the_models_own(change):
    model, inputs = build("Bert")
    ours, _ = fused(model)
    for one in (model, ours):
        torch.manual_seed(0)
        CHANGES[change](one)
    agree(learn(ours, inputs), learn(model, inputs), 0 if change != "tokens" else 1e-9)
    # Newer versions of transformers make its linear layer longer in place.
    kept = change == "tokens" and type(ours.cls.predictions.decoder) is not nn.Linear
    assert (ours(**inputs).logits is None) == kept


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ("hook", "carries hooks"),
        ("hook on the way", "its cls carries hooks"),
        ("head", None),
        ("vocabulary", "its configuration has 99 tokens and its linear layer 64"),
        ("loss", "its mlm_loss_fct is not torch's CrossEntropyLoss"),
        ("subclass", "its cls.predictions.decoder is Doubled"),
    ],
)
def test_what_is_not_known_is_refused(change, reason):
    model, _ = build("DistilBert" if change == "loss" else "Bert")
    if change == "vocabulary":
        model.config.vocab_size = 99
    elif change == "loss":
        model.mlm_loss_fct = nn.CrossEntropyLoss(label_smoothing=0.1)
    elif change == "subclass":
        model.cls.predictions.decoder.__class__ = type("Doubled", (nn.Linear,), {})
    elif change == "head":
        model.cls.predictions.forward = lambda x: x
    else:
        CHANGES[change](model)
    with pytest.raises(UserError, match=r"skip_logits: got True, but this \w+ has no loss of masked") as error:
        fused(model, strict=False)
    assert reason is None or reason in str(error.value)
    assert not any("_sclkern" in vars(module) for module in model.modules())


def test_a_class_of_ones_own_is_refused():
    class Weighted(transformers.BertForMaskedLM):
        def forward(self, *args, **options):
            out = super().forward(*args, **options)
            out.loss = 2 * out.loss
            return out

    model = Weighted(tiny(transformers.BertConfig))
    with pytest.raises(UserError, match="skip_logits"):
        fused(model)


def test_arguments_that_do_not_fit_together():
    model, _ = build("Bert")
    with pytest.raises(UserError, match="only: got 'linear_cross_entropy', expected skip_logits=True with it"):
        sclkern.fuse(model, only="linear_cross_entropy")
    with pytest.raises(UserError, match="skip_logits: got True, but this BertForMaskedLM has no loss"):
        sclkern.fuse(model, only="attention", skip_logits=True)
    with pytest.raises(TypeError, match="skip_logits: got int, expected a bool"):
        sclkern.fuse(model, skip_logits=1)


def while_another_trains(model, inputs, call):
    """The result of a call that another thread makes while one trains, and the loss of that."""
    inside, leave, found = threading.Event(), threading.Event(), {}

    def wait(*_):
        inside.set()
        assert leave.wait(60)

    handle = model.bert.register_forward_pre_hook(wait)
    thread = threading.Thread(target=lambda: found.update(loss=model(**inputs).loss))
    thread.start()
    assert inside.wait(60)
    handle.remove()
    try:
        result = call(model)
    finally:
        leave.set()
        thread.join()
    return result, found["loss"]


@pytest.mark.parametrize("labelled", [True, False])
def test_two_threads_in_one_model(labelled):
    model, inputs = build("Bert")
    ours, _ = fused(model)
    others = {**inputs, "labels": inputs["labels"].roll(1, 1)} if labelled else {"input_ids": inputs["input_ids"]}
    found, loss = while_another_trains(ours, inputs, lambda one: one(**others))
    torch.testing.assert_close(loss, model(**inputs).loss)
    expected = model(**others)
    torch.testing.assert_close(*((found.loss, expected.loss) if labelled else (found.logits, expected.logits)))


def test_hooks_that_call_the_model():
    model, inputs = build("Bert")
    ours, _ = fused(model)
    seen = []

    def call(one):
        # Once: the hook itself calls the encoder.
        handles.pop().remove()
        seen.append(one(input_ids=inputs["input_ids"]).logits)

    losses = []
    for one in (ours, model):
        handles = [one.bert.register_forward_hook(lambda module, args, out, one=one: call(one))]
        losses.append(one(**inputs).loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*seen)
    # A head that is asked for logits in between would give the loss.
    handle = ours.bert.register_forward_hook(lambda module, args, out: seen.append(ours.cls(out[0])))
    with pytest.raises(RuntimeError, match=r"its cls\.predictions\.decoder was called 2 times in a call with labels"):
        ours(**inputs)
    handle.remove()
    agree(learn(ours, inputs), learn(model, inputs), 1e-9)


def test_a_class_that_is_patched_later(monkeypatch):
    model, inputs = build("Bert")
    ours, _ = fused(model)
    for cls in (type(model), type(model.cls.predictions)):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", functools.partialmethod(cls.forward))
            assert ours(**inputs).logits is not None
        assert ours(**inputs).logits is None


def test_a_loss_of_somebody_else_is_not_taken_for_torchs(monkeypatch):
    model, inputs = build("Bert")
    ours, _ = fused(model)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "CrossEntropyLoss", functools.partial(nn.CrossEntropyLoss, label_smoothing=0.3))
    agree(learn(ours, inputs), learn(model, inputs), 0)
    with pytest.raises(UserError, match="the CrossEntropyLoss of its file is not torch's"):
        fused(model)


def test_gradients_of_each_row():
    model, inputs = build("Bert", attn_implementation="eager")
    ours, _ = fused(model)
    parameters = {name: one.detach() for name, one in model.named_parameters()}

    def of_rows(one):
        def loss(parameters, ids, labels):
            given = {"input_ids": ids[None], "labels": labels[None]}
            return torch.func.functional_call(one, parameters, (), given).loss

        rows = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))
        return rows(parameters, inputs["input_ids"], inputs["labels"])

    agree(of_rows(ours), of_rows(model), 1e-9)


@pytest.mark.parametrize("by", ["argument", "configuration"])
@pytest.mark.parametrize("value", [False, 0, None])
def test_a_tuple_has_logits(by, value):
    model, inputs = build("Bert")
    ours, _ = fused(model)
    options = {"return_dict": value} if by == "argument" else {}
    for one in (ours, model):
        one.config.return_dict = one.config.return_dict if options else value
    found, expected = ours(**inputs, **options), model(**inputs, **options)
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert all(map(torch.equal, found, expected))


def test_a_call_that_is_traced():
    model, inputs = build("Bert")
    ours, _ = fused(model)

    class Loss(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, labels):
            return self.model(input_ids=ids, labels=labels).loss

    ids, labels = inputs["input_ids"], inputs["labels"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(Loss(ours), (ids, labels), check_trace=False)
    for others in (labels, labels.roll(1, 1), torch.full_like(labels, -100)):
        torch.testing.assert_close(traced(ids, others), Loss(model)(ids, others), equal_nan=True)


def test_accelerate_keeps_a_forward_beyond_revert():
    accelerate = pytest.importorskip("accelerate")
    model, inputs = build("Bert", torch.float32)
    ours = copy.deepcopy(model)
    report = sclkern.fuse(ours, only="linear_cross_entropy", skip_logits=True)
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(ours)
    assert ours(**inputs).loss.isfinite() and "forward" in vars(ours)
    report.revert()
    assert ours(**inputs).logits is not None
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(**inputs).loss, model(**inputs).loss)


def test_an_error_within_leaves_the_model_as_it_was():
    model, inputs = build("Bert")
    ours, _ = fused(model)
    with pytest.raises(ValueError):
        ours(input_ids=inputs["input_ids"], inputs_embeds=torch.zeros(1), labels=inputs["labels"])
    for one in (ours, model):
        with pytest.raises(TypeError):
            one(inputs["input_ids"], *[None] * 6, inputs["labels"], "one too many")
    agree(learn(ours, inputs), learn(model, inputs), 1e-9)
    # Labels that do not fit are an error of the model's own.
    for one in (ours, model):
        with pytest.raises((ValueError, IndexError)):
            one(**{**inputs, "labels": inputs["labels"][:, :-1].contiguous()})
        with pytest.raises((ValueError, IndexError)):
            one(**{**inputs, "labels": inputs["labels"].clamp_min(64)})


def test_trainer(tmp_path):
    """Which reads the columns that it needs from the signature of the forward."""
    pytest.importorskip("accelerate")
    losses = {}
    for kind in ("own", "fused"):
        model, inputs = build("Bert", torch.float32)
        if kind == "fused":
            model, _ = fused(model)
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
