"""``explain`` names the path that the op really takes, and every reason against the others.

What ran is observed: launches of Triton's kernels, calls of our registered ops, of PyTorch's attention and of the
eager definitions. No plan is compared with a plan.
"""

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from op_testing import run_in_interpreter
from sclkern import ops, reference
from sclkern.cpu import attention as cpu_attention
from sclkern.cpu import cross_attention as cpu_cross_attention
from sclkern.cpu import dropout_add as cpu_dropout_add
from sclkern.ops import dispatch
from sclkern.ops.dispatch import TRITON_INSTALLED, interpreted


@dataclass(frozen=True)
class Call:
    """A call of an op on CPU tensors, the path it takes, and the path in Triton's interpreter (None: too slow there).

    ``reason`` is part of the text of the choice, of ``interpreted_reason`` in the interpreter.
    """

    op: str
    arguments: Callable[[], dict[str, Any]]
    path: str
    interpreted_path: str | None
    reason: str = ""
    interpreted_reason: str = ""
    environment: dict[str, str] = field(default_factory=dict)


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [torch.randn(shape).to(dtype) for shape in shapes]


def attention(lengths=(4, 5), head_dim=32, dtype=torch.float32, batch=1, **options):
    shapes = [(batch, length, 2, head_dim) for length in (lengths[0], lengths[1], lengths[1])]
    return lambda: dict(zip(("query", "key", "value"), tensors(*shapes, dtype=dtype), strict=True)) | options


def packed(head_dim=32, dtype=torch.float32, ends=(0, 2, 5), **options):
    def build():
        query, key, value = tensors(*[(5, 1, head_dim)] * 3, dtype=dtype)
        cu_seqlens = torch.tensor(ends, dtype=torch.int32)
        lengths = {"cu_seqlens_q": cu_seqlens, "cu_seqlens_k": cu_seqlens, "max_seqlen_q": 3, "max_seqlen_k": 3}
        return {"query": query, "key": key, "value": value, **lengths, **options}

    return build


def frames(num_frames=3, head_dim=32, dtype=torch.float32, batch=1, **options):
    shape = (batch, 2 * num_frames, 1, head_dim)
    names = ("query", "key", "value")
    build = lambda: dict(zip(names, tensors(*[shape] * 3, dtype=dtype), strict=True))  # noqa: E731
    return lambda: build() | {"num_frames": num_frames, **options}


def cross(queries=12, keys=3, width=64, heads=2, dtype=torch.float32, **options):
    names = ("x", "context", "in_weight", "in_bias", "out_weight", "out_bias")
    shapes = ((1, queries, width), (1, keys, width), (3 * width, width), (3 * width,), (width, width), (width,))
    build = lambda: dict(zip(names, tensors(*shapes, dtype=dtype), strict=True))  # noqa: E731
    return lambda: build() | {"num_heads": heads, **options}


def sigmoid(rows=4, width=8, dtype=torch.float32):
    return lambda: (
        dict(zip(("image", "text"), tensors((rows, width), (rows, width), dtype=dtype), strict=True))
        | {
            "scale": 10.0,
            "bias": -10.0,
        }
    )


def completion(rows=4, width=8, dtype=torch.float32, other=None, **options):
    def build():
        recovered, complete = torch.randn(rows, width).to(dtype), torch.randn(rows, width).to(other or dtype)
        return {"recovered": recovered, "complete": complete, "temperature": 0.1, **options}

    return build


def cross_entropy(rows=4, words=11, dtype=torch.float32, **options):
    def build():
        hidden, weight = tensors((rows, 1), (words, 1), dtype=dtype)
        return {
            "hidden": hidden,
            "weight": weight,
            "bias": None,
            "labels": torch.zeros(rows, dtype=torch.int64),
        } | options

    return build


def layer_norm(width=8, dtype=torch.float32, **options):
    names = ("x", "residual", "weight", "bias")
    build = lambda: dict(zip(names, tensors((3, width), (3, width), (width,), (width,), dtype=dtype), strict=True))  # noqa: E731
    return lambda: build() | options


def gelu(dtype=torch.float32, bias=None, **options):
    return lambda: {"x": torch.randn(3, 8).to(dtype), "bias": torch.randn(8).to(bias or dtype)} | options


def patches(width=8, requires_grad=False, dtype=torch.float32, **options):
    def build():
        images = torch.randn(1, 1, 3, 4, 4).requires_grad_(requires_grad)
        weight, position, cls = tensors((width, 3, 2, 2), (5, width), (width,), dtype=dtype)
        return {"images": images, "weight": weight, "position": position, "cls": cls, **options}

    return build


def text(width=6):
    ids, lengths = torch.full((2, width), 5), torch.full((2,), width)
    options = {"kind": "mlm", "ratio": 0.3, "mask_id": 9, "vocab_size": 10, "seed": 1}
    return lambda: {"ids": ids, "lengths": lengths, **options}


def masked(keys):
    return {"key_padding_mask": torch.arange(keys)[None] < keys - 1}


NO_GPU = "tensors on cpu, kernels need a GPU" if TRITON_INSTALLED else "Triton is not installed"
EAGER = {"SCLKERN_BACKEND": "eager"}
SEED = {"dropout_p": 0.5, "seed": 3}
HALF, DOUBLE = torch.float16, torch.float64
CALLS = [
    Call("attention", attention(), "sdpa", "triton", "scaled_dot_product_attention", "Triton's interpreter"),
    Call("attention", attention(dtype=HALF), "sdpa", "triton"),
    Call("attention", attention(dtype=torch.bfloat16), "sdpa", "triton", NO_GPU),
    Call("attention", attention(head_dim=48), "sdpa", "sdpa", "head dim 48 has no kernel", "head dim 48 has no kernel"),
    Call("attention", attention(dtype=DOUBLE), "sdpa", "sdpa", "float64 has no kernel", "float64 has no kernel"),
    Call("attention", attention(softmax_scale=-1.0), "sdpa", "sdpa", "softmax_scale -1.0", "softmax_scale -1.0"),
    Call("attention", attention(**masked(5)), "sdpa", "triton"),
    Call("attention", attention(dropout_p=0.5), "cpu", "triton", "for dropout on a CPU"),
    Call("attention", attention(**SEED), "cpu", "triton", "for dropout on a CPU"),
    Call("attention", attention(head_dim=48, **SEED), "cpu", "cpu", "head dim 48", "for dropout on a CPU"),
    Call("attention", attention(**SEED, **masked(5)), "eager", "triton", "cannot draw the dropout mask of a seed"),
    Call("attention", attention(lengths=(4, 0)), "eager", "triton", "no keys"),
    Call("attention", attention(return_lse=True), "sdpa", "triton"),
    Call("attention", attention(backend="eager"), "eager", "eager", "requested by backend", "requested by backend"),
    Call("attention", attention(), "eager", "eager", "requested by SCLKERN_BACKEND", environment=EAGER),
    Call("packed_attention", packed(), "grouped", "triton", "sequences of equal lengths"),
    Call("packed_attention", packed(ends=(0, 2, 4)), "grouped", "triton"),
    Call("packed_attention", packed(dropout_p=0.5), "grouped", "triton"),
    Call("packed_attention", packed(**SEED), "grouped", "triton", "a cache holds, for dropout"),
    Call("packed_attention", packed(head_dim=20), "grouped", "grouped", "head dim 20", "head dim 20"),
    Call("packed_attention", packed(ends=(0,)), "eager", "triton", "no sequences"),
    Call("packed_attention", packed(backend="eager"), "eager", "eager"),
    Call("frame_attention", frames(), "sdpa", "triton", "once for patches and once for the CLS"),
    Call("frame_attention", frames(num_frames=1), "sdpa", "triton"),
    Call("frame_attention", frames(head_dim=20), "sdpa", "sdpa"),
    Call("frame_attention", frames(dtype=DOUBLE), "sdpa", "sdpa"),
    Call("frame_attention", frames(softmax_scale=0.0), "sdpa", "sdpa", "softmax_scale 0.0", "softmax_scale 0.0"),
    Call("frame_attention", frames(backend="eager"), "eager", "eager"),
    Call("cross_attention", cross(), "absorbed-keys", "triton-absorbed-keys", "absorbed into the 3 keys"),
    Call("cross_attention", cross(queries=3, keys=40), "absorbed-queries", "triton-absorbed-queries"),
    Call("cross_attention", cross(absorb="never"), "sdpa", "triton", "nothing absorbed, as requested"),
    Call("cross_attention", cross(absorb="never", **SEED), "cpu", "triton"),
    Call("cross_attention", cross(queries=20, keys=20), "sdpa", "triton", "nothing absorbed"),
    Call("cross_attention", cross(dtype=DOUBLE), "absorbed-keys", "absorbed-keys"),
    Call("cross_attention", cross(backend="eager"), "absorbed-keys", "absorbed-keys"),
    Call("completion_loss", completion(), "eager", "triton", "up to 3072 rows"),
    Call("completion_loss", completion(rows=3072, width=1), "eager", None),
    Call("completion_loss", completion(rows=3073, width=1), "tiled", None, "above 3072 rows"),
    Call("completion_loss", completion(rows=3073, width=1, backend="eager"), "eager", None),
    Call("completion_loss", completion(rows=3073, width=1, dtype=DOUBLE), "tiled", "tiled", "float64", "float64"),
    Call("completion_loss", completion(dtype=HALF, other=torch.float32), "eager", "triton"),
    Call("sigmoid_loss", sigmoid(), "eager", "triton", "up to 3072 rows"),
    Call("sigmoid_loss", sigmoid(rows=3073, width=1), "tiled", None, "above 3072 rows"),
    Call("sigmoid_loss", sigmoid(rows=3073, width=1, dtype=DOUBLE), "tiled", "tiled", "float64", "float64"),
    Call("linear_cross_entropy", cross_entropy(), "eager", "triton", "up to 16777216 logits"),
    Call("linear_cross_entropy", cross_entropy(rows=4096, words=4096), "eager", None),
    Call("linear_cross_entropy", cross_entropy(rows=4097, words=4096), "tiled", None, "above 16777216 logits"),
    Call("linear_cross_entropy", cross_entropy(dtype=DOUBLE), "eager", "eager"),
    Call("dropout_add_layer_norm", layer_norm(), "eager", "triton", NO_GPU),
    Call("dropout_add_layer_norm", layer_norm(return_sum=True), "eager", "triton"),
    Call("dropout_add_layer_norm", layer_norm(**SEED), "cpu", "triton"),
    Call(
        "dropout_add_layer_norm", layer_norm(width=4097), "eager", "eager", "rows of 4097 columns", "4096 in registers"
    ),
    Call("dropout_add_layer_norm", layer_norm(dtype=DOUBLE), "eager", "eager"),
    Call("bias_gelu", gelu(), "eager", "triton", NO_GPU),
    Call("bias_gelu", gelu(dtype=HALF, bias=torch.float32, approximate="quick"), "eager", "triton"),
    Call("bias_gelu", gelu(bias=DOUBLE), "eager", "eager", "float64 has no kernel", "float64 has no kernel"),
    Call("bias_gelu", gelu(dtype=torch.bfloat16), "eager", "triton"),
    Call("embed_patches", patches(), "eager", "triton", NO_GPU),
    Call("embed_patches", patches(requires_grad=True), "eager", "eager", "images require", "images require a gradient"),
    Call("embed_patches", patches(width=4097), "eager", "eager", "rows of 4097 columns", "rows of 4097 columns"),
    Call("embed_patches", patches(dtype=DOUBLE), "eager", "eager"),
    Call("select_patches", lambda: {"num_patches": 9, "keep_ratio": 0.5, "batch": 2, "seed": 1}, "eager", "triton"),
    Call("select_patches", lambda: {"num_patches": 4097, "keep_ratio": 0.5, "batch": 1, "seed": 1}, "eager", "eager"),
    Call("select_tokens", lambda: {"num_patches": 9, "ratio": 0.5, "batch": 2, "seed": 1}, "eager", "triton"),
    Call("mask_text", text(), "eager", "triton", NO_GPU),
    Call("mask_text", text(width=1025), "eager", "eager", "rows of 1025 tokens", "rows of 1025 tokens"),
]
NAMES = [f"{place} {call.op} {call.path}" for place, call in enumerate(CALLS)]


class OurOps(TorchDispatchMode):
    """Reports the calls of our registered ops."""

    def __init__(self, report):
        super().__init__()
        self.report = report

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "sclkern":
            # Unless a kernel is launched in it, which is reported too.
            self.report("tiled")
        return function(*args, **(kwargs or {}))


# What computes on a CPU beside the definitions, and the name of its path.
CPU_PATHS = [
    (cpu_attention, "attention", "cpu"),
    (cpu_attention, "packed_attention", "grouped"),
    (cpu_dropout_add, "dropout_add_layer_norm", "cpu"),
    (cpu_cross_attention, "cross_attention", "absorbed-{absorb}"),
]


def path_taken(call, monkeypatch):
    """Run the op and name its path from what ran."""
    seen = []
    spies = {name: getattr(reference, name) for name in ops.OPS}
    for name, definition in spies.items():

        def spied(*args, definition=definition, **kwargs):
            absorbed = kwargs.get("absorb", "never")
            seen.append("eager" if absorbed == "never" else f"absorbed-{absorbed}")
            return definition(*args, **kwargs)

        monkeypatch.setattr(reference, name, spied)
    for module, name, path in CPU_PATHS:
        computed = getattr(module, name)

        def on_cpu(*args, computed=computed, path=path, **kwargs):
            seen.append(path.format(**kwargs))
            return computed(*args, **kwargs)

        monkeypatch.setattr(module, name, on_cpu)
    sdpa = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: (seen.append("sdpa"), sdpa(*a, **k))[1])
    if interpreted():
        from triton.runtime.interpreter import InterpretedFunction

        run = InterpretedFunction.run

        def launched(self, *args, **kwargs):
            name = self.fn.__name__
            few_queries, absorbed = "softmax" in name, name.startswith("cross_attention")
            path = "triton-absorbed-queries" if few_queries else "triton-absorbed-keys"
            seen.append(path if absorbed else "triton")
            return run(self, *args, **kwargs)

        monkeypatch.setattr(InterpretedFunction, "run", launched)
    with OurOps(seen.append):
        getattr(ops, call.op)(**call.arguments())
    kernels = [path for path in seen if path.startswith("triton")]
    return (kernels or seen)[0]


@pytest.mark.parametrize("call", CALLS, ids=NAMES)
def test_explain_names_the_path_really_taken(call, monkeypatch):
    expected = call.interpreted_path if interpreted() else call.path
    if expected is None:
        pytest.skip("takes minutes in the interpreter")
    for name, value in call.environment.items():
        monkeypatch.setenv(name, value)
    choice = ops.explain(call.op, **call.arguments())
    assert (choice.path, path_taken(call, monkeypatch)) == (expected, expected)
    assert choice.backend == ("triton" if expected.startswith("triton") else "eager")
    assert str(choice).startswith(f"{choice.backend}: ")
    assert (call.interpreted_reason if interpreted() else call.reason) in str(choice)


def test_the_table_has_every_op():
    assert {call.op for call in CALLS} == set(ops.OPS) and len(CALLS) >= 40


def test_all_reasons_are_given():
    choice = ops.explain("attention", *tensors(*[(1, 2, 1, 48)] * 3, dtype=DOUBLE), softmax_scale=-1.0)
    for reason in ("head dim 48 has no kernel", "softmax_scale -1.0 is not above 0", "float64 has no kernel"):
        assert any(reason in given for given in choice.reasons), reason


@pytest.mark.skipif(interpreted(), reason="the interpreter takes CPU tensors")
@pytest.mark.parametrize("op", sorted(set(ops.OPS) - {"mask_text", "select_patches", "select_tokens"}))
def test_arguments_that_are_not_given_are_assumed_and_named(op):
    choice = ops.explain(op, torch.zeros(2, 3, 4, 64))
    assert NO_GPU in str(choice)
    assert choice.reasons[-1].startswith("not given, assumed supported: ")


@pytest.mark.skipif(not interpreted(), reason="not in the interpreter")
def test_what_the_interpreter_computes_wrongly_takes_the_eager_path(monkeypatch):
    # As outside of the tests, which correct it.
    monkeypatch.setattr(dispatch, "INTERPRETED_DTYPES", {torch.float32})
    x = torch.zeros(2, dtype=torch.bfloat16)
    assert str(ops.explain("bias_gelu", x, x)) == "eager: Triton's interpreter computes bfloat16 wrongly"


def test_masks_need_no_tensor():
    assert (
        ops.explain("select_patches").reasons[-1]
        == "not given, assumed supported: num_patches, keep_ratio, batch, seed"
    )


def test_the_environment_decides_and_never_silently(monkeypatch):
    x = torch.zeros(2)
    monkeypatch.setenv("SCLKERN_BACKEND", "eager")
    assert str(ops.explain("bias_gelu", x, x)) == "eager: requested by SCLKERN_BACKEND"
    monkeypatch.setenv("SCLKERN_BACKEND", "triton")
    with pytest.raises(ValueError, match=r"SCLKERN_BACKEND='triton': cannot run: float64 has no kernel"):
        ops.explain("bias_gelu", x.double(), x.double())
    monkeypatch.setenv("SCLKERN_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"SCLKERN_BACKEND: got 'cuda', expected one of auto"):
        ops.explain("bias_gelu", x, x)


def test_wrong_arguments_are_refused_as_the_op_refuses_them():
    x = torch.zeros(2)
    with pytest.raises(ValueError, match=r"op: got 'gelu', expected one of attention"):
        ops.explain("gelu", x)
    with pytest.raises(ValueError, match=r"tensors: got none"):
        ops.explain("bias_gelu")
    with pytest.raises(ValueError, match=r"approximate: got 'erf'"):
        ops.explain("bias_gelu", x, x, approximate="erf")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ops.explain("bias_gelu", x, x, kind="erf")


def test_each_distinct_choice_is_logged_once():
    code = (
        "import torch; from sclkern import ops; x = torch.zeros(2, 4)\n"
        "for _ in range(3): ops.bias_gelu(x, x[0]); ops.bias_gelu(x, x[0], backend='eager')"
    )
    for variable, lines in (("dispatch", 2), ("", 0)):
        environment = os.environ | {"SCLKERN_LOG": variable, "TRITON_INTERPRET": "0"}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        logged = [line for line in done.stderr.splitlines() if "bias_gelu takes path 'eager'" in line]
        assert len(logged) == lines, done.stderr


def test_in_the_interpreter():
    run_in_interpreter(__file__)
