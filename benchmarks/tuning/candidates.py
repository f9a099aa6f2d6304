"""Launch configurations to try on a GPU, most important first.

A group is one choice of one kernel family, at one size and in one pass: the present configuration and those around it.
``predicted`` is a guess made before anything was measured, the time over that with the present one, with its reason.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from sclkern.kernels.config import KERNELS
from sclkern.tools.specs import SPECS, Size

# The packed images of the step's vision encoder, which the benchmarks of packed captions do not have.
STEP_SIZES = {
    "packed_attention": (Size("325 without dropout", {"B": 64, "Lq": 325, "Lk": 325, "text": ""}, 1),),
}


# The kernels that a choice is about, of those that an op and pass launch.
CHOICES: dict[str, tuple[str, ...]] = {
    "attention forward": ("attention_forward_kernel",),
    "attention by query": ("attention_backward_query_kernel",),
    "attention by key": ("attention_backward_key_kernel",),
    "dropout mask": ("attention_forward_kernel",),
    "bias_gelu": ("bias_gelu_forward_kernel", "bias_gelu_backward_kernel"),
    "norm forward": ("dropout_add_layer_norm_forward_kernel",),
    "norm backward": ("dropout_add_layer_norm_backward_kernel",),
    "cross_attention": ("cross_attention_forward_kernel", "cross_attention_backward_kernel"),
    "similarities": ("completion_loss_statistics_kernel",),
    "splits": ("completion_loss_statistics_kernel",),
    "weights": ("completion_loss_weights_kernel",),
    "workspace": ("completion_loss_weights_kernel",),
    "words": ("linear_cross_entropy_rows_kernel", "linear_cross_entropy_gradient_kernel"),
    "frames by row": ("frame_attention_forward_kernel", "frame_attention_backward_query_kernel"),
    "frames by key": ("frame_attention_backward_key_kernel",),
    "embedding": ("unfold_patches_kernel", "embed_patches_forward_kernel", "embed_patches_backward_kernel"),
    "masks": ("select_patches_kernel", "mask_text_kernel"),
}
# Their values change what the other pass launches as well.
BOTH_PASSES = ("dropout mask",)


@dataclass(frozen=True)
class Candidate:
    """A configuration to try.

    Attributes:
        op: name of the op.
        size: size of the benchmark.
        pass_: "forward" or "backward".
        choice: a key of ``CHOICES``.
        values: constants, launcher numbers, warps and stages that differ from what is selected; none are the present.
        predicted: time over that of the present configuration, a guess.
        reason: why.
    """

    op: str
    size: Size
    pass_: str
    choice: str
    values: dict[str, int] = field(default_factory=dict, hash=False)
    predicted: float = 1.0
    reason: str = "as it is"

    @property
    def group(self) -> tuple[str, str, str, str]:
        return self.op, self.size.name, self.pass_, self.choice

    @property
    def kernels(self) -> tuple[str, ...]:
        """Those of the choice whose values are set: what this pass launches, and what decides on it."""
        if self.choice in BOTH_PASSES:
            return CHOICES[self.choice]
        op = "attention" if self.op == "packed_attention" else self.op
        return tuple(name for name in CHOICES[self.choice] if name in KERNELS[op, self.pass_])

    @property
    def config(self) -> str:
        return ",".join(f"{name}={value}" for name, value in self.values.items()) or "present"

    def __str__(self) -> str:
        return "/".join((self.op, self.size.name.replace(" ", "-"), "bfloat16", self.pass_, self.choice, self.config))


def _block(queries: int, keys: int, warps: int, stages: int | None = None) -> dict[str, int]:
    values = {"BLOCK_QUERIES": queries, "BLOCK_KEYS": keys, "num_warps": warps}
    return values | ({"num_stages": stages} if stages else {})


def _x_y_k(x: int, y: int, k: int, warps: int, stages: int | None = None) -> dict[str, int]:
    values = {"BLOCK_X": x, "BLOCK_Y": y, "BLOCK_K": k, "num_warps": warps}
    return values | ({"num_stages": stages} if stages else {})


def _rows(rows: int, columns: int, warps: int) -> dict[str, int]:
    return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "num_warps": warps}


# (values, predicted, reason), most promising first. Those of attention follow from the instructions that all programs
# issue (docs/tuning.md): "27 a score" are the instructions of a thread in the loop for each of its scores.
Space = list[tuple[dict[str, int], float, str]]
FORWARD_325: Space = [
    (_block(128, 32, 4), 0.92, "27.8 a score as 27.0 now, but 352 keys computed and not 384"),
    (_block(128, 128, 8, 2), 0.90, "23.6 a score, 27.0 now; 228 registers"),
    (_block(64, 64, 4, 2), 0.95, "28.3 a score, but 16 warps a multiprocessor instead of 8"),
    (_block(64, 64, 4), 0.97, "28.3 a score, 12 warps instead of 8"),
    (_block(128, 32, 8), 0.98, "30.6 a score, 16 warps instead of 8"),
    (_block(64, 128, 4), 0.99, "25.2 a score, fewer programs at a time"),
    (_block(128, 64, 8, 2), 0.99, "a stage less; registers bound the programs, not shared memory"),
]
FORWARD_325_PLAIN: Space = [
    (_block(128, 64, 4, 2), 0.85, "10.5 a score, 12.1 now: a warpgroup has whole tiles of 64 rows; half of the warps"),
    (_block(128, 64, 4, 1), 0.88, "10.7 a score, loads wait"),
    (_block(128, 128, 8, 2), 0.90, "10.3 a score; half of the warps"),
    (_block(128, 32, 4), 0.96, "13.5 a score for 352 keys"),
    (_block(64, 64, 4), 1.08, "13.2 a score at the same 16 warps"),
]
# Of the backward the first is what it was before these predictions, so that the shortest run compares the two.
BY_KEY_325: Space = [
    (_block(64, 64, 8), 1.70, "60 a score, 38 now: two warpgroups share the rows of one"),
    (_block(32, 128, 8, 2), 0.95, "36 a score, 38 now; queries read half as often"),
    (_block(32, 64, 4, 2), 0.97, "37 a score"),
    (_block(64, 64, 4, 1), 0.95, "32 a score, loads wait; 239 registers"),
]
BY_KEY_325_PLAIN: Space = [
    (_block(64, 64, 8), 1.69, "31.6 a score, 20.3 now: two warpgroups share the rows of one"),
    (_block(32, 64, 4, 2), 0.93, "18.9 a score, 12 warps instead of 8"),
    (_block(64, 64, 4, 2), 0.88, "15.6 a score for 384 queries, not 352"),
    (_block(64, 128, 8, 2), 0.83, "14.8 a score for 384 queries; they are read half as often"),
    (_block(64, 64, 4, 1), 0.87, "15.1 a score, loads wait"),
]
BY_QUERY_325: Space = [
    (_block(64, 64, 8), 1.55, "43 a score, 30 now: two warpgroups share the rows of one; 8 warps instead of 16"),
    (_block(128, 32, 4), 0.90, "26 a score; 232 registers, 8 warps instead of 16"),
    (_block(64, 64, 4, 2), 0.98, "27 a score for 384 keys, not 352; 8 warps instead of 16"),
    (_block(128, 64, 8, 2), 0.94, "26 a score for 384 keys; they are read half as often"),
]
BY_QUERY_325_PLAIN: Space = [
    (_block(64, 64, 8), 1.65, "22.6 a score, 14.6 now: two warpgroups share the rows of one"),
    (_block(128, 32, 4), 0.82, "10.8 a score, 12 warps instead of 20"),
    (_block(128, 64, 8, 2), 0.87, "11.2 a score for 384 keys, not 352; they are read half as often"),
    (_block(64, 64, 4, 2), 0.92, "12.0 a score for 384 keys, 16 warps instead of 20"),
]
DRAWN_ONCE_FORWARD: Space = [({"KEEP_BITS": 1}, 1.00, "17 a score, 27 now, and 7.8 of a launch that draws the mask")]
DRAWN_ONCE_BACKWARD: Space = [({"KEEP_BITS": 1}, 0.75, "20 and 26 a score, 30 and 38 now: the mask is read")]
FORWARD_SHORT_KEYS: Space = [
    (_block(128, 32, 4, 1), 0.95, "one step needs no pipeline"),
    (_block(64, 32, 4), 1.05, "a third more instructions; twice the warps to hide what memory bounds"),
    (_block(64, 16, 4), 1.10, "a third more instructions; three times the warps"),
]
BY_KEY_SHORT: Space = [
    (_block(64, 32, 4, 1), 0.92, "56 a score, 90 now, but bound by memory from there; loads wait"),
    (_block(128, 32, 8, 1), 0.93, "59 a score, three steps; loads wait"),
    (_block(32, 32, 4), 0.95, "88 a score for 352 queries, fewer steps lost"),
    (_block(64, 32, 8, 2), 0.96, "85 a score"),
]
SHORT_QUERIES: Space = [
    (_block(32, 128, 4, 2), 0.86, "36 a score, 47 now, 384 keys either way"),
    (_block(32, 128, 4), 0.88, "the same with a stage more"),
    (_block(16, 64, 4), 1.10, "two programs for 18 queries"),
]
BY_QUERY_SHORT: Space = [
    (_block(32, 64, 8), 1.08, "75 a score, 50 now, but bound by memory from there"),
    (_block(32, 64, 4, 2), 0.97, "47 a score, 12 warps instead of 8"),
    (_block(32, 32, 4), 1.03, "72 a score for 352 keys"),
]
FORWARD_65: Space = [
    (_block(128, 32, 4, 2), 0.82, "28 a score, 42 now: wgmma, though 65 queries are padded to 128, not 96"),
    (_block(128, 32, 4, 1), 0.80, "26 a score, loads wait"),
    (_block(16, 32, 1), 0.90, "pads queries to 80; 43 a score"),
    (_block(64, 64, 4), 1.10, "wgmma, but 128 x 128 scores for 65 x 65"),
]
BY_KEY_65: Space = [
    (_block(32, 32, 8), 1.60, "92 a score, 58 now: 8 warps have four scores a thread"),
    (_block(32, 32, 2), 0.75, "40 a score; 8 warps instead of 12, 255 registers with a mask on Triton 3.6"),
    (_block(32, 64, 4), 0.90, "38 a score, by wgmma, of 128 keys"),
]
BY_QUERY_65: Space = [
    (_block(32, 32, 8), 1.65, "67 a score, 38 now: 8 warps have four scores a thread"),
    (_block(128, 32, 4), 0.85, "26 a score, by wgmma, of 128 queries; 232 registers"),
    (_block(64, 32, 4), 1.00, "30 a score, by wgmma, of 128 queries"),
    (_block(32, 32, 2), 0.97, "37 a score, 8 warps instead of 20"),
]
SHORT_BOTH: Space = [
    (_block(32, 16, 1), 0.80, "39 a score, 43 now; one warp, no exchange"),
    (_block(16, 16, 1), 0.97, "as lengths up to 16 have: four tiles for 18 x 18"),
]
SHORT_BOTH_BACKWARD: Space = [(_block(32, 32, 4), 0.70, "74 a score, 122 now: 8 warps have four scores a thread")]
GELU_BACKWARD: Space = [
    (_rows(8, 256, 4), 1.12, "48 MB of partial sums more, of 399 MB, which bound it now"),
    ({"BUILTIN_ERF": 1}, 1.33, "tl.erf: 59 instructions an element, 35 now, and bound by them"),
    (_rows(64, 64, 8), 0.98, "8 MB of partial sums less; a few instructions more"),
    (_rows(16, 256, 8), 1.04, "16 MB of partial sums more"),
    (_rows(16, 128, 4), 1.04, "16 MB of partial sums more, in programs of 4 warps"),
]
GELU_FORWARD: Space = [
    ({"BUILTIN_ERF": 1}, 1.50, "tl.erf: 41.5 instructions an element, 21 now, and bound by them"),
    (_rows(32, 128, 8), 1.00, "2 % fewer instructions, which do not bound it"),
    (_rows(8, 512, 8), 1.00, "longer lines"),
    (_rows(16, 256, 8), 1.00, "what the backward may want"),
    (_rows(64, 64, 8), 1.00, "2 % fewer instructions; lines of 128 bytes"),
    (_rows(4, 256, 4), 1.02, "9 % more instructions"),
]
NORM_FORWARD: Space = [
    ({"BLOCK_ROWS": 1, "num_warps": 2}, 0.82, "19 % fewer instructions, which bound it: fewer exchange each sum"),
    ({"BLOCK_ROWS": 4, "num_warps": 4}, 0.88, "12 % fewer instructions; four rows at a time, half of the warps"),
    ({"BLOCK_ROWS": 2, "num_warps": 4}, 0.98, "2 % fewer instructions, two rows at a time"),
    ({"BLOCK_ROWS": 2, "num_warps": 2}, 0.90, "as four rows on 4 warps, in smaller programs"),
]
NORM_BACKWARD: Space = [
    ({"num_warps": 2}, 0.85, "18 % fewer instructions, which bound it; half of the warps"),
    ({"ROWS_PER_PROGRAM": 16, "num_warps": 2}, 0.85, "the same with 1300 programs, for more of them at a time"),
    ({"BLOCK_ROWS": 2, "num_warps": 4}, 0.92, "fewer instructions a row; two rows in flight"),
    ({"BLOCK_ROWS": 2, "num_warps": 8}, 0.97, "two rows in flight"),
    ({"ROWS_PER_PROGRAM": 16}, 1.00, "1300 programs instead of 650, which do not fill six a multiprocessor"),
]
CROSS_FORWARD: Space = [
    ({"SPLIT": 0}, 1.85, "a sample of up to 16 keys computes 384 columns, as one of 18 does, and not 192"),
    ({"CHANNELS": 64, "num_stages": 2}, 0.92, "half of the steps over 768 channels, lines of 128 bytes"),
    ({"num_stages": 3}, 0.98, "the form before, which takes 242 registers with dropout ids"),
    ({"num_stages": 4}, 0.97, "two stages more in flight: one program of 8 warps hides little"),
    ({"CHANNELS": 16, "num_stages": 4}, 1.10, "twice the steps, in lines of 32 bytes"),
    ({"COLUMNS": 128}, 0.95, "half of the products, each twice as wide"),
]
CROSS_BACKWARD: Space = [
    ({"SPLIT": 0}, 1.80, "a sample of up to 16 keys computes 384 columns, as one of 18 does, and not 192"),
    ({"CHANNELS": 64, "num_stages": 2}, 0.92, "half of the steps over 768 channels, lines of 128 bytes"),
    ({"num_stages": 4}, 0.97, "a stage more in flight: one program of 8 warps hides little"),
    ({"HELD": 6}, 0.95, "x and the output's gradient read once"),
    ({"HELD": 2}, 1.03, "x and the output's gradient read three times, not twice"),
]
SIMILARITIES: Space = [
    (_x_y_k(128, 128, 64, 8), 0.85, "a product of 128 x 128 reads 2/3 of the bytes a product that 128 x 64 does"),
    (_x_y_k(128, 64, 64, 8, 4), 0.96, "a stage more in flight"),
    (_x_y_k(64, 64, 64, 4), 0.97, "more programs: one adds up while others multiply; reads 4/3 of the bytes"),
    (_x_y_k(64, 128, 64, 4), 0.95, "as many bytes as now, two programs"),
    (_x_y_k(128, 64, 128, 8), 1.00, "half of the steps"),
]
WEIGHTS: Space = [
    (_x_y_k(128, 128, 64, 8), 0.88, "a product of 128 x 128 reads 2/3 of the bytes a product that 128 x 64 does"),
    (_x_y_k(64, 128, 64, 4), 0.97, "lines of 256 bytes of weights"),
    (_x_y_k(128, 64, 64, 8), 0.97, "16 warps a multiprocessor instead of 8"),
    (_x_y_k(128, 64, 64, 4, 4), 0.99, "a stage more, still two programs"),
]
WORKSPACE: Space = [
    ({"WORKSPACE": 2**25}, 0.94, "64 MiB of weights: half of them still in the second-level cache when cuBLAS reads"),
    ({"WORKSPACE": 2**24}, 0.92, "32 MiB stay in the cache; strips of 1024 rows fill a third of the device, though"),
    ({"WORKSPACE": 2**27}, 1.00, "half of the launches"),
]
SPLITS: Space = [
    ({"PROGRAMS": 132}, 1.05, "fewer splits to merge, one wave that is not full"),
    ({"PROGRAMS": 528}, 1.00, "smaller last wave, more splits to merge"),
]
WORDS: Space = [
    ({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 128, "num_warps": 4}, 0.97, "half of the registers: more programs"),
    ({"BLOCK_ROWS": 32, "BLOCK_COLUMNS": 64, "num_warps": 4}, 0.97, "786 programs instead of 393"),
    ({"BLOCK_ROWS": 16, "BLOCK_COLUMNS": 256, "num_warps": 4}, 1.03, "197 programs, longer lines"),
]
WORDS_FORWARD: Space = [
    ({"BLOCK": 4096, "num_warps": 16}, 1.00, "loads of 16 bytes once a step, fewer registers"),
    ({"BLOCK": 8192, "num_warps": 32}, 0.97, "a row has a multiprocessor for itself: all its warps"),
    ({"BLOCK": 16384, "num_warps": 32}, 0.97, "the same with more in flight"),
]
FRAMES_BY_ROW: Space = [
    ({"BLOCK_KEYS": 32}, 0.97, "pads 197 keys to 224, not 256"),
    ({"num_stages": 2}, 0.98, "less shared memory"),
    ({"BLOCK_ROWS": 128, "num_warps": 8}, 1.05, "keys read half as often; a quarter of the tiles is empty"),
    ({"num_warps": 8}, 1.10, "two warpgroups share 64 rows"),
]
FRAMES_BY_KEY: Space = [
    ({"BLOCK_ROWS": 64, "num_stages": 2}, 0.95, "half of the steps; more registers"),
    ({"BLOCK_ROWS": 64, "num_stages": 1}, 0.97, "the same with fewer registers; loads wait"),
    ({"num_warps": 8}, 1.03, "fewer registers a thread"),
]
EMBEDDING: Space = [({"num_warps": 2}, 0.98, "two loads in flight a thread"), ({"num_warps": 8}, 1.03, "8-byte loads")]
EMBEDDING_BACKWARD: Space = [
    ({"SLOTS": 8}, 0.95, "twice the programs: 64 samples of 65 slots are 320 of them"),
    ({"SLOTS": 4}, 0.97, "four times the programs, four times the partial sums"),
    ({"num_warps": 2}, 1.00, "sums over a row exchange between two warps"),
]
MASKS: Space = [
    ({"num_warps": 1}, 1.00, "no exchange between warps; bound by the launch"),
    ({"num_warps": 2}, 1.0, "so"),
]

# (op, size, pass, choice, space), most important for the step first.
_TABLE = [
    ("attention", "325", "backward", "attention by key", BY_KEY_325),
    ("attention", "325", "backward", "attention by query", BY_QUERY_325),
    ("attention", "325", "forward", "attention forward", FORWARD_325),
    ("attention", "325", "backward", "dropout mask", DRAWN_ONCE_BACKWARD),
    ("attention", "325", "forward", "dropout mask", DRAWN_ONCE_FORWARD),
    ("packed_attention", "325 without dropout", "backward", "attention by key", BY_KEY_325_PLAIN),
    ("packed_attention", "325 without dropout", "backward", "attention by query", BY_QUERY_325_PLAIN),
    ("packed_attention", "325 without dropout", "forward", "attention forward", FORWARD_325_PLAIN),
    ("bias_gelu", "64x325", "backward", "bias_gelu", GELU_BACKWARD),
    ("dropout_add_layer_norm", "64x325", "backward", "norm backward", NORM_BACKWARD),
    ("cross_attention", "325x13", "backward", "cross_attention", CROSS_BACKWARD),
    ("cross_attention", "325x13", "forward", "cross_attention", CROSS_FORWARD),
    ("dropout_add_layer_norm", "64x325", "forward", "norm forward", NORM_FORWARD),
    ("bias_gelu", "64x325", "forward", "bias_gelu", GELU_FORWARD),
    ("attention", "325x13", "forward", "attention forward", FORWARD_SHORT_KEYS),
    ("attention", "325x13", "backward", "attention by key", BY_KEY_SHORT),
    ("packed_attention", "13x325", "forward", "attention forward", SHORT_QUERIES),
    ("packed_attention", "13x325", "backward", "attention by query", BY_QUERY_SHORT),
    ("attention", "65", "forward", "attention forward", FORWARD_65),
    ("attention", "65", "backward", "attention by key", BY_KEY_65),
    ("attention", "65", "backward", "attention by query", BY_QUERY_65),
    ("completion_loss", "16384", "forward", "similarities", SIMILARITIES),
    ("completion_loss", "16384", "backward", "workspace", WORKSPACE),
    ("completion_loss", "16384", "backward", "weights", WEIGHTS),
    ("completion_loss", "4096", "forward", "similarities", SIMILARITIES),
    ("completion_loss", "4096", "forward", "splits", SPLITS),
    ("linear_cross_entropy", "125", "backward", "words", WORDS),
    ("linear_cross_entropy", "125", "forward", "words", WORDS_FORWARD),
    ("packed_attention", "13", "forward", "attention forward", SHORT_BOTH),
    ("packed_attention", "13", "backward", "attention by key", SHORT_BOTH_BACKWARD),
    ("frame_attention", "4x197", "backward", "frames by key", FRAMES_BY_KEY),
    ("frame_attention", "4x197", "forward", "frames by row", FRAMES_BY_ROW),
    ("frame_attention", "4x197", "backward", "frames by row", FRAMES_BY_ROW),
    ("embed_patches", "64 of 324", "backward", "embedding", EMBEDDING_BACKWARD),
    ("embed_patches", "64 of 324", "forward", "embedding", EMBEDDING),
    ("select_patches", "64", "forward", "masks", MASKS),
    ("mask_text", "64", "forward", "masks", MASKS),
]


def groups() -> list[list[Candidate]]:
    """Most important first; in each the present configuration, then the others by promise."""
    all_groups: list[list[Candidate]] = []
    for op, name, pass_, choice, space in _TABLE:
        size = next(s for s in (*SPECS[op].sizes, *STEP_SIZES.get(op, ())) if s.name == name)
        all_groups.append([Candidate(op, size, pass_, choice)])
        all_groups[-1] += [Candidate(op, size, pass_, choice, *values) for values in space]
    return all_groups
