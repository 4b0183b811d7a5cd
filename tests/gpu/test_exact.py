"""Every operator bit for bit as its reference, on the GPU and on the CPU: all dtype mixes, strides, 1 to 1M rows."""

from __future__ import annotations

import pytest
from gpu_calls import CALLS, assert_same, draw_call, function, on

from advance_step import reference

# Around a warp, a block of 128, 256 and 1024 threads; past 64 rows for each of 132 multiprocessors, where a grid that
# is capped by them ends; and large.
ROWS = [1, 2, 31, 32, 33, 127, 128, 129, 255, 256, 257, 1023, 1024, 1025, 8449, 65_537]
MILLION = 1_000_003


def compare(functions, device, call, rows, mix, **how):
    drawn = draw_call(call, rows, mix, **how)
    here, there = on(device, drawn), on(device, drawn)
    function(functions, call)(**here)
    function(reference, call, "_ref")(**there)
    function(reference, call, "_ref")(**drawn)
    what = (call, rows, mix, how)
    assert_same(here, drawn, what)
    assert_same(there, drawn, ("reference on the GPU", *what))


def some_mixes(call):
    """All int32, all int64, and a mix."""
    most = 2 ** CALLS[call][1] - 1
    return sorted({0, most, 0b01010 & most})


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rows", ROWS)
def test_dtype_mixes(functions, device, call, rows):
    for mix in range(2 ** CALLS[call][1]) if rows < 2000 else some_mixes(call):
        compare(functions, device, call, rows, mix)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rows", [1, 256, 8449])
def test_contiguous(functions, device, call, rows):
    compare(functions, device, call, rows, 0, spread=False)


@pytest.mark.parametrize("call", CALLS)
def test_a_million_rows(functions, device, call):
    for mix in some_mixes(call):
        compare(functions, device, call, MILLION, mix, spread=mix != 0)
