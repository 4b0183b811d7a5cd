"""What autograd must know of writes in place, on the executor that serves the CPU in this process."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from calls import CALLS, function, operator, tensors

import advance_step


def written(call, arguments):
    return tensors({a.name: arguments[a.name] for a in operator(call)._schema.arguments if a.is_write})


def versions(of):
    return [tensor._version for tensor in of]


def read(call, arguments):
    writes = [id(tensor) for tensor in written(call, arguments)]
    return [tensor for tensor in tensors(arguments) if id(tensor) not in writes]


def test_a_gradient_through_an_overwritten_index_raises():
    weights = torch.ones(8, requires_grad=True)
    tokens, positions, slots = (
        torch.tensor([1, 2]),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(2, dtype=torch.int64),
    )
    out = weights[tokens].sum()
    sampled, seq_lens, block_tables = torch.tensor([3, 4]), torch.tensor([5, 6]), torch.tensor([[1], [2]])
    advance_step.advance_step_flashattn(2, 2, 16, tokens, sampled, positions, seq_lens, slots, block_tables)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward()


@pytest.mark.parametrize("mode", [nullcontext, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("call", CALLS)
def test_every_write_counts_and_nothing_else(call, mode):
    arguments = CALLS[call]()
    before, before_read = versions(written(call, arguments)), versions(read(call, arguments))
    with mode():
        function(call)(**arguments)
    assert all(now > then for now, then in zip(versions(written(call, arguments)), before, strict=True))
    assert versions(read(call, arguments)) == before_read


@pytest.mark.parametrize("call", CALLS)
def test_a_refused_call_counts_nothing(call):
    name = "block_sizes" if "block_sizes" in CALLS[call]() else "block_size"
    arguments = CALLS[call]()
    bad = arguments | {name: [16, 0] if name == "block_sizes" else 0}
    before = versions(tensors(arguments))
    with pytest.raises(ValueError, match=name):
        function(call)(**bad)
    assert versions(tensors(arguments)) == before


@pytest.mark.parametrize("call", CALLS)
def test_tensors_made_under_inference_mode_are_written_anywhere(call):
    """They count no versions, and torch's own operators refuse to write into them outside inference mode."""
    expected = CALLS[call]()
    function(call)(**expected)
    with torch.inference_mode():
        arguments = CALLS[call]()
        inside = CALLS[call]()
        function(call)(**inside)
    function(call)(**arguments)
    for state in (arguments, inside):
        assert all(tensor.is_inference() for tensor in tensors(state))
        assert all(map(torch.equal, tensors(state), tensors(expected)))
