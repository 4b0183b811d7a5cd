"""Results of our own format, and which lines of an input the results of either format stand for."""

from collections.abc import Sequence
from typing import Any

from advance_step.generate import openai_batch
from advance_step.generate.records import BadLine, Prompt
from advance_step.generate.texts import Text


def result(prompt: Prompt, num_prompt_tokens: int, texts: Sequence[Text], model: str) -> dict[str, Any]:
    """The line that a decoded prompt becomes, in the prompt's own format.

    Of our own: the id, the prompt, the fields that the input had beside them, then the text; of several samples,
    "completions".
    """
    if prompt.endpoint:
        return openai_batch.response(prompt, num_prompt_tokens, texts, model)
    name = "messages" if isinstance(prompt.content, list) and isinstance(prompt.content[0], dict) else "prompt"
    completions = [_completion(prompt, text) for text in texts]
    what = completions[0] if len(texts) == 1 else {"completions": completions}
    return {"id": prompt.id, name: prompt.content, **prompt.fields, **what}


def error_result(bad: BadLine) -> dict[str, Any]:
    """The line that a line which is not decoded becomes."""
    if bad.batch:
        return openai_batch.error_response(bad)
    return {"id": bad.id, "line": bad.line, "error": bad.reason}


def of_what(entry: dict[str, Any]) -> tuple[int | str | None, int | None]:
    """The id that a line of an output answers, and None; or None, and the number of the line that failed.

    Raises KeyError, TypeError or AttributeError for what is no line of an output.
    """
    if "text" in entry or "completions" in entry:
        return entry["id"], None
    if "response" in entry:
        return (entry["custom_id"], None) if entry["error"] is None else (None, int(entry["error"]["line"]))
    entry["error"]
    return None, int(entry["line"])


def _completion(prompt: Prompt, text: Text) -> dict[str, Any]:
    completion: dict[str, Any] = {"text": text.text, "tokens": len(text.token_ids)}
    if prompt.return_token_ids:
        completion["token_ids"] = text.token_ids
    completion["finish_reason"] = text.finish_reason
    if text.logprobs is not None:
        completion["logprobs"] = [
            {"token": token.token, "logprob": token.logprob, "top": dict(token.top)} for token in text.logprobs
        ]
    return completion
