"""The batch as the device sees it: buffers that keep their addresses from the first step to the last."""

from dataclasses import dataclass

import torch
from torch import Tensor

from advance_step import RowStatus, advance_until_stop


@dataclass
class BatchState:
    """What a step reads and the operator advances. Live rows come first; the others are padding.

    A padding row is neutral: token 0 at position 0, pad slot, length 1, every page the spare one.
    """

    input_tokens: Tensor  # int64 [num_seqs]
    input_positions: Tensor  # int64 [num_seqs]
    seq_lens: Tensor  # int32 [num_seqs]: with the current token
    slot_mapping: Tensor  # int64 [num_seqs]
    block_tables: Tensor  # int32 [num_seqs, max_pages]
    sampled: Tensor  # int64 [num_seqs]: the token that the next advance feeds to the row
    max_seq_lens: Tensor  # int32 [num_seqs]
    status: Tensor  # int32 [num_seqs]: RowStatus
    output_tokens: Tensor  # int64 [num_seqs, window]: what was sampled since the host looked last
    num_generated: Tensor  # int32 [num_seqs]: how many of these
    stop_token_ids: Tensor  # int64 [stop tokens]
    block_size: int
    spare_page: int

    @classmethod
    def allocate(
        cls,
        num_seqs: int,
        max_pages: int,
        window: int,
        stop_token_ids: list[int],
        block_size: int,
        spare_page: int,
        device: torch.device,
    ) -> "BatchState":
        """A batch of padding rows only; `window`: the steps between two looks of the host."""

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            input_tokens=full(0, num_seqs),
            input_positions=full(0, num_seqs),
            seq_lens=full(1, num_seqs, dtype=torch.int32),
            slot_mapping=full(-1, num_seqs),
            block_tables=full(spare_page, num_seqs, max_pages, dtype=torch.int32),
            sampled=full(0, num_seqs),
            max_seq_lens=full(0, num_seqs, dtype=torch.int32),
            status=full(RowStatus.PADDING, num_seqs, dtype=torch.int32),
            output_tokens=full(0, num_seqs, window),
            num_generated=full(0, num_seqs, dtype=torch.int32),
            stop_token_ids=torch.tensor(stop_token_ids, dtype=torch.int64, device=device),
            block_size=block_size,
            spare_page=spare_page,
        )

    def admit(self, row: int, prompt_length: int, max_seq_len: int, pages: list[int]) -> None:
        """Make `row`, a padding one, a sequence with its prompt in `pages`; next it advances to its first new token."""
        self.seq_lens[row] = prompt_length
        self.max_seq_lens[row] = max_seq_len
        self.block_tables[row].fill_(self.spare_page)
        self.block_tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self.status[row] = RowStatus.RUNNING

    def advance(self, rows: slice) -> None:
        """Record what was sampled for `rows`, and turn each to its next token; a row that is done freezes."""
        advance_until_stop(
            self.input_tokens[rows],
            self.sampled[rows],
            self.input_positions[rows],
            self.seq_lens[rows],
            [self.slot_mapping[rows]],
            [self.block_tables[rows]],
            [self.block_size],
            self.status[rows],
            self.output_tokens[rows],
            self.num_generated[rows],
            self.stop_token_ids,
            self.max_seq_lens[rows],
        )

    def look(self, rows: slice) -> list[tuple[RowStatus, list[int]]]:
        """The host's look: of each row its status and the tokens that it recorded since the last look."""
        status, counts = self.status[rows].tolist(), self.num_generated[rows].tolist()
        tokens = self.output_tokens[rows, : max(counts)].tolist()
        self.num_generated[rows] = 0
        return [(RowStatus(s), row[:n]) for s, n, row in zip(status, counts, tokens, strict=True)]

    def remove(self, row: int, last: int) -> None:
        """Drop `row`; the `last` live row moves into its place, so that the live rows come first."""
        padding = {
            self.input_tokens: 0,
            self.input_positions: 0,
            self.seq_lens: 1,
            self.slot_mapping: -1,
            self.block_tables: self.spare_page,
            self.max_seq_lens: 0,
            self.status: int(RowStatus.PADDING),
            self.num_generated: 0,
        }
        for buffer, value in padding.items():
            buffer[row] = buffer[last]
            buffer[last] = value
