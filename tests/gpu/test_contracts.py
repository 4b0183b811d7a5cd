"""The clauses of every contract on the GPU, through the operators, on the executor that serves it in this process.

test_processes.py runs this file again with Triton, with the reference, and with ADVANCE_STEP_CHECK=1.
"""

from __future__ import annotations

import os

import pytest
import torch

import advance_step
from advance_step.conformance import CONTRACTS, clauses
from advance_step.conformance.run import HOLDS, check_clause
from advance_step.errors import CHECK_VALUES

CLAUSES = [(contract, clause) for contract in CONTRACTS for clause in clauses(contract)]


@pytest.fixture(scope="module", autouse=True)
def nothing_is_compiled(device):
    """Where Triton serves, its hook, which hears of every compilation ahead, hears of none after warmup()."""
    advance_step.warmup(device)
    if advance_step.backend_info()["devices"]["cuda"]["executor"] != "triton":
        yield
        return
    import triton

    compiled = []
    triton.knobs.runtime.jit_cache_hook = lambda **told: compiled.append(told["repr"])
    yield
    triton.knobs.runtime.jit_cache_hook = None
    assert compiled == []


@pytest.mark.parametrize(("contract", "clause"), CLAUSES)
def test_operator_holds(device, contract, clause):
    result = check_clause(getattr(advance_step, CONTRACTS[contract].operator), contract, clause, device)
    assert result.outcome == HOLDS, result.detail


@pytest.mark.parametrize(("contract", "clause"), CLAUSES)
def test_dispatcher_holds(device, contract, clause):
    target = getattr(torch.ops.advance_step, CONTRACTS[contract].operator)
    result = check_clause(target, contract, clause, device, seed=1)
    assert result.outcome == HOLDS, result.detail


def test_who_serves(device):
    """The native core, unless another is forced or values are to be checked, which the core does not on a GPU."""
    served = advance_step.backend_info()["devices"]["cuda"]
    if CHECK_VALUES:
        assert served["executor"] in ("triton", "reference"), served
    else:
        assert served["executor"] == (os.environ.get("ADVANCE_STEP_BACKEND") or "native"), served
