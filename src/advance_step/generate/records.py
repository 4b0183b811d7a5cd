"""What a line of the input becomes: a prompt, or the reason why it is none."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

Message = dict[str, Any]  # {"role": ..., "content": ...}
JsonSchema = dict[str, Any]

# The two kinds of request of the OpenAI batch format that are served, by the end of their URL.
Endpoint = Literal["chat/completions", "completions"]


@dataclass
class Prompt:
    """One line of the input, to be decoded.

    line: its number, from 1.
    id: what its result is known by: the line's own id, or its number.
    content: a text, chat messages, or token ids.
    templated: whether a text goes into the model's chat template, as the user's turn; messages always do.
    sampling: the fields of SamplingParams that the line sets.
    return_token_ids: whether the result is to have the token ids.
    fields: what else the line has, for the result.
    endpoint: of a line of the OpenAI batch format; None: a line of our own format.
    json_schema: what the text is to be JSON of; False: nothing; None: what the run says.
    """

    line: int
    id: int | str
    content: str | list[Message] | list[int]
    templated: bool
    sampling: dict[str, Any] = field(default_factory=dict)
    return_token_ids: bool = False
    fields: dict[str, Any] = field(default_factory=dict)
    endpoint: Endpoint | None = None
    json_schema: JsonSchema | Literal[False] | None = None


@dataclass
class BadLine:
    """A line that is not decoded, and why.

    id: as of a Prompt, where the line has one that can be read.
    batch: whether its error record is one of the OpenAI batch format.
    """

    line: int
    reason: str
    id: int | str | None = None
    batch: bool = False

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


class LineError(ValueError):
    """Why a line is no prompt; with its id and its format (as of a BadLine) as soon as they are known."""

    def __init__(self, reason: str, id: int | str | None = None, batch: bool | None = None) -> None:
        super().__init__(reason)
        self.id = id
        self.batch = batch


def excerpt(value: object, most: int = 60) -> str:
    """How a value of the input stands in a message: its beginning, and only what can be written as UTF-8."""
    text = repr(value[:most]) if isinstance(value, str) else repr(value)[:most]
    return text.encode("utf-8", "backslashreplace").decode()


def digest_of_id(id_: int | str) -> int:
    """64 bits that stand for an id, so that a million of them take little memory."""
    return int.from_bytes(hashlib.blake2b(json.dumps(id_).encode(), digest_size=8).digest(), "little")
