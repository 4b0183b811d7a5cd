"""`eagle_step_update_slot_mapping_and_metadata`.

One program advances ROWS rows. Of a row it reads position, length, and the one page id of the block table that the next
position points to; it writes position, length and slot. Of a row that pads the batch it writes the slot, -1.
"""

from __future__ import annotations

import torch
import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import jit_by_dtype, launch_rows, program_rows, same_memory, slot_of


@jit_by_dtype
def eagle_kernel(
    positions_1d,
    block_table_tensor,
    seq_lens,
    out_clamped_positions,
    out_slot_mapping,
    batch_size: tl.int64,
    input_batch_size: tl.int64,
    block_size: tl.int64,
    last_position: tl.int64,
    longest: tl.int64,
    columns: tl.int64,
    positions_1d_stride: tl.int64,
    block_table_tensor_stride_0: tl.int64,
    block_table_tensor_stride_1: tl.int64,
    seq_lens_stride: tl.int64,
    out_clamped_positions_stride: tl.int64,
    out_slot_mapping_stride: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
    IN_PLACE: tl.constexpr,  # positions_1d is the memory of out_clamped_positions
):
    row = program_rows(ROWS)
    live = row < batch_size
    if IN_PLACE:
        positions_1d = out_clamped_positions
    position = tl.load(positions_1d + row * positions_1d_stride, mask=live, other=0).to(tl.int64)
    length = tl.load(seq_lens + row * seq_lens_stride, mask=live, other=0).to(tl.int64)
    exceeds = position >= last_position
    position = tl.where(exceeds, 0, position + 1)
    length = tl.where(exceeds, 1, tl.minimum(length, longest - 1) + 1)
    slot = slot_of(
        row,
        position,
        live & (exceeds == 0),
        block_table_tensor,
        columns,
        block_table_tensor_stride_0,
        block_table_tensor_stride_1,
        block_size,
        LANE_MASKS,
    )
    position = position.to(out_clamped_positions.dtype.element_ty)
    tl.store(out_clamped_positions + row * out_clamped_positions_stride, position, mask=live)
    tl.store(seq_lens + row * seq_lens_stride, length.to(seq_lens.dtype.element_ty), mask=live)
    tl.store(out_slot_mapping + row * out_slot_mapping_stride, slot, mask=row < input_batch_size)


def eagle_step_update_slot_mapping_and_metadata(
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
    padded_batch_size = batch_size if input_batch_size is None else input_batch_size
    launch_rows(
        eagle_kernel,
        padded_batch_size,
        positions_1d,
        block_table_tensor,
        seq_lens,
        out_clamped_positions,
        out_slot_mapping,
        batch_size,
        padded_batch_size,
        block_size,
        # A position or length that the dtype cannot hold lies past the model's end as well.
        min(max_model_len - 1, torch.iinfo(positions_1d.dtype).max),
        min(max_model_len, torch.iinfo(seq_lens.dtype).max),
        block_table_tensor.size(1),
        positions_1d.stride(0),
        *block_table_tensor.stride(),
        seq_lens.stride(0),
        out_clamped_positions.stride(0),
        out_slot_mapping.stride(0),
        IN_PLACE=same_memory(out_clamped_positions, positions_1d),
    )
