"""Puts our `npu_advance_step_flashattn` in the place of torch_npu's, for as long as it is asked for.

The replacement is made in torch's dispatcher, at the kernel that serves "npu" tensors. So it holds for
`torch_npu.npu_advance_step_flashattn`, for `torch.ops.npu.npu_advance_step_flashattn` and for every reference to them
that was taken before. It does not hold for what bypasses the dispatcher: C++ code that calls aclnnAdvanceStep itself,
a graph compiled to CANN operators, and the replay of an NPU graph that was captured before.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

import advance_step

_kernel: torch.library.Library | None = None


def patch() -> None:
    """Make `torch_npu.npu_advance_step_flashattn` ours, on real or emulated NPUs; again is no error.

    Imports torch_npu. Our operator on "npu" tensors is the one that `advance_step.backend_info()` names for that
    device. CPU tensors are refused as before.
    """
    global _kernel
    if _kernel is not None:
        return
    importlib.import_module("torch_npu")
    _kernel = torch.library.Library("npu", "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators")  # says that a kernel is overridden
        _kernel.impl(
            "npu_advance_step_flashattn", advance_step.npu_advance_step_flashattn, "PrivateUse1", allow_override=True
        )


def unpatch() -> None:
    """Give torch_npu its own operator back; without a patch, no error."""
    global _kernel
    if _kernel is not None:
        _kernel._destroy()
        _kernel = None


@contextmanager
def patched() -> Iterator[None]:
    """`patch()` for the body of a with statement; inside another patch it changes nothing."""
    if _kernel is not None:
        yield
        return
    patch()
    try:
        yield
    finally:
        unpatch()
