"""Attention in torch's operators, on keys and values that are given: what a row's tokens see, and what comes of it.

Queries are [rows, heads, tokens, key_dim]; keys and values [rows, kv_heads, length, key_dim or value_dim].
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from advance_step.decode.cache import read_row, visible_keys

# Up to this many keys in the batch (rows * length) SDPA on the CPU is faster than two batched matmuls, which have a
# fixed cost of about 80 us; beyond it SDPA falls behind, by 2x at 32 rows (bfloat16 and float32, 2 cores).
SDPA_MAX_KEYS = 512

# Prompts attend in blocks of so many tokens where SDPA cannot work the mask out by itself: what a block may see is a
# mask [QUERY_BLOCK, keys], and never one of a prompt's length squared.
QUERY_BLOCK = 256


class Scoring(NamedTuple):
    """How a call of attention weighs keys."""

    scaling: float  # of the products of queries and keys
    window: int | None = None  # tokens that a token sees, itself among them; None: all before it
    softcap: float | None = None  # what caps the scores
    sinks: Tensor | None = None  # [heads]: a score of each head that takes part in the softmax and has no value

    @property
    def is_plain(self) -> bool:
        """Whether SDPA does it."""
        return self.softcap is None and self.sinks is None


def additive_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


def attend_gathered(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scoring: Scoring) -> Tensor:
    """Attention of each row's tokens to its keys; returns [rows, heads, tokens, value_dim].

    mask: what is added to the scores of the heads that share keys, [rows, 1, 1 or group * tokens, length].
    """
    rows, heads, tokens, _ = query.shape
    kv_heads, length = keys.shape[1:3]
    grouped = query.reshape(rows, kv_heads, -1, query.shape[3])  # heads that share keys attend as one
    few = not torch.compiler.is_compiling() and rows * length <= SDPA_MAX_KEYS
    if scoring.is_plain and (few or query.device.type != "cpu"):
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scoring.scaling)
    else:
        out = _by_matmuls(grouped, keys, values, mask, scoring, tokens)
    return out.reshape(rows, heads, tokens, -1)


def attend_prompts(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    block_tables: Tensor,
    lengths: list[int],
    contexts: list[int],
    scoring: Scoring,
    out: Tensor,
) -> None:
    """Causal attention of pieces of several rows, packed one after the other, to themselves and to what comes before.

    query, key, value: those of all pieces, of rows = 1. Row i's piece has lengths[i] tokens, after contexts[i] others;
    of a row that has some, all keys and values are read from its pages.
    pages: a layer of `PagedKVCache`, in which the new keys and values are too; block_tables: [rows, columns].
    out: [1, tokens, heads, value_dim], what is written.
    """
    window, scaling = scoring.window, scoring.scaling
    pieces = zip(
        query.split(lengths, 2),
        key.split(lengths, 2),
        value.split(lengths, 2),
        out.transpose(1, 2).split(lengths, 2),
        contexts,
        strict=True,
    )
    for row, (q, k, v, to, context) in enumerate(pieces):
        length, ahead = q.shape[2], context  # ahead: keys that lie before the first token's own
        if context:
            first = 0 if window is None else max(0, context - window + 1)
            k, v = read_row(pages, block_tables[row], first, context + length)
            k, v = k[..., : key.shape[3]], v[..., : value.shape[3]]
            ahead = k.shape[2] - length
        group = q.shape[1] // k.shape[1]
        if scoring.is_plain and not ahead and (window is None or window >= length):
            k, v = (kv.repeat_interleave(group, 1) for kv in (k, v))
            to.copy_(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling))
            continue
        for tokens, keys in _blocks(length, ahead, window):
            position = torch.arange(ahead + tokens.start, ahead + tokens.stop, device=q.device)
            visible = visible_keys(position[:, None], torch.arange(keys.start, keys.stop, device=q.device), window)
            q_block, k_block, v_block = q[:, :, tokens], k[:, :, keys], v[:, :, keys]
            if scoring.is_plain:
                k_block, v_block = (kv.repeat_interleave(group, 1) for kv in (k_block, v_block))
                attended = scaled_dot_product_attention(q_block, k_block, v_block, attn_mask=visible, scale=scaling)
            else:
                mask = additive_mask(visible, q.dtype).repeat(group, 1)  # [group * tokens, keys]
                grouped = q_block.reshape(1, k.shape[1], -1, q.shape[3])
                attended = _by_matmuls(grouped, k_block, v_block, mask, scoring, len(visible))
            to[:, :, tokens] = attended.reshape(1, q.shape[1], len(visible), -1)


def _blocks(length: int, ahead: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of a piece's tokens, and of the keys that each may see: `ahead` before the piece's own, and those."""
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, ahead + begin - window + 1)
        yield slice(begin, end), slice(first, ahead + end)


def _by_matmuls(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scoring: Scoring,
    tokens: int,
) -> Tensor:
    """softmax(query @ keys.T * scaling + mask) @ values, of queries [rows, kv_heads, group * tokens, dim].

    Scores are capped before the mask; the share of the sinks goes nowhere.
    """
    scores = torch.matmul(query, keys.transpose(2, 3)).mul_(scoring.scaling)
    if scoring.softcap is not None:
        scores = torch.tanh(scores / scoring.softcap) * scoring.softcap
    scores = scores.add_(mask)
    if scoring.sinks is None:
        return torch.matmul(scores.softmax(-1), values)
    batch, kv_heads, _, length = scores.shape
    sink = scoring.sinks.to(scores.dtype).view(1, kv_heads, -1, 1).repeat_interleave(tokens, 2)
    sink = sink.expand(batch, -1, -1, -1)
    return torch.matmul(torch.cat((scores, sink), -1).softmax(-1)[..., :length], values)
