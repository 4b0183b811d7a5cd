"""The scheduler against a model of the pages: no order of events loses, doubles or mixes up a token or a page.

A page holds, at each place, the tokens up to the one whose keys and values would be there. What a row is about to read
must be its own; what it samples is a function of its tokens, so that every request has one right answer.
"""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from advance_step.decode.pages import PagePool
from advance_step.decode.request import Request
from advance_step.decode.sampling_params import SamplingParams
from advance_step.decode.scheduler import Row, Scheduler

STOP = 0


def next_token(tokens: list[int]) -> int:
    return (sum(tokens) * 7 + len(tokens) * 3) % 11  # 0, which stops, once in 11


def alone(prompt: list[int], max_new_tokens: int) -> list[int]:
    tokens = list(prompt)
    while len(tokens) < len(prompt) + max_new_tokens and (len(tokens) == len(prompt) or tokens[-1] != STOP):
        tokens.append(next_token(tokens))
    return tokens[len(prompt) :]


class Engine(RuleBasedStateMachine):
    """What the loop does with a scheduler, with a dictionary for the cache."""

    @initialize(
        block_size=st.sampled_from([1, 2, 4]),
        batch_size=st.integers(1, 4),
        num_pages=st.integers(8, 24),
        budget=st.integers(1, 12),
        share=st.booleans(),
    )
    def begin(self, block_size: int, batch_size: int, num_pages: int, budget: int, share: bool) -> None:
        self.block_size, self.batch_size, self.budget, self.share = block_size, batch_size, budget, share
        self.pool = PagePool(range(num_pages))
        self.cache: dict[tuple[int, int], tuple[int, ...]] = {}
        self.arrived: list[Request] = []
        self.requests: list[Request] = []
        self.finished: list[Request] = []
        self.ids = itertools.count()
        self.start()

    def start(self) -> None:
        self.scheduler = Scheduler(
            self.drawn(),
            self.pool,
            block_size=self.block_size,
            batch_size=self.batch_size,
            max_num_batched_tokens=self.budget,
            share_prefixes=self.share,
        )

    def drawn(self):
        while True:  # a generator that ended would stay ended, and more may arrive
            yield self.arrived.pop(0) if self.arrived else None

    @rule(prompt=st.lists(st.integers(1, 2), min_size=1, max_size=12), new=st.integers(1, 12))
    def arrive(self, prompt: list[int], new: int) -> None:
        request = Request(next(self.ids), prompt, SamplingParams(max_new_tokens=new))
        if request.pages_needed(self.block_size) <= self.pool.size:
            self.requests.append(request)
            self.arrived.append(request)

    @rule()
    def prefill(self) -> None:
        first = len(self.scheduler.rows)
        chunks = self.scheduler.prefill()
        assert sum(chunk.length for chunk in chunks) <= self.budget
        for row, start, length in chunks:
            tokens = row.request.token_ids
            assert length > 0
            for position in range(start, start + length):
                self.write(row, position, tokens)
            self.reads_its_own(row, start + length)
        for row in self.scheduler.rows[first:]:
            self.sample(row, 1)
        self.collect()

    @precondition(lambda self: self.scheduler.rows)
    @rule(steps=st.integers(1, 4))
    def decode(self, steps: int) -> None:
        before = list(self.scheduler.rows)
        oldest = min(before, key=lambda row: row.age)
        growth = self.scheduler.reserve(steps)
        for index in growth.preempted:  # as the device's batch is told
            before[index] = before[-1]
            before.pop()
        assert before == self.scheduler.rows and oldest in before
        assert all(set(pages) <= set(before[index].pages) for index, pages in growth.pages.items())
        for row in self.scheduler.rows:
            assert self.sample(row, steps) > 0, "a live row moves on"
        self.collect()

    def sample(self, row: Row, steps: int) -> int:
        """Steps of one row as advance_until_stop makes them, until it stops or stands still; returns how many."""
        request = row.request
        for step in range(steps):
            tokens = request.token_ids
            if len(tokens) > len(request.prompt_ids):  # the last token's keys and values come with this step
                self.write(row, len(tokens) - 1, tokens)
            self.reads_its_own(row, len(tokens))
            token = next_token(tokens)
            goes_on = token != STOP and len(tokens) + 1 < request.max_seq_len
            if goes_on and len(tokens) // self.block_size >= len(row.pages):
                return step  # NO_PAGE
            request.tokens.append(token)
            if token == STOP or request.seq_len == request.max_seq_len:
                request.finish_reason = "stop" if token == STOP else "length"
                return step + 1
        return steps

    def write(self, row: Row, position: int, tokens: list[int]) -> None:
        place = row.pages[position // self.block_size], position % self.block_size
        self.cache[place] = tuple(tokens[: position + 1])

    def reads_its_own(self, row: Row, length: int) -> None:
        for position in range(length):
            place = row.pages[position // self.block_size], position % self.block_size
            assert self.cache[place] == tuple(row.request.token_ids[: position + 1])

    def collect(self) -> None:
        for row in self.scheduler.rows:
            self.scheduler.computed(row)
        for index in reversed(range(len(self.scheduler.rows))):
            if self.scheduler.rows[index].request.finish_reason:
                self.finished.append(self.scheduler.remove(index).request)

    @rule()
    def give_up(self) -> None:
        """A run that is not carried to its end; the pages serve the next one."""
        lost = [row.request for row in (*self.scheduler.rows, *self.scheduler.prefilling, *self.scheduler.waiting)]
        self.scheduler.give_up()
        assert self.pool.available == self.pool.size
        for request in lost:
            self.requests.remove(request)
        self.start()

    @invariant()
    def pages_are_counted(self) -> None:
        if hasattr(self, "scheduler"):
            held = [page for row in (*self.scheduler.rows, *self.scheduler.prefilling) for page in row.pages]
            assert len(set(held)) + self.pool.available == self.pool.size
            assert all(len(set(row.pages)) == len(row.pages) for row in self.scheduler.rows)
            assert self.share or len(set(held)) == len(held)

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(1000):
            if len(self.finished) == len(self.requests):
                break
            self.prefill()
            if self.scheduler.rows:
                self.decode(2)
        assert sorted(request.id for request in self.finished) == [request.id for request in self.requests]
        for request in self.finished:
            assert request.tokens == alone(request.prompt_ids, request.sampling.max_new_tokens)
        assert self.pool.available == self.pool.size


TestEngine = Engine.TestCase
TestEngine.settings = settings(max_examples=300, stateful_step_count=30, deadline=None, derandomize=True)


def scheduler(requests: list[Request], pages: int, **options: int) -> Scheduler:
    sizes = {"block_size": 4, "batch_size": 4, "max_num_batched_tokens": 100} | options
    return Scheduler(requests, PagePool(range(pages)), **sizes)


def request(*prompt: int, new: int = 8) -> Request:
    return Request(0, list(prompt), SamplingParams(max_new_tokens=new))


def test_the_youngest_is_put_back_and_waits_in_front():
    first, second, third = request(1, 1, 1), request(2, 2, 2), request(3, 3, 3)
    several = scheduler([first, second, third], 2 + 2)
    assert len(several.prefill()) == 2  # the third would leave no page for growth
    for row in several.rows:
        row.request.tokens += [5, 5]
    assert several.reserve(1).pages == {0: [2], 1: [3]}
    first.tokens += [5] * 4
    growth = several.reserve(1)
    assert growth.preempted == [1] and list(growth.pages) == [0]
    assert [row.request.prompt_ids[0] for row in several.waiting] == [2, 3]
    assert several.preemptions == 1


def test_pages_for_later_steps_put_nobody_back():
    several = scheduler([request(1, 1, 1), request(2, 2, 2)], 3, block_size=8)
    several.prefill()
    for row in several.rows:
        row.request.tokens += [5]
    assert several.reserve(8) == ([], {0: [2]})  # the second row stands still if it comes to that
    assert len(several.rows) == 2


@pytest.mark.parametrize("share", [True, False])
def test_a_prefix_is_computed_once(share: bool):
    prompts = [[1] * 8 + [2, tail] for tail in range(4)]
    several = scheduler([request(*prompt) for prompt in prompts], 40, batch_size=4)
    several.share_prefixes = share
    chunks = several.prefill()
    assert [chunk.length for chunk in chunks] == ([10, 2, 2, 2] if share else [10] * 4)
    assert several.shared_tokens == (24 if share else 0)
    assert len({row.pages[0] for row in several.rows}) == (1 if share else 4)


def test_long_prompts_come_in_pieces():
    several = scheduler([request(*range(1, 11)), request(7)], 40, max_num_batched_tokens=6)
    assert [(start, length) for _, start, length in several.prefill()] == [(0, 6)]
    assert [(start, length) for _, start, length in several.prefill()] == [(6, 4), (0, 1)]
    assert several.prefill() == []
