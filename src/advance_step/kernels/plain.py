"""`advance_step_flashattn`, and `npu_advance_step_flashattn` in plain mode.

One program advances ROWS rows. Of a live row it reads the sampled token, the length, and the one page id of the block
table that the length points to; it writes token, position, length and slot. Of a padding row it reads nothing and
writes token, position and slot.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import jit_by_dtype, largest, launch_rows, program_rows, same_memory, slot_of


@triton.jit
def advance_rows(
    row,
    input_tokens,
    sampled_token_ids,
    input_positions,
    seq_lens,
    slot_mapping,
    block_tables,
    num_seqs,
    num_queries,
    block_size,
    columns,
    input_tokens_stride,
    sampled_token_ids_stride,
    input_positions_stride,
    seq_lens_stride,
    slot_mapping_stride,
    block_tables_stride_0,
    block_tables_stride_1,
    LANE_MASKS: tl.constexpr,
    IN_PLACE: tl.constexpr,  # sampled_token_ids is the memory of input_tokens
):
    """Advances the rows `row` (int64, any tile); rows from num_seqs on are left alone."""
    live = row < num_queries
    in_batch = row < num_seqs
    if IN_PLACE:
        sampled_token_ids = input_tokens
    # What masked rows get here is what padding rows are to hold: token 0, position 0, slot -1.
    token = tl.load(sampled_token_ids + row * sampled_token_ids_stride, mask=live, other=0).to(tl.int64)
    position = tl.load(seq_lens + row * seq_lens_stride, mask=live, other=0).to(tl.int64)
    length = (position + 1).to(seq_lens.dtype.element_ty)  # wraps after the longest that the dtype holds
    placed = live & (position < largest(seq_lens))
    slot = slot_of(
        row,
        position,
        placed,
        block_tables,
        columns,
        block_tables_stride_0,
        block_tables_stride_1,
        block_size,
        LANE_MASKS,
    )
    tl.store(input_tokens + row * input_tokens_stride, token, mask=in_batch)
    tl.store(input_positions + row * input_positions_stride, position, mask=in_batch)
    tl.store(seq_lens + row * seq_lens_stride, length, mask=live)
    tl.store(slot_mapping + row * slot_mapping_stride, slot, mask=in_batch)


@jit_by_dtype
def plain_kernel(
    input_tokens,
    sampled_token_ids,
    input_positions,
    seq_lens,
    slot_mapping,
    block_tables,
    num_seqs: tl.int64,
    num_queries: tl.int64,
    block_size: tl.int64,
    columns: tl.int64,
    input_tokens_stride: tl.int64,
    sampled_token_ids_stride: tl.int64,
    input_positions_stride: tl.int64,
    seq_lens_stride: tl.int64,
    slot_mapping_stride: tl.int64,
    block_tables_stride_0: tl.int64,
    block_tables_stride_1: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    advance_rows(
        program_rows(ROWS),
        input_tokens,
        sampled_token_ids,
        input_positions,
        seq_lens,
        slot_mapping,
        block_tables,
        num_seqs,
        num_queries,
        block_size,
        columns,
        input_tokens_stride,
        sampled_token_ids_stride,
        input_positions_stride,
        seq_lens_stride,
        slot_mapping_stride,
        block_tables_stride_0,
        block_tables_stride_1,
        LANE_MASKS,
        IN_PLACE,
    )


def advance_step_flashattn(
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
    launch_rows(
        plain_kernel,
        num_seqs,
        input_tokens,
        sampled_token_ids,
        input_positions,
        seq_lens,
        slot_mapping,
        block_tables,
        num_seqs,
        num_queries,
        block_size,
        block_tables.size(1),
        input_tokens.stride(0),
        sampled_token_ids.stride(0),
        input_positions.stride(0),
        seq_lens.stride(0),
        slot_mapping.stride(0),
        *block_tables.stride(),
        IN_PLACE=same_memory(input_tokens, sampled_token_ids),
    )
