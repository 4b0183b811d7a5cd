"""The clauses of `advance_until_stop`."""

from __future__ import annotations

from functools import partial
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
    TABLE_STRIDES,
    VECTOR_STRIDES,
    change,
    column,
    distinct_pages,
    draw,
    refuse,
    refuse_device,
    refuse_dtypes,
    refuse_sizes,
    resized,
    some_negative_pages,
    tensors,
    vector,
)
from advance_step.conformance.oracle import INT32_MAX, LENGTH, NO_PAGE, PADDING, RUNNING, STOPPED

FROZEN = "status != RUNNING: the row is frozen: slot_mapping[i] = pad slot, nothing else changes"
STOP = "t is one of stop_token_ids -> t is recorded; status = STOPPED; slot = pad slot; not advanced"
LONGEST = "seq_lens[i] + 1 >= max_seq_lens[i] -> t is recorded; status = LENGTH; slot = pad slot; not advanced"
NOWHERE = "the next position has no page -> status = NO_PAGE; slot = pad slot; nothing recorded, nothing advanced"
ADVANCE = "else -> t is recorded; the row advances as in advance_step_flashattn"
RECORD = "output_tokens[i, num_generated[i]] = t; num_generated[i] += 1"
GROUPS = "several KV groups advance in the same call: positions once, one slot per group"
DTYPES = "seq_lens, max_seq_lens, num_generated: int32 or int64; each block table int32 or int64"
STOPS = [2, 50_256, 7]


def stop_case(
    rng: Random,
    seq_lens: list[int],
    tokens: list[int] | None = None,
    status: list[int] | None = None,
    most: list[int] | None = None,
    generated: list[int] | None = None,
    stops: list[int] = STOPS,
    output: int = 6,
    groups: tuple[tuple[int, int], ...] = ((BLOCK_SIZE, 4),),  # (block_size, columns) of each
    pages: list[list[list[int]]] | None = None,
    table_strides: tuple[int, int] | None = None,
    vector_stride: int = 1,
    ints: dict[str, str] | None = None,
    sampled_column: bool = False,
) -> Case:
    """A call of len(seq_lens) rows, all running where `status` does not say otherwise, none at its end."""
    rows = len(seq_lens)
    dtypes = ints or {}

    def named(name: str, values: list[int], dtype: str = "int64") -> Cells:
        return vector(values, dtypes.get(name, dtype), vector_stride)

    sampled = [rng.randrange(100, 50_000) for _ in range(rows)] if tokens is None else tokens
    ids = (column if sampled_column else vector)(sampled, dtypes.get("sampled_token_ids", "int64"), vector_stride)
    args: dict[str, Any] = {
        "input_tokens": named("input_tokens", draw(rng, rows, 50_000)),
        "sampled_token_ids": ids,
        "input_positions": named("input_positions", draw(rng, rows, 999)),
        "seq_lens": named("seq_lens", seq_lens, "int32"),
    }
    for g in range(len(groups)):
        args[f"slot_mappings[{g}]"] = named("slot_mappings", draw(rng, rows, 9999))
    for g, (_, columns) in enumerate(groups):
        table = pages[g] if pages else distinct_pages(rng, rows, columns)
        args[f"block_tables[{g}]"] = Cells(table, dtypes.get("block_tables", "int32"), (rows, columns), table_strides)
    return Case(
        "until-stop",
        args
        | {
            "block_sizes": [size for size, _ in groups],
            "status": named("status", [RUNNING] * rows if status is None else status, "int32"),
            "output_tokens": Cells([draw(rng, output, 999) for _ in range(rows)], shape=(rows, output)),
            "num_generated": named("num_generated", [i % 3 for i in range(rows)] if generated is None else generated),
            "stop_token_ids": vector(stops),
            "max_seq_lens": named("max_seq_lens", [10_000] * rows if most is None else most, "int32"),
        },
    )


def until_stop_clauses() -> list[Clause]:
    def many(rng: Random, rows: int, output: int = 3) -> Case:
        return stop_case(
            rng,
            [rng.randrange(70) for _ in range(rows)],
            tokens=[rng.choice([2, 7, 8, 9, 11, 12]) for _ in range(rows)],
            status=[rng.choice([0, 0, 0, 0, 1, 2, 3, 4]) for _ in range(rows)],
            most=[rng.choice([20, 60, 10_000]) for _ in range(rows)],
            output=output,
        )

    def negative(rng: Random) -> list[Case]:
        return [stop_case(rng, [5, 20, 0, 15], pages=[some_negative_pages(rng, 4)], groups=((BLOCK_SIZE, 2),))]

    def mixed(name: str, dtype: str, rng: Random) -> list[Case]:
        return [stop_case(rng, [5, 17, 40, 20], tokens=[9, 2, 9, 9], ints={name: dtype})]

    def full_length(rng: Random) -> list[Case]:
        lengths, most = [INT32_MAX, INT32_MAX - 1, INT32_MAX], [2**40, 2**40, INT32_MAX]
        wide = {"max_seq_lens": "int64"}
        return [stop_case(rng, lengths, most=most, groups=((2**30, w),), ints=wide) for w in (1, 2)]

    def in_place(rng: Random) -> list[Case]:
        return [change(stop_case(rng, [5, 17, 20]), sampled_token_ids=View("input_tokens", (3,)))]

    def padded(rng: Random, slot: int) -> Case:
        case = stop_case(rng, [5, 64, 17, 9], tokens=[3, 3, 2, 3], status=[0, 0, 0, PADDING])
        return change(case, pad_slot=slot)

    def wrong_dtypes(rng: Random) -> list[Case]:
        case = stop_case(rng, [5, 17, 20])
        only_64 = ("input_tokens", "input_positions", "slot_mappings[0]", "output_tokens", "stop_token_ids")
        wrong = [(name, "float64") for name in tensors(case)]
        return refuse_dtypes(case, [*wrong, ("status", "int64"), *((name, "int32") for name in only_64)])

    def wrong_shapes(rng: Random) -> list[Case]:
        case = stop_case(rng, [5, 17, 20])
        by_row = [name for name in tensors(case) if name != "stop_token_ids"]
        return [
            *refuse_sizes(case, by_row, (2, 4)),
            refuse(case, stop_token_ids=Cells([[2, 7]])),
            refuse(case, output_tokens=Cells([1, 2, 3])),
            refuse(case, block_sizes=[16, 16]),
            refuse(case, block_sizes=[]),
            refuse(case, block_sizes=[0]),
        ]

    def shared(rng: Random) -> list[Case]:
        case = stop_case(rng, [5, 7, 12])
        two = stop_case(rng, [5, 7, 12], groups=((16, 4), (16, 4)))
        return [
            refuse(case, input_positions=View("input_tokens", (3,))),
            refuse(case, num_generated=View("input_positions", (3,))),
            refuse(case, max_seq_lens=View("seq_lens", (3,))),
            refuse(case, sampled_token_ids=View("input_tokens", (3,), start=1)),
            refuse(case, stop_token_ids=View("output_tokens", (2,), start=4)),
            refuse(case, **{"block_tables[0]": View("status", (3, 1))}),
            refuse(two, **{"slot_mappings[1]": View("slot_mappings[0]", (3,))}),
        ]

    def named(rng: Random) -> list[Case]:
        case = stop_case(rng, [5, 17, 20])
        names = ("status", "output_tokens", "num_generated", "max_seq_lens")
        return [refuse(case, (n,), **{n: resized(case.args[n], 2)}) for n in names]

    return [
        Clause("advances", f"{ADVANCE}; {RECORD}", lambda rng: [stop_case(rng, [5]), stop_case(rng, [5, 17, 20, 40])]),
        Clause("page-boundary", ADVANCE, lambda rng: [stop_case(rng, [14, 15, 16, 31, 32, 0, 63])]),
        Clause("own-row-of-the-table", ADVANCE, lambda rng: [stop_case(rng, [5, 17, 20, 1, 30])]),
        Clause("more-than-48-rows", ADVANCE, lambda rng: [stop_case(rng, [i % 64 for i in range(53)]), many(rng, 53)]),
        Clause("more-than-64x132-rows", ADVANCE, lambda rng: [many(rng, 8451)]),
        Clause(
            "frozen-rows",
            FROZEN,
            lambda rng: [
                stop_case(rng, [5, 6, 7, 8, 9, 10], status=[0, STOPPED, LENGTH, NO_PAGE, PADDING, 0]),
                stop_case(rng, [5] * 4, status=[PADDING] * 4),
            ],
        ),
        Clause(
            "frozen-rows-not-judged",
            FROZEN,
            lambda rng: [
                stop_case(
                    rng,
                    [5, -1, INT32_MAX, 10**6, -(2**31)],
                    tokens=[9, 2, 7, -1, 2],
                    status=[0, STOPPED, LENGTH, NO_PAGE, PADDING],
                    generated=[0, -3, 6, 10**9, -(2**31)],
                )
            ],
        ),
        Clause("stop-token", STOP, lambda rng: [stop_case(rng, [5, 6, 7, 8, 9], tokens=[2, 50_256, 7, 8, 50_257])]),
        Clause("no-stop-tokens", "S may be 0", lambda rng: [stop_case(rng, [5, 6], tokens=[2, 0], stops=[])]),
        Clause(
            "max-seq-len",
            LONGEST,
            lambda rng: [stop_case(rng, [5, 6, 7, 8, 9], most=[8, 8, 8, 8, 8]), stop_case(rng, [15], most=[16])],
        ),
        Clause(
            "output-full",
            "a row of output_tokens that is full counts as LENGTH",
            lambda rng: [
                stop_case(rng, [5, 6, 7, 64], tokens=[9, 9, 2, 9], generated=[5, 6, 6, 6]),
                stop_case(rng, [5, 6], tokens=[9, 2], generated=[0, 0], output=0),
            ],
        ),
        Clause(
            "first-that-holds",
            "the first that holds: stop token, length, no page",
            lambda rng: [
                stop_case(rng, [99, 99, 70, 5], tokens=[2, 9, 9, 9], most=[100, 100, 1000, 1000]),
                stop_case(rng, [64, 64], tokens=[2, 9], most=[1000, 65]),
            ],
        ),
        Clause("int32-length-at-its-end", f"{NOWHERE}; with one, a length that cannot grow is LENGTH", full_length),
        Clause("no-page", f"{NOWHERE}; past the table", lambda rng: [stop_case(rng, [63, 64, 65, 900, 7])]),
        Clause("negative-page", f"{NOWHERE}; a negative id", negative),
        Clause(
            "groups",
            GROUPS,
            lambda rng: [
                stop_case(rng, [5, 17, 31, 32], groups=groups) for groups in (((16, 4), (32, 2)), ((1, 40),) * 3)
            ],
        ),
        Clause(
            "groups-one-without-a-page",
            f"{NOWHERE}; in any of the groups",
            lambda rng: [
                stop_case(rng, [5, 31, 32, 40], groups=((16, 4), (16, 2))),
                stop_case(rng, [5, 31, 32, 40], groups=((16, 2), (16, 4))),
            ],
        ),
        Clause("pad-slot", "pad_slot", lambda rng: [padded(rng, slot) for slot in (-1, 0, 2**31 * 5)]),
        Clause("no-rows", "B may be 0", lambda rng: [stop_case(rng, [])]),
        Clause(
            "slot-past-32-bits",
            SLOT_64,
            lambda rng: [
                stop_case(rng, [3, 300], groups=((256, 2),), pages=[[[2**23, 7], [8, 2**24 + 1]]]),
                stop_case(rng, [3], groups=((128, 1),), pages=[[[2**25 - 1]]]),
            ],
        ),
        Clause(
            "block-sizes",
            "block_size > 0",
            lambda rng: [
                stop_case(rng, [0, size - 1, size], groups=((size, 2),), most=[INT32_MAX] * 3)
                for size in (1, 3, 128, 2**30)
            ],
        ),
        Clause(
            "sampled-column",
            "sampled_token_ids [B] or [B, 1]",
            lambda rng: [stop_case(rng, [5, 17], sampled_column=True)],
        ),
        Clause("sampled-in-place", "sampled_token_ids may be the memory of input_tokens", in_place),
        *(
            Clause(f"{dtype}-{name.replace('_', '-')}", DTYPES, partial(mixed, name, dtype))
            for name, dtype in (
                ("seq_lens", "int64"),
                ("block_tables", "int64"),
                ("max_seq_lens", "int64"),
                ("num_generated", "int32"),
                ("sampled_token_ids", "int32"),
            )
        ),
        Clause(
            "table-strides",
            TABLE_STRIDES,
            lambda rng: [stop_case(rng, [5, 17, 40], table_strides=s) for s in ((7, 1), (1, 5), (13, 3))],
        ),
        Clause(
            "vector-strides",
            VECTOR_STRIDES,
            lambda rng: [stop_case(rng, [5, 17, 40], vector_stride=3)],
        ),
        Clause("refuses-dtypes", f"dtypes. {ERROR}", wrong_dtypes),
        Clause("refuses-shapes", f"shapes, block_sizes. {ERROR}", wrong_shapes),
        Clause("refuses-shared-memory", SHARED_MEMORY, shared),
        Clause(
            "refuses-mixed-devices",
            ONE_DEVICE,
            lambda rng: refuse_device(stop_case(rng, [5, 17, 20]), "max_seq_lens"),
        ),
        Clause("errors-name-the-argument", NAMED, named),
    ]
