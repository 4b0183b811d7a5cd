"""One decode step on the device, and two ways to run it: as it stands, or captured in CUDA graphs."""

import time
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from advance_step import DecodeState, RowStatus, warmup
from advance_step.decode.forward import Forward
from advance_step.decode.sampling import Sampler

# torch.compile takes sizes 0 and 1 for constants, so a table whose width shall vary never has one column.
MIN_PAGES = 2


class Step:
    """The model on the rows as the state has them, the sampling, and the advance: device work only.

    What it needs keeps its address, so that it can be captured; `logits` may be replaced by a compiled one.
    """

    def __init__(self, forward: Forward, state: DecodeState, sampler: Sampler) -> None:
        self.forward = forward
        self.logits = forward.step
        self.state = state
        self.sampler = sampler
        self.advance_seconds = 0.0  # of the host; meaningless where the device lags behind

    def __call__(self, rows: int, pages: int) -> None:
        """One step of rows [0, rows), of whose tables the first `pages` columns are read."""
        self.sample(rows, pages)
        begin = time.perf_counter()
        self.state.advance_until_stop(slice(rows))
        self.advance_seconds += time.perf_counter() - begin

    def sample(self, rows: int, pages: int) -> None:
        """What comes after each row's current token, into the state's `sampled`."""
        logits = self.logits(*self.inputs(rows, pages))
        self.state.sampled[:rows] = self.sampler.sample(logits, slice(rows))

    def inputs(self, rows: int, pages: int) -> list[Tensor]:
        """The arguments of `logits`."""
        state = self.state
        return [
            state.input_tokens[:rows],
            state.input_positions[:rows],
            state.slot_mappings[0][:rows],
            state.seq_lens[:rows],
            state.block_tables[0][:rows, :pages],
        ]


class Steps(Protocol):
    """A way to run the step."""

    def run(self, rows: int, pages: int, steps: int) -> None:
        """`steps` steps of the `rows` live rows, of whose tables `pages` columns are in use."""


class EagerSteps:
    """The step as it stands, on the live rows."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def run(self, rows: int, pages: int, steps: int) -> None:
        for _ in range(steps):
            self.step(rows, pages)


class CapturedSteps:
    """The step in CUDA graphs: for 1, 2, 4, ... rows and, where pages are gathered, for tables of growing width.

    All sizes are captured when the first step of a kind of sampling runs, the largest first: they share its pool of
    memory. A step is then the replay of the next larger size; the rows between are padding.

    compile: compile the model's part before it is captured.
    min_tokens: in the narrowest tables; the graph's width is what every row costs where pages are gathered.
    """

    def __init__(self, step: Step, compile: bool, min_tokens: int = 128) -> None:
        self.step = step
        self.graphs: dict[Any, dict[tuple[int, int], Callable[[], None]]] = {}  # by kind of sampling, by size
        num_seqs, max_pages = step.state.num_seqs, step.state.block_tables[0].shape[1] - 1
        gathers, block_size = step.forward.gathers, step.forward.cache.block_size
        least = max(-(-min_tokens // block_size), MIN_PAGES) if gathers else max_pages
        self.rows, self.pages = doubling(1, num_seqs), doubling(least, max_pages)
        if compile:
            logits = torch.compile(step.logits)  # not fullgraph: the compiler does not know flash-attn's functions
            step.logits = lambda *inputs: logits(*mark_captured(list(inputs), gathers))

    def run(self, rows: int, pages: int, steps: int) -> None:
        mode = self.step.sampler.mode
        if mode.processors:  # they wait for the device
            for _ in range(steps):
                self.step(rows, pages)
            return
        if mode not in self.graphs:
            self.graphs[mode] = self.capture()
        replay = self.graphs[mode][self.fit(rows, pages)]
        for _ in range(steps):
            replay()

    def fit(self, rows: int, pages: int) -> tuple[int, int]:
        """The smallest captured size that holds this one."""
        return next(r for r in self.rows if r >= rows), next(p for p in self.pages if p >= pages)

    def capture(self) -> dict[tuple[int, int], Callable[[], None]]:
        """What replays the step, for each size.

        The step is also run once for each size before it is captured, so that nothing is compiled, loaded or chosen
        while capturing. That must change nothing: every row is frozen meanwhile, and gets back what freezing takes.
        """
        replays: dict[tuple[int, int], Callable[[], None]] = {}
        state = self.step.state
        device = state.status.device
        kept = [(buffer, buffer.clone()) for buffer in (state.status, *state.slot_mappings)]
        state.status.fill_(RowStatus.PADDING)
        with torch.cuda.device(device):
            warmup(device)
            pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            for size in [(rows, pages) for rows in reversed(self.rows) for pages in reversed(self.pages)]:
                with torch.cuda.stream(stream):
                    self.step(*size)
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph, pool=pool, stream=stream):
                    self.step(*size)
                replays[size] = graph.replay
            torch.cuda.current_stream().wait_stream(stream)
        for buffer, values in kept:
            buffer.copy_(values)
        return replays


def mark_captured(inputs: list[Tensor], gathered: bool) -> list[Tensor]:
    """Tell the compiler which sizes vary between captures, so that it compiles once for all, and once for one row."""
    if gathered:
        torch._dynamo.mark_dynamic(inputs[-1], 1)
    for tensor in inputs:
        torch._dynamo.maybe_mark_dynamic(tensor, 0)
    return inputs


def doubling(first: int, last: int) -> list[int]:
    """`first`, twice as much, and so on below `last`, and `last` itself."""
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes
