"""The operators as torch sees them: schema, fake kernels, compile, export."""

from __future__ import annotations

import shutil

import pytest
import torch
from calls import CALLS, function, name_of, operator, tensors
from torch._dynamo.testing import CompileCounter
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim

import advance_step
from advance_step import reference


@pytest.fixture(autouse=True)
def no_graphs_of_other_tests():
    """torch counts the graphs of a piece of code in the process, and refuses past eight."""
    torch._dynamo.reset()


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


@pytest.mark.parametrize("call", CALLS)
def test_batch_sizes_share_a_graph(call):
    """Two at most: torch takes a size of 0 or 1, as num_queries is in the first call, for a constant."""
    counter = CompileCounter()
    compiled = torch.compile(
        lambda arguments: function(call)(**arguments), fullgraph=True, dynamic=True, backend=counter
    )
    for rows in range(2, 20):
        eager, state = CALLS[call](rows), CALLS[call](rows)
        function(call)(**eager)
        compiled(state)
        assert all(map(torch.equal, tensors(state), tensors(eager)))
    assert counter.frame_count <= 2


# The ints that are a batch's sizes, and the tensor whose rows they count.
COUNTED = {"num_seqs": "block_tables", "num_queries": "sampled_token_ids", "input_batch_size": "out_slot_mapping"}


class Step(torch.nn.Module):
    """A call that takes its batch's sizes from its tensors, as the compiled step of an engine does."""

    def __init__(self, call):
        super().__init__()
        self.call, self.counted = call, {size: of for size, of in COUNTED.items() if size in CALLS[call]()}

    def forward(self, arguments):
        function(self.call)(**arguments, **{size: arguments[of].size(0) for size, of in self.counted.items()})

    def inputs(self, rows):
        return {name: value for name, value in CALLS[self.call](rows).items() if name not in self.counted}

    def dynamic_shapes(self):
        """For each input, Dim.DYNAMIC where its shape follows the number of rows."""

        def of(few, many):
            if isinstance(few, list):
                return [of(*pair) for pair in zip(few, many, strict=True)]
            if not isinstance(few, torch.Tensor):
                return None
            return {d: Dim.DYNAMIC for d in range(few.dim()) if few.size(d) != many.size(d)}

        few, many = self.inputs(7), self.inputs(13)
        return {name: of(few[name], many[name]) for name in few}


@pytest.mark.parametrize("call", CALLS)
def test_a_marked_batch_is_one_graph(call):
    counter, step = CompileCounter(), Step(call)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for rows in (7, 5, 19):
        eager, state = step.inputs(rows), step.inputs(rows)
        for tensor, dims in zip(tensors(state), tensors(step.dynamic_shapes(), dict), strict=True):
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim)
        step(eager)
        compiled(state)
        assert all(map(torch.equal, tensors(state), tensors(eager)))
    assert counter.frame_count == 1


@pytest.mark.parametrize("call", CALLS)
def test_exports_with_a_dynamic_batch(call):
    step = Step(call)
    program = torch.export.export(step, (step.inputs(7),), dynamic_shapes=(step.dynamic_shapes(),)).module()
    for rows in (5, 19):
        eager, state = step.inputs(rows), step.inputs(rows)
        step(eager)
        program(state)
        assert all(map(torch.equal, tensors(state), tensors(eager)))


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
    """Word for word the signatures of the contract (defaults as torch prints them; its ints may be symbolic)."""
    said = {name_of(c): str(operator(c)._schema).removeprefix("advance_step::") for c in CALLS}
    assert said["npu_advance_step_flashattn"] == (
        "npu_advance_step_flashattn(Tensor(a!) input_tokens, Tensor sampled_token_ids, Tensor(b!) input_positions, "
        "Tensor(c!) seq_lens, Tensor(d!) slot_mapping, Tensor block_tables, SymInt num_seqs, "
        "SymInt num_queries, SymInt block_size, *, Tensor? spec_token=None, Tensor? accepted_num=None) -> ()"
    )
    assert said["advance_step_flashattn"] == (
        "advance_step_flashattn(SymInt num_seqs, SymInt num_queries, SymInt block_size, Tensor(a!) input_tokens, "
        "Tensor sampled_token_ids, Tensor(b!) input_positions, Tensor(c!) seq_lens, Tensor(d!) slot_mapping, "
        "Tensor block_tables) -> ()"
    )
    assert said["advance_until_stop"] == (
        "advance_until_stop(Tensor(a!) input_tokens, Tensor sampled_token_ids, Tensor(b!) input_positions, "
        "Tensor(c!) seq_lens, Tensor(d!)[] slot_mappings, Tensor[] block_tables, SymInt[] block_sizes, "
        "Tensor(e!) status, Tensor(f!) output_tokens, Tensor(g!) num_generated, Tensor stop_token_ids, "
        "Tensor max_seq_lens, *, SymInt pad_slot=-1) -> ()"
    )
