"""What the kernels share: how they are compiled, launched and tiled, and how they reach memory.

A kernel here is one source for Triton and for triton-ascend 3.2, which compiles it for Ascend's vector cores, and keeps
a mask only where it can tell the mask's bounds from the program's scalars. So these rules hold; `load_rows`, `gather`
and `store_rows` keep them.

1. A mask that bounds memory is a prefix, `row < n` with a scalar n, or an `&` of prefixes. A mask that depends on data
   (`status == RUNNING`) is dropped on triton-ascend: a load reads every lane, a store reads, selects and writes every
   lane back. What depends on data goes into the value: `tl.where(running, new, old)`.
2. A gather (an address that depends on data) reads every lane whatever its mask: the address of a lane that is not to
   be read has to be a good one, and where there is none, there must be no load. A scatter keeps its mask.
3. No lane is written back that another program may write: a program's rows are its own.
4. Memory is reached by one argument alone. Two pointer arguments to the same memory are taken for different memory, so
   where an operator allows it, the kernel reads by the pointer that it writes by (`same_memory`).
5. `x.to(narrow).to(wide)` is taken for x. Whether a sum leaves a dtype is asked before (`largest`), not after.
6. A tile lives in 192 KiB, all its temporaries at once, and 64-bit arithmetic is done lane by lane by the scalar unit:
   tiles are small there (`TILES`). A grid has at most 65,535 programs; `num_warps` and `tl.num_programs` are the GPUs'.

On a GPU a mask of any kind keeps its lanes from memory, which saves traffic. LANE_MASKS says which it is.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl


class Tiles(NamedTuple):
    """What a program takes at once on a kind of device."""

    rows: int
    scan_rows: int  # of a running sum over the batch
    copy_rows: int  # of the block table, whose columns are copied
    copy_columns: int
    column_programs: int  # at most, that share the columns of the same rows
    scan_options: dict[str, int]  # what the scan is launched with
    lane_masks: bool  # whether a mask that depends on data keeps its lanes from memory


# A GPU: a row a thread with four warps of 32; the scan's 2048 rows are, with 16 warps, the most that no target spills
# registers for. Ascend: 256 rows on 32 of the 40 to 48 vector cores, 8 a core; tiles that fit a core's memory.
GPU = Tiles(
    rows=128,
    scan_rows=2048,
    copy_rows=16,
    copy_columns=128,
    column_programs=64,
    scan_options={"num_warps": 16},
    lane_masks=True,
)
TILES = {
    "npu": Tiles(
        rows=8, scan_rows=256, copy_rows=8, copy_columns=512, column_programs=6, scan_options={}, lane_masks=False
    ),
}
MOST_PROGRAMS = 65535  # of a grid on an NPU


def tiles_of(tensor: torch.Tensor) -> Tiles:
    """The tiles for the device of `tensor`."""
    return TILES.get(tensor.device.type, GPU)


def same_memory(written: torch.Tensor, read: torch.Tensor) -> bool:
    """Whether a kernel has to read `read` by its pointer to `written` (rule 4): they are one memory, and it matters.

    The operators allow the two to share memory only from the same address on and with the same stride.
    """
    return not tiles_of(written).lane_masks and written.data_ptr() == read.data_ptr()


def jit_by_dtype(function: Callable[..., None]) -> Any:
    """``triton.jit`` with one binary for each mix of dtypes, whatever the sizes, strides, addresses and values.

    By default Triton compiles anew where an int is 1, or it or an address is or is not a multiple of 16, and where an
    int does not fit 32 bits; the last is up to the kernel, which has to annotate its ints as ``tl.int64``.
    """
    parameters = inspect.signature(function).parameters.values()
    every = [at for at, parameter in enumerate(parameters) if "constexpr" not in str(parameter.annotation)]
    return triton.jit(function, do_not_specialize=every, do_not_specialize_on_alignment=every)


# The first launch of a binary compiles it by ast.parse, which fails at random where two threads of CPython 3.11 are in
# it at once. It is held around every launch, as only Triton knows which is the first.
COMPILING = threading.RLock()


def launch(kernel: Any, grid: tuple[int, ...], first: torch.Tensor, *args: Any, **options: int) -> None:
    """Runs `kernel` with `first` and `args` on the current stream of the device of `first`; no program, no launch."""
    if 0 not in grid:
        with torch.accelerator.device_index(first.device.index), COMPILING:
            kernel[grid](first, *args, **options)


def launch_rows(kernel: Any, num_rows: int, first: torch.Tensor, *args: Any, **constants: Any) -> None:
    """Launches a program of `kernel` for each tile of rows, with ROWS and LANE_MASKS as the device of `first` has them.

    Raises:
        ValueError: more rows than an NPU's largest grid has.
    """
    tiles = tiles_of(first)
    grid = grid_of_rows(num_rows, tiles.rows, tiles)
    launch(kernel, grid, first, *args, ROWS=tiles.rows, LANE_MASKS=tiles.lane_masks, **constants)


def grid_of_rows(num_rows: int, rows: int, tiles: Tiles, column_programs: int = 1) -> tuple[int, ...]:
    """The grid for `num_rows` at `rows` a program, times `column_programs`; ValueError where an NPU refuses it."""
    grid = (triton.cdiv(num_rows, rows), column_programs)
    if not tiles.lane_masks and math.prod(grid) > MOST_PROGRAMS:
        most = MOST_PROGRAMS // column_programs * rows
        raise ValueError(f"the batch: expected at most {most} rows on an NPU, got {num_rows}")
    return grid


@triton.jit
def program_rows(ROWS: tl.constexpr):
    """The rows of this program, int64 [ROWS]; those of the last program may pass the end of the batch."""
    return tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)


@triton.jit
def load_rows(pointers, wanted, in_batch, LANE_MASKS: tl.constexpr, other=0):
    """What lies at `pointers`, which do not depend on data, for the rows `wanted`, which may; `in_batch` is a prefix.

    Of the other rows it gives `other` or what they hold, so the caller has to do without them.
    """
    return tl.load(pointers, mask=wanted & in_batch if LANE_MASKS else in_batch, other=other)


@triton.jit
def store_rows(pointers, value, changed, in_batch, LANE_MASKS: tl.constexpr):
    """Writes `value` for the rows `changed`, which may depend on data; the rest of `in_batch`, a prefix, stay."""
    if LANE_MASKS:
        tl.store(pointers, value, mask=changed & in_batch)
    else:
        kept = tl.load(pointers, mask=in_batch, other=0)
        tl.store(pointers, tl.where(changed, value.to(kept.dtype), kept), mask=in_batch)


@triton.jit
def gather(base, offsets, inside, some, other, LANE_MASKS: tl.constexpr):
    """base[offsets] for the lanes `inside`, else `other` (a constant); both may depend on data.

    `some` is a scalar: whether there is an element at `base` at all.
    """
    if LANE_MASKS:
        value = tl.load(base + offsets, mask=inside, other=other)
    else:
        value = tl.full(offsets.shape, other, base.dtype.element_ty)
        if some:
            value = tl.load(base + tl.where(inside, offsets, 0), mask=inside, other=other)
    return value


@triton.jit
def largest(pointer):
    """The largest value that fits where `pointer` points, int32 or int64."""
    return 2147483647 if pointer.dtype.element_ty == tl.int32 else 9223372036854775807


@triton.jit
def slot_of(
    row, position, live, block_tables, columns, row_stride, column_stride, block_size, LANE_MASKS: tl.constexpr
):
    """The slot of each position (int64), -1 where the row is not live or the position has no page.

    Reads the table of live rows in columns [0, columns), its first element, and nothing else.
    """
    within = tl.maximum(position, 0)
    column = within // block_size
    in_table = live & (position >= 0) & (column < columns)
    place = row * row_stride + column * column_stride
    page = gather(block_tables, place, in_table, columns > 0, -1, LANE_MASKS).to(tl.int64)
    return tl.where(page >= 0, page * block_size + (within - column * block_size), -1)
