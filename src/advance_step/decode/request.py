"""What is to be decoded, and what has been."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Request:
    """One prompt and what has been decoded for it."""

    id: int | str
    prompt_ids: list[int]
    max_new_tokens: int
    tokens: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    finish_reason: str | None = None  # "stop" or "length"

    @property
    def max_seq_len(self) -> int:
        """Prompt and new tokens together, at most."""
        return len(self.prompt_ids) + self.max_new_tokens

    @property
    def seq_len(self) -> int:
        """Prompt and new tokens together, so far."""
        return len(self.prompt_ids) + len(self.tokens)

    def pages_needed(self, block_size: int) -> int:
        """Pages for all that it may become."""
        return -(-self.max_seq_len // block_size)


@dataclass
class Figures:
    """What the run has done so far, in steps, tokens and seconds."""

    steps: int = 0
    tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    advance_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        """Prefill and decoding together."""
        return self.prefill_seconds + self.decode_seconds


def pages_for(requests: Iterable[Request], batch_size: int, block_size: int) -> int:
    """Pages that the `batch_size` largest requests need: with these no row is ever left empty for want of a page."""
    needs = sorted((request.pages_needed(block_size) for request in requests), reverse=True)
    return sum(needs[:batch_size])
