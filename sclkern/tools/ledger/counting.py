"""Counts what a computation on fake CUDA tensors would launch: the Triton kernels of the ops, and torch's operators.

Inside ``Ledger`` every operator below autograd is seen once. One that only makes a view, or allocates, launches
nothing. An op of sclkern runs its launchers, whose launches are recorded instead of run; what torch computes around
them is counted as well. Bytes are those of every tensor that an operator reads, and of every tensor that it writes,
once each, as if no cache held them; a tensor that is expanded counts what it has in memory.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sclkern.ops._registration import LAUNCHERS, kernels

# Kernels and operators whose time is arithmetic; their bytes are counted apart.
ARITHMETIC = ("products", "attention")
_ATTENTION_KERNELS = ("attention_", "frame_attention_", "cross_attention_")
_PRODUCT_KERNELS = ("completion_loss_statistics", "completion_loss_weights", "sigmoid_loss_")
# Kinds of torch's operators by name; "casts" and "copies" also depend on dtypes, everything else is "elementwise".
_KINDS = {
    "products": "mm addmm bmm baddbmm addmv mv dot convolution convolution_backward",
    "attention": "_scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_flash_attention_backward _scaled_dot_product_efficient_attention_backward",
    "concatenations": "cat stack",
    "draws": "randint rand randn bernoulli bernoulli_ random_ uniform_ native_dropout",
    "fills": "zeros zeros_like new_zeros zero_ ones ones_like new_ones full full_like new_full fill_ fill arange "
    "scalar_tensor",
    "sums": "sum mean cumsum amax amin any all prod norm linalg_vector_norm",
    "norms": "native_layer_norm native_layer_norm_backward",
    "gathers": "index_select gather index embedding embedding_dense_backward index_copy index_put index_add "
    "scatter scatter_add index_copy_ index_put_ index_add_ select_backward slice_backward sort topk searchsorted",
}
_KIND = {name: kind for kind, names in _KINDS.items() for name in names.split()}
_COPIES = (
    "clone",
    "copy_",
    "_to_copy",
    "_foreach_copy_",
    "repeat",
    "constant_pad_nd",
    "expand_copy",
    "as_strided_copy",
)
# Operators that are two launches on a GPU: they fill or copy what they then write into, or have two results.
_TWICE = ("select_backward", "slice_backward", "index_copy", "index_put", "index_add", "scatter", "masked_fill",
          "embedding_dense_backward", "native_layer_norm_backward", "constant_pad_nd")  # fmt: skip
# Of their first tensor they read as much as they write.
_PICK = ("index_select", "gather", "index", "embedding")
_WRITE_ONLY = ("zero_", "fill_", "copy_", "bernoulli_", "random_", "uniform_")


@dataclass
class Line:
    """What all launches of one name do.

    Attributes:
        kind: "triton" or a kind of torch's operators; "products" and "attention" may be either's.
        ours: whether it is a Triton kernel of sclkern.
        launches: their number.
        bytes: read and written, all launches together.
    """

    kind: str
    ours: bool
    launches: int = 0
    bytes: int = 0


def memory(tensor: Tensor) -> int:
    """Bytes of a tensor's elements that have a place of their own in memory."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= size if stride or not size else 1
    return elements * tensor.element_size()


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


class Ledger(TorchDispatchMode):
    """Inside, operators on CUDA tensors are counted; to be entered after a ``FakeTensorMode``.

    Attributes:
        lines: by section and name.
        section: under which what follows is counted.
    """

    lines: dict[str, dict[str, Line]]
    section: str

    def __init__(self) -> None:
        super().__init__()
        self.lines = defaultdict(dict)
        self.section = ""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.namespace == "sclkern":
            return self._launchers(func, args, kwargs)
        if func.namespace == "aten" and func._can_decompose():
            # A function of several operators, called below autograd, where nothing has taken it apart.
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        self._operator(func, _tensors((args, kwargs)), _tensors(out))
        return out

    def _launchers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # The mode is off while it handles a call; the launchers' own allocations and sums are to be seen.
        with self, kernels.launch.recorded() as launches:
            out = LAUNCHERS[func._schema.name.split("::")[1]](*args, **kwargs)
        for launch in launches:
            name = launch.config.kernel
            kind = "triton"
            if name.startswith(_ATTENTION_KERNELS):
                kind = "attention"
            elif name.startswith(_PRODUCT_KERNELS):
                kind = "products"
            tensors = {id(t): t for t in launch.arguments.values() if isinstance(t, Tensor)}
            self.add(name, kind, sum(map(memory, tensors.values())), ours=True)
        return out

    def _operator(self, func: Any, given: list[Tensor], results: list[Tensor]) -> None:
        name = func._schema.name.split("::")[1]
        if "cuda" not in {tensor.device.type for tensor in (*given, *results)}:
            return
        if name == "_foreach_copy_":
            # Of lists, into the first from the second; it returns nothing.
            results, given = given[: len(given) // 2], given[len(given) // 2 :]
        if "empty" in name or not any(tensor.numel() for tensor in results):
            return
        if not func._schema.is_mutable:
            known = {tensor.untyped_storage()._cdata for tensor in given}
            if all(tensor.untyped_storage()._cdata in known for tensor in results):
                return
        written = sum(map(memory, results))
        read = sum(map(memory, given))
        if name in _PICK:
            read += written - memory(given[0])
        elif name in _WRITE_ONLY:
            read -= memory(given[0])
        kind = _KIND.get(name, "elementwise")
        if name in _COPIES:
            kind = "copies" if given[name == "copy_"].dtype == results[0].dtype else "casts"
            name += "" if kind == "copies" else " (cast)"
        self.add(name, kind, read + written, launches=2 if name in _TWICE else 1)

    def add(self, name: str, kind: str, moved: int, *, launches: int = 1, ours: bool = False) -> None:
        """Count launches in the present section.

        Args:
            name: of the kernel or operator.
            kind: of ``Line``.
            moved: bytes read and written.
            launches: their number.
            ours: whether it is a kernel of sclkern.
        """
        line = self.lines[self.section].setdefault(name, Line(kind, ours))
        line.launches += launches
        line.bytes += moved


def totals(lines: Iterable[Line]) -> dict[str, int]:
    """What lines sum up to.

    Args:
        lines: of a ``Ledger``.

    Returns:
        Launches of "triton" and of "torch", "bytes" of products and attention left out, and "arithmetic_bytes" theirs.
    """
    found = dict.fromkeys(("triton", "torch", "bytes", "arithmetic_bytes"), 0)
    for line in lines:
        found["triton" if line.ours else "torch"] += line.launches
        found["arithmetic_bytes" if line.kind in ARITHMETIC else "bytes"] += line.bytes
    return found
