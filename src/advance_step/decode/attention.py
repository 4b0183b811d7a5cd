"""The attention function that transformers calls in every layer, over the paged cache.

It is registered under the name `PAGED`; a model is on it within `with paged(model):`, and each call of the model then
carries the metadata of its pass as the keyword argument `paged`. No mask function is registered under the name,
so transformers builds no mask: who sees what follows from the metadata and from the layouts of the cache.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from advance_step.decode import cpu_attention
from advance_step.decode.cache import PagedKVCache, visible_keys
from advance_step.decode.layouts import AttendingBy
from advance_step.decode.paged_kernels import PagedKernel

PAGED = "advance_step_paged"

# Up to this many keys in the batch (rows * length) SDPA on the CPU is faster than two batched matmuls, which have a
# fixed cost of about 80 us; beyond it SDPA falls behind, by 2x at 32 rows (bfloat16 and float32, 2 cores). Compiled,
# the matmuls are as fast from the first key on, and a choice by length would be a recompile.
SDPA_MAX_KEYS = 512

# Prompts attend in blocks of so many tokens where SDPA cannot work the mask out by itself: what a block may see is a
# mask [QUERY_BLOCK, keys], and never one of a prompt's length squared.
QUERY_BLOCK = 256


def paged(model: Any) -> AttendingBy:
    """A context in which the model is on the paged attention function."""
    return AttendingBy(model, PAGED)


@dataclass
class Prefill:
    """Chunks of several rows' prompts, packed one after the other into a batch of one.

    Row i's chunk has lengths[i] tokens, which come after contexts[i] tokens that its pages already hold.
    """

    cache: PagedKVCache
    write_index: dict[int, Tensor]
    lengths: list[int]
    contexts: list[int]
    block_tables: Tensor  # [rows, pages]: read for rows with a context
    calls: int = 0  # of attention, so far in this pass
    read_indices: dict[tuple[int, int], dict[int, Tensor]] = field(default_factory=dict)  # by row and first page

    def read(self, call: int, row: int, first: int, end: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the row's tokens from the start of `first`'s page to `end`, [1, kv_heads, tokens, dim]."""
        block_size = self.cache.block_size
        begin = first // block_size
        if (row, begin) not in self.read_indices:  # the same in all calls with such a window
            pages = self.block_tables[row : row + 1, begin : -(-end // block_size)]
            self.read_indices[row, begin] = self.cache.read_index(pages)
        keys, values = self.cache.read(call, self.read_indices[row, begin], 1)
        tokens = end - begin * block_size
        return keys[:, :, :tokens], values[:, :, :tokens]


@dataclass
class DecodeStep:
    """The next tokens of every row, one or several, against all that the row has in its pages.

    With several, each at its own position: the step's own keys are among those in the pages, and a token sees those
    at its position and before. On a CPU the native core reads the pages; elsewhere `kernel`, where there is one, for
    one token a row; else they are gathered.
    """

    cache: PagedKVCache
    slot_mapping: Tensor  # [rows] or [rows, tokens]
    block_tables: Tensor  # [rows, pages]; negative: a page that the row does not have
    input_positions: Tensor  # [rows] or [rows, tokens]
    seq_lens: Tensor  # [rows]
    kernel: PagedKernel | None
    native: bool = field(init=False)  # whether the core serves the cache
    calls: int = 0  # of attention, so far in this pass
    masks: dict[tuple[int | None, int], Tensor] = field(default_factory=dict)  # layers share them

    def __post_init__(self) -> None:
        self.native = self.cache.is_native
        if self.native:  # writes by slot, and knows what a negative page is; it takes [rows, tokens]
            rows = self.block_tables.shape[0]
            self.slot_mapping = self.slot_mapping.reshape(rows, -1).contiguous()
            self.input_positions = self.input_positions.reshape(rows, -1).contiguous()
            return
        self.write_index = self.cache.write_index(self.slot_mapping.flatten())
        if self.kernel is None:  # all pages are gathered, those that a row does not have too
            self.block_tables = torch.where(self.block_tables < 0, self.cache.spare_page, self.block_tables)
            self.read_index = self.cache.read_index(self.block_tables)  # the same in all layers

    def mask(self, length: int, window: int | None, group: int, dtype: torch.dtype) -> Tensor:
        """What each token may see of its row's `length` gathered keys, as an additive mask.

        [rows, 1, 1, length] for one token a row, else [rows, 1, group * tokens, length].
        """
        if (window, group) not in self.masks:
            key = torch.arange(length, device=self.input_positions.device)
            visible = visible_keys(self.input_positions[..., None], key, window)  # [rows, (tokens,) length]
            if visible.dim() == 3:
                visible = visible.repeat(1, group, 1)
            mask = _additive(visible, dtype)
            self.masks[window, group] = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        return self.masks[window, group]


def paged_attention(
    module: Any,
    query: Tensor,  # [batch, heads, length, key_dim]
    key: Tensor,  # [batch, kv_heads, length, key_dim]
    value: Tensor,  # [batch, kv_heads, length, value_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    paged: Prefill | DecodeStep | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write this call's new keys and values by slot, and attend through the block tables.

    The call is known by its place in the order of calls of the pass, and has the window of its layout. s_aux [heads]
    are attention sinks: a score of each head that takes part in the softmax and has no value.
    Returns [batch, length, heads, value_dim], contiguous, and no attention weights, as transformers expects.
    Raises ValueError for what it would otherwise get wrong: a call without `paged`, a ready-made mask, a position
    bias, keys and values that are not as the layout says.
    """
    if paged is None:
        raise ValueError(
            f"paged: expected Prefill or DecodeStep, got None (attention {PAGED!r} needs the step's metadata)"
        )
    for name, argument in {"attention_mask": attention_mask, "position_bias": kwargs.get("position_bias")}.items():
        if argument is not None:
            raise ValueError(f"{name}: expected None, got a tensor: attention over pages does not support it")
    call = paged.calls
    paged.calls = call + 1
    layout = paged.cache.layouts[call]
    got, expected = (key.shape[1], key.shape[3], value.shape[3]), (layout.kv_heads, layout.key_dim, layout.value_dim)
    if got != expected:
        raise ValueError(f"attention call {call}: expected kv heads, key and value size {expected}, got {got}")
    if scaling is None:
        scaling = query.shape[-1] ** -0.5

    if isinstance(paged, DecodeStep) and paged.native:
        return _native(query, key, value, call, paged, scaling, softcap, s_aux), None
    paged.cache.write(call, paged.write_index, key, value)
    if isinstance(paged, Prefill):
        return _prefill(query, key, value, call, paged, scaling, softcap, s_aux), None
    if paged.kernel is not None and query.shape[2] == 1:
        keys, values = paged.cache.pages(call)
        tables, seq_lens = paged.block_tables, paged.seq_lens
        query = query.transpose(1, 2)
        return paged.kernel.attend(query, keys, values, tables, seq_lens, scaling, layout.window, softcap), None
    return _gathered(query, call, paged, scaling, softcap, s_aux), None


def _native(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: int,
    step: DecodeStep,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    return cpu_attention.attend(
        query,
        key,
        value,
        step.cache.layers[call],
        step.slot_mapping,
        step.block_tables,
        step.input_positions,
        scaling,
        step.cache.layouts[call].window or 0,
        softcap or 0.0,
        sinks,
    )


def _gathered(
    query: Tensor, call: int, step: DecodeStep, scaling: float, softcap: float | None, sinks: Tensor | None
) -> Tensor:
    """Attention of each row's tokens to all pages in its table's columns, copied one after the other."""
    rows, heads, tokens, _ = query.shape
    keys, values = step.cache.read(call, step.read_index, rows)
    kv_heads, length = keys.shape[1:3]
    mask = step.mask(length, step.cache.layouts[call].window, heads // kv_heads, query.dtype)
    few = not torch.compiler.is_compiling() and rows * length <= SDPA_MAX_KEYS
    if softcap is None and sinks is None and (few or query.device.type != "cpu"):
        out = scaled_dot_product_attention(_grouped(query, kv_heads), keys, values, attn_mask=mask, scale=scaling)
    else:
        out = _matmul_attention(_grouped(query, kv_heads), keys, values, mask, scaling, softcap, sinks, tokens)
    return out.reshape(rows, heads, tokens, -1).transpose(1, 2).contiguous()


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    call: int,
    prefill: Prefill,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention of each packed chunk to itself and to what its row already has: [1, tokens, heads, dim]."""
    window, lengths = prefill.cache.layouts[call].window, prefill.lengths
    out = []
    for row, (q, k, v, context) in enumerate(
        zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), prefill.contexts, strict=True)
    ):
        length, ahead = q.shape[2], context  # ahead: keys that lie before the first token's own
        if context:
            first = 0 if window is None else max(0, context - window + 1)
            k, v = prefill.read(call, row, first, context + length)
            ahead = k.shape[2] - length
        plain = softcap is None and sinks is None
        if plain and not ahead and (window is None or window >= length):
            k, v = (kv.repeat_interleave(q.shape[1] // kv.shape[1], 1) for kv in (k, v))
            out.append(scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling).transpose(1, 2))
            continue
        for tokens, keys in _blocks(length, ahead, window):
            position = torch.arange(ahead + tokens.start, ahead + tokens.stop, device=q.device)
            visible = visible_keys(position[:, None], torch.arange(keys.start, keys.stop, device=q.device), window)
            q_block, k_block, v_block = q[:, :, tokens], k[:, :, keys], v[:, :, keys]
            if plain:
                k_block, v_block = (kv.repeat_interleave(q.shape[1] // kv.shape[1], 1) for kv in (k_block, v_block))
                attended = scaled_dot_product_attention(q_block, k_block, v_block, attn_mask=visible, scale=scaling)
            else:
                mask = _additive(visible, q.dtype).repeat(q.shape[1] // k.shape[1], 1)  # [group * tokens, keys]
                grouped, count = _grouped(q_block, k.shape[1]), len(visible)
                attended = _matmul_attention(grouped, k_block, v_block, mask, scaling, softcap, sinks, count)
                attended = attended.reshape(1, q.shape[1], count, -1)
            out.append(attended.transpose(1, 2))
    return torch.cat(out, 1)


def _blocks(length: int, ahead: int, window: int | None) -> Iterator[tuple[slice, slice]]:
    """Blocks of a chunk's tokens, and of the keys that each may see: `ahead` before the chunk's own, and those."""
    for begin in range(0, length, QUERY_BLOCK):
        end = min(begin + QUERY_BLOCK, length)
        first = 0 if window is None else max(0, ahead + begin - window + 1)
        yield slice(begin, end), slice(first, ahead + end)


def _grouped(query: Tensor, kv_heads: int) -> Tensor:
    """Heads that share keys attend as one: [batch, heads, tokens, dim] -> [batch, kv_heads, group * tokens, dim]."""
    batch, _, _, dim = query.shape
    return query.reshape(batch, kv_heads, -1, dim)


def _matmul_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
    tokens: int,
) -> Tensor:
    """softmax(query @ keys.T * scaling + mask) @ values, of queries [batch, kv_heads, group * tokens, dim].

    Scores are capped before the mask where asked; sinks [heads] are one more score, whose share goes nowhere.
    """
    scores = torch.matmul(query, keys.transpose(2, 3)).mul_(scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.add_(mask)
    if sinks is None:
        return torch.matmul(scores.softmax(-1), values)
    batch, kv_heads, _, length = scores.shape
    sink = sinks.to(scores.dtype).view(1, kv_heads, -1, 1).repeat_interleave(tokens, 2).expand(batch, -1, -1, -1)
    return torch.matmul(torch.cat((scores, sink), -1).softmax(-1)[..., :length], values)


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


AttentionInterface.register(PAGED, paged_attention)
