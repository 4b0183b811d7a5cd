"""One decode step on the device, and three ways to run it: eagerly, compiled, or captured in CUDA graphs."""

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from advance_step import DecodeState, RowStatus, warmup
from advance_step.decode.attention import DecodeStep
from advance_step.decode.cache import PagedKVCache
from advance_step.decode.compiled import Argument, compile_whole
from advance_step.decode.paged_kernels import PagedKernel
from advance_step.decode.sampling import Sampler

# torch.compile takes sizes 0 and 1 for constants, so a table whose width shall vary never has one column.
MIN_PAGES = 2

# What stands for any number of each while a CPU's step is compiled: different from each other.
ROWS, COLUMNS, PAGES = 8, 53, 61


class Step:
    """The model on the rows as the state has them, the sampling, and the advance: device work only.

    What it needs keeps its address, so that it can be captured; `forward` may be replaced by a compiled one.
    """

    def __init__(
        self, model: Any, cache: PagedKVCache, state: DecodeState, sampler: Sampler, kernel: PagedKernel | None
    ) -> None:
        self.model = model
        self.cache = cache
        self.state = state
        self.sampler = sampler
        self.kernel = kernel
        self.forward: Callable[..., Tensor] = self.logits
        self.advance_seconds = 0.0  # of the host; meaningless where the device lags behind

    def __call__(self, rows: int, pages: int) -> None:
        """One step of rows [0, rows), of whose tables the first `pages` columns are read."""
        self.sample(rows, pages)
        begin = time.perf_counter()
        self.state.advance_until_stop(slice(rows))
        self.advance_seconds += time.perf_counter() - begin

    def sample(self, rows: int, pages: int) -> None:
        """What comes after each row's current token, into the state's `sampled`."""
        logits = self.forward(*self.inputs(rows, pages))
        self.state.sampled[:rows] = self.sampler.sample(logits, slice(rows))

    def inputs(self, rows: int, pages: int) -> list[Tensor]:
        """The arguments of `forward`."""
        state = self.state
        return [
            state.input_tokens[:rows],
            state.input_positions[:rows],
            state.slot_mappings[0][:rows],
            state.seq_lens[:rows],
            state.block_tables[0][:rows, :pages],
        ]

    def logits(self, *inputs: Tensor) -> Tensor:
        """What the model says after the current token of each row [rows, vocabulary]."""
        return logits_of(self.model, self.cache, self.kernel, *inputs)


def logits_of(
    model: Callable[..., Any],
    cache: PagedKVCache,
    kernel: PagedKernel | None,
    input_tokens: Tensor,
    input_positions: Tensor,
    slot_mapping: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
) -> Tensor:
    """`Step.logits`, of a model and a cache that are given: the step's, or what a compiler traces in their place."""
    paged = DecodeStep(cache, slot_mapping, block_tables, input_positions, seq_lens, kernel)
    return model(
        input_ids=input_tokens[:, None], position_ids=input_positions[:, None], use_cache=False, paged=paged
    ).logits[:, 0]


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


class CompiledSteps:
    """The model's part compiled, on a CPU, before the first step.

    One binary serves every number of rows from two on: a row that is alone runs beside a padding row. Where the state
    has a single row, it is compiled for one.
    """

    def __init__(self, step: Step) -> None:
        if not step.cache.is_native:
            raise ValueError(
                "compile: expected the native core's attention on a CPU, got none: advance_step.backend_info()"
            )
        self.step = step
        state, model, layers = step.state, step.model, step.cache.layers
        weights = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.rows, self.columns = min(2, state.num_seqs), state.block_tables[0].shape[1]

        def function(*tensors: Tensor) -> Tensor:
            given = dict(zip(weights, tensors, strict=False))
            cache = replace(step.cache, layers=list(tensors[len(weights) :][: len(layers)]))
            return logits_of(
                lambda **arguments: functional_call(model, given, (), arguments),
                cache,
                None,
                *tensors[len(weights) + len(layers) :],
            )

        held = [Argument(weight, {}) for weight in weights.values()]
        held += [Argument(layer, {0: PAGES}) for layer in layers]
        rows = {0: ROWS} if state.num_seqs > 1 else {}
        *inputs, tables = step.inputs(state.num_seqs, self.columns)
        arguments = [*(Argument(tensor, rows) for tensor in inputs), Argument(tables, rows | {1: COLUMNS})]
        try:
            step.forward = compile_whole(function, held, arguments)
        except Exception as error:  # of any kind: it is the model's own code that is traced
            raise ValueError(f"compile: {type(model).__name__} cannot be compiled whole: {error}") from error

    def run(self, rows: int, pages: int, steps: int) -> None:
        for _ in range(steps):
            self.step(max(rows, self.rows), self.columns)


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
        least = max_pages if step.kernel else max(-(-min_tokens // step.cache.block_size), MIN_PAGES)
        self.rows, self.pages = doubling(1, num_seqs), doubling(least, max_pages)
        if compile:
            forward = torch.compile(step.logits)  # not fullgraph: the compiler does not know flash-attn's functions
            step.forward = lambda *inputs: forward(*mark_captured(list(inputs), gathered=not step.kernel))

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
