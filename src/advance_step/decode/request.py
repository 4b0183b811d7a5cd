"""What is to be decoded, and what has been."""

from dataclasses import dataclass, field
from typing import NamedTuple

from advance_step.decode.sampling import TokenLogprobs
from advance_step.decode.sampling_params import SamplingParams


@dataclass
class Request:
    """One prompt, how to continue it, and what has been decoded for it.

    id: the caller's name for it.
    prompt_ids: its token ids, at least one.
    sampling: how its tokens are chosen and when it ends. `n` is not looked at: a request is one text.

    Filled in by the decoder:
    tokens: the new tokens; with the one that stopped it, if one did.
    logprobs: of each new token, where `sampling.logprobs` asks for them.
    finish_reason: "stop" or "length"; None as long as it is not finished.
    stop_string: the one of `sampling.stop` that ended it, if one did.
    text_end: where the text is to be cut then, in characters.
    """

    id: int | str
    prompt_ids: list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish_reason: str | None = None
    stop_string: str | None = None
    text_end: int | None = None

    @property
    def token_ids(self) -> list[int]:
        """Prompt and new tokens."""
        return self.prompt_ids + self.tokens

    @property
    def seq_len(self) -> int:
        """Prompt and new tokens together, so far."""
        return len(self.prompt_ids) + len(self.tokens)

    @property
    def max_seq_len(self) -> int:
        """Prompt and new tokens together, at most."""
        return len(self.prompt_ids) + self.sampling.max_new_tokens

    def pages_needed(self, block_size: int) -> int:
        """Pages for all that it may become; the last token is never read, so it needs no place."""
        return -(-(self.max_seq_len - 1) // block_size)


@dataclass
class Figures:
    """What a decoder has done so far, in steps, tokens and seconds."""

    steps: int = 0
    tokens: int = 0
    prefill_tokens: int = 0  # computed; those that were shared are not among them
    shared_tokens: int = 0  # of prompts, found in pages that were there already
    preemptions: int = 0
    draft_tokens: int = 0  # proposed
    accepted_tokens: int = 0  # of these, those that were right
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    advance_seconds: float = 0.0  # on a CPU: of decode_seconds, those in advance_until_stop

    @property
    def seconds(self) -> float:
        """Prefill and decoding together."""
        return self.prefill_seconds + self.decode_seconds


class Occupancy(NamedTuple):
    """Who is in the batch, and how many pages they hold.

    live: the requests that decode, in the order of their rows.
    prefilling: those that have pages, and whose prompts are computed in part.
    pages: pages that somebody holds; one that is kept for its prefix alone is not among them.
    """

    live: list[Request]
    prefilling: list[Request]
    pages: int
