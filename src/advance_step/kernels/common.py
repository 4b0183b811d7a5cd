"""What the kernels share: how they are compiled, launched, and find the slot of a position."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

ROWS = tl.constexpr(128)  # rows of one program: one a thread on a GPU with four warps of 32


def jit_by_dtype(function: Callable[..., None]) -> Any:
    """``triton.jit`` with one binary for each mix of dtypes, whatever the sizes, strides, addresses and values.

    By default Triton compiles anew where an int is 1, or it or an address is or is not a multiple of 16, and where an
    int does not fit 32 bits; the last is up to the kernel, which has to annotate its ints as ``tl.int64``.
    """
    every = list(range(len(inspect.signature(function).parameters)))
    return triton.jit(function, do_not_specialize=every, do_not_specialize_on_alignment=every)


def launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *args: Any, **options: int) -> None:
    """Runs `kernel` with `first` and `args` on the current stream of the device of `first`; no program, no launch."""
    if 0 not in grid:
        with torch.accelerator.device_index(first.device.index):
            kernel[grid](first, *args, **options)


@triton.jit
def program_rows():
    """The rows of this program, int64 [ROWS]; those of the last program may pass the end of the batch."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def slot_of(row, position, live, block_tables, columns, row_stride, column_stride, block_size):
    """The slot of each position (int64), -1 where the row is not live or the position has no page.

    Reads the table of live rows in columns [0, columns) and nothing else.
    """
    within = tl.maximum(position, 0)
    column = within // block_size
    in_table = live & (position >= 0) & (column < columns)
    page = tl.load(block_tables + row * row_stride + column * column_stride, mask=in_table, other=-1).to(tl.int64)
    return tl.where(page >= 0, page * block_size + (within - column * block_size), -1)
