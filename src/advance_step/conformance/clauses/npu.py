"""The clauses of `npu_advance_step_flashattn` alone: what is strict about it, and its speculative mode."""

from __future__ import annotations

from dataclasses import replace
from random import Random
from typing import Any

from advance_step.conformance.case import STATE, Case, Cells, Clause, View
from advance_step.conformance.clauses.common import (
    BAD_VALUE,
    BLOCK_SIZE,
    ERROR,
    NEGATIVE_PAGE,
    SHARED_MEMORY,
    TABLE_STRIDES,
    distinct_pages,
    draw,
    refuse,
    refuse_dtypes,
    refuse_sizes,
)
from advance_step.conformance.clauses.plain import step_case, step_clauses

STRICT = "equality of num_seqs and num_queries, other dtypes, and the wrong shapes are errors here"
LAST = "last = the last sampled token of row i before its first -1; input_tokens[i] = [last, spec_token[i, 0], ...]"
MOVED = "input_positions[i, j] += 1 + accepted_num[i]; seq_lens[i, j] = input_positions[i, j] + 1"
SLOT = "slot_mapping[i, j] = block_tables[i, pos // block_size] * block_size + pos % block_size"


def spec_case(
    rng: Random,
    positions: list[list[int]],
    accepted: list[int],
    sampled: list[list[int]] | None = None,
    flat: bool = False,
    columns: int | None = None,
    block_size: int = BLOCK_SIZE,
    pages: list[list[int]] | None = None,
    table_strides: tuple[int, int] | None = None,
) -> Case:
    """A speculative call whose rows stand at `positions`; by default `accepted` says which sampled tokens are -1."""
    rows, width = len(positions), len(positions[0])
    furthest = max(max(row) + 1 + more for row, more in zip(positions, accepted, strict=True))
    columns = max(2, furthest // block_size + 1) if columns is None else columns
    if sampled is None:
        sampled = [[rng.randrange(1, 9999) if j <= more else -1 for j in range(width)] for more in accepted]

    def state(values: list[list[int]]) -> Cells:
        return Cells([cell for row in values for cell in row] if flat else values)

    def drawn(most: int) -> list[list[int]]:
        return [draw(rng, width, most) for _ in range(rows)]

    return Case(
        "npu",
        {
            "input_tokens": state(drawn(9999)),
            "sampled_token_ids": Cells(sampled),
            "input_positions": state(positions),
            "seq_lens": state(drawn(500)),
            "slot_mapping": state(drawn(9999)),
            "block_tables": Cells(pages or distinct_pages(rng, rows, columns), strides=table_strides),
            "num_seqs": rows,
            "num_queries": rows,
            "block_size": block_size,
            "spec_token": Cells([row[1:] for row in drawn(9999)]),
            "accepted_num": Cells(accepted),
        },
    )


def window(rng: Random, rows: int, width: int, most: int = 60) -> list[list[int]]:
    """Positions of `rows` rows, `width` in succession each."""
    starts = [rng.randrange(most) for _ in range(rows)]
    return [list(range(start, start + width)) for start in starts]


def npu_clauses() -> list[Clause]:
    def spec(rng: Random, rows: int, width: int, **options: Any) -> Case:
        return spec_case(rng, window(rng, rows, width), [rng.randrange(width) for _ in range(rows)], **options)

    def strict(rng: Random) -> list[Case]:
        case, flat = step_case("npu", rng, [3, 17, 20]), step_case("npu", rng, [3, 17, 20], sampled_flat=True)
        return [
            refuse(step_case("npu", rng, [3, 17, 20], pads=0)),
            refuse(case, num_queries=0, sampled_token_ids=Cells([], shape=(0, 1))),
            refuse(flat),
            refuse(step_case("npu", rng, [0, 0], columns=1), block_tables=Cells([[]] * 3, shape=(3, 0))),
        ]

    def half(rng: Random) -> list[Case]:
        case = spec(rng, 3, 4)
        return [
            replace(case, args={name: v for name, v in case.args.items() if name != missing}, refused=True)
            for missing in ("spec_token", "accepted_num")
        ]

    def rejected(rng: Random) -> list[Case]:
        sampled = [[11, 12, 13, 14], [21, -1, -1, -1], [31, 32, -1, -1], [41, -1, 43, 44], [0, 52, 53, -1]]
        return [spec_case(rng, window(rng, 5, 4), [3, 0, 1, 0, 2], sampled)]

    def all_rejected(rng: Random) -> list[Case]:
        sampled = [[11, 12, 13], [21, 22, -1], [-1, -1, -1], [41, -1, -1], [-1, 52, 53]]
        return [spec_case(rng, window(rng, 5, 3), [2, 1, 0, 0, 0], sampled)]

    def past(rng: Random, flat: bool) -> Case:
        starts = [3, 9, 2, 7, 30, 8, 40]  # two columns of 16: position 32 is the first without a page
        return spec_case(rng, [[s, s + 1, s + 2] for s in starts], [0, 1, 2, 0, 1, 1, 0], flat=flat, columns=2)

    def wrapping(rng: Random) -> list[Case]:
        lowest, highest = -(2**63), 2**63 - 1
        rows = [[lowest, 3], [highest, 5], [highest, highest], [4, 5]]
        sampled = [[11, 12], [21, -1], [31, -1], [41, 42]]
        return [spec_case(rng, rows, [lowest, 1, highest, 1], sampled, columns=2)]

    def negative(rng: Random) -> list[Case]:
        pages = distinct_pages(rng, 3, 3)
        pages[1][1], pages[2][0] = -1, -9
        return [spec_case(rng, [[14, 15, 16], [14, 15, 16], [2, 3, 4]], [0, 1, 2], pages=pages)]

    def refused(rng: Random) -> list[Case]:
        case = spec(rng, 3, 4)
        names = (*STATE, "sampled_token_ids", "spec_token", "accepted_num")
        return [
            *refuse_dtypes(case, [(name, "int32") for name in names]),
            *refuse_sizes(case, names, (2, 4)),
            refuse(case, num_queries=2),
            refuse(case, num_seqs=4),
            refuse(case, sampled_token_ids=Cells([[1, 2, 3]] * 3)),
            refuse(case, spec_token=Cells([], shape=(3, 0))),
        ]

    def shared(rng: Random) -> list[Case]:
        case = spec(rng, 3, 4)
        return [
            refuse(case, seq_lens=View("input_positions", (3, 4))),
            refuse(case, slot_mapping=View("seq_lens", (3, 4), start=2)),
            refuse(case, spec_token=View("input_tokens", (3, 3), start=1)),
            refuse(case, accepted_num=View("input_positions", (3,))),
        ]

    return [
        *step_clauses("npu"),
        Clause("strict", STRICT, strict),
        Clause("spec-both-or-none", "one of spec_token and accepted_num without the other is an error", half),
        Clause("spec-rows", f"{MOVED}; [num_seqs, T]", lambda rng: [spec(rng, 4, width) for width in (2, 4, 9)]),
        Clause("spec-flat", f"{MOVED}; flat [num_seqs * T]", lambda rng: [spec(rng, 4, 4, flat=True)]),
        Clause(
            "spec-own-positions",
            MOVED,
            lambda rng: [spec_case(rng, [[40, 7, 22], [0, 90, 3]], [2, 0], flat=flat) for flat in (False, True)],
        ),
        Clause("spec-last-before-rejected", LAST, rejected),
        Clause(
            "spec-all-rejected",
            "a row whose first entry is -1: an error on the CPU; on an accelerator input_tokens[i, 0] stays as it was",
            all_rejected,
        ),
        Clause(
            "spec-page-boundary",
            SLOT,
            lambda rng: [spec_case(rng, [[13, 14, 15], [14, 15, 16], [30, 31, 32], [0, 1, 2]], [0, 1, 2, 2])],
        ),
        Clause("spec-more-than-48-rows", SLOT, lambda rng: [spec(rng, 53, 4), spec(rng, 2113, 4, flat=True)]),
        Clause(
            "spec-narrow-table",
            f"a position past the table. {BAD_VALUE}",
            lambda rng: [past(rng, False), past(rng, True)],
        ),
        Clause("spec-position-past-64-bits", f"a position past the table. {BAD_VALUE}", wrapping),
        Clause("spec-negative-page", NEGATIVE_PAGE, negative),
        Clause(
            "spec-slot-past-32-bits",
            "slot arithmetic is 64-bit everywhere",
            lambda rng: [spec_case(rng, [[3, 4], [126, 127]], [0, 1], pages=[[2**24, 1], [5, 2**26]], block_size=128)],
        ),
        Clause(
            "spec-table-strides",
            TABLE_STRIDES,
            lambda rng: [
                spec_case(rng, window(rng, 4, 3, 20), [0, 1, 2, 0], columns=2, table_strides=strides)
                for strides in ((7, 1), (1, 6))
            ],
        ),
        Clause("spec-refuses", f"num_queries == num_seqs, dtypes, shapes. {ERROR}", refused),
        Clause("spec-refuses-shared-memory", SHARED_MEMORY, shared),
    ]
