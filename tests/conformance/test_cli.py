"""`advance-step conformance` as a user types it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer", reason="the commands need the extra [cli]")


def advance_step(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "advance_step", "conformance", *arguments]
    return subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True)


@pytest.mark.parametrize(("target", "status"), [("wrong:right_eagle", 0), ("wrong:eagle_without_a_guard", 1)])
def test_target(target: str, status: int) -> None:
    done = advance_step("--target", target, "--contract", "eagle", "--skip", "no-rows", "--skip", "advances")
    assert done.returncode == status, done.stderr
    lines = done.stdout.splitlines()
    found = [line.split() for line in lines]
    assert ["advances", "skipped", "by", "request"] in found
    assert ["page-boundary", "holds"] in found
    fails = any(line.startswith("past-the-table") and "last column instead of no page: " in line for line in lines)
    assert fails == bool(status)


def test_what_cannot_be_run_is_said_in_a_line() -> None:
    done = advance_step("--target", "wrong:right_eagle", "--contract", "eagle", "--skip", "no-row")
    assert done.returncode == 1
    assert done.stderr.startswith("advance-step conformance: skip: expected clauses of eagle: ")
    assert done.stderr.count("\n") == 1
