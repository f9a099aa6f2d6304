"""Launch configurations: tables are complete and give reasons; launchers use what they are given or refuse it."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import itertools

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")

from sclkern.kernels import config as config_module
from sclkern.kernels.attention import attention_forward
from sclkern.kernels.attention_backward import attention_backward, backward_launches
from sclkern.kernels.bias_gelu import bias_gelu_forward
from sclkern.kernels.completion_loss import completion_loss_forward
from sclkern.kernels.config import (
    ARCHITECTURES,
    KERNELS,
    SHARED_MEMORY,
    LaunchConfig,
    current_arch,
    override,
    register,
    select,
)
from sclkern.kernels.config_rules import Entry, fixed
from sclkern.kernels.config_tables import TABLES
from sclkern.kernels.launch import recorded
from sclkern.tools.specs import SPECS

SHAPES = {"queries": 325, "keys": 325, "head_dim": 64}
# What the rules of an op read.
SHAPES_OF = {
    "attention": SHAPES,
    "attention_bias": SHAPES,
    "frame_attention": {"head_dim": 64},
    "cross_attention": {"heads": 12, "keys": 13},
    "cross_attention_queries": {"columns": 325},
    "dropout_add_layer_norm": {"columns": 768},
    "embed_patches": {"columns": 768},
    "select_patches": {"columns": 768},
    "select_tokens": {"columns": 768},
    "mask_text": {"columns": 768},
}


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_has_a_configuration_and_a_reason(arch):
    assert set(TABLES) == set(ARCHITECTURES) == set(SHARED_MEMORY)
    assert set(TABLES[arch]) == {kernel for kernels in KERNELS.values() for kernel in kernels}
    for (op, pass_), kernels in KERNELS.items():
        for dtype in (torch.bfloat16, torch.float32):
            configs = select(op, pass_, dtype, arch, **SHAPES_OF.get(op, {}))
            assert [config.kernel for config in configs] == list(kernels)
            for config in configs:
                assert config.reason.startswith(("predicted: ", "measured: ")), config
                assert sorted(config.fields) == sorted(TABLES[arch][config.kernel].names), config
                assert config in {config} and hash(config) == hash(dataclasses.replace(config, reason=""))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_backward_of_attention_writes_every_gradient_at_all_lengths(arch):
    """Both of its kernels decide alike which of them runs alone."""
    lengths = (0, 1, 13, 16, 17, 32, 33, 50, 64, 65, 96, 128, 129, 325)
    for dtype, head_dim in itertools.product((torch.bfloat16, torch.float32), (32, 64, 128)):
        for queries, keys in itertools.product(lengths, repeat=2):
            shapes = {"queries": queries, "keys": keys, "head_dim": head_dim}
            configs = select("attention", "backward", dtype, arch, **shapes)
            assert 1 <= len(backward_launches(configs, queries, keys)) <= 2


def test_what_the_tables_say_of_attention_at_325():
    """As the docstring of config_tables does."""
    (forward,) = select("attention", "forward", torch.bfloat16, "sm_90", **SHAPES)
    assert (forward["BLOCK_QUERIES"], forward["BLOCK_KEYS"], forward.num_warps) == (128, 64, 8)
    by_query, by_key = select("attention", "backward", torch.bfloat16, "sm_90", **SHAPES)
    assert (by_query["BLOCK_QUERIES"], by_query["BLOCK_KEYS"], by_query.num_warps) == (64, 32, 4)
    assert (by_key["BLOCK_QUERIES"], by_key["BLOCK_KEYS"], by_key.num_warps) == (32, 64, 4)


@pytest.mark.parametrize(
    ("rows", "summed"), [(None, 32), (64 * 325, 32), (16896, 32), (16895, 16), (16 * 325, 8), (832, 8), (0, 8)]
)
def test_few_rows_are_spread_over_more_programs(rows, summed):
    shapes = {} if rows is None else {"rows": rows}
    (config,) = select("dropout_add_layer_norm", "backward", torch.bfloat16, "sm_90", columns=768, **shapes)
    assert config["ROWS_PER_PROGRAM"] == summed
    (short,) = select("dropout_add_layer_norm", "backward", torch.bfloat16, "sm_90", columns=16, **shapes)
    assert short["ROWS_PER_PROGRAM"] % short["BLOCK_ROWS"] == 0


def test_a_module_can_bring_its_own_entries(monkeypatch):
    monkeypatch.setattr(config_module, "KERNELS", dict(KERNELS))
    monkeypatch.setattr(config_module, "TABLES", {arch: dict(table) for arch, table in TABLES.items()})
    entry = Entry(fixed(BLOCK=64, num_warps=2), "predicted: short", ("BLOCK",))
    register("short", "forward", short_kernel=entry)
    (config,) = select("short", "forward", torch.float32, "gfx942")
    assert (config.kernel, config["BLOCK"], config.num_warps) == ("short_kernel", 64, 2)


@pytest.mark.parametrize(
    ("arguments", "shapes", "message"),
    [
        (("attention", "both", torch.bfloat16, "sm_90"), SHAPES, "op, pass_: got 'attention', 'both'"),
        (("attention", "forward", torch.bfloat16, "sm_70"), SHAPES, "arch: got 'sm_70', expected one of sm_80"),
        (
            ("attention", "forward", torch.bfloat16, "sm_90"),
            {"queries": 5},
            "shapes: got queries for attention_forward",
        ),
    ],
)
def test_an_unknown_choice_is_refused(arguments, shapes, message):
    with pytest.raises(ValueError, match=message):
        select(*arguments, **shapes)


def test_the_architecture_is_that_of_the_device(monkeypatch):
    assert current_arch(torch.device("cpu")) == current_arch(torch.device("meta")) == "sm_90"
    for index, (capability, arch) in enumerate(
        {(8, 0): "sm_80", (8, 9): "sm_89", (10, 3): "sm_100", (12, 1): "sm_120", (7, 5): "sm_86"}.items()
    ):
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, capability=capability: capability)
        assert current_arch(torch.device("cuda", 40 + index)) == arch


# Public functions of kernel modules that launch nothing, or by launchers alone.
HELPERS = (
    "ahead_of_time", "arguments", "backward_launches", "bias_strides", "bounds", "completion_loss_backward", "entry",
    "padded_keys", "shared_patches", "sizes",
)  # fmt: skip


def test_every_launcher_takes_a_configuration():
    modules = [importlib.import_module(f"sclkern.kernels.{name}") for spec in SPECS.values() for name in spec.kernels]
    for module in modules:
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if function.__module__ == module.__name__ and not name.startswith("_") and name not in HELPERS:
                *_, last = inspect.signature(function).parameters.values()
                assert last.name == "config" and last.default is None, f"{module.__name__}.{name}"


@pytest.mark.parametrize("op", SPECS)
def test_every_launch_is_the_selected_one_and_can_be_overridden(op):
    spec, size = SPECS[op], SPECS[op].sizes[0]
    inputs = spec.inputs(size.values, torch.bfloat16, "meta")
    seed = meta(1, dtype=torch.int64) if size.dropout_p else None

    def launches():
        with recorded() as calls:
            backward = spec.launch(inputs, size.dropout_p, seed)
            if backward is not None:
                backward()
        return {call.config.kernel: call.config for call in calls}

    selected = launches()
    name = "attention" if op == "packed_attention" else op
    kernels = {kernel for (other, _), of_pass in KERNELS.items() if other == name for kernel in of_pass}
    assert selected and set(selected) <= kernels
    for kernel, config in selected.items():
        with override([kernel], num_warps=2 * config.num_warps if config.num_warps < 32 else 16):
            changed = launches()
        assert {name for name in changed if changed[name] != selected[name]} == {kernel}
    assert launches() == selected


X, BIAS = meta(40, 768), meta(768)
GELU = LaunchConfig.of("bias_gelu_forward_kernel", BLOCK_ROWS=4, BLOCK_COLUMNS=128, BUILTIN_ERF=0, num_warps=2)


def test_a_given_configuration_is_launched():
    with recorded() as calls:
        bias_gelu_forward(X, BIAS, 0, config=GELU)
    assert calls[0].config == GELU and calls[0].grid == (10, 6)
    assert calls[0].arguments.items() >= {"BLOCK_ROWS": 4, "BLOCK_COLUMNS": 128, "num_warps": 2}.items()
    assert "num_stages" not in calls[0].arguments


def test_one_configuration_replaces_that_of_its_kernel():
    features, temperature = meta(1, 4096, 768), meta(dtype=torch.float32)
    arguments = features, features, temperature, None, None, True, False, True, 1e-8, 0, 4096
    with recorded() as selected:
        completion_loss_forward(*arguments)
    merge = LaunchConfig.of("completion_loss_merge_kernel", BLOCK_ROWS=64, BLOCK_SPLITS=16, num_warps=4)
    with recorded() as given:
        completion_loss_forward(*arguments, config=merge)
    assert [c.config.kernel for c in given] == [c.config.kernel for c in selected]
    assert {c.config for c in given} == {merge, *(c.config for c in selected if c.config.kernel != merge.kernel)}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dataclasses.replace(GELU, kernel="mask_text_kernel"), "config: got that of mask_text_kernel, expected one of"),
        (GELU.replace(BLOCK_ROWS=3), "BLOCK_ROWS 3, expected a power of two"),
        (GELU.replace(num_warps=64), "num_warps 64, expected at most 32"),
        (GELU.replace(num_stages=0), "num_stages 0, expected at least 1"),
        (
            LaunchConfig.of(GELU.kernel, BLOCK=64, num_warps=4),
            "constants BLOCK, expected BLOCK_ROWS, BLOCK_COLUMNS, BUILTIN_ERF",
        ),
        ((), "config: got none, expected those of bias_gelu_forward_kernel"),
    ],
    ids=str,
)
def test_a_configuration_that_does_not_fit_is_refused(config, message):
    with pytest.raises(ValueError, match=message):
        bias_gelu_forward(X, BIAS, 0, config=config)
    with pytest.raises(
        ValueError, match="got BLOCK_K, expected some of BLOCK_ROWS, BLOCK_COLUMNS, BUILTIN_ERF, num_warps"
    ):
        GELU.replace(BLOCK_K=16)


def test_a_row_that_does_not_fit_its_block_is_refused():
    spec = SPECS["select_patches"]
    inputs = spec.inputs({"B": 2, "K": 64}, torch.float32, "meta")
    with (
        override(["select_patches_kernel"], BLOCK=256),
        pytest.raises(ValueError, match="expected at least 324 columns"),
    ):
        spec.launch(inputs, 0.0, None)
    with pytest.raises(ValueError, match="kernels: got 'nothing'"), override(["nothing"], num_warps=1):
        pass


def test_a_backward_of_attention_that_writes_a_gradient_twice_or_never_is_refused():
    query, lse = meta(2, 40, 3, 64), meta(3, 80, dtype=torch.float32)
    tensors = query, query, query, query, None, None, query, lse, 0.0, 0.1
    by_query, by_key = select("attention", "backward", torch.bfloat16, "sm_90", queries=325, keys=325, head_dim=64)
    alone = by_key.replace(SINGLE_TILE=1)
    with recorded() as calls:
        attention_backward(*tensors, config=(by_query, by_key))
        attention_backward(*tensors, config=(alone,))
    assert [call.config for call in calls] == [by_query, by_key, alone]
    for wrong in ((by_query,), (by_query, alone), (by_key, by_key)):
        with pytest.raises(ValueError, match="expected both kernels without SINGLE_TILE or one with it"):
            attention_backward(*tensors, config=wrong)
    with pytest.raises(ValueError, match="SINGLE_TILE and BLOCK_KEYS 32, expected at least keys 40"):
        attention_backward(*tensors, config=(alone.replace(BLOCK_KEYS=32),))
    with pytest.raises(ValueError, match=r"config: got that of attention_backward_query_kernel, expected one of"):
        attention_forward(query, query, query, None, None, 0.0, 0.1, config=by_query)
