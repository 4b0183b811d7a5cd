"""Writes and reads of the cache against plain loops, bit for bit; what is not written keeps its sentinel."""

from __future__ import annotations

import pytest
import torch

from advance_step.decode.cache import LayerLayout, PagedKVCache

SENTINEL = -77.0


def filled(num_pages: int, kv_heads: int, block_size: int, head_dim: int = 4) -> PagedKVCache:
    layouts = [LayerLayout(kv_heads, head_dim, head_dim)] * 2
    cache = PagedKVCache.allocate(layouts, num_pages, block_size, torch.float32, torch.device("cpu"))
    for layer in cache.layers:
        layer.fill_(SENTINEL)
    return cache


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("batch, length", [(4, 1), (1, 4)])  # a decode step; packed prompts
def test_write_goes_to_its_slots_and_nowhere_else(block_size, batch, length):
    kv_heads, num_pages = 3, 6
    cache = filled(num_pages, kv_heads, block_size)
    slots = [5 * block_size, -1, 2 * block_size + block_size - 1, 0]  # -1: the pad slot
    keys, values = torch.randn(2, batch, kv_heads, length, 4).unbind(0)
    cache.write(1, cache.write_index(torch.tensor(slots)), keys, values)

    expected = torch.full((num_pages, 2, kv_heads, block_size, 4), SENTINEL)
    for token, slot in enumerate(slots):
        if slot >= 0:
            row, at = (token, 0) if length == 1 else (0, token)
            expected[slot // block_size, 0, :, slot % block_size] = keys[row, :, at]
            expected[slot // block_size, 1, :, slot % block_size] = values[row, :, at]
    assert torch.equal(cache.layers[1][:num_pages], expected)
    assert (cache.layers[0] == SENTINEL).all()


@pytest.mark.parametrize("block_size", [1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_read_follows_the_tables(block_size, dtype):
    kv_heads, num_pages = 2, 12
    cache = filled(num_pages, kv_heads, block_size)
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape))
    wide = torch.randperm(num_pages).view(3, 4).to(dtype)
    tables = wide[:, :3]  # not contiguous, as in a step that needs only some of the columns
    keys, values = cache.read(0, cache.read_index(tables), rows=3)

    assert keys.shape == values.shape == (3, kv_heads, 3 * block_size, 4)
    assert keys.is_contiguous() and values.is_contiguous()
    for row in range(3):
        for position in range(3 * block_size):
            page, offset = int(tables[row, position // block_size]), position % block_size
            assert torch.equal(keys[row, :, position], cache.layers[0][page, 0, :, offset])
            assert torch.equal(values[row, :, position], cache.layers[0][page, 1, :, offset])


def test_layers_may_differ():
    """In heads, and in the sizes of keys and values; what is written is read, in every layer."""
    layouts = [LayerLayout(2, 4, 4), LayerLayout(1, 6, 4), LayerLayout(3, 2, 5)]
    cache = PagedKVCache.allocate(layouts, 6, 4, torch.float32, torch.device("cpu"))
    tables = torch.tensor([[5, 1], [0, 3]])
    slots = (tables[:, :, None] * 4 + torch.arange(4)).flatten()  # of both rows, token by token
    write_index, read_index = cache.write_index(slots), cache.read_index(tables)
    written = [
        (torch.randn(2, layout.kv_heads, 8, layout.key_dim), torch.randn(2, layout.kv_heads, 8, layout.value_dim))
        for layout in layouts
    ]
    for layer, (keys, values) in enumerate(written):
        cache.write(layer, write_index, keys, values)
    for layer, (keys, values) in enumerate(written):
        read = cache.read(layer, read_index, rows=2)
        assert torch.equal(read[0], keys) and torch.equal(read[1], values)
        assert [kv.shape[1:] for kv in cache.pages(layer)] == [(4, layouts[layer].kv_heads, layouts[layer].dim)] * 2


def test_slots_past_32_bits():
    cache = filled(2, 1, 4)
    slots = torch.tensor([2**33 + 1])
    lane = 2**31  # the page, of two lanes: keys and values
    assert cache.write_index(slots)[1].tolist() == [(lane * 2) * 4 + 1, (lane * 2 + 1) * 4 + 1]
