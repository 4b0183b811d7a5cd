"""Several tokens a step: proposals looked up in a row's own text, verified in one forward pass.

A row's step reads its current token and the proposals after it. What is sampled after each is what would have been
sampled without proposals; as long as it is the next proposal, the row has that token too. (For a proposal that is a
single token this is what rejection sampling comes to: it is taken with its probability, and otherwise replaced by a
draw from the others. So greedy and sampled texts are the same with proposals and without.) The batch then moves on by
`npu_advance_step_flashattn` in its speculative mode.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from advance_step import PAD_SLOT, npu_advance_step_flashattn
from advance_step.decode.batch import admit_to
from advance_step.decode.forward import Forward
from advance_step.decode.request import Figures
from advance_step.decode.sampling import Sampler, TokenLogprobs
from advance_step.decode.scheduler import Row
from advance_step.state import NO_PAGE_ID

# The longest and the shortest end of a text that is looked up in what comes before it.
MAX_NGRAM, MIN_NGRAM = 4, 2


class PromptLookup:
    """Where each n-gram of a text was last followed by something."""

    def __init__(self, tokens: Sequence[int]) -> None:
        self.tokens: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # n-gram: index of the token after its last occurrence
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Append to the text."""
        for token in tokens:
            end = len(self.tokens)
            for n in range(MIN_NGRAM, min(MAX_NGRAM, end) + 1):
                self._after[tuple(self.tokens[end - n :])] = end
            self.tokens.append(token)

    def propose(self, count: int) -> list[int]:
        """What followed the longest end of the text that occurred before: `count` tokens at most."""
        for n in range(MAX_NGRAM, MIN_NGRAM - 1, -1):
            start = self._after.get(tuple(self.tokens[-n:]))
            if start is not None and n <= len(self.tokens):
                return self.tokens[start : start + count]
        return []


class DraftBatch:
    """The live rows on the device, 1 + draft_tokens tokens a step; the counterpart of `Batch`.

    The live rows come first; what stands in the others is never read.
    """

    advance_seconds = 0.0  # not told apart

    def __init__(
        self,
        forward: Forward,
        sampler: Sampler,
        *,
        batch_size: int,
        max_seq_len: int,
        draft_tokens: int,
        figures: Figures,
    ) -> None:
        width, device = 1 + draft_tokens, forward.cache.device

        def full(value: int, *shape: int) -> Tensor:
            return torch.full(shape, value, dtype=torch.int64, device=device)

        self.forward = forward
        self.sampler = sampler
        self.figures = figures
        self.draft_tokens = draft_tokens
        self.input_tokens = full(0, batch_size, width)
        self.input_positions = full(0, batch_size, width)
        self.seq_lens = full(1, batch_size, width)
        self.slot_mapping = full(PAD_SLOT, batch_size, width)
        # A row that is finished, and not yet taken out, may stand so far past its end.
        columns = -(-(max_seq_len + 2 * width) // forward.cache.block_size)
        self.block_tables = full(NO_PAGE_ID, batch_size, columns)
        self.lookups: list[PromptLookup] = []  # of each live row
        self.num_pages: list[int] = []
        self.proposed: list[int] = []  # of each live row, how many of its draft tokens mean something

    @property
    def num_rows(self) -> int:
        """Live rows."""
        return len(self.lookups)

    def admit(self, rows: Sequence[Row], stops: Sequence[frozenset[int]], logits: Tensor) -> list[list[int]]:
        """Make prefilled rows live and sample their first tokens from `logits`; returns them, a list for each row."""
        first = self.num_rows
        for index, row in enumerate(rows, first):
            # Before its first new token: one position back, which the advance then adds.
            self.input_positions[index] = row.request.seq_len - 1 + torch.arange(1 + self.draft_tokens)
            self.block_tables[index].fill_(NO_PAGE_ID)
            self.lookups.append(PromptLookup(row.request.token_ids))
            self.num_pages.append(0)
            self.proposed.append(0)
            self.grow(index, row, row.pages)
            admit_to(self.sampler, index, row)
        return self._verify(slice(first, self.num_rows), logits[:, None])

    def grow(self, index: int, row: Row, pages: list[int]) -> None:
        """Append pages to a row's table."""
        had = self.num_pages[index]
        self.block_tables[index, had : had + len(pages)] = torch.tensor(pages)
        self.num_pages[index] += len(pages)

    def remove(self, index: int) -> None:
        """Drop a row; the last live row moves into its place."""
        last = self.num_rows - 1
        for buffer in (
            self.input_tokens, self.input_positions, self.seq_lens, self.slot_mapping, self.block_tables
        ):  # fmt: skip
            buffer[index] = buffer[last]
        self.sampler.remove(index, last)
        self.lookups[index], self.num_pages[index], self.proposed[index] = (
            self.lookups[last], self.num_pages[last], self.proposed[last]
        )  # fmt: skip
        del self.lookups[last], self.num_pages[last], self.proposed[last]

    def decode(self, pages: int, ahead: int) -> list[list[int]]:
        """One step, of whose tables `pages` columns are in use; returns each row's new tokens, one at least."""
        rows, width = self.num_rows, 1 + max(self.proposed)
        logits = self.forward.step(
            self.input_tokens[:rows, :width],
            self.input_positions[:rows, :width],
            self.slot_mapping[:rows, :width],
            self.seq_lens[:rows, :width],
            self.block_tables[:rows, :pages].int(),  # the operator wants them in int64
        )  # [rows, width, vocabulary]
        self.figures.draft_tokens += sum(self.proposed)
        tokens = self._verify(slice(rows), logits)
        self.figures.accepted_tokens += sum(len(new) - 1 for new in tokens)
        return tokens

    def _verify(self, rows: slice, logits: Tensor) -> list[list[int]]:
        """Sample after each token of `rows`, as far as the tokens hold; then propose anew, and advance.

        logits: [rows, width, vocabulary].
        """
        width = logits.shape[1]
        inputs, slots = self.input_tokens[rows], self.slot_mapping[rows]
        holds = torch.ones(len(inputs), dtype=torch.bool, device=inputs.device)
        sampled = torch.full_like(inputs, -1)
        for j in range(width):
            if j:  # the proposal that was read is the token; and its keys and values have a place
                holds = holds & (inputs[:, j] == sampled[:, j - 1]) & (slots[:, j] >= 0)
            token = self.sampler.sample(logits[:, j], rows, holds)
            sampled[:, j] = torch.where(holds, token, -1)
        tokens = [[t for t in row if t >= 0] for row in sampled.tolist()]  # the sync of this step
        proposals = []
        for index, new in enumerate(tokens, rows.start or 0):
            self.lookups[index].extend(new)
            proposals.append(self.lookups[index].propose(self.draft_tokens))
            self.proposed[index] = len(proposals[-1])
        accepted = torch.tensor([len(new) - 1 for new in tokens], device=inputs.device)
        spec = [draft + [0] * (self.draft_tokens - len(draft)) for draft in proposals]
        npu_advance_step_flashattn(
            inputs,
            sampled,
            self.input_positions[rows],
            self.seq_lens[rows],
            slots,
            self.block_tables[rows],
            len(tokens),
            len(tokens),
            self.forward.cache.block_size,
            spec_token=torch.tensor(spec, device=inputs.device),
            accepted_num=accepted,
        )
        return tokens

    def logprobs(self, index: int, count: int) -> list[TokenLogprobs]:
        """Of the first `count` tokens that a row sampled in the last step."""
        return self.sampler.collect_logprobs(index, count)
