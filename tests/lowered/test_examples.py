"""The Ascend scripts of examples/, unmodified, on the emulated device, on what its kernels were lowered to."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

from advance_step import _backends
from advance_step.ascend import emulation

EXAMPLES = Path(__file__).parents[2] / "examples/ascend"


@pytest.fixture(scope="session")
def emulated_npu() -> None:
    """An NPU whose memory is the CPU's, and the Triton kernels for the CPU's tensors."""
    _backends._attach_triton("cpu", "CPU")
    emulation.enable()


@pytest.mark.parametrize(
    ("script", "launches"),
    [
        ("plain.py", ["plain_kernel"]),
        ("speculative.py", ["speculative_kernel"]),
        ("decode_loop.py", ["plain_kernel"] * 32),
    ],
)
def test_example(script, launches, emulated_npu, as_lowered):
    """A script compares what it got with the contract, or with the CPU's tokens, and exits if they differ."""
    runpy.run_path(str(EXAMPLES / script), run_name="__main__")
    assert as_lowered == launches
