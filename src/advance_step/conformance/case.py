"""A call as data: what each contract is called with, and the tensors that a clause asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from advance_step.conformance import oracle


@dataclass(frozen=True)
class Contract:
    """How a contract is called, and its rule. The order binds, not the names: a target may call them as it likes."""

    operator: str  # ours, in `advance_step`
    positional: tuple[str, ...]
    rule: Callable[..., oracle.Outcome]
    rows: tuple[str, ...]  # the arguments that are written row by row
    slots: tuple[str, ...]  # those of them that are all that a padding row has written
    table: str
    keyword: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cells:
    """A tensor to be made; `shape` where the lists cannot say it (no rows), `strides` where it is not contiguous."""

    values: list[Any]
    dtype: str = "int64"
    shape: tuple[int, ...] | None = None
    strides: tuple[int, ...] | None = None
    device: str | None = None  # other than that of the call


@dataclass(frozen=True)
class View:
    """A tensor in the memory of argument `of`, from its cell `start` on."""

    of: str
    shape: tuple[int, ...]
    start: int = 0


@dataclass(frozen=True)
class Case:
    """One call. A list of tensors is given as name[0], name[1], ...; an optional argument may be missing.

    `refused`: the shapes, dtypes, devices, scalars or shared memory are at fault, and, if `names` is not empty, the
    error names one of these arguments.
    """

    contract: str
    args: dict[str, Any]  # int, None, list of int, Cells, View
    refused: bool = False
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Clause:
    """A sentence of a contract and the calls that hold a target to it, made from a seed."""

    name: str
    sentence: str
    cases: Callable[[Any], list[Case]]  # of a random.Random


STATE = ("input_tokens", "input_positions", "seq_lens", "slot_mapping")
SCALARS = ("num_seqs", "num_queries", "block_size")
STEP = ("input_tokens", "sampled_token_ids", "input_positions", "seq_lens", "slot_mapping", "block_tables")
METADATA = ("paged_kv_indices", "paged_kv_indptr", "paged_kv_last_page_len", "block_table_bound")

CONTRACTS = {
    "npu": Contract(
        "npu_advance_step_flashattn",
        (*STEP, *SCALARS),
        oracle.npu_step,
        rows=STATE,
        slots=("input_tokens", "input_positions", "slot_mapping"),
        table="block_tables",
        keyword=("spec_token", "accepted_num"),
    ),
    "vllm": Contract(
        "advance_step_flashattn",
        (*SCALARS, *STEP),
        oracle.step,
        rows=STATE,
        slots=("input_tokens", "input_positions", "slot_mapping"),
        table="block_tables",
    ),
    "flashinfer": Contract(
        "advance_step_flashinfer",
        (*SCALARS, *STEP, *METADATA),
        oracle.flashinfer_step,
        rows=STATE,
        slots=("input_tokens", "input_positions", "slot_mapping"),
        table="block_tables",
    ),
    "eagle": Contract(
        "eagle_step_update_slot_mapping_and_metadata",
        (
            *("positions_1d", "block_table_tensor", "seq_lens", "block_size", "max_model_len"),
            *("out_clamped_positions", "out_slot_mapping", "input_batch_size"),
        ),
        oracle.eagle_step,
        rows=("out_clamped_positions", "seq_lens", "out_slot_mapping"),
        slots=("out_slot_mapping",),
        table="block_table_tensor",
    ),
    "until-stop": Contract(
        "advance_until_stop",
        (
            *(*STEP[:4], "slot_mappings", "block_tables", "block_sizes"),
            *("status", "output_tokens", "num_generated", "stop_token_ids", "max_seq_lens"),
        ),
        oracle.until_stop,
        rows=(*STATE[:3], "status", "output_tokens", "num_generated", "slot_mappings[0]"),
        slots=(),
        table="block_tables[0]",
        keyword=("pad_slot",),
    ),
    "slot-mapping": Contract(
        "compute_slot_mapping",
        ("query_start_loc", "positions", "block_table", "slot_mapping", "block_size"),
        oracle.slot_mapping,
        rows=("slot_mapping",),
        slots=("slot_mapping",),
        table="block_table",
        keyword=("cp_world_size", "cp_rank", "cp_interleave", "pad_slot"),
    ),
}


def gather(args: dict[str, Any]) -> dict[str, Any]:
    """`args` with name[0], name[1], ... as one list under `name`."""
    gathered: dict[str, Any] = {}
    for name, value in args.items():
        stem, bracket, _ = name.partition("[")
        if bracket:
            gathered.setdefault(stem, []).append(value)
        else:
            gathered[name] = value
    return gathered
