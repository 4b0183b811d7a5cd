"""`advance_step_flashinfer`: two launches, O(pages in use).

`count_pages_kernel` is one program that carries the running sum of the pages over all rows, SCAN_ROWS at a time. It
reads the lengths as they are before the step, and writes indptr, bounds and last page lengths.

`flashinfer_kernel` gives each program ROWS rows and every column_programs-th tile of COLUMNS table columns.
It reads indptr and the rows' page ids, and writes those to the indices, never past their end. The programs of the first
tile also advance their rows as `plain.py` does.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from advance_step.kernels.common import grid_of_rows, jit_by_dtype, launch, program_rows, same_memory, tiles_of
from advance_step.kernels.plain import advance_rows


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
    SCAN_ROWS: tl.constexpr,
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
    column_programs: tl.int64,  # the grid's second size
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LANE_MASKS: tl.constexpr,
    IN_PLACE: tl.constexpr,
):
    row = program_rows(ROWS)
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
            LANE_MASKS,
            IN_PLACE,
        )
    first_column = tl.program_id(1).to(tl.int64) * COLUMNS
    last_row = tl.minimum((tl.program_id(0).to(tl.int64) + 1) * ROWS, num_queries)
    if LANE_MASKS:  # a tile of all the rows at once, of which each ends at its own column
        live = row < num_queries
        start = tl.load(paged_kv_indptr + row * paged_kv_indptr_stride, mask=live, other=0).to(tl.int64)
        end = tl.load(paged_kv_indptr + (row + 1) * paged_kv_indptr_stride, mask=live, other=0).to(tl.int64)
        bound = pages_that_fit(start, end, columns, num_indices)
        for first in range(first_column, tl.max(bound, 0), column_programs * COLUMNS):
            column = first + tl.arange(0, COLUMNS).to(tl.int64)[None, :]
            inside = column < bound[:, None]
            place = row[:, None] * block_tables_stride_0 + column * block_tables_stride_1
            page = tl.load(block_tables + place, mask=inside, other=0).to(tl.int32)
            tl.store(paged_kv_indices + (start[:, None] + column) * paged_kv_indices_stride, page, mask=inside)
    else:  # row by row, where the end is a scalar and the mask a prefix
        for r in range(tl.program_id(0).to(tl.int64) * ROWS, last_row):
            start = tl.load(paged_kv_indptr + r * paged_kv_indptr_stride).to(tl.int64)
            end = tl.load(paged_kv_indptr + (r + 1) * paged_kv_indptr_stride).to(tl.int64)
            bound = pages_that_fit(start, end, columns, num_indices)
            for first in range(first_column, bound, column_programs * COLUMNS):
                column = first + tl.arange(0, COLUMNS).to(tl.int64)
                inside = column < bound
                place = r * block_tables_stride_0 + column * block_tables_stride_1
                page = tl.load(block_tables + place, mask=inside, other=0).to(tl.int32)
                tl.store(paged_kv_indices + (start + column) * paged_kv_indices_stride, page, mask=inside)


@triton.jit
def pages_that_fit(start, end, columns, num_indices):
    """How many page ids of a row, whose indices begin at `start` and end at `end`, are copied."""
    bound = tl.minimum(tl.minimum(end - start, columns), num_indices - start)
    return tl.where(start >= 0, bound, 0)


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
    tiles = tiles_of(input_tokens)
    column_programs = min(max(1, triton.cdiv(columns, tiles.copy_columns)), tiles.column_programs)
    grid = grid_of_rows(num_seqs, tiles.copy_rows, tiles, column_programs)
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
        SCAN_ROWS=tiles.scan_rows,
        **tiles.scan_options,
    )
    launch(
        flashinfer_kernel,
        grid,
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
        column_programs,
        ROWS=tiles.copy_rows,
        COLUMNS=tiles.copy_columns,
        LANE_MASKS=tiles.lane_masks,
        IN_PLACE=same_memory(input_tokens, sampled_token_ids),
    )
