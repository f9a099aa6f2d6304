"""How the tiles and warps of a kernel follow from lengths: what the tables of ``config_tables.py`` are made of.

A rule is called with the bytes of an element and the shapes, and returns constants and warps by name, or None where
the kernel is not launched at these shapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Fields = dict[str, int]
Rule = Callable[..., Fields | None]
# What is wrong with constants at these shapes, or None.
Problem = Callable[[Mapping[str, int], Mapping[str, int]], str | None]

# Tile sizes of attention, the largest first.
TILES = (128, 64, 32, 16)
# Rows of the first operand with which Hopper's tensor cores take a product whole (wgmma), by a group of four warps.
# Below: 65 x 65 in tiles of 32 and 13 x 13 in tiles of 16 use the older mma, one or two warps a program. Padding them
# to 64 rows would cost 1.8 and 16 times the work, and 16 x 16 scores leave most of four warps idle.
WGMMA_M, WARPGROUP = 64, 4
# Most scores of a tile of the forward with a bias in 16 bits: the bias lies in registers beside them, and 128 x 64 on 8
# warps, 128 x 16 on 4 and 32 x 32 on 2 take 248 registers and more.
BIASED_SCORES = 2048
# The same where the head fills no tile of channels: of the backward by key, and of the forward on 4 warps.
FILLED_SCORES = 1024


def _no_problem(constants: Mapping[str, int], shapes: Mapping[str, int]) -> str | None:
    return None


@dataclass(frozen=True)
class Entry:
    """The configuration of one kernel in the table of an architecture.

    Attributes:
        rule: constants, launcher numbers, warps and stages from the bytes of an element and the shapes.
        reason: why; "predicted: ..." until it is measured.
        names: constants and launcher numbers that the rule chooses.
        flags: those of the names that are no sizes.
        problem: what is wrong with other constants at some shapes.
    """

    rule: Rule
    reason: str
    names: tuple[str, ...]
    flags: tuple[str, ...] = ()
    problem: Problem = field(default=_no_problem)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def fixed(**fields: int) -> Rule:
    """The same at all shapes."""
    return lambda itemsize, **shapes: fields


def by_itemsize(two: Fields, four: Fields) -> Rule:
    """``two`` for elements of two bytes, ``four`` for larger ones."""
    return lambda itemsize, **shapes: two if itemsize == 2 else four


def by_keys(most: int, few: Rule, many: Rule) -> Rule:
    """``few`` for up to ``most`` keys, ``many`` for more."""
    return lambda itemsize, **shapes: (few if shapes["keys"] <= most else many)(itemsize, **shapes)


def split_keys(two: Fields, four: Fields, most: int = 16) -> Rule:
    """As ``by_itemsize``, with SPLIT where there are more than ``most`` keys."""
    whole = by_itemsize(two, four)
    return lambda itemsize, **shapes: {**whole(itemsize), "SPLIT": int(shapes["keys"] > most)}  # type: ignore[dict-item]


def whole_rows(block: str, *, least_columns: int = 16, columns_per_warp: int = 256, **fields: int) -> Rule:
    """A program holds rows of a power of two of columns, named ``block``, on 4 warps and more."""

    def rule(itemsize: int, *, columns: int, **shapes: int) -> Fields:
        size = max(least_columns, next_power_of_2(columns))
        return {block: size, **fields, "num_warps": max(4, size // columns_per_warp)}

    return rule


def rows_of_warps(*, most_rows: int, columns_per_warp: int = 256, **fields: int) -> Callable[..., Fields]:
    """As ``whole_rows``, several short rows a program: as many as its warps have columns for."""

    def rule(itemsize: int, *, columns: int, **shapes: int) -> Fields:
        size = max(16, next_power_of_2(columns))
        warps = max(4, size // columns_per_warp)
        rows = min(most_rows, warps * columns_per_warp // size)
        return {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": size, **fields, "num_warps": warps}

    return rule


def rows_for_programs(choices: tuple[int, ...], *, programs: int, most_rows: int) -> Rule:
    """As ``rows_of_warps``, with rows that a program adds up: the most of ``choices``, in descending order, that leave
    at least ``programs``; where none does, or the rows are not known, the fewest and the most."""

    whole = rows_of_warps(most_rows=most_rows)

    def rule(itemsize: int, *, columns: int, rows: int | None = None, **shapes: int) -> Fields:
        fields = whole(itemsize, columns=columns)
        fitting = [choice for choice in choices if rows is None or rows >= programs * choice] or [choices[-1]]
        return {**fields, "ROWS_PER_PROGRAM": max(fitting[0], fields["BLOCK_ROWS"])}

    return rule


def covers_columns(block: str) -> Problem:
    """``block`` has to hold a whole row."""

    def problem(constants: Mapping[str, int], shapes: Mapping[str, int]) -> str | None:
        columns = shapes.get("columns", 0)
        return (
            f"{block} {constants[block]}, expected at least {columns} columns" if constants[block] < columns else None
        )

    return problem


def whole_programs(constants: Mapping[str, int], shapes: Mapping[str, int]) -> str | None:
    """As ``covers_columns``; and a program's rows are whole tiles, or two programs would add up the same row."""
    if problem := covers_columns("BLOCK_COLUMNS")(constants, shapes):
        return problem
    rows, tile_rows = constants["ROWS_PER_PROGRAM"], constants["BLOCK_ROWS"]
    return f"ROWS_PER_PROGRAM {rows}, expected a multiple of BLOCK_ROWS {tile_rows}" if rows % tile_rows else None


def by_head_dim(tiles: Mapping[tuple[int, int], tuple[int, int, int]], num_stages: int | None = None) -> Rule:
    """Of frame attention: (rows, keys, warps) by bytes of an element and head_dim, 64 for head_dim up to 64."""
    stages = {} if num_stages is None else {"num_stages": num_stages}

    def rule(itemsize: int, *, head_dim: int, **shapes: int) -> Fields:
        rows, keys, warps = tiles[itemsize, max(head_dim, 64)]
        return {"BLOCK_ROWS": rows, "BLOCK_KEYS": keys, "num_warps": warps, **stages}

    return rule


def tile(length: int, largest: int) -> int:
    """The largest tile that pads ``length`` to at most 4/3 of what the smallest does: 65 takes 32, 325 takes 128."""
    length = max(length, 1)
    least = ceil_div(length, TILES[-1]) * TILES[-1]
    return next(t for t in TILES if t <= largest and 3 * ceil_div(length, t) * t <= 4 * least)


# (rows that are spread over programs, rows that each program loops over), the largest tile of each, by (bytes of an
# element, head_dim), 64 for head_dim up to 64.
LargestTiles = Mapping[tuple[int, int], tuple[int, int]]


def _tiles(rows: int, others: int, itemsize: int, head_dim: int, largest: LargestTiles) -> tuple[int, int]:
    limits = largest[itemsize, max(head_dim, 64)]
    return tile(rows, limits[0]), tile(others, limits[1])


def _warps(queries: int, keys: int, head_dim: int, itemsize: int, per_warp: Mapping[int, int]) -> int:
    """A power of two from 1 to 8 for tiles of these sizes: a warp has at most ``per_warp`` scores and operands."""
    count = (queries * keys + (queries + keys) * max(head_dim, 64)) // per_warp[itemsize]
    least = WARPGROUP if itemsize == 2 and max(queries, keys) >= WGMMA_M else 1
    return max(least, 1 << min(3, max(0, count.bit_length() - 1)))


@dataclass(frozen=True)
class AttentionForward:
    """Tiles of the forward.

    Attributes:
        largest: largest tiles.
        per_warp: elements of scores and operands for each warp, by bytes of an element; more would spill.
        turned_warps: where keys are the rows of the products, None for what ``per_warp`` gives.
        biased_scores: most scores of a tile with a bias in 16 bits.
    """

    largest: LargestTiles
    per_warp: Mapping[int, int]
    turned_warps: int | None = None
    biased_scores: int = BIASED_SCORES

    def __call__(self, itemsize: int, *, queries: int, keys: int, head_dim: int, bias: int = 0) -> Fields:
        filled, head_dim = head_dim != next_power_of_2(head_dim), next_power_of_2(head_dim)
        block_queries, block_keys = _tiles(queries, keys, itemsize, head_dim, self.largest)
        if filled:
            # The mask of the channels takes registers: 128 rows spill on sm_120.
            block_queries = tile(queries, min(block_queries, WGMMA_M))
        if biased := bool(bias) and itemsize == 2:
            block_queries = tile(queries, WGMMA_M)
            block_keys = tile(keys, min(self.largest[2, max(head_dim, 64)][1], self.biased_scores // block_queries))
        # Few queries and many keys: the keys are the rows of the products, see WGMMA_M.
        turned = block_queries < WGMMA_M <= block_keys
        warps = _warps(block_queries, block_keys, head_dim, itemsize, self.per_warp)
        # 64 x 32 with a mask of the channels on 4 warps takes 231 registers; 64 x 16 on 8 spills on sm_100.
        most = 2 * WARPGROUP if filled and block_queries * block_keys > FILLED_SCORES else WARPGROUP
        return {
            "BLOCK_QUERIES": block_queries,
            "BLOCK_KEYS": block_keys,
            "TRANSPOSED": int(turned),
            "KEEP_BITS": 0,
            "num_warps": (turned and self.turned_warps) or (min(2 * warps, most) if biased else warps),
        }


@dataclass(frozen=True)
class AttentionBackward:
    """Tiles of one kernel of the backward; where one tile holds all rows of a side, its kernel runs alone.

    Attributes:
        side: "query" or "key": the rows that are spread over programs.
        largest: as of ``AttentionForward``.
        per_warp: as of ``AttentionForward``.
        one_warpgroup: by (SINGLE_TILE, head_dim), tiles of two-byte rows that have four warps at most: two groups that
            share 64 rows would each issue the addresses, barriers and exchanges of a whole tile.
        single_tile_scores: most scores of a step of the key kernel that holds the gradient of the queries too, by
            (bytes of an element, head_dim); more would spill.
        num_stages: of the loop, None for Triton's default.
        most_alone: most rows of a side that a kernel takes alone, by (bytes of an element, head_dim); None for what
            ``largest`` takes. The same of both kernels: each has to know whether the other runs.
    """

    side: str
    largest: LargestTiles
    per_warp: Mapping[int, int]
    one_warpgroup: Mapping[tuple[bool, int], tuple[int, ...]]
    single_tile_scores: Mapping[tuple[int, int], int]
    num_stages: int | None = None
    most_alone: Mapping[tuple[int, int], int] | None = None

    def __call__(self, itemsize: int, *, queries: int, keys: int, head_dim: int, bias: int = 0) -> Fields | None:
        filled, head_dim = head_dim != next_power_of_2(head_dim), next_power_of_2(head_dim)
        by_query = _tiles(queries, keys, itemsize, head_dim, self.largest)
        by_key = _tiles(keys, queries, itemsize, head_dim, self.largest)
        # A length of 0 has no kernel of its own to write the zeros of the other side, so it is never a single tile.
        most = max(by_key[0], by_query[0])
        if self.most_alone is not None:
            most = self.most_alone[itemsize, max(head_dim, 64)]
        single_key_tile = 0 < keys <= min(by_key[0], most) and queries > 0
        single_query_tile = 0 < queries <= min(by_query[0], most) and keys > 0 and not single_key_tile
        is_query = self.side == "query"
        if single_key_tile if is_query else single_query_tile:
            return None
        (block, other_block), others = (by_query, keys) if is_query else (by_key, queries)
        single = single_query_tile if is_query else single_key_tile
        two_bytes = itemsize == 2
        # The rows that are spread over programs are those of the products. A single tile may have fewer than WGMMA_M:
        # then the others are, and channels. Four bytes use the ordinary cores, and would spill.
        turned = single and two_bytes and (is_query or block < WGMMA_M)
        if single and two_bytes and head_dim < 128:
            other_block = tile(others, WGMMA_M)
        if single and not is_query:
            other_block = max(TILES[-1], min(other_block, self.single_tile_scores[itemsize, head_dim] // block))
        if bias and filled and two_bytes and not (single or is_query):
            # 32 x 64 with a mask of the channels would spill on sm_100 with Triton 3.6.
            other_block = max(TILES[-1], min(other_block, FILLED_SCORES // block))
        block_queries, block_keys = (block, other_block) if is_query else (other_block, block)
        warps = _warps(block_queries, block_keys, head_dim, itemsize, self.per_warp)
        if two_bytes and block in self.one_warpgroup[single, head_dim]:
            warps = min(warps, WARPGROUP)
        if bias and two_bytes and (filled or warps < WARPGROUP):
            # 16 x 16 on 2 warps would take 246 registers; 64 x 32 by query with a mask of the channels on 4 warps 250.
            warps = min(2 * warps, 2 * WARPGROUP)
        return {
            "BLOCK_QUERIES": block_queries,
            "BLOCK_KEYS": block_keys,
            "SINGLE_TILE": int(single),
            "TRANSPOSED": int(is_query == turned),
            "num_warps": warps,
            **({} if self.num_stages is None else {"num_stages": self.num_stages}),
        }


@dataclass(frozen=True)
class AttentionBias:
    """Tiles of the gradient of the bias, which one accumulator holds.

    Attributes:
        largest: as of ``AttentionForward``, queries first.
        per_warp: as of ``AttentionForward``.
        programs: at least so many are wanted; a tile gets several where there are fewer.
    """

    largest: LargestTiles
    per_warp: Mapping[int, int]
    programs: int

    def __call__(self, itemsize: int, *, queries: int, keys: int, head_dim: int) -> Fields:
        head_dim = next_power_of_2(head_dim)
        block_queries, block_keys = _tiles(queries, keys, itemsize, head_dim, self.largest)
        warps = _warps(block_queries, block_keys, head_dim, itemsize, self.per_warp)
        tiles = {"BLOCK_QUERIES": block_queries, "BLOCK_KEYS": block_keys}
        return {**tiles, "PROGRAMS": self.programs, "num_warps": warps}


def single_tile_holds_all(side: str) -> Problem:
    """A kernel that runs alone needs a tile of all rows of its side, and is the only one that may run alone."""

    def problem(constants: Mapping[str, int], shapes: Mapping[str, int]) -> str | None:
        names = {"query": ("BLOCK_QUERIES", "queries"), "key": ("BLOCK_KEYS", "keys")}
        block, length = names[side]
        if min(constants["BLOCK_QUERIES"], constants["BLOCK_KEYS"]) < TILES[-1]:
            return f"a tile of less than {TILES[-1]} rows, expected at least {TILES[-1]}"
        if constants["SINGLE_TILE"] and not 0 < shapes[length] <= constants[block]:
            return f"SINGLE_TILE and {block} {constants[block]}, expected at least {length} {shapes[length]}"
        return None

    return problem
