"""Which executor serves which device: native where it is built, then Triton, then the reference.

The native core attaches its kernels to the dispatcher as it is loaded; Triton's are attached here, to the devices that
the core leaves out; the reference is what is left (`_schema.py`). ``ADVANCE_STEP_BACKEND=native|triton|reference``
forces one for the whole process.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

from advance_step import _schema
from advance_step.errors import CHECK_VALUES

FORCED = os.environ.get("ADVANCE_STEP_BACKEND", "")
DEVICES = {"cpu": "CPU", "cuda": "CUDA", "xpu": "XPU", "npu": "PrivateUse1"}  # torch's dispatch key of each

_native_off = ""  # why the native core is off, or ""
_triton_on: list[str] = []  # the devices that Triton serves


def load() -> None:
    """Attaches the kernels; called once, on import."""
    global _native_off
    if FORCED not in ("", "native", "triton", "reference"):
        raise ValueError(f"ADVANCE_STEP_BACKEND: expected native, triton, reference or nothing, got {FORCED!r}")
    _native_off = f"ADVANCE_STEP_BACKEND={FORCED}" if FORCED in ("triton", "reference") else _load_native()
    if FORCED == "native" and _native_off:
        raise ImportError(f"ADVANCE_STEP_BACKEND=native: {_native_off}")
    if FORCED in ("", "triton"):
        for device, key in DEVICES.items():
            if not _has_kernel(key) and not _triton_off(device):
                _attach_triton(device, key)
    if FORCED == "triton" and not _triton_on:
        reasons = "; ".join(f"{device}: {_triton_off(device)}" for device in DEVICES)
        raise ImportError(f"ADVANCE_STEP_BACKEND=triton, but Triton can serve no device here ({reasons})")


def backend_info() -> dict[str, Any]:
    """Versions, and for each device which executor serves it and why.

    Example:
        >>> from advance_step import backend_info
        >>> backend_info()["devices"]["cpu"]["executor"] in ("native", "triton", "reference")
        True
    """
    from advance_step import __version__

    return {
        "advance_step": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "forced": FORCED or None,
        "devices": {device: _served_by(device, key) for device, key in DEVICES.items()},
    }


def describe() -> str:
    """Versions, then a line per device: what serves it, and why."""
    found = backend_info()
    lines = [f"advance-step {found['advance_step']}, torch {found['torch']}, Python {found['python']}"]
    if found["forced"]:
        lines[0] += f", ADVANCE_STEP_BACKEND={found['forced']}"
    lines += [f"{device:<5} {by['executor']:<10} {by['why']}" for device, by in found["devices"].items()]
    return "\n".join(lines)


def warmup(device: torch.device | str | int) -> None:
    """Compiles ahead whatever serving on `device` would compile: all of Triton's kernels where Triton serves it.

    The native core and the reference compile nothing. Call it once on each device, before a graph is captured there.
    """
    if torch.device(device).type in _triton_on:
        from advance_step import kernels

        kernels.warmup(device)


def check_device(device: str) -> None:
    """ValueError for a device that this torch does not have here."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch says either, in words of its own
        raise ValueError(f"no device {device!r}: {str(error).splitlines()[0]}") from None


def _served_by(device: str, key: str) -> dict[str, str]:
    if device in _triton_on:
        return {"executor": "triton", "why": f"no native core: {_native_off or _no_kernels(device)}"}
    if _has_kernel(key):
        return {"executor": "native", "why": f"the core has kernels for {device}"}
    native = _native_off or _no_kernels(device)
    triton = _triton_off(device) if FORCED != "reference" else _native_off
    return {"executor": "reference", "why": f"no native core: {native}; no Triton: {triton}"}


def _no_kernels(device: str) -> str:
    checks = " (ADVANCE_STEP_CHECK=1: it never looks at values)" if device == "cuda" and CHECK_VALUES else ""
    return f"the core brings nothing for {device}{checks}"


def _has_kernel(key: str) -> bool:
    name = _schema.name_of(_schema.OPERATORS[0])
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"advance_step::{name}", key)


def _load_native() -> str:
    """Loads the core; returns why that was not possible, or ""."""
    cores = [path for path in Path(__file__).parent.glob("_C.*") if path.suffix in (".so", ".pyd")]
    if not cores:
        return "not built (ADVANCE_STEP_BUILD=1 at install builds it, or says what is missing)"
    try:
        torch.ops.load_library(cores[0])
    except OSError as error:
        warnings.warn(
            f"advance_step: {cores[0].name} does not load with torch {torch.__version__}: {error}", stacklevel=4
        )
        return f"{cores[0].name} does not load: {error}"
    return ""


def _triton_off(device: str) -> str:
    """Why Triton cannot serve the device, or ""."""
    if not _installed("triton"):
        return "triton is not installed"
    if device == "cpu":
        if FORCED == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
            return ""
        return "on a CPU Triton is for tests (ADVANCE_STEP_BACKEND=triton TRITON_INTERPRET=1)"
    if device == "cuda":
        return "" if torch.version.cuda or torch.version.hip else "this torch has no CUDA or ROCm"
    if device == "xpu":
        return "" if torch.xpu._is_compiled() else "this torch has no XPU"
    return "" if _installed("torch_npu") else "torch_npu is not installed"


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # a placeholder in sys.modules, which has no __spec__: engines leave such
        return False


def _attach_triton(device: str, key: str) -> None:
    for operator in _schema.OPERATORS:
        name = _schema.name_of(operator)

        def kernel(*args: Any, _name: str = name, **kwargs: Any) -> None:
            from advance_step import kernels  # imports triton; warmup() does so ahead of the first call

            getattr(kernels, _name)(*args, **kwargs)

        _schema.LIBRARY.impl(name, _schema.checked(operator, kernel), key)
    _triton_on.append(device)
