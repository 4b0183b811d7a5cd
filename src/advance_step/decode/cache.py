"""The paged KV cache: written by slot, read through block tables."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# index_select(0, index) as one operator, for the compiler. Where it sees the gather itself, it works an address out for
# every element in whatever reads the pages: on the CPU that made compiled attention several times slower than eager.
_LIBRARY = torch.library.Library("advance_step_decode", "DEF")
_LIBRARY.define("gather_rows(Tensor source, Tensor index) -> Tensor")
_LIBRARY.impl("gather_rows", lambda source, index: source.index_select(0, index), "CompositeExplicitAutograd")


@torch.library.register_fake("advance_step_decode::gather_rows", lib=_LIBRARY)
def _gather_rows_fake(source: Tensor, index: Tensor) -> Tensor:
    return source.new_empty(index.shape[0], source.shape[1])


def head_dim_of(config: Any) -> int:
    """The size of a head, of a model with such a config of transformers."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass
class PagedKVCache:
    """Keys and values of every layer, in pages that any row may own.

    A layer is one tensor [num_pages + 1, 2, kv_heads, block_size, head_dim] (2: keys, values). Heads come before
    the tokens of a page, so that whole pages, copied one after the other, are what a batched matmul takes without
    another copy. The last page belongs to no row: what goes to the pad slot lands there, which keeps the write free
    of branches and of host syncs.
    """

    layers: list[Tensor]

    @classmethod
    def allocate(
        cls,
        layouts: Any,
        num_pages: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> "PagedKVCache":
        """A cache of zeros: a page that was never written may be read (masked), and must not hold a NaN."""
        num_layers, kv_heads, head_dim = layouts
        shape = (num_pages + 1, 2, kv_heads, block_size, head_dim)
        return cls([torch.zeros(shape, dtype=dtype, device=device) for _ in range(num_layers)])

    @property
    def spare_page(self) -> int:
        """The page that belongs to no row."""
        return self.layers[0].shape[0] - 1

    @property
    def block_size(self) -> int:
        """Tokens in a page."""
        return self.layers[0].shape[3]

    def write_index(self, slots: Tensor) -> Tensor:
        """Where the tokens of `slots` int64 [tokens] lie in a layer seen as rows of head_dim: [2 * tokens * kv_heads].

        It is the same for all layers, so that a step computes it once.
        """
        _, two, kv_heads, block_size, _ = self.layers[0].shape
        slots = torch.where(slots < 0, self.spare_page * block_size, slots)
        page, offset = slots // block_size, slots % block_size
        plane = torch.arange(two * kv_heads, device=slots.device).view(two, 1, kv_heads)  # [2, 1, kv_heads]
        lane = page[:, None] * (two * kv_heads) + plane  # [2, tokens, kv_heads]
        return (lane * block_size + offset[:, None]).flatten()

    def read_index(self, block_tables: Tensor) -> Tensor:
        """Where the pages of `block_tables` [rows, pages] lie in a layer seen as rows of block_size * head_dim.

        As block_tables' dtype, [2 * rows * kv_heads * pages], in the order of `read`'s result.
        """
        _, two, kv_heads, _, _ = self.layers[0].shape
        plane = torch.arange(two * kv_heads, device=block_tables.device).view(two, 1, kv_heads, 1)
        return (block_tables[:, None, :] * (two * kv_heads) + plane).flatten()  # of [2, rows, kv_heads, pages]

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages as they lie there, each [num_pages + 1, block_size, kv_heads, head_dim]."""
        keys, values = self.layers[layer].transpose(2, 3).unbind(1)
        return keys, values

    def write(self, layer: int, index: Tensor, keys: Tensor, values: Tensor) -> None:
        """Store keys and values [batch, kv_heads, length, head_dim] at `index` (of the batch * length tokens)."""
        head_dim = keys.shape[-1]
        new = torch.stack((keys.transpose(1, 2), values.transpose(1, 2)))  # [2, batch, length, kv_heads, head_dim]
        self.layers[layer].view(-1, head_dim).index_copy_(0, index, new.view(-1, head_dim))

    def read(self, layer: int, index: Tensor, rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows` rows, each [rows, kv_heads, pages * block_size, head_dim] and contiguous."""
        kv = self.layers[layer]
        _, _, kv_heads, block_size, head_dim = kv.shape
        source = kv.view(-1, block_size * head_dim)
        if torch.compiler.is_compiling():
            pages = torch.ops.advance_step_decode.gather_rows(source, index)
        else:
            pages = source.index_select(0, index)
        keys, values = pages.view(2, rows, kv_heads, -1, head_dim).unbind(0)
        return keys, values
