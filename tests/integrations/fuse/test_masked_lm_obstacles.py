"""Losses of masked language modelling where something else is in the way: the models' own, refused, or an error."""

import copy
import functools
import sys
import threading
import warnings

import pytest
import torch
from torch import nn

import sclkern
from sclkern.errors import UserError
from swapped_models.checks import agree, learn
from swapped_models.masked import build, without_logits
from swapped_models.tiny import tiny

transformers = pytest.importorskip("transformers")


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
    ours, _ = without_logits(model)
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
        without_logits(model, strict=False)
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
        without_logits(model)


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
    ours, _ = without_logits(model)
    others = {**inputs, "labels": inputs["labels"].roll(1, 1)} if labelled else {"input_ids": inputs["input_ids"]}
    found, loss = while_another_trains(ours, inputs, lambda one: one(**others))
    torch.testing.assert_close(loss, model(**inputs).loss)
    expected = model(**others)
    torch.testing.assert_close(*((found.loss, expected.loss) if labelled else (found.logits, expected.logits)))


def test_hooks_that_call_the_model():
    model, inputs = build("Bert")
    ours, _ = without_logits(model)
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
    ours, _ = without_logits(model)
    for cls in (type(model), type(model.cls.predictions)):
        with monkeypatch.context() as patch:
            patch.setattr(cls, "forward", functools.partialmethod(cls.forward))
            assert ours(**inputs).logits is not None
        assert ours(**inputs).logits is None


def test_a_loss_of_somebody_else_is_not_taken_for_torchs(monkeypatch):
    model, inputs = build("Bert")
    ours, _ = without_logits(model)
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(module, "CrossEntropyLoss", functools.partial(nn.CrossEntropyLoss, label_smoothing=0.3))
    agree(learn(ours, inputs), learn(model, inputs), 0)
    with pytest.raises(UserError, match="the CrossEntropyLoss of its file is not torch's"):
        without_logits(model)


def test_gradients_of_each_row():
    model, inputs = build("Bert", attn_implementation="eager")
    ours, _ = without_logits(model)
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
    ours, _ = without_logits(model)
    options = {"return_dict": value} if by == "argument" else {}
    for one in (ours, model):
        one.config.return_dict = one.config.return_dict if options else value
    found, expected = ours(**inputs, **options), model(**inputs, **options)
    assert type(found) is type(expected)
    if isinstance(found, tuple):
        assert all(map(torch.equal, found, expected))


def test_a_call_that_is_traced():
    model, inputs = build("Bert")
    ours, _ = without_logits(model)

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
    # Another test's Trainer may have chosen a precision for the whole process.
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    accelerate.Accelerator(cpu=True, mixed_precision="bf16").prepare_model(ours)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
    assert ours(**inputs).loss.isfinite() and "forward" in vars(ours)
    report.revert()
    assert ours(**inputs).logits is not None
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(ours(**inputs).loss, model(**inputs).loss)


def test_an_error_within_leaves_the_model_as_it_was():
    model, inputs = build("Bert")
    ours, _ = without_logits(model)
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
