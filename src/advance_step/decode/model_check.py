"""Whether a model can be decoded over pages: asked of the model itself, before the first request."""

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from advance_step.decode.attention import paged
from advance_step.decode.cache import LayerLayout, PagedKVCache
from advance_step.decode.forward import Prompts, forward_of
from advance_step.decode.layouts import AttendingBy, layouts_of

# Layer types of transformers' configs that are attention over keys and values, with nothing else kept between steps.
LAYER_TYPES = {"full_attention", "sliding_attention"}

# Kinds of rotary positions whose frequencies follow from the longest sequence of the batch: a row's tokens would depend
# on its neighbours, and a short probe does not reach the lengths at which they begin to.
BATCH_WIDE_ROPE = {"dynamic", "longrope"}

# The probe: rows whose tokens are computed whole, then in a second chunk, then in steps of one, one and two tokens.
LENGTHS = [(5, 4), (1, 2), (6, 1)]
STEPS = [1, 1, 2]
BLOCK_SIZE = 4


def check_model(model: Any) -> list[LayerLayout]:
    """The layouts of a causal LM that is right over pages; ValueError, with its name and the reason, for any other.

    First what is known of kinds of models: they must attend through transformers' attention interface and keep
    nothing else between steps. Then what each call of attention is given (`layouts_of`): windows and causality come
    from the rules of transformers' own masks, whatever the size of a window, so the rest need not be long to be seen.
    Then a short ragged batch is run in chunks and steps over pages, and whole by the model's own eager attention,
    without pages: the logits must be the same up to rounding (`_difference`). On the meta device there are no values,
    and this last part is left out.

    The model is left as it was.
    """
    name = type(model).__name__
    if reason := _known_to_fail(model):
        raise ValueError(f"model: {name} cannot be decoded over pages: {reason}")
    try:
        layouts = layouts_of(model)
        reason = _window_by_cache(model, layouts)
        if not reason and model.device.type != "meta":
            reason = _probe(model, layouts)
    except Exception as error:  # of any kind: it is the model's own code that runs
        raise ValueError(f"model: {name} cannot be decoded over pages: {error}") from error
    if reason:
        raise ValueError(f"model: {name} cannot be decoded over pages: {reason}")
    return layouts


def _known_to_fail(model: Any) -> str | None:
    config = model.config.get_text_config()
    if model.config.is_encoder_decoder:
        return "it is an encoder and a decoder"
    if not model._supports_attention_backend:
        return "it is not on transformers' attention interface"
    if other := sorted(set(getattr(config, "layer_types", None) or ()) - LAYER_TYPES):
        return f"it has layers of {other}"
    if rope := _rope_types(config) & BATCH_WIDE_ROPE:
        return f"{rope.pop()} RoPE follows the longest row of a batch"
    return None


def _window_by_cache(model: Any, layouts: list[LayerLayout]) -> str | None:
    """A window that only transformers' cache has: generate drops keys that the model's own forward still sees."""
    config = model.config.get_text_config()
    if any(DynamicCache(config=config).is_sliding) and not any(layout.window for layout in layouts):
        return f"transformers' cache keeps {config.sliding_window} tokens, of which its attention is not told"
    return None


def _rope_types(config: Any) -> set[str]:
    """The kinds of rotary positions in a config: one for all layers, or one for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    each = [parameters] if "rope_type" in parameters else [p for p in parameters.values() if isinstance(p, dict)]
    return {p["rope_type"] for p in each if "rope_type" in p}


@torch.inference_mode()
def _probe(model: Any, layouts: list[LayerLayout]) -> str | None:
    """Run a short batch over pages and without; why the logits say that the model is not right over pages."""
    total = max(map(sum, LENGTHS)) + sum(STEPS)
    vocabulary = model.get_input_embeddings().weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary // 4, vocabulary, (len(LENGTHS), total), generator=generator).to(model.device)
    eager = AttendingBy(model, "eager")
    with eager:
        own = model(input_ids=tokens, use_cache=False).logits
    with paged(model):
        passes = _over_pages(model, layouts, tokens)
    for what, rows, positions, logits in passes:
        if logits.shape != (expected := own[rows, positions]).shape:
            return f"{what}: expected logits {list(expected.shape)}, got {list(logits.shape)}"
    tolerance = max(1e-3, 16 * torch.finfo(model.dtype).eps)
    differences = [(_difference(logits, own[rows, positions]), what) for what, rows, positions, logits in passes]
    if all(difference <= tolerance for difference, _ in differences):
        return None
    with eager:
        response = _difference(_nudged(model, tokens).flatten(0, 1), own.flatten(0, 1))
    tolerance = min(max(tolerance, 8 * response), 0.5)
    for difference, what in differences:
        if not difference <= tolerance:  # or it is not a number
            found = f"{difference:.2g} of their spread, {tolerance:.2g} are allowed for rounding"
            return f"its logits differ from its own attention's by {found} ({what})" + (
                ", in training mode: call model.eval()" if model.training else ""
            )
    return None


def _difference(logits: Tensor, expected: Tensor) -> float:
    """How far logits [tokens, vocabulary] are from what is expected, as a share of the spread of a token's logits.

    Root mean squares over the vocabulary, and of the tokens the median. Between attention over pages and a model's own
    this was at most 3e-6 in float32, 4e-3 in float16 and 4e-2 in bfloat16, over the families of the tests, save a
    recurrent one that makes much of any rounding: so the tolerance is 16 steps of the dtype, or 8 times what the model
    makes of one rounding of its embeddings, if that is more, up to a half. What is wrong by construction (another
    position, a key too many) moves all tokens, by a share near 1. A router that takes another expert because of
    rounding moves a token as far, but only few of them: therefore the median.
    """
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return float(((logits - expected).square().mean(-1).sqrt() / spread).median())


def _nudged(model: Any, tokens: Tensor) -> Tensor:
    """The model's own logits if each element of its embeddings is off by one rounding."""

    def nudge(module: Any, args: Any, out: Tensor) -> Tensor:
        up = torch.arange(out.numel(), device=out.device).view(out.shape) % 3 == 0
        return out * torch.where(up, 1 + torch.finfo(out.dtype).eps, 1 - torch.finfo(out.dtype).eps).to(out.dtype)

    hook = model.get_input_embeddings().register_forward_hook(nudge)
    try:
        logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    return logits


def _over_pages(model: Any, layouts: list[LayerLayout], tokens: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Each pass of the probe: what it is, and of which rows and positions [n] it gave the logits [n, vocabulary]."""
    rows, device = len(tokens), tokens.device
    columns = -(-tokens.shape[1] // BLOCK_SIZE)
    tables = torch.arange(rows * columns, dtype=torch.int32, device=device).view(columns, rows).T  # scattered pages
    cache = PagedKVCache.allocate(layouts, rows * columns, BLOCK_SIZE, model.dtype, device)
    forward = forward_of(model, cache)

    def slots(row: Tensor, position: Tensor) -> Tensor:
        return tables[row, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE

    passes = []
    contexts = [0] * rows
    for chunk in range(2):
        lengths = [length[chunk] for length in LENGTHS]
        spans = [(row, at + i) for row, (at, n) in enumerate(zip(contexts, lengths, strict=True)) for i in range(n)]
        row, position = torch.tensor(spans, device=device).T
        keep = torch.arange(1, len(spans), device=device)  # all but one: seen whether the model heeds what to keep
        logits = forward.prompts(
            Prompts(tokens[row, position], position, slots(row, position), tables, lengths, contexts, keep)
        )
        passes.append((f"prompts, chunk {chunk + 1}", row[1:], position[1:], logits))
        contexts = [at + n for at, n in zip(contexts, lengths, strict=True)]
    for count in STEPS:
        row = torch.arange(rows, device=device)[:, None].expand(rows, count)
        position = torch.tensor(contexts, device=device)[:, None] + torch.arange(count, device=device)
        seq_lens = (position[:, -1] + 1).int()
        logits = forward.step(tokens[row, position], position, slots(row, position), seq_lens, tables)
        passes.append((f"a step of {count} tokens", row.flatten(), position.flatten(), logits.flatten(0, 1)))
        contexts = [at + count for at in contexts]
    return passes
