"""Brings an exception of a backward pass on "npu" to the caller of `backward()`, where torch 2.13 aborts the process.

While an exception leaves a backward function, autograd's C++ asks the device's guard for its type once more. For a
backend in Python that runs Python with the exception still set, which fails, in a place where C++ may not fail.
"""

from __future__ import annotations

from typing import Any

import torch

_errors: list[BaseException] = []


class BackwardGuard(torch._C._acc.DeviceGuard):
    """The device's guard, which takes aside the exception that is set when it is asked."""

    def type_(self) -> Any:
        try:
            next(iter(()), None)  # raises what is set, as any function does that looks whether it succeeded
        except BaseException as error:
            _errors.append(error)
        return torch._C._autograd.DeviceType.PrivateUse1


def raise_backward_errors() -> None:
    """From here on `backward()` and `grad()` raise what was taken aside, in place of torch's SystemError for it."""
    run_backward = torch.autograd.graph._engine_run_backward

    def run_backward_and_raise(*args: Any, **kwargs: Any) -> Any:
        try:
            return run_backward(*args, **kwargs)
        except SystemError:
            if not _errors:
                raise
            error = _errors.pop()
            _errors.clear()
        raise error

    torch.autograd._engine_run_backward = run_backward_and_raise  # type: ignore[attr-defined]
    torch.autograd.graph._engine_run_backward = run_backward_and_raise
