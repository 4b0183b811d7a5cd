"""Prompts to token ids, and token ids to text, by a transformers tokenizer."""

from collections.abc import Mapping, Sequence
from typing import Any

from advance_step.decode.request import Request

Message = Mapping[str, Any]


def encode(tokenizer: Any, prompt: str | Sequence[Message]) -> list[int]:
    """The token ids of a prompt: a text as it stands, or a chat in the model's own template.

    A text gets the special tokens that the tokenizer puts before one, and no second one where it has them already;
    chat messages, {"role": ..., "content": ...} each, are followed by the opening of the answer. Raises ValueError
    for a chat where the tokenizer has no template, or its template refuses it.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt).input_ids)
        bos = tokenizer.bos_token
        written = bool(bos) and prompt.startswith(bos)
        return list(tokenizer(prompt, add_special_tokens=False).input_ids) if written else ids
    if not tokenizer.chat_template:
        raise ValueError("messages: the model has no chat template")
    try:
        text = tokenizer.apply_chat_template(list(prompt), tokenize=False, add_generation_prompt=True)
    except Exception as error:  # whatever the template raises: it is a program that came with the model
        raise ValueError(f"messages: the model's chat template refuses them: {error}") from error
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def text_of(tokenizer: Any, request: Request) -> str:
    """What a request has generated, without special tokens; cut before the stop string that ended it."""
    text: str = tokenizer.decode(request.tokens, skip_special_tokens=True)
    return text[: request.text_end]


def eos_token_ids(config: Any) -> list[int]:
    """Those of a transformers GenerationConfig. ValueError where they are neither one id nor a list of them."""
    given = config.eos_token_id
    ids = [] if given is None else given if isinstance(given, list) else [given]
    if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
        raise ValueError(f"generation_config: eos_token_id: expected a token id or a list of them, got {given!r}")
    return list(ids)
