"""Whether a model can be decoded over pages: asked of the model itself, before the first request."""

from typing import Any

import torch
from torch import Tensor

from advance_step.decode.attention import DecodeStep, Prefill, paged
from advance_step.decode.cache import LayerLayout, PagedKVCache
from advance_step.decode.layouts import attending_by, layouts_of

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
        reason = None if model.device.type == "meta" else _probe(model, layouts)
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
    with attending_by(model, "eager"):
        own = model(input_ids=tokens, use_cache=False).logits
    with paged(model):
        passes = _over_pages(model, layouts, tokens)
    tolerance = max(1e-3, 32 * torch.finfo(own.dtype).eps)
    for what, rows, positions, logits in passes:
        expected = own[rows, positions]
        if logits.shape != expected.shape:
            return f"{what}: expected logits {list(expected.shape)}, got {list(logits.shape)}"
        if not (difference := _difference(logits, expected)) <= tolerance:
            found = f"{difference:.2g} of their spread, where {tolerance:.2g} is rounding"
            return f"its logits differ from its own attention's by {found} ({what})" + (
                ", in training mode: call model.eval()" if model.training else ""
            )
    return None


def _difference(logits: Tensor, expected: Tensor) -> float:
    """How far logits [tokens, vocabulary] are from what is expected, as a share of the spread of a token's logits.

    Root mean squares over the vocabulary, and of the tokens the median. Rounding is relative to the spread, and grows
    with the depth of a model: 2e-5 of it in float32 and 3e-2 in bfloat16 are usual, and the tolerance is 32 times the
    dtype's step. What is wrong by construction (another position, a key too many) moves all tokens by a tenth and
    more; a router that chooses another expert because of rounding moves a token as far, but only few of them.
    """
    logits, expected = logits.float(), expected.float()
    spread = (expected - expected.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return float(((logits - expected).square().mean(-1).sqrt() / spread).median())


def _over_pages(model: Any, layouts: list[LayerLayout], tokens: Tensor) -> list[tuple[str, Tensor, Tensor, Tensor]]:
    """Each pass of the probe: what it is, and of which rows and positions [n] it gave the logits [n, vocabulary]."""
    rows, device = len(tokens), tokens.device
    columns = -(-tokens.shape[1] // BLOCK_SIZE)
    tables = torch.arange(rows * columns, dtype=torch.int32, device=device).view(columns, rows).T  # scattered pages
    cache = PagedKVCache.allocate(layouts, rows * columns, BLOCK_SIZE, model.dtype, device)

    def slots(row: Tensor, position: Tensor) -> Tensor:
        return tables[row, position // BLOCK_SIZE].long() * BLOCK_SIZE + position % BLOCK_SIZE

    passes = []
    contexts = [0] * rows
    for chunk in range(2):
        lengths = [length[chunk] for length in LENGTHS]
        spans = [(row, at + i) for row, (at, n) in enumerate(zip(contexts, lengths, strict=True)) for i in range(n)]
        row, position = torch.tensor(spans, device=device).T
        prefill = Prefill(cache, cache.write_index(slots(row, position)), lengths, contexts, tables)
        keep = torch.arange(1, len(spans), device=device)  # all but one: seen whether the model heeds what to keep
        logits = model(
            input_ids=tokens[row, position][None],
            position_ids=position[None],
            use_cache=False,
            logits_to_keep=keep,
            paged=prefill,
        ).logits
        passes.append((f"prompts, chunk {chunk + 1}", row[1:], position[1:], logits[0]))
        contexts = [at + n for at, n in zip(contexts, lengths, strict=True)]
    for count in STEPS:
        row = torch.arange(rows, device=device)[:, None].expand(rows, count)
        position = torch.tensor(contexts, device=device)[:, None] + torch.arange(count, device=device)
        write_index, read_index = cache.write_index(slots(row, position).flatten()), cache.read_index(tables)
        seq_lens = (position[:, -1] + 1).int()
        at = position[:, 0] if count == 1 else position
        step = DecodeStep(cache, write_index, tables, at, seq_lens, None, read_index)
        logits = model(input_ids=tokens[row, position], position_ids=position, use_cache=False, paged=step).logits
        passes.append((f"a step of {count} tokens", row.flatten(), position.flatten(), logits.flatten(0, 1)))
        contexts = [at + count for at in contexts]
    return passes
