"""The decode loop: prompts come in as rows get free, and every step is advanced in place on the device."""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advance_step import advance_step_flashattn
from advance_step.decode.attention import PAGED, DecodeStep, Prefill, check_model
from advance_step.decode.cache import PagedKVCache
from advance_step.decode.pages import PagePool
from advance_step.decode.state import BatchState

# Prompts are prefilled together up to this many tokens: enough to fill the matmuls, bounded in memory.
PREFILL_TOKENS = 4096

# The compiler takes sizes 0 and 1 for constants, so a table whose width shall vary never has one column.
MIN_PAGES = 2


@dataclass
class Request:
    """One prompt and what has been decoded for it."""

    id: int | str
    prompt_ids: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"

    @property
    def max_seq_len(self) -> int:
        """Prompt and new tokens together, at most."""
        return len(self.prompt_ids) + self.max_new_tokens


@dataclass
class Figures:
    """What the run has done so far, in steps, tokens and seconds."""

    steps: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    advance_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Prefill and decoding together."""
        return self.prefill_seconds + self.decode_seconds


class Decoder:
    """Greedy decoding of requests in a batch of `batch_size` rows over a paged KV cache.

    model: a transformers causal LM; `run` puts it on the paged attention function.
    max_seq_len: prompt and new tokens together that a request may have.
    num_pages: pages of the cache. A request is admitted when there are pages for all that it may become, so that
        an admitted one never waits; `pages_for` counts what keeps every row busy.
    stop_token_ids: a row that samples one of them is finished; the token is kept.
    compile: compile the decode step (the first steps of each batch size then take as long as the compiler does).
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
        compile: bool = False,
    ) -> None:
        check_model(model)
        config = model.config.get_text_config()
        max_pages = max(-(-max_seq_len // block_size), MIN_PAGES)
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        self.model = model
        self.stop_token_ids = frozenset(stop_token_ids)
        self.pool = PagePool(range(num_pages))
        self.cache = PagedKVCache.allocate(
            config.num_hidden_layers, num_pages, kv_heads, block_size, head_dim, model.dtype, model.device
        )
        # One column more than is ever read: a view of all columns is contiguous, which would recompile the step.
        self.state = BatchState.allocate(batch_size, max_pages + 1, self.cache.spare_page, model.device)
        self.rows: list[Request] = []  # request of each live row
        self.figures = Figures()
        self.static_rows = compile  # a compiled step runs the padding rows too, so that one binary serves every step
        # Freezing packs the weights for the matmuls, once; it is most of what a compiled step gains on the CPU.
        self.forward = (
            torch.compile(self._forward, fullgraph=True, options={"freezing": True}) if compile else self._forward
        )

    @torch.inference_mode()
    def run(self, requests: Iterable[Request]) -> Iterator[list[Request]]:
        """Decode all requests; yields after each step the requests that it finished (often none)."""
        self.model.set_attn_implementation(PAGED)
        waiting = deque(requests)
        while waiting or self.rows:
            if waiting and len(self.rows) < len(self.state.sampled):
                yield self._prefill(waiting)
            if self.rows:
                yield self._decode()

    def _prefill(self, waiting: deque[Request]) -> list[Request]:
        """Admit prompts to the free rows, compute their keys and values, and sample their first tokens."""
        first, tokens, block_size = len(self.rows), 0, self.cache.block_size
        while waiting and len(self.rows) < len(self.state.sampled):
            request = waiting[0]
            pages = -(-request.max_seq_len // block_size)
            if tokens and tokens + len(request.prompt_ids) > PREFILL_TOKENS:
                break
            if self.rows and pages > len(self.pool.free):  # with no live row to wait for, take() tells what is missing
                break
            request.pages = self.pool.take(pages)
            self.state.admit(len(self.rows), len(request.prompt_ids), request.pages)
            self.rows.append(waiting.popleft())
            tokens += len(request.prompt_ids)
        if tokens == 0:
            return []

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
        self.figures.prefill_seconds += time.perf_counter() - begin
        return self._collect(first)

    def _decode(self) -> list[Request]:
        """Advance every live row to its newest token, run the model on it, and sample the next."""
        state, live = self.state, len(self.rows)
        begin = time.perf_counter()
        advance_step_flashattn(
            len(state.sampled),
            live,
            self.cache.block_size,
            state.input_tokens,
            state.sampled[:live],
            state.input_positions,
            state.seq_lens,
            state.slot_mapping,
            state.block_tables,
        )
        advanced = time.perf_counter()
        longest = max(len(request.prompt_ids) + len(request.tokens) for request in self.rows)
        pages = -(-longest // self.cache.block_size)  # known here without asking the device
        rows = live
        if self.static_rows:
            rows, pages = len(state.sampled), max(pages, MIN_PAGES)
        tables = state.block_tables[:rows, :pages]
        if self.static_rows:
            torch._dynamo.mark_dynamic(tables, 1)
        state.sampled[:rows] = self.forward(
            state.input_tokens[:rows], state.input_positions[:rows], state.slot_mapping[:rows], tables
        )
        finished = self._collect(0)
        end = time.perf_counter()
        self.figures.steps += 1
        self.figures.advance_seconds += advanced - begin
        self.figures.decode_seconds += end - begin
        return finished

    def _forward(
        self, input_tokens: Tensor, input_positions: Tensor, slot_mapping: Tensor, block_tables: Tensor
    ) -> Tensor:
        """The next token of each row [rows]; only device work, so that it can be compiled or captured."""
        paged = DecodeStep(
            self.cache, self.cache.write_index(slot_mapping), self.cache.read_index(block_tables), input_positions
        )
        logits = self.model(
            input_ids=input_tokens[:, None], position_ids=input_positions[:, None], use_cache=False, paged=paged
        ).logits  # [rows, 1, vocabulary]
        return _greedy(logits[:, 0])

    def _collect(self, first: int) -> list[Request]:
        """Hand the sampled tokens of rows [first, live) to their requests, and take out those that are finished."""
        tokens = self.state.sampled[first : len(self.rows)].tolist()  # the one look of the host at a step
        self.figures.tokens += len(tokens)
        for request, token in zip(self.rows[first:], tokens, strict=True):
            request.tokens.append(token)
            if token in self.stop_token_ids:
                request.finish_reason = "stop"
            elif len(request.tokens) == request.max_new_tokens:
                request.finish_reason = "length"
        finished = []
        for row in range(len(self.rows) - 1, first - 1, -1):
            if self.rows[row].finish_reason is not None:
                finished.append(self.rows[row])
                self.pool.give_back(self.rows[row].pages)
                self.state.remove(row, len(self.rows) - 1)
                self.rows[row] = self.rows[-1]
                self.rows.pop()
        return finished[::-1]


def pages_for(requests: Iterable[Request], batch_size: int, block_size: int) -> int:
    """Pages that the `batch_size` largest requests need: with these no row is ever left empty for want of a page."""
    needs = sorted((-(-request.max_seq_len // block_size) for request in requests), reverse=True)
    return sum(needs[:batch_size])


def _greedy(logits: Tensor) -> Tensor:
    """The likeliest token of each row, the first of equals: torch.argmax, but 4x faster in bfloat16 on the CPU."""
    return logits.max(-1).indices
