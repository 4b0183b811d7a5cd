"""What two versions of the Triton kernels compile to for GPUs that need not be here: registers, spills, instructions.

    git worktree add build/before <commit>
    python benchmarks/gpu_binaries.py build/before/src    # against src/ beside this file; prints Markdown

Of every kernel the mix of dtypes with most 64-bit integers, and the one with most 32-bit ones, by Triton's offline
compilation for each target. Loads and stores are instructions to global memory in the binary: with a row a thread, what
a row costs, where they do not stand in a loop.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TARGETS = ("sm_80", "sm_90", "gfx942")
COLUMNS = ("registers", "spilled bytes", "instructions", "loads", "stores")


def measured(compiled: Any) -> list[int]:
    """A binary's COLUMNS."""
    import triton
    from offline import spilled

    if "amdgcn" in compiled.asm:
        text = compiled.asm["amdgcn"]
        registers = int(re.search(r"\.vgpr_count: *(\d+)", text)[1])
        code = text[: text.rindex("s_endpgm")]
        names = re.findall(r"^\t([vsdgb][a-z0-9]*_\w+)", code, flags=re.M)
        load, store = r"(global|buffer|flat)_load", r"(global|buffer|flat)_store"
    else:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
            cubin.write(compiled.asm["cubin"])
            cubin.flush()
            command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            command = [triton.knobs.nvidia.nvdisasm.path, "-c", cubin.name]
            text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        registers = int(re.search(r"REG:(\d+)", usage)[1])
        names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", text, flags=re.M)
        names = [name for name in names if name != "NOP"]
        load, store = r"LDG|LD\b", r"STG|ST\b"
    count = [sum(1 for name in names if re.match(how, name)) for how in (load, store)]
    return [registers, spilled(compiled), len(names), *count]


def measure() -> dict[str, list[int]]:
    """COLUMNS by kernel, mix and target, of the advance_step that this process imports."""
    import triton
    from offline import TARGETS as OFFLINE
    from offline import binaries
    from triton.compiler import ASTSource

    from advance_step import kernels

    results = {}
    for target in TARGETS:
        with binaries(OFFLINE[target]) as wanted:
            kernels.warmup("cpu")
        by_kernel: dict[str, list[Any]] = {}
        for binary in wanted:
            by_kernel.setdefault(binary.kernel.__name__, []).append(binary)
        for name, mixes in sorted(by_kernel.items()):
            mixes.sort(key=lambda binary: (str(binary.signature).count("*i64"), str(binary.signature)))
            for mix, binary in {"int32": mixes[0], "int64": mixes[-1]}.items():
                # Kernels had no constants up to ef729bf, where `binaries` gives "{}" for them.
                constants = dict(binary.constants) if isinstance(binary.constants, tuple) else {}
                source = ASTSource(binary.kernel, dict(binary.signature), constants)
                options = {"num_warps": binary.num_warps}
                results[f"{name} | {mix} | {target}"] = measured(
                    triton.compile(source, target=OFFLINE[target], options=options)
                )
    return results


def measure_elsewhere(source: Path) -> dict[str, list[int]]:
    """`measure` in a process that imports the advance_step of `source`, by the tests' tools beside it."""
    path = os.pathsep.join(map(str, [source, source.parent / "tests/kernels"]))
    command = [sys.executable, str(Path(__file__)), "--measure"]
    ran = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(ran.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:] == ["--measure"]:
        print(json.dumps(measure()))
        return
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    before, after = measure_elsewhere(Path(sys.argv[1]).resolve()), measure_elsewhere(ROOT / "src")
    print("| kernel | mix | target | " + " | ".join(COLUMNS) + " |")
    print("| --- " * (3 + len(COLUMNS)) + "|")
    for name, new in after.items():
        old = before.get(name, ["new"] * len(COLUMNS))
        cells = [f"{a}" if a == b else f"{a} → {b}" for a, b in zip(old, new, strict=True)]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
