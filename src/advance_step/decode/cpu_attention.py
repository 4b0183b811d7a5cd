"""Attention over pages on a CPU as one operator of the native core, which reads the pages where they lie.

    paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, Tensor positions,
                    Tensor block_tables, Tensor starts, float scaling, int window, float softcap, Tensor? sinks)
        -> Tensor

The new tokens of several rows are packed one row after the other; row r's are t in [starts[r], starts[r + 1]). It
stores the new keys and values by slot, and attends from each token to all that its row has up to its position.
Equivalent to, for each row r, token t and head h over kv head g:

    pages[slot // block_size, :, g, slot % block_size] = key[0, g, t], value[0, g, t]   # slot = slot_mapping[t] >= 0
    seen = (0 <= positions[t] - j < window for j in the row's tokens)                   # window 0: all before it
    scores = softcap(query[0, h, t] @ keys[seen].T * scaling)                           # 0: not capped
    out[0, t, h] = softmax([scores, sinks[h]])[:-1] @ values[seen]

query: [1, heads, tokens, key_dim]; key, value: [1, kv_heads, tokens, key_dim or value_dim]; pages: as a layer of
`PagedKVCache`; all of one dtype: float32, bfloat16 or float16. slot_mapping, positions: int64 [tokens]. block_tables:
int32 or int64 [rows, columns]; what is negative there stands for the last page. starts: int64 [rows + 1]. A token at a
position past the table sees the last of what the table has. Sums are in float32. Returns [1, tokens, heads, value_dim],
contiguous. ValueError, before anything is written, for slots and pages that there are not, and negative positions.

The core hands rows of many tokens back to `attend_by_products`: prompts, for which matrix products of torch are faster.
(There, the keys and values of a row that begins at position 0 are those that are given, whatever their slots.) Steps
and prompts are one operator so that a compiled model serves both.
"""

import torch
from torch import Tensor

from advance_step.decode.torch_attention import Scoring, attend_prompts

LIBRARY = torch.library.Library("advance_step_decode", "FRAGMENT")
LIBRARY.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, Tensor positions,"
    " Tensor block_tables, Tensor starts, float scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)
LIBRARY.define(
    "attend_by_products(Tensor query, Tensor key, Tensor value, Tensor pages, Tensor positions, Tensor block_tables,"
    " Tensor starts, float scaling, int window, float softcap, Tensor? sinks, Tensor(a!) out) -> ()"
)

attend = torch.ops.advance_step_decode.paged_attention.default  # looked up once: a step calls it in every layer

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@torch.library.register_fake("advance_step_decode::paged_attention", lib=LIBRARY)
def _fake(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    _, heads, tokens, _ = query.shape
    return query.new_empty(1, tokens, heads, value.shape[3])


@torch.library.impl(LIBRARY, "attend_by_products", "CPU")
def attend_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: Tensor,
    positions: Tensor,
    block_tables: Tensor,
    starts: Tensor,
    scaling: float,
    window: int,
    softcap: float,
    sinks: Tensor | None,
    out: Tensor,
) -> None:
    """`paged_attention` after its new keys and values are stored, of rows at positions that follow one another."""
    lengths, contexts = starts.diff().tolist(), positions[starts[:-1]].tolist()
    scoring = Scoring(scaling, window or None, softcap or None, sinks)
    attend_prompts(query, key, value, pages, block_tables, lengths, contexts, scoring, out)


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the native core attends there."""
    name = "advance_step_decode::paged_attention"
    return device.type == "cpu" and dtype in DTYPES and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
