"""Adapters of other libraries, on stand-ins that have the libraries' signatures and refuse what they refuse."""

from __future__ import annotations

import importlib
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F

from benchmarks.harness import op_cases, verification
from benchmarks.harness.implementations import UnsupportedError
from sclkern import reference
from sclkern.tools.specs import Size

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Function:
    """A function of a library.

    Attributes:
        source: version, or commit, and file in which it was read.
        module: that the adapter imports it from.
        name: of the function.
        signature: as it stands there, without annotations.
        compute: what the stand-in returns, of the arguments by name.
    """

    source: str
    module: str
    name: str
    signature: str
    compute: Callable[[dict], object]


def _attention(given: dict) -> torch.Tensor:
    q, k, v = (given[name] for name in "qkv")
    assert q.dtype in HALF and q.dtype == k.dtype == v.dtype and q.shape[-1] <= 256
    assert not given.get("causal") and given.get("softmax_scale") is None
    if given.get("cu_seqlens_q") is None:
        assert q.ndim == 4
        return reference.attention(q, k, v, key_padding_mask=None)
    assert q.ndim == 3 and given["cu_seqlens_q"].dtype == given["cu_seqlens_k"].dtype == torch.int32
    assert isinstance(given["max_seqlen_q"], int) and isinstance(given["max_seqlen_k"], int)
    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    return reference.packed_attention(q, k, v, *(given[name] for name in names))


def _with_lse(given: dict) -> tuple:
    return _attention(given), None


def _layer_norm(given: dict) -> torch.Tensor:
    return F.layer_norm(given["X"].float(), given["X"].shape[-1:], given["W"], given["B"], given["eps"]).to(
        given["X"].dtype
    )


def _rows_norm(given: dict) -> torch.Tensor:
    x, weight, bias = (given[name] for name in ("x", "weight", "bias"))
    assert x.dim() == 2 and weight.dim() == bias.dim() == 1
    assert weight.dtype == bias.dtype == torch.float32
    return F.layer_norm(x.float(), x.shape[-1:], weight, bias, given["eps"]).to(x.dtype)


def _mixed_norm(given: dict) -> torch.Tensor:
    x, weight, bias = (given[name] for name in ("input", "weight", "bias"))
    # The output has the dtype of the parameters.
    return F.layer_norm(x.float(), given["normalized_shape"], weight.float(), bias.float(), given["eps"]).to(
        weight.dtype
    )


def _liger_loss(given: dict) -> torch.Tensor:
    logits = F.linear(given["input"], given["weight"], given["bias"].to(given["input"].dtype)).float()
    assert given["input"].ndim == 2 and given["target"].ndim == 1 and given["target"].dtype == torch.int64
    return F.cross_entropy(logits, given["target"], ignore_index=given["ignore_index"], reduction=given["reduction"])


def _cce_loss(given: dict) -> torch.Tensor:
    e, c, targets = given["e"], given["c"], given["targets"]
    assert e.shape[:-1] == targets.shape and e.shape[-1] == c.shape[1] and e.dtype in HALF
    assert given["filter_eps"] is None and given["impl"] == "cce"
    return F.cross_entropy((e @ c.T).float(), targets, ignore_index=given["ignore_index"])


def _inf_loss(given: dict) -> torch.Tensor:
    q, k = given["q"], given["k"]
    assert q.dtype == k.dtype == torch.float32 and q.shape[-1] % given["head_dim"] == 0
    return F.cross_entropy((given["scale"] * q) @ k.T, torch.arange(len(q)))


_FLASH_2 = "softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None"
_FLASH_3 = (
    "softmax_scale=None, causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), "
    "attention_chunk=0, softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, "
    "return_attn_probs=False"
)
_FLASH_4 = (
    "softmax_scale=None, causal=False, window_size=(None, None), learnable_sink=None, softcap=0.0, num_splits=1, "
    "pack_gqa=None, deterministic=False, score_mod=None, score_mod_bwd=None"
)
_BLOCKS = "block_sparse_tensors=None, block_sparse_tensors_bwd=None"
_ENDS = "cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k"
_NO_ENDS = "cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None"
FLASH_2 = "flash-attn 2, flash_attn/flash_attn_interface.py at 0053002"
FLASH_3 = "flash-attn 3, hopper/flash_attn_interface.py at 01afd16"
FLASH_4 = "flash-attn-4 4.0.0b12, flash_attn/cute/interface.py"
LIGER = "liger-kernel 0.8.5, liger_kernel/transformers/functional.py"
FUNCTIONS = [
    Function(
        FLASH_2, "flash_attn", "flash_attn_func",
        f"q, k, v, dropout_p=0.0, {_FLASH_2}, deterministic=False, return_attn_probs=False", _attention,
    ),
    Function(
        FLASH_2, "flash_attn", "flash_attn_varlen_func",
        f"q, k, v, {_ENDS}, dropout_p=0.0, {_FLASH_2}, deterministic=False, return_attn_probs=False, block_table=None",
        _attention,
    ),
    Function(FLASH_3, "flash_attn_interface", "flash_attn_func", f"q, k, v, {_FLASH_3}", _attention),
    Function(
        FLASH_3, "flash_attn_interface", "flash_attn_varlen_func",
        f"q, k, v, {_ENDS}, seqused_q=None, seqused_k=None, {_FLASH_3}", _attention,
    ),
    Function(
        FLASH_4, "flash_attn.cute", "flash_attn_func",
        f"q, k, v, qv=None, gather_kv_indices=None, {_FLASH_4}, mask_mod=None, aux_tensors=None, {_BLOCKS}, "
        "return_lse=False", _with_lse,
    ),
    Function(
        FLASH_4, "flash_attn.cute", "flash_attn_varlen_func",
        f"q, k, v, qv=None, {_NO_ENDS}, min_seqlen_k=None, seqused_q=None, seqused_k=None, gather_kv_indices=None, "
        f"page_table=None, {_FLASH_4}, aux_tensors=None, return_lse=False", _with_lse,
    ),
    Function(LIGER, "liger_kernel.transformers.functional", "liger_layer_norm", "X, W, B, eps", _layer_norm),
    Function(
        LIGER, "liger_kernel.transformers.functional", "liger_fused_linear_cross_entropy",
        "input, weight, target, bias=None, ce_weight=None, ignore_index=-100, lse_square_scale=0.0, "
        "label_smoothing=0.0, reduction='mean', softcap=None, return_z_loss=False, accum_dtype=None, "
        "use_token_scaling=False, return_token_accuracy=False, return_predicted_tokens=False, chunk_mem_const=1",
        _liger_loss,
    ),
    Function(
        "apex, apex/normalization/fused_layer_norm.py at 014f30f", "apex.normalization.fused_layer_norm",
        "mixed_dtype_fused_layer_norm_affine",
        "input, weight, bias, normalized_shape, eps=1e-06, memory_efficient=False", _mixed_norm,
    ),
    Function(
        "quack-kernels 0.6.5, quack/rmsnorm.py", "quack.rmsnorm", "layernorm_fwd",
        "x, weight, bias=None, eps=1e-06, return_rstd=False, return_mean=False", _rows_norm,
    ),
    Function(
        "cut-cross-entropy 25.1.1, cut_cross_entropy/linear_cross_entropy.py", "cut_cross_entropy",
        "linear_cross_entropy",
        "e, c, targets, ignore_index=-100, softcap=None, reduction='mean', shift=False, filter_eps='high', impl='cce'",
        _cce_loss,
    ),
    Function(
        "inf-cl 1.2.1, inf_cl/ring.py", "inf_cl", "cal_inf_loss", "q, k, labels=None, scale=None, head_dim=256",
        _inf_loss,
    ),
]  # fmt: skip
IDS = [f"{function.module}.{function.name}" for function in FUNCTIONS]


def stand_in(function: Function) -> Callable:
    """A function of the library's signature."""
    space: dict = {"compute": function.compute}
    exec(f"def {function.name}({function.signature}):\n    return compute(dict(locals()))", space)
    return space[function.name]


@pytest.fixture
def libraries(monkeypatch):
    """Stand-ins of every library, in place of those that are installed."""
    for function in FUNCTIONS:
        parts = function.module.split(".")
        for depth in range(1, len(parts) + 1):
            name = ".".join(parts[:depth])
            if not isinstance(module := sys.modules.get(name), types.ModuleType) or not hasattr(module, "__stand_in__"):
                module = types.ModuleType(name)
                module.__stand_in__, module.__path__ = True, []
                module.__spec__ = importlib.machinery.ModuleSpec(name, None, is_package=True)
                monkeypatch.setitem(sys.modules, name, module)
        setattr(sys.modules[function.module], function.name, stand_in(function))
    # What shows that an apex is NVIDIA's.
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *others: sys.modules[name].__spec__)
    verification.clear_caches()
    yield
    verification.clear_caches()


# A small size for each op.
SIZES = {
    "attention": Size("9x7", {"B": 2, "Lq": 9, "Lk": 7, "text": ""}, 1),
    "packed_attention": Size("9x18", {"B": 2, "Lq": 9, "Lk": 18, "text": "k"}, 1, 0.0),
    "completion_loss": Size("8", {"N": 8}, 1),
    "linear_cross_entropy": Size("6", {"N": 6}, 1),
    "dropout_add_layer_norm": Size("5", {"T": 5}, 1),
}
ADAPTERS = [
    pytest.param(op, implementation, id=f"{op}-{implementation.name}")
    for op in SIZES
    for implementation in op_cases.IMPLEMENTATIONS[op]
    if implementation.package
]


@pytest.mark.parametrize(("op", "implementation"), ADAPTERS)
def test_an_adapter_computes_the_op(libraries, monkeypatch, op, implementation):
    from sclkern.tools.specs import linear_cross_entropy

    monkeypatch.setattr(linear_cross_entropy, "VOCABULARY", 40)
    case = op_cases.Case(op, SIZES[op], torch.bfloat16, implementation, "both")
    assert verification.verify(case)["error"] >= 0


def test_key_padding_is_refused_where_a_library_has_none(libraries):
    padded = Size("9x18", {"B": 2, "Lq": 9, "Lk": 18, "text": "k"}, 1)
    for implementation in op_cases.IMPLEMENTATIONS["attention"]:
        if implementation.name.startswith("flash-attn"):
            case = op_cases.Case("attention", padded, torch.bfloat16, implementation, "forward")
            with pytest.raises(UnsupportedError, match="no key padding mask"):
                verification.verify(case)


@pytest.mark.parametrize("function", FUNCTIONS, ids=IDS)
def test_an_installed_library_has_the_signature(function):
    """Names and defaults of what is installed; nothing is compared where it is not."""
    try:
        found = getattr(importlib.import_module(function.module), function.name)
    except (ImportError, AttributeError, OSError, RuntimeError):
        pytest.skip(f"{function.module} is not installed, or does not import here")
    recorded = inspect.signature(stand_in(function)).parameters
    # Arguments that a newer version adds are no obstacle.
    assert [name for name in inspect.signature(found).parameters if name in recorded] == list(recorded), function.source


def test_libraries_that_read_back_are_marked():
    marked = {i.name for op in SIZES for i in op_cases.IMPLEMENTATIONS[op] if i.reads_back}
    assert marked == {"liger-kernel", "cut-cross-entropy"}
    norms = op_cases.IMPLEMENTATIONS["dropout_add_layer_norm"]
    assert not any(implementation.reads_back for implementation in norms)
