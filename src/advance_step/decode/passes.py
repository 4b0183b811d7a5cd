"""What a pass of the model over the paged cache is: whose tokens go through, and how each call of attention is served.

A pass is handed to the model's forward as the keyword argument `paged`, and every call of attention asks it.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from advance_step.decode import cpu_attention
from advance_step.decode.cache import PagedKVCache, visible_keys
from advance_step.decode.paged_kernels import PagedKernel
from advance_step.decode.torch_attention import Scoring, additive_mask, attend_gathered, attend_prompts


class Pass(Protocol):
    """A pass over `cache`, in which there were so many `calls` of attention."""

    cache: PagedKVCache
    calls: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: int, scoring: Scoring) -> Tensor:
        """Write the call's new keys and values by slot, and attend through the block tables.

        query: [batch, heads, length, key_dim]; key, value: [batch, kv_heads, length, key_dim or value_dim].
        Returns [batch, length, heads, value_dim], contiguous.
        """


@dataclass
class CorePass:
    """New tokens of several rows, packed one row after the other into a batch of one, by the native core on a CPU.

    One token of each row as well as whole prompts: row i's are [starts[i], starts[i + 1]).
    """

    cache: PagedKVCache
    slot_mapping: Tensor  # int64 [tokens]
    positions: Tensor  # int64 [tokens]
    block_tables: Tensor  # [rows, pages]; negative: a page that the row does not have
    starts: Tensor  # int64 [rows + 1]
    calls: int = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: int, scoring: Scoring) -> Tensor:
        """As `Pass` says."""
        return cpu_attention.attend(
            query,
            key,
            value,
            self.cache.layers[call],
            self.slot_mapping,
            self.positions,
            self.block_tables,
            self.starts,
            scoring.scaling,
            scoring.window or 0,
            scoring.softcap or 0.0,
            scoring.sinks,
        )


@dataclass
class Prefill:
    """Pieces of several rows' prompts, packed one after the other into a batch of one.

    Row i's piece has lengths[i] tokens, which come after contexts[i] tokens that its pages already hold.
    """

    cache: PagedKVCache
    slot_mapping: Tensor  # int64 [tokens]
    lengths: list[int]
    contexts: list[int]
    block_tables: Tensor  # [rows, pages]: read for rows with a context
    calls: int = 0

    def __post_init__(self) -> None:
        self.write_index = self.cache.write_index(self.slot_mapping)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: int, scoring: Scoring) -> Tensor:
        """As `Pass` says."""
        self.cache.write(call, self.write_index, key, value)
        out = query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
        pages = self.cache.layers[call]
        attend_prompts(query, key, value, pages, self.block_tables, self.lengths, self.contexts, scoring, out)
        return out


@dataclass
class DecodeStep:
    """The next tokens of every row, one or several, against all that the row has in its pages.

    With several, each at its own position: the step's own keys are among those in the pages, and a token sees those
    at its position and before. `kernel` reads the pages, for one token a row; without one they are gathered.
    """

    cache: PagedKVCache
    slot_mapping: Tensor  # [rows] or [rows, tokens]
    block_tables: Tensor  # [rows, pages]; negative: a page that the row does not have
    input_positions: Tensor  # [rows] or [rows, tokens]
    seq_lens: Tensor  # [rows]
    kernel: PagedKernel | None
    calls: int = 0
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)  # layers share them

    def __post_init__(self) -> None:
        self.write_index = self.cache.write_index(self.slot_mapping.flatten())
        if self.kernel is None:  # all pages are gathered, those that a row does not have too
            self.block_tables = torch.where(self.block_tables < 0, self.cache.spare_page, self.block_tables)
            self.read_index = self.cache.read_index(self.block_tables)  # the same in all layers

    def attend(self, query: Tensor, key: Tensor, value: Tensor, call: int, scoring: Scoring) -> Tensor:
        """As `Pass` says."""
        self.cache.write(call, self.write_index, key, value)
        if self.kernel is not None:
            keys, values = self.cache.pages(call)
            tables, seq_lens = self.block_tables, self.seq_lens
            scaling, window, softcap, _ = scoring
            return self.kernel.attend(query.transpose(1, 2), keys, values, tables, seq_lens, scaling, window, softcap)
        rows, heads = query.shape[:2]
        keys, values = self.cache.read(call, self.read_index, rows)
        mask = self.mask(keys.shape[2], scoring.window, heads // keys.shape[1], query.dtype)
        out = attend_gathered(query, keys, values, mask, scoring)
        return out.transpose(1, 2).contiguous()

    def mask(self, length: int, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """What each token may see of its row's `length` gathered keys, as an additive mask.

        [rows, 1, 1, length] for one token a row, else [rows, 1, group * tokens, length].
        """
        if (window, group) not in self.masks:
            key = torch.arange(length, device=self.input_positions.device)
            visible = visible_keys(self.input_positions[..., None], key, window)  # [rows, (tokens,) length]
            if visible.dim() == 3:
                visible = visible.repeat(1, group, 1)
            mask = additive_mask(visible, dtype)
            self.masks[window, group] = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        return self.masks[window, group]
