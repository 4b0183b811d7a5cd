"""Memory in huge pages: zeros of every shape and dtype, which live as long as their tensors."""

import gc

import pytest
import torch

from advance_step.decode.huge_pages import HUGE, zeros


@pytest.mark.parametrize("shape", [(), (0, 3), (5,), (HUGE // 4,), (3, 2, 1, 16, 24_576)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.int16], ids=str)
def test_zeros(shape, dtype):
    got = zeros(shape, dtype)
    assert got.shape == shape and got.dtype == dtype and got.is_contiguous() and got.device.type == "cpu"
    assert not got.any()
    if got.nbytes >= HUGE:
        assert got.data_ptr() % HUGE == 0
    got.fill_(3)
    assert (got == 3).all()


def test_a_view_keeps_the_memory():
    last = zeros((4, HUGE), torch.int16).fill_(7)[-1, -3:]
    gc.collect()
    others = [zeros((4, HUGE), torch.int16).fill_(1) for _ in range(3)]
    assert last.tolist() == [7, 7, 7] and len(others) == 3


def test_too_much_is_a_memory_error():
    with pytest.raises((MemoryError, RuntimeError)):
        zeros((2**60,), torch.int16)
