"""Sampling against transformers' warpers, against the exact distribution, and against itself in other batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation import logits_process as hf

from advance_step.decode.counter_random import derive_seed, row_key, uniform
from advance_step.decode.filters import draw, likeliest, penalise
from advance_step.decode.sampling import Mode, Sampler
from advance_step.decode.sampling_params import SamplingParams

VOCAB = 31
EOS = (3, 7)

# Few values, so that ties are common, at the edges of the filters too.
LOGITS = st.lists(
    st.one_of(st.integers(-4, 4).map(float), st.floats(-20, 20, width=32)), min_size=VOCAB, max_size=VOCAB
)
PARAMS = st.builds(
    SamplingParams,
    temperature=st.one_of(st.just(1.0), st.floats(0.8, 3)),
    top_k=st.one_of(st.just(0), st.integers(1, VOCAB + 5)),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
    min_new_tokens=st.integers(0, 6),
    stop_token_ids=st.lists(st.integers(0, VOCAB + 2), max_size=2).map(tuple),
)
PROMPT = st.lists(st.integers(0, VOCAB + 2), min_size=1, max_size=6)
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=6)


def expected_scores(params: SamplingParams, prompt: list[int], tokens: list[int], logits: torch.Tensor) -> torch.Tensor:
    """The scores [vocabulary] that transformers' generate samples from: its processors, in its order."""
    processors: list[Any] = []
    if params.repetition_penalty != 1:
        processors.append(hf.RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    if params.min_new_tokens:
        ends = [*EOS, *params.stop_token_ids]
        processors.append(hf.MinNewTokensLengthLogitsProcessor(len(prompt), params.min_new_tokens, ends))
    processors += params.logits_processors
    if params.temperature not in (0, 1):
        processors.append(hf.TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        processors.append(hf.TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        processors.append(hf.TopPLogitsWarper(params.top_p))
    if params.min_p:
        processors.append(hf.MinPLogitsWarper(params.min_p))
    return hf.LogitsProcessorList(processors)(torch.tensor([prompt + tokens]), logits[None].float())[0]


@given(rows=st.lists(st.tuples(PARAMS, PROMPT, TOKENS, LOGITS), min_size=1, max_size=4))
@settings(deadline=None, max_examples=100)
def test_any_batch_has_the_probabilities_of_transformers(rows):
    sampler = Sampler.allocate(len(rows) + 1, VOCAB, "cpu", eos_token_ids=EOS)
    for row, (params, prompt, tokens, _) in enumerate(rows):
        sampler.admit(row, params, row, prompt, tokens)
    logits, live = torch.tensor([row[3] for row in rows]), slice(len(rows))
    weights = sampler.weights(sampler.adjusted(logits, live, sampler.mode), live, sampler.mode)
    sampled = sampler.sample(logits, live)
    for row, (params, prompt, tokens, _) in enumerate(rows):
        expected, got = expected_scores(params, prompt, tokens, logits[row]), weights[row] / weights[row].sum()
        allowed, probabilities = expected > -math.inf, expected.softmax(-1)
        if not torch.equal(got > 0, allowed):
            # Of equal tokens at the edge of top_p transformers keeps those that an unstable sort has last.
            assert params.top_p < 1
            above = expected > expected[allowed].min()
            assert torch.equal((got > 0) & above, above)
            got, probabilities = got.sort().values, probabilities.sort().values
        torch.testing.assert_close(got, probabilities, rtol=1e-5, atol=1e-7)
        assert weights[row, sampled[row]] > 0


@given(st.lists(st.tuples(PROMPT, TOKENS, LOGITS, *3 * [st.floats(-2, 2)]), min_size=1, max_size=3))
@settings(deadline=None, max_examples=50)
def test_presence_and_frequency_count_the_output_alone(rows):
    sampler = Sampler.allocate(4, VOCAB, "cpu")
    for row, (prompt, tokens, _, presence, frequency, _) in enumerate(rows):
        sampler.admit(row, SamplingParams(presence_penalty=presence, frequency_penalty=frequency), 0, prompt, tokens)
    sampler.admit(len(rows), SamplingParams(temperature=1.0), 0, [1, 1], [1, 1])  # neutral beside them
    logits = torch.tensor([*(row[2] for row in rows), [row * 0.37 for row in range(VOCAB)]])
    scores = sampler.adjusted(logits, slice(len(logits)), sampler.mode)
    assert torch.equal(scores[-1], logits[-1])
    for row, (_, tokens, values, presence, frequency, _) in enumerate(rows):
        expected = [v - presence * (t in tokens) - frequency * tokens.count(t) for t, v in enumerate(values)]
        torch.testing.assert_close(scores[row], torch.tensor(expected), rtol=1e-5, atol=1e-5)


def splitmix64(seed: int, count: int) -> list[int]:
    """As published: a state that grows by a constant, hashed."""
    numbers, state = [], seed % 2**64
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        numbers.append(z ^ (z >> 31))
    return numbers


@given(st.integers(-(2**63), 2**63 - 1))
def test_random_numbers_are_splitmix64(key):
    numbers = uniform(torch.tensor([key] * 5), torch.arange(5))
    assert numbers.tolist() == [(n >> 11) / 2**53 for n in splitmix64(key, 5)]


def test_splitmix64_gives_the_published_numbers():
    assert splitmix64(1234567, 3) == [6457827717110365317, 3203168211198807973, 9817491932198370423]


@pytest.mark.parametrize("over", ["tokens", "seeds", "samples"])  # each way in which the engine takes numbers
def test_random_numbers_are_uniform(over):
    count, bins = 2**16, 256
    zeros, index = torch.zeros(count, dtype=torch.int64), torch.arange(count)
    numbers = {
        "tokens": lambda: uniform(zeros + row_key(5), index),
        "seeds": lambda: uniform(torch.tensor([row_key(seed) for seed in range(count)]), zeros),
        "samples": lambda: uniform(torch.tensor([row_key(derive_seed(5, i)) for i in range(count)]), zeros),
    }[over]()
    assert numbers.min() >= 0 and numbers.max() < 1
    for values in (numbers, numbers * bins % 1, (numbers[1:] - numbers[:-1]) % 1):  # high bits, lower bits, neighbours
        expected = len(values) / bins
        observed = torch.histc(values.float(), bins, 0, 1).double()
        assert chi_square_is_likely(((observed - expected) ** 2 / expected).sum().item(), bins - 1)


def chi_square_is_likely(statistic: float, freedom: int) -> bool:
    """Whether the statistic is within five standard deviations, by Wilson and Hilferty's approximation."""
    z = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    return abs(z) < 5


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0),
        SamplingParams(temperature=0.7, top_k=12, top_p=0.95),
        SamplingParams(temperature=2.0, min_p=0.1, repetition_penalty=1.3),
    ],
)
def test_sampled_tokens_have_the_exact_distribution(params):
    count, prompt = 40_000, [1, 2, 3]
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0)) * 2
    probabilities = expected_scores(params, prompt, [], logits).double().softmax(-1)
    sampler = Sampler.allocate(1, VOCAB, "cpu")
    sampler.admit(0, params, 11, prompt)
    tokens = draw(
        sampler.weights(sampler.adjusted(logits[None], slice(1), sampler.mode), slice(1), sampler.mode).expand(
            count, -1
        ),
        uniform(sampler.keys.expand(count), torch.arange(count)),
    )
    observed, expected = torch.bincount(tokens, minlength=VOCAB), probabilities * count
    allowed = expected > 0
    assert not observed[~allowed].any()
    statistic = ((observed - expected) ** 2 / expected)[allowed].sum().item()
    assert chi_square_is_likely(statistic, int(allowed.sum()) - 1)


def test_rare_tokens_of_a_large_vocabulary_are_drawn_as_often_as_they_should():
    """Cumulated in float32 they would add nothing to a likely token before them, and never be drawn."""
    rare, count = 1e-8, 100_000
    weights = torch.full((1, 1 + count), rare)
    weights[0, 0] = 1
    drawn = torch.tensor([1, 2, count // 2, count])
    numbers = (1 + (drawn.double() - 0.5) * rare) / (1 + count * rare)  # in the middle of each one's share
    assert draw(weights.expand(4, -1), numbers).tolist() == drawn.tolist()


MIXED = [
    SamplingParams(),
    SamplingParams(temperature=1.0, top_k=9, logprobs=2),
    SamplingParams(temperature=0.8, top_p=0.9, presence_penalty=0.4, frequency_penalty=0.3),
    SamplingParams(temperature=1.5, min_p=0.05, repetition_penalty=1.2, min_new_tokens=5),
    SamplingParams(repetition_penalty=1.3, logprobs=0),
    SamplingParams(temperature=1.1, min_new_tokens=3, stop_token_ids=(1, 2), frequency_penalty=-0.3),
]


class Rows:
    """A stand-in for a model: the logits of a row follow from its request and its tokens so far."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler
        self.ids: list[int] = []  # request of each live row
        self.tokens: dict[int, list[int]] = {}

    def admit(self, request: int) -> None:
        tokens = self.tokens.setdefault(request, [])
        self.sampler.admit(len(self.ids), MIXED[request], 100 + request, [request, 5], tokens)
        self.ids.append(request)

    def remove(self, request: int) -> None:
        row = self.ids.index(request)
        self.sampler.remove(row, len(self.ids) - 1)
        self.ids[row] = self.ids[-1]
        self.ids.pop()

    def step(self, padding: int = 0, frozen: tuple[int, ...] = ()) -> None:
        seeds = [(request, len(self.tokens[request])) for request in self.ids] + [(99, 0)] * padding
        logits = torch.stack([torch.randn(VOCAB, generator=torch.Generator().manual_seed(7 * r + n)) for r, n in seeds])
        live = torch.tensor([request not in frozen for request in self.ids] + [False] * padding)
        tokens = self.sampler.sample(logits, len(seeds), live)
        for request, token in zip(self.ids, tokens.tolist(), strict=False):
            if request not in frozen:
                self.tokens[request].append(token)


def mixed_sampler() -> Sampler:
    return Sampler.allocate(8, VOCAB, "cpu", max_logprobs=2, steps=20, eos_token_ids=EOS)


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """Twelve tokens of each of the requests, each in a batch of its own."""
    texts = []
    for request in range(len(MIXED)):
        rows = Rows(mixed_sampler())
        rows.admit(request)
        for _ in range(12):
            rows.step()
        texts.append(rows.tokens[request])
    return texts


@given(data=st.data())
@settings(deadline=None, max_examples=25)
def test_the_batch_around_a_row_and_preemptions_change_nothing(alone, data):
    rows = Rows(mixed_sampler())
    while any(len(rows.tokens.get(request, [])) < 12 for request in range(len(MIXED))):
        rest = [r for r in range(len(MIXED)) if r not in rows.ids and len(rows.tokens.get(r, [])) < 12]
        for request in data.draw(st.permutations(rest))[: data.draw(st.integers(0 if rows.ids else 1, len(rest)))]:
            rows.admit(request)
        for _ in range(data.draw(st.integers(1, 4))):
            full = tuple(r for r in rows.ids if len(rows.tokens[r]) == 12)
            frozen = data.draw(st.sets(st.sampled_from(rows.ids)))
            rows.step(data.draw(st.integers(0, 2)), (*full, *frozen))
        for request in [r for r in rows.ids if len(rows.tokens[r]) == 12 or data.draw(st.integers(0, 3)) == 0]:
            rows.remove(request)
    assert [rows.tokens[request] for request in range(len(MIXED))] == alone


def test_requests_differ_by_seed_and_samples_of_one_prompt_too():
    logits, params = torch.zeros(1, 1000), SamplingParams(temperature=1.0)
    texts = set()
    for seed in [0, 1, -1, 2**63 - 1, *(derive_seed(0, i) for i in range(1, 4))]:
        sampler = Sampler.allocate(1, 1000, "cpu")
        sampler.admit(0, params, seed, [1])
        texts.add(tuple(sampler.sample(logits, 1).item() for _ in range(4)))
    assert len(texts) == 7
    assert derive_seed(12, 0) == 12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_greedy_is_the_first_of_the_likeliest(dtype):
    sampler = Sampler.allocate(3, VOCAB, "cpu")
    logits = torch.zeros(3, VOCAB, dtype=dtype)
    logits[1, [4, 9]] = 2
    for row in range(3):
        sampler.admit(row, SamplingParams(), 0, [1])
    assert sampler.mode == Mode()
    assert sampler.sample(logits, 3).tolist() == [0, 4, 0]
    everything = Mode(random=True, top_k=64, top_p=True)
    assert sampler.sample(logits, 3, mode=everything).tolist() == [0, 4, 0]
    assert sampler.in_prompt is None and sampler.ends is None  # nobody needs them


@pytest.mark.parametrize("top", [dict(top_k=1), dict(top_p=0.0), dict(min_p=1.0), dict(temperature=1e-5)])
def test_the_narrowest_filters_and_the_lowest_temperature_are_greedy(top):
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(1)) * 1000
    sampler = Sampler.allocate(1, VOCAB, "cpu")
    sampler.admit(0, SamplingParams(**{"temperature": 1.0} | top), 0, [1])
    assert {sampler.sample(logits, 1).item() for _ in range(20)} == {logits.argmax().item()}


def test_logprobs_are_those_of_the_model():
    """Before penalties and temperature, also where a row is frozen for some steps, and after it has moved."""
    sampler = Sampler.allocate(3, VOCAB, "cpu", max_logprobs=4, steps=3)
    sampler.admit(0, SamplingParams(), 0, [1])
    sampler.admit(1, SamplingParams(temperature=2.0, repetition_penalty=1.5, logprobs=3), 0, [1])
    sampler.admit(2, SamplingParams(logprobs=0), 1, [1])
    noted: dict[int, list[tuple[float, list[tuple[int, float]]]]] = {1: [], 2: []}
    for step, live in enumerate([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]):
        logits = torch.randn(3, VOCAB, generator=torch.Generator().manual_seed(step))
        tokens = sampler.sample(logits, 3, torch.tensor(live, dtype=torch.bool))
        logprobs = logits.log_softmax(-1)
        for row in (1, 2):
            if live[row]:
                top = logprobs[row].topk(3 if row == 1 else 0)
                best = list(zip(top.indices.tolist(), top.values.tolist(), strict=True))
                noted[row].append((logprobs[row, tokens[row]].item(), best))
    assert sampler.collect_logprobs(2, 3) == noted[2]
    sampler.remove(0, 2)
    assert sampler.params[1] is not None and sampler.collect_logprobs(1, 3) == noted[1]
    sampler.sample(logits[:2], 2)
    assert sampler.collect_logprobs(1, 1)[0].top == noted_top(logits[1], 3)
    with pytest.raises(ValueError, match=r"^row: expected one with logprobs, got 2$"):
        sampler.collect_logprobs(2, 1)
    with pytest.raises(ValueError, match=r"^logprobs: expected logprobs <= 4, got 5$"):
        sampler.admit(2, SamplingParams(logprobs=5), 0, [1])


def noted_top(logits: torch.Tensor, count: int) -> list[tuple[int, float]]:
    top = logits.log_softmax(-1).topk(count)
    return list(zip(top.indices.tolist(), top.values.tolist(), strict=True))


def test_logits_processors_see_the_tokens_so_far():
    seen: dict[str, list[list[int]]] = {"a": [], "b": []}

    def note(name: str) -> Any:
        def processor(ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
            assert ids.dtype == torch.int64 and logits.shape == (1, VOCAB)
            seen[name].append(ids[0].tolist())
            return logits.index_fill(1, ids[0, -1:] + 1, 100.0)  # the token after the last one

        return processor

    logits = torch.zeros(3, VOCAB)
    sampler = Sampler.allocate(3, VOCAB, "cpu")
    sampler.admit(0, SamplingParams(logits_processors=[note("a")]), 0, [4])
    sampler.admit(1, SamplingParams(), 0, [4])
    sampler.admit(2, SamplingParams(logits_processors=[note("b"), hf.SuppressTokensLogitsProcessor([8])]), 0, [1, 6])
    assert sampler.mode == Mode(processors=True)
    assert sampler.sample(logits, 3).tolist() == [5, 0, 7]
    assert sampler.sample(logits, 3, torch.tensor([True, True, False])).tolist() == [6, 0, 0]
    sampler.remove(0, 2)
    assert sampler.sample(logits[:2], 2).tolist() == [0, 0]
    assert seen == {"a": [[4], [4, 5]], "b": [[1, 6], [1, 6, 7], [1, 6, 7]]}
    assert not logits.any()


class NoLook(TorchDispatchMode):
    """Fails where a value is read by the host, or a shape would follow from values."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in {"_local_scalar_dense", "nonzero", "masked_select", "equal"}, name
        return func(*args, **kwargs or {})


def test_a_step_reads_nothing_back_and_compiles_whole():
    sampler = mixed_sampler()
    for row, params in enumerate(MIXED):
        sampler.admit(row, params, row, [1, 2])
    mode = sampler.mode
    assert mode == Mode(True, 64, True, True, True, True, False)
    addresses = {name: buffer.data_ptr() for name, buffer in vars(sampler).items() if isinstance(buffer, torch.Tensor)}
    logits, live = torch.randn(6, VOCAB), torch.ones(6, dtype=torch.bool)
    with NoLook():
        eager = sampler.sample(logits, 6, live, mode)
    for row, params in enumerate(MIXED):
        sampler.admit(row, params, row, [1, 2])
    step = torch.compile(lambda x, y: sampler.sample(x, 6, y, mode), fullgraph=True, backend="eager")
    assert torch.equal(step(logits, live), eager)
    assert addresses == {n: b.data_ptr() for n, b in vars(sampler).items() if isinstance(b, torch.Tensor)}


def test_what_a_row_leaves_behind_is_padding():
    sampler, fresh = mixed_sampler(), mixed_sampler()
    for row, params in enumerate(MIXED):
        sampler.admit(row, params, row, [1, 2], [3, 4])
        fresh._allocate_for(Mode.of(params))
    sampler.sample(torch.randn(6, VOCAB), 6)
    for last in reversed(range(len(MIXED))):
        sampler.remove(0, last)
    assert sampler.mode == Mode() and sampler.params == fresh.params
    for name, buffer in vars(fresh).items():
        if isinstance(buffer, torch.Tensor):
            assert torch.equal(getattr(sampler, name), buffer), name


def test_buffers_that_come_late_may_be_written_anywhere():
    sampler = Sampler.allocate(2, VOCAB, "cpu", eos_token_ids=EOS)
    params = SamplingParams(repetition_penalty=1.2, min_new_tokens=1, logprobs=0)
    with torch.inference_mode():
        sampler.admit(0, params, 0, [1])
        sampler.sample(torch.zeros(1, VOCAB), 1)
    sampler.sample(torch.zeros(1, VOCAB), 1)
    sampler.remove(0, 0)


@pytest.mark.parametrize("shape", [(2, 30), (1, 31), (3, 31)])
def test_logits_of_other_rows_or_another_vocabulary_are_refused(shape):
    sampler = Sampler.allocate(4, VOCAB, "cpu")
    message = rf"^logits: expected \[rows, vocab_size\]=\[2, 31\], got \[{shape[0]}, {shape[1]}\]$"
    for rows in (2, slice(1, 3)):
        with pytest.raises(ValueError, match=message):
            sampler.sample(torch.zeros(shape), rows)


def test_penalise_leaves_neutral_rows_bit_for_bit():
    scores = torch.tensor([[-0.0, 0.0, -math.inf, 1e-45, 3.3e38, -1.7]])
    one, zero = torch.ones(1), torch.zeros(1)
    seen, counts = torch.ones(1, 6, dtype=torch.bool), torch.full((1, 6), 3, dtype=torch.int32)
    got = penalise(scores, seen, counts, one, zero, zero)
    assert torch.equal(got.view(torch.int32), scores.view(torch.int32))


@pytest.mark.parametrize("vocabulary", [97, 128, 49152])  # whole; by parts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_likeliest_is_the_first_of_equals(vocabulary, dtype):
    scores = torch.randint(-3, 4, (5, vocabulary), generator=torch.Generator().manual_seed(0)).to(dtype)
    scores[1] = -torch.inf
    scores[2, 60:] = torch.nan
    scores = torch.stack((scores, scores), 1)[:, 0]  # rows that lie apart, as those of drafts
    expected = [next(i for i, x in enumerate(row) if x == max(row)) for row in scores[[0, 1, 3, 4]].tolist()]
    got = likeliest(scores).tolist()
    assert got[:2] + got[3:] == expected and got[2] == 60
