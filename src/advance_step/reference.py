"""The operators in plain torch: the specification, the oracle of the tests, and the fallback on any device.

Each ``<operator>_ref`` has its operator's arguments (see `advance_step.ops` for their meaning), writes the same tensors
and returns nothing. None of them reads a value back to the host, so all can be captured in a graph, and none reads or
writes outside a tensor whatever the tensors hold. They check nothing: `_contracts.py` does that before they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum

import torch
from torch import Tensor

PAD_SLOT = -1


class RowStatus(IntEnum):
    """What `advance_until_stop` says of a row; every row that is not RUNNING is frozen."""

    RUNNING = 0
    STOPPED = 1  # sampled a stop token
    LENGTH = 2  # reached max_seq_lens, or its row of output_tokens is full
    NO_PAGE = 3  # its next position has no page; unchanged, so that it can run again once it has one
    PADDING = 4  # no sequence; set by the caller


def slots(positions: Tensor, block_tables: Tensor, block_size: int) -> Tensor:
    """The slot of each position, ``table[row, p // block_size] * block_size + p % block_size``; -1 without a page.

    positions: int64 [rows] or [rows, T]; block_tables: int32 or int64 [rows, W]. Returns int64, shaped as positions.
    """
    if block_tables.size(1) == 0:
        return torch.full_like(positions, PAD_SLOT)
    if positions.dim() == 1:
        return slots(positions[:, None], block_tables, block_size)[:, 0]
    column = positions.div(block_size, rounding_mode="floor")  # [rows, T]
    in_table = (column >= 0) & (column < block_tables.size(1))
    page = block_tables.gather(1, column.clamp(0, block_tables.size(1) - 1)).to(torch.int64)
    return torch.where(in_table & (page >= 0), page * block_size + positions % block_size, PAD_SLOT)


def npu_advance_step_flashattn_ref(
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    num_seqs: int,
    num_queries: int,
    block_size: int,
    *,
    spec_token: Tensor | None = None,
    accepted_num: Tensor | None = None,
) -> None:
    if spec_token is None or accepted_num is None:
        advance_step_flashattn_ref(
            num_seqs,
            num_queries,
            block_size,
            input_tokens,
            sampled_token_ids,
            input_positions,
            seq_lens,
            slot_mapping,
            block_tables,
        )
        return
    shape = sampled_token_ids.shape  # [num_seqs, T]
    tokens, positions = input_tokens.view(shape), input_positions.view(shape)
    accepted = (sampled_token_ids == -1).cumsum(1) == 0  # True up to the first -1
    count = accepted.sum(1, keepdim=True)  # [num_seqs, 1]
    last = sampled_token_ids.gather(1, (count - 1).clamp(min=0))
    tokens[:, :1] = torch.where(count > 0, last, tokens[:, :1])
    tokens[:, 1:] = spec_token
    moved = positions + (1 + accepted_num[:, None])
    overflowed = (moved > positions) != (accepted_num[:, None] >= 0)
    slot = slots(moved, block_tables, block_size)
    positions.copy_(moved)
    seq_lens.view(shape).copy_(moved + 1)
    slot_mapping.view(shape).copy_(torch.where(overflowed, PAD_SLOT, slot))


def advance_step_flashattn_ref(
    num_seqs: int,
    num_queries: int,
    block_size: int,
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
) -> None:
    position = seq_lens[:num_queries].to(torch.int64)
    # A view, so that where the two are the same memory the copy is one of a tensor onto itself.
    input_tokens[:num_queries] = sampled_token_ids if sampled_token_ids.dim() == 1 else sampled_token_ids[:, 0]
    input_positions[:num_queries] = position
    slot = slots(position, block_tables[:num_queries], block_size)
    slot_mapping[:num_queries] = torch.where(position == torch.iinfo(seq_lens.dtype).max, PAD_SLOT, slot)
    seq_lens[:num_queries] += 1  # last: where it is int64, it is `position`
    input_tokens[num_queries:] = 0
    input_positions[num_queries:] = 0
    slot_mapping[num_queries:] = PAD_SLOT


def advance_step_flashinfer_ref(
    num_seqs: int,
    num_queries: int,
    block_size: int,
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    paged_kv_indices: Tensor,
    paged_kv_indptr: Tensor,
    paged_kv_last_page_len: Tensor,
    block_table_bound: Tensor,
) -> None:
    advance_step_flashattn_ref(
        num_seqs,
        num_queries,
        block_size,
        input_tokens,
        sampled_token_ids,
        input_positions,
        seq_lens,
        slot_mapping,
        block_tables,
    )
    position = input_positions[:num_queries]
    bound = pages(position, block_tables.size(1), block_size)
    block_table_bound[:num_queries] = bound
    paged_kv_last_page_len[:num_queries] = position % block_size + 1
    paged_kv_indptr[:1] = 0
    paged_kv_indptr[1 : num_queries + 1] = bound.cumsum(0)
    paged_kv_indptr[num_queries + 1 :] = paged_kv_indptr[num_queries]
    if num_queries == 0 or block_tables.size(1) == 0:
        return
    entry = torch.arange(paged_kv_indices.size(0), device=position.device)
    ends = paged_kv_indptr[1 : num_queries + 1].to(torch.int64)  # [num_queries]
    row = torch.searchsorted(ends, entry, right=True).clamp(max=num_queries - 1)
    column = (entry - (ends - bound)[row]).clamp(0, block_tables.size(1) - 1)
    page = block_tables[row, column].to(torch.int32)
    paged_kv_indices.copy_(torch.where(entry < ends[-1], page, paged_kv_indices))


def pages(position: Tensor, columns: int, block_size: int) -> Tensor:
    """How many pages of its table a sequence uses whose last token is at `position`: 0 to `columns`."""
    return (position.div(block_size, rounding_mode="floor").clamp(max=columns - 1) + 1).clamp(min=0)


def eagle_step_update_slot_mapping_and_metadata_ref(
    positions_1d: Tensor,
    block_table_tensor: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_model_len: int,
    out_clamped_positions: Tensor,
    out_slot_mapping: Tensor,
    input_batch_size: int | None = None,
) -> None:
    batch_size = positions_1d.size(0)
    last_position = min(max_model_len - 1, torch.iinfo(positions_1d.dtype).max)
    longest = min(max_model_len, torch.iinfo(seq_lens.dtype).max)
    exceeds = positions_1d >= last_position
    position = torch.where(exceeds, 0, positions_1d + 1)
    slot = slots(position.to(torch.int64), block_table_tensor[:batch_size], block_size)
    lens = seq_lens[:batch_size]
    lens.copy_(torch.where(exceeds, 1, lens.clamp(max=longest - 1) + 1))
    out_clamped_positions[:batch_size] = position
    out_slot_mapping[:batch_size] = torch.where(exceeds, PAD_SLOT, slot)
    if input_batch_size is not None:
        out_slot_mapping[batch_size:input_batch_size] = PAD_SLOT


def advance_until_stop_ref(
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mappings: Sequence[Tensor],
    block_tables: Sequence[Tensor],
    block_sizes: Sequence[int],
    status: Tensor,
    output_tokens: Tensor,
    num_generated: Tensor,
    stop_token_ids: Tensor,
    max_seq_lens: Tensor,
    *,
    pad_slot: int = PAD_SLOT,
) -> None:
    token = sampled_token_ids.reshape(-1).to(torch.int64)  # [B]
    position = seq_lens.to(torch.int64)
    group_slots = [slots(position, table, size) for table, size in zip(block_tables, block_sizes, strict=True)]

    full = (num_generated < 0) | (num_generated >= output_tokens.size(1))
    stopped = (token[:, None] == stop_token_ids[None, :]).any(1)
    longest = (position >= max_seq_lens) | (position + 1 >= max_seq_lens)
    cannot_grow = seq_lens == torch.iinfo(seq_lens.dtype).max
    no_page = torch.stack([slot == PAD_SLOT for slot in group_slots]).any(0)

    # As plain ints: torch.compile takes a tensor compared with an enum for a constant.
    outcome = torch.where(cannot_grow, int(RowStatus.LENGTH), int(RowStatus.RUNNING))
    outcome = torch.where(no_page, int(RowStatus.NO_PAGE), outcome)
    outcome = torch.where(longest, int(RowStatus.LENGTH), outcome)
    outcome = torch.where(stopped, int(RowStatus.STOPPED), outcome)
    outcome = torch.where(full, int(RowStatus.LENGTH), outcome)
    running = status == int(RowStatus.RUNNING)
    recorded = running & ~full & (outcome != int(RowStatus.NO_PAGE))
    advanced = running & (outcome == int(RowStatus.RUNNING))

    if output_tokens.size(1) > 0:
        place = num_generated.to(torch.int64).clamp(0, output_tokens.size(1) - 1)[:, None]  # [B, 1]
        output_tokens.scatter_(1, place, torch.where(recorded[:, None], token[:, None], output_tokens.gather(1, place)))
    num_generated += recorded
    input_tokens.copy_(torch.where(advanced, token, input_tokens))
    input_positions.copy_(torch.where(advanced, position, input_positions))
    seq_lens += advanced
    for slot_mapping, slot in zip(slot_mappings, group_slots, strict=True):
        slot_mapping.copy_(torch.where(advanced, slot, pad_slot))
    status.copy_(torch.where(running, outcome, status))


def compute_slot_mapping_ref(
    query_start_loc: Tensor,
    positions: Tensor,
    block_table: Tensor,
    slot_mapping: Tensor,
    block_size: int,
    *,
    cp_world_size: int = 1,
    cp_rank: int = 0,
    cp_interleave: int = 1,
    pad_slot: int = PAD_SLOT,
) -> None:
    slot_mapping.fill_(pad_slot)
    num_requests, columns = query_start_loc.size(0) - 1, block_table.size(1)
    num_tokens = min(positions.size(0), slot_mapping.size(0))  # that can be a request's
    if num_requests == 0 or columns == 0:
        return
    token = torch.arange(num_tokens, device=positions.device)
    starts = query_start_loc.to(torch.int64).contiguous()
    request = (torch.searchsorted(starts, token, right=True) - 1).clamp(0, num_requests - 1)
    in_request = (token >= starts[request]) & (token < starts[request + 1])
    position = positions[:num_tokens].to(torch.int64)
    virtual_block_size = block_size * cp_world_size  # tokens of one page on all ranks together
    column = position.div(virtual_block_size, rounding_mode="floor")
    in_table = in_request & (column >= 0) & (column < columns)
    page = block_table[request, column.clamp(0, columns - 1)].to(torch.int64)
    offset = position % virtual_block_size
    run = offset.div(cp_interleave, rounding_mode="floor")  # of cp_interleave tokens, which one rank has
    local_offset = run.div(cp_world_size, rounding_mode="floor") * cp_interleave + offset % cp_interleave
    has_slot = in_table & (page >= 0) & (run % cp_world_size == cp_rank)
    slot_mapping[:num_tokens] = torch.where(has_slot, page * block_size + local_offset, pad_slot)
