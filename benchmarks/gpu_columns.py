"""The ways to advance a batch on a GPU that operator_gpu.py times against each other."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.cpp_extension import CUDA_HOME, include_paths, library_paths

import advance_step
from advance_step import _schema, reference

BLOCK_SIZE, WIDTH = 16, 128
ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "benchmarks"
PLAIN, FLASHINFER = "advance_step_flashattn", "advance_step_flashinfer"
EAGLE, UNTIL_STOP = "eagle_step_update_slot_mapping_and_metadata", "advance_until_stop"
SLOTS = "compute_slot_mapping"
Call = Callable[[], object]


class State:
    """A batch of `rows` live rows on the GPU for operator `name`, with room for `steps` steps from reset() on."""

    def __init__(self, name: str, rows: int, steps: int) -> None:
        self.name, self.rows, self.steps = name, rows, steps
        draw = partial(torch.randint, generator=torch.Generator("cuda").manual_seed(rows), device="cuda")
        longs = partial(torch.zeros, dtype=torch.int64, device="cuda")
        ints = partial(torch.zeros, dtype=torch.int32, device="cuda")
        self.start = draw(0, BLOCK_SIZE * WIDTH - steps - 1, (rows,), dtype=torch.int32)
        self.sampled = draw(0, 50_000, (rows, 1))
        self.tables = draw(0, 2**20, (rows, WIDTH), dtype=torch.int32)  # vLLM's slots are 32-bit on the way
        self.tokens, self.positions, self.slots = longs(rows), longs(rows), longs(rows)
        self.lens = self.start.clone()
        self.written = [self.tokens, self.positions, self.slots, self.lens]
        if name == FLASHINFER:
            self.metadata = (ints(rows * WIDTH), ints(rows + 1), ints(rows), ints(rows))
            self.written += self.metadata
        if name == UNTIL_STOP:
            self.status, self.output, self.generated = ints(rows), longs(rows, steps), ints(rows)
            self.written += [self.status, self.output, self.generated]
            self.stops = torch.arange(8, device="cuda") + 2**40  # never sampled
            self.longest = ints(rows) + BLOCK_SIZE * WIDTH
        if name == SLOTS:  # one token of each request
            self.query_start_loc = torch.arange(rows + 1, dtype=torch.int32, device="cuda")

    def reset(self) -> None:
        for tensor in self.written:
            tensor.zero_()
        self.lens.copy_(self.start)
        self.positions.copy_(self.start)

    @property
    def arguments(self) -> tuple[Any, ...]:
        if self.name == EAGLE:
            table = (self.positions, self.tables, self.lens, BLOCK_SIZE, BLOCK_SIZE * WIDTH)
            return (*table, self.positions, self.slots, self.rows)
        if self.name == SLOTS:
            return self.query_start_loc, self.positions, self.tables, self.slots, BLOCK_SIZE
        tensors = (self.tokens, self.sampled, self.positions, self.lens)
        if self.name == UNTIL_STOP:
            groups = ([self.slots], [self.tables], [BLOCK_SIZE])
            return (*tensors, *groups, self.status, self.output, self.generated, self.stops, self.longest)
        step = (self.rows, self.rows, BLOCK_SIZE, *tensors, self.slots, self.tables)
        return (*step, *self.metadata) if self.name == FLASHINFER else step

    def bytes_a_row(self) -> tuple[float, float]:
        """What a step reads and writes of a row; and that with 32 bytes, as the memory moves them, for a page id and
        an output token, which lie alone: no other row's are beside them."""
        pages = float(self.start.float().mean()) / BLOCK_SIZE + 1
        packed, alone = {  # reads, then writes
            PLAIN: ((8 + 4) + (8 + 8 + 4 + 8), [4]),
            EAGLE: ((8 + 4) + (8 + 4 + 8), [4]),
            UNTIL_STOP: ((4 + 8 + 4 + 4 + 4) + (4 + 4 + 8 + 8 + 4 + 8), [4, 8]),
            SLOTS: ((4 + 8) + 8, [4]),
            FLASHINFER: ((8 + 4 + 4 * pages) + (8 + 8 + 4 + 8 + 4 * 3 + 4 * pages), []),
        }[self.name]
        return packed + sum(alone), packed + 32 * len(alone)


def columns(state: State, vllm: dict[str, Callable[[State], Call]]) -> dict[str, Call | None]:
    """Each way to do the state's operator; None: not run here."""

    def bound(function: Callable[..., object]) -> Call:
        return lambda: function(*state.arguments)

    def triton() -> Call:
        from advance_step import kernels

        return bound(getattr(kernels, state.name))

    twin = getattr(reference, f"{state.name}_ref")
    torch._dynamo.reset()
    return {
        "empty kernel": bound(getattr(torch.ops.advance_step_floor, state.name).default),
        "native": bound(getattr(advance_step, state.name)),
        "Triton": triton() if importlib.util.find_spec("triton") else None,
        "eager torch": bound(twin),
        "torch.compile": bound(torch.compile(twin, fullgraph=True, dynamic=False)),
        "vLLM": vllm[state.name](state) if state.name in vllm else None,
    }


def copy(state: State) -> Call:
    """A device-to-device copy that moves the bytes of a step: half of them read, half written."""
    half = int(state.rows * state.bytes_a_row()[1]) // 2
    source, target = (torch.zeros(half, dtype=torch.uint8, device="cuda") for _ in range(2))
    return lambda: target.copy_(source)


def load_floor() -> None:
    """Builds and loads empty.cu."""
    definitions = " ".join(f'm.def("{o.schema}");' for o in _schema.OPERATORS if not o.schema.startswith("npu"))
    BUILD.mkdir(parents=True, exist_ok=True)
    (BUILD / "schemas.h").write_text(f"#define SCHEMAS {definitions}\n")
    stable = ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'src/advance_step/csrc'}"]
    build(Path(__file__).parent / "empty.cu", *stable, "-include", str(BUILD / "schemas.h"))


def load_vllm(sources: list[Path]) -> dict[str, Callable[[State], Call]]:
    """vLLM's own kernels for the operators that one of these checkouts of vLLM has, compiled for the run.

    csrc/prepare_inputs/advance_step.cu (0.9 and before) is called through the dispatcher, as vLLM does but for its
    Python wrapper. vllm/v1/spec_decode/utils.py has the Triton kernel of the eagle step; its launch alone is timed.
    """
    found: dict[str, Callable[[State], Call]] = {}
    for source in sources:
        step, eagle = source / "csrc/prepare_inputs/advance_step.cu", source / "vllm/v1/spec_decode/utils.py"
        if step.exists():
            names = [FLASHINFER] if FLASHINFER in step.read_text() else []
            wrapper = BUILD / "vllm_step.cu"
            state = "Tensor! tokens, Tensor sampled, Tensor! positions, Tensor! lens, Tensor! slots, Tensor tables"
            pages = ", Tensor! indices, Tensor! indptr, Tensor! last, Tensor! bound"
            schema = f"(int num_seqs, int num_queries, int block_size, {state}%s) -> ()"
            lines = [f'#include "{step.resolve()}"', "#include <torch/library.h>", "TORCH_LIBRARY(vllm_step, m) {"]
            for name, extra in [(PLAIN, ""), *((name, pages) for name in names)]:
                lines += [f'm.def("{name}{schema % extra}"); m.impl("{name}", torch::kCUDA, &{name});']
                found[name] = partial(dispatched, name)
            wrapper.write_text("\n".join([*lines, "}\n"]))
            build(wrapper, f"-I{source / 'csrc'}", libraries=["-lc10", "-lc10_cuda"])
        if eagle.exists():
            found[EAGLE] = partial(vllm_eagle, eagle_kernel(eagle))
    return found


def dispatched(name: str, state: State) -> Call:
    operator = getattr(torch.ops.vllm_step, name).default
    return lambda: operator(*state.arguments)


def eagle_kernel(path: Path) -> Any:
    """The one kernel of a file whose imports need all of vLLM, in a file of its own, where Triton reads its source."""
    name = "eagle_step_slot_mapping_metadata_kernel"
    nodes = [node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == name]
    if not nodes:
        sys.exit(f"--vllm-source: {path} has no {name}")
    alone = BUILD / "vllm_eagle.py"
    alone.write_text(f"import triton\nimport triton.language as tl\n\n\n{ast.unparse(nodes[0])}\n")
    spec = importlib.util.spec_from_file_location("vllm_eagle", alone)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)


def vllm_eagle(kernel: Any, state: State) -> Call:
    tensors = (state.positions, state.tables, state.tables.stride(0), state.lens, state.positions, state.slots)
    options = {"block_size": BLOCK_SIZE, "max_model_len": BLOCK_SIZE * WIDTH, "n_blocks_per_req": WIDTH, "PAD_ID": -1}
    return lambda: kernel[(state.rows,)](*tensors, **options, batch_size=state.rows)


def build(source: Path, *flags: str, libraries: list[str] | None = None) -> None:
    """One nvcc command for this GPU, and loads what it makes."""
    major, minor = torch.cuda.get_device_capability()
    library = BUILD / f"{source.stem}.so"
    # torch's headers want cuBLAS's and others', which a toolkit may lack and torch's own dependencies bring.
    include = [*include_paths("cuda"), *Path(torch.__file__).parent.parent.glob("nvidia/*/include")]
    command = [
        *(f"{CUDA_HOME}/bin/nvcc", "-O3", "-std=c++17", "-shared", "-Xcompiler=-fPIC", f"-arch=sm_{major}{minor}"),
        *(*flags, str(source), *(f"-I{path}" for path in include)),
        *(*(f"-L{path}" for path in library_paths("cuda")), "-ltorch_cpu", "-ltorch_cuda", *(libraries or [])),
        *("-o", str(library)),
    ]
    subprocess.run(command, check=True)
    torch.ops.load_library(library)
