"""The check against transformers itself."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from advance_step.decode.request import Request
from advance_step.decode.sampling_params import SamplingParams
from advance_step.decode.text import eos_token_ids
from advance_step.generate.engine import make_decoder
from advance_step.generate.model import load_model
from advance_step.generate.records import Prompt
from advance_step.generate.requests import RequestMaker
from advance_step.generate.screen import say
from advance_step.generate.settings import Settings


def verify(model: Any, tokenizer: Any, prompts: Sequence[tuple[Prompt, Request | None]], settings: Settings) -> bool:
    """Say whether transformers' `generate` gives the same; in float32, where equality is to be expected.

    prompts: each with its finished request, or None where an earlier run has decoded it; those, and all where the run
        was not in float32, are decoded again.
    False where one differs, or where one is sampled in a way that `generate` does not have.
    """
    again = settings.dtype != "float32"
    if again:
        model, _ = load_model(settings.model, torch.float32, say, settings.device)
    maker = RequestMaker(model, tokenizer, settings)
    requests = [maker.requests(prompt)[0] if again or request is None else request for prompt, request in prompts]
    comparable = [request for request in requests if is_comparable(request.sampling)]
    if todo := [request for request in comparable if request.finish_reason is None]:
        plain = replace(settings, compile=False, draft_tokens=0)
        for _ in make_decoder(model, tokenizer, plain, len(todo)).run(todo):
            pass
    wrong = differing(model, comparable)
    for request in wrong:
        say(f"NOT verified: line {request.id} differs from transformers' generate (greedy, float32)")
    if odd := len(requests) - len(comparable):
        say(f"NOT verified: {odd} of {len(requests)} are not greedy, or with penalties that generate has not")
    if not wrong and comparable:
        what = f"{len(comparable)} of {len(requests)}"
        say(f"verified: {what} as transformers' generate, token for token (greedy, float32)")
    return not wrong and not odd


def is_comparable(sampling: SamplingParams) -> bool:
    """Whether transformers' `generate` can be asked for the same, and has but one answer."""
    penalised = sampling.presence_penalty or sampling.frequency_penalty
    return not (sampling.temperature or penalised or (sampling.ignore_eos and sampling.min_new_tokens))


def differing(model: Any, requests: Sequence[Request]) -> list[Request]:
    """The finished requests for which transformers' own greedy `generate` gives other tokens. One at a time: slow.

    With the attention that transformers has chosen for the model; each as its `sampling` says, and by nothing else.
    """
    own = model.generation_config
    try:
        # transformers fills what a config leaves open from the model's own, which may ask for beams, other ends, ...
        model.generation_config = GenerationConfig()
        return [request for request in requests if _generated(model, own, request) != request.tokens]
    finally:
        model.generation_config = own


def _generated(model: Any, own: GenerationConfig, request: Request) -> list[int]:
    """What `generate` makes of the request; not beyond a stop string, of which it is not told."""
    sampling = request.sampling
    ends = [*sampling.stop_token_ids, *([] if sampling.ignore_eos else eos_token_ids(own))]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=sampling.max_new_tokens,
        min_new_tokens=sampling.min_new_tokens or None,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
    )
    prompt = torch.tensor([request.prompt_ids], device=model.device)  # [1, tokens]
    output = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        generation_config=config,
        logits_processor=LogitsProcessorList(sampling.processors_for(request.prompt_ids)),
    )
    tokens: list[int] = output[0, prompt.shape[1] :].tolist()
    return tokens[: len(request.tokens)] if request.stop_string else tokens
