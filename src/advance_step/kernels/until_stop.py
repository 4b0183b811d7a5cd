"""`advance_until_stop`: one launch for one KV group, two more for each further group.

`until_stop_kernel` decides and advances. One program has ROWS rows. Of a running row it reads the sampled token, the
length, its limit, the number of tokens generated, the stop tokens, and one page id of the first group's block table; it
writes all that the operator writes, but for the further groups' slots. Of a frozen row it reads the status and writes
the slot.

A row advances only where every group has a page for it, so each further group's `find_slots_kernel` runs before: it
reads status, length and one page id of its own table, writes its slot, and leaves in the first group's slots, which are
still to be written, whether one of the groups so far has no page (-1) or all have (0). `keep_slots_kernel` runs after:
it reads the status, and writes the pad slot where the row did not advance. (One kernel for all groups would take their
tensors as tuples, and Triton specialises what lies in a tuple on values and alignment.)
"""

from __future__ import annotations

from collections.abc import Sequence

import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import (
    jit_by_dtype,
    largest,
    launch_rows,
    load_rows,
    program_rows,
    same_memory,
    slot_of,
    store_rows,
)
from advance_step.reference import PAD_SLOT, RowStatus

RUNNING = tl.constexpr(int(RowStatus.RUNNING))
STOPPED = tl.constexpr(int(RowStatus.STOPPED))
LENGTH = tl.constexpr(int(RowStatus.LENGTH))
NO_PAGE = tl.constexpr(int(RowStatus.NO_PAGE))


@jit_by_dtype
def until_stop_kernel(
    input_tokens,
    sampled_token_ids,
    input_positions,
    seq_lens,
    slot_mapping,
    block_tables,
    status,
    output_tokens,
    num_generated,
    stop_token_ids,
    max_seq_lens,
    num_rows: tl.int64,  # B
    num_checked: tl.int64,  # rows of which slot_mapping says whether the further groups have a page: all or none
    block_size: tl.int64,
    columns: tl.int64,
    output_columns: tl.int64,  # M
    num_stop_tokens: tl.int64,  # S
    pad_slot: tl.int64,
    input_tokens_stride: tl.int64,
    sampled_token_ids_stride: tl.int64,
    input_positions_stride: tl.int64,
    seq_lens_stride: tl.int64,
    slot_mapping_stride: tl.int64,
    block_tables_stride_0: tl.int64,
    block_tables_stride_1: tl.int64,
    status_stride: tl.int64,
    output_tokens_stride_0: tl.int64,
    output_tokens_stride_1: tl.int64,
    num_generated_stride: tl.int64,
    stop_token_ids_stride: tl.int64,
    max_seq_lens_stride: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
    IN_PLACE: tl.constexpr,  # sampled_token_ids is the memory of input_tokens
):
    row = program_rows(ROWS)
    in_batch = row < num_rows
    if IN_PLACE:
        sampled_token_ids = input_tokens
    sampled_token_ids += row * sampled_token_ids_stride
    seq_lens += row * seq_lens_stride
    slot_mapping += row * slot_mapping_stride
    status += row * status_stride
    num_generated += row * num_generated_stride
    running = in_batch & (tl.load(status, mask=in_batch, other=NO_PAGE) == RUNNING)
    token = load_rows(sampled_token_ids, running, in_batch, LANE_MASKS).to(tl.int64)
    position = load_rows(seq_lens, running, in_batch, LANE_MASKS).to(tl.int64)
    longest = load_rows(max_seq_lens + row * max_seq_lens_stride, running, in_batch, LANE_MASKS).to(tl.int64)
    generated = load_rows(num_generated, running, in_batch, LANE_MASKS).to(tl.int64)

    slot = slot_of(
        row,
        position,
        running,
        block_tables,
        columns,
        block_tables_stride_0,
        block_tables_stride_1,
        block_size,
        LANE_MASKS,
    )
    checked = load_rows(slot_mapping, running, row < num_checked, LANE_MASKS)
    full = (generated < 0) | (generated >= output_columns)
    stopped = tl.zeros((ROWS,), tl.int1)
    for s in range(0, num_stop_tokens):
        stopped = stopped | (token == tl.load(stop_token_ids + s * stop_token_ids_stride))

    outcome = tl.where(position < largest(seq_lens), RUNNING, LENGTH)
    outcome = tl.where((slot == -1) | (checked == -1), NO_PAGE, outcome)
    outcome = tl.where((position >= longest) | (position + 1 >= longest), LENGTH, outcome)
    outcome = tl.where(stopped, STOPPED, outcome)
    outcome = tl.where(full, LENGTH, outcome)
    recorded = running & (full == 0) & (outcome != NO_PAGE)
    advanced = running & (outcome == RUNNING)

    place = row * output_tokens_stride_0 + generated * output_tokens_stride_1
    tl.store(output_tokens + place, token, mask=recorded)  # a scatter: it keeps its mask everywhere
    store_rows(num_generated, generated + 1, recorded, in_batch, LANE_MASKS)
    store_rows(input_tokens + row * input_tokens_stride, token, advanced, in_batch, LANE_MASKS)
    store_rows(input_positions + row * input_positions_stride, position, advanced, in_batch, LANE_MASKS)
    store_rows(seq_lens, position + 1, advanced, in_batch, LANE_MASKS)
    tl.store(slot_mapping, tl.where(advanced, slot, pad_slot), mask=in_batch)
    store_rows(status, outcome, running, in_batch, LANE_MASKS)


@jit_by_dtype
def find_slots_kernel(
    seq_lens,
    slot_mapping,
    block_tables,
    status,
    first_slot_mapping,
    num_rows: tl.int64,
    num_checked: tl.int64,  # rows of which first_slot_mapping says whether the groups before have a page: all or none
    block_size: tl.int64,
    columns: tl.int64,
    seq_lens_stride: tl.int64,
    slot_mapping_stride: tl.int64,
    block_tables_stride_0: tl.int64,
    block_tables_stride_1: tl.int64,
    status_stride: tl.int64,
    first_slot_mapping_stride: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
):
    row = program_rows(ROWS)
    in_batch = row < num_rows
    running = in_batch & (tl.load(status + row * status_stride, mask=in_batch, other=NO_PAGE) == RUNNING)
    position = load_rows(seq_lens + row * seq_lens_stride, running, in_batch, LANE_MASKS).to(tl.int64)
    slot = slot_of(
        row,
        position,
        running,
        block_tables,
        columns,
        block_tables_stride_0,
        block_tables_stride_1,
        block_size,
        LANE_MASKS,
    )
    first_slot_mapping += row * first_slot_mapping_stride
    checked = load_rows(first_slot_mapping, running, row < num_checked, LANE_MASKS)
    store_rows(first_slot_mapping, tl.where(slot == -1, -1, checked), running, in_batch, LANE_MASKS)
    store_rows(slot_mapping + row * slot_mapping_stride, slot, running, in_batch, LANE_MASKS)


@jit_by_dtype
def keep_slots_kernel(
    slot_mapping,
    status,
    num_rows: tl.int64,
    pad_slot: tl.int64,
    slot_mapping_stride: tl.int64,
    status_stride: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
):
    row = program_rows(ROWS)
    in_batch = row < num_rows
    # Of the rows that were running, those that advanced are running still.
    frozen = tl.load(status + row * status_stride, mask=in_batch, other=RUNNING) != RUNNING
    store_rows(slot_mapping + row * slot_mapping_stride, pad_slot, frozen, in_batch, LANE_MASKS)


def advance_until_stop(
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
    num_rows = status.size(0)
    first, *further = slot_mappings
    for group, slot_mapping in enumerate(further, 1):
        launch_rows(
            find_slots_kernel,
            num_rows,
            seq_lens,
            slot_mapping,
            block_tables[group],
            status,
            first,
            num_rows,
            num_rows if group > 1 else 0,
            block_sizes[group],
            block_tables[group].size(1),
            seq_lens.stride(0),
            slot_mapping.stride(0),
            *block_tables[group].stride(),
            status.stride(0),
            first.stride(0),
        )
    launch_rows(
        until_stop_kernel,
        num_rows,
        input_tokens,
        sampled_token_ids,
        input_positions,
        seq_lens,
        first,
        block_tables[0],
        status,
        output_tokens,
        num_generated,
        stop_token_ids,
        max_seq_lens,
        num_rows,
        num_rows if further else 0,
        block_sizes[0],
        block_tables[0].size(1),
        output_tokens.size(1),
        stop_token_ids.size(0),
        pad_slot,
        input_tokens.stride(0),
        sampled_token_ids.stride(0),
        input_positions.stride(0),
        seq_lens.stride(0),
        first.stride(0),
        *block_tables[0].stride(),
        status.stride(0),
        *output_tokens.stride(),
        num_generated.stride(0),
        stop_token_ids.stride(0),
        max_seq_lens.stride(0),
        IN_PLACE=same_memory(input_tokens, sampled_token_ids),
    )
    for slot_mapping in further:
        launch_rows(
            keep_slots_kernel,
            num_rows,
            slot_mapping,
            status,
            num_rows,
            pad_slot,
            slot_mapping.stride(0),
            status.stride(0),
        )
