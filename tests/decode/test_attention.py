"""Attention over pages against attention written out in float64."""

from __future__ import annotations

import types
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from advance_step.decode import cpu_attention, torch_attention
from advance_step.decode.attention import paged_attention
from advance_step.decode.cache import LayerLayout, PagedKVCache
from advance_step.decode.passes import CorePass, DecodeStep, Prefill
from advance_step.decode.torch_attention import SDPA_MAX_KEYS

HEADS, KV_HEADS, BLOCK_SIZE, SCALING = 6, 2, 4, 0.3
LAYER = types.SimpleNamespace(layer_idx=0)

# window, softcap, sinks, key size, value size
KINDS = [
    (None, None, False, 8, 8),
    (5, None, False, 8, 8),
    (None, 2.0, False, 8, 8),
    (5, 2.0, False, 8, 8),
    (None, None, True, 8, 8),
    (5, None, True, 8, 8),
    (None, None, False, 12, 8),
    (5, 2.0, True, 4, 8),
]
needs_core = pytest.mark.skipif(not cpu_attention.serves(torch.device("cpu"), torch.float32), reason="no native core")
kinds = pytest.mark.parametrize("window, softcap, sinks, key_dim, value_dim", KINDS)


def written_out(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    position: int,
    scaling: float,
    window: int | None,
    softcap: float | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """One query [heads, key_dim] at `position` against keys and values [length, kv_heads, dim]."""
    out = torch.empty(len(query), values.shape[2], dtype=torch.float64)
    first = 0 if window is None else max(0, position - window + 1)
    for head in range(len(query)):
        shared = head // (len(query) // keys.shape[1])
        k, v = keys[first : position + 1, shared].double(), values[first : position + 1, shared].double()
        scores = (k @ query[head].double()) * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat((scores, sinks[head : head + 1].double()))
        out[head] = scores.softmax(0)[: len(v)] @ v
    return out


def cache_of(pages: int, layout: LayerLayout) -> PagedKVCache:
    """A cache full of numbers: beyond a row's length is what must not be seen."""
    cache = PagedKVCache.allocate([layout], pages, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    cache.layers[0].copy_(torch.randn(cache.layers[0].shape))
    return cache


def slots_of(table: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    return table[positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE


def stored(cache: PagedKVCache, table: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [tokens, kv_heads, dim] of a row, page by page."""
    pages = cache.layers[0][table.long()]  # [pages, 2, kv_heads, block_size, dim]
    keys, values = pages.permute(1, 0, 3, 2, 4).reshape(2, -1, KV_HEADS, pages.shape[-1])
    return keys[..., : cache.layouts[0].key_dim], values[..., : cache.layouts[0].value_dim]


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_core), False])
@pytest.mark.parametrize("rows", [3, 40])  # SDPA on the CPU; batched matmuls
@pytest.mark.parametrize("tokens", [None, 3])  # one token a row; several, as when drafts are verified
@kinds
def test_decode_step(native, rows, tokens, window, softcap, sinks, key_dim, value_dim):
    torch.manual_seed(0)
    pages, count = 5, tokens or 1
    assert (rows * pages * BLOCK_SIZE > SDPA_MAX_KEYS) == (rows == 40)
    cache = cache_of(rows * pages, LayerLayout(KV_HEADS, key_dim, value_dim, window))
    tables = torch.randperm(rows * pages, dtype=torch.int32).view(rows, pages)
    positions = torch.randint(0, pages * BLOCK_SIZE - count + 1, (rows, 1)) + torch.arange(count)
    slots = torch.cat([slots_of(table.long(), at) for table, at in zip(tables, positions, strict=True)])
    query = torch.randn(rows, HEADS, count, key_dim)
    key, value = torch.randn(rows, KV_HEADS, count, key_dim), torch.randn(rows, KV_HEADS, count, value_dim)
    s_aux = torch.randn(HEADS) if sinks else None
    given = [query, key, value]
    if native:
        step: Any = CorePass(cache, slots, positions.flatten(), tables, torch.arange(rows + 1) * count)
        given = [tensor.transpose(0, 1).flatten(1, 2)[None] for tensor in given]  # packed
    else:
        step = DecodeStep(cache, slots, tables, positions if tokens else positions[:, 0], positions[:, -1] + 1, None)
    out, weights = paged_attention(LAYER, *given, None, paged=step, scaling=SCALING, softcap=softcap, s_aux=s_aux)

    assert out.shape == ((1, rows * count) if native else (rows, count)) + (HEADS, value_dim)
    assert out.is_contiguous() and weights is None
    out = out.view(rows, count, HEADS, value_dim)
    assert step.calls == 1
    for row in range(rows):
        keys, values = stored(cache, tables[row])
        for token, position in enumerate(positions[row].tolist()):
            assert torch.equal(keys[position], key[row, :, token])
            assert torch.equal(values[position], value[row, :, token])
            expected = written_out(query[row, :, token], keys, values, position, SCALING, window, softcap, s_aux)
            torch.testing.assert_close(out[row, token].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_core), False])
@pytest.mark.parametrize("contexts", [[0, 0, 0], [6, 0, 9]])  # whole prompts; what comes after earlier chunks
@pytest.mark.parametrize("longest", [7, 27])  # of which the core takes the first itself
@pytest.mark.parametrize("block", [3, 256])  # of queries
@kinds
def test_prefill(monkeypatch, native, contexts, longest, block, window, softcap, sinks, key_dim, value_dim):
    torch.manual_seed(0)
    monkeypatch.setattr(torch_attention, "QUERY_BLOCK", block)
    lengths, pages = [longest, 1, 4], 9
    cache = cache_of(3 * pages, LayerLayout(KV_HEADS, key_dim, value_dim, window))
    tables = torch.randperm(3 * pages, dtype=torch.int32).view(3, pages)
    spans = [torch.arange(context, context + n) for context, n in zip(contexts, lengths, strict=True)]
    slots = torch.cat([slots_of(table.long(), span) for table, span in zip(tables, spans, strict=True)])
    query = torch.randn(1, HEADS, sum(lengths), key_dim)
    key, value = torch.randn(1, KV_HEADS, sum(lengths), key_dim), torch.randn(1, KV_HEADS, sum(lengths), value_dim)
    s_aux = torch.randn(HEADS) if sinks else None
    if native:
        starts = torch.tensor([0, *lengths]).cumsum(0)
        prefill: Any = CorePass(cache, slots, torch.cat(spans), tables, starts)
    else:
        prefill = Prefill(cache, slots, lengths, contexts, tables)
    out, _ = paged_attention(
        LAYER, query, key, value, None, paged=prefill, scaling=SCALING, softcap=softcap, s_aux=s_aux
    )

    assert out.shape == (1, sum(lengths), HEADS, value_dim) and out.is_contiguous() and prefill.calls == 1
    token = 0
    for row, span in enumerate(spans):
        keys, values = stored(cache, tables[row])
        for position in span.tolist():
            assert torch.equal(keys[position], key[0, :, token]) and torch.equal(values[position], value[0, :, token])
            expected = written_out(query[0, :, token], keys, values, position, SCALING, window, softcap, s_aux)
            torch.testing.assert_close(out[0, token].double(), expected, rtol=1e-5, atol=1e-5)
            token += 1


class Largest(TorchDispatchMode):
    """The most elements of any tensor that an operator returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_core), False])
@pytest.mark.parametrize("window, softcap, sinks", [(64, None, False), (64, 2.0, False), (None, 2.0, True)])
def test_a_long_prompt_takes_no_mask_or_scores_of_its_length_squared(native, window, softcap, sinks):
    length = 2048
    cache = PagedKVCache.allocate([LayerLayout(1, 4, 4, window)], 1, length, torch.float32, torch.device("cpu"))
    query, key = torch.randn(1, 2, length, 4), torch.randn(1, 1, length, 4)
    tables, slots = torch.zeros(1, 1).int(), torch.arange(length)
    if native:
        prefill: Any = CorePass(cache, slots, slots, tables, torch.tensor([0, length]))
    else:
        prefill = Prefill(cache, slots, [length], [0], tables)
    s_aux = torch.zeros(2) if sinks else None
    with Largest() as largest:
        paged_attention(LAYER, query, key, key, None, paged=prefill, scaling=1.0, softcap=softcap, s_aux=s_aux)
    keys = length if window is None else torch_attention.QUERY_BLOCK + window
    assert (
        length * 8 <= largest.elements <= 2 * torch_attention.QUERY_BLOCK * (keys + 1)
    )  # scores of two heads, and a sink


@pytest.mark.parametrize("name", ["position_bias", "attention_mask"])
def test_what_is_not_supported_is_refused(name):
    cache = PagedKVCache.allocate([LayerLayout(2, 8, 8)], 1, BLOCK_SIZE, torch.float32, torch.device("cpu"))
    query, key = torch.zeros(1, HEADS, 1, 8), torch.ones(1, KV_HEADS, 1, 8)
    prefill = Prefill(cache, torch.tensor([0]), [1], [0], torch.tensor([[0]]))
    options = {"attention_mask": None, "paged": prefill, "scaling": 1.0}
    with pytest.raises(ValueError, match=f"{name}: expected None, got a tensor"):
        paged_attention(LAYER, query, key, key, **options | {name: torch.zeros(1)})
    with pytest.raises(ValueError, match=r"attention call 0: expected kv heads, .* \(2, 8, 8\), got \(2, 8, 4\)"):
        paged_attention(LAYER, query, key, key[..., :4], **options | {"paged": prefill, "scaling": 1.0})
    assert not cache.layers[0].any()


def test_a_call_without_metadata_is_refused():
    with pytest.raises(ValueError, match="paged: expected a pass, got None"):
        paged_attention(LAYER, *[torch.zeros(1, HEADS, 1, 8)] * 3, None, scaling=1.0)
