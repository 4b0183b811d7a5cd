"""The OpenAI batch format, as vLLM's run-batch takes and writes it.

In: {"custom_id", "method", "url", "body"}. Out: {"id", "custom_id", "response": {"status_code", "request_id", "body"},
"error"}, where the body is what the endpoint of that URL answers.
"""

import hashlib
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from advance_step.generate.content import take_content
from advance_step.generate.fields import take_flag, take_sampling, take_schema
from advance_step.generate.records import BadLine, Endpoint, LineError, Prompt, excerpt
from advance_step.generate.texts import Text

# URL: the endpoint, and the field of its body that is to be continued.
URLS: dict[str, tuple[Endpoint, str]] = {
    "/v1/chat/completions": ("chat/completions", "messages"),
    "/v1/completions": ("completions", "prompt"),
}

# Fields of a body that change no text: whom it is for, and which model was meant. The run's model serves every line.
NOT_LOOKED_AT = ("model", "user", "metadata", "store", "request_id", "service_tier", "safety_identifier")


def is_request(entry: dict[str, Any]) -> bool:
    """Whether a line is of this format: it has a custom_id, and one more of its fields."""
    return "custom_id" in entry and any(name in entry for name in ("method", "url", "body"))


def parse_request(entry: dict[str, Any], number: int) -> Prompt:
    """The prompt of a line of this format. LineError for one that we cannot answer."""
    id_ = entry.pop("custom_id")
    if not isinstance(id_, str):
        raise LineError(f"custom_id: expected a string, got {excerpt(id_)}", None, True)
    try:
        if (method := entry.pop("method", None)) != "POST":
            raise LineError(f'method: expected "POST", got {excerpt(method)}')
        url = entry.pop("url", None)
        if not isinstance(url, str) or url not in URLS:
            raise LineError(f"url: expected {' or '.join(URLS)}, got {excerpt(url)}")
        if not isinstance(body := entry.pop("body", None), dict):
            raise LineError(f"body: expected an object, got {excerpt(body)}")
        _nothing_left(entry)
        endpoint, name = URLS[url]
        for unread in NOT_LOOKED_AT:
            body.pop(unread, None)
        content = take_content(body, (name,))
        sampling, schema = take_sampling(body), take_schema(body)
        wants_ids = take_flag(body, "return_token_ids")
        _nothing_left(body)
    except LineError as error:
        raise LineError(str(error), id_, True) from error
    return Prompt(number, id_, content, False, sampling, wants_ids, endpoint=endpoint, json_schema=schema)


def _nothing_left(entry: dict[str, Any]) -> None:
    for name, value in entry.items():
        if value is not None:
            raise LineError(f"{excerpt(name)}: this field is not known, got {excerpt(value)}")


def response(prompt: Prompt, num_prompt_tokens: int, texts: Sequence[Text], model: str) -> dict[str, Any]:
    """The line that answers `prompt` with its samples. Its ids are the same whenever the line is decoded."""
    name = _digest(prompt)
    new = sum(len(text.token_ids) for text in texts)
    chat = prompt.endpoint == "chat/completions"
    body = {
        "id": f"chatcmpl-{name}" if chat else f"cmpl-{name}",
        "object": "chat.completion" if chat else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(prompt, index, text) for index, text in enumerate(texts)],
        "usage": {
            "prompt_tokens": num_prompt_tokens,
            "total_tokens": num_prompt_tokens + new,
            "completion_tokens": new,
        },
    }
    answer = {"status_code": 200, "request_id": f"batch-{name}", "body": body}
    return {"id": f"advance-step-{name}", "custom_id": prompt.id, "response": answer, "error": None}


def error_response(bad: BadLine) -> dict[str, Any]:
    """The line that answers a line which is not decoded."""
    name = _digest(bad)
    return {
        "id": f"advance-step-{name}",
        "custom_id": bad.id,
        "response": {"status_code": 400, "request_id": f"batch-{name}", "body": None},
        "error": {"code": "invalid_request", "message": str(bad), "line": bad.line},
    }


def _choice(prompt: Prompt, index: int, text: Text) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": index}
    if prompt.endpoint == "chat/completions":
        choice["message"] = {"role": "assistant", "content": text.text, "refusal": None}
        choice["logprobs"] = _chat_logprobs(text) if text.logprobs is not None else None
    else:
        choice["text"] = text.text
        choice["logprobs"] = _completion_logprobs(text) if text.logprobs is not None else None
    choice["finish_reason"] = text.finish_reason
    choice["stop_reason"] = text.stop_string
    if prompt.return_token_ids:
        choice["token_ids"] = text.token_ids
    return choice


def _chat_logprobs(text: Text) -> dict[str, Any]:
    assert text.logprobs is not None
    return {
        "content": [
            {
                **_named(token.token, token.logprob),
                "top_logprobs": [_named(other, logprob) for other, logprob in token.top],
            }
            for token in text.logprobs
        ]
    }


def _named(token: str, logprob: float) -> dict[str, Any]:
    return {"token": token, "logprob": logprob, "bytes": list(token.encode())}


def _completion_logprobs(text: Text) -> dict[str, Any]:
    assert text.logprobs is not None
    tokens = [token.token for token in text.logprobs]
    return {
        "text_offset": list(accumulate(map(len, tokens[:-1]), initial=0)),
        "token_logprobs": [token.logprob for token in text.logprobs],
        "tokens": tokens,
        "top_logprobs": [dict(token.top) for token in text.logprobs],
    }


def _digest(of: Prompt | BadLine) -> str:
    """Tells the answers of a file apart; the same in every run."""
    return hashlib.sha256(f"{of.line}:{of.id}".encode()).hexdigest()[:24]
