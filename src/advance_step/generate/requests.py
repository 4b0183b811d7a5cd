"""A prompt as requests to the decoder, and a finished request as a text."""

from dataclasses import replace
from typing import Any

from advance_step.decode.counter_random import derive_seed
from advance_step.decode.request import Request
from advance_step.decode.sampling_params import SamplingParams, ignored_fields
from advance_step.decode.text import encode, text_of
from advance_step.generate.records import LineError, Prompt
from advance_step.generate.texts import Logprob, Text


def to_requests(prompt: Prompt, options: dict[str, Any], model: Any, tokenizer: Any, context: int) -> list[Request]:
    """A request for each of the prompt's samples; new tokens end with the model's context.

    A prompt is sampled as its line says, else as the options do, else as the model's generation config does. Without a
    seed of its own, a line has one that follows from the options' seed and its number: any run of a job draws the same.

    Raises LineError for a prompt that cannot be decoded, and ValueError where the model has no chat template for any.
    """
    given = options | prompt.sampling
    if "seed" not in prompt.sampling:
        given["seed"] = derive_seed(options["seed"], prompt.line)
    ids = prompt_ids(tokenizer, prompt)
    if not ids:
        raise LineError("prompt: expected at least one token, got none")
    if len(ids) >= context:
        raise LineError(f"prompt: expected fewer than {context} tokens (the context), got {len(ids)}")
    try:
        params = SamplingParams.from_generation_config(model.generation_config, **given)
    except ValueError as error:
        raise LineError(str(error)) from error
    most = min(params.max_new_tokens, context - len(ids))
    params = replace(params, max_new_tokens=most, min_new_tokens=min(params.min_new_tokens, most))
    assert params.seed is not None
    seeds = [derive_seed(params.seed, sample) for sample in range(params.n)]
    return [Request(prompt.line, ids, replace(params, n=1, seed=seed)) for seed in seeds]


def prompt_ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    """The token ids of a prompt. LineError where the chat template refuses it, ValueError where there is none."""
    content = prompt.content
    if isinstance(content, str) and not prompt.templated:
        return encode(tokenizer, content)
    if isinstance(content, list) and isinstance(content[0], int):
        return [token for token in content if isinstance(token, int)]
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template: use --raw, and prompts instead of messages")
    try:
        return encode(tokenizer, [{"role": "user", "content": content}] if isinstance(content, str) else content)
    except ValueError as error:
        raise LineError(str(error)) from error


def to_text(tokenizer: Any, request: Request) -> Text:
    """A finished request as a text."""
    assert request.finish_reason is not None
    logprobs = None
    if request.sampling.logprobs is not None:
        tokens = [tokenizer.decode([token]) for token in request.tokens]
        logprobs = [
            Logprob(token, noted.logprob, [(tokenizer.decode([other]), logprob) for other, logprob in noted.top])
            for token, noted in zip(tokens, request.logprobs, strict=True)
        ]
    text = text_of(tokenizer, request)
    return Text(text, request.tokens, request.finish_reason, request.stop_string, logprobs)


def remarks(model: Any, options: dict[str, Any]) -> list[str]:
    """What the model's generation config changes beside the options, and what it or they ask for in vain.

    Raises ValueError for a generation config with values that are out of range.
    """
    config = model.generation_config
    try:
        params = SamplingParams.from_generation_config(config, **options)
    except ValueError as error:
        raise ValueError(f"--model: generation_config: {error}") from error
    plain = vars(SamplingParams(**options))
    vain = [f"--{name.replace('_', '-')}" for name in ("top_p", "top_k", "min_p") if name in options]
    taken = [f"{name}={value!r}" for name, value in vars(params).items() if value != plain[name]]
    ignored = [field for field in ignored_fields(config) if not field.startswith("max_length=")]  # an option of ours
    lines = [f"from the model's generation_config, where no option says otherwise: {', '.join(taken)}"] if taken else []
    if vain and params.temperature == 0:
        lines.append(f"without effect at temperature 0: {', '.join(vain)}")
    return lines + ([f"not honoured of the model's generation_config: {', '.join(ignored)}"] if ignored else [])
