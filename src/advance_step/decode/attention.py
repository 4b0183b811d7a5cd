"""The attention function that transformers calls in every layer, over the paged cache.

It is registered under the name `PAGED`; a model is on it within `with paged(model):`, and each call of the model then
carries its pass (`passes.py`) as the keyword argument `paged`. No mask function is registered under the name, so
transformers builds no mask: who sees what follows from the pass and from the layouts of the cache.
"""

from typing import Any

from torch import Tensor
from transformers import AttentionInterface

from advance_step.decode.layouts import AttendingBy
from advance_step.decode.passes import Pass
from advance_step.decode.torch_attention import Scoring

PAGED = "advance_step_paged"


def paged(model: Any) -> AttendingBy:
    """A context in which the model is on the paged attention function."""
    return AttendingBy(model, PAGED)


def paged_attention(
    module: Any,
    query: Tensor,  # [batch, heads, length, key_dim]
    key: Tensor,  # [batch, kv_heads, length, key_dim]
    value: Tensor,  # [batch, kv_heads, length, value_dim]
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    paged: Pass | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write this call's new keys and values by slot, and attend through the block tables, as the pass does it.

    The call is known by its place in the order of calls of the pass, and has the window of its layout. s_aux [heads]
    are attention sinks: a score of each head that takes part in the softmax and has no value.
    Returns [batch, length, heads, value_dim], contiguous, and no attention weights, as transformers expects.
    Raises ValueError for what it would otherwise get wrong: a call without `paged`, a ready-made mask, a position
    bias, keys and values that are not as the layout says.
    """
    if paged is None:
        raise ValueError(f"paged: expected a pass, got None (attention {PAGED!r} needs its metadata)")
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
    return paged.attend(query, key, value, call, Scoring(scaling, layout.window, softcap, s_aux)), None


AttentionInterface.register(PAGED, paged_attention)
