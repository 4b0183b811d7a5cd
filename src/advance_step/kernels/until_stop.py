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

import triton
import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import ROWS, jit_by_dtype, launch, program_rows, slot_of
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
):
    row = program_rows()
    in_batch = row < num_rows
    running = in_batch & (tl.load(status + row * status_stride, mask=in_batch, other=NO_PAGE) == RUNNING)
    token = tl.load(sampled_token_ids + row * sampled_token_ids_stride, mask=running, other=0).to(tl.int64)
    position = tl.load(seq_lens + row * seq_lens_stride, mask=running, other=0).to(tl.int64)
    longest = tl.load(max_seq_lens + row * max_seq_lens_stride, mask=running, other=0).to(tl.int64)
    generated = tl.load(num_generated + row * num_generated_stride, mask=running, other=0).to(tl.int64)

    slot = slot_of(
        row, position, running, block_tables, columns, block_tables_stride_0, block_tables_stride_1, block_size
    )
    checked = tl.load(slot_mapping + row * slot_mapping_stride, mask=running & (row < num_checked), other=0)
    length = (position + 1).to(seq_lens.dtype.element_ty)  # wraps after the longest that the dtype holds
    full = (generated < 0) | (generated >= output_columns)
    stopped = tl.zeros((ROWS,), tl.int1)
    for s in range(0, num_stop_tokens):
        stopped = stopped | (token == tl.load(stop_token_ids + s * stop_token_ids_stride))

    outcome = tl.where(length.to(tl.int64) <= position, LENGTH, RUNNING)
    outcome = tl.where((slot == -1) | (checked == -1), NO_PAGE, outcome)
    outcome = tl.where((position >= longest) | (position + 1 >= longest), LENGTH, outcome)
    outcome = tl.where(stopped, STOPPED, outcome)
    outcome = tl.where(full, LENGTH, outcome)
    recorded = running & (full == 0) & (outcome != NO_PAGE)
    advanced = running & (outcome == RUNNING)

    place = row * output_tokens_stride_0 + generated * output_tokens_stride_1
    tl.store(output_tokens + place, token, mask=recorded)
    generated = (generated + 1).to(num_generated.dtype.element_ty)
    tl.store(num_generated + row * num_generated_stride, generated, mask=recorded)
    tl.store(input_tokens + row * input_tokens_stride, token, mask=advanced)
    tl.store(input_positions + row * input_positions_stride, position, mask=advanced)
    tl.store(seq_lens + row * seq_lens_stride, length, mask=advanced)
    tl.store(slot_mapping + row * slot_mapping_stride, tl.where(advanced, slot, pad_slot), mask=in_batch)
    tl.store(status + row * status_stride, outcome, mask=running)


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
):
    row = program_rows()
    in_batch = row < num_rows
    running = in_batch & (tl.load(status + row * status_stride, mask=in_batch, other=NO_PAGE) == RUNNING)
    position = tl.load(seq_lens + row * seq_lens_stride, mask=running, other=0).to(tl.int64)
    slot = slot_of(
        row, position, running, block_tables, columns, block_tables_stride_0, block_tables_stride_1, block_size
    )
    first_slot_mapping += row * first_slot_mapping_stride
    checked = tl.load(first_slot_mapping, mask=running & (row < num_checked), other=0)
    tl.store(first_slot_mapping, tl.where(slot == -1, -1, checked), mask=running)
    tl.store(slot_mapping + row * slot_mapping_stride, slot, mask=running)


@jit_by_dtype
def keep_slots_kernel(
    slot_mapping,
    status,
    num_rows: tl.int64,
    pad_slot: tl.int64,
    slot_mapping_stride: tl.int64,
    status_stride: tl.int64,
):
    row = program_rows()
    in_batch = row < num_rows
    # Of the rows that were running, those that advanced are running still.
    frozen = tl.load(status + row * status_stride, mask=in_batch, other=RUNNING) != RUNNING
    tl.store(slot_mapping + row * slot_mapping_stride, pad_slot, mask=frozen)


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
    grid = (triton.cdiv(num_rows, ROWS.value),)
    first, *further = slot_mappings
    for group, slot_mapping in enumerate(further, 1):
        launch(
            find_slots_kernel,
            grid,
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
    launch(
        until_stop_kernel,
        grid,
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
    )
    for slot_mapping in further:
        launch(
            keep_slots_kernel,
            grid,
            slot_mapping,
            status,
            num_rows,
            pad_slot,
            slot_mapping.stride(0),
            status.stride(0),
        )
