"""The batch's sampling as the device sees it: every row's parameters and what it has sampled so far, in buffers."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from advance_step.decode.counter_random import row_key, uniform
from advance_step.decode.filters import draw, keep_top_k, keep_top_p, likeliest, penalise, weights_above
from advance_step.decode.sampling_params import LogitsProcessor, SamplingParams

# Fewer likeliest tokens are not looked for faster, and would be more modes.
MIN_TOP_K = 64


class Mode(NamedTuple):
    """What a step has to do beside taking the likeliest token. One captured or compiled step serves one mode."""

    random: bool = False  # a row with a temperature
    top_k: int = 0  # the largest that a row has, or the next power of two
    top_p: bool = False
    penalties: bool = False
    min_new_tokens: bool = False
    logprobs: bool = False
    processors: bool = False  # waits for the device: cannot be captured

    @classmethod
    def of(cls, params: SamplingParams) -> "Mode":
        """What a row with these parameters needs."""
        random = params.temperature > 0
        return cls(
            random=random,
            top_k=max(1 << (params.top_k - 1).bit_length(), MIN_TOP_K) if random and params.top_k else 0,
            top_p=random and params.top_p < 1,
            penalties=params.penalises,
            min_new_tokens=params.min_new_tokens > 0,
            logprobs=params.logprobs is not None,
            processors=bool(params.logits_processors),
        )


# What padding rows have in the buffers where it is not 0.
NEUTRAL = {"temperature": 1.0, "greedy": True, "tail": -1.0, "repetition": 1.0}


class TokenLogprobs(NamedTuple):
    """Of one generated token: its own log-probability, and the likeliest tokens with theirs, likeliest first."""

    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class Sampler:
    """Samples for the batch. Buffers keep their addresses; live rows come first, as in the batch's other state.

    `mode`, known to the host, is what the live rows need. Buffers of [num_seqs, vocab_size] are allocated when the
    first row is admitted that needs them.
    """

    num_seqs: int
    vocab_size: int
    device: torch.device
    max_logprobs: int
    steps: int
    eos_token_ids: tuple[int, ...]
    temperature: Tensor  # float32 [num_seqs]; 1 where greedy
    greedy: Tensor  # bool [num_seqs]
    outside: Tensor  # int64 [num_seqs]: tokens outside of the top_k likeliest
    tail: Tensor  # float32 [num_seqs]: 1 - top_p, -1 where top_p is 1
    min_p: Tensor  # float32 [num_seqs]
    repetition: Tensor  # float32 [num_seqs]
    presence: Tensor  # float32 [num_seqs]
    frequency: Tensor  # float32 [num_seqs]
    min_new_tokens: Tensor  # int64 [num_seqs]
    keys: Tensor  # int64 [num_seqs]: of the random numbers
    num_sampled: Tensor  # int64 [num_seqs]: tokens generated so far: the index of the next random number
    num_uncollected: Tensor  # int64 [num_seqs]: of these, since the host collected log-probabilities
    params: list[SamplingParams | None]  # of each row; None: padding
    needs: list[Mode]  # of each row; padding rows and plain greedy ones need nothing, and their buffers are not read
    token_ids: list[list[int]]  # of each row with logits processors: all so far
    processors: list[list[LogitsProcessor]]  # of each row
    mode: Mode
    in_prompt: Tensor | None = None  # bool [num_seqs, vocab_size]
    output_counts: Tensor | None = None  # int32 [num_seqs, vocab_size]
    ends: Tensor | None = None  # bool [num_seqs, vocab_size]: not to be sampled before min_new_tokens
    # The generated token first, then the likeliest ones. The last of the columns is never read: what a row samples
    # whose columns are full lands there.
    logprob_ids: Tensor | None = None  # int64 [num_seqs, steps + 1, 1 + max_logprobs]
    logprobs: Tensor | None = None  # float32, the same

    @classmethod
    def allocate(
        cls,
        num_seqs: int,
        vocab_size: int,
        device: torch.device | str,
        *,
        max_logprobs: int = 0,
        steps: int = 1,
        eos_token_ids: Iterable[int] = (),
    ) -> "Sampler":
        """A batch of padding rows only.

        max_logprobs: the largest SamplingParams.logprobs that is served.
        steps: tokens of a row between two calls of `collect_logprobs`, at most.
        eos_token_ids: the model's own, which min_new_tokens forbids.
        """

        def full(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.full((num_seqs,), value, dtype=dtype, device=device)

        return cls(
            num_seqs=num_seqs,
            vocab_size=vocab_size,
            device=torch.device(device),
            max_logprobs=max_logprobs,
            steps=steps,
            eos_token_ids=tuple(eos_token_ids),
            temperature=full(NEUTRAL["temperature"]),
            greedy=full(NEUTRAL["greedy"], torch.bool),
            outside=full(0, torch.int64),
            tail=full(NEUTRAL["tail"]),
            min_p=full(0),
            repetition=full(NEUTRAL["repetition"]),
            presence=full(0),
            frequency=full(0),
            min_new_tokens=full(0, torch.int64),
            keys=full(0, torch.int64),
            num_sampled=full(0, torch.int64),
            num_uncollected=full(0, torch.int64),
            params=[None] * num_seqs,
            needs=[Mode()] * num_seqs,
            token_ids=[[] for _ in range(num_seqs)],
            processors=[[] for _ in range(num_seqs)],
            mode=Mode(),
        )

    def admit(
        self, row: int, params: SamplingParams, seed: int, prompt_ids: Sequence[int], tokens: Sequence[int] = ()
    ) -> None:
        """Make `row` sample by `params`, as if it had generated `tokens` already.

        A live row may be admitted again: that takes back a token which was sampled and then not recorded.
        Raises ValueError for logprobs above max_logprobs.
        """
        if params.logprobs is not None and params.logprobs > self.max_logprobs:
            raise ValueError(f"logprobs: expected logprobs <= {self.max_logprobs}, got {params.logprobs}")
        needs = Mode.of(params)
        if needs != Mode() or self.needs[row] != Mode():
            self._write(row, params, needs, seed, prompt_ids, tokens)
        self.params[row], self.needs[row] = params, needs
        self.token_ids[row] = [*prompt_ids, *tokens] if needs.processors else []
        self.processors[row] = params.processors_for(prompt_ids)
        self._set_mode()

    def remove(self, row: int, last: int) -> None:
        """Drop `row`; the `last` live row moves into its place, so that the live rows come first."""
        if self.needs[row] != Mode() or self.needs[last] != Mode():
            for name, buffer in vars(self).items():
                if isinstance(buffer, Tensor):
                    buffer[row] = buffer[last]
                    buffer[last] = NEUTRAL.get(name, 0)
        self.params[row], self.params[last] = self.params[last], None
        self.needs[row], self.needs[last] = self.needs[last], Mode()
        self.token_ids[row], self.token_ids[last] = self.token_ids[last], []
        self.processors[row], self.processors[last] = self.processors[last], []
        self._set_mode()

    def sample(self, logits: Tensor, rows: slice | int, live: Tensor | None = None, mode: Mode | None = None) -> Tensor:
        """A token for each of `rows` (a slice, or the first so many): int64 [rows].

        logits: [rows, vocab_size], any floating dtype; never written.
        live: bool [rows]: the rows whose token counts, for the penalties, as generated, and as the random number that
            it took; None: all.
        mode: what is to be done, at least what the rows need; None: that of all live rows. A step that is captured or
            compiled states it, as it must not depend on who is live.
        Does not wait for the device, and can be captured, unless a row has logits processors.
        """
        rows = slice(rows) if isinstance(rows, int) else rows
        mode = self.mode if mode is None else mode
        if logits.shape != (expected := (self.keys[rows].shape[0], self.vocab_size)):
            raise ValueError(f"logits: expected [rows, vocab_size]={list(expected)}, got {list(logits.shape)}")
        if mode == Mode():
            return likeliest(logits)
        scores = self.adjusted(logits, rows, mode)
        tokens = likeliest(scores)
        if mode.random:
            drawn = draw(self.weights(scores, rows, mode), uniform(self.keys[rows], self.num_sampled[rows]))
            tokens = torch.where(self.greedy[rows], tokens, drawn)
        if mode.logprobs:
            self._note_logprobs(logits, tokens, rows)
        self._count(tokens, rows, torch.ones_like(tokens, dtype=torch.bool) if live is None else live, mode)
        return tokens

    def adjusted(self, logits: Tensor, rows: slice, mode: Mode) -> Tensor:
        """Float32 logits after penalties, min_new_tokens and logits processors: what a greedy row is sampled from."""
        scores = logits.float()
        if mode.penalties:
            assert self.in_prompt is not None and self.output_counts is not None
            scores = penalise(
                scores,
                self.in_prompt[rows],
                self.output_counts[rows],
                self.repetition[rows],
                self.presence[rows],
                self.frequency[rows],
            )
        if mode.min_new_tokens:
            assert self.ends is not None
            early = self.num_sampled[rows] < self.min_new_tokens[rows]
            scores = scores.masked_fill(early[:, None] & self.ends[rows], -torch.inf)
        return self._process(scores, rows) if mode.processors else scores

    def weights(self, scores: Tensor, rows: slice, mode: Mode) -> Tensor:
        """Adjusted logits after temperature and filters: probabilities, not normalised, that a row is drawn from."""
        scores = scores / self.temperature[rows, None]
        if mode.top_k:
            scores = keep_top_k(scores, self.outside[rows], mode.top_k)
        if mode.top_p:
            scores = keep_top_p(scores, self.tail[rows])
        return weights_above(scores, self.min_p[rows])

    def collect_logprobs(self, row: int, count: int) -> list[TokenLogprobs]:
        """What was noted of the row's next `count` tokens since the last call; waits for the device.

        A row that has logprobs is to be collected whenever its output tokens are, before it is removed.
        """
        params = self.params[row]
        if params is None or params.logprobs is None:
            raise ValueError(f"row: expected one with logprobs, got {row}")
        assert self.logprob_ids is not None and self.logprobs is not None
        values, ids = self.logprobs[row, :count].tolist(), self.logprob_ids[row, :count].tolist()
        self.num_uncollected[row] = 0
        most = 1 + params.logprobs
        return [
            TokenLogprobs(v[0], list(zip(i[1:most], v[1:most], strict=True))) for v, i in zip(values, ids, strict=True)
        ]

    def _write(
        self, row: int, params: SamplingParams, needs: Mode, seed: int, prompt_ids: Sequence[int], tokens: Sequence[int]
    ) -> None:
        """Everything that a step reads of the row."""
        self._allocate_for(needs)
        self.temperature[row] = params.temperature or 1.0
        self.greedy[row] = params.temperature == 0
        self.outside[row] = max(self.vocab_size - params.top_k, 0) if params.top_k else 0
        self.tail[row] = 1 - params.top_p if params.top_p < 1 else -1.0
        self.min_p[row] = params.min_p
        self.repetition[row] = params.repetition_penalty
        self.presence[row] = params.presence_penalty
        self.frequency[row] = params.frequency_penalty
        self.min_new_tokens[row] = params.min_new_tokens
        self.keys[row] = row_key(seed)
        self.num_sampled[row] = len(tokens)
        self.num_uncollected[row] = 0
        if needs.penalties:
            assert self.in_prompt is not None and self.output_counts is not None
            self.in_prompt[row] = False
            self.in_prompt[row].index_fill_(0, self._ids(prompt_ids), True)
            self.output_counts[row] = 0
            ids = self._ids(tokens)
            self.output_counts[row].index_add_(0, ids, torch.ones_like(ids, dtype=torch.int32))
        if needs.min_new_tokens:
            assert self.ends is not None
            self.ends[row] = False
            self.ends[row].index_fill_(0, self._ids([*self.eos_token_ids, *params.stop_token_ids]), True)

    def _allocate_for(self, needs: Mode) -> None:
        """What only some modes use, when the first row comes that has one."""
        shape, device = (self.num_seqs, self.vocab_size), self.device
        with torch.inference_mode(False):  # so that it may be written inside of inference mode and outside
            if needs.penalties and self.in_prompt is None:
                self.in_prompt = torch.zeros(shape, dtype=torch.bool, device=device)
                self.output_counts = torch.zeros(shape, dtype=torch.int32, device=device)
            if needs.min_new_tokens and self.ends is None:
                self.ends = torch.zeros(shape, dtype=torch.bool, device=device)
            if needs.logprobs and self.logprobs is None:
                noted = (self.num_seqs, self.steps + 1, 1 + self.max_logprobs)
                self.logprob_ids = torch.zeros(noted, dtype=torch.int64, device=device)
                self.logprobs = torch.zeros(noted, dtype=torch.float32, device=device)

    def _ids(self, token_ids: Iterable[int]) -> Tensor:
        """Those that can be sampled: a model may read more tokens than its last layer gives."""
        return torch.tensor([t for t in token_ids if t < self.vocab_size], dtype=torch.int64, device=self.device)

    def _set_mode(self) -> None:
        self.mode = Mode(*map(max, zip(*set(self.needs), strict=True)))

    def _process(self, scores: Tensor, rows: slice) -> Tensor:
        """Each row's own processors, one row after the other."""
        scores = scores.clone()
        for i, row in enumerate(range(self.num_seqs)[rows]):
            for processor in self.processors[row]:
                ids = torch.tensor([self.token_ids[row]], dtype=torch.int64, device=self.device)
                scores[i : i + 1] = processor(ids, scores[i : i + 1])
        return scores

    def _note_logprobs(self, logits: Tensor, tokens: Tensor, rows: slice) -> None:
        assert self.logprob_ids is not None and self.logprobs is not None
        logprobs = logits.float().log_softmax(-1)
        top = logprobs.topk(self.max_logprobs, -1)
        ids = torch.cat([tokens[:, None], top.indices], 1)  # [rows, 1 + max_logprobs]
        values = torch.cat([logprobs.gather(-1, tokens[:, None]), top.values], 1)
        column = self.num_uncollected[rows].clamp(max=self.steps)[:, None, None].expand(-1, 1, ids.shape[1])
        self.logprob_ids[rows].scatter_(1, column, ids[:, None])
        self.logprobs[rows].scatter_(1, column, values[:, None])

    def _count(self, tokens: Tensor, rows: slice, live: Tensor, mode: Mode) -> None:
        self.num_sampled[rows].add_(live)
        if mode.logprobs:
            self.num_uncollected[rows].add_(live)
        if mode.penalties:
            assert self.output_counts is not None
            self.output_counts[rows].scatter_add_(1, tokens[:, None], live[:, None].to(torch.int32))
        if mode.processors:
            for row, token, counts in zip(range(self.num_seqs)[rows], tokens.tolist(), live.tolist(), strict=True):
                if counts and self.token_ids[row]:
                    self.token_ids[row].append(token)
