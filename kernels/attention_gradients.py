"""How the gradients of query, key and value lie in memory: in one tensor where these are the parts of one.

Then the gradient of a packed projection needs no concatenation. Nothing here needs Triton.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def fake_gradients(query: Tensor, key: Tensor, value: Tensor, shared: int = 0, **_: object) -> tuple[Tensor, ...]:
    """Gradients of query, key and value as the kernels allocate them; the last ``shared`` of them in one tensor."""
    tensors = query, key, value
    apart = [tensor.new_empty(tensor.shape) for tensor in tensors[: 3 - shared]]
    joint = [key.new_empty((*key.shape[:-2], shared, *key.shape[-2:]))] if shared else []
    return padded_gradients(*apart, *joint)


def padded_gradients(*gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Three results, of which those that are parts of another are empty."""
    first, second, third = (*gradients, *(gradients[0].new_empty((0,)) for _ in range(3 - len(gradients))))
    return first, second, third


def separate_gradients(results: Sequence[Tensor]) -> Sequence[Tensor]:
    """The gradients of query, key and value from ``padded_gradients``."""
    *apart, last = [result for result in results if result.ndim > 1]
    return [*apart, last] if len(apart) == 2 else [*apart, *last.unbind(-3)]


def neighbours(*tensors: Tensor) -> bool:
    """Whether N tensors (..., H, D) are all parts (..., i, H, D) of one (..., N, H, D), in their order."""
    first = tensors[0]
    size = first.shape[-2] * first.shape[-1]
    strides = [first.shape[-1], 1]
    row = len(tensors) * size
    for length in reversed(first.shape[:-2]):
        strides.insert(0, row)
        row *= length
    storage, start = first.untyped_storage()._cdata, first.storage_offset()
    return all(
        tensor.stride() == tuple(strides)
        and tensor.shape == first.shape
        and tensor.storage_offset() == start + i * size
        and tensor.untyped_storage()._cdata == storage
        for i, tensor in enumerate(tensors)
    )
