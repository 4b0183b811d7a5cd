"""The decode loop: requests come in as rows get free, and every step is advanced in place on the device.

The host looks at the rows once per sync. Between two syncs it neither reads nor writes anything: each step runs the
model, samples, and turns every row to its next token by `advance_until_stop`, which also knows which rows are done.
On a GPU such a step is one CUDA graph.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from advance_step.decode import paged_kernels
from advance_step.decode.attention import paged
from advance_step.decode.batch import Batch
from advance_step.decode.cache import LayerLayout, PagedKVCache
from advance_step.decode.collect import Collector
from advance_step.decode.drafts import DraftBatch
from advance_step.decode.forward import CoreForward, forward_of
from advance_step.decode.model_check import check_model
from advance_step.decode.pages import PagePool
from advance_step.decode.prefill import prefill
from advance_step.decode.request import Figures, Occupancy, Request
from advance_step.decode.sampling import Sampler
from advance_step.decode.scheduler import Chunk, Scheduler
from advance_step.errors import CHECK_VALUES

# Tokens of a prefill pass: enough to fill the matmuls, bounded in memory.
MAX_NUM_BATCHED_TOKENS = 4096

# The most of SamplingParams.logprobs: what a batch notes of each token.
MAX_LOGPROBS = 20


class Decoder:
    """Decoding of requests in a batch of `batch_size` rows over a paged KV cache.

    model: a transformers causal LM, in eval mode.
    batch_size: rows that decode together, at most.
    block_size: tokens in a page.
    max_seq_len: prompt and new tokens together that a request may have.
    num_pages: pages of the cache. Rows are given pages as they grow; where too few are left, the youngest rows wait and
        are computed again later. One request at its longest must fit.
    stop_token_ids: the tokens that end a text, the model's own; a row that samples one is finished, and keeps it.
    tokenizer: only for requests with stop strings.
    steps_per_sync: steps between two looks of the host. A row that is done stands still until the sync.
    max_num_batched_tokens: tokens of a prefill pass, at most; longer prompts are computed in pieces.
    share_prefixes: compute full pages that prompts have in common once.
    draft_tokens: that many proposals for the next tokens, looked up in the row's own text, are verified in each step.
        The tokens are the same without; steps_per_sync must then be 1.
    compile: compile the model, for steps and prompts: now, on a CPU (torch keeps what its compiler makes on disk, for
        the next time); on a GPU the step alone, when it is captured.
    layouts: what `check_model(model)` returned; None: the model is checked now.

    Raises ValueError for a model that cannot be decoded so (`check_model`), and for settings that are out of range.
    `for_requests` takes the sizes from a list of requests.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int,
        block_size: int,
        max_seq_len: int,
        num_pages: int,
        stop_token_ids: Iterable[int] = (),
        tokenizer: Any | None = None,
        steps_per_sync: int = 1,
        max_num_batched_tokens: int = MAX_NUM_BATCHED_TOKENS,
        share_prefixes: bool = True,
        draft_tokens: int = 0,
        compile: bool = False,
        layouts: Sequence[LayerLayout] | None = None,
    ) -> None:
        for name, value, least in [
            ("batch_size", batch_size, 1),
            ("block_size", block_size, 1),
            ("max_seq_len", max_seq_len, 2),
            ("num_pages", num_pages, 1),
            ("steps_per_sync", steps_per_sync, 1),
            ("max_num_batched_tokens", max_num_batched_tokens, 1),
            ("draft_tokens", draft_tokens, 0),
        ]:
            if value < least:
                raise ValueError(f"{name}: expected {name} >= {least}, got {value}")
        if draft_tokens and steps_per_sync > 1:
            raise ValueError("draft_tokens: expected 0 with steps_per_sync > 1: drafts are made by the host")
        if layouts is None:
            layouts = check_model(model)
        self.model = model
        self.attending = paged(model)
        self.block_size = block_size
        self.batch_size = batch_size
        self.max_seq_len = max_seq_len
        self.max_num_batched_tokens = max_num_batched_tokens
        self.share_prefixes = share_prefixes
        self.steps_per_sync = steps_per_sync
        self.draft_tokens = draft_tokens
        self.compiled = compile
        self.collector = Collector(stop_token_ids, tokenizer)
        self.pool = PagePool(range(num_pages))
        self.cache = PagedKVCache.allocate(layouts, num_pages, block_size, model.dtype, model.device)
        self.figures = Figures()
        self.scheduler: Scheduler | None = None
        self.forward = forward_of(model, self.cache, paged_kernels.find(model, layouts, block_size))
        self.attention = self.forward.attention
        # A check of values waits for the device, so that its step cannot be captured.
        self.captured = model.device.type == "cuda" and not CHECK_VALUES and not draft_tokens
        if compile and not self.captured:
            if not isinstance(self.forward, CoreForward):
                raise ValueError(
                    "compile: expected the native core's attention on a CPU, got none: advance_step.backend_info()"
                )
            with self.attending:
                self.forward.compile()
        sampler = Sampler.allocate(
            batch_size,
            model.config.get_text_config().vocab_size,
            model.device,
            max_logprobs=MAX_LOGPROBS,
            steps=max(steps_per_sync, 1 + draft_tokens),
            eos_token_ids=self.collector.stop_token_ids,
        )
        if draft_tokens:
            self.batch: Batch | DraftBatch = DraftBatch(
                self.forward,
                sampler,
                batch_size=batch_size,
                max_seq_len=max_seq_len,
                draft_tokens=draft_tokens,
                figures=self.figures,
            )
        else:
            self.batch = Batch(
                self.forward,
                sampler,
                batch_size=batch_size,
                max_seq_len=max_seq_len,
                steps_per_sync=steps_per_sync,
                num_stop_tokens=max(8, len(self.collector.stop_token_ids)),
                capture=self.captured,
                compile=compile,
            )

    @classmethod
    def for_requests(
        cls,
        model: Any,
        requests: Sequence[Request],
        *,
        batch_size: int = 8,
        block_size: int | None = None,
        **options: Any,
    ) -> Decoder:
        """A decoder with rows and pages for these requests, and no more; `options` as the class has them.

        ValueError if there is no request.
        """
        if not requests:
            raise ValueError("requests: expected at least one, got none")
        size = block_size or paged_kernels.default_block_size(model)
        rows = min(batch_size, len(requests))
        largest = sorted((request.pages_needed(size) for request in requests), reverse=True)
        sizes = {
            "batch_size": rows,
            "block_size": size,
            "max_seq_len": max(request.max_seq_len for request in requests),
            "num_pages": sum(largest[:rows]),
        }
        return cls(model, **sizes | options)

    @property
    def num_rows(self) -> int:
        """Live rows."""
        return len(self.scheduler.rows) if self.scheduler else 0

    @property
    def occupancy(self) -> Occupancy:
        """Who is in the batch between two yields of `run`; made when it is asked for, so that it costs nothing else."""
        return self.scheduler.occupancy if self.scheduler else Occupancy([], [], 0)

    def check(self, request: Request) -> None:
        """ValueError for a request that this decoder cannot take, naming it and why."""

        def refuse(expected: str, got: object) -> None:
            raise ValueError(f"request {request.id!r}: expected {expected}, got {got}")

        vocabulary = self.model.config.get_text_config().vocab_size
        if not request.prompt_ids:
            refuse("a prompt", "no token")
        if not all(0 <= token < vocabulary for token in request.prompt_ids):
            refuse(f"token ids in [0, {vocabulary})", next(t for t in request.prompt_ids if not 0 <= t < vocabulary))
        if request.max_seq_len > self.max_seq_len:
            got = f"{len(request.prompt_ids)} and {request.sampling.max_new_tokens}"
            refuse(f"a prompt and new tokens of at most {self.max_seq_len} together", got)
        if request.pages_needed(self.block_size) > self.pool.size:
            refuse(f"at most {self.pool.size} pages, all that there are", request.pages_needed(self.block_size))
        if request.sampling.stop and self.collector.tokenizer is None:
            refuse("no stop strings without a tokenizer", request.sampling.stop)
        if (request.sampling.logprobs or 0) > MAX_LOGPROBS:
            refuse(f"logprobs <= {MAX_LOGPROBS}", request.sampling.logprobs)
        if request.tokens or request.finish_reason:
            refuse("a request that has not been decoded", f"one with {len(request.tokens)} tokens")

    @torch.inference_mode()
    def run(self, requests: Iterable[Request | None]) -> Iterator[list[Request]]:
        """Decode all requests; yields after each prefill pass and each sync the requests that it finished (often none).

        The requests are drawn one at a time, as rows get free. None among them says that there is none yet: the rows go
        on, and it is asked again after their next step (or, where there are none, after an empty yield).

        Raises ValueError for one that `check` refuses, when it is drawn, and RuntimeError while another run of this
        decoder is under way. A run that is not carried to its end gives up the rows that it has. Between two yields the
        model attends as it did before, so that it can be used otherwise, and other decoders of it can run, in the same
        thread.
        """
        if self.scheduler is not None:
            raise RuntimeError("run: expected one run at a time, got another one of this decoder")
        scheduler = self.scheduler = Scheduler(
            self._checked(requests),
            self.pool,
            block_size=self.block_size,
            batch_size=self.batch_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            share_prefixes=self.share_prefixes,
        )
        whole = False  # whether the pages hold what they are said to hold
        try:
            while True:
                whole = False
                chunks = scheduler.prefill()
                if not chunks and not scheduler.rows:
                    whole = True
                    if scheduler.exhausted:
                        return
                    yield []
                    continue
                with self.attending:
                    finished = self._prefill(scheduler, chunks) if chunks else self._decode(scheduler)
                whole = True
                yield finished
        finally:
            for index in reversed(range(self.batch.num_rows)):
                self.batch.remove(index)
            for row in (*scheduler.rows, *scheduler.waiting):
                self.collector.forget(row.request)
            scheduler.give_up()
            if not whole:
                self.pool.forget_all()
            self.scheduler = None

    def _checked(self, requests: Iterable[Request | None]) -> Iterator[Request | None]:
        for request in requests:
            if request is None:
                yield None
                continue
            self.check(request)
            scheduler = self.scheduler
            assert scheduler is not None
            if any(row.request is request for row in (*scheduler.rows, *scheduler.prefilling)):
                raise ValueError(f"request {request.id!r}: expected each request once, got it twice")
            yield request

    def _prefill(self, scheduler: Scheduler, chunks: list[Chunk]) -> list[Request]:
        """A pass over pieces of prompts; rows of which it was the last become live, with their first tokens."""
        begin = time.perf_counter()
        logits = prefill(self.forward, chunks)
        first = self.batch.num_rows
        rows = scheduler.rows[first:]
        stops = [self.collector.stops(row.request) for row in rows]
        finished = self._collect(scheduler, first, self.batch.admit(rows, stops, logits)) if rows else []
        self.figures.prefill_tokens += sum(chunk.length for chunk in chunks)
        self.figures.shared_tokens = scheduler.shared_tokens
        self.figures.prefill_seconds += time.perf_counter() - begin
        return finished

    def _decode(self, scheduler: Scheduler) -> list[Request]:
        """Pages for the steps until the next sync, the steps, and the host's look."""
        begin = time.perf_counter()
        left = max(row.request.max_seq_len - row.request.seq_len for row in scheduler.rows)
        ahead = min(self.steps_per_sync, left) if not self.draft_tokens else 1 + self.draft_tokens
        growth = scheduler.reserve(ahead)
        for index in growth.preempted:
            self.batch.remove(index)
        for index, pages in growth.pages.items():
            self.batch.grow(index, scheduler.rows[index], pages)
        self.figures.preemptions += len(growth.preempted)
        longest = max(min(row.request.seq_len + ahead - 1, row.request.max_seq_len - 1) for row in scheduler.rows)
        finished = self._collect(scheduler, 0, self.batch.decode(-(-longest // self.block_size), ahead))
        self.figures.steps += 1 if self.draft_tokens else ahead
        self.figures.decode_seconds += time.perf_counter() - begin
        self.figures.advance_seconds = self.batch.advance_seconds
        return finished

    def _collect(self, scheduler: Scheduler, first: int, tokens: list[list[int]]) -> list[Request]:
        """Hand out what rows from `first` on have sampled, and take out those that are finished."""
        done = []
        for index, new in enumerate(tokens, first):
            row = scheduler.rows[index]
            count = self.collector.add(row.request, new)
            if row.request.sampling.logprobs is not None:
                row.request.logprobs += self.batch.logprobs(index, count)
            self.figures.tokens += count
            scheduler.computed(row)
            if row.request.finish_reason:
                done.append(index)
        for index in reversed(done):
            self.batch.remove(index)
        return [scheduler.remove(index).request for index in reversed(done)][::-1]
