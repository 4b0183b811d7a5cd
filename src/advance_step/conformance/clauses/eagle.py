"""The clauses of `eagle_step_update_slot_mapping_and_metadata`."""

from __future__ import annotations

from random import Random

from advance_step.conformance.case import Case, Cells, Clause, View
from advance_step.conformance.clauses.common import (
    BLOCK_SIZE,
    ERROR,
    NAMED,
    NEGATIVE_PAGE,
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
    resized,
    some_negative_pages,
    tensors,
    vector,
)
from advance_step.conformance.oracle import INT32_MAX, INT64_MAX

MOVED = "positions + 1; seq_len = min(seq_len + 1, max_model_len)"
EXCEEDS = "past max_model_len - 1: position 0, slot -1, seq_len 1"
PAST_THE_TABLE = "a position past the table gives slot -1"
TABLE_STRIDES = "block_table_tensor: any strides"
PAD = "rows from batch_size to input_batch_size get slot -1"


def eagle_case(
    rng: Random,
    positions: list[int],
    pads: int | None = None,
    max_model_len: int = 4096,
    block_size: int = BLOCK_SIZE,
    columns: int | None = None,
    pages: list[list[int]] | None = None,
    seq_lens: list[int] | None = None,
    table_strides: tuple[int, int] | None = None,
    vector_stride: int = 1,
    table_dtype: str = "int32",
    lens_dtype: str = "int32",
) -> Case:
    """A call whose rows stand at `positions`; with `pads`, input_batch_size is given and so many rows larger."""
    rows = len(positions)
    last = max([p + 1 for p in positions if p + 1 < max_model_len], default=0)
    columns = max(2, last // block_size + 1) if columns is None else columns
    lens = [max(p, 0) + 1 for p in positions] if seq_lens is None else seq_lens
    padded = rows + (pads or 0)
    slots = draw(rng, padded, 10_000)
    table = pages or distinct_pages(rng, rows, columns)
    args = {
        "positions_1d": vector(positions, stride=vector_stride),
        "block_table_tensor": Cells(table, table_dtype, (rows, columns), table_strides),
        "seq_lens": vector(lens, lens_dtype, vector_stride),
        "block_size": block_size,
        "max_model_len": max_model_len,
        "out_clamped_positions": vector(draw(rng, rows, 999), stride=vector_stride),
        "out_slot_mapping": vector(slots, stride=vector_stride),
    }
    return Case("eagle", args if pads is None else args | {"input_batch_size": padded})


def eagle_clauses() -> list[Clause]:
    def drawn(rng: Random, rows: int, most: int = 64, pads: int | None = None) -> Case:
        return eagle_case(rng, [rng.randrange(most) for _ in range(rows)], pads)

    def in_place(rng: Random) -> list[Case]:
        case = eagle_case(rng, [5, 15, 16, 4094, 4095, 40])
        return [change(case, out_clamped_positions=View("positions_1d", (6,)))]

    def wrong_dtypes(rng: Random) -> list[Case]:
        case = eagle_case(rng, [5, 15, 16])
        wrong = [(name, dtype) for name in tensors(case) for dtype in ("float64", "int16")]
        return refuse_dtypes(case, [*wrong, ("out_slot_mapping", "int32"), ("out_clamped_positions", "int32")])

    def wrong_shapes(rng: Random) -> list[Case]:
        case = eagle_case(rng, [5, 15, 16, 9], pads=2)
        return [
            *refuse_sizes(case, ("block_table_tensor", "seq_lens", "out_clamped_positions"), (3,)),
            *refuse_sizes(case, ("out_slot_mapping",), (5,)),
            refuse(case, block_table_tensor=Cells([1, 2, 3, 4], "int32")),
            refuse(case, positions_1d=Cells([[5], [15], [16], [9]])),
        ]

    def wrong_scalars(rng: Random) -> list[Case]:
        case = eagle_case(rng, [5, 15, 16], pads=2)
        wrong = [{"block_size": 0}, {"block_size": -1}, {"max_model_len": 0}, {"input_batch_size": 2}]
        return [refuse(case, **scalar) for scalar in wrong]

    def shared(rng: Random) -> list[Case]:
        case = eagle_case(rng, [5, 15, 16, 9])
        return [
            refuse(case, out_slot_mapping=View("positions_1d", (4,))),
            refuse(case, out_clamped_positions=View("positions_1d", (4,), start=1)),
            refuse(case, out_slot_mapping=View("out_clamped_positions", (4,), start=2)),
            refuse(case, block_table_tensor=View("seq_lens", (4, 1))),
        ]

    def named(rng: Random) -> list[Case]:
        case = eagle_case(rng, [5, 15, 16, 9])
        return [
            refuse(case, ("seq_lens",), seq_lens=resized(case.args["seq_lens"], 2)),
            refuse(case, ("out_slot_mapping",), out_slot_mapping=recast(case.args["out_slot_mapping"], "int32")),
            refuse(case, ("block_size",), block_size=0),
        ]

    return [
        Clause("advances", MOVED, lambda rng: [eagle_case(rng, [5]), drawn(rng, 7)]),
        Clause("page-boundary", "the slot of positions + 1", lambda rng: [eagle_case(rng, [14, 15, 16, 30, 31, 0])]),
        Clause(
            "own-row-of-the-table",
            "the page is block_table_tensor[i, (positions[i] + 1) // block_size]",
            lambda rng: [eagle_case(rng, [5, 17, 20, 1, 30])],
        ),
        Clause("more-than-48-rows", MOVED, lambda rng: [drawn(rng, 53, pads=1)]),
        Clause("more-than-64x132-rows", MOVED, lambda rng: [drawn(rng, 8451, 31, pads=1)]),
        Clause(
            "at-max-model-len",
            EXCEEDS,
            lambda rng: [eagle_case(rng, [97, 98, 99, 100, 5000, 3], max_model_len=100)],
        ),
        Clause(
            "length-clamped",
            "otherwise seq_len = min(seq_len + 1, max_model_len)",
            lambda rng: [eagle_case(rng, [5, 6, 7, 8], max_model_len=100, seq_lens=[98, 99, 100, 101])],
        ),
        Clause("several-pad-rows", PAD, lambda rng: [eagle_case(rng, [9, 20], pads=n) for n in (101, 3, 0)]),
        Clause("no-input-batch-size", "input_batch_size=None", lambda rng: [eagle_case(rng, [9, 20])]),
        Clause("positions-in-place", "out_clamped_positions may be positions_1d itself", in_place),
        Clause(
            "past-the-table",
            PAST_THE_TABLE,
            lambda rng: [
                eagle_case(rng, [30, 31, 32, 500, 7], columns=2, pads=1),
                eagle_case(rng, [14, 15, 99], columns=1, max_model_len=10**6),
            ],
        ),
        Clause(
            "negative-page",
            NEGATIVE_PAGE,
            lambda rng: [eagle_case(rng, [5, 20, 0, 14], pages=some_negative_pages(rng, 4), columns=2)],
        ),
        Clause(
            "slot-past-32-bits",
            SLOT_64,
            lambda rng: [
                eagle_case(rng, [3, 299], block_size=256, pages=[[2**23, 7], [8, 2**24 + 1]], columns=2),
                eagle_case(rng, [3], block_size=128, pages=[[2**25 - 1]], columns=1),
            ],
        ),
        Clause(
            "block-sizes",
            "block_size > 0",
            lambda rng: (
                [eagle_case(rng, [0, size - 1, size], block_size=size) for size in (1, 3, 128)]
                + [eagle_case(rng, [0, 5, INT32_MAX - 2], block_size=2**31, max_model_len=INT32_MAX)]
            ),
        ),
        Clause(
            "negative-position",
            "a position without a page has a meaning: slot -1",
            lambda rng: [eagle_case(rng, [5, -1, -2, -17, 9], columns=2)],
        ),
        Clause(
            "position-at-its-end",
            EXCEEDS,
            lambda rng: [
                eagle_case(rng, [5, INT64_MAX, INT64_MAX - 1, INT32_MAX, 2**32 + 3], seq_lens=[6, 7, 8, 9, 10])
            ],
        ),
        Clause(
            "model-length-past-32-bits",
            "otherwise seq_len = min(seq_len + 1, max_model_len)",
            lambda rng: [eagle_case(rng, [5, 9], max_model_len=2**40)],
        ),
        Clause(
            "int32-length-at-its-end",
            "otherwise seq_len = min(seq_len + 1, max_model_len)",
            lambda rng: [eagle_case(rng, [5, 9], seq_lens=[INT32_MAX, INT32_MAX - 1])],
        ),
        Clause("no-rows", "batch_size may be 0", lambda rng: [eagle_case(rng, [], pads=n) for n in (0, 3)]),
        Clause("int64-table", "int32 or int64 tables", lambda rng: [eagle_case(rng, [5, 40], table_dtype="int64")]),
        Clause("int64-lengths", "int32 or int64 lengths", lambda rng: [eagle_case(rng, [5, 40], lens_dtype="int64")]),
        Clause(
            "table-row-stride",
            TABLE_STRIDES,
            lambda rng: [eagle_case(rng, [5, 17, 20], table_strides=(7, 1))],
        ),
        Clause(
            "table-column-stride",
            TABLE_STRIDES,
            lambda rng: [eagle_case(rng, [5, 17, 20], table_strides=s) for s in ((1, 5), (9, 3))],
        ),
        Clause(
            "vector-strides",
            VECTOR_STRIDES,
            lambda rng: [eagle_case(rng, [5, 17, 20], pads=1, vector_stride=3)],
        ),
        Clause("refuses-dtypes", f"dtypes. {ERROR}", wrong_dtypes),
        Clause("refuses-shapes", f"shapes. {ERROR}", wrong_shapes),
        Clause("refuses-scalars", f"scalars. {ERROR}", wrong_scalars),
        Clause("refuses-shared-memory", SHARED_MEMORY, shared),
        Clause(
            "refuses-mixed-devices",
            ONE_DEVICE,
            lambda rng: refuse_device(eagle_case(rng, [5, 15, 16, 9]), "block_table_tensor"),
        ),
        Clause("errors-name-the-argument", NAMED, named),
    ]
