"""The clauses of one plain step: section 1 in plain mode, section 2, and what section 3 shares with them."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from advance_step.conformance.case import Case, Cells, Clause, View
from advance_step.conformance.oracle import INT32_MAX

BLOCK_SIZE = 16
SLOT = "slot_mapping[i] = block_tables[i, p // block_size] * block_size + p % block_size"
PAD = "for each padding row: input_tokens = 0, input_positions = 0, slot_mapping = -1; seq_lens is left as it was"
DATA = "CPU: an error before anything is written; accelerator: that row gets slot -1"
HOST = "an error before anything is written"
NAMED = "an error names the argument, what was expected and what came"


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

    def vector(values: list[int], dtype: str = "int64") -> Cells:
        return Cells(values, dtype, shape=(len(values),), strides=(vector_stride,))

    sampled = [rng.randrange(1, 150_000) for _ in range(live)]
    flat = vector(sampled, sampled_dtype)
    column = Cells([[token] for token in sampled], sampled_dtype, (live, 1), (vector_stride, 1))
    args: dict[str, Any] = {
        "num_seqs": rows,
        "num_queries": live,
        "block_size": block_size,
        "input_tokens": vector([rng.randrange(1, 150_000) for _ in range(rows)]),
        "sampled_token_ids": flat if sampled_flat else column,
        "input_positions": vector([rng.randrange(1, 1000) for _ in range(rows)]),
        "seq_lens": vector(seq_lens + [rng.randrange(1, 100) for _ in range(pads)], lens_dtype or ints),
        "slot_mapping": vector([rng.randrange(1, 10_000) for _ in range(rows)]),
        "block_tables": Cells(table, table_dtype or ints, (rows, columns), table_strides),
    }
    if contract == "flashinfer":
        used = sum(min(length // block_size + 1, columns) for length in seq_lens if 0 <= length <= INT32_MAX)
        args |= {
            "paged_kv_indices": Cells([rng.randrange(1, 1000) for _ in range(used + 7)], "int32"),
            "paged_kv_indptr": Cells([rng.randrange(1, 1000) for _ in range(rows + 1)], "int32"),
            "paged_kv_last_page_len": Cells([rng.randrange(100, 200) for _ in range(rows)], "int32", (rows,)),
            "block_table_bound": Cells([rng.randrange(1, 1000) for _ in range(rows)], "int32", (rows,)),
        }
    return Case(contract, args)


def distinct_pages(rng: Random, rows: int, columns: int) -> list[list[int]]:
    """A block table in which no page id occurs twice."""
    ids = rng.sample(range(1, 4 * rows * columns + 2), rows * columns)
    return [ids[row * columns : (row + 1) * columns] for row in range(rows)]


def lengths(rng: Random, rows: int, most: int = 4 * BLOCK_SIZE) -> list[int]:
    return [rng.randrange(most) for _ in range(rows)]


def refuse(case: Case, names: tuple[str, ...] = (), /, **changed: Any) -> Case:
    """`case` with arguments in which the host must see a fault, and name one of `names`."""
    return replace(case, args=case.args | changed, refused=True, names=names)


def recast(cells: Cells, dtype: str) -> Cells:
    return replace(cells, dtype=dtype)


def resized(cells: Cells, size: int) -> Cells:
    """`cells` with `size` rows, the new ones equal to the last."""
    shape = None if cells.shape is None else (size, *cells.shape[1:])
    return replace(cells, values=(cells.values + cells.values[-1:] * size)[:size], shape=shape)


def step_clauses(contract: str) -> list[Clause]:
    """The clauses of a plain step for `contract`: npu, vllm or flashinfer."""
    npu = contract == "npu"

    def step(rng: Random, seq_lens: list[int], **options: Any) -> Case:
        return step_case(contract, rng, seq_lens, **options)

    def narrow(rng: Random, bad: int) -> Case:
        return step(rng, [bad if row in (37, 41) else row % 32 for row in range(43)], columns=2)

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
        strict = ("input_tokens", "input_positions", "slot_mapping")
        return [
            refuse(case, **{name: recast(cells, dtype)})
            for name, cells in case.args.items()
            if isinstance(cells, Cells)
            for dtype in (*wrong, *(("int32",) if name in strict and not npu else ()))
        ]

    def wrong_shapes(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        vectors = ("input_tokens", "input_positions", "seq_lens", "slot_mapping", "block_tables")
        sampled = case.args["sampled_token_ids"]
        return [
            *(refuse(case, **{name: resized(case.args[name], size)}) for name in vectors for size in (3, 5)),
            *(refuse(case, sampled_token_ids=resized(sampled, size)) for size in (2, 4)),
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
        tokens, table = case.args["input_tokens"], case.args["block_tables"]
        return [
            refuse(case, ("input_tokens",), input_tokens=resized(tokens, 3)),
            refuse(case, ("slot_mapping",), slot_mapping=recast(case.args["slot_mapping"], "float64")),
            refuse(case, ("block_tables",), block_tables=resized(table, 3)),
            refuse(case, ("block_size",), block_size=0),
        ]

    def in_place(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        return [replace(case, args=case.args | {"sampled_token_ids": View("input_tokens", (3, 1))})]

    def hostile_padding(rng: Random) -> list[Case]:
        case = step(rng, [3, 17], pads=4)
        lens = case.args["seq_lens"]
        return [replace(case, args=case.args | {"seq_lens": replace(lens, values=[3, 17, -5, 10**9, -1, INT32_MAX])})]

    def negative(rng: Random) -> list[Case]:
        pages = distinct_pages(rng, 5, 2)
        pages[1][1] = pages[2][0] = -1
        pages[3][0] = -7
        return [step(rng, [5, 20, 0, 15], pages=pages, columns=2)]

    def elsewhere(rng: Random) -> list[Case]:
        case = step(rng, [3, 17, 20])
        return [refuse(case, block_tables=replace(case.args["block_tables"], device="meta"))]

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
        Clause("more-than-48-rows", SLOT, lambda rng: [step(rng, lengths(rng, 53))]),
        Clause("more-than-64x132-rows", SLOT, lambda rng: [step(rng, lengths(rng, 8451, 32))]),
        Clause("several-pad-rows", PAD, lambda rng: [step(rng, [9], pads=101), step(rng, [9, 16], pads=3)]),
        Clause("padding-lengths-not-judged", PAD, hostile_padding),
        Clause("negative-page", 'a negative page id is "no page": slot -1, on every device', negative),
        Clause(
            "slot-past-32-bits",
            "slot arithmetic is 64-bit everywhere, whatever the tables' dtype",
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
        Clause("narrow-table", f"a position past the table. {DATA}", lambda rng: [narrow(rng, 32), narrow(rng, 2**30)]),
        Clause("negative-length", f"a negative length. {DATA}", lambda rng: [narrow(rng, -1), narrow(rng, -(2**31))]),
        Clause(
            "table-row-stride",
            "block_tables: any strides",
            lambda rng: [step(rng, [5, 17, 20], table_strides=(7, 1))],
        ),
        Clause(
            "table-column-stride",
            "block_tables: any strides",
            lambda rng: [step(rng, [5, 17, 20], table_strides=s) for s in ((1, 5), (9, 3))],
        ),
        Clause(
            "vector-strides",
            "vectors of any positive stride; what lies between is not written",
            lambda rng: [step(rng, [5, 17, 20], vector_stride=3)],
        ),
        Clause("sampled-in-place", "sampled_token_ids may be the memory of input_tokens[:num_queries]", in_place),
        Clause("refuses-dtypes", f"dtypes. {HOST}", wrong_dtypes),
        Clause("refuses-shapes", f"shapes. {HOST}", wrong_shapes),
        Clause("refuses-scalars", f"scalars. {HOST}", wrong_scalars),
        Clause("refuses-shared-memory", f"shared memory between arguments. {HOST}", shared),
        Clause("refuses-mixed-devices", f"all tensors on one device. {HOST}", elsewhere),
        Clause("errors-name-the-argument", NAMED, named),
    ]
