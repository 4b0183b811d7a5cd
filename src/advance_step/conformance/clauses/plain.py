"""The clauses of one plain step: what `npu_advance_step_flashattn` and `advance_step_flashattn` have in common.

`advance_step_flashinfer` shares them.
"""

from __future__ import annotations

from random import Random
from typing import Any

from advance_step.conformance.case import Case, Cells, Clause, View
from advance_step.conformance.clauses.common import (
    BAD_VALUE,
    BLOCK_SIZE,
    ERROR,
    NAMED,
    NEGATIVE_PAGE,
    ONE_DEVICE,
    SHARED_MEMORY,
    SLOT_64,
    TABLE_STRIDES,
    VECTOR_STRIDES,
    change,
    column,
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
from advance_step.conformance.oracle import INT32_MAX

SLOT = "slot_mapping[i] = block_tables[i, p // block_size] * block_size + p % block_size"
PAD = "for each padding row: input_tokens = 0, input_positions = 0, slot_mapping = -1; seq_lens is left as it was"


def step_case(
    contract: str,
    rng: Random,
    seq_lens: list[int],
    pads: int = 1,
    block_size: int = BLOCK_SIZE,
    columns: int | None = None,
    pages: list[list[int]] | None = None,
    table_strides: tuple[int, int] | None = None,
    vector_stride: int = 1,
    lens_dtype: str | None = None,
    table_dtype: str | None = None,
    sampled_dtype: str = "int64",
    sampled_flat: bool = False,
) -> Case:
    """A call whose live rows have `seq_lens`; what is not given is drawn, distinct from cell to cell."""
    live, rows = len(seq_lens), len(seq_lens) + pads
    ints = "int64" if contract == "npu" else "int32"
    if columns is None:
        columns = max(2, *(length // block_size + 1 for length in seq_lens)) if live else 2
    table = pages or distinct_pages(rng, rows, columns)
    sampled = draw(rng, live, 150_000)
    args: dict[str, Any] = {
        "num_seqs": rows,
        "num_queries": live,
        "block_size": block_size,
        "input_tokens": vector(draw(rng, rows, 150_000), stride=vector_stride),
        "sampled_token_ids": (vector if sampled_flat else column)(sampled, sampled_dtype, vector_stride),
        "input_positions": vector(draw(rng, rows, 1000), stride=vector_stride),
        "seq_lens": vector(seq_lens + draw(rng, pads, 100), lens_dtype or ints, vector_stride),
        "slot_mapping": vector(draw(rng, rows, 10_000), stride=vector_stride),
        "block_tables": Cells(table, table_dtype or ints, (rows, columns), table_strides),
    }
    if contract == "flashinfer":
        used = sum(min(length // block_size + 1, columns) for length in seq_lens if 0 <= length <= INT32_MAX)
        args |= {
            "paged_kv_indices": vector(draw(rng, used + 7, 1000), "int32"),
            "paged_kv_indptr": vector(draw(rng, rows + 1, 1000), "int32"),
            "paged_kv_last_page_len": vector([rng.randrange(100, 200) for _ in range(rows)], "int32"),
            "block_table_bound": vector(draw(rng, rows, 1000), "int32"),
        }
    return Case(contract, args)


def drawn_lengths(rng: Random, rows: int, most: int = 4 * BLOCK_SIZE) -> list[int]:
    return [rng.randrange(most) for _ in range(rows)]


def step_clauses(contract: str) -> list[Clause]:
    """The clauses of a plain step for `contract`: npu, vllm or flashinfer."""
    npu = contract == "npu"

    def step(rng: Random, seq_lens: list[int], **options: Any) -> Case:
        return step_case(contract, rng, seq_lens, **options)

    def rows_37_and_41(rng: Random, length: int) -> Case:
        """Two pages a row; only these two rows have `length`."""
        return step(rng, [length if row in (37, 41) else row % 32 for row in range(43)], columns=2)

    def shared(rng: Random) -> list[Case]:
        case = step(rng, [3, 7, 12, 5, 6, 7])
        row = (7,)
        return [
            refuse(case, input_positions=View("input_tokens", row)),
            refuse(case, slot_mapping=View("input_positions", row)),
            refuse(case, slot_mapping=View("input_positions", row, start=3)),
            refuse(case, sampled_token_ids=View("slot_mapping", (6, 1))),
            refuse(case, sampled_token_ids=View("input_tokens", (6, 1), start=1)),
            refuse(case, block_tables=View("slot_mapping", (7, 1)) if npu else View("seq_lens", (7, 1))),
        ]

    def wrong_dtypes(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        wrong = ("float64", "int16") if not npu else ("int32", "float64")
        only_64 = () if npu else ("input_tokens", "input_positions", "slot_mapping")
        pairs = [(name, dtype) for name in tensors(case) for dtype in wrong]
        return refuse_dtypes(case, pairs + [(name, "int32") for name in only_64])

    def wrong_shapes(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        by_row = ("input_tokens", "input_positions", "seq_lens", "slot_mapping", "block_tables")
        return [
            *refuse_sizes(case, by_row, (3, 5)),
            *refuse_sizes(case, ("sampled_token_ids",), (2, 4)),
            refuse(case, sampled_token_ids=Cells([[1, 2]] * 3)),
            refuse(case, block_tables=Cells([1, 2, 3, 4], case.args["block_tables"].dtype)),
            refuse(case, seq_lens=Cells([[3], [17], [20], [1]], case.args["seq_lens"].dtype)),
        ]

    def wrong_scalars(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        wrong = [{"block_size": 0}, {"block_size": -16}, {"num_queries": 6}, {"num_queries": -1}, {"num_seqs": -1}]
        return [refuse(case, **scalar) for scalar in wrong]

    def named(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        return [
            refuse(case, ("input_tokens",), input_tokens=resized(case.args["input_tokens"], 3)),
            refuse(case, ("slot_mapping",), slot_mapping=recast(case.args["slot_mapping"], "float64")),
            refuse(case, ("block_tables",), block_tables=resized(case.args["block_tables"], 3)),
            refuse(case, ("block_size",), block_size=0),
        ]

    def hostile_padding(rng: Random) -> list[Case]:
        case = step(rng, [3, 17], pads=4)
        return [change(case, seq_lens=vector([3, 17, -5, 10**9, -1, INT32_MAX], case.args["seq_lens"].dtype))]

    return [
        Clause(
            "one-row",
            "input_tokens[i] = sampled_token_ids[i, 0]; input_positions[i] = p; seq_lens[i] = p + 1",
            lambda rng: [step(rng, [p]) for p in (0, 7)],
        ),
        Clause("page-boundary", SLOT, lambda rng: [step(rng, [15, 16, 17, 31, 32, 33, 0])]),
        Clause(
            "table-just-wide-enough", "W > max(seq_lens) // block_size", lambda rng: [step(rng, [63, 62], columns=4)]
        ),
        Clause("own-row-of-the-table", SLOT, lambda rng: [step(rng, [5, 17, 20, 1, 30])]),
        Clause("more-than-48-rows", SLOT, lambda rng: [step(rng, drawn_lengths(rng, 53))]),
        Clause("more-than-64x132-rows", SLOT, lambda rng: [step(rng, drawn_lengths(rng, 8451, 32))]),
        Clause("several-pad-rows", PAD, lambda rng: [step(rng, [9], pads=101), step(rng, [9, 16], pads=3)]),
        Clause("padding-lengths-not-judged", PAD, hostile_padding),
        Clause(
            "negative-page",
            NEGATIVE_PAGE,
            lambda rng: [step(rng, [5, 20, 0, 15], pages=some_negative_pages(rng, 5), columns=2)],
        ),
        Clause(
            "slot-past-32-bits",
            SLOT_64,
            lambda rng: [
                step(rng, [3, 300], block_size=256, pages=[[2**23, 7], [8, 2**24 + 1], [1, 1]], columns=2),
                step(rng, [3], block_size=128, pages=[[2**25 - 1], [1]], columns=1),
            ],
        ),
        Clause(
            "block-sizes",
            "block_size > 0",
            lambda rng: (
                [step(rng, [0, size, size + 1], block_size=size) for size in (1, 3, 128)]
                + [step(rng, [0, 5, INT32_MAX - 1], block_size=2**31, columns=2)]
            ),
        ),
        Clause(
            "narrow-table",
            f"a position past the table. {BAD_VALUE}",
            lambda rng: [rows_37_and_41(rng, 32), rows_37_and_41(rng, 2**30)],
        ),
        Clause(
            "negative-length",
            f"a negative length. {BAD_VALUE}",
            lambda rng: [rows_37_and_41(rng, -1), rows_37_and_41(rng, -(2**31))],
        ),
        Clause("table-row-stride", TABLE_STRIDES, lambda rng: [step(rng, [5, 17, 20], table_strides=(7, 1))]),
        Clause(
            "table-column-stride",
            TABLE_STRIDES,
            lambda rng: [step(rng, [5, 17, 20], table_strides=s) for s in ((1, 5), (9, 3))],
        ),
        Clause("vector-strides", VECTOR_STRIDES, lambda rng: [step(rng, [5, 17, 20], vector_stride=3)]),
        Clause(
            "sampled-in-place",
            "sampled_token_ids may be the memory of input_tokens[:num_queries]",
            lambda rng: [change(step(rng, [3, 17, 20]), sampled_token_ids=View("input_tokens", (3, 1)))],
        ),
        Clause("refuses-dtypes", f"dtypes. {ERROR}", wrong_dtypes),
        Clause("refuses-shapes", f"shapes. {ERROR}", wrong_shapes),
        Clause("refuses-scalars", f"scalars. {ERROR}", wrong_scalars),
        Clause("refuses-shared-memory", SHARED_MEMORY, shared),
        Clause("refuses-mixed-devices", ONE_DEVICE, lambda rng: refuse_device(step(rng, [3, 17, 20]), "block_tables")),
        Clause("errors-name-the-argument", NAMED, named),
    ]
