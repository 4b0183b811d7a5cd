"""The batch as the device sees it: buffers that keep their addresses from the first step to the last."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class BatchState:
    """What a step reads and the operator advances. Live rows are [0, num_queries); the others are padding.

    A padding row is neutral: token 0 at position 0, pad slot, length 1, every page the spare one.
    """

    input_tokens: Tensor  # int64 [num_seqs]
    input_positions: Tensor  # int64 [num_seqs]
    seq_lens: Tensor  # int32 [num_seqs]: with the current token
    slot_mapping: Tensor  # int64 [num_seqs]
    block_tables: Tensor  # int32 [num_seqs, max_pages]
    sampled: Tensor  # int64 [num_seqs]: the token that the next advance feeds to the row
    spare_page: int

    @classmethod
    def allocate(cls, num_seqs: int, max_pages: int, spare_page: int, device: torch.device) -> "BatchState":
        """A batch of padding rows only."""

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        return cls(
            input_tokens=full(0, num_seqs),
            input_positions=full(0, num_seqs),
            seq_lens=full(1, num_seqs, dtype=torch.int32),
            slot_mapping=full(-1, num_seqs),
            block_tables=full(spare_page, num_seqs, max_pages, dtype=torch.int32),
            sampled=full(0, num_seqs),
            spare_page=spare_page,
        )

    def admit(self, row: int, prompt_length: int, pages: list[int]) -> None:
        """Make `row` a sequence whose prompt is cached in `pages`; the next advance turns to its first new token."""
        self.seq_lens[row] = prompt_length
        self.block_tables[row].fill_(self.spare_page)
        self.block_tables[row, : len(pages)] = torch.tensor(pages, dtype=torch.int32)

    def remove(self, row: int, last: int) -> None:
        """Drop `row`; the `last` live row moves into its place, so that the live rows stay [0, num_queries)."""
        for buffer in (self.seq_lens, self.block_tables, self.sampled):  # the advance writes all the others
            buffer[row] = buffer[last]
        self.seq_lens[last] = 1
        self.block_tables[last] = self.spare_page
