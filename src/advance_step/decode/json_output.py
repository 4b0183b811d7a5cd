"""Text that is JSON, and JSON of a schema: logits processors by llguidance, one for each request."""

import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

INSTALL = 'llguidance is not installed: pip install "advance-step[json]"'
MOST_SCHEMAS = 64  # whose grammars are kept

# As json.dumps writes it. Where blanks are free, a small model may go on with them to its last token.
LAYOUT: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


def check_schema(schema: dict[str, Any] | bool) -> None:
    """ValueError for a JSON schema that is none or that llguidance does not serve, and where it is not installed."""
    if problem := _matcher_class().validate_grammar(_grammar(json.dumps(schema))):
        raise ValueError(_as_error(problem))


def _matcher_class() -> Any:
    """llguidance's LLMatcher; ValueError where it is not installed."""
    try:
        from llguidance import LLMatcher
    except ModuleNotFoundError as error:
        raise ValueError(INSTALL) from error
    return LLMatcher


def _grammar(schema: str) -> str:
    grammar: str = _matcher_class().grammar_from_json_schema(schema, overrides=LAYOUT)
    return grammar


def _as_error(words: str) -> str:
    return f"JSON schema: {' '.join(words.split())[:300]}"


class JsonGrammars:
    """Grammars of JSON schemas over the tokens of a model.

    tokenizer: a fast tokenizer of transformers.
    vocab_size: logits of a token.
    eos_token_ids: the tokens that end a text of the model, at least one.
    """

    def __init__(self, tokenizer: Any, vocab_size: int, eos_token_ids: Iterable[int]) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.eos_token_ids = sorted(eos_token_ids)
        self._matchers: dict[str, Any] = {}  # by schema, the latest last; copied for each request

    def constraint(self, schema: dict[str, Any] | bool) -> "JsonConstraint":
        """What holds a request to `schema`, as one of its `SamplingParams.logits_processors`.

        Once the JSON is whole and cannot go on, only an end-of-sequence token is left: the request must heed them
        (no ignore_eos), and have no min_new_tokens. Where max_new_tokens comes first the text is cut as any other. The
        JSON is laid out on one line, as Python's json.dumps does it.

        Raises ValueError for a schema that is none or that llguidance does not serve, where llguidance is not
        installed, and for a model without an end-of-sequence token or a fast tokenizer.
        """
        key = json.dumps(schema)
        matcher = self._matchers.pop(key, None)
        if matcher is None:
            matcher = self._compiled(key)
        self._matchers[key] = matcher
        if len(self._matchers) > MOST_SCHEMAS:
            del self._matchers[next(iter(self._matchers))]
        return JsonConstraint(matcher)

    def _compiled(self, schema: str) -> Any:
        matcher = _matcher_class()(self._tokens, _grammar(schema), log_level=0)
        if matcher.is_error():
            raise ValueError(_as_error(matcher.get_error()))
        return matcher

    @cached_property
    def _tokens(self) -> Any:
        """The tokens as llguidance has them: about a second for a large vocabulary."""
        from llguidance.hf import from_tokenizer

        if not self.eos_token_ids:
            raise ValueError("JSON schema: expected a model with an end-of-sequence token, got none")
        try:
            return from_tokenizer(self.tokenizer, n_vocab=self.vocab_size, eos_token=self.eos_token_ids)
        except ValueError as error:
            raise ValueError(_as_error(f"llguidance does not serve this model's tokenizer: {error}")) from error


class JsonConstraint:
    """A schema to which any number of requests may be held."""

    def __init__(self, matcher: Any) -> None:
        self._matcher = matcher

    def for_request(self, prompt_ids: Sequence[int]) -> "_Matching":
        """The logits processor of one request."""
        return _Matching(self._matcher.deep_copy(), len(prompt_ids))


class _Matching:
    """Lets only tokens pass with which the text can still become JSON of the schema.

    What it knows follows from the tokens that it is given: those that it has not seen are gone through first. When the
    text is whole, an end-of-sequence token is all that is left.
    """

    def __init__(self, matcher: Any, num_prompt_tokens: int) -> None:
        self._matcher = matcher
        self._seen = num_prompt_tokens

    def __call__(self, token_ids: Tensor, logits: Tensor) -> Tensor:
        new = token_ids[0, self._seen :].tolist()
        self._seen += len(new)
        for token in new:
            if not self._matcher.is_stopped():  # a row may go on past its end until the host looks
                self._matcher.consume_token(token)
        if self._matcher.is_error():
            raise RuntimeError(_as_error(self._matcher.get_error()))
        mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=logits.shape[-1], bitorder="little")  # a byte for each token
        return logits.masked_fill(torch.from_numpy(allowed).to(logits.device) == 0, -torch.inf)
