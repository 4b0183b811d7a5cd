"""The operators' tests again, on every executor that did not serve them in this process.

The dispatcher's kernels are attached once per process, so each executor gets one of its own.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import advance_step

FILES = ["test_operators.py", "test_errors.py", "test_schema.py", "test_autograd.py"]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_suite_on(backend):
    if backend == advance_step.backend_info()["devices"]["cpu"]["executor"]:
        pytest.skip(f"{backend} served this whole run")
    if backend == "triton" and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed (it has wheels for Linux only)")
    environment = {"ADVANCE_STEP_BACKEND": backend, "TRITON_INTERPRET": "1" if backend == "triton" else "0"}
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *FILES],
        cwd=Path(__file__).parent,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-2000:]
    passed = int(re.search(r"(\d+) passed", ran.stdout).group(1))
    assert passed > 600, ran.stdout[-500:]
