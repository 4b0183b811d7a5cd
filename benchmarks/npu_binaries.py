"""What the Triton kernels cost as Ascend's compiler lowers them: rows a program, memory of a core, scalar loops.

    make test-ascend    # makes the environment
    PYTHONPATH=src:tests/lowered .venv-ascend/bin/python benchmarks/npu_binaries.py    # prints Markdown

Of every kernel the mix of dtypes with most 64-bit integers, in HIVM for Ascend910B1: the highest byte that it uses of a
vector core's 192 KiB, and the iterations of its scalar loops, which is how 64-bit arithmetic runs there. A loop whose
length only a call tells (over stop tokens, tiles of a table, requests) counts once, and so do the loops in it.
"""

from __future__ import annotations

import importlib
import re

import torch
from lowering import CHIPS, Binary, binaries, bisheng, ttadapter

from advance_step import kernels
from advance_step.kernels import common

if hasattr(common, "TILES"):  # versions before it had one size of tile for every device
    common.TILES["cpu"] = common.TILES["npu"]


def memory(hivm: str) -> int:
    """The highest byte of the unified buffer that the module takes."""
    constants = dict(re.findall(r"%(c\w+_i64) = arith.constant (\d+) : i64", hivm))
    cast = r"pointer_cast\(%(\w+)(?:, %\w+)*\)(?: \[\])? : memref<((?:\d+x)*)([a-z]+)(\d+), #hivm.address_space<ub>"
    highest = 0
    for offset, shape, _, bits in re.findall(cast, hivm):
        elements = 1
        for size in filter(None, shape.split("x")):
            elements *= int(size)
        highest = max(highest, int(constants.get(offset, 0)) + (elements * int(bits) + 7) // 8)
    return highest


def scalar_iterations(hivm: str, name: str) -> int:
    """The iterations of the loops of the function, those with constant bounds."""
    body = hivm[hivm.index(f"func.func @{name}(") :]
    constants = dict(re.findall(r"%(c\w+) = arith\.constant (-?\d+) : index", body))
    ends = re.findall(r"scf\.for %\w+ = %\w+ to %(\w+) step", body)
    return sum(int(constants.get(end, 1)) for end in ends)


def rows_of(binary: Binary) -> int:
    """Rows of the batch that a program takes at once."""
    constants = dict(binary.constants)
    if constants:
        return constants.get("ROWS") or constants["SCAN_ROWS"]
    module = importlib.import_module(binary.module)
    name = {"count_pages_kernel": "SCAN_ROWS", "flashinfer_kernel": "TILE_ROWS"}.get(binary.name, "ROWS")
    return getattr(module, name).value


def main() -> None:
    with binaries() as wanted:
        kernels.warmup(torch.device("cpu"))
    widest: dict[str, Binary] = {}
    for binary in sorted(wanted, key=lambda binary: str(binary.signature).count("*i64")):
        if ("IN_PLACE", True) not in binary.constants:
            widest[binary.name] = binary
    print("| kernel | rows a program | bytes | scalar iterations a program | a row |\n| --- | --- | --- | --- | --- |")
    for name, binary in sorted(widest.items()):
        kernel = getattr(importlib.import_module(binary.module), name)
        rows = rows_of(binary)
        try:
            _, hivm = bisheng(ttadapter(kernel, dict(binary.signature), dict(binary.constants)), CHIPS[0])
        except RuntimeError as refusal:
            reason = re.search(r"error: (.*overflow.*?)(?:,|$)", str(refusal), flags=re.M)
            print(f"| {name} | {rows} | refused: {reason[1] if reason else refusal} | | |", flush=True)
            continue
        iterations = scalar_iterations(hivm, name)
        print(f"| {name} | {rows} | {memory(hivm):,} | {iterations:,} | {iterations / rows:.0f} |", flush=True)


if __name__ == "__main__":
    main()
