"""Every operator, on the executor that serves the CPU in this process, against the contract's clauses and oracle.

The clauses (advance_step.conformance) put every tensor between sentinels, compare every cell, and take the expected
values from plain Python. tests/test_executors.py runs this file again on every other executor.
"""

from __future__ import annotations

import doctest
from random import Random

import pytest
import torch
from calls import CALLS, function, operator, plain, tensors

import advance_step
from advance_step import ops, reference
from advance_step.conformance import CONTRACTS, clauses, judge
from advance_step.conformance.run import HOLDS, check_clause

CLAUSES = [(contract, clause) for contract in CONTRACTS for clause in clauses(contract)]


@pytest.mark.parametrize(("contract", "clause"), CLAUSES)
def test_operator_holds(contract, clause):
    result = check_clause(getattr(advance_step, CONTRACTS[contract].operator), contract, clause)
    assert result.outcome == HOLDS, result.detail


@pytest.mark.parametrize(("contract", "clause"), CLAUSES)
def test_dispatcher_holds(contract, clause):
    target = getattr(torch.ops.advance_step, CONTRACTS[contract].operator)
    result = check_clause(target, contract, clause, seed=1)
    assert result.outcome == HOLDS, result.detail


@pytest.mark.parametrize(("contract", "clause"), CLAUSES)
def test_reference_holds_as_on_an_accelerator(contract, clause, monkeypatch):
    """The twins check nothing: a row out of place gets the pad slot, and nothing is written out of place."""
    monkeypatch.setattr(judge, "checks_data", lambda device: False)
    twin = getattr(reference, f"{CONTRACTS[contract].operator}_ref")
    for case in clauses(contract)[clause].cases(Random(f"2/{contract}/{clause}")):
        if not case.refused:
            fault = judge.judge(case, twin, "cpu")
            assert fault is None, fault.detail


@pytest.mark.parametrize("rows", [2048, 2049, 40000])
def test_rows_in_parallel(rows):
    """Above the native core's grain several threads share the rows; each must get its own."""
    generator = torch.Generator().manual_seed(rows)
    call = plain(rows, rows - 7)
    call["seq_lens"] = torch.randint(0, 64, (rows,), generator=generator)
    call["block_tables"] = torch.randint(0, 2**40, (rows, 4), generator=generator)
    expected = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in call.items()}
    reference.advance_step_flashattn_ref(**expected)
    advance_step.advance_step_flashattn(**call)
    for name in ("input_tokens", "input_positions", "seq_lens", "slot_mapping"):
        assert torch.equal(call[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_in_parallel(dtype):
    """Threads share the tokens, wherever in a request the border between two of them falls."""
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor([1, 2047, 0, 5000, 1, 0, 3000] + [1] * 3000)
    starts = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(dtype)
    num_tokens = int(counts.sum())
    call = {
        "query_start_loc": starts,
        "positions": torch.randint(0, 4 * 16, (num_tokens,), generator=generator, dtype=dtype),
        "block_table": torch.randint(-5, 2**40, (len(counts), 4), generator=generator),
        "slot_mapping": torch.zeros(num_tokens + 3000, dtype=torch.int64),
        "block_size": 16,
    }
    expected = call | {"slot_mapping": torch.zeros(num_tokens + 3000, dtype=torch.int64)}
    reference.compute_slot_mapping_ref(**expected)
    advance_step.compute_slot_mapping(**call)
    assert torch.equal(call["slot_mapping"], expected["slot_mapping"])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("block_size", [16, 12])
@pytest.mark.parametrize("earlier", [[], [1], [2500], [5000]])
def test_one_token_of_each_request(dtype, block_size, earlier):
    """As in decoding, which the native core has a loop for; and one start short of that, which it must see."""
    generator = torch.Generator().manual_seed(0)
    starts = torch.arange(5001, dtype=dtype)
    starts[earlier] -= 1
    call = {
        "query_start_loc": starts,
        "positions": torch.randint(0, 4 * block_size, (5000,), generator=generator),
        "block_table": torch.randint(-5, 2**40, (5000, 4), generator=generator),
        "slot_mapping": torch.zeros(9000, dtype=torch.int64),
        "block_size": block_size,
    }
    expected = call | {"slot_mapping": torch.zeros(9000, dtype=torch.int64)}
    reference.compute_slot_mapping_ref(**expected)
    advance_step.compute_slot_mapping(**call)
    assert torch.equal(call["slot_mapping"], expected["slot_mapping"])


@pytest.mark.parametrize("argument", ["positions", "slot_mapping"])
def test_good_values_behind_a_short_tensor_are_not_taken(argument):
    """What lies behind its end would do as a position, and as a slot: the size alone says that it is not there."""
    call = {
        "query_start_loc": torch.tensor([0, 3, 4]),
        "positions": torch.tensor([3, 4, 5, 9]),
        "block_table": torch.tensor([[6, 1, 0], [3, 2, 7]]),
        "slot_mapping": torch.full((4,), 77),
        "block_size": 4,
    }
    whole = call["slot_mapping"]
    call[argument] = call[argument][:3]
    with pytest.raises(ValueError, match=rf"expected query_start_loc\[R\] <= . with {argument} \[.\], .=3, got 4"):
        advance_step.compute_slot_mapping(**call)
    assert whole.tolist() == [77] * 4


def test_bad_row_among_many_writes_nothing():
    rows = 50000
    call = plain(rows, rows)
    call["seq_lens"] = torch.full((rows,), 7)
    call["seq_lens"][rows - 1] = 64
    before = [t.clone() for t in tensors(call)]
    with pytest.raises(ValueError, match=f"position 64 in row {rows - 1}"):
        advance_step.advance_step_flashattn(**call)
    assert all(map(torch.equal, tensors(call), before))


@pytest.mark.parametrize("call", CALLS)
def test_arguments_are_released(call):
    """The native core owns a handle of every tensor for the length of a call, whichever way the call ends."""
    good, bad = CALLS[call](), CALLS[call]()
    bad["block_sizes" if "block_sizes" in bad else "block_size"] = [16, 0] if "block_sizes" in bad else 0
    counts = [t._use_count() for t in tensors(good) + tensors(bad)]
    for _ in range(10):
        operator(call)(**good)
        with pytest.raises(ValueError, match="block_size"):
            operator(call)(**bad)
        if "status" in good:
            good["status"].zero_()
    assert [t._use_count() for t in tensors(good) + tensors(bad)] == counts


@pytest.mark.parametrize("call", CALLS)
def test_returns_nothing_and_runs_in_inference_mode(call):
    with torch.inference_mode():
        assert function(call)(**CALLS[call]()) is None


def test_docstring_examples():
    results = doctest.testmod(ops)
    assert results.attempted > 10
    assert results.failed == 0


def test_every_operator_is_documented_and_has_a_twin():
    for contract in CONTRACTS.values():
        assert getattr(advance_step, contract.operator).__doc__
        assert callable(getattr(reference, f"{contract.operator}_ref"))
        assert contract.operator in advance_step.__all__
