"""Attention over pages against attention written out in float64."""

from __future__ import annotations

import types

import pytest
import torch

from advance_step.decode.attention import SDPA_MAX_KEYS, DecodeStep, Prefill, paged_attention
from advance_step.decode.cache import PagedKVCache

HEADS, KV_HEADS, HEAD_DIM, BLOCK_SIZE = 6, 2, 8, 4
LAYER = types.SimpleNamespace(layer_idx=0)


def written_out(query, keys, values, position, scaling, window, softcap):
    """One query [heads, head_dim] at `position` against keys and values [length, kv_heads, head_dim]."""
    out = torch.empty(query.shape, dtype=torch.float64)
    first = 0 if window is None else max(0, position - window + 1)
    for head in range(len(query)):
        shared = head // (len(query) // keys.shape[1])
        k, v = keys[first : position + 1, shared].double(), values[first : position + 1, shared].double()
        scores = (k @ query[head].double()) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        out[head] = scores.softmax(0) @ v
    return out


@pytest.mark.parametrize("rows", [3, 40])  # SDPA on the CPU; batched matmuls
@pytest.mark.parametrize("window, softcap", [(None, None), (5, None), (None, 2.0), (5, 2.0)])
def test_decode_step(rows, window, softcap):
    torch.manual_seed(0)
    pages = 5
    assert (rows * pages * BLOCK_SIZE > SDPA_MAX_KEYS) == (rows == 40)
    cache = PagedKVCache.allocate(1, rows * pages, KV_HEADS, BLOCK_SIZE, HEAD_DIM, torch.float32, torch.device("cpu"))
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape))  # beyond a row's length: what must not be seen
    tables = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    positions = torch.randint(0, pages * BLOCK_SIZE, (rows,))
    slots = tables.gather(1, positions[:, None] // BLOCK_SIZE)[:, 0] * BLOCK_SIZE + positions % BLOCK_SIZE
    query = torch.randn(rows, HEADS, 1, HEAD_DIM)
    key, value = torch.randn(2, rows, KV_HEADS, 1, HEAD_DIM).unbind(0)
    step = DecodeStep(cache, cache.write_index(slots), tables, positions, positions + 1, None, cache.read_index(tables))
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    out, weights = paged_attention(LAYER, query, key, value, None, paged=step, **options)

    assert out.shape == (rows, 1, HEADS, HEAD_DIM) and weights is None
    for row in range(rows):
        stored = cache.layers[0][tables[row].long()]  # [pages, 2, kv_heads, block_size, head_dim]
        keys, values = stored.permute(1, 0, 3, 2, 4).reshape(2, -1, KV_HEADS, HEAD_DIM)
        position = int(positions[row])
        assert torch.equal(keys[position], key[row, :, 0]) and torch.equal(values[position], value[row, :, 0])
        expected = written_out(query[row, :, 0], keys, values, position, 0.3, window, softcap)
        torch.testing.assert_close(out[row, 0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("window, softcap", [(None, None), (5, None), (None, 2.0), (5, 2.0)])
def test_prefill(window, softcap):
    torch.manual_seed(0)
    lengths = [7, 1, 4]
    cache = PagedKVCache.allocate(1, 4, KV_HEADS, BLOCK_SIZE, HEAD_DIM, torch.float32, torch.device("cpu"))
    slots = torch.randperm(16)[: sum(lengths)]
    query = torch.randn(1, HEADS, sum(lengths), HEAD_DIM)
    key, value = torch.randn(2, 1, KV_HEADS, sum(lengths), HEAD_DIM).unbind(0)
    prefill = Prefill(cache, cache.write_index(slots), lengths)
    options = {"scaling": 0.3, "sliding_window": window, "softcap": softcap}
    out, _ = paged_attention(LAYER, query, key, value, None, paged=prefill, **options)

    token = 0
    for length in lengths:
        keys, values = (kv[0, :, token : token + length].transpose(0, 1) for kv in (key, value))
        for position in range(length):
            expected = written_out(query[0, :, token], keys, values, position, 0.3, window, softcap)
            torch.testing.assert_close(out[0, token].double(), expected, rtol=1e-5, atol=1e-5)
            assert torch.equal(cache.layers[0][slots[token] // 4, 0, :, slots[token] % 4], keys[position])
            token += 1
    assert prefill.layers == {0}


@pytest.mark.parametrize("name", ["s_aux", "position_bias", "attention_mask"])
def test_what_is_not_supported_is_refused(name):
    query, key = torch.zeros(1, HEADS, 1, HEAD_DIM), torch.zeros(1, KV_HEADS, 1, HEAD_DIM)
    cache = PagedKVCache.allocate(1, 1, KV_HEADS, BLOCK_SIZE, HEAD_DIM, torch.float32, torch.device("cpu"))
    options = {"attention_mask": None, "paged": Prefill(cache, cache.write_index(torch.tensor([0])), [1])}
    with pytest.raises(ValueError, match=f"{name}: expected None, got a tensor"):
        paged_attention(LAYER, query, key, key, scaling=1.0, **options | {name: torch.zeros(1)})
    assert not cache.layers[0].any()


def test_a_call_without_metadata_is_refused():
    with pytest.raises(ValueError, match="paged: expected Prefill or DecodeStep, got None"):
        paged_attention(LAYER, *[torch.zeros(1, HEADS, 1, HEAD_DIM)] * 3, None, scaling=1.0)
