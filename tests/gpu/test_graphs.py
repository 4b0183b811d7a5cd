"""Captured once and replayed, in a CUDA graph and in those of torch.compile: 64 steps equal 64 eager ones."""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.utils
from gpu_calls import CALLS, assert_same, draw_call, function, on, refill, tensors, whole

import advance_step
from advance_step import reference

STEPS = 64


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("rows", [5, 300])
def test_replay_equals_eager(functions, device, call, rows):
    """The tokens change between the replays; sequences run past their tables and stop on the way."""
    drawn = draw_call(call, rows)
    eager, captured, expected = on(device, drawn), on(device, drawn), on("cpu", drawn)
    function(functions, call)(**on(device, drawn))  # loads the kernel: nothing may be loaded while capturing
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function(functions, call)(**captured)
    assert_same(captured, drawn, "capturing runs nothing")
    for step in range(STEPS):
        for state in (eager, captured, expected):
            if "sampled_token_ids" in state:
                refill(state, step)
        function(functions, call)(**eager)
        graph.replay()
        function(reference, call, "_ref")(**expected)
        assert_same(captured, expected, f"{call}, replay {step}")
        assert_same(eager, expected, f"{call}, eager step {step}")


def test_several_steps_in_one_graph(functions, device):
    """Eight steps captured, each fed what the one before wrote: the host does nothing between them."""

    def steps_of(module, suffix, state):
        for _ in range(8):
            state["sampled_token_ids"].add_(state["input_positions"]).remainder_(300)  # stands for a model
            function(module, "advance_until_stop", suffix)(**state)

    drawn = draw_call("advance_until_stop", 257)
    captured, expected = on(device, drawn), on("cpu", drawn)
    steps_of(functions, "", on(device, drawn))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        steps_of(functions, "", captured)
    for replay in range(8):
        graph.replay()
        steps_of(reference, "_ref", expected)
        assert_same(captured, expected, f"replay {replay}")


@pytest.mark.parametrize("call", CALLS)
def test_compiled_with_reduced_overhead(device, call):
    """torch.compile's own graphs, on an engine's persistent buffers (which it must be told are such)."""
    drawn = draw_call(call, 300, spread=False)
    state, expected = on(device, drawn), on("cpu", drawn)
    for tensor in tensors(state).values():
        torch._dynamo.mark_static_address(tensor)
    counters = torch._dynamo.utils.counters
    counters.clear()
    torch._dynamo.reset()

    @torch.compile(mode="reduce-overhead", fullgraph=True)
    def compiled(arguments):
        function(advance_step, call)(**arguments)

    for step in range(STEPS):
        if "sampled_token_ids" in drawn:
            refill(state, step)
            refill(expected, step)
        compiled(state)
        function(reference, call, "_ref")(**expected)
        assert_same(state, expected, f"{call}, step {step}")
    assert counters["inductor"]["cudagraph_skips"] == 0  # it was captured, not run eagerly after all


def test_padded_graph_of_a_larger_batch(device):
    """As engines do: captured for 64 rows, of which 7 are live."""
    drawn = draw_call("advance_step_flashattn", 64)
    drawn |= {"num_queries": 7, "sampled_token_ids": drawn["sampled_token_ids"][:7]}
    captured, expected = on(device, drawn), on("cpu", drawn)
    advance_step.advance_step_flashattn(**on(device, drawn))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        advance_step.advance_step_flashattn(**captured)
    for _ in range(3):
        whole(captured["slot_mapping"]).fill_(5)
        whole(expected["slot_mapping"]).fill_(5)
        graph.replay()
        reference.advance_step_flashattn_ref(**expected)
        assert_same(captured, expected, "replay")
