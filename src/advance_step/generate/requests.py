"""A prompt as requests to the decoder, and a finished request as a text."""

from dataclasses import replace
from typing import Any

from advance_step.decode.counter_random import derive_seed
from advance_step.decode.json_output import JsonGrammars
from advance_step.decode.request import Request
from advance_step.decode.sampling_params import SamplingParams, ignored_fields
from advance_step.decode.text import encode, text_of
from advance_step.generate.model import context_length, stop_token_ids
from advance_step.generate.records import LineError, Prompt
from advance_step.generate.settings import Settings
from advance_step.generate.texts import Logprob, Text


class RequestMaker:
    """Makes requests of prompts: each sampled as its line says, else as the settings do, else as the model's
    generation config does."""

    def __init__(self, model: Any, tokenizer: Any, settings: Settings) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.settings = settings
        self.context = context_length(model)
        vocab_size = model.config.get_text_config().vocab_size
        self.grammars = JsonGrammars(tokenizer, vocab_size, stop_token_ids(model))

    def requests(self, prompt: Prompt) -> list[Request]:
        """A request for each of the prompt's samples; new tokens end with the model's context.

        Without a seed of its own, a line has one that follows from the settings' seed and its number: any run of a job
        draws the same.

        Raises LineError for a prompt that cannot be decoded, and ValueError where the model has no chat template for
        any.
        """
        given = self.settings.sampling | prompt.sampling
        if "seed" not in prompt.sampling:
            given["seed"] = derive_seed(self.settings.sampling["seed"], prompt.line)
        ids = prompt_ids(self.tokenizer, prompt)
        if not ids:
            raise LineError("prompt: expected at least one token, got none")
        if len(ids) >= self.context:
            raise LineError(f"prompt: expected fewer than {self.context} tokens (the context), got {len(ids)}")
        try:
            params = SamplingParams.from_generation_config(self.model.generation_config, **given)
            params = self._constrained(prompt, params)
        except ValueError as error:
            raise LineError(str(error)) from error
        most = min(params.max_new_tokens, self.context - len(ids))
        params = replace(params, max_new_tokens=most, min_new_tokens=min(params.min_new_tokens, most))
        assert params.seed is not None
        seeds = [derive_seed(params.seed, sample) for sample in range(params.n)]
        return [Request(prompt.line, ids, replace(params, n=1, seed=seed)) for seed in seeds]

    def _constrained(self, prompt: Prompt, params: SamplingParams) -> SamplingParams:
        """The parameters of a text that is JSON, where the line or the settings have a schema."""
        schema = self.settings.json_schema if prompt.json_schema is None else prompt.json_schema
        if schema is None or schema is False:
            return params
        for name, value, neutral in (
            ("ignore_eos", params.ignore_eos, False),
            ("min_new_tokens", params.min_new_tokens, 0),
        ):
            if value != neutral:  # when the JSON is whole, the model's end of a text is all that may come
                raise ValueError(f"{name}: expected {neutral} of a text that is to be JSON, got {value}")
        return replace(params, logits_processors=(self.grammars.constraint(schema),))


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
