"""The decode loop: prompts come in as rows get free, and every step is advanced in place on the device.

The host looks at the rows once per window of steps. Between two looks it neither reads nor writes anything: each step
runs the model, samples, and turns every row to its next token by `advance_until_stop`, which also knows which rows are
done. On a GPU such a step is one CUDA graph.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from advance_step import RowStatus
from advance_step.decode import paged_kernels
from advance_step.decode.attention import PAGED, DecodeStep, Prefill, check_model
from advance_step.decode.cache import PagedKVCache, head_dim_of
from advance_step.decode.graphs import StepGraphs, capture, doubling
from advance_step.decode.pages import PagePool
from advance_step.decode.request import Figures, Request
from advance_step.decode.state import BatchState
from advance_step.errors import CHECK_VALUES

# Prompts are prefilled together up to this many tokens: enough to fill the matmuls, bounded in memory.
PREFILL_TOKENS = 4096

# The compiler takes sizes 0 and 1 for constants, so a table whose width shall vary never has one column.
MIN_PAGES = 2

# Tokens in the narrowest tables that a step is captured for, where the graph's width is what every row costs.
MIN_CAPTURED_TOKENS = 128

FINISH_REASON = {RowStatus.STOPPED: "stop", RowStatus.LENGTH: "length"}


class Decoder:
    """Greedy decoding of requests in a batch of `batch_size` rows over a paged KV cache.

    model: a transformers causal LM; `run` puts it on the paged attention function. On a GPU the decode step is
        captured in CUDA graphs, when the first run begins.
    max_seq_len: prompt and new tokens together that a request may have.
    num_pages: pages of the cache. A request is admitted when there are pages for all that it may become, so that
        an admitted one never waits; `pages_for` counts what keeps every row busy.
    stop_token_ids: a row that samples one of them is finished; the token is kept.
    window: steps between two looks of the host. A row that is done within a window stands still until its end.
    compile: compile the model's part of the step, once: when the first step runs, or when it is captured.

    A step runs in one of three ways: eagerly on the live rows; compiled, on a CPU, on all rows; or replayed from the
    graph of the next larger size, compiled before it was captured or not.

    Raises ValueError for a model that cannot be decoded so (`check_model`), and for a window below 1.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        block_size: int,
        max_seq_len: int,
        num_pages: int,
        stop_token_ids: Iterable[int],
        window: int = 1,
        compile: bool = False,
    ) -> None:
        check_model(model)
        if window < 1:
            raise ValueError(f"window: expected window >= 1, got {window}")
        config = model.config.get_text_config()
        max_pages = max(-(-max_seq_len // block_size), MIN_PAGES)
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        self.model = model
        self.window = window
        self.max_seq_len = max_seq_len
        self.pool = PagePool(range(num_pages))
        self.cache = PagedKVCache.allocate(
            config.num_hidden_layers, num_pages, kv_heads, block_size, head_dim_of(config), model.dtype, model.device
        )
        # One column more than is ever read: a view of all columns is contiguous, which would recompile the step.
        self.state = BatchState.allocate(
            batch_size, max_pages + 1, window, list(stop_token_ids), block_size, self.cache.spare_page, model.device
        )
        self.rows: list[Request] = []  # request of each live row
        self.figures = Figures()
        self.kernel = paged_kernels.find(model, block_size)
        self.captured = model.device.type == "cuda" and not CHECK_VALUES  # a check waits for the device
        self.graphs: StepGraphs | None = None
        self.compiled = compile
        # A step that is compiled and not captured runs the padding rows too, so that one binary serves every step.
        self.static_rows = compile and not self.captured
        self.forward = self._compile() if compile else self._forward

    @property
    def attention(self) -> str:
        """What attends to the pages in a decode step."""
        return self.kernel.name if self.kernel else "torch over gathered pages"

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Decode all requests; yields after each prefill and each window the requests that it finished (often none).

        Raises ValueError for a request that is empty or longer than max_seq_len, RuntimeError for one that needs more
        pages than there are. A run that is not carried to its end gives up the rows that it has.
        """
        waiting = deque(requests)
        for request in waiting:
            self._check(request)
        self.model.set_attn_implementation(PAGED)
        if self.captured and self.graphs is None:
            self._capture()
        try:
            while waiting or self.rows:
                while self._can_admit(waiting):
                    yield self._prefill(waiting)
                if self.rows:
                    yield self._decode()
        finally:
            for row in reversed(range(len(self.rows))):
                self._remove(row)

    def _check(self, request: Request) -> None:
        prompt, new, most = len(request.prompt_ids), request.max_new_tokens, self.max_seq_len
        if not (prompt >= 1 and new >= 1 and prompt + new <= most):
            expected = f"expected a prompt and new tokens, {most} together at most"
            raise ValueError(f"request {request.id!r}: {expected}, got {prompt} and {new}")

    def _can_admit(self, waiting: deque[Request]) -> bool:
        """Whether there is a row, and there are pages, for the next prompt; where no row is live, take() says."""
        if not waiting or len(self.rows) == len(self.state.sampled):
            return False
        return not self.rows or waiting[0].pages_needed(self.cache.block_size) <= len(self.pool.free)

    def _prefill(self, waiting: deque[Request]) -> list[Request]:
        """Admit prompts to the free rows, compute their keys and values, and sample their first tokens."""
        first, tokens, block_size = len(self.rows), 0, self.cache.block_size
        while self._can_admit(waiting):
            request = waiting[0]
            if tokens and tokens + len(request.prompt_ids) > PREFILL_TOKENS:
                break
            request.pages = self.pool.take(request.pages_needed(block_size))
            self.state.admit(len(self.rows), len(request.prompt_ids), request.max_seq_len, request.pages)
            self.rows.append(waiting.popleft())
            tokens += len(request.prompt_ids)

        begin = time.perf_counter()
        admitted = self.rows[first:]
        lengths = [len(request.prompt_ids) for request in admitted]
        slots = [
            r.pages[p // block_size] * block_size + p % block_size for r in admitted for p in range(len(r.prompt_ids))
        ]
        device = self.state.sampled.device
        write_index = self.cache.write_index(torch.tensor(slots, device=device))
        paged = Prefill(self.cache, write_index, lengths)
        ends = torch.tensor(lengths, device=device).cumsum(0) - 1  # the last token of each prompt
        logits = self.model(
            input_ids=torch.tensor([[t for r in admitted for t in r.prompt_ids]], device=device),  # [1, tokens]
            position_ids=torch.tensor([[p for n in lengths for p in range(n)]], device=device),
            use_cache=False,
            logits_to_keep=ends,
            paged=paged,
        ).logits  # [1, admitted, vocabulary]
        if len(paged.layers) != len(self.cache.layers):  # a layer that keeps its state elsewhere would go wrong later
            raise ValueError(
                f"model: expected {len(self.cache.layers)} layers to attend over pages, got {len(paged.layers)}"
            )
        self.state.sampled[first : len(self.rows)] = _greedy(logits[0])
        self.state.advance(slice(first, len(self.rows)))
        finished = self._collect(first)
        self.figures.prefill_seconds += time.perf_counter() - begin
        return finished

    def _decode(self) -> list[Request]:
        """A window of steps, and then the host's look."""
        begin = time.perf_counter()
        steps = min(self.window, max(request.max_seq_len - request.seq_len for request in self.rows))
        rows, pages = self._sizes(steps)
        for _ in range(steps):
            if self.graphs:
                self.graphs.replay(rows, pages)
            else:
                self._step(rows, pages)
        finished = self._collect(0)
        self.figures.steps += steps
        self.figures.decode_seconds += time.perf_counter() - begin
        return finished

    def _sizes(self, steps: int) -> tuple[int, int]:
        """Rows and columns of their tables that so many steps need; known here without asking the device."""
        live = len(self.rows)
        longest = max(min(request.seq_len + steps, request.max_seq_len) for request in self.rows) - 1
        pages = -(-longest // self.cache.block_size)
        if self.graphs:
            return self.graphs.fit(live, pages)
        return (len(self.state.sampled), max(pages, MIN_PAGES)) if self.static_rows else (live, pages)

    def _step(self, rows: int, pages: int) -> None:
        """Run the model on the rows, sample, and advance; only device work, so that it can be captured."""
        self._sample(rows, pages)
        begin = time.perf_counter()
        self.state.advance(slice(rows))
        self.figures.advance_seconds += time.perf_counter() - begin

    def _sample(self, rows: int, pages: int) -> None:
        """Run the model on the rows as the state has them, and sample the next token of each."""
        state = self.state
        inputs = [
            state.input_tokens[:rows],
            state.input_positions[:rows],
            state.slot_mapping[:rows],
            state.seq_lens[:rows],
            state.block_tables[:rows, :pages],
        ]
        if self.compiled:
            self._mark_sizes(inputs)
        state.sampled[:rows] = self.forward(*inputs)

    def _forward(
        self,
        input_tokens: Tensor,
        input_positions: Tensor,
        slot_mapping: Tensor,
        seq_lens: Tensor,
        block_tables: Tensor,
    ) -> Tensor:
        """The next token of each row [rows]."""
        write_index = self.cache.write_index(slot_mapping)
        read_index = None if self.kernel else self.cache.read_index(block_tables)
        paged = DecodeStep(self.cache, write_index, block_tables, input_positions, seq_lens, self.kernel, read_index)
        logits = self.model(
            input_ids=input_tokens[:, None], position_ids=input_positions[:, None], use_cache=False, paged=paged
        ).logits  # [rows, 1, vocabulary]
        return _greedy(logits[:, 0])

    def _compile(self) -> Callable[..., Tensor]:
        if self.captured:
            return torch.compile(self._forward)  # not fullgraph: the compiler does not know flash-attn's functions
        # Freezing packs the weights for the matmuls, once; it is most of what a compiled step gains on the CPU. Set
        # around the call, where the compiler runs: torch.compile's options reach a part of it that is too late.
        return torch._inductor.config.patch(freezing=True)(torch.compile(self._forward, fullgraph=True))

    def _mark_sizes(self, inputs: list[Tensor]) -> None:
        """Tell the compiler which sizes vary from step to step, so that it compiles once for all."""
        if not self.kernel:
            torch._dynamo.mark_dynamic(inputs[-1], 1)
        if not self.static_rows:
            for tensor in inputs:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    def _capture(self) -> None:
        """Capture the step for batches of 1, 2, 4, ... rows; wherever pages are gathered, for growing tables too."""
        self.graphs = capture(self._step, *self._captured_sizes(), self.model.device)  # of padding: nothing changes
        self.figures.advance_seconds = 0.0  # the parts of a replayed step cannot be told apart here

    def _captured_sizes(self) -> tuple[list[int], list[int]]:
        num_seqs, max_pages = len(self.state.sampled), self.state.block_tables.shape[1] - 1
        least = max_pages if self.kernel else max(-(-MIN_CAPTURED_TOKENS // self.cache.block_size), MIN_PAGES)
        return doubling(1, num_seqs), doubling(least, max_pages)

    def _collect(self, first: int) -> list[Request]:
        """Hand what rows [first, live) have recorded to their requests, and take out those that are finished."""
        for request, (status, tokens) in zip(
            self.rows[first:], self.state.look(slice(first, len(self.rows))), strict=True
        ):
            assert status in (RowStatus.RUNNING, *FINISH_REASON), status  # every page that it may need is its own
            request.tokens += tokens
            request.finish_reason = FINISH_REASON.get(status)
            self.figures.tokens += len(tokens)
        finished = []
        for row in range(len(self.rows) - 1, first - 1, -1):
            if self.rows[row].finish_reason is not None:
                finished.append(self._remove(row))
        return finished[::-1]

    def _remove(self, row: int) -> Request:
        """Take the request out of its row, which the last live row then has."""
        request = self.rows[row]
        self.pool.give_back(request.pages)
        self.state.remove(row, len(self.rows) - 1)
        self.rows[row] = self.rows[-1]
        self.rows.pop()
        return request


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals: torch.argmax, but 4x faster in bfloat16 on the CPU."""
    return logits.max(-1).indices
