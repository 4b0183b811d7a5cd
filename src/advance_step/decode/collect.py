"""The host's half of a sync: new tokens to their requests, and who is finished with them."""

from collections.abc import Iterable, Sequence
from typing import Any

from advance_step.decode.request import Request
from advance_step.decode.stop_strings import StopStrings


class Collector:
    """Adds sampled tokens to requests until each has its end: a stop token, a stop string, or its length.

    stop_token_ids: the model's own.
    tokenizer: for stop strings; ValueError for a request that has some where there is none.
    """

    def __init__(self, stop_token_ids: Iterable[int], tokenizer: Any | None) -> None:
        self.stop_token_ids = frozenset(stop_token_ids)
        self.tokenizer = tokenizer
        self._strings: dict[int, StopStrings] = {}  # by id() of the live requests that have some

    def stops(self, request: Request) -> frozenset[int]:
        """The tokens that end this request."""
        own = frozenset(request.sampling.stop_token_ids)
        return own if request.sampling.ignore_eos else own | self.stop_token_ids

    def add(self, request: Request, tokens: Sequence[int]) -> int:
        """Append the tokens up to the request's end, and set why it ended if it did; returns how many were appended."""
        sampling, stops = request.sampling, self.stops(request)
        for count, token in enumerate(tokens, 1):
            request.tokens.append(token)
            enough = len(request.tokens) >= sampling.min_new_tokens
            if enough and token in stops:
                request.finish_reason = "stop"
            elif len(request.tokens) == sampling.max_new_tokens:
                request.finish_reason = "length"
            if sampling.stop:
                self._look_for_strings(request, token)
            if request.finish_reason:
                self.forget(request)
                return count
        return len(tokens)

    def forget(self, request: Request) -> None:
        """Drop what is kept of a request that is finished or given up."""
        self._strings.pop(id(request), None)

    def _look_for_strings(self, request: Request, token: int) -> None:
        """The text with one more token; characters that the last one leaves unfinished are part of it."""
        if id(request) not in self._strings:
            sampling = request.sampling
            self._strings[id(request)] = StopStrings(self.tokenizer, sampling.stop, sampling.min_new_tokens)
        strings = self._strings[id(request)]
        found = strings.feed([token]) or (strings.finish() if request.finish_reason else None)
        if found:
            request.finish_reason, request.stop_string, request.text_end = "stop", found.string, found.offset
