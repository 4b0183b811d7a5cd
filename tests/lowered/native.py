"""Lowered kernels on this CPU: MLIR's upstream passes to LLVM's dialect, libtriton's LLVM to an object, the linker to a
library, and a call of it for each program.
"""

from __future__ import annotations

import ctypes
import functools
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
from arena import Arena
from lowering import BISHENG
from triton._C.libtriton import ir, llvm

PASSES = [
    *("--allow-unregistered-dialect", "--convert-elementwise-to-linalg", "--eliminate-empty-tensors"),
    *("--empty-tensor-to-alloc-tensor", "--one-shot-bufferize=allow-return-allocs-from-loops=true"),
    *("--buffer-deallocation-pipeline", "--convert-bufferization-to-memref", "--convert-linalg-to-loops"),
    *("--lower-affine", "--convert-scf-to-cf", "--expand-strided-metadata", "--lower-affine", "--convert-cf-to-llvm"),
    *("--convert-arith-to-llvm", "--convert-index-to-llvm", "--finalize-memref-to-llvm", "--convert-func-to-llvm"),
    *("--convert-arith-to-llvm", "--convert-cf-to-llvm", "--reconcile-unrealized-casts"),
]
WORDS = 128  # that runtime.c passes to a kernel


class WildAccess(RuntimeError):
    """A kernel read or wrote where it has no tensor."""


def build(text: str, library: Path) -> None:
    """Compiles a kernel, as linalg and arith on tensors, to a library of its own."""
    with tempfile.TemporaryDirectory() as folder:
        source, lowered, object_file = (Path(folder, name) for name in ("a.mlir", "b.mlir", "kernel.o"))
        source.write_text(with_cumsum(text))
        ran = subprocess.run(
            [BISHENG / "bishengir-opt", source, *PASSES, "-o", lowered], capture_output=True, text=True
        )
        if ran.returncode:
            raise RuntimeError(f"bishengir-opt: {ran.stderr[:3000]}")
        context = ir.context()
        ir.load_dialects(context)
        module = ir.parse_mlir_module(str(lowered), context)
        module.context = context
        llvm.init_targets()
        code = str(llvm.to_module(module, llvm.context()))
        object_file.write_bytes(llvm.translate_to_asm(code, "x86_64-unknown-linux-gnu", "", "", [], False, True))
        subprocess.run(["cc", "-shared", "-o", library, object_file], check=True)


@functools.cache
def runtime() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "runtime.so")
        subprocess.run(
            ["cc", "-O1", "-shared", "-fPIC", "-o", library, Path(__file__).with_name("runtime.c")], check=True
        )
        return ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)  # the kernels' libraries call memrefCopy


class Kernel:
    """A kernel's library, and what its text says of its parameters."""

    def __init__(self, text: str, library: Path) -> None:
        runtime()
        head = text[text.index("func.func @") :]
        self.name = re.match(r"func\.func @(\w+)\(", head)[1]
        self.kinds = re.findall(r"%arg\d+: (memref<\?x\w+>|\w+)", head[: head.index(") attributes")])
        self.function = getattr(ctypes.CDLL(str(library)), self.name)

    def run(self, grid: tuple[int, ...], args: list[Any]) -> None:
        """Every program of the grid, in order, with the tensors among `args` between guard pages."""
        grid = (*grid, 1, 1, 1)[:3]
        hidden = self.kinds.index("memref<?xi8>")  # two of them, workspaces, after what else there is before our own
        with Arena() as arena:
            values = [0] * hidden + [0, 0]
            values += [arena.pointer(arg) if isinstance(arg, torch.Tensor) else arg for arg in args]
            kinds = self.kinds[:-6]  # the last are the grid and the program
            words: list[int] = []
            for kind, value in zip(kinds, values, strict=True):
                words += [value, value, 0, 1 << 40, 1] if kind.startswith("memref") else [value]
            count = len(words)
            words += [0] * (WORDS - count)
            where = ctypes.c_void_p()
            wild = runtime().run_grid(
                self.function, (ctypes.c_int64 * WORDS)(*words), count, (ctypes.c_int32 * 3)(*grid), ctypes.byref(where)
            )
        if wild:
            raise WildAccess(f"{self.name}: a wild access at {where.value or 0:#x}")


def cumsum(result: str, tensor: str, size: str, kind: str) -> str:
    """The running sum of a tensor, as a loop; triton-ascend leaves it a call, BiShengIR an operator of its own."""
    return f"""%one_{result} = arith.constant 1 : index
      %end_{result} = arith.constant {size} : index
      %zero_{result} = arith.constant 0 : index
      %sum_{result} = arith.constant 0 : {kind}
      %both_{result}:2 = scf.for %i = %zero_{result} to %end_{result} step %one_{result}
          iter_args(%t = %{tensor}, %s = %sum_{result}) -> (tensor<{size}x{kind}>, {kind}) {{
        %e = tensor.extract %{tensor}[%i] : tensor<{size}x{kind}>
        %u = arith.addi %s, %e : {kind}
        %v = tensor.insert %u into %t[%i] : tensor<{size}x{kind}>
        scf.yield %v, %u : tensor<{size}x{kind}>, {kind}
      }}
      %{result} = tensor.cast %both_{result}#0 : tensor<{size}x{kind}> to tensor<{size}x{kind}>"""


def with_cumsum(text: str) -> str:
    call = r"%(\w+) = func\.call @triton_cumsum_\d+\(%(\w+), %\w+, %\w+\) : \(tensor<(\d+)x(\w+)>, i32, i1\) -> \S+"
    text = re.sub(call, lambda match: cumsum(*match.groups()), text)
    return re.sub(r".*func\.func private @triton_cumsum_\d+.*\n", "", text)
