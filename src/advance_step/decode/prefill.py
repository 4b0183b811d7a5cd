"""One prefill pass: pieces of prompts, packed one after the other, their keys and values into pages."""

from collections.abc import Sequence

import torch
from torch import Tensor

from advance_step import compute_slot_mapping
from advance_step.decode.forward import Forward, Prompts
from advance_step.decode.scheduler import Chunk


def prefill(forward: Forward, chunks: Sequence[Chunk]) -> Tensor:
    """Compute the chunks' keys and values; returns logits [rows, vocabulary] after those that are their row's last."""
    cache, device = forward.cache, forward.cache.device
    lengths = [chunk.length for chunk in chunks]
    width = max(len(chunk.row.pages) for chunk in chunks)
    tables = torch.tensor(
        [chunk.row.pages + [cache.spare_page] * (width - len(chunk.row.pages)) for chunk in chunks],
        dtype=torch.int32,
        device=device,
    )
    tokens = [t for c in chunks for t in c.row.request.token_ids[c.start : c.start + c.length]]
    positions = torch.tensor([p for c in chunks for p in range(c.start, c.start + c.length)], device=device)
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)  # [chunks + 1]
    slots = torch.empty_like(positions)
    compute_slot_mapping(ends, positions, tables, slots, cache.block_size)
    sampled_from = ends[1:][torch.tensor([chunk.is_last for chunk in chunks], device=device)] - 1
    contexts = [chunk.start for chunk in chunks]
    return forward.prompts(
        Prompts(torch.tensor(tokens, device=device), positions, slots, tables, lengths, contexts, sampled_from)
    )
