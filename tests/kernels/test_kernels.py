"""The Triton kernels on a machine without a GPU: interpreted, compiled for GPUs that are not here, and counted."""

from __future__ import annotations

import contextlib
import itertools
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed (it has wheels for Linux only)")
if triton.knobs.runtime.interpret:
    pytest.skip("TRITON_INTERPRET=1, where nothing is compiled", allow_module_level=True)

from offline import TARGETS, binaries, spilled_once_compiled  # noqa: E402

from advance_step import kernels  # noqa: E402
from advance_step.kernels import plain  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

INT32, INT64 = torch.int32, torch.int64
MIXES = {  # how many mixes of dtypes each kernel has
    "plain_kernel": 2**3,
    "speculative_kernel": 1,
    "count_pages_kernel": 2,
    "flashinfer_kernel": 2**3,
    "eagle_kernel": 2**3,
    "until_stop_kernel": 2**5,
    "find_slots_kernel": 2**2,
    "keep_slots_kernel": 1,
    "slot_mapping_kernel": 2**3,
}


def test_interpreted_against_the_reference():
    """Triton reads TRITON_INTERPRET as it is imported, so that this takes a process of its own."""
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "interpreted.py"],
        cwd=Path(__file__).parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "ADVANCE_STEP_BACKEND": "triton"},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", ran.stdout).group(1)) > 370, ran.stdout[-500:]
    assert "skipped" not in ran.stdout


@pytest.fixture(scope="module")
def processes():
    """Two that compile: threads may not, as CPython 3.11's ast.parse, by which Triton compiles, is not safe in them."""
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield pool


@pytest.mark.parametrize("target", TARGETS)
def test_every_binary_compiles_for(target, processes):
    """Every mix of dtypes, none that keeps its rows in memory; and they are what `warmup` asks for."""
    with binaries(TARGETS[target]) as wanted:
        kernels.warmup("cpu")
    assert Counter(binary.kernel.__name__ for binary in wanted) == MIXES
    jobs = [binary.job(target) for binary in wanted]
    spills = dict(zip(wanted, processes.map(spilled_once_compiled, jobs), strict=True))
    # Triton 3.6 and 3.9 spill nothing; 3.7.1, which torch 2.13 asks for, two words in two binaries for sm_90.
    assert max(spills.values()) <= 8, spills


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_serving_compiles_nothing_after_warmup(target):
    """Whatever the sizes, strides, alignments and values, the binaries are those of `warmup`."""
    with binaries(TARGETS[target]) as warmed:
        kernels.warmup("cpu")
    serves = (serve_plain, serve_speculative, serve_flashinfer, serve_eagle, serve_until_stop, serve_slot_mapping)
    for serve in serves:
        with binaries(TARGETS[target]) as served:
            serve()
        assert served
        assert served <= warmed, served - warmed


def test_no_two_threads_compile_at_once():
    """Each of two first calls waits in Triton's hook for the other, and is not to meet it there."""
    meeting, met = threading.Barrier(2), []

    def meet(**_):
        with contextlib.suppress(threading.BrokenBarrierError):
            met.append(meeting.wait(timeout=1))
        return True  # not compiled

    with binaries(TARGETS["sm_90"]), pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.runtime, "jit_cache_hook", meet)
        first_calls = [step(length, INT64, INT64, 2, 0) for length in (INT32, INT64)]
        threads = [threading.Thread(target=plain.advance_step_flashattn, args=call) for call in first_calls]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert meeting.broken and not met


def test_the_count_sees_a_specialisation():
    """The same kernel under plain triton.jit: it would be compiled in the middle of serving."""
    specialised = triton.jit(plain.plain_kernel.fn)
    with binaries(TARGETS["sm_90"]) as served, pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "plain_kernel", specialised)
        serve_plain()
    assert len(served) > 4 * MIXES["plain_kernel"]


# Every size, stride and address that Triton could tell apart: 1, even, a multiple of 16, 64 bits wide.
SIZES = [1, 2, 16, 17, 130]
BLOCK_SIZES = [1, 15, 16, 2**31, 2**40]


def vector(dtype: torch.dtype, size: int, variant: int) -> torch.Tensor:
    """[size], aligned to 16 bytes or to its elements only, contiguous or not."""
    offset, stride = [(0, 1), (1, 1), (0, 16), (1, 3)][variant % 4]
    return torch.zeros(offset + size * stride + 16, dtype=dtype)[offset : offset + size * stride : stride]


def matrix(dtype: torch.dtype, rows: int, columns: int, variant: int) -> torch.Tensor:
    """[rows, columns], contiguous, transposed, shifted; with one row and column also with strides beyond 32 bits."""
    if rows == columns == 1 and variant % 2:
        return torch.zeros(1, dtype=dtype).as_strided((1, 1), (2**40, 2**33))
    if variant % 3 == 0:
        return torch.zeros(rows, columns, dtype=dtype)
    if variant % 3 == 1:
        return torch.zeros(columns, rows, dtype=dtype).t()
    return torch.zeros(rows, columns + 3, dtype=dtype)[:, 1 : columns + 1]


def step(length: torch.dtype, page: torch.dtype, token: torch.dtype, rows: int, variant: int) -> tuple[Any, ...]:
    live = rows if variant % 2 else max(rows - 1, 0)
    state = [vector(INT64, rows, variant + i) for i in range(3)]
    return (
        rows,
        live,
        BLOCK_SIZES[variant % 5],
        state[0],
        vector(token, live, variant) if variant % 2 else matrix(token, live, 1, variant),
        state[1],
        vector(length, rows, variant + 3),
        state[2],
        matrix(page, rows, [0, 1, 16, 33][variant % 4], variant),
    )


def swept(count: int) -> Any:
    """`count` dtypes, a size and a variant of everything else: all of them together."""
    return itertools.product(itertools.product([INT32, INT64], repeat=count), SIZES, range(12))


def serve_plain() -> None:
    for (length, page, token), rows, variant in swept(3):
        plain.advance_step_flashattn(*step(length, page, token, rows, variant))


def serve_speculative() -> None:
    for _, rows, variant in swept(0):
        proposals = 1 + variant % 3
        entries = 1 + proposals
        state = [
            vector(INT64, rows * entries, variant + i) if variant % 2 else matrix(INT64, rows, entries, variant + i)
            for i in range(4)
        ]
        kernels.npu_advance_step_flashattn(
            state[0],
            matrix(INT64, rows, entries, variant),
            *state[1:],
            matrix(INT64, rows, 1 + variant, variant),
            rows,
            rows,
            BLOCK_SIZES[variant % 5],
            spec_token=matrix(INT64, rows, proposals, variant),
            accepted_num=vector(INT64, rows, variant),
        )


def serve_flashinfer() -> None:
    for (length, page, token), rows, variant in swept(3):
        metadata = [vector(INT32, size, variant + i) for i, size in enumerate((16 * rows, rows + 1, rows, rows))]
        kernels.advance_step_flashinfer(*step(length, page, token, rows, variant), *metadata)


def serve_eagle() -> None:
    for (position, length, page), rows, variant in swept(3):
        kernels.eagle_step_update_slot_mapping_and_metadata(
            vector(position, rows, variant),
            matrix(page, rows, 1 + variant, variant),
            vector(length, rows, variant + 1),
            BLOCK_SIZES[variant % 5],
            [1, 2, 4096, 2**31, 2**63 - 1][variant % 5],
            vector(position, rows, variant + 2),
            vector(INT64, rows + 16, variant + 3),
            [None, rows, rows + 16][variant % 3],
        )


def serve_until_stop() -> None:
    for (token, length, count, limit), rows, variant in swept(4):
        groups = range(1 + variant % 4)
        kernels.advance_until_stop(
            vector(INT64, rows, variant),
            vector(token, rows, variant),
            vector(INT64, rows, variant + 1),
            vector(length, rows, variant + 2),
            [vector(INT64, rows, variant + g) for g in groups],
            [matrix([INT32, INT64][(variant + g) % 2], rows, 1 + variant + g, variant) for g in groups],
            [BLOCK_SIZES[(variant + g) % 5] for g in groups],
            vector(INT32, rows, variant + 3),
            matrix(INT64, rows, [0, 1, 16][variant % 3], variant),
            vector(count, rows, variant),
            vector(INT64, [0, 1, 16][variant % 3], variant),
            vector(limit, rows, variant + 1),
            pad_slot=[-1, 0, 1, 16, -(2**63)][variant % 5],
        )


def serve_slot_mapping() -> None:
    for (start, position, page), tokens, variant in swept(3):
        requests = SIZES[variant % 5] - variant % 2
        world_size = [1, 2, 16][variant % 3]
        kernels.compute_slot_mapping(
            vector(start, requests + 1, variant),
            vector(position, tokens, variant + 1),
            matrix(page, requests, [0, 1, 16, 33][variant % 4], variant),
            vector(INT64, tokens + variant % 2, variant + 2),
            BLOCK_SIZES[variant % 5],
            cp_world_size=world_size,
            cp_rank=world_size - 1,
            cp_interleave=BLOCK_SIZES[variant % 5],
            pad_slot=[-1, 0, 16, 2**40][variant % 4],
        )
