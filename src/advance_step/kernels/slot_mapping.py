"""`compute_slot_mapping`.

One program finds the slots of ROWS tokens. Of a token it reads its position and the one page id that this points to,
and log2(R) entries of query_start_loc on the way to its request, most of which its neighbours read too; it writes the
slot. Whatever query_start_loc holds, what is read of it lies in it, so no lane of the search has to be masked.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import gather, jit_by_dtype, launch_rows, program_rows
from advance_step.reference import PAD_SLOT


@triton.jit
def request_of(token, query_start_loc, num_requests, search_steps, stride):
    """The last request that begins at or before each token (int64), or request 0.

    Halves the requests that are left until one is; each is in [0, R), and 0 if there is none.
    """
    request = tl.zeros_like(token)
    left = num_requests
    for _ in range(0, search_steps):
        half = left // 2
        begins = tl.load(query_start_loc + (request + half) * stride)
        request = tl.where(begins <= token, request + half, request)
        left = left - half
    return request


@jit_by_dtype
def slot_mapping_kernel(
    query_start_loc,
    positions,
    block_table,
    slot_mapping,
    num_requests: tl.int64,  # R
    num_positions: tl.int64,  # P
    num_slots: tl.int64,  # M
    search_steps: tl.int64,  # that leave one of R requests
    columns: tl.int64,
    block_size: tl.int64,
    cp_world_size: tl.int64,
    cp_rank: tl.int64,
    cp_interleave: tl.int64,
    pad_slot: tl.int64,
    query_start_loc_stride: tl.int64,
    positions_stride: tl.int64,
    block_table_stride_0: tl.int64,
    block_table_stride_1: tl.int64,
    slot_mapping_stride: tl.int64,
    ROWS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
):
    token = program_rows(ROWS)
    request = request_of(token, query_start_loc, num_requests, search_steps, query_start_loc_stride)
    begin = tl.load(query_start_loc + request * query_start_loc_stride)
    # With no requests there is one entry, and it is begin and end of none.
    end = tl.load(query_start_loc + tl.minimum(request + 1, num_requests) * query_start_loc_stride)
    in_request = (token >= begin) & (token < end) & (token < num_positions)

    position = tl.load(
        positions + token * positions_stride, mask=(token < num_positions) & (token < num_slots), other=0
    ).to(tl.int64)
    within = tl.maximum(position, 0)
    virtual_block_size = block_size * cp_world_size  # tokens of one page on all ranks together
    column = within // virtual_block_size
    offset = within - column * virtual_block_size
    has_slot = in_request & (position >= 0) & (column < columns)
    place = request * block_table_stride_0 + column * block_table_stride_1
    page = gather(block_table, place, has_slot, columns > 0, -1, LANE_MASKS).to(tl.int64)
    has_slot = has_slot & (page >= 0)
    if cp_world_size > 1:
        run = offset // cp_interleave  # of cp_interleave tokens, which one rank has
        has_slot = has_slot & (run % cp_world_size == cp_rank)
        offset = run // cp_world_size * cp_interleave + offset % cp_interleave
    slot = tl.where(has_slot, page * block_size + offset, pad_slot)
    tl.store(slot_mapping + token * slot_mapping_stride, slot, mask=token < num_slots)


def compute_slot_mapping(
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
    num_requests = query_start_loc.size(0) - 1
    launch_rows(
        slot_mapping_kernel,
        slot_mapping.size(0),
        query_start_loc,
        positions,
        block_table,
        slot_mapping,
        num_requests,
        positions.size(0),
        slot_mapping.size(0),
        max(num_requests - 1, 0).bit_length(),
        block_table.size(1) if num_requests else 0,
        block_size,
        cp_world_size,
        cp_rank,
        cp_interleave,
        pad_slot,
        query_start_loc.stride(0),
        positions.stride(0),
        *block_table.stride(),
        slot_mapping.stride(0),
    )
