"""What a fused model must still do: the same outputs, gradients, maps, tokens; and what its report claims."""

from __future__ import annotations

import collections
import contextlib
import copy
import inspect
import unittest.mock
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy
import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

import cpu_kernels
import sclkern
from sclkern import ops
from sclkern.errors import UserError
from swapped_models.inputs import ROWS
from swapped_models.others import OTHERS
from swapped_models.table import IDLE, MODELS, Model, build
from swapped_models.tiny import dropouts

# Callers of this class decide by ``need_weights`` whether they want maps, which the op does not have.
CALLER_DECIDES = "MultiheadAttention"


class Faults(list):
    """What a model did not do as before, in words."""

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Note an exception or a difference within the block."""
        try:
            yield
        except Exception as error:
            self.append(f"{what}: {type(error).__name__}: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return lines[0][:240]


def examine(name: str) -> tuple[dict[str, Any], Faults]:
    """Fuse a tiny model in every way, and compare it with itself as it was.

    Args:
        name: a model of the table.

    Returns:
        Its entry in the record (what was taken, what was left and why), and its faults.
    """
    faults = Faults()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        outcome = _examine(name, MODELS[name], faults)
    return outcome, faults


def _examine(name: str, entry: Model, faults: Faults) -> dict[str, Any]:
    tolerance = 1e-5 if entry.dtype is torch.float64 else 2e-3
    model, inputs = build(name, attn_implementation="eager")
    expected = compute(model, inputs)
    fused = copy.deepcopy(model)
    report = sclkern.fuse(fused, strict=False, skip_logits=entry.skip_logits)
    outcome = describe(report) | ({"idle": IDLE[name].split()} if name in IDLE else {})
    if report.replaced:
        _examine_fused(name, model, fused, report, inputs, expected, tolerance, faults)
    if name not in OTHERS:
        _examine_choices(name, model, inputs, expected, tolerance, outcome, faults)
    return outcome


def _examine_fused(name, model, fused, report, inputs, expected, tolerance, faults):
    """The whole model, fused."""
    ways = [(compute, expected)]
    if MODELS[name].skip_logits:
        ways.append((learn, learn(model, inputs)))
    with faults.of("fused"):
        calls: collections.Counter = collections.Counter()
        with counted(fused, calls):
            actual = [way(fused, inputs) for way, _ in ways]
        for values, (_, truth) in zip(actual, ways, strict=True):
            agree(values, truth, tolerance)
        claims(report, calls, IDLE.get(name, "").split())
    with faults.of("a row of padding"):
        padded_row(model, fused, inputs, tolerance)
    with faults.of("keys of the state"):
        assert list(fused.state_dict()) == list(model.state_dict())
    with faults.of("a copy"):
        agree(outputs(copy.deepcopy(fused), inputs), outputs(fused, inputs), 0.0)
    of_transformers = name not in OTHERS
    if of_transformers:
        with faults.of("maps"):
            maps(model, fused, inputs, tolerance)
        with faults.of("maps by the configuration"):
            configured_maps(model, fused, inputs, tolerance)
    with faults.of("training"):
        # Copies, because training moves the statistics of a BatchNorm.
        same(lambda one: outputs(copy.deepcopy(one).train(), inputs), fused, model, tolerance)
    generates = of_transformers and MODELS[name].generates and model.can_generate() and "input_ids" in inputs
    if generates:
        with faults.of("generation"):
            same(lambda one: generate(one, inputs), fused, model, tolerance)
    with faults.of("on kernels"), kernels():
        calls = collections.Counter()
        with counted(fused, calls):
            actual = [way(fused, inputs) for way, _ in ways]
        for values, (_, truth) in zip(actual, ways, strict=True):
            agree(values, truth, tolerance)
        claims(report, calls, IDLE.get(name, "").split())
    with faults.of("reverted"):
        report.revert()
        for way, truth in ways:
            agree(way(fused, inputs), truth, 0.0)
        assert all(type(a) is type(b) for a, b in zip(fused.modules(), model.modules(), strict=True))
    for one in sorted(dropouts(model.config) if of_transformers else {"p"}):
        with faults.of(f"{one} = 1"):
            dropped(name, inputs, one, tolerance)


def _examine_choices(name, model, inputs, expected, tolerance, outcome, faults):
    """Other ways to the ops: fused from torch's attention, one layer of a model, ``attn_implementation``."""
    with faults.of("by default"):
        default, _ = build(name)
        full = unpadded(inputs)
        before = [outputs(default, one) for one in (inputs, full)]
        sclkern.fuse(default, strict=False)
        for one, truth in zip((inputs, full), before, strict=True):
            agree(outputs(default, one), truth, tolerance)
    with faults.of("a part"):
        part(name, inputs, tolerance)
    sclkern.register_attention()
    outcome["attn_implementation"] = "equal"
    try:
        selected, _ = build(name, attn_implementation="sclkern")
    except Exception as error:
        # Raised by transformers: the model has one attention only, or a table of its own classes.
        outcome["attn_implementation"] = f"{type(error).__name__} of transformers: {_first_line(error)}"
        return
    try:
        outputs(selected, inputs)
    except UserError as error:
        outcome["attn_implementation"] = f"UserError: {_first_line(error)}"
    except KeyError as error:
        # Of ModernBERT's own table in transformers 5.0.
        outcome["attn_implementation"] = f"KeyError of transformers: {_first_line(error)}"
    except Exception as error:
        faults.append(f"selected: {type(error).__name__}: {_first_line(error)}")
    else:
        with faults.of("selected"):
            agree(compute(selected, inputs), expected, tolerance)
        with faults.of("maps, selected"):
            maps(model, selected, inputs, tolerance)
        if MODELS[name].generates and model.can_generate() and "input_ids" in inputs:
            with faults.of("generation, selected"):
                same(lambda one: generate(one, inputs), selected, model, tolerance)


def same(compute: Callable[[Any], dict[str, Tensor]], ours: Any, theirs: Any, tolerance: float) -> None:
    """Both compute the same, unless the model itself cannot (Gemma 3 in training, CPM-Ant, with transformers 5.0)."""
    try:
        expected = compute(theirs)
    except Exception:
        return
    agree(compute(ours), expected, tolerance)


def dropped(name: str, inputs: dict[str, Any], dropout: str, tolerance: float) -> None:
    """Where one kind of dropout drops everything, training is deterministic: ours and theirs must agree."""
    try:
        model, _ = build(name, {dropout: 1.0}, attn_implementation="eager")
    except ValueError:
        return  # DiffLlama has no such dropout
    fused = copy.deepcopy(model)
    sclkern.fuse(fused, strict=False)
    try:
        expected = outputs(model.train(), inputs)
    except Exception:
        return  # nor does the model itself take it
    agree(outputs(fused.train(), inputs), expected, tolerance)
    with kernels():
        agree(outputs(fused, inputs), expected, tolerance)


def part(name: str, inputs: dict[str, Any], tolerance: float) -> None:
    """One layer of each stack is fused, and its model knows nothing of it."""
    full = unpadded(inputs)
    for options in ({}, {"attn_implementation": "eager"}):
        model, _ = build(name, **options)
        before = [outputs(model, one) for one in (inputs, full)]
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) > 1]
        for stack in stacks:
            sclkern.fuse(stack[0], strict=False)
        for one, truth in zip((inputs, full), before, strict=True):
            agree(outputs(model, one), truth, tolerance)
    reference, _ = build(name, attn_implementation="eager")
    outputs(reference, inputs)  # BigBird chooses its attention in the first call
    maps(reference, model, inputs, tolerance)


def unpadded(inputs: dict[str, Any]) -> dict[str, Any]:
    """Without padding, models hand no mask to torch's attention, not even where it is causal."""
    masks = ("attention_mask", "decoder_attention_mask")
    return {name: value.new_ones(value.shape) if name in masks else value for name, value in inputs.items()}


def padded_row(model: Any, fused: Any, inputs: dict[str, Any], tolerance: float) -> None:
    """A row of nothing but padding gives numbers, and changes no other row."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[0] != ROWS:
        return
    inputs = inputs | {"attention_mask": mask.clone()}
    inputs["attention_mask"][1] = 0
    inputs.pop("return_loss", None)
    try:
        expected = outputs(model, inputs)
    except Exception:
        return  # the model itself does not take it
    actual = outputs(fused, inputs)
    for key, value in actual.items():
        truth = expected[key]
        if value.shape[:1] == (ROWS,) and truth.isfinite().all():
            assert value.isfinite().all(), f"{key} is not finite"
            rows = torch.tensor([0, 2])
            if "logits_per" in key:  # of every row with every row
                value, truth = value[:, rows], truth[:, rows]
            close(key, value[rows], truth[rows], tolerance)


def maps(model: Any, fused: Any, inputs: dict[str, Any], tolerance: float) -> None:
    """Attention maps are those of the model's own code, as many and of the same layers."""
    try:
        expected = outputs(model, inputs, output_attentions=True)
    except Exception:
        return  # the model itself has no maps
    agree(outputs(fused, inputs, output_attentions=True), expected, tolerance, maps=True)


def configured_maps(model: Any, fused: Any, inputs: dict[str, Any], tolerance: float) -> None:
    """The same where the configuration asks for maps after the model was fused."""
    try:
        model.config.output_attentions = True
        expected = outputs(model, inputs)
    except Exception:
        return  # the model itself has no maps
    finally:
        model.config.output_attentions = False
    fused.config.output_attentions = True
    try:
        agree(outputs(fused, inputs), expected, tolerance, maps=True)
    finally:
        fused.config.output_attentions = False


def generate(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Four tokens, and the logits that chose them."""
    names = inspect.signature(type(model).forward).parameters
    inputs = {name: value for name, value in inputs.items() if name not in ("use_cache", "labels", "return_loss")}
    if "decoder_input_ids" in names:
        inputs.pop("decoder_input_ids", None)
    seed()
    model.generation_config.pad_token_id = 0
    start = {"decoder_start_token_id": 1} if model.config.is_encoder_decoder else {}
    options: dict[str, Any] = start | {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
    out = model.generate(**copy.deepcopy(inputs), **options, return_dict_in_generate=True, output_logits=True)
    return {"sequences": out.sequences.double(), **{f"logits {i}": one for i, one in enumerate(out.logits)}}


def seed() -> None:
    # Models of speech draw what they mask from NumPy.
    torch.manual_seed(1)
    numpy.random.seed(1)


def outputs(model: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """Every tensor of floating numbers that the model returns."""
    seed()
    with torch.no_grad():
        return flatten(model(**copy.deepcopy(inputs), **options))


def compute(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs, and gradients of every parameter."""
    model.zero_grad()
    seed()
    out = flatten(model(**copy.deepcopy(inputs)))
    # BridgeTower returns maps that were not requested; fused, it does not.
    out = {name: value for name, value in out.items() if "attentions" not in name}
    loss = sum(value.double().square().mean() for value in out.values() if value.requires_grad)
    if isinstance(loss, Tensor):
        loss.backward()
    gradients = {f"grad {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {name: value.detach() for name, value in out.items()} | gradients


def learn(model: Any, inputs: dict[str, Any], **options: Any) -> dict[str, Tensor]:
    """The loss of masked language modelling in training, and gradients of every parameter."""
    ids = inputs["input_ids"]
    # Every third token.
    labels = torch.where(torch.arange(ids.numel()).view_as(ids) % 3 == 0, ids, -100)
    was_training = model.training
    model.train().zero_grad()
    seed()
    loss = model(**{"labels": labels, **copy.deepcopy(inputs)}, **options).loss
    loss.backward()
    model.train(was_training)
    gradients = {f"grad {name}": one.grad for name, one in model.named_parameters() if one.grad is not None}
    return {"loss": loss.detach()} | gradients


def flatten(value: Any, prefix: str = "") -> dict[str, Tensor]:
    if isinstance(value, Tensor):
        return {prefix: value} if value.is_floating_point() else {}
    items = value.items() if hasattr(value, "items") else enumerate(value) if isinstance(value, (tuple, list)) else ()
    found: dict[str, Tensor] = {}
    for name, one in items:
        found |= flatten(one, f"{prefix}.{name}" if prefix else str(name))
    return found


def agree(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float, maps: bool = False) -> None:
    """Raise an error that names the first difference; maps that were not requested may be None."""
    if not maps:
        actual, expected = ({k: v for k, v in one.items() if "attentions" not in k} for one in (actual, expected))
    missing, more = sorted(expected.keys() - actual.keys()), sorted(actual.keys() - expected.keys())
    assert not missing, f"{len(missing)} missing: {missing[:3]}"
    assert not more, f"{len(more)} more: {more[:3]}"
    # The gradient of a bias of keys, and of others that cancel out, is rounding alone.
    gradients = [
        float(value.abs().max()) for name, value in expected.items() if name.startswith("grad ") and value.numel()
    ]
    floor = max([1e-2, *(1e-2 * size for size in gradients)])
    for name, truth in expected.items():
        close(name, actual[name], truth, tolerance, floor if name.startswith("grad ") else 1e-2)


def close(name: str, value: Tensor, truth: Tensor, tolerance: float, floor: float = 1e-2) -> None:
    """Equal to within a tolerance relative to the largest number, or to ``floor`` where that is more."""
    assert value.shape == truth.shape, f"{name}: {tuple(value.shape)}, not {tuple(truth.shape)}"
    assert value.dtype == truth.dtype, f"{name}: {value.dtype}, not {truth.dtype}"
    finite = truth.isfinite()
    if not finite.any():
        return  # the model itself computes no numbers, as some do where dropout drops everything
    assert (value.isfinite() == finite).all(), f"{name}: not finite at other places"
    error, size = (value - truth)[finite].abs(), truth[finite].abs()
    if error.numel():
        largest = max(float(size.max()), floor)
        assert float(error.max()) <= tolerance * largest, f"{name}: off by {float(error.max()):.1e} of {largest:.1e}"


def describe(report: Any) -> dict[str, Any]:
    """The entry of the record: by class, what computes it, or why it was left."""
    taken: dict[str, set[str]] = collections.defaultdict(set)
    left: dict[str, set[str]] = collections.defaultdict(set)
    for one in report.replaced:
        taken[one.module].add(f"{one.by}{' on a GPU' * (one.device == 'cuda')}: {one.calls}")
    for one in report.left:
        left[one.module].add(one.why)
    return {
        "taken": {name: sorted(values) for name, values in sorted(taken.items())},
        "left": {name: sorted(values) for name, values in sorted(left.items())},
    }


def claims(report: Any, calls: collections.Counter, excused: Sequence[str] = ()) -> None:
    """Every module that the report calls active has called its op, except the excused classes."""
    idle = [
        f"{one.path or '(the model)'} ({one.by})"
        for one in report.active
        if one.module not in (CALLER_DECIDES, *excused)
        and not any(count for (path, op), count in calls.items() if path == one.path and _is_of(op, one.by))
    ]
    assert not idle, f"{len(idle)} never call their op: {idle[:3]}"


def _is_of(op: str, by: str) -> bool:
    return not by.startswith("ops.") or op == by.removeprefix("ops.").split(",")[0].split(" ")[0]


@contextlib.contextmanager
def counted(model: nn.Module, calls: collections.Counter) -> Iterator[None]:
    """Count the calls of every op by the modules around it, as (path, op)."""
    paths = {id(module): path for path, module in model.named_modules()}
    stack: list[str] = []

    def enter(module, args):
        stack.append(paths.get(id(module), "?"))

    def leave(module, args, out):
        stack.pop()

    def count(name, function):
        def run(*args, **options):
            calls.update((path, name) for path in set(stack))
            return function(*args, **options)

        return run

    with contextlib.ExitStack() as undo:
        for name in ops.OPS:
            undo.enter_context(unittest.mock.patch.object(ops, name, count(name, getattr(ops, name))))
        undo.callback(hooks.register_module_forward_pre_hook(enter).remove)
        undo.callback(hooks.register_module_forward_hook(leave, always_call=True).remove)
        yield


@contextlib.contextmanager
def kernels() -> Iterator[None]:
    """The path of the kernels on any machine: every op believes in one, and computes by its definition."""
    cpu_kernels.install()
    with unittest.mock.patch("sclkern.ops.dispatch._problems", lambda devices, dtypes: ()):
        yield
