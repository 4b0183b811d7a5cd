"""Every binary that serving on an NPU needs is lowered, reaches hivmc for both chips, and fits them."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
import triton
import triton.language as tl
from conftest import BINARIES
from lowering import CHIPS, ttadapter
from native import Kernel, WildAccess, build

from advance_step.kernels import common
from advance_step.kernels.common import gather, load_rows, program_rows, store_rows

VECTOR_CORES = 48


@pytest.mark.parametrize("binary", BINARIES, ids=str)
def test_reaches_the_hand_off_to_hivmc(binary, built):
    """BiShengIR refuses a kernel that does not fit a core's 192 KiB."""
    made = built[binary]
    if isinstance(made, Exception):
        raise made
    for chip in CHIPS:
        assert f"func.func @{binary.name}" in made.lowered.hivm[chip]


def test_every_kernel_is_among_them():
    assert Counter(binary.name for binary in BINARIES) == {
        "plain_kernel": 2**3 + 2**2,  # and in place, where the sampled tokens are int64 as the input tokens are
        "speculative_kernel": 2,
        "count_pages_kernel": 2,
        "flashinfer_kernel": 2**3 + 2**2,
        "eagle_kernel": 2 * 2**3,
        "until_stop_kernel": 2**5 + 2**4,
        "find_slots_kernel": 2**2,
        "slot_mapping_kernel": 2**3,
        "keep_slots_kernel": 1,
    }


@pytest.mark.parametrize("rows", [1, 8, 48, 255, 256])
def test_no_core_has_more_than_16_rows(rows):
    tiles = common.TILES["npu"]
    (programs, _) = common.grid_of_rows(rows, tiles.rows, tiles)
    assert -(-programs // VECTOR_CORES) * tiles.rows <= 16


def test_a_batch_of_too_many_programs_is_refused():
    tiles = common.TILES["npu"]
    assert common.grid_of_rows(524_280, 8, tiles) == (65535, 1)
    with pytest.raises(ValueError, match="the batch: expected at most 524280 rows on an NPU, got 524281"):
        common.grid_of_rows(524_281, 8, tiles)


@triton.jit
def careless_load(source, flags, offsets, target, n: tl.int64, ROWS: tl.constexpr):
    row = program_rows(ROWS)
    wanted = (row < n) & (tl.load(flags + row, mask=row < n, other=1) == 0)
    tl.store(target + row, tl.load(source + row, mask=wanted, other=-1), mask=row < n)


@triton.jit
def careless_gather(source, flags, offsets, target, n: tl.int64, ROWS: tl.constexpr):
    row = program_rows(ROWS)
    wanted = (row < n) & (tl.load(flags + row, mask=row < n, other=1) == 0)
    offset = tl.load(offsets + row, mask=row < n, other=0)
    tl.store(target + row, tl.load(source + offset, mask=wanted, other=-1), mask=row < n)


@triton.jit
def careless_store(source, flags, offsets, target, n: tl.int64, ROWS: tl.constexpr):
    row = program_rows(ROWS)
    wanted = (row < n) & (tl.load(flags + row, mask=row < n, other=1) == 0)
    tl.store(target + row, tl.load(source + row, mask=row < n, other=0), mask=wanted)


@triton.jit
def careful(source, flags, offsets, target, n: tl.int64, ROWS: tl.constexpr):
    row = program_rows(ROWS)
    in_batch = row < n
    wanted = in_batch & (load_rows(flags + row, in_batch, in_batch, False, other=1) == 0)
    offset = tl.load(offsets + row, mask=in_batch, other=0)
    store_rows(target + row, gather(source, offset, wanted, n > 0, -1, False), wanted, in_batch, False)


def run(kernel, folder, rows):
    """`rows` of a tile of 8, of which those with an even number are wanted; the other offsets point nowhere."""
    names = ["source", "flags", "offsets", "target"]
    text = ttadapter(kernel, dict.fromkeys(names, "*i64") | {"n": "i64"}, {"ROWS": 8})
    build(text, folder / f"{kernel.__name__}.so")
    row = torch.arange(rows)
    flags, target = row % 2, torch.full((rows,), -7)
    offsets = torch.where(flags == 0, (rows - 1) // 2 * 2 - row, 2**50)
    Kernel(text, folder / f"{kernel.__name__}.so").run((1,), [10 * row, flags, offsets, target, rows])
    return target.tolist()


@pytest.mark.parametrize("kernel", [careless_load, careless_gather, careless_store], ids=lambda kernel: kernel.__name__)
def test_a_mask_that_depends_on_data_is_caught(kernel, tmp_path):
    with pytest.raises(WildAccess, match=kernel.__name__):
        run(kernel, tmp_path, 5)


def test_the_helpers_keep_within_the_tensors(tmp_path):
    assert run(careful, tmp_path, 5) == [40, -7, 20, -7, 0]
