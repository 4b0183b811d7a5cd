"""What a call costs the device and the host: no wait, no allocation, the current stream, the tensors' device."""

from __future__ import annotations

import pytest
import torch
from gpu_calls import CALLS, assert_same, draw_call, function, on, tensors, whole

import advance_step
from advance_step import reference

BUSY = 800_000_000  # cycles: 0.4 s at 2 GHz


@pytest.fixture(params=CALLS)
def call(request, functions, device):
    """Every operator in turn, run once: the first call loads its kernel."""
    function(functions, request.param)(**on(device, draw_call(request.param, 300)))
    torch.cuda.synchronize()
    return request.param


def stepped(call):
    """The arguments of a call, and what they are to be after it."""
    drawn = draw_call(call, 300)
    expected = on("cpu", drawn)
    function(reference, call, "_ref")(**expected)
    return drawn, expected


def test_neither_waits_nor_allocates(functions, device, call):
    drawn, expected = stepped(call)
    state = on(device, drawn)
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        function(functions, call)(**state)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
    assert_same(state, expected, call)


def test_returns_while_the_device_is_busy(functions, device, call):
    """set_sync_debug_mode sees torch's own waits; this sees any."""
    drawn, expected = stepped(call)
    state = on(device, drawn)
    torch.cuda.synchronize()
    done = torch.cuda.Event()
    torch.cuda._sleep(BUSY)
    function(functions, call)(**state)
    done.record()
    assert not done.query()
    assert_same(state, expected, call)


def test_runs_on_the_current_stream(functions, device, call):
    """The step comes after what its own stream was given before, and ends while the default stream is still busy."""
    drawn, expected = stepped(call)
    source, state = on(device, drawn), on(device, drawn)
    for tensor in tensors(state).values():
        whole(tensor).zero_()
    torch.cuda.synchronize()
    default_done = torch.cuda.Event()
    torch.cuda._sleep(BUSY)
    default_done.record()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(BUSY // 100)
        for name, tensor in tensors(state).items():
            whole(tensor).copy_(whole(tensors(source)[name]))
        function(functions, call)(**state)
        assert_same(state, expected, call)
    assert not default_done.query()


def test_leaves_the_current_device_as_it_was(functions, call):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    drawn, expected = stepped(call)
    if functions is not advance_step:
        functions.warmup("cuda:1")
    state = on("cuda:1", drawn)
    assert torch.cuda.current_device() == 0
    function(functions, call)(**state)
    assert torch.cuda.current_device() == 0
    assert_same(state, expected, call)


@pytest.mark.parametrize("call", CALLS)
def test_refuses_tensors_on_two_devices(device, call):
    """The state on the GPU and a table on the CPU: an error before anything is written, and the device as it was."""
    state = on(device, draw_call(call, 300, mix=-1))
    before = on("cpu", state)
    name = next(name for name in state if name.startswith("block_table"))
    there = state | {name: [t.cpu() for t in state[name]] if isinstance(state[name], list) else state[name].cpu()}
    with pytest.raises(ValueError, match=f"{name}.*expected a tensor on cuda:0.*got one on cpu"):
        function(advance_step, call)(**there)
    assert torch.cuda.current_device() == 0
    assert_same(state, before, call)


def test_serves_a_second_device_in_its_own_stream(device):
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    drawn, expected = stepped("advance_step_flashattn")
    state = on("cuda:1", drawn)
    torch.cuda.synchronize("cuda:1")
    torch.cuda._sleep(BUSY)  # the first device is busy
    advance_step.advance_step_flashattn(**state)
    done = torch.cuda.Event()
    done.record(torch.cuda.current_stream("cuda:1"))
    done.synchronize()
    assert not torch.cuda.current_stream("cuda:0").query()
    assert_same(state, expected, "cuda:1")
