"""One prefill pass: pieces of prompts, packed one after the other, their keys and values into pages."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advance_step import compute_slot_mapping
from advance_step.decode.attention import Prefill
from advance_step.decode.cache import PagedKVCache
from advance_step.decode.scheduler import Chunk


def prefill(model: Any, cache: PagedKVCache, chunks: Sequence[Chunk]) -> Tensor:
    """Compute the chunks' keys and values; returns logits [rows, vocabulary] after those that are their row's last."""
    device = model.device
    lengths = [chunk.length for chunk in chunks]
    width = max(len(chunk.row.pages) for chunk in chunks)
    tables = torch.tensor(
        [chunk.row.pages + [cache.spare_page] * (width - len(chunk.row.pages)) for chunk in chunks], device=device
    )
    tokens = [t for c in chunks for t in c.row.request.token_ids[c.start : c.start + c.length]]
    positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.length)], device=device)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)  # [chunks + 1]
    slots = torch.empty_like(positions)
    compute_slot_mapping(ends, positions, tables, slots, cache.block_size)
    sampled_from = ends[1:][torch.tensor([chunk.is_last for chunk in chunks], device=device)] - 1
    contexts = [chunk.start for chunk in chunks]
    return model(
        input_ids=torch.tensor([tokens], device=device),  # [1, tokens]
        position_ids=positions[None],
        use_cache=False,
        logits_to_keep=sampled_from,
        paged=Prefill(cache, cache.write_index(slots), lengths, contexts, tables),
    ).logits[0]
