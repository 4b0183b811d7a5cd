"""Attention of a decode step on a CPU as one operator of the native core, which reads the pages where they lie.

    paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping, Tensor block_tables,
                    Tensor positions, float scaling, int window, float softcap, Tensor? sinks) -> Tensor

It stores the new keys and values by slot, and attends from each token to all that its row has up to its position.
Equivalent to, for each row r and token t, and head h over kv head g (`attention.py` has the same in torch's operators,
where there is no core):

    pages[slot // block_size, :, g, slot % block_size] = key[r, g, t], value[r, g, t]   # slot = slot_mapping[r, t] >= 0
    seen = (0 <= positions[r, t] - j < window for j in the row's tokens)                # window 0: all before it
    scores = softcap(query[r, h, t] @ keys[seen].T * scaling)                           # 0: not capped
    out[r, t, h] = softmax([scores, sinks[h]])[:-1] @ values[seen]

query: [rows, heads, tokens, key_dim]; key, value: [rows, kv_heads, tokens, key_dim or value_dim]; pages: as a layer of
`PagedKVCache`; all of one dtype: float32, bfloat16 or float16. slot_mapping, positions: int64 [rows, tokens].
block_tables: int32 or int64 [rows, columns]; what is negative there stands for the last page. A token at a position
past the table sees the last of what the table has. Sums are in float32. Returns [rows, tokens, heads, value_dim],
contiguous. ValueError, before anything is written, for slots and pages that there are not, and negative positions.
"""

import torch
from torch import Tensor

LIBRARY = torch.library.Library("advance_step_decode", "FRAGMENT")
LIBRARY.define(
    "paged_attention(Tensor query, Tensor key, Tensor value, Tensor(a!) pages, Tensor slot_mapping,"
    " Tensor block_tables, Tensor positions, float scaling, int window, float softcap, Tensor? sinks) -> Tensor"
)

attend = torch.ops.advance_step_decode.paged_attention.default  # looked up once: a step calls it in every layer

DTYPES = {torch.float32, torch.bfloat16, torch.float16}


@torch.library.register_fake("advance_step_decode::paged_attention", lib=LIBRARY)
def _fake(query: Tensor, key: Tensor, value: Tensor, *args: object) -> Tensor:
    rows, heads, tokens, _ = query.shape
    return query.new_empty(rows, tokens, heads, value.shape[3])


def serves(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the native core attends there."""
    name = "advance_step_decode::paged_attention"
    return device.type == "cpu" and dtype in DTYPES and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CPU")
