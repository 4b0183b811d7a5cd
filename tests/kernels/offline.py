"""Triton without a device: which binaries a call asks for, and their compilation for devices that are not here."""

from __future__ import annotations

import contextlib
import importlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Binary(NamedTuple):
    """What Triton would compile: a kernel with the types and specialised values of its arguments."""

    kernel: Any
    signature: tuple[tuple[str, str], ...]
    attributes: str  # of the arguments, such as ((3,), [["tt.divisibility", 16]])
    constants: tuple[tuple[tuple[int, ...], Any], ...]  # the constexpr parameters, by their place
    num_warps: int

    def job(self, target: str) -> tuple[Any, ...]:
        """What `spilled_once_compiled` takes in another process, to which a kernel goes by its name."""
        names = self.kernel.fn.__module__, self.kernel.fn.__name__
        return *names, self.signature, self.constants, self.num_warps, target


def spilled_once_compiled(job: tuple[Any, ...]) -> int:
    module, name, signature, constants, num_warps, target = job
    source = ASTSource(getattr(importlib.import_module(module), name), dict(signature), dict(constants))
    return spilled(triton.compile(source, target=TARGETS[target], options={"num_warps": num_warps}))


def spilled(compiled: Any) -> int:
    """Bytes a thread that the binary keeps in local memory for want of registers."""
    if "amdgcn" in compiled.asm:
        return int(re.search(r"\.private_segment_fixed_size: *(\d+)", compiled.asm["amdgcn"])[1])
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+) .*LOCAL:(\d+)", usage).groups()
    return int(stack) + int(local)


class Absent:
    """As much of a driver as Triton asks before it compiles: a device of `target`, which is not here."""

    def __init__(self, target: GPUTarget) -> None:
        self.get_current_target = lambda: target
        self.get_current_device = lambda: f"absent {target}"  # Triton keeps the binaries by device
        self.get_current_stream = lambda device: 0


@contextlib.contextmanager
def binaries(target: GPUTarget) -> Iterator[set[Binary]]:
    """The binaries that the calls in this context would compile for `target`; they are not, and nothing is launched."""
    wanted: set[Binary] = set()
    keys: set[tuple[Any, str]] = set()

    def keep(key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        (attributes,) = compile["configs"]
        kernel, signature = fn.jit_function, tuple(compile["signature"].items())
        wanted.add(
            Binary(kernel, signature, str(attributes), tuple(compile["constants"].items()), compile["num_warps"])
        )
        keys.add((kernel, key))
        return True

    before, hook = driver._active, triton.knobs.runtime.jit_cache_hook
    driver.set_active(Absent(target))
    triton.knobs.runtime.jit_cache_hook = keep
    try:
        yield wanted
    finally:
        driver._active, triton.knobs.runtime.jit_cache_hook = before, hook
    assert len(keys) == len(wanted)  # Triton's own key tells no more binaries apart than `Binary` does
