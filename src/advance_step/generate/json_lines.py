"""A line of JSON as a prompt: our own format; the OpenAI batch format is told from it by its fields."""

import json
import math
from typing import Any

from advance_step.generate import openai_batch
from advance_step.generate.content import take_content
from advance_step.generate.fields import take_flag, take_sampling, take_schema
from advance_step.generate.records import LineError, Prompt, excerpt

# Deeper than any line that means something; Python's own limit depends on who calls.
MAX_DEPTH = 100

# What a result has beside the line's own fields.
RESULT_FIELDS = ("text", "tokens", "token_ids", "finish_reason", "completions", "error")


def parse_line(line: str, number: int, raw: bool) -> Prompt:
    """The prompt of a line; `raw`: a text of our own format does not go into the chat template.

    Raises LineError for a line that is none.
    """
    entry = parse_object(line)
    if openai_batch.is_request(entry):
        return openai_batch.parse_request(entry, number)
    id_ = entry.pop("id", None)
    if id_ is None:
        id_ = number
    if isinstance(id_, bool) or not isinstance(id_, (int, str)):
        raise LineError(f"id: expected an integer or a string, got {excerpt(id_)}", None, False)
    try:
        content = take_content(entry, ("prompt", "messages"))
        sampling, schema = take_sampling(entry), take_schema(entry)
        wants_ids = take_flag(entry, "return_token_ids")
        if taken := [name for name in RESULT_FIELDS if name in entry]:
            raise LineError(f"{taken[0]}: expected no field of this name, which the result has, got one")
    except LineError as error:
        raise LineError(str(error), id_, False) from error
    return Prompt(number, id_, content, not raw, sampling, wants_ids, entry, json_schema=schema)


def parse_object(line: str) -> dict[str, Any]:
    """The JSON object of a line. LineError for one that is none, or that could not be written again as it is."""
    try:
        entry = json.loads(line, object_pairs_hook=_object, parse_constant=_constant, parse_float=_float)
    except RecursionError:
        entry = None
        deep = True
    except ValueError as error:  # JSONDecodeError, and Python's refusal of integers of too many digits
        reason = error.msg if isinstance(error, json.JSONDecodeError) else error
        raise LineError(f"expected a JSON object, got {excerpt(line, 40)} ({reason})") from error
    else:
        deep = _deeper_than(MAX_DEPTH, entry)
    if deep:
        raise LineError(f"expected JSON of at most {MAX_DEPTH} levels, got more: {excerpt(line, 40)}")
    if not isinstance(entry, dict):
        raise LineError(f"expected a JSON object, got {excerpt(line, 40)}")
    try:
        json.dumps(entry, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise LineError(f"expected text that is Unicode, got half a character: {excerpt(line)}") from error
    return entry


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entry = dict(pairs)
    if len(entry) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{excerpt(twice)} is there twice")
    return entry


def _constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"{digits} is too large")
    return value


def _deeper_than(levels: int, value: Any) -> bool:
    """Whether lists and objects are nested more than so deep; without recursion, which has a limit of its own."""
    level = [value]
    for _ in range(levels + 1):
        level = [
            child
            for parent in level
            if isinstance(parent, (dict, list))
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return True
