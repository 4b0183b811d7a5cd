"""Holds a target to the clauses of a contract, one result a clause."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cache, reduce
from importlib import import_module
from random import Random

from advance_step.conformance.case import CONTRACTS, Clause
from advance_step.conformance.clauses.eagle import eagle_clauses
from advance_step.conformance.clauses.npu import npu_clauses
from advance_step.conformance.clauses.slot_mapping import slot_mapping_clauses
from advance_step.conformance.clauses.until_stop import until_stop_clauses
from advance_step.conformance.clauses.vllm import flashinfer_clauses, vllm_clauses
from advance_step.conformance.deviations import explain
from advance_step.conformance.judge import judge

HOLDS, FAILS, SKIPPED = "holds", "FAILS", "skipped"

CLAUSES = {
    "npu": npu_clauses,
    "vllm": vllm_clauses,
    "flashinfer": flashinfer_clauses,
    "eagle": eagle_clauses,
    "until-stop": until_stop_clauses,
    "slot-mapping": slot_mapping_clauses,
}


@dataclass(frozen=True)
class Result:
    """What came of one clause; `deviation` names the known fault that explains a failure, if one does."""

    contract: str
    clause: str
    sentence: str
    outcome: str  # HOLDS, FAILS or SKIPPED
    detail: str = ""
    deviation: str | None = None


@cache
def clauses(contract: str) -> dict[str, Clause]:
    """The clauses of a contract by name, in the order of the table."""
    if contract not in CLAUSES:
        raise ValueError(f"contract: expected one of {', '.join(CLAUSES)}, got {contract!r}")
    return {clause.name: clause for clause in CLAUSES[contract]()}


def check(
    target: Callable[..., object], contract: str, device: str = "cpu", skip: Collection[str] = (), seed: int = 0
) -> Iterator[Result]:
    """Holds `target` to every clause of `contract` on `device`; those in `skip` are not called and come as skipped.

    The target is called with the contract's arguments by position (`spec_token`, `accepted_num`, `pad_slot` and those
    of context parallelism by keyword, and only where a clause gives them). Inputs are drawn from `seed`, the same ones
    on every machine.
    Raises ValueError for an unknown contract or clause; an exception of the target fails its clause.
    """
    refuse_unknown(skip, [contract])
    for name in clauses(contract):
        yield check_clause(target, contract, name, device, seed) if name not in skip else skipped(contract, name)


def check_clause(target: Callable[..., object], contract: str, name: str, device: str = "cpu", seed: int = 0) -> Result:
    """Holds `target` to one clause: the first of its calls that goes wrong fails it."""
    clause = clauses(contract)[name]
    for case in clause.cases(Random(f"{seed}/{contract}/{name}")):
        fault = judge(case, target, device)
        if fault is not None:
            return Result(contract, name, clause.sentence, FAILS, fault.detail, explain(case, fault))
    return Result(contract, name, clause.sentence, HOLDS)


def skipped(contract: str, name: str) -> Result:
    return Result(contract, name, clauses(contract)[name].sentence, SKIPPED, "by request")


def refuse_unknown(names: Collection[str], contracts: Collection[str]) -> None:
    """Refuses names that are clauses of none of `contracts`."""
    all_names = {name for contract in contracts for name in clauses(contract)}
    if unknown := sorted(set(names) - all_names):
        expected = f"expected clauses of {', '.join(contracts)}: {', '.join(sorted(all_names))}"
        raise ValueError(f"skip: {expected}; got {', '.join(unknown)}")


def load(target: str | None, contract: str) -> Callable[..., object]:
    """The function "package.module:function"; without a target, our own operator of `contract`."""
    path = f"advance_step:{CONTRACTS[contract].operator}" if target is None else target
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise ValueError(f"target: expected package.module:function, got {path!r}")
    function = reduce(getattr, name.split("."), import_module(module))
    if not callable(function):
        raise ValueError(f"target: expected a function, got {type(function).__name__} {path}")
    return function
