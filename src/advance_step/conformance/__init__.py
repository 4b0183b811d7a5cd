"""The operators' contracts as data, and checks that any implementation can be held to.

    from advance_step.conformance import check
    for result in check(my_kernel, "npu", device="cuda"):
        print(result)

`advance-step conformance --target package.module:function --contract npu` does the same in a process of its own and
prints a table; `pytest --advance-step-target=...` collects one test per clause.
"""

from advance_step.conformance.case import CONTRACTS
from advance_step.conformance.run import Result, check, clauses

__all__ = ["CONTRACTS", "Result", "check", "clauses"]
