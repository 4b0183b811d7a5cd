"""The CUDA core without a GPU: compiled for two, none of its kernels uses local memory; and those whose threads work
together run on threads of the CPU."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.cpp_extension import CUDA_HOME

ROOT = Path(__file__).parent.parent
NVCC = shutil.which("nvcc") or (CUDA_HOME and shutil.which("nvcc", path=f"{CUDA_HOME}/bin"))
KERNELS = {  # kernel and what runs in it: how many mixes of dtypes it is compiled for
    ("advance_rows", "PlainStep"): 2**3,  # lengths, pages, sampled tokens
    ("advance_rows", "SpeculativeStep"): 1,
    ("advance_rows", "EagleStep"): 2**3,  # positions, lengths, pages
    ("advance_rows", "UntilStopStep"): 2,  # for one KV group and for several; decides on dtypes at run time
    ("advance_rows", "SlotMappingStep"): 2**2,  # positions, pages
    ("advance_and_scan", "PlainStep"): 2**3,
    ("copy_pages", "FlashInferPages"): 2,  # pages
}


class Kernel(NamedTuple):
    target: str
    name: tuple[str, str]
    registers: int
    local_bytes: int  # stack frame and spills


def setup_flags() -> list[str]:
    """FLAGS of setup.py, which cannot be imported: it runs."""
    for node in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "FLAGS":
            return [flag for flag in ast.literal_eval(node.value) if flag != "-shared"]
    raise AssertionError("setup.py has no FLAGS")


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> list[Kernel]:
    """Every kernel as the assembler for sm_80 and sm_90 reports it."""
    if not NVCC:
        pytest.skip("nvcc is not on PATH")
    include = Path(torch.__file__).parent / "include"
    command = [
        *(NVCC, *setup_flags(), "-DUSE_CUDA", f"-I{include}", "-Xcompiler=-fPIC,-fvisibility=hidden", "--threads=2"),
        *("-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=sm_90", "-Xptxas=-v"),
        *("-c", str(ROOT / "src/advance_step/csrc/cuda.cu"), "-o", str(tmp_path_factory.mktemp("nvcc") / "cuda.o")),
    ]
    ran = subprocess.run(command, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-4000:]
    assert "warning" not in ran.stderr, ran.stderr[-4000:]
    entries = ran.stderr.split("Compiling entry function ")[1:]
    return [parsed(entry) for entry in entries]


def parsed(entry: str) -> Kernel:
    """One entry function of ptxas's report, as 'MANGLED' for 'sm_90' ... 0 bytes stack frame ... Used 20 registers."""
    mangled, target = re.match(r"'(\w+)' for '(\w+)'", entry).groups()
    kernel, length, rest = re.search(r"\d(advance_rows|advance_and_scan|copy_pages)INS_(\d+)(\w+)", mangled).groups()
    local = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", entry).groups()
    registers = re.search(r"Used (\d+) registers", entry)[1]
    return Kernel(target, (kernel, rest[: int(length)]), int(registers), sum(map(int, local)))


def test_kernels_are_the_expected_ones(kernels, capsys):
    found = Counter((kernel.target, kernel.name) for kernel in kernels)
    assert found == {(target, name): n for target in ("sm_80", "sm_90") for name, n in KERNELS.items()}
    registers, local_bytes = defaultdict(list), Counter()
    for kernel in kernels:
        registers[kernel.target, kernel.name].append(kernel.registers)
        local_bytes[kernel.target, kernel.name] += kernel.local_bytes
    with capsys.disabled():
        print()
        for (target, name), counts in sorted(registers.items()):
            spread = f"{min(counts)}-{max(counts)}" if min(counts) < max(counts) else counts[0]
            print(f"  {target} {'<'.join(name)}>: {spread} registers, {local_bytes[target, name]} bytes spilled")


def test_no_kernel_uses_local_memory(kernels):
    """A spill, or an array indexed at run time, would put a row's values into device memory."""
    assert {kernel.name: kernel.local_bytes for kernel in kernels if kernel.local_bytes} == {}


def run_on_threads(directory: Path, kernels: str) -> str:
    """What cuda_on_threads.cpp says of these kernels."""
    (directory / "kernels.inc").write_text(kernels)
    flags = ["-std=c++20", "-O1", "-pthread", f"-I{ROOT / 'src/advance_step/csrc'}", f"-I{directory}"]
    program = str(directory / "on_threads")
    built = subprocess.run(["c++", *flags, str(ROOT / "tests/cuda_on_threads.cpp"), "-o", program], capture_output=True)
    if b"barrier" in built.stderr:
        pytest.skip("this compiler has no C++20 barriers")
    assert built.returncode == 0, built.stderr.decode()[-4000:]
    return subprocess.run([program], capture_output=True, text=True).stdout.strip()


@pytest.mark.skipif(not shutil.which("c++"), reason="no compiler")
def test_kernels_whose_threads_work_together(tmp_path):
    source = (ROOT / "src/advance_step/csrc/cuda.cu").read_text()
    kernels = source[source.index("constexpr int kThreads") : source.index("// Makes the tensors' device")]
    assert run_on_threads(tmp_path, kernels) == "right"
    broken = kernels.replace("for (int w = 0; w < warp; ++w)", "for (int w = 0; w < 0; ++w)")  # no warp but its own
    assert run_on_threads(tmp_path, broken).startswith("wrong at 33 rows")


def test_the_report_shows_local_memory():
    entry = """'_ZN12advance_step12advance_rowsINS_15SpeculativeStepEEEvT_l' for 'sm_90'
        ptxas info    : Function properties for _ZN12advance_step12advance_rowsINS_15SpeculativeStepEEEvT_l
            16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
        ptxas info    : Used 255 registers, used 0 barriers, 624 bytes cmem[0]"""
    assert parsed(entry) == Kernel("sm_90", ("advance_rows", "SpeculativeStep"), 255, 28)
