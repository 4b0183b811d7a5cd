"""The pytest plugin of advance-step: one test per clause of a contract, for a target that the command line names.

    pytest --advance-step-target=package.module:function --advance-step-contract=npu --advance-step-device=cuda

It stands outside the package because pytest imports it in every run of every project that shares the environment, and
importing the package imports torch. Nothing of the package is imported unless --advance-step-target is given.
"""

from __future__ import annotations

from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("advance-step", "hold a kernel to a contract of advance-step, a test per clause")
    group.addoption("--advance-step-target", metavar="PACKAGE.MODULE:FUNCTION", help="the function to hold to it")
    group.addoption("--advance-step-contract", metavar="CONTRACT", help="npu, vllm, flashinfer, eagle or until-stop")
    group.addoption("--advance-step-device", metavar="DEVICE", default="cpu", help="where the tensors are (cpu)")
    group.addoption(
        "--advance-step-skip", metavar="CLAUSE", action="append", default=[], help="lacks by design; repeatable"
    )


@pytest.hookimpl(tryfirst=True)  # before -k and -m choose among the tests
def pytest_collection_modifyitems(session: pytest.Session, config: pytest.Config, items: list[pytest.Item]) -> None:
    target, contract = config.getoption("--advance-step-target"), config.getoption("--advance-step-contract")
    if target is None:
        return
    if contract is None:
        raise pytest.UsageError("--advance-step-target needs --advance-step-contract")
    from advance_step.conformance.run import clauses, load, refuse_unknown

    skip = config.getoption("--advance-step-skip")
    try:
        refuse_unknown(skip, [contract])
        function = load(target, contract)
    except (ValueError, ImportError, AttributeError) as error:
        raise pytest.UsageError(f"--advance-step-target={target}: {error}") from error
    for name in clauses(contract):
        item = ClauseItem.from_parent(session, name=name, nodeid=f"advance-step/{contract}::{name}")
        item.call = (function, contract, name, config.getoption("--advance-step-device"))
        if name in skip:
            item.add_marker(pytest.mark.skip(reason="by request"))
        items.append(item)


class ClauseItem(pytest.Item):
    """One clause: fails with what was found, the known deviation and the sentence of the contract."""

    call: tuple[Any, str, str, str]

    def runtest(self) -> None:
        from advance_step.conformance.run import FAILS, check_clause

        result = check_clause(*self.call)
        if result.outcome == FAILS:
            known = f"\n  known deviation: {result.deviation}" if result.deviation else ""
            pytest.fail(f"{result.detail}{known}\n  the contract says: {result.sentence}", pytrace=False)

    def reportinfo(self) -> tuple[Any, int, str]:
        return self.path, 0, self.nodeid
