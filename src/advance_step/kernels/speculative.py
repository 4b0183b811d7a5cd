"""`npu_advance_step_flashattn` in speculative mode; plain mode is in `plain.py`.

One program advances ROWS rows, each in a lane of its own that walks over the row's T = 1 + S entries. Of a row it reads
the sampled tokens, the proposals, the positions, the accepted number, and for each position one page id; it writes the
T tokens, positions, lengths and slots. A sampled token is read before the token in its place is written.
"""

from __future__ import annotations

import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import (
    jit_by_dtype,
    launch_rows,
    load_rows,
    program_rows,
    same_memory,
    slot_of,
    store_rows,
)
from advance_step.kernels.plain import advance_step_flashattn


@jit_by_dtype
def speculative_kernel(
    input_tokens,
    sampled_token_ids,
    input_positions,
    seq_lens,
    slot_mapping,
    block_tables,
    spec_token,
    accepted_num,
    num_seqs: tl.int64,
    num_entries: tl.int64,  # T
    block_size: tl.int64,
    columns: tl.int64,
    input_tokens_stride_0: tl.int64,
    input_tokens_stride_1: tl.int64,
    sampled_token_ids_stride_0: tl.int64,
    sampled_token_ids_stride_1: tl.int64,
    input_positions_stride_0: tl.int64,
    input_positions_stride_1: tl.int64,
    seq_lens_stride_0: tl.int64,
    seq_lens_stride_1: tl.int64,
    slot_mapping_stride_0: tl.int64,
    slot_mapping_stride_1: tl.int64,
    block_tables_stride_0: tl.int64,
    block_tables_stride_1: tl.int64,
    spec_token_stride_0: tl.int64,
    spec_token_stride_1: tl.int64,
    accepted_num_stride: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
    IN_PLACE: tl.constexpr,  # sampled_token_ids is the memory of input_tokens
):
    row = program_rows(ROWS)
    live = row < num_seqs
    if IN_PLACE:
        sampled_token_ids = input_tokens
    input_tokens += row * input_tokens_stride_0
    sampled_token_ids += row * sampled_token_ids_stride_0
    input_positions += row * input_positions_stride_0
    seq_lens += row * seq_lens_stride_0
    slot_mapping += row * slot_mapping_stride_0
    spec_token += row * spec_token_stride_0

    last = tl.load(sampled_token_ids, mask=live, other=-1)
    has_token = last != -1
    accepted = has_token
    for j in range(1, num_entries):
        token = load_rows(sampled_token_ids + j * sampled_token_ids_stride_1, accepted, live, LANE_MASKS, other=-1)
        accepted = accepted & (token != -1)
        last = tl.where(accepted, token, last)
        proposal = tl.load(spec_token + (j - 1) * spec_token_stride_1, mask=live, other=0)
        tl.store(input_tokens + j * input_tokens_stride_1, proposal, mask=live)
    store_rows(input_tokens, last, has_token, live, LANE_MASKS)

    count = tl.load(accepted_num + row * accepted_num_stride, mask=live, other=0)
    for j in range(0, num_entries):
        before = tl.load(input_positions + j * input_positions_stride_1, mask=live, other=0)
        position = before + (count + 1)
        placed = live & ((position > before) == (count >= 0))  # not where the sum has wrapped
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
        tl.store(input_positions + j * input_positions_stride_1, position, mask=live)
        tl.store(seq_lens + j * seq_lens_stride_1, position + 1, mask=live)
        tl.store(slot_mapping + j * slot_mapping_stride_1, slot, mask=live)


def npu_advance_step_flashattn(
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
        advance_step_flashattn(
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
    num_entries = sampled_token_ids.size(1)  # T
    launch_rows(
        speculative_kernel,
        num_seqs,
        input_tokens,
        sampled_token_ids,
        input_positions,
        seq_lens,
        slot_mapping,
        block_tables,
        spec_token,
        accepted_num,
        num_seqs,
        num_entries,
        block_size,
        block_tables.size(1),
        *matrix_strides(input_tokens, num_entries),
        *sampled_token_ids.stride(),
        *matrix_strides(input_positions, num_entries),
        *matrix_strides(seq_lens, num_entries),
        *matrix_strides(slot_mapping, num_entries),
        *block_tables.stride(),
        *spec_token.stride(),
        accepted_num.stride(0),
        IN_PLACE=same_memory(input_tokens, sampled_token_ids),
    )


def matrix_strides(state: Tensor, columns: int) -> tuple[int, ...]:
    """The strides of `state` seen as [rows, columns], whether it is that or flat, [rows * columns]."""
    return state.stride() if state.dim() == 2 else (columns * state.stride(0), state.stride(0))
