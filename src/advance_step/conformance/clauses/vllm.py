"""The clauses of `advance_step_flashattn` and `advance_step_flashinfer`: what engines really hold, page metadata."""

from __future__ import annotations

from random import Random
from typing import Any

from advance_step.conformance.case import METADATA, Case, Cells, Clause, View
from advance_step.conformance.clauses.common import (
    BAD_VALUE,
    BLOCK_SIZE,
    ERROR,
    NAMED,
    change,
    recast,
    refuse,
    refuse_dtypes,
    resized,
    vector,
)
from advance_step.conformance.clauses.plain import drawn_lengths, step_case, step_clauses
from advance_step.conformance.oracle import INT32_MAX

DTYPES = "seq_lens, block_tables (and sampled_token_ids) int32 or int64 independently, without a copy"
BOUND = "bound[i] = ceil(seq_lens[i] / block_size) (after the step); last_page_len[i] = p % block_size + 1"
INDICES = "indices[indptr[i] : indptr[i + 1]] = block_tables[i, : bound[i]]"


def vllm_clauses(contract: str = "vllm") -> list[Clause]:
    def mixed(rng: Random, **dtypes: Any) -> Case:
        return step_case(contract, rng, [5, 17, 33, 15], **dtypes)

    def full_length(rng: Random) -> list[Case]:
        return [step_case(contract, rng, [3, 7, INT32_MAX, INT32_MAX], block_size=2**31, columns=2)]

    def empty(rng: Random) -> list[Case]:
        case = step_case(contract, rng, [], pads=0)
        return [change(case, block_tables=Cells([], "int32", shape=(0, width))) for width in (0, 4)]

    return [
        *step_clauses(contract),
        Clause("no-padding", "num_queries may equal num_seqs", lambda rng: [step_case(contract, rng, [5, 17], pads=0)]),
        Clause("no-live-rows", "num_queries may be 0", lambda rng: [step_case(contract, rng, [], pads=3)]),
        Clause("no-rows", "num_seqs may be 0", empty),
        Clause(
            "sampled-flat",
            "sampled_token_ids [num_queries] or [num_queries, 1]",
            lambda rng: [step_case(contract, rng, [5, 17, 20], sampled_flat=True)],
        ),
        Clause("int64-lengths", DTYPES, lambda rng: [mixed(rng, lens_dtype="int64")]),
        Clause("int64-table", DTYPES, lambda rng: [mixed(rng, table_dtype="int64")]),
        Clause("int32-samples", DTYPES, lambda rng: [mixed(rng, sampled_dtype="int32")]),
        Clause(
            "dtype-mixes",
            DTYPES,
            lambda rng: [
                mixed(rng, lens_dtype=a, table_dtype=b, sampled_dtype=c)
                for a in ("int32", "int64")
                for b in ("int32", "int64")
                for c in ("int32", "int64")
            ],
        ),
        Clause("int32-length-at-its-end", f"a length that cannot be advanced. {BAD_VALUE}", full_length),
    ]


def flashinfer_clauses() -> list[Clause]:
    def step(rng: Random, seq_lens: list[int], pads: int = 1) -> Case:
        return step_case("flashinfer", rng, seq_lens, pads)

    def indices(case: Case, size_over_use: int) -> Case:
        """`case` with paged_kv_indices so much larger than what is used; smaller if negative."""
        used = len(case.args["paged_kv_indices"].values) - 7
        return change(case, paged_kv_indices=vector(list(range(used + size_over_use)), "int32"))

    def small(rng: Random) -> list[Case]:
        return [indices(step(rng, [5, 40, 17]), -missing) for missing in (1, 4)]

    def refused(rng: Random) -> list[Case]:
        case = step(rng, [5, 40, 17])
        sized = ("paged_kv_indptr", "paged_kv_last_page_len", "block_table_bound")
        return [
            *refuse_dtypes(case, [(name, "int64") for name in METADATA]),
            *(
                refuse(case, **{name: resized(case.args[name], len(case.args[name].values) + by)})
                for name in sized
                for by in (-1, 1)
            ),
            refuse(case, block_table_bound=View("paged_kv_last_page_len", (4,))),
            refuse(case, paged_kv_last_page_len=View("seq_lens", (4,))),
            refuse(case, paged_kv_indices=View("block_tables", (11,), start=1)),
        ]

    def named(rng: Random) -> list[Case]:
        case = step(rng, [5, 40, 17])
        return [refuse(case, (n,), **{n: recast(case.args[n], "int64")}) for n in METADATA]

    return [
        *vllm_clauses("flashinfer"),
        Clause("page-metadata", f"{BOUND}; {INDICES}", lambda rng: [step(rng, [5, 40, 17, 0, 70]), step(rng, [3])]),
        Clause(
            "metadata-page-boundary",
            BOUND,
            lambda rng: [step(rng, [n * BLOCK_SIZE + by for n in (1, 2) for by in (-2, -1, 0)])],
        ),
        Clause(
            "padding-indptr",
            "indptr[r + 1] = indptr[num_queries] for padding rows r",
            lambda rng: [step(rng, [5, 40], pads=70), step(rng, [], pads=5)],
        ),
        Clause(
            "metadata-of-many-rows",
            "indptr[0] = 0; indptr[i + 1] = indptr[i] + bound[i]",
            lambda rng: [step(rng, drawn_lengths(rng, rows, 100)) for rows in (129, 1025, 2113)],
        ),
        Clause(
            "indices-beyond-use",
            f"{INDICES}, and no cell more",
            lambda rng: [indices(step(rng, [5, 40, 17]), over) for over in (0, 1, 500)],
        ),
        Clause("indices-too-small", "an error (never a write past the end) when paged_kv_indices is too small", small),
        Clause("refuses-metadata", f"dtypes, shapes, shared memory of the metadata. {ERROR}", refused),
        Clause("errors-name-the-metadata", NAMED, named),
    ]
