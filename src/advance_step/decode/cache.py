"""The paged KV cache: written by slot, read through block tables."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from advance_step.decode import huge_pages


@dataclass(frozen=True)
class LayerLayout:
    """What one call of attention in a model's forward hands over, and what a token sees there.

    Most models call attention once a layer; one that calls it twice has two layouts for that layer.
    """

    kv_heads: int
    key_dim: int
    value_dim: int
    window: int | None = None  # tokens that a token sees, itself among them; None: all before it
    softcap: bool = False  # scores are capped
    sinks: bool = False  # each head has a score that no key has

    @property
    def dim(self) -> int:
        """The elements that a key and a value each have in the cache: those of the longer of the two."""
        return max(self.key_dim, self.value_dim)


def visible_keys(query_position: Tensor, key_position: Tensor, window: int | None) -> Tensor:
    """Causal, and not further back than the window, which counts the token itself."""
    visible = key_position <= query_position
    if window is not None:
        visible &= key_position > query_position - window
    return visible


@dataclass
class PagedKVCache:
    """Keys and values of every layer, in pages that any row may own.

    A layer (a call of attention) is one tensor [num_pages + 1, 2, kv_heads, block_size, dim] (2: keys, values), so
    that one scatter writes and one gather reads both; where keys and values differ in size, the shorter ones end in
    zeros. Heads come before the tokens of a page, so that whole pages, copied one after the other, are what a batched
    matmul takes without another copy. The last page belongs to no row: what goes to the pad slot lands there, which
    keeps the write free of branches and of host syncs.
    """

    layouts: Sequence[LayerLayout]
    layers: list[Tensor]

    @classmethod
    def allocate(
        cls, layouts: Sequence[LayerLayout], num_pages: int, block_size: int, dtype: torch.dtype, device: torch.device
    ) -> "PagedKVCache":
        """A cache of zeros: a page that was never written may be read (masked), and must not hold a NaN."""
        shapes = [(num_pages + 1, 2, layout.kv_heads, block_size, layout.dim) for layout in layouts]
        if device.type == "cpu":
            return cls(layouts, [huge_pages.zeros(shape, dtype) for shape in shapes])
        return cls(layouts, [torch.zeros(shape, dtype=dtype, device=device) for shape in shapes])

    @property
    def spare_page(self) -> int:
        """The page that belongs to no row."""
        return self.layers[0].shape[0] - 1

    @property
    def block_size(self) -> int:
        """Tokens in a page."""
        return self.layers[0].shape[3]

    @property
    def device(self) -> torch.device:
        """Where the pages are."""
        return self.layers[0].device

    def write_index(self, slots: Tensor) -> dict[int, Tensor]:
        """Where the tokens of `slots` int64 [tokens] lie in a layer seen as rows of dim, by the layer's kv_heads.

        Each is int64 [2 * tokens * kv_heads]. A step computes them once: layers with as many heads share one.
        """
        slots = torch.where(slots < 0, self.spare_page * self.block_size, slots)
        page, offset = slots // self.block_size, slots % self.block_size
        index = {}
        for kv_heads in self._kv_heads():
            plane = torch.arange(2 * kv_heads, device=slots.device).view(2, 1, kv_heads)
            lane = page[:, None] * (2 * kv_heads) + plane  # [2, tokens, kv_heads]
            index[kv_heads] = (lane * self.block_size + offset[:, None]).flatten()
        return index

    def read_index(self, block_tables: Tensor) -> dict[int, Tensor]:
        """Where the pages of `block_tables` [rows, pages] lie in a layer seen as rows of block_size * dim.

        By the layer's kv_heads; each as block_tables' dtype, [2 * rows * kv_heads * pages], in the order of `read`'s
        result.
        """
        index = {}
        for kv_heads in self._kv_heads():
            plane = torch.arange(2 * kv_heads, device=block_tables.device).view(2, 1, kv_heads, 1)
            index[kv_heads] = (block_tables[:, None, :] * (2 * kv_heads) + plane).flatten()  # [2, rows, heads, pages]
        return index

    def _kv_heads(self) -> list[int]:
        return sorted({layout.kv_heads for layout in self.layouts})

    def pages(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of all pages as they lie there, each [num_pages + 1, block_size, kv_heads, dim]."""
        keys, values = self.layers[layer].transpose(2, 3).unbind(1)
        return keys, values

    def write(self, layer: int, index: dict[int, Tensor], keys: Tensor, values: Tensor) -> None:
        """Store keys and values [batch, kv_heads, length, key_dim or value_dim] at `index` of batch * length tokens."""
        layout = self.layouts[layer]
        if layout.key_dim != layout.value_dim:
            keys, values = (pad(kv, (0, layout.dim - kv.shape[-1])) for kv in (keys, values))
        new = torch.stack((keys.transpose(1, 2), values.transpose(1, 2)))  # [2, batch, length, kv_heads, dim]
        self.layers[layer].view(-1, layout.dim).index_copy_(0, index[layout.kv_heads], new.view(-1, layout.dim))

    def read(self, layer: int, index: dict[int, Tensor], rows: int) -> tuple[Tensor, Tensor]:
        """Keys and values of `rows` rows, each [rows, kv_heads, pages * block_size, key_dim or value_dim].

        Contiguous where keys and values are of one size.
        """
        layout = self.layouts[layer]
        source = self.layers[layer].view(-1, self.block_size * layout.dim)
        pages = source.index_select(0, index[layout.kv_heads])
        keys, values = pages.view(2, rows, layout.kv_heads, -1, layout.dim).unbind(0)
        return keys[..., : layout.key_dim], values[..., : layout.value_dim]


def read_row(pages: Tensor, block_table: Tensor, first: int, end: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a row's tokens from the start of `first`'s page to `end`, each [1, kv_heads, tokens, dim].

    pages: [pages, 2, kv_heads, block_size, dim]; block_table: [columns].
    """
    block_size = pages.shape[3]
    begin = first // block_size
    column = block_table[begin : -(-end // block_size)]
    own = pages[torch.where(column < 0, len(pages) - 1, column)]  # [columns, 2, kv_heads, block_size, dim]
    keys, values = own.permute(1, 2, 0, 3, 4).flatten(2, 3)[None, :, :, : end - begin * block_size].unbind(1)
    return keys, values
