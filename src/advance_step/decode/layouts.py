"""What each call of attention in a model hands over: the layout of the cache, and who sees what.

A model's config does not say it reliably: names differ, layers differ, and some windows reach attention through the
mask alone. So the model is run once on two tokens with an attention function that writes down what it is given. The
mask is taken from transformers' own mask functions: they make it from a rule on positions, and the rule is asked about
positions far apart, so that a window of any size is seen.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from advance_step.decode.cache import LayerLayout, visible_keys

_RECORDING = "advance_step_recording"


class AttendingBy:
    """A context in which a model attends by the function `name`, and after which by its own; it can be entered again.

    Making it asks transformers whether the model takes the function, which raises ValueError where it does not. To
    enter and leave it costs some microseconds, so that a decoder need not hold it between two passes.
    """

    def __init__(self, model: Any, name: str) -> None:
        configs = _configs(model)
        own = [config._attn_implementation for config in configs]
        try:
            model.set_attn_implementation(name)
            self._configs = [(config, config._attn_implementation) for config in configs]
        finally:
            _set_each(zip(configs, own, strict=True))

    def __enter__(self) -> None:
        self._own = [(config, config._attn_implementation) for config, _ in self._configs]
        _set_each(self._configs)

    def __exit__(self, *exception: object) -> None:
        _set_each(self._own)


def _configs(model: Any) -> list[Any]:
    """The configs of a model's modules and their parts, each of which names an attention function."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    for config in list(configs.values()):
        for key in getattr(config, "sub_configs", ()):
            if (part := getattr(config, key, None)) is not None:
                configs[id(part)] = part
    return list(configs.values())


def _set_each(implementations: Iterable[tuple[Any, Any]]) -> None:
    for config, implementation in implementations:
        config._attn_implementation_internal = implementation  # the property would set the parts of a config too


@torch.inference_mode()
def layouts_of(model: Any) -> list[LayerLayout]:
    """The layouts of a transformers causal LM, one for each call of attention, in the order of the calls.

    Runs the model once, on two tokens, without a cache. Raises ValueError where a layer attends otherwise than causally
    (with a window or without), has a position bias or a mask of its own, attends to something else than the tokens of
    the pass, or does not hand keyword arguments on; whatever the model itself raises comes through.
    """
    layouts: list[LayerLayout] = []
    with AttendingBy(model, _RECORDING):
        tokens = torch.ones(1, 2, dtype=torch.int64, device=model.device)
        # Without a mask, transformers looks into the positions for several packed sequences: on the meta device there
        # is nothing to look at.
        given = {"attention_mask": tokens} if tokens.is_meta else {}
        keep = torch.arange(2, device=model.device)  # as a prefill says it: for a number some models cut the masks
        model(input_ids=tokens, use_cache=False, logits_to_keep=keep, recorded=layouts, **given)
    if not layouts:
        raise ValueError("no layer called attention")
    return layouts


def _record(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    recorded: list[LayerLayout] | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    position_bias: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Write down what attention is given; the result is zeros of the right shape."""
    if recorded is None:
        raise ValueError("its layers do not hand keyword arguments on to attention")
    if position_bias is not None:
        raise ValueError("attention with a position bias")
    batch, heads, length, key_dim = query.shape
    if key.shape[2] != length:
        raise ValueError(f"attention of {length} tokens to {key.shape[2]} others")
    if attention_mask is None:
        causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
        window = None if causal else _OTHER
    else:
        window = getattr(attention_mask, "window", _OTHER)
    if window == _OTHER:
        raise ValueError("attention that is not causal, or has a mask of its own")
    sizes = key.shape[1], key_dim, value.shape[3]
    recorded.append(LayerLayout(*sizes, window, softcap is not None, s_aux is not None))
    return query.new_zeros(batch, length, heads, value.shape[3]), None


_OTHER = -1  # of windows: neither causal nor causal within a window


def _recorded_mask(
    *,
    batch_size: int,
    q_length: int,
    kv_length: int,
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    local_size: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
    **kwargs: Any,
) -> Tensor:
    """A mask that carries the window of its rule as an attribute."""
    mask = torch.zeros(batch_size, 1, q_length, kv_length, dtype=dtype, device=device)
    mask.window = _window_of(mask_function, local_size)  # type: ignore[attr-defined]
    return mask


def _window_of(mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor], size: int | None) -> int | None:
    """The window of a rule: None if it is causal, `size` if causal within so many tokens, else _OTHER."""
    reach = size or 1
    far = 2 * reach + 100
    positions = torch.tensor(sorted({*range(8), *(far + reach * i + j for i in (-1, 0, 1) for j in (-1, 0, 1))}))
    query, key, zero = positions[:, None], positions[None], torch.tensor(0)
    try:
        visible = mask_function(zero, zero, query, key)
    except (IndexError, RuntimeError):  # the rule looks into a tensor of this very input
        return _OTHER
    for window in (None, size):
        if torch.equal(visible.expand(len(positions), len(positions)), visible_keys(query, key, window)):
            return window
    return _OTHER


AttentionInterface.register(_RECORDING, _record)
AttentionMaskInterface.register(_RECORDING, _recorded_mask)
