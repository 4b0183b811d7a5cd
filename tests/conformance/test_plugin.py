"""`pytest --advance-step-target=...`, in a pytest of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from advance_step.conformance import clauses

HERE = Path(__file__).parent
TARGETS = "import wrong, right\nrow_0 = right.implementation('vllm', wrong.row_0_slot)\nfine = right.implementation('eagle')\n"


def run(directory: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (directory / "kernels.py").write_text(f"import sys\nsys.path.append({str(HERE)!r})\n{TARGETS}")
    plugin = [] if "advance-step" in registered(directory) else ["-p", "_advance_step_pytest"]
    command = [sys.executable, "-m", "pytest", *plugin, "-v", *arguments]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True)


def registered(directory: Path) -> str:
    """pytest's help, which shows the plugin where the package is installed with its entry point."""
    command = [sys.executable, "-m", "pytest", "--help"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True).stdout


def test_a_test_per_clause(tmp_path: Path) -> None:
    arguments = ("--advance-step-target=kernels:fine", "--advance-step-contract=eagle", "--advance-step-skip=no-rows")
    done = run(tmp_path, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    for name in clauses("eagle"):
        outcome = "SKIPPED" if name == "no-rows" else "PASSED"
        assert f"advance-step/eagle::{name} {outcome}" in done.stdout
    assert f"{len(clauses('eagle')) - 1} passed, 1 skipped" in done.stdout


def test_a_failure_names_the_deviation_and_the_sentence(tmp_path: Path) -> None:
    (tmp_path / "test_own.py").write_text("def test_own():\n    pass\n")
    done = run(
        tmp_path, "--advance-step-target=kernels:row_0", "--advance-step-contract=vllm", "-k", "own"
    )
    assert done.returncode == 1
    assert "advance-step/vllm::own-row-of-the-table FAILED" in done.stdout
    assert "test_own.py::test_own PASSED" in done.stdout
    assert "known deviation: only row 0 has the right page" in done.stdout
    assert "the contract says: slot_mapping[i] = block_tables[i, p // block_size] * block_size" in done.stdout
    assert "1 failed, 1 passed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--advance-step-target=kernels:fine"], "--advance-step-target needs --advance-step-contract"),
        (["--advance-step-target=kernels:fine", "--advance-step-contract=eagel"], "contract: expected one of npu, vllm"),
        (["--advance-step-target=kernels", "--advance-step-contract=eagle"], "expected package.module:function"),
        (["--advance-step-target=no_such:f", "--advance-step-contract=eagle"], "No module named 'no_such'"),
        (
            ["--advance-step-target=kernels:fine", "--advance-step-contract=eagle", "--advance-step-skip=all"],
            "got all",
        ),
    ],
)
def test_what_cannot_be_run_is_refused(tmp_path: Path, arguments: list[str], message: str) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 4
    assert message in done.stderr + done.stdout


def test_the_plugin_does_not_import_torch() -> None:
    code = "import sys, _advance_step_pytest; print('torch' in sys.modules, 'advance_step' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
