"""Attention kernels for GPUs that read keys and values through the block tables themselves.

`find` looks once, at the start, for what the environment has and the model allows. With such a kernel a captured step
costs what its rows hold; without one, attention.py gathers as many pages for every row as the graph was captured for.
(FlashInfer's decode kernels are not among them: they are planned on the host, anew as lengths grow.)
"""

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from advance_step.decode.cache import LayerLayout
from advance_step.decode.layouts import layouts_of

BLOCK_SIZE = 256  # what tokens in a page must be a multiple of

# query [rows, 1, heads, head_dim], keys and values [pages, block_size, kv_heads, head_dim], block_tables and seq_lens
# int32, scaling, sliding window, softcap -> [rows, 1, heads, head_dim]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, float, int | None, float | None], Tensor]


class PagedKernel(NamedTuple):
    """A kernel and what to call it in the output."""

    name: str
    attend: Attend


def find(model: Any, layouts: Sequence[LayerLayout], block_size: int) -> PagedKernel | None:
    """The first kernel that serves all layouts with such pages, or None; those known have FlashAttention 2's limits."""
    if not _has_kernels(model) or block_size % BLOCK_SIZE or not all(map(_within_limits, layouts)):
        return None
    if takes("flash_attn", "flash_attn_with_kvcache", "block_table", "softcap"):
        return PagedKernel("flash-attn", flash_attn_pages)
    capped = any(layout.softcap for layout in layouts)
    if takes("torch.nn.attention.varlen", "varlen_attn", "block_table") and not capped:
        return PagedKernel(f"torch {torch.__version__}'s varlen_attn", varlen_pages)
    return None


def _has_kernels(model: Any) -> bool:
    """Whether there are kernels for the model's device and dtype."""
    if model.device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(model.device) < (8, 0):
        return False
    return model.dtype in (torch.float16, torch.bfloat16)


def _within_limits(layout: LayerLayout) -> bool:
    return layout.key_dim == layout.value_dim <= 256 and layout.key_dim % 8 == 0 and not layout.sinks


def default_block_size(model: Any) -> int:
    """Tokens in a page where nobody asks for another number: what a kernel wants, if one serves the model."""
    return BLOCK_SIZE if _has_kernels(model) and find(model, layouts_of(model), BLOCK_SIZE) else 16


def flash_attn_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """By the package flash-attn. Arguments and result: `Attend`."""
    from flash_attn import flash_attn_with_kvcache

    return flash_attn_with_kvcache(
        query,
        keys,
        values,
        cache_seqlens=seq_lens,
        block_table=block_tables,
        softmax_scale=scaling,
        causal=True,
        window_size=_window(sliding_window),
        softcap=softcap or 0.0,
    )


def varlen_pages(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
) -> Tensor:
    """By torch itself, from the version on whose `varlen_attn` takes a block table. Arguments and result: `Attend`.

    Raises ValueError where scores are to be capped: this kernel cannot.
    """
    if softcap is not None:
        raise ValueError(f"softcap: expected None, got {softcap}: torch's varlen_attn has none")
    from torch.nn.attention.varlen import varlen_attn

    ends = torch.arange(query.shape[0] + 1, dtype=torch.int32, device=query.device)  # one query a row
    out = varlen_attn(
        query[:, 0],
        keys,
        values,
        ends,
        ends,  # without effect: of keys there are seqused_k, in pages
        1,
        block_tables.shape[1] * keys.shape[1],
        scale=scaling,
        window_size=_window(sliding_window),
        enable_gqa=query.shape[2] != keys.shape[2],
        seqused_k=seq_lens,
        block_table=block_tables,
    )
    assert isinstance(out, Tensor)  # a pair where more was asked for
    return out[:, None]


def takes(module: str, function: str, *parameters: str) -> bool:
    """Whether there is such a function here, and has these parameters."""
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError):  # not installed, another version, or built for another torch
        return False
    return set(parameters) <= set(inspect.signature(found).parameters)


def _window(sliding_window: int | None) -> tuple[int, int]:
    """As both kernels count it: keys before the query's own, keys after it; -1: all.

    Without a window no side is bounded, though none lies after the query: only so do the kernels take the query heads
    that share keys together.
    """
    return (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
