"""The live rows on the device, one token a step: what the loop admits to, grows, decodes and removes from."""

from collections.abc import Sequence

import torch
from torch import Tensor

from advance_step import DecodeState
from advance_step.decode.forward import Forward
from advance_step.decode.sampling import Mode, Sampler, TokenLogprobs
from advance_step.decode.scheduler import Row
from advance_step.decode.steps import CapturedSteps, EagerSteps, Step, Steps

NO_TOKEN = -1  # among stop_token_ids: matches none


class Batch:
    """A `DecodeState`, its sampler, and the way its steps are run.

    The state stops a row by the tokens on which all live rows agree; a row that has others is cut by whoever collects.
    """

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        *,
        batch_size: int,
        max_seq_len: int,
        steps_per_sync: int,
        num_stop_tokens: int,
        capture: bool,
        compile: bool,
    ) -> None:
        block_size = forward.cache.block_size
        # A page more than is ever read: a view of all columns is contiguous, which would recompile the step.
        self.state = DecodeState.allocate(
            batch_size,
            max_seq_len + block_size,
            block_size,
            steps_per_sync=steps_per_sync,
            stop_token_ids=[NO_TOKEN] * num_stop_tokens,
            pad_page=forward.cache.spare_page,
            device=forward.cache.device,
        )
        self.sampler = sampler
        self.step = Step(forward, self.state, self.sampler)
        self.steps: Steps = CapturedSteps(self.step, compile) if capture else EagerSteps(self.step)
        self._stops: list[frozenset[int]] = []  # of each live row
        self._common: frozenset[int] = frozenset()

    @property
    def num_rows(self) -> int:
        """Live rows."""
        return self.state.num_rows

    @property
    def advance_seconds(self) -> float:
        """Seconds of the host in `advance_until_stop`, in steps that were not captured."""
        return self.step.advance_seconds

    def admit(self, rows: Sequence[Row], stops: Sequence[frozenset[int]], logits: Tensor) -> list[list[int]]:
        """Make prefilled rows live and sample their first tokens from `logits`; returns them, a list for each row."""
        first = self.state.num_rows
        for row, stop in zip(rows, stops, strict=True):
            request = row.request
            index = self.state.admit(request.seq_len, request.max_seq_len, row.pages, request.token_ids[-1])
            admit_to(self.sampler, index, row)
            self._stops.append(stop)
        self._set_stops()
        new = slice(first, self.state.num_rows)
        self.state.sampled[new] = self.sampler.sample(logits, new)
        self.state.advance_until_stop(new)
        return self._sync(new)

    def grow(self, index: int, row: Row, pages: list[int]) -> None:
        """Append pages to a row's table; if it stood still for want of one, its token is sampled again."""
        self.state.grow(index, pages)
        if Mode.of(row.request.sampling) != Mode():
            admit_to(self.sampler, index, row)  # what was sampled and not recorded does not count

    def remove(self, index: int) -> None:
        """Drop a row; the last live row moves into its place."""
        self.state.remove(index)
        self.sampler.remove(index, self.state.num_rows)
        self._stops[index] = self._stops[-1]
        self._stops.pop()
        self._set_stops()

    def decode(self, pages: int, steps: int) -> list[list[int]]:
        """So many steps, of whose tables `pages` columns are in use; returns each row's new tokens."""
        self.steps.run(self.state.num_rows, pages, steps)
        return self._sync(slice(self.state.num_rows))

    def logprobs(self, index: int, count: int) -> list[TokenLogprobs]:
        """Of the first `count` tokens that a row sampled since the last sync but one."""
        return self.sampler.collect_logprobs(index, count)

    def _sync(self, rows: slice) -> list[list[int]]:
        return [tokens for _, tokens in self.state.sync(rows)]

    def _set_stops(self) -> None:
        """Put the tokens on which all live rows agree, as far as they fit, into the state."""
        common = frozenset.intersection(*self._stops) if self._stops else frozenset()
        if common != self._common:
            room = self.state.stop_token_ids.shape[0]
            ids = sorted(common)[:room]
            self.state.stop_token_ids.copy_(torch.tensor(ids + [NO_TOKEN] * (room - len(ids)), dtype=torch.int64))
            self._common = common


def admit_to(sampler: Sampler, index: int, row: Row) -> None:
    """Make batch row `index` sample as the request of `row` does, after the tokens that it has."""
    params = row.request.sampling
    if row.seed is None:  # kept when the row is put back, so that it goes on as it began
        row.seed = int(torch.randint(2**63 - 1, ())) if params.seed is None else params.seed
    sampler.admit(index, params, row.seed, row.request.prompt_ids, row.request.tokens)
