"""`pytest --advance-step-target=...`, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import pytest

from advance_step.conformance import clauses

pytest_plugins = ["pytester"]

TARGETS = """
import right, wrong
row_0 = right.implementation("vllm", wrong.row_0_slot)
fine = right.implementation("eagle")
"""


def run(pytester: pytest.Pytester, *arguments: str) -> pytest.RunResult:
    pytester.makepyfile(their_kernels=TARGETS)
    pytester.syspathinsert()
    pytester.syspathinsert(Path(__file__).parent)
    installed = any(plugin.value == "_advance_step_pytest" for plugin in entry_points(group="pytest11"))
    return pytester.runpytest_inprocess(*([] if installed else ["-p", "_advance_step_pytest"]), "-v", *arguments)


def test_a_test_per_clause(pytester: pytest.Pytester) -> None:
    arguments = (
        "--advance-step-target=their_kernels:fine",
        "--advance-step-contract=eagle",
        "--advance-step-skip=no-rows",
    )
    result = run(pytester, *arguments)
    result.assert_outcomes(passed=len(clauses("eagle")) - 1, skipped=1)
    lines = [
        f"advance-step/eagle::{name} {'SKIPPED (by request)' if name == 'no-rows' else 'PASSED'}*"
        for name in clauses("eagle")
    ]
    result.stdout.fnmatch_lines(lines)


def test_a_failure_names_the_deviation_and_the_sentence(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs="def test_own(): pass\ndef test_other(): pass")
    result = run(pytester, "--advance-step-target=their_kernels:row_0", "--advance-step-contract=vllm", "-k", "own")
    result.assert_outcomes(passed=1, failed=1, deselected=len(clauses("vllm")))
    result.stdout.fnmatch_lines(
        [
            "test_theirs.py::test_own PASSED*",
            "advance-step/vllm::own-row-of-the-table FAILED*",
            "slot_mapping?1? is *, expected * (4 of 6 cells wrong)",
            "  known deviation: only row 0 has the right page",
            "  the contract says: slot_mapping?i? = block_tables?i, p // block_size? * block_size*",
        ]
    )


def test_without_the_option_nothing_is_added(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(test_theirs="def test_own(): pass")
    run(pytester).assert_outcomes(passed=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--advance-step-target=their_kernels:fine"], "--advance-step-target needs --advance-step-contract"),
        (
            ["--advance-step-target=their_kernels:fine", "--advance-step-contract=eagel"],
            "contract: expected one of npu*",
        ),
        (["--advance-step-target=their_kernels", "--advance-step-contract=eagle"], "expected package.module:function*"),
        (["--advance-step-target=no_such:f", "--advance-step-contract=eagle"], "No module named 'no_such'"),
        (["--advance-step-target=their_kernels:f", "--advance-step-contract=eagle"], "*has no attribute 'f'"),
        (
            ["--advance-step-target=their_kernels:fine", "--advance-step-contract=eagle", "--advance-step-skip=all"],
            "skip: expected clauses of eagle: *; got all",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(pytester: pytest.Pytester, arguments: list[str], message: str) -> None:
    result = run(pytester, *arguments)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"ERROR: *{message}"])


def test_the_plugin_does_not_import_torch() -> None:
    code = "import sys, _advance_step_pytest; print('torch' in sys.modules, 'advance_step' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
