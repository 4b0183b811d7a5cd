"""The clauses of `compute_slot_mapping`."""

from __future__ import annotations

from itertools import accumulate
from random import Random
from typing import Any

from advance_step.conformance.case import Case, Cells, Clause, View
from advance_step.conformance.clauses.common import (
    BLOCK_SIZE,
    ERROR,
    NAMED,
    ONE_DEVICE,
    SHARED_MEMORY,
    SLOT_64,
    VECTOR_STRIDES,
    change,
    distinct_pages,
    draw,
    recast,
    refuse,
    refuse_device,
    refuse_dtypes,
    refuse_sizes,
    some_negative_pages,
    tensors,
    vector,
)

SLOT = "slot_mapping[t] = block_table[r, p // block_size] * block_size + p % block_size"
REQUEST = "for each request r and each token t in [query_start_loc[r], query_start_loc[r + 1])"
PAD = "slot_mapping[t] = pad_slot for t in [N, M)"
BAD_POSITION = "CPU: an error before anything is written; accelerator: that token gets pad_slot"
NO_PAGE = "a negative page id: pad_slot, on every device"
RANKS = "with o = p % (block_size * cp_world_size), this rank's where (o // cp_interleave) % cp_world_size == cp_rank"
DTYPES = "query_start_loc, positions and block_table int32 or int64, independently"
TABLE_STRIDES = "block_table: any strides"


def slot_case(
    rng: Random,
    requests: list[list[int]],  # the positions of each one's tokens
    pads: int = 0,
    block_size: int = BLOCK_SIZE,
    columns: int | None = None,
    pages: list[list[int]] | None = None,
    spare_rows: int = 0,
    spare_positions: int = 0,
    table_strides: tuple[int, int] | None = None,
    vector_stride: int = 1,
    starts_dtype: str = "int32",
    positions_dtype: str = "int64",
    table_dtype: str = "int32",
    **keyword: int,
) -> Case:
    """A call with the tokens of `requests`, and `pads` entries of slot_mapping more; its table has room for them."""
    positions = [position for request in requests for position in request]
    size = block_size * keyword.get("cp_world_size", 1)
    columns = max(2, max(positions, default=0) // size + 1) if columns is None else columns
    rows = len(requests) + spare_rows
    args: dict[str, Any] = {
        "query_start_loc": vector([0, *accumulate(map(len, requests))], starts_dtype, vector_stride),
        "positions": vector(positions + [10**9] * spare_positions, positions_dtype, vector_stride),
        "block_table": Cells(pages or distinct_pages(rng, rows, columns), table_dtype, (rows, columns), table_strides),
        "slot_mapping": vector(draw(rng, len(positions) + pads, 10**6), stride=vector_stride),
        "block_size": block_size,
    }
    return Case("slot-mapping", args | keyword)


def slot_mapping_clauses() -> list[Clause]:
    def decode(rng: Random, rows: int, pads: int = 0, **options: Any) -> Case:
        return slot_case(rng, [[rng.randrange(64)] for _ in range(rows)], pads, **options)

    def some(rng: Random, **options: Any) -> Case:
        """A prompt, a request without tokens, a piece of a prompt, and one that decodes; one entry pads."""
        return slot_case(rng, [list(range(9)), [], list(range(12, 35)), [40]], 1, **options)

    def ranks(rng: Random, interleaves: tuple[int, ...]) -> list[Case]:
        cases = []
        for interleave in interleaves:
            for world_size in (2, 3):
                keyword = {"cp_world_size": world_size, "cp_interleave": interleave, "block_size": 4}
                cases += [some(rng, cp_rank=rank, **keyword) for rank in range(world_size)]
        return cases

    def many(rng: Random) -> list[Case]:
        requests, left = [], 8451
        while left > 0:
            count, first = min(rng.choice([0, 1, 1, 1, 2, 30]), left), rng.randrange(40)
            requests.append(list(range(first, first + count)))
            left -= count
        return [slot_case(rng, requests, 1)]

    def broken_starts(rng: Random) -> list[Case]:
        case = slot_case(rng, [[3, 4, 5], [7], [9, 10]], 1, spare_positions=1)
        starts = [[0, 3, 2, 6], [0, 7, 4, 6], [1, 3, 4, 6], [-1, 3, 4, 6], [0, 3, 4, 8], [0, 3, 4, 2**31 - 1]]
        too_few = change(case, positions=vector([3, 4, 5, 7, 9]))
        return [*(change(case, query_start_loc=vector(values, "int32")) for values in starts), too_few]

    def wrong_dtypes(rng: Random) -> list[Case]:
        case = some(rng)
        wrong = [(name, dtype) for name in tensors(case) for dtype in ("float64", "int16")]
        return refuse_dtypes(case, [*wrong, ("slot_mapping", "int32")])

    def wrong_shapes(rng: Random) -> list[Case]:
        case = decode(rng, 4)
        return [
            *refuse_sizes(case, ("block_table",), (3,)),
            refuse(case, block_table=Cells([1, 2, 3, 4], "int32")),
            refuse(case, query_start_loc=vector([], "int32")),
            refuse(case, query_start_loc=Cells([[0], [1], [2], [3], [4]], "int32")),
            refuse(case, positions=Cells([[5], [15], [16], [9]])),
            refuse(case, slot_mapping=Cells([[5], [15], [16], [9]])),
        ]

    def wrong_scalars(rng: Random) -> list[Case]:
        case = some(rng)
        wrong: list[dict[str, int]] = [{"block_size": 0}, {"block_size": -16}, {"cp_world_size": 0}, {"cp_rank": -1}]
        wrong += [{"cp_world_size": 2, "cp_rank": 2}, {"cp_rank": 1}, {"cp_interleave": 0}, {"cp_interleave": 3}]
        wrong += [{"cp_interleave": 32}, {"cp_world_size": 2**60}]
        return [refuse(case, **scalars) for scalars in wrong]

    def shared(rng: Random) -> list[Case]:
        case = decode(rng, 4, starts_dtype="int64", table_dtype="int64")
        return [
            refuse(case, slot_mapping=View("positions", (4,))),
            refuse(case, slot_mapping=View("query_start_loc", (4,), start=1)),
            refuse(case, slot_mapping=View("block_table", (4,), start=2)),
        ]

    def named(rng: Random) -> list[Case]:
        case = some(rng)
        return [
            refuse(case, ("slot_mapping",), slot_mapping=recast(case.args["slot_mapping"], "int32")),
            refuse(case, ("block_table",), block_table=Cells([[1, 2]], "int32")),
            refuse(case, ("block_size",), block_size=0),
            refuse(case, ("cp_rank",), cp_rank=1),
        ]

    return [
        Clause("one-token-a-request", SLOT, lambda rng: [decode(rng, 1), decode(rng, 7)]),
        Clause("prompts", SLOT, lambda rng: [slot_case(rng, [list(range(20)), list(range(7, 26))])]),
        Clause("prompts-and-decodes", REQUEST, lambda rng: [some(rng)]),
        Clause(
            "requests-without-tokens",
            REQUEST,
            lambda rng: [slot_case(rng, [[], [], [5, 6], [], [1], []], 1), slot_case(rng, [[], []], 1)],
        ),
        Clause("page-boundary", SLOT, lambda rng: [slot_case(rng, [[14, 15, 16], [30, 31], [0], [15], [16]])]),
        Clause("own-row-of-the-table", SLOT, lambda rng: [slot_case(rng, [[5, 17], [20], [1, 2, 3], [30], [31]])]),
        Clause("positions-in-any-order", "p = positions[t]", lambda rng: [slot_case(rng, [[20, 3, 3, 17], [9, 0]])]),
        Clause("more-than-48-rows", SLOT, lambda rng: [decode(rng, 53, 1)]),
        Clause("more-than-64x132-rows", SLOT, many),
        Clause("several-pad-rows", PAD, lambda rng: [decode(rng, 3, n) for n in (101, 3, 0)]),
        Clause(
            "pad-slot",
            PAD,
            lambda rng: [
                slot_case(rng, [[5], [20], [0], [14]], 1, pages=some_negative_pages(rng, 4), columns=2, pad_slot=slot)
                for slot in (0, -7, 2**40)
            ],
        ),
        Clause(
            "positions-past-n",
            "positions [>= N]: what follows is not read as positions, and has no slot",
            lambda rng: [some(rng, spare_positions=n) for n in (1, 5)],
        ),
        Clause("table-of-more-rows", "block_table [>= R, W]", lambda rng: [some(rng, spare_rows=3)]),
        Clause(
            "narrow-table",
            f"a position past the table. {BAD_POSITION}",
            lambda rng: [
                slot_case(rng, [[5, 31], [7, 32, 33], [1]], 1, columns=2),
                slot_case(rng, [[5], [10**12], [1]], columns=2),
                slot_case(rng, [[0]], columns=0),
            ],
        ),
        Clause(
            "negative-position",
            f"a negative position. {BAD_POSITION}",
            lambda rng: [slot_case(rng, [[5, 6], [7, -1], [-17]], 1), slot_case(rng, [[5], [-(2**63)]])],
        ),
        Clause(
            "negative-page",
            NO_PAGE,
            lambda rng: [slot_case(rng, [[5], [20], [0], [14]], pages=some_negative_pages(rng, 4), columns=2)],
        ),
        Clause(
            "slot-past-32-bits",
            SLOT_64,
            lambda rng: [
                slot_case(rng, [[3, 4], [299]], block_size=256, pages=[[2**23, 7], [8, 2**24 + 1]], columns=2),
                slot_case(rng, [[3]], block_size=128, pages=[[2**25 - 1]], columns=1),
            ],
        ),
        Clause(
            "block-sizes",
            "block_size > 0",
            lambda rng: (
                [slot_case(rng, [[0], [n - 1, n]], block_size=n) for n in (1, 3, 128)]
                + [slot_case(rng, [[0], [5, 2**31 + 9]], block_size=2**31)]
            ),
        ),
        Clause("context-parallel", RANKS, lambda rng: ranks(rng, (1,))),
        Clause("context-parallel-interleave", RANKS, lambda rng: ranks(rng, (2, 4))),
        Clause(
            "context-parallel-narrow-table",
            f"a position past the table, whichever rank has it. {BAD_POSITION}",
            lambda rng: [
                slot_case(rng, [[5, position], [1]], columns=2, cp_world_size=2, cp_rank=1) for position in (65, 64)
            ],
        ),
        Clause(
            "broken-query-start-loc",
            "a query_start_loc that falls, does not start at 0 or passes positions or slot_mapping. CPU: an error "
            "before anything is written; accelerator: nothing is read or written out of place",
            broken_starts,
        ),
        Clause("no-rows", "R and N may be 0", lambda rng: [slot_case(rng, [], pads) for pads in (0, 3)]),
        Clause("int64-table", DTYPES, lambda rng: [some(rng, table_dtype="int64")]),
        Clause("int64-query-start-loc", DTYPES, lambda rng: [some(rng, starts_dtype="int64")]),
        Clause("int32-positions", DTYPES, lambda rng: [some(rng, positions_dtype="int32")]),
        Clause("table-row-stride", TABLE_STRIDES, lambda rng: [some(rng, table_strides=(7, 1))]),
        Clause(
            "table-column-stride", TABLE_STRIDES, lambda rng: [some(rng, table_strides=s) for s in ((1, 5), (9, 3))]
        ),
        Clause("vector-strides", VECTOR_STRIDES, lambda rng: [some(rng, vector_stride=3)]),
        Clause("refuses-dtypes", f"dtypes. {ERROR}", wrong_dtypes),
        Clause("refuses-shapes", f"shapes. {ERROR}", wrong_shapes),
        Clause("refuses-scalars", f"scalars. {ERROR}", wrong_scalars),
        Clause("refuses-shared-memory", SHARED_MEMORY, shared),
        Clause("refuses-mixed-devices", ONE_DEVICE, lambda rng: refuse_device(some(rng), "block_table")),
        Clause("errors-name-the-argument", NAMED, named),
    ]
