"""Prompts in, texts out, in one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, overload

from advance_step.decode.counter_random import derive_seed
from advance_step.decode.loop import Decoder
from advance_step.decode.request import Request
from advance_step.decode.sampling import TokenLogprobs
from advance_step.decode.sampling_params import SamplingParams
from advance_step.decode.text import Message, encode, eos_token_ids, text_of

Prompt = str | Sequence[Message] | Sequence[int]


@dataclass
class Completion:
    """One text that was generated.

    prompt: which of the prompts it continues, from 0.
    sample: which of that prompt's `n` samples it is, from 0.
    text: without special tokens, and cut before a stop string.
    token_ids: what was generated; with the token that stopped it.
    finish_reason: "stop" or "length".
    logprobs: of each token, where the parameters ask for them.
    """

    prompt: int
    sample: int
    text: str
    token_ids: list[int]
    finish_reason: str
    logprobs: list[TokenLogprobs]


@overload
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    stream: Literal[False] = False,
    **options: Any,
) -> list[Completion]: ...


@overload
def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    stream: Literal[True],
    **options: Any,
) -> Iterator[Completion]: ...


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    sampling: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    stream: bool = False,
    **options: Any,
) -> list[Completion] | Iterator[Completion]:
    """Continue every prompt; the completions in the prompts' order, or, streaming, each as soon as it is finished.

    Args:
        model: a transformers causal LM, in eval mode.
        tokenizer: its tokenizer.
        prompts: each a text as it stands, a chat (a list of {"role": ..., "content": ...}), or token ids.
        sampling: how to sample: for all prompts, or one for each; greedy unless given.
        stream: return an iterator.
        options: of `Decoder.for_requests`: batch_size, steps_per_sync, draft_tokens, compile, ...

    The model's end-of-sequence tokens, as its generation config has them, end a text. A prompt's `n` samples share its
    pages; their seeds are derived from its seed.

    Raises ValueError for a prompt without tokens, and for what `Decoder` refuses, before anything is decoded.
    """
    parameters = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
    if len(parameters) != len(prompts):
        raise ValueError(f"sampling: expected one for each of {len(prompts)} prompts, got {len(parameters)}")
    requests: list[Request] = []
    for number, (prompt, params) in enumerate(zip(prompts, parameters, strict=True)):
        ids = list(prompt) if _is_token_ids(prompt) else encode(tokenizer, prompt)  # type: ignore[arg-type]
        for sample in range(params.n):
            seed = params.seed if params.seed is None else derive_seed(params.seed, sample)
            requests.append(Request(f"{number}.{sample}", ids, replace(params, n=1, seed=seed)))  # type: ignore[arg-type]
    if not requests:
        return iter(()) if stream else []
    settings = {"tokenizer": tokenizer, "stop_token_ids": eos_token_ids(model.generation_config)} | options
    decoder = Decoder.for_requests(model, requests, **settings)
    for request in requests:
        decoder.check(request)
    if stream:
        return (completion(tokenizer, request) for done in decoder.run(requests) for request in done)
    for _ in decoder.run(requests):
        pass
    return [completion(tokenizer, request) for request in requests]


def completion(tokenizer: Any, request: Request) -> Completion:
    """A finished request of `generate` as its caller sees it."""
    prompt, sample = map(int, str(request.id).split("."))
    assert request.finish_reason is not None
    text = text_of(tokenizer, request)
    return Completion(prompt, sample, text, request.tokens, request.finish_reason, request.logprobs)


def _is_token_ids(prompt: Prompt) -> bool:
    return not isinstance(prompt, str) and all(isinstance(token, int) for token in prompt)
