"""A kernel on its way to an NPU, as far as it goes without CANN: Triton's IR, triton-ascend's linalg ("ttadapter"),
BiShengIR before it becomes HIVM ("hfusion"), and the HIVM that CANN's hivmc would be given.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime import driver
from triton.runtime.jit import JITFunction

BISHENG = Path(triton.__file__).parents[1] / "ascendnpuir/bin"
CHIPS = ("Ascend910B1", "Ascend910_9382")  # Atlas A2 and A3
TARGET = GPUTarget("npu", CHIPS[0], 0)
# As triton-ascend calls it; the last two for the IR before HIVM to be printed whole.
OPTIONS = [
    *("--enable-auto-multi-buffer=True", "--enable-auto-bind-sub-block=True", "--enable-hfusion-compile=true"),
    *("--enable-hivm-compile=true", "--enable-triton-kernel-compile=true", "--mlir-disable-threading"),
    *("--mlir-print-ir-module-scope", "--mlir-print-ir-before=convert-hfusion-to-hivm"),
]


class Binary(NamedTuple):
    """What triton-ascend would compile: a kernel with the types of its arguments and its constants."""

    module: str
    name: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]

    def __str__(self) -> str:
        types = "-".join(kind.strip("*") for _, kind in self.signature if kind.startswith("*"))
        return "-".join([self.name, types, *(name for name, value in self.constants if value is True)])


class Lowered(NamedTuple):
    ttadapter: str
    hfusion: str
    hivm: dict[str, str]  # by chip


class Absent:
    """As much of a driver as triton-ascend asks before it compiles: an NPU, which is not here."""

    get_current_target = staticmethod(lambda: TARGET)
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)


@contextmanager
def binaries() -> Iterator[dict[Binary, None]]:
    """The binaries that the calls in this context would compile; they are not, and nothing is launched."""
    wanted: dict[Binary, None] = {}

    def keep(key: str, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        function = fn.jit_function
        constants = tuple(compile["constants"].items())
        wanted[Binary(function.fn.__module__, function.__name__, tuple(compile["signature"].items()), constants)] = None
        return True

    JITFunction.cache_hook = staticmethod(lambda repr, **kwargs: keep(**kwargs))
    driver.set_active(Absent)
    try:
        yield wanted
    finally:
        JITFunction.cache_hook = None
        driver.reset_active()


def ttadapter(kernel: JITFunction, signature: dict[str, str], constants: dict[str, Any]) -> str:
    """What triton-ascend makes of a kernel: linalg on tensors, and copies between them and memory."""
    backend = make_backend(TARGET)
    options = backend.parse_options({})
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source = ASTSource(kernel, signature, constants)
    module = source.make_ir(options, backend.get_codegen_implementation(), backend.get_module_map(), context)
    stages: dict[str, Callable[[Any, Any], Any]] = {}
    backend.add_stages(stages, options)
    metadata = {"hash": "", "target": TARGET, **vars(options)}
    return stages["ttadapter"](stages["ttir"](module, metadata), metadata)


def bisheng(ttadapter: str, chip: str) -> tuple[str, str]:
    """bishengir-compile up to where it calls hivmc: the IR before HIVM, and the HIVM.

    Raises:
        RuntimeError: it refused the kernel.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, kept = Path(folder, "kernel.mlir"), Path(folder, "kept")
        source.write_text(re.sub(r', mix_mode\s*=\s*"[^"]*"', "", ttadapter))  # as triton-ascend gives it
        ran = subprocess.run(
            [
                *(BISHENG / "bishengir-compile", source, f"--target={chip}", *OPTIONS),
                *(f"--save-temps={kept}", "-o", Path(folder, "kernel")),
            ],
            capture_output=True,
            text=True,
            cwd=folder,
            env=os.environ | {"PATH": f"{Path(__file__).parent}:{os.environ['PATH']}"},  # hivmc's stub
        )
        dumps = re.split(r"^// -----// IR Dump Before .*? //----- //\n", ran.stderr, flags=re.M)
        if ran.returncode or len(dumps) < 2 or not (kept / "module.hivm.opt.mlir").exists():
            raise RuntimeError(f"bishengir-compile --target={chip}: {dumps[0] or dumps[-1][-2000:]}")
        return dumps[1], (kept / "module.hivm.opt.mlir").read_text()


def lower(binary: Binary) -> Lowered:
    """A binary at every level, for both chips."""
    kernel = getattr(importlib.import_module(binary.module), binary.name)
    linalg = ttadapter(kernel, dict(binary.signature), dict(binary.constants))
    results = {chip: bisheng(linalg, chip) for chip in CHIPS}
    return Lowered(linalg, results[CHIPS[0]][0], {chip: hivm for chip, (_, hivm) in results.items()})
