"""Launch configurations: which tiles, warps and stages a kernel is launched with, and who decides.

``select`` reads the table of an architecture (``config_tables.py``, a reason beside each entry); ``config_rules.py``
says how tiles follow from lengths. Every launcher takes ``config=None``, which is ``select`` for its tensors. Nothing
here needs Triton, so that the tables can be read anywhere:

    >>> from sclkern.kernels.config import select
    >>> select("attention", "forward", torch.bfloat16, "sm_90", queries=325, keys=325, head_dim=64)
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import torch

from sclkern.kernels.config_rules import Entry
from sclkern.kernels.config_tables import TABLES

# Bytes of shared memory that a block may take.
SHARED_MEMORY = {
    "sm_80": 163 * 1024,
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_90": 227 * 1024,
    "sm_100": 227 * 1024,
    "sm_120": 99 * 1024,
    "gfx942": 64 * 1024,
}
ARCHITECTURES = tuple(SHARED_MEMORY)

# The kernels of an op's pass. ``packed_attention`` has those of ``attention``; ``attention_dropout`` is launched before
# them where KEEP_BITS is set; ``cross_attention_queries`` is the form of ``cross_attention`` for few queries.
KERNELS: dict[tuple[str, str], tuple[str, ...]] = {
    ("attention", "forward"): ("attention_forward_kernel",),
    ("attention_dropout", "forward"): ("attention_dropout_kernel",),
    ("attention", "backward"): ("attention_backward_query_kernel", "attention_backward_key_kernel"),
    ("attention_bias", "backward"): ("attention_backward_bias_kernel",),
    ("frame_attention", "forward"): ("frame_attention_forward_kernel",),
    ("frame_attention", "backward"): ("frame_attention_backward_query_kernel", "frame_attention_backward_key_kernel"),
    ("cross_attention", "forward"): ("cross_attention_forward_kernel",),
    ("cross_attention", "backward"): ("cross_attention_backward_kernel",),
    ("cross_attention_queries", "forward"): ("cross_attention_softmax_forward_kernel",),
    ("cross_attention_queries", "backward"): ("cross_attention_softmax_backward_kernel",),
    ("completion_loss", "forward"): (
        "completion_loss_norm_kernel",
        "completion_loss_statistics_kernel",
        "completion_loss_merge_kernel",
    ),
    ("completion_loss", "backward"): (
        "completion_loss_anchor_kernel",
        "completion_loss_weights_kernel",
        "completion_loss_finish_kernel",
    ),
    ("sigmoid_loss", "forward"): ("sigmoid_loss_forward_kernel",),
    ("sigmoid_loss", "backward"): ("sigmoid_loss_slopes_kernel",),
    ("linear_cross_entropy", "forward"): ("linear_cross_entropy_rows_kernel", "linear_cross_entropy_reduce_kernel"),
    ("linear_cross_entropy", "backward"): ("linear_cross_entropy_gradient_kernel",),
    ("dropout_add_layer_norm", "forward"): ("dropout_add_layer_norm_forward_kernel",),
    ("dropout_add_layer_norm", "backward"): ("dropout_add_layer_norm_backward_kernel",),
    ("bias_gelu", "forward"): ("bias_gelu_forward_kernel",),
    ("bias_gelu", "backward"): ("bias_gelu_backward_kernel",),
    ("embed_patches", "forward"): ("unfold_patches_kernel", "embed_patches_forward_kernel"),
    ("embed_patches", "backward"): (
        "embed_patches_backward_kernel",
        "invert_keep_kernel",
        "position_gradient_kernel",
    ),
    ("select_patches", "forward"): ("select_patches_kernel",),
    ("select_tokens", "forward"): ("select_tokens_kernel",),
    ("mask_text", "forward"): ("mask_text_kernel",),
}


def register(op: str, pass_: str, **entries: Entry) -> None:
    """Add the kernels of an op to the table of every architecture, from the module that defines them.

    For an op that launches alike everywhere; what differs by architecture belongs in ``config_tables.py``.

    Args:
        op: name of the op.
        pass_: "forward" or "backward".
        **entries: by name of the jit function, in the order in which the kernels run.
    """
    KERNELS[op, pass_] = tuple(entries)
    for table in TABLES.values():
        table.update({kernel: entry for kernel, entry in entries.items() if kernel not in table})


# Numbers that the launcher reads (for its grid or its workspaces), and no constants of the kernel.
LAUNCHER_NUMBERS = ("PROGRAMS", "COLUMN_SUMS", "WORKSPACE", "KEEP_BITS")


@dataclass(frozen=True)
class LaunchConfig:
    """How one kernel is launched.

    Attributes:
        kernel: name of the jit function, such as "bias_gelu_forward_kernel".
        constants: (name, value) of the kernel's constants that are a choice, such as ("BLOCK_ROWS", 8).
        num_warps: warps of a program.
        num_stages: stages of software pipelining, None for Triton's default.
        numbers: (name, value) of what the launcher reads, ``LAUNCHER_NUMBERS``.
        reason: why it was chosen; "predicted: ..." until it is measured. No part of equality.
    """

    kernel: str
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int | None = None
    numbers: tuple[tuple[str, int], ...] = ()
    reason: str = field(default="", compare=False)

    @classmethod
    def of(
        cls, kernel: str, *, num_warps: int, num_stages: int | None = None, reason: str = "", **fields: int
    ) -> LaunchConfig:
        """A configuration with its constants and launcher numbers by keyword.

        Args:
            kernel: name of the jit function.
            num_warps: warps of a program.
            num_stages: stages of software pipelining, None for Triton's default.
            reason: why it was chosen.
            **fields: constants of the kernel and ``LAUNCHER_NUMBERS`` by name.

        Returns:
            The configuration.
        """
        constants = tuple((name, value) for name, value in fields.items() if name not in LAUNCHER_NUMBERS)
        numbers = tuple((name, value) for name, value in fields.items() if name in LAUNCHER_NUMBERS)
        return cls(kernel, constants, num_warps, num_stages, numbers, reason)

    @functools.cached_property
    def _hash(self) -> int:
        return hash((self.kernel, self.constants, self.num_warps, self.num_stages, self.numbers))

    def __hash__(self) -> int:
        # Of a key of every launch.
        return self._hash

    @functools.cached_property
    def fields(self) -> dict[str, int]:
        """Constants and launcher numbers by name."""
        return dict(self.constants + self.numbers)

    @functools.cached_property
    def options(self) -> dict[str, int]:
        """What a launch takes: constants, warps, and stages where they are given."""
        stages = {} if self.num_stages is None else {"num_stages": self.num_stages}
        return dict(self.constants) | {"num_warps": self.num_warps} | stages

    def __getitem__(self, name: str) -> int:
        return self.fields[name]

    def replace(self, **fields: int | None) -> LaunchConfig:
        """The same with other values of constants, launcher numbers, ``num_warps`` or ``num_stages``.

        Args:
            **fields: new values by name.

        Returns:
            The configuration.

        Raises:
            ValueError: the configuration has no such name.
        """
        known = {**self.fields, "num_warps": self.num_warps, "num_stages": self.num_stages}
        if unknown := sorted(fields.keys() - known.keys()):
            raise ValueError(f"{self.kernel}: got {', '.join(unknown)}, expected some of {', '.join(known)}")
        return LaunchConfig.of(self.kernel, reason="given", **{**known, **fields})  # type: ignore[arg-type]

    def __str__(self) -> str:
        options = ", ".join(f"{name}={value}" for name, value in (self.options | dict(self.numbers)).items())
        return f"{self.kernel}: {options} ({self.reason})" if self.reason else f"{self.kernel}: {options}"


Configs = LaunchConfig | Sequence[LaunchConfig] | None
"""A launcher of several kernels takes one configuration, which replaces that of its kernel, or a sequence of all."""


def select(op: str, pass_: str, dtype: torch.dtype, arch: str, **shapes: int) -> tuple[LaunchConfig, ...]:
    """The configurations of an op's pass, one for each kernel that it launches at these shapes.

    Args:
        op: name of the op, see ``KERNELS``.
        pass_: "forward" or "backward".
        dtype: of the features.
        arch: one of ``ARCHITECTURES``.
        **shapes: what the rules of these kernels read: ``queries``, ``keys`` and ``head_dim`` of attention,
            ``head_dim`` of frame attention, ``heads`` and ``keys`` of cross-attention, ``columns`` of kernels that hold
            whole rows, and ``rows``, optional, of those that add rows up.

    Returns:
        The configurations, in the order in which the kernels run.

    Raises:
        ValueError: an unknown op, pass or architecture, or a missing shape.
    """
    if (op, pass_) not in KERNELS:
        raise ValueError(f"op, pass_: got {op!r}, {pass_!r}, expected one of {', '.join(map(' '.join, KERNELS))}")
    return select_kernels(KERNELS[op, pass_], dtype, arch, tuple(shapes.items()))


@functools.lru_cache(maxsize=4096)
def select_kernels(
    kernels: tuple[str, ...], dtype: torch.dtype, arch: str, shapes: tuple[tuple[str, int], ...]
) -> tuple[LaunchConfig, ...]:
    """As ``select``, for kernels by name; shapes are pairs, because the cache needs hashable arguments."""
    if arch not in TABLES:
        raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(TABLES)}")
    chosen = []
    for kernel in kernels:
        entry = TABLES[arch][kernel]
        try:
            fields = entry.rule(dtype.itemsize, **dict(shapes))
        except TypeError as error:
            raise ValueError(f"shapes: got {', '.join(dict(shapes)) or 'none'} for {kernel}: {error}") from None
        if fields is not None:
            chosen.append(LaunchConfig.of(kernel, reason=entry.reason, **fields))
    return tuple(chosen)


def current_arch(device: torch.device) -> str:
    """The architecture of a device; "sm_90" of a CPU (the interpreter), meta tensors, and a GPU that is not there."""
    if _assumed:
        return _assumed[-1]
    if device.type != "cuda":
        return "sm_90"
    return _arch_of_gpu(torch.cuda.current_device() if device.index is None else device.index)


@functools.lru_cache(maxsize=64)
def _arch_of_gpu(index: int) -> str:
    if torch.version.hip:
        return "gfx942"
    try:
        major, minor = torch.cuda.get_device_capability(index)
    except (AssertionError, RuntimeError):
        return "sm_90"
    # A GPU without a table takes that of its generation, an unknown generation the one that needs the least memory.
    generations = {8: "sm_86", 9: "sm_90", 10: "sm_100", 11: "sm_100", 12: "sm_120"}
    exact = f"sm_{major}{minor}"
    return exact if exact in TABLES else generations.get(major, "sm_86")


_assumed: list[str] = []
_overrides: dict[str, Mapping[str, int]] = {}
_cached: list[Callable[[], None]] = []
_Settled = TypeVar("_Settled", bound=Callable[..., Any])


def settled(function: _Settled) -> _Settled:
    """Cache what follows from shapes and dtypes, such as a launch; ``override`` empties the cache.

    Args:
        function: of hashable arguments, each of one type.

    Returns:
        The function, with the cache.
    """
    cached = functools.lru_cache(maxsize=1024)(function)
    on_override(cached.cache_clear)
    return cached  # type: ignore[return-value]


def on_override(clear: Callable[[], None]) -> None:
    """Have a cache emptied where ``override`` begins and ends.

    Args:
        clear: empties it.
    """
    _cached.append(clear)


@contextmanager
def override(kernels: Sequence[str], **fields: int) -> Iterator[None]:
    """Inside, every selected configuration of these kernels has these values: how a candidate is tried through an op.

    Of the whole process, because autograd runs the backward in a thread of its own.

    Args:
        kernels: names of jit functions.
        **fields: as of ``LaunchConfig.replace``.

    Raises:
        ValueError: on a call inside that launches one of them: the value does not fit.
    """
    for kernel in kernels:
        if kernel not in TABLES["sm_90"]:
            raise ValueError(f"kernels: got {kernel!r}, expected some of {', '.join(TABLES['sm_90'])}")
    before = dict(_overrides)
    _override(before | dict.fromkeys(kernels, fields))
    try:
        yield
    finally:
        _override(before)


@contextmanager
def assume(arch: str) -> Iterator[None]:
    """Inside, launchers select for this architecture, whatever GPU there is: how another machine's are compiled.

    Args:
        arch: one of ``ARCHITECTURES``.

    Raises:
        ValueError: there is no table for it.
    """
    if arch not in TABLES:
        raise ValueError(f"arch: got {arch!r}, expected one of {', '.join(TABLES)}")
    _assumed.append(arch)
    _override(dict(_overrides))
    try:
        yield
    finally:
        _assumed.pop()
        _override(dict(_overrides))


def _override(values: Mapping[str, Mapping[str, int]]) -> None:
    _overrides.clear()
    _overrides.update(values)
    for clear in _cached:
        clear()


class Features(NamedTuple):
    """What stands for a tensor of features in ``resolve``.

    Attributes:
        dtype: of the features.
        device: where they are.
    """

    dtype: torch.dtype
    device: torch.device


def resolve(
    config: Configs, kernels: tuple[str, ...], like: torch.Tensor | Features, **shapes: int
) -> tuple[LaunchConfig, ...]:
    """The configurations that a launcher uses: those given, else those selected for the device and dtype of a tensor.

    Args:
        config: the launcher's argument.
        kernels: the kernels of the launcher.
        like: a tensor of the features, or its dtype and device.
        **shapes: as of ``select``.

    Returns:
        One configuration for each kernel that is launched.

    Raises:
        ValueError: a given configuration does not fit.
    """
    selected = select_kernels(kernels, like.dtype, current_arch(like.device), tuple(shapes.items()))
    if config is None and not _overrides:
        return selected
    if config is None:
        chosen = tuple(one.replace(**_overrides[one.kernel]) if one.kernel in _overrides else one for one in selected)
    elif isinstance(config, LaunchConfig):
        if config.kernel not in [one.kernel for one in selected]:
            launched = ", ".join(one.kernel for one in selected)
            raise ValueError(f"config: got that of {config.kernel}, expected one of {launched}, which is launched here")
        chosen = tuple(config if one.kernel == config.kernel else one for one in selected)
    else:
        chosen = tuple(config)
        if not {one.kernel for one in chosen} <= set(kernels) or not chosen:
            names = ", ".join(one.kernel for one in chosen) or "none"
            raise ValueError(f"config: got {names}, expected those of {', '.join(kernels)}")
    for one in chosen:
        if one not in selected:
            check(one, shapes)
    return chosen


def check(config: LaunchConfig, shapes: Mapping[str, int]) -> None:
    """Refuse a configuration that its kernel cannot be launched with at these shapes.

    Args:
        config: the configuration.
        shapes: as of ``select``.

    Raises:
        ValueError: what does not fit, and what would.
    """
    entry = TABLES["sm_90"][config.kernel]
    problems = []
    if sorted(config.fields) != sorted(entry.names):
        problems.append(f"constants {', '.join(config.fields) or 'none'}, expected {', '.join(entry.names)}")
    for name, value in {**dict(config.constants), "num_warps": config.num_warps}.items():
        if name not in entry.flags and (value < 1 or value & (value - 1)):
            problems.append(f"{name} {value}, expected a power of two")
    if config.num_warps > 32:
        problems.append(f"num_warps {config.num_warps}, expected at most 32")
    if config.num_stages is not None and config.num_stages < 1:
        problems.append(f"num_stages {config.num_stages}, expected at least 1")
    numbers = [(name, value) for name, value in config.numbers if name not in entry.flags]
    problems += [f"{name} {value}, expected at least 1" for name, value in numbers if value < 1]
    if not problems and (problem := entry.problem(config.fields, shapes)):
        problems.append(problem)
    if problems:
        raise ValueError(f"config: got for {config.kernel} {'; '.join(problems)}")


def of_kernel(configs: Sequence[LaunchConfig], kernel: str) -> LaunchConfig:
    """Find the configuration of a kernel.

    Args:
        configs: of ``resolve``.
        kernel: name of the jit function.

    Returns:
        The configuration.

    Raises:
        ValueError: there is none.
    """
    for config in configs:
        if config.kernel == kernel:
            return config
    raise ValueError(f"config: got none of {kernel}, expected one")
