"""`advance_step_flashinfer`: two launches, O(pages in use).

`count_pages_kernel` is one program that carries the running sum of the pages over all rows, SCAN_ROWS at a time. It
reads the lengths as they are before the step, and writes indptr, bounds and last page lengths.

`flashinfer_kernel` gives each program TILE_ROWS rows and every num_programs(1)-th tile of TILE_COLUMNS table columns.
It reads indptr and the rows' page ids, and writes those to the indices, never past their end. The programs of the first
tile also advance their rows as `plain.py` does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import jit_by_dtype, launch
from advance_step.kernels.plain import advance_rows

SCAN_ROWS = tl.constexpr(2048)  # with 16 warps the largest tile that no target spills registers for
TILE_ROWS = tl.constexpr(16)
TILE_COLUMNS = tl.constexpr(128)
MOST_COLUMN_PROGRAMS = 64  # for a long table; a wider one is walked in a loop


@jit_by_dtype
def count_pages_kernel(
    seq_lens,
    paged_kv_indptr,
    paged_kv_last_page_len,
    block_table_bound,
    num_seqs: tl.int64,
    num_queries: tl.int64,
    block_size: tl.int64,
    columns: tl.int64,
    seq_lens_stride: tl.int64,
    paged_kv_indptr_stride: tl.int64,
    paged_kv_last_page_len_stride: tl.int64,
    block_table_bound_stride: tl.int64,
):
    tl.store(paged_kv_indptr, 0)
    before = tl.full((), 0, tl.int64)  # pages of the rows before this tile
    for first in range(0, num_seqs, SCAN_ROWS):
        row = first + tl.arange(0, SCAN_ROWS).to(tl.int64)
        live = row < num_queries
        position = tl.load(seq_lens + row * seq_lens_stride, mask=live, other=-1).to(tl.int64)
        column = position // block_size  # rounds toward 0
        offset = position - column * block_size
        offset = tl.where(offset < 0, offset + block_size, offset)
        bound = tl.where(position < 0, 0, tl.minimum(column, columns - 1) + 1)
        end = before + tl.cumsum(bound, 0)
        before += tl.sum(bound, 0)
        tl.store(paged_kv_indptr + (row + 1) * paged_kv_indptr_stride, end.to(tl.int32), mask=row < num_seqs)
        tl.store(paged_kv_last_page_len + row * paged_kv_last_page_len_stride, (offset + 1).to(tl.int32), mask=live)
        tl.store(block_table_bound + row * block_table_bound_stride, bound.to(tl.int32), mask=live)


@jit_by_dtype
def flashinfer_kernel(
    input_tokens,
    sampled_token_ids,
    input_positions,
    seq_lens,
    slot_mapping,
    block_tables,
    paged_kv_indices,
    paged_kv_indptr,
    num_seqs: tl.int64,
    num_queries: tl.int64,
    block_size: tl.int64,
    columns: tl.int64,
    num_indices: tl.int64,
    input_tokens_stride: tl.int64,
    sampled_token_ids_stride: tl.int64,
    input_positions_stride: tl.int64,
    seq_lens_stride: tl.int64,
    slot_mapping_stride: tl.int64,
    block_tables_stride_0: tl.int64,
    block_tables_stride_1: tl.int64,
    paged_kv_indices_stride: tl.int64,
    paged_kv_indptr_stride: tl.int64,
):
    row = tl.program_id(0).to(tl.int64) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    if tl.program_id(1) == 0:
        advance_rows(
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
        )
    live = row < num_queries
    start = tl.load(paged_kv_indptr + row * paged_kv_indptr_stride, mask=live, other=0).to(tl.int64)
    end = tl.load(paged_kv_indptr + (row + 1) * paged_kv_indptr_stride, mask=live, other=0).to(tl.int64)
    bound = tl.minimum(end - start, columns)
    widest = tl.max(bound, 0)
    for first in range(tl.program_id(1) * TILE_COLUMNS, widest, tl.num_programs(1) * TILE_COLUMNS):
        column = first + tl.arange(0, TILE_COLUMNS).to(tl.int64)
        entry = start[:, None] + column[None, :]  # [TILE_ROWS, TILE_COLUMNS]
        place = row[:, None] * block_tables_stride_0 + column[None, :] * block_tables_stride_1
        inside = (column[None, :] < bound[:, None]) & (entry >= 0) & (entry < num_indices)
        page = tl.load(block_tables + place, mask=inside, other=0).to(tl.int32)
        tl.store(paged_kv_indices + entry * paged_kv_indices_stride, page, mask=inside)


def advance_step_flashinfer(
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
    columns = block_tables.size(1)
    launch(
        count_pages_kernel,
        (1,),
        seq_lens,
        paged_kv_indptr,
        paged_kv_last_page_len,
        block_table_bound,
        num_seqs,
        num_queries,
        block_size,
        columns,
        seq_lens.stride(0),
        paged_kv_indptr.stride(0),
        paged_kv_last_page_len.stride(0),
        block_table_bound.stride(0),
        num_warps=16,
    )
    column_programs = min(max(1, triton.cdiv(columns, TILE_COLUMNS.value)), MOST_COLUMN_PROGRAMS)
    launch(
        flashinfer_kernel,
        (triton.cdiv(num_seqs, TILE_ROWS.value), column_programs),
        input_tokens,
        sampled_token_ids,
        input_positions,
        seq_lens,
        slot_mapping,
        block_tables,
        paged_kv_indices,
        paged_kv_indptr,
        num_seqs,
        num_queries,
        block_size,
        columns,
        paged_kv_indices.size(0),
        input_tokens.stride(0),
        sampled_token_ids.stride(0),
        input_positions.stride(0),
        seq_lens.stride(0),
        slot_mapping.stride(0),
        *block_tables.stride(),
        paged_kv_indices.stride(0),
        paged_kv_indptr.stride(0),
    )
