"""One good call of each operator, of any number of rows, as a dict of fresh arguments by name; tests change theirs."""

from __future__ import annotations

from typing import Any

import torch

import advance_step

INT64 = torch.int64


def plain(rows: int = 8, live: int | None = None, pages: int = 4, block_size: int = 16) -> dict[str, Any]:
    live = rows * 5 // 8 if live is None else live
    return {
        "num_seqs": rows,
        "num_queries": live,
        "block_size": block_size,
        "input_tokens": torch.arange(rows) + 1000,
        "sampled_token_ids": torch.arange(live)[:, None] + 2000,
        "input_positions": torch.arange(rows) + 3000,
        "seq_lens": torch.arange(rows) % 6 * 9 + 3,
        "slot_mapping": torch.arange(rows) + 4000,
        "block_tables": torch.arange(rows * pages).reshape(rows, pages) + 50,
    }


def speculative(rows: int = 4, proposals: int = 2) -> dict[str, Any]:
    width = 1 + proposals
    positions = torch.arange(rows)[:, None] % 6 * 7 + torch.arange(width)
    return plain(rows, rows) | {
        "input_tokens": torch.arange(rows * width).reshape(rows, width) + 1000,
        "sampled_token_ids": torch.tensor([[7, 8, 9], [7, 8, -1], [7, -1, -1], [7, -1, 9]]).repeat(rows, 1)[:rows],
        "input_positions": positions,
        "seq_lens": positions + 1,
        "slot_mapping": torch.arange(rows * width).reshape(rows, width) + 4000,
        "spec_token": torch.arange(rows * proposals).reshape(rows, proposals) + 5000,
        "accepted_num": torch.tensor([2, 1, 0, 0]).repeat(rows)[:rows],
    }


def flashinfer(rows: int = 8) -> dict[str, Any]:
    return plain(rows) | {
        "paged_kv_indices": torch.zeros(rows * 4, dtype=torch.int32),
        "paged_kv_indptr": torch.zeros(rows + 1, dtype=torch.int32),
        "paged_kv_last_page_len": torch.zeros(rows, dtype=torch.int32),
        "block_table_bound": torch.zeros(rows, dtype=torch.int32),
    }


def eagle(rows: int = 5) -> dict[str, Any]:
    return {
        "positions_1d": torch.arange(rows) * 9,
        "block_table_tensor": torch.arange(rows * 4, dtype=torch.int32).reshape(rows, 4) + 50,
        "seq_lens": torch.arange(rows, dtype=torch.int32) * 9 + 1,
        "block_size": 16,
        "max_model_len": 30,
        "out_clamped_positions": torch.zeros(rows, dtype=INT64),
        "out_slot_mapping": torch.zeros(rows + 3, dtype=INT64),
        "input_batch_size": rows + 2,
    }


def until_stop(rows: int = 6) -> dict[str, Any]:
    return {
        "input_tokens": torch.arange(rows) + 1000,
        "sampled_token_ids": torch.arange(rows) + 2000,
        "input_positions": torch.arange(rows) + 3000,
        "seq_lens": torch.arange(rows, dtype=torch.int32) * 9 + 3,
        "slot_mappings": [torch.arange(rows) + 4000, torch.arange(rows) + 4500],
        "block_tables": [torch.arange(rows * 4).reshape(rows, 4), torch.arange(rows * 2).reshape(rows, 2)],
        "block_sizes": [16, 32],
        "status": torch.tensor([0, 0, 0, 4, 0, 0], dtype=torch.int32).repeat(rows)[:rows],
        "output_tokens": torch.zeros(rows, 8, dtype=INT64),
        "num_generated": torch.arange(rows),
        "stop_token_ids": torch.tensor([2001, 9]),
        "max_seq_lens": torch.full((rows,), 40, dtype=torch.int32),
    }


def slot_mapping(rows: int = 4) -> dict[str, Any]:
    """Requests of 3, 0, 20 and 1 tokens (and again); 4 entries that pad the batch; positions and rows of no request."""
    counts = ([3, 0, 20, 1] * rows)[:rows]
    spans = [torch.arange(3), torch.arange(0), torch.arange(14, 34), torch.tensor([63])] * rows
    return {
        "query_start_loc": torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32),
        "positions": torch.cat([*spans[:rows], torch.full((6,), 999)]),
        "block_table": torch.arange((rows + 4) * 4).reshape(rows + 4, 4) + 50,
        "slot_mapping": torch.arange(sum(counts) + 4) + 4000,
        "block_size": 16,
    }


CALLS = {
    "npu_advance_step_flashattn": plain,
    "npu_advance_step_flashattn (speculative)": speculative,
    "advance_step_flashattn": plain,
    "advance_step_flashinfer": flashinfer,
    "eagle_step_update_slot_mapping_and_metadata": eagle,
    "advance_until_stop": until_stop,
    "compute_slot_mapping": slot_mapping,
}


def name_of(call: str) -> str:
    return call.split(" ")[0]


def function(call: str) -> Any:
    return getattr(advance_step, name_of(call))


def operator(call: str) -> Any:
    return getattr(torch.ops.advance_step, name_of(call)).default


def tensors(arguments: dict[str, Any], kind: type = torch.Tensor) -> list[Any]:
    """Every tensor (or what else is of `kind`) of a call, those in lists too."""
    flat = [item for value in arguments.values() for item in (value if isinstance(value, list) else [value])]
    return [item for item in flat if isinstance(item, kind)]
