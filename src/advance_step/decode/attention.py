"""The attention function that transformers calls in every layer, over the paged cache.

It is registered under the name `PAGED`; a model is put on it by `model.set_attn_implementation(PAGED)`, and each call
of the model carries the metadata of its step as the keyword argument `paged`. No mask function is registered under
the name, so transformers builds no mask: who sees what follows from the metadata alone.
"""

import contextlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from advance_step.decode.cache import PagedKVCache, head_dim_of
from advance_step.decode.paged_kernels import PagedKernel

PAGED = "advance_step_paged"

# Up to this many keys in the batch (rows * length) SDPA on the CPU is faster than two batched matmuls, which have a
# fixed cost of about 80 us; beyond it SDPA falls behind, by 2x at 32 rows (bfloat16 and float32, 2 cores). Compiled,
# the matmuls are as fast from the first key on, and a choice by length would be a recompile.
SDPA_MAX_KEYS = 512


# Layer types of transformers' configs that are attention over keys and values, with nothing else kept between steps.
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Kinds of rotary positions whose frequencies follow from the longest sequence of the batch: a row's tokens would depend
# on its neighbours.
BATCH_WIDE_ROPE = {"dynamic", "longrope"}


def check_model(model: Any) -> None:
    """ValueError for a model whose layers do not all attend through transformers' attention interface."""
    name, config = type(model).__name__, model.config.get_text_config()
    if model.config.is_encoder_decoder or not model._supports_attention_backend:
        raise ValueError(f"model: expected a causal LM on transformers' attention interface, got {name}")
    other = sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES)
    if other:
        raise ValueError(f"model: expected only layers of {sorted(LAYER_TYPES)}, got {other} in {name}")
    if rope := _rope_types(config) & BATCH_WIDE_ROPE:
        raise ValueError(f"model: expected positions that each row has for itself, got {rope.pop()} RoPE in {name}")
    if (size := getattr(config, "v_head_dim", None)) not in (None, head_dim_of(config)):
        raise ValueError(f"model: expected values of head_dim={head_dim_of(config)}, as keys, got {size} in {name}")


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions in a config: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    return {p["rope_type"] for p in each if "rope_type" in p}


@dataclass
class Prefill:
    """Whole prompts, packed one after the other into a batch of one."""

    cache: PagedKVCache
    write_index: Tensor
    lengths: list[int]
    contexts: list[int]
    block_tables: Tensor
    layers: set[int] = field(default_factory=set)  # those that came here for attention


@dataclass
class DecodeStep:
    """One token of every row, against all that the row has in its pages."""

    cache: PagedKVCache
    write_index: Tensor
    block_tables: Tensor  # [rows, pages]
    input_positions: Tensor  # [rows]
    seq_lens: Tensor  # [rows]
    kernel: PagedKernel | None  # reads the pages itself; None: they are gathered
    read_index: Tensor | None  # where they lie, then; the same in all layers
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window; layers share them

    def mask(self, length: int, sliding_window: int | None, dtype: torch.dtype) -> Tensor:
        """What each row may see of its `length` gathered keys, as an additive mask [rows, 1, 1, length]."""
        if sliding_window not in self.masks:
            key = torch.arange(length, device=self.input_positions.device)
            visible = _visible(self.input_positions[:, None], key, sliding_window)  # [rows, length]
            self.masks[sliding_window] = _additive(visible, dtype)[:, None, None]
        return self.masks[sliding_window]


def paged_attention(
    module: Any,
    query: Tensor,  # [batch, heads, length, head_dim]
    key: Tensor,  # [batch, kv_heads, length, head_dim]
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    paged: Prefill | DecodeStep | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write this layer's new keys and values by slot, and attend through the block tables.

    Returns [batch, length, heads, head_dim] and no attention weights, as transformers expects.
    Raises ValueError for what it would otherwise get wrong: a call without `paged`, a ready-made mask, attention
    sinks, a position bias.
    """
    if paged is None:
        raise ValueError(
            f"paged: expected Prefill or DecodeStep, got None (attention {PAGED!r} needs the step's metadata)"
        )
    unsupported = {
        "attention_mask": attention_mask,
        "s_aux": kwargs.get("s_aux"),
        "position_bias": kwargs.get("position_bias"),
    }
    for name, argument in unsupported.items():
        if argument is not None:
            raise ValueError(f"{name}: expected None, got a tensor: attention over pages does not support it")

    layer = module.layer_idx
    paged.cache.write(layer, paged.write_index, key, value)
    if isinstance(paged, Prefill):
        paged.layers.add(layer)
        return _shim(paged, layer, query, key, value, scaling, sliding_window, softcap), None

    if paged.kernel is not None:
        keys, values = paged.cache.pages(layer)
        tables, seq_lens = paged.block_tables, paged.seq_lens
        query = query.transpose(1, 2)
        return paged.kernel.attend(query, keys, values, tables, seq_lens, scaling, sliding_window, softcap), None
    return _gathered(query, layer, paged, scaling, sliding_window, softcap), None


def _gathered(
    query: Tensor, layer: int, step: DecodeStep, scaling: float, sliding_window: int | None, softcap: float | None
) -> Tensor:
    """Attention of one token a row to all pages in its table's columns, copied one after the other."""
    rows, heads, T, head_dim = query.shape
    assert step.read_index is not None
    keys, values = step.cache.read(layer, step.read_index, rows)
    if T > 1:
        g = heads // keys.shape[1]
        keys, values = keys.repeat_interleave(g, 1), values.repeat_interleave(g, 1)
        mask = _additive(
            _visible(step.input_positions[:, :, None], torch.arange(keys.shape[2]), sliding_window), query.dtype
        )[:, None]
        return _matmul_attention(query, keys, values, mask, scaling, softcap).transpose(1, 2)
    if step.input_positions.dim() == 2:
        step.input_positions = step.input_positions[:, 0]
    kv_heads, length = keys.shape[1:3]
    mask = step.mask(length, sliding_window, query.dtype)
    grouped = query.view(rows, kv_heads, heads // kv_heads, head_dim)  # heads that share keys attend as one
    few = not torch.compiler.is_compiling() and rows * length <= SDPA_MAX_KEYS
    if softcap is None and (few or query.device.type != "cpu"):
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    else:
        out = _matmul_attention(grouped, keys, values, mask, scaling, softcap)
    return out.reshape(rows, 1, heads, head_dim)


def _shim(paged: Any, layer: Any, query: Any, key: Any, value: Any, scaling: Any, window: Any, softcap: Any) -> Any:
    out = []
    ends = torch.tensor(paged.lengths).cumsum(0).tolist()
    for i, (n, c, e) in enumerate(zip(paged.lengths, paged.contexts, ends, strict=True)):
        q = query[:, :, e - n : e]
        pages = -(-(n + c) // paged.cache.block_size)
        k, v = paged.cache.read(layer, paged.cache.read_index(paged.block_tables[i : i + 1, :pages]), 1)
        k, v = k[:, :, : n + c], v[:, :, : n + c]
        g = query.shape[1] // k.shape[1]
        k, v = k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)
        mask = _additive(_visible(torch.arange(c, c + n)[:, None], torch.arange(c + n), window), q.dtype)
        out.append(_matmul_attention(q, k, v, mask, scaling, softcap).transpose(1, 2))
    return torch.cat(out, 1)


def _prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: list[int],
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """Causal attention of each packed prompt to itself: [1, tokens, heads, head_dim]."""
    group = query.shape[1] // key.shape[1]
    out = []
    for q, k, v in zip(query.split(lengths, 2), key.split(lengths, 2), value.split(lengths, 2), strict=True):
        length = q.shape[2]
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)  # [1, heads, length, head_dim]
        if softcap is None and (sliding_window is None or sliding_window >= length):
            attended = scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling)
        else:
            position = torch.arange(length, device=q.device)
            mask = _additive(_visible(position[:, None], position, sliding_window), q.dtype)  # [length, length]
            attended = _matmul_attention(q, k, v, mask, scaling, softcap)
        out.append(attended.transpose(1, 2))
    return torch.cat(out, 1)


def _matmul_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """softmax(query @ keys.T * scaling + mask) @ values, with the scores capped before the mask where asked."""
    scores = torch.matmul(query, keys.transpose(2, 3)).mul_(scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.matmul(scores.add_(mask).softmax(-1), values)


def _visible(query_position: Tensor, key_position: Tensor, sliding_window: int | None) -> Tensor:
    """Causal, and not further back than the window, which counts the token itself."""
    visible = key_position <= query_position
    if sliding_window is not None:
        visible &= key_position > query_position - sliding_window
    return visible


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where visible, -inf elsewhere."""
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill_(~visible, -torch.inf)


AttentionInterface.register(PAGED, paged_attention)


def layouts_of(model: Any) -> Any:
    c = model.config.get_text_config()
    return (c.num_hidden_layers, getattr(c, "num_key_value_heads", None) or c.num_attention_heads, head_dim_of(c))


@contextlib.contextmanager
def paged(model: Any) -> Any:
    before = model.config._attn_implementation
    model.set_attn_implementation(PAGED)
    try:
        yield
    finally:
        model.set_attn_implementation(before)
