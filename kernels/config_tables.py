"""The launch configuration of every kernel on every architecture, with the reason of each.

``SM_90`` is the whole table; the others are that of another architecture with what differs, which is written out. A
reason begins with "predicted" until a GPU has measured it: predictions are read from machine code (docs/tuning.md).

Attention at 325 x 325, bfloat16, head_dim 64 on sm_90, as an example: the largest tile of the forward is (128, 64), and
``tile`` pads 325 to 384 with both, so the launch has BLOCK_QUERIES 128, BLOCK_KEYS 64 and 8 warps; the backward by
query has 64 x 32 on 4 warps, the backward by key 32 x 64 on 4 warps.
"""

from __future__ import annotations

from dataclasses import replace

from sclkern.kernels.config_rules import (
    AttentionBackward,
    AttentionBias,
    AttentionForward,
    Entry,
    Rule,
    by_head_dim,
    by_itemsize,
    by_keys,
    covers_columns,
    fixed,
    rows_for_programs,
    rows_of_warps,
    single_tile_holds_all,
    split_keys,
    whole_programs,
    whole_rows,
)

Table = dict[str, Entry]

# Keys of largest tiles: (bytes of an element, head_dim), 64 for head_dim up to 64.
_FORWARD = AttentionForward(
    largest={(2, 64): (128, 64), (2, 128): (128, 32), (4, 64): (64, 32), (4, 128): (32, 32)},
    per_warp={2: 2048, 4: 512},
)
_BY_QUERY = AttentionBackward(
    side="query",
    largest={(2, 64): (64, 32), (2, 128): (64, 32), (4, 64): (32, 32), (4, 128): (16, 32)},
    per_warp={2: 640, 4: 512},
    one_warpgroup={
        # 64 x 32: 30 instructions a score with dropout, and more warps fit; 64 x 64 on 8 warps: 43.
        (False, 32): (64, 32), (False, 64): (64, 32), (False, 128): (64, 32),
        # 32 x 64: 50; on 8 warps 75. 64 queries would take 254 registers.
        (True, 32): (32, 16), (True, 64): (32, 16), (True, 128): (32, 16),
    },
    single_tile_scores={},
)  # fmt: skip
_BY_KEY = AttentionBackward(
    side="key",
    largest=_BY_QUERY.largest,
    per_warp=_BY_QUERY.per_warp,
    one_warpgroup={
        # 32 x 64: 38 instructions a score; 64 x 64 on 8 warps: 58. 32 x 32 of head_dim 32 takes 248 registers; for
        # head_dim 128 two accumulators of 64 x 128 spill.
        (False, 32): (64,), (False, 64): (64, 32), (False, 128): (),
        # 64 x 16: 94; on 8 warps 150. 32 and 64 keys take up to 255 registers.
        (True, 32): (16,), (True, 64): (16,), (True, 128): (),
    },
    single_tile_scores={(2, 32): 1024, (2, 64): 2048, (2, 128): 512, (4, 32): 256, (4, 64): 256, (4, 128): 256},
)  # fmt: skip
_ATTENTION = ("BLOCK_QUERIES", "BLOCK_KEYS", "TRANSPOSED")
_BACKWARD = (*_ATTENTION, "SINGLE_TILE")
_SIDES = ("BLOCK_ROWS", "BLOCK_KEYS")
_FRAMES = {(2, 64): (64, 64, 4), (2, 128): (64, 32, 4), (4, 64): (32, 32, 8), (4, 128): (16, 32, 8)}
_CROSS = ("ROWS", "COLUMNS", "CHANNELS", "SPLIT")
_CROSS_HALF = {"ROWS": 64, "COLUMNS": 64, "CHANNELS": 32, "num_warps": 8}
_CROSS_FLOAT32 = {"ROWS": 16, "COLUMNS": 64, "CHANNELS": 16, "num_warps": 8}
_DOTS = ("BLOCK_X", "BLOCK_Y", "BLOCK_K")
_GELU = fixed(BLOCK_ROWS=8, BLOCK_COLUMNS=256, BUILTIN_ERF=0, num_warps=4)
_GELU_NAMES = ("BLOCK_ROWS", "BLOCK_COLUMNS", "BUILTIN_ERF")
_MASK = whole_rows("BLOCK", least_columns=64, columns_per_warp=2**20)


def _mask(reason: str) -> Entry:
    return Entry(_MASK, reason, ("BLOCK",), problem=covers_columns("BLOCK"))


SM_90: Table = {
    "attention_forward_kernel": Entry(
        _FORWARD,
        "predicted: the largest tiles that keep the accumulators in registers; float32 runs on the ordinary cores",
        (*_ATTENTION, "KEEP_BITS"),
        ("TRANSPOSED", "KEEP_BITS"),
    ),
    "attention_dropout_kernel": Entry(
        fixed(ROWS=32, GROUPS=16, num_warps=4),
        "predicted: four Philox calls a thread and step, whose bytes are one store",
        ("ROWS", "GROUPS"),
    ),
    "attention_backward_query_kernel": Entry(
        _BY_QUERY,
        "predicted: two accumulators, so smaller tiles than the forward; one warpgroup for each 64 rows",
        _BACKWARD,
        ("TRANSPOSED", "SINGLE_TILE"),
        single_tile_holds_all("query"),
    ),
    "attention_backward_key_kernel": Entry(
        _BY_KEY,
        "predicted: three accumulators, so smaller tiles than the forward; one warpgroup for each 64 rows",
        _BACKWARD,
        ("TRANSPOSED", "SINGLE_TILE"),
        single_tile_holds_all("key"),
    ),
    "attention_backward_bias_kernel": Entry(
        AttentionBias(largest=_BY_QUERY.largest, per_warp=_BY_QUERY.per_warp, programs=264),
        "predicted: tiles as of the backward by query, on 8 warps, because 4 spill; two programs for each of an H200's "
        "132 multiprocessors",
        ("BLOCK_QUERIES", "BLOCK_KEYS", "PROGRAMS"),
    ),
    "frame_attention_forward_kernel": Entry(
        by_head_dim(_FRAMES),
        "predicted: 64 rows fill wgmma, so that F CLS rows are padded to them; 128 would leave a quarter of the tiles "
        "empty at 196 patches",
        _SIDES,
    ),
    "frame_attention_backward_query_kernel": Entry(
        by_head_dim(_FRAMES),
        "predicted: as the forward, within 240 registers",
        _SIDES,
    ),
    "frame_attention_backward_key_kernel": Entry(
        by_head_dim({(2, 64): (32, 64, 4), (2, 128): (32, 64, 8), (4, 64): (32, 32, 8), (4, 128): (32, 16, 8)}),
        "predicted: 64 keys fill wgmma; as many rows as 240 registers hold",
        _SIDES,
    ),
    "cross_attention_forward_kernel": Entry(
        by_keys(
            16,
            split_keys(_CROSS_HALF, _CROSS_FLOAT32),
            split_keys({**_CROSS_HALF, "num_stages": 2}, _CROSS_FLOAT32),
        ),
        "predicted: 64 rows fill wgmma; float32 operands lie in registers; 4 warps would spill; a sample of at most 16 "
        "keys computes half of what one of 32 does; two stages of 32 keys, because three take 242 registers with ids",
        _CROSS,
        ("SPLIT",),
    ),
    "cross_attention_backward_kernel": Entry(
        split_keys({**_CROSS_HALF, "HELD": 3}, {**_CROSS_FLOAT32, "HELD": 3}),
        "predicted: as the forward; three score tiles at once, beside gradients that the forward does not have",
        (*_CROSS, "HELD"),
        ("SPLIT", "HELD"),
    ),
    "cross_attention_softmax_forward_kernel": Entry(
        rows_of_warps(most_rows=8),
        "predicted: as many rows of keys as give a thread 8 elements, one Philox call without exchange",
        ("BLOCK_ROWS", "BLOCK_COLUMNS"),
        problem=covers_columns("BLOCK_COLUMNS"),
    ),
    "cross_attention_softmax_backward_kernel": Entry(
        rows_of_warps(most_rows=8),
        "predicted: as the forward",
        ("BLOCK_ROWS", "BLOCK_COLUMNS"),
        problem=covers_columns("BLOCK_COLUMNS"),
    ),
    "completion_loss_norm_kernel": Entry(
        fixed(BLOCK_ROWS=8, BLOCK_WIDTH=128, num_warps=4),
        "predicted: each feature is read once, 16 bytes a thread",
        ("BLOCK_ROWS", "BLOCK_WIDTH"),
    ),
    "completion_loss_statistics_kernel": Entry(
        by_itemsize(
            {"BLOCK_X": 128, "BLOCK_Y": 64, "BLOCK_K": 64, "num_warps": 8, "PROGRAMS": 264, "COLUMN_SUMS": 2**24},
            {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 16, "num_warps": 16, "PROGRAMS": 264, "COLUMN_SUMS": 2**24},
        ),
        "predicted: two programs for each of an H200's 132 multiprocessors, 64 MiB of column sums of each kind; "
        "float32 on 8 warps spills with Triton 3.8",
        (*_DOTS, "PROGRAMS", "COLUMN_SUMS"),
    ),
    "completion_loss_merge_kernel": Entry(
        fixed(BLOCK_ROWS=32, BLOCK_SPLITS=32, num_warps=4),
        "predicted: too small to matter",
        ("BLOCK_ROWS", "BLOCK_SPLITS"),
    ),
    "completion_loss_anchor_kernel": Entry(
        fixed(BLOCK_ROWS=512, num_warps=4), "predicted: too small to matter", ("BLOCK_ROWS",)
    ),
    "completion_loss_weights_kernel": Entry(
        by_itemsize(
            {"BLOCK_X": 128, "BLOCK_Y": 64, "BLOCK_K": 64, "num_warps": 4, "WORKSPACE": 2**26},
            # Half of the columns: with 64, plain products and Triton 3.6 spill 40 bytes.
            {"BLOCK_X": 64, "BLOCK_Y": 32, "BLOCK_K": 16, "num_warps": 8, "WORKSPACE": 2**26},
        ),
        "predicted: few enough warps for two programs on a multiprocessor, one stores while the other multiplies; "
        "128 MiB of weights in half precision",
        (*_DOTS, "WORKSPACE"),
    ),
    "completion_loss_finish_kernel": Entry(
        fixed(BLOCK_ROWS=8, BLOCK_WIDTH=128, num_warps=4),
        "predicted: 16 bytes a thread",
        ("BLOCK_ROWS", "BLOCK_WIDTH"),
    ),
    "sigmoid_loss_forward_kernel": Entry(
        by_itemsize(
            {"BLOCK_X": 128, "BLOCK_Y": 64, "BLOCK_K": 64, "num_warps": 8, "PROGRAMS": 264},
            {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 16, "num_warps": 16, "PROGRAMS": 264},
        ),
        "predicted: as the statistics of the completion loss, whose products are the same",
        (*_DOTS, "PROGRAMS"),
    ),
    "sigmoid_loss_slopes_kernel": Entry(
        by_itemsize(
            {"BLOCK_X": 128, "BLOCK_Y": 64, "BLOCK_K": 64, "num_warps": 8, "WORKSPACE": 2**26},
            {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 16, "num_warps": 8, "WORKSPACE": 2**26},
        ),
        "predicted: as the weights of the completion loss; 128 MiB of slopes in half precision",
        (*_DOTS, "WORKSPACE"),
    ),
    "linear_cross_entropy_rows_kernel": Entry(
        fixed(BLOCK=8192, num_warps=16),
        "predicted: 125 rows of 50,265 logits are one wave of 132 multiprocessors, and a split row would cost a second "
        "launch; 16 warps hold 16 KB of a row in flight",
        ("BLOCK",),
    ),
    "linear_cross_entropy_reduce_kernel": Entry(
        fixed(BLOCK=1024, num_warps=4), "predicted: too small to matter", ("BLOCK",)
    ),
    "linear_cross_entropy_gradient_kernel": Entry(
        fixed(BLOCK_ROWS=32, BLOCK_COLUMNS=128, num_warps=4),
        "predicted: 393 programs at 50,265 columns, each with the bias gradient of its columns",
        ("BLOCK_ROWS", "BLOCK_COLUMNS"),
    ),
    "dropout_add_layer_norm_forward_kernel": Entry(
        rows_of_warps(most_rows=32),
        "predicted: 8 columns a thread are a 16-byte load in half precision and one Philox call, without exchange",
        ("BLOCK_ROWS", "BLOCK_COLUMNS"),
        problem=covers_columns("BLOCK_COLUMNS"),
    ),
    "dropout_add_layer_norm_backward_kernel": Entry(
        rows_for_programs((32, 16, 8), programs=4 * 132, most_rows=32),
        "predicted: three float32 partial sums for 32 rows add 0.75 bytes to the 10 that each element moves; of a "
        "batch of captions 32 rows would leave a program for every fifth multiprocessor, and 8 rows add 3 bytes",
        ("BLOCK_ROWS", "BLOCK_COLUMNS", "ROWS_PER_PROGRAM"),
        problem=whole_programs,
    ),
    "bias_gelu_forward_kernel": Entry(
        _GELU,
        "predicted: 16-byte loads for each thread; the polynomial issues 21 instructions an element, tl.erf 41.5",
        _GELU_NAMES,
        ("BUILTIN_ERF",),
    ),
    "bias_gelu_backward_kernel": Entry(
        fixed(BLOCK_ROWS=32, BLOCK_COLUMNS=128, BUILTIN_ERF=0, num_warps=8),
        "predicted: 16-byte loads, and 1/32 of the partial sums that single rows would leave; the polynomial issues 35 "
        "instructions an element, tl.erf 59",
        _GELU_NAMES,
        ("BUILTIN_ERF",),
    ),
    "unfold_patches_kernel": Entry(
        whole_rows("BLOCK"), "predicted: a patch a program, 8 elements a thread", ("BLOCK",),
        problem=covers_columns("BLOCK"),
    ),
    "embed_patches_forward_kernel": Entry(
        whole_rows("BLOCK"), "predicted: a row a program, 8 columns a thread", ("BLOCK",),
        problem=covers_columns("BLOCK"),
    ),
    "embed_patches_backward_kernel": Entry(
        whole_rows("BLOCK", SLOTS=16), "predicted: 16 slots share their partial sums", ("BLOCK", "SLOTS"),
        problem=covers_columns("BLOCK"),
    ),
    "invert_keep_kernel": Entry(fixed(BLOCK=64, num_warps=4), "predicted: too small to matter", ("BLOCK",)),
    "position_gradient_kernel": Entry(
        fixed(BLOCK_ROWS=16, BLOCK_COLUMNS=128, num_warps=4),
        "predicted: 16 rows of 128 columns in flight",
        ("BLOCK_ROWS", "BLOCK_COLUMNS"),
    ),
    "select_patches_kernel": _mask("predicted: a row in registers, two words for each element and thread"),
    "select_tokens_kernel": _mask("predicted: as select_patches"),
    "mask_text_kernel": _mask("predicted: as select_patches; 16 draws against 1024 positions fill 128 registers"),
}  # fmt: skip


def _with(table: Table, reason: str, **rules: Rule) -> Table:
    """The table with other rules of some kernels (named without "_kernel"), for one reason."""
    names = {f"{name}_kernel": rule for name, rule in rules.items()}
    return table | {name: replace(table[name], rule=rule, reason=reason) for name, rule in names.items()}


# Everything in ``SM_90`` fits 163 KB; without wgmma, whose operands stay in shared memory, some kernels would spill.
_SMALLER_QUERY = {**_BY_QUERY.largest, (2, 128): (32, 32)}
_SMALLER_KEY = {**_BY_KEY.largest, (2, 64): (32, 32), (2, 128): (32, 32)}
_ALONE = {key: min(rows, _SMALLER_QUERY[key][0]) for key, (rows, _) in _SMALLER_KEY.items()}
_CROSS_SMALL = {**_CROSS_HALF, "ROWS": 32}
SM_80: Table = _with(
    _with(
        SM_90,
        "predicted: half of the rows, because without wgmma 64 rows spill up to 1 KB; two stages forward and two score "
        "tiles at once of more than 16 keys backward, because otherwise 32 rows spill 0.2 KB on sm_80",
        cross_attention_forward=split_keys({**_CROSS_SMALL, "num_stages": 2}, _CROSS_FLOAT32),
        cross_attention_backward=by_keys(
            16,
            split_keys({**_CROSS_SMALL, "HELD": 3}, {**_CROSS_FLOAT32, "HELD": 3}),
            split_keys({**_CROSS_SMALL, "HELD": 2}, {**_CROSS_FLOAT32, "HELD": 3}),
        ),
    ),
    "predicted: smaller tiles for head_dim 128, and by key for 64, because without wgmma 64 rows spill; with dropout "
    "ids and Triton 3.6 also 4 warps of 13 queries and 64 keys, and of head_dim 128 by query",
    attention_forward=replace(_FORWARD, turned_warps=8),
    attention_backward_query=replace(
        _BY_QUERY,
        largest=_SMALLER_QUERY,
        one_warpgroup={**_BY_QUERY.one_warpgroup, (False, 128): (64,)},
        most_alone=_ALONE,
    ),
    attention_backward_key=replace(
        _BY_KEY,
        largest=_SMALLER_KEY,
        single_tile_scores={**_BY_KEY.single_tile_scores, (2, 64): 512},
        num_stages=2,
        most_alone=_ALONE,
    ),
    attention_backward_bias=AttentionBias(largest=_SMALLER_QUERY, per_warp=_BY_QUERY.per_warp, programs=264),
)
SM_80 = _with(
    SM_80,
    "predicted: 32 columns at a time in 16 bits, because with 64 Triton 3.6 spills 8 bytes",
    sigmoid_loss_forward=by_itemsize(
        {"BLOCK_X": 128, "BLOCK_Y": 64, "BLOCK_K": 32, "num_warps": 8, "PROGRAMS": 264},
        {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 16, "num_warps": 16, "PROGRAMS": 264},
    ),
)
# 99 KB of shared memory a block: what sm_80 launches takes at most 76 KB.
SM_86: Table = SM_80
SM_89: Table = SM_86
SM_100: Table = _with(
    _with(
        _with(
            SM_90,
            "predicted: as sm_90; all samples compute 32 keys, because two forms in one kernel spill with Triton 3.6",
            cross_attention_forward=by_itemsize({**_CROSS_HALF, "SPLIT": 0}, {**_CROSS_FLOAT32, "SPLIT": 0}),
        ),
        "predicted: 8 warps, because the products of sm_100 leave their sums in tensor memory, and 4 warps spill",
        completion_loss_weights=by_itemsize(
            # 32 columns at a time: with 64, ids and bfloat16, Triton 3.6 spills 16 bytes.
            {"BLOCK_X": 128, "BLOCK_Y": 64, "BLOCK_K": 32, "num_warps": 8, "WORKSPACE": 2**26},
            {"BLOCK_X": 64, "BLOCK_Y": 64, "BLOCK_K": 16, "num_warps": 8, "WORKSPACE": 2**26},
        ),
        frame_attention_backward_query=by_head_dim({**_FRAMES, (2, 64): (64, 64, 8)}),
    ),
    "predicted: two score tiles at once, because three of 32 keys spill",
    cross_attention_backward=by_keys(
        16,
        SM_90["cross_attention_backward_kernel"].rule,
        split_keys({**_CROSS_HALF, "HELD": 2}, {**_CROSS_FLOAT32, "HELD": 3}),
    ),
)
SM_100 = _with(
    SM_100,
    "predicted: as sm_90; with a bias 64 x 16 scores, because 64 x 32 of head_dim 32 spill with Triton 3.6",
    attention_forward=replace(_FORWARD, biased_scores=1024),
)
# 99 KB, and the tensor-core instructions of sm_80.
SM_120: Table = _with(
    SM_86,
    "predicted: 32 keys, because 64 spill with Triton 3.6",
    frame_attention_forward=by_head_dim({**_FRAMES, (2, 64): (64, 32, 4)}),
)
SM_120 = _with(
    SM_120,
    "predicted: as sm_90, because 32 columns at a time spill with Triton 3.6",
    sigmoid_loss_forward=SM_90["sigmoid_loss_forward_kernel"].rule,
)
# 64 KB of LDS, of which what sm_90 launches takes at most 32 KB.
GFX942: Table = SM_90

TABLES: dict[str, Table] = {
    "sm_80": SM_80,
    "sm_86": SM_86,
    "sm_89": SM_89,
    "sm_90": SM_90,
    "sm_100": SM_100,
    "sm_120": SM_120,
    "gfx942": GFX942,
}
