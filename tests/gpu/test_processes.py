"""What takes a process of its own: the other executors, ADVANCE_STEP_CHECK=1, and compute-sanitizer."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from gpu_calls import CALLS, draw_call, function, on
from test_contracts import CLAUSES

HERE = Path(__file__).parent
# Refused on the host whatever the device; on a GPU these alone need the values.
OUT_OF_PLACE = """
import torch, advance_step
tokens, positions, slots = (torch.zeros(4, dtype=torch.int64, device="cuda") for _ in range(3))
lens = torch.tensor([1, 2, 64, 3], device="cuda")
table = torch.zeros(4, 4, dtype=torch.int64, device="cuda")
try:
    advance_step.advance_step_flashattn(4, 4, 16, tokens, tokens.clone(), positions, lens, slots, table)
except ValueError as error:
    print(str(error).splitlines()[0])
print(lens.tolist(), slots.tolist())
"""


def python(*command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *command], cwd=HERE, env=os.environ | environment, capture_output=True, text=True
    )


@pytest.mark.parametrize(("backend", "check"), [("triton", "0"), ("reference", "0"), ("", "1")])
def test_contracts_hold(device, backend, check):
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed")
    ran = python(
        *("-m", "pytest", "-q", "-p", "no:cacheprovider", "test_contracts.py"),
        ADVANCE_STEP_BACKEND=backend,
        ADVANCE_STEP_CHECK=check,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) == 2 * len(CLAUSES) + 1


def test_a_value_out_of_place_is_an_error_where_it_is_asked_for(device):
    """As on the CPU: the argument, the row, nothing written. Unasked, the row gets the pad slot."""
    checked = python("-c", OUT_OF_PLACE, ADVANCE_STEP_CHECK="1").stdout.splitlines()
    assert "seq_lens" in checked[0] and "got position 64 in row 2" in checked[0]
    assert checked[1] == "[1, 2, 64, 3] [0, 0, 0, 0]"
    unchecked = python("-c", OUT_OF_PLACE, ADVANCE_STEP_CHECK="0").stdout.splitlines()
    assert unchecked == ["[2, 3, 65, 4] [1, 2, -1, 3]"]


def test_nothing_is_compiled_after_warmup(device):
    """Triton's own hook is asked before every compilation; it hears of none, whatever the sizes, strides and dtypes."""
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    from advance_step import kernels

    compiled = []

    def hook(*_, **told):
        compiled.append(told["repr"])

    def run_all(rows):
        for call, (_, bits) in CALLS.items():
            for mix in range(2**bits):
                for spread in (True, False):
                    arguments = on(device, draw_call(call, rows, mix, spread=spread, margin=rows % 5))
                    function(kernels, call)(**arguments)

    kernels.warmup(device)
    triton.knobs.runtime.jit_cache_hook = hook
    try:
        for rows in (1, 2, 16, 17, 130):
            run_all(rows)
        assert compiled == []
        kernels.plain.plain_kernel.device_caches.clear()  # and the hook does hear of one
        kernels.warmup(device)
        assert compiled
    finally:
        triton.knobs.runtime.jit_cache_hook = None


@pytest.mark.parametrize("tool", ["memcheck --report-api-errors no", "racecheck", "synccheck"])
def test_compute_sanitizer_is_clean(device, tool):
    """Every tensor an allocation of its own (no caching), so that a byte past its end is seen.

    Calls of CUDA's interface that fail are torch's and Triton's own probing; one of ours would raise.
    """
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on PATH")
    ran = subprocess.run(
        [sanitizer, "--tool", *tool.split(), "--error-exitcode", "9", sys.executable, "sanitize_me.py"],
        cwd=HERE,
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    assert re.search(r"ran (\d+) calls", ran.stdout), ran.stdout[-2000:]
