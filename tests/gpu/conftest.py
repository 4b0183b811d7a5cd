"""Where the tests of this folder run: on a GPU, or not at all."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

import advance_step


@pytest.fixture(scope="session", autouse=True)
def device() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    return "cuda"


@pytest.fixture(scope="session", params=["operators", "triton"])
def functions(request: pytest.FixtureRequest, device: str) -> ModuleType:
    """Where a test finds the operators: the public ones, which the native core serves, or Triton's launches."""
    if request.param == "operators":
        return advance_step
    pytest.importorskip("triton", reason="Triton is not installed")
    from advance_step import kernels

    kernels.warmup(device)
    return kernels
