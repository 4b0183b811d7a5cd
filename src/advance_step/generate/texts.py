"""A finished text as a result has it."""

from dataclasses import dataclass


@dataclass
class Logprob:
    """Of one generated token: its text, its log-probability, and those of the likeliest tokens."""

    token: str
    logprob: float
    top: list[tuple[str, float]]


@dataclass
class Text:
    """One sample of a prompt.

    text: without special tokens, and cut before the stop string that ended it.
    finish_reason: "stop" or "length".
    logprobs: where the prompt asks for them.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    stop_string: str | None = None
    logprobs: list[Logprob] | None = None
