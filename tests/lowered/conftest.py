"""The kernels as triton-ascend and BiShengIR lower them. `make test-ascend` runs this folder, in their environment.

Every binary of `warmup("npu")` is lowered once a session, two at a time. Then what the kernels were lowered to runs in
Triton's place, on CPU tensors.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hfusion import upstream
from lowering import Binary, Lowered, binaries, lower
from native import Kernel, build
from triton.runtime.jit import JITFunction

os.environ["ADVANCE_STEP_BACKEND"] = "reference"  # leaves the operators' CPU to test_examples.py

from advance_step import kernels
from advance_step.kernels import common

LEVELS = ("ttadapter", "hfusion")
common.TILES["cpu"] = common.TILES["npu"]  # the tensors of these tests are an NPU's

with binaries() as found:
    kernels.warmup("cpu")
BINARIES = sorted(found, key=str)


class Built(NamedTuple):
    lowered: Lowered
    texts: dict[str, str]  # by level, what was compiled for this CPU
    libraries: dict[str, Path]


def build_levels(binary: Binary, folder: Path) -> Built | Exception:
    try:
        lowered = lower(binary)
        texts = {"ttadapter": lowered.ttadapter, "hfusion": upstream(lowered.hfusion)}
        libraries = {level: folder / f"{binary}.{level}.so" for level in LEVELS}
        for level, text in texts.items():
            build(text, libraries[level])
        return Built(lowered, texts, libraries)
    except Exception as error:  # of a test that asks for this binary
        return RuntimeError(f"{binary}: {type(error).__name__}: {error}"[:5000])


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[Binary, Built | Exception]:
    folder = tmp_path_factory.mktemp("lowered")
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = pool.map(build_levels, BINARIES, [folder] * len(BINARIES))
        return dict(zip(BINARIES, made, strict=True))


@pytest.fixture(scope="session", params=LEVELS)
def level(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="session")
def loaded(level: str, built: dict[Binary, Built | Exception]) -> Callable[[Binary], Kernel]:
    """What a binary was lowered to, loaded once; KeyError for a binary that `warmup` leaves out."""

    @functools.cache
    def load(binary: Binary) -> Kernel:
        made = built[binary]
        if isinstance(made, Exception):
            raise made
        return Kernel(made.texts[level], made.libraries[level])

    return load


@pytest.fixture
def as_lowered(loaded: Callable[[Binary], Kernel], monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Within it, launching a kernel runs what it was lowered to; the names of those that were."""
    launched = []

    def run(kernel: JITFunction, *args: Any, grid: tuple[int, ...], warmup: bool, **constants: Any) -> None:
        loaded(binary_of(kernel, args, constants)).run(grid, list(args))
        launched.append(kernel.__name__)

    monkeypatch.setattr(JITFunction, "run", run)
    yield launched


def binary_of(kernel: JITFunction, args: tuple[Any, ...], constants: dict[str, Any]) -> Binary:
    kinds = {torch.int32: "*i32", torch.int64: "*i64"}
    names = [parameter.name for parameter in kernel.params if not parameter.is_constexpr]
    types = [kinds[arg.dtype] if isinstance(arg, torch.Tensor) else "i64" for arg in args]
    return Binary(
        kernel.fn.__module__, kernel.__name__, tuple(zip(names, types, strict=True)), tuple(constants.items())
    )
