"""The operators as torch sees them: schema, fake kernels, compile, export."""

from __future__ import annotations

import shutil

import pytest
import torch
from calls import CALLS, function, name_of, operator, tensors
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode

import advance_step
from advance_step import reference


@pytest.mark.parametrize("call", CALLS)
def test_opcheck(call):
    torch.library.opcheck(operator(call), (), CALLS[call]())


@pytest.mark.parametrize("call", CALLS)
def test_fake_refuses_as_the_real_one_does(call):
    name, value = ("block_sizes", [16, -1]) if call == "advance_until_stop" else ("block_size", -1)
    with FakeTensorMode() as mode, pytest.raises(ValueError, match=f"^{name_of(call)}: {name}"):
        fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in CALLS[call]().items()}
        for k, v in fakes.items():
            if isinstance(v, list) and isinstance(v[0], torch.Tensor):
                fakes[k] = [mode.from_tensor(t) for t in v]
        function(call)(**(fakes | {name: value}))


@pytest.mark.parametrize("call", CALLS)
def test_compiles_whole_and_once_while_lengths_grow(call):
    """Twelve steps of a compiled function do what twelve plain ones do, from one graph."""
    counter = CompileCounter()

    @torch.compile(fullgraph=True, backend=counter)
    def compiled(arguments):
        function(call)(**arguments)

    eager, state = CALLS[call](), CALLS[call]()
    for _ in range(12):
        function(call)(**eager)
        compiled(state)
    assert all(map(torch.equal, tensors(state), tensors(eager)))
    assert counter.frame_count == 1


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_inductor_keeps_the_writes():
    state, eager = CALLS["advance_step_flashattn"](), CALLS["advance_step_flashattn"]()

    @torch.compile(fullgraph=True)
    def step(arguments):
        advance_step.advance_step_flashattn(**arguments)
        return arguments["input_positions"] * 2

    for _ in range(3):
        advance_step.advance_step_flashattn(**eager)
        doubled = step(state)
    assert torch.equal(doubled, eager["input_positions"] * 2)
    assert all(map(torch.equal, tensors(state), tensors(eager)))


@pytest.mark.parametrize("call", CALLS)
def test_exports(call):
    class Step(torch.nn.Module):
        def forward(self, arguments):
            function(call)(**arguments)

    program = torch.export.export(Step(), (CALLS[call](),))
    assert any(node.target == operator(call) for node in program.graph.nodes)
    eager, state = CALLS[call](), CALLS[call]()
    function(call)(**eager)
    program.module()(state)
    assert all(map(torch.equal, tensors(state), tensors(eager)))


@pytest.mark.parametrize("call", CALLS)
def test_reference_twins_compile_too(call):
    """For devices that have no kernel: the twin inlined and fused does what the operator does."""
    twin = getattr(reference, f"{name_of(call)}_ref")
    eager, state = CALLS[call](), CALLS[call]()
    compiled = torch.compile(lambda arguments: twin(**arguments), fullgraph=True, backend="aot_eager")
    for _ in range(2):
        function(call)(**eager)
        compiled(state)
    assert all(map(torch.equal, tensors(state), tensors(eager)))


def test_schemas_are_the_documented_ones():
    """Word for word the signatures of the contract (defaults as torch prints them)."""
    said = {name_of(c): str(operator(c)._schema).removeprefix("advance_step::") for c in CALLS}
    assert said["npu_advance_step_flashattn"] == (
        "npu_advance_step_flashattn(Tensor(a!) input_tokens, Tensor sampled_token_ids, Tensor(b!) input_positions, "
        "Tensor(c!) seq_lens, Tensor(d!) slot_mapping, Tensor block_tables, int num_seqs, int num_queries, "
        "int block_size, *, Tensor? spec_token=None, Tensor? accepted_num=None) -> ()"
    )
    assert said["advance_step_flashattn"] == (
        "advance_step_flashattn(int num_seqs, int num_queries, int block_size, Tensor(a!) input_tokens, "
        "Tensor sampled_token_ids, Tensor(b!) input_positions, Tensor(c!) seq_lens, Tensor(d!) slot_mapping, "
        "Tensor block_tables) -> ()"
    )
    assert said["advance_until_stop"] == (
        "advance_until_stop(Tensor(a!) input_tokens, Tensor sampled_token_ids, Tensor(b!) input_positions, "
        "Tensor(c!) seq_lens, Tensor(d!)[] slot_mappings, Tensor[] block_tables, int[] block_sizes, "
        "Tensor(e!) status, Tensor(f!) output_tokens, Tensor(g!) num_generated, Tensor stop_token_ids, "
        "Tensor max_seq_lens, *, int pad_slot=-1) -> ()"
    )
