"""A sanitizer of kernels: Triton's interpreter runs them, and every access to memory is checked.

``TRITON_INTERPRET=1 pytest --sanitize tests/ops/test_bias_gelu.py`` switches it on (``tests/conftest.py``).
A ``memory.SanitizerError`` names the kernel, the program, the line, the argument and the offset. It is raised by

- an access outside the storage of the argument whose pointer it was computed from, and a store outside the elements of
  that argument. A load may read what else the storage holds, such as the padding of a row;
- an address that is not a multiple of the size of what is read or written there;
- programs of one launch that meet: one reads or writes what another wrote, or writes what another read. Programs may
  meet in atomics on integers, whose order does not matter;
- one store with two values for one address. One program may write an address by two stores;
- an atomic on floating numbers, whose result depends on the order of the programs;
- a read of integers or bools that nobody has written, where a test fills fresh memory by ``memory.poison``. Fresh
  floating numbers are NaN, so that a result that depends on them is NaN too; a kernel may read and then discard them.

``bfloat16`` makes the interpreter compute bfloat16 as a GPU does; without it, it takes the bits for integers.

Not seen: what depends on the threads of a program, shared memory, the order of additions, the precision of a GPU's own
functions. Programs that wait for each other are not supported. Triton 3.6 to 3.9.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any


def replace(owner: Any, name: str, replacement: Callable[..., Any]) -> None:
    """Let ``owner.name(...)`` call ``replacement(original, ...)``."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def replaced(*arguments: Any, **options: Any) -> Any:
        return replacement(original, *arguments, **options)

    setattr(owner, name, replaced)
