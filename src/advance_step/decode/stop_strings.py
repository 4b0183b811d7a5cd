"""Strings that end a text, looked for as its tokens come."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

# What a decoder writes where bytes are no character, or not one yet.
REPLACEMENT = "\ufffd"

# Tokens that may bring nothing but unfinished characters before some of them are taken for what they are. A character
# has at most four bytes, and a token at least one, so that of more tokens only the last ones can be unfinished.
MAX_UNFINISHED = 16
MAX_CHARACTER = 4


class IncrementalText:
    """The text of tokens that come one by one; each costs a decode of the last few, however long the text is.

    A token's text depends on what stands before it (spaces, characters of several tokens), so new text is what the
    last piece and the new tokens together decode to, after what the piece alone does: the two offsets of
    text-generation-inference and vLLM. The pieces together are what tokenizer.decode(tokens, skip_special_tokens=True)
    gives at once, unless the tokenizer's decoder rewrites text by what comes after it.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.skipped = set(tokenizer.all_special_ids)
        self.ids: list[int] = []  # the last piece of finished text, and the tokens after it
        self.read = 0  # tokens of that piece
        self.prefix = ""  # what it decodes to
        self.given = 0  # characters after it that were returned already

    def add(self, token: int) -> str:
        """The text that is certain with this token and was not before: often one token's, or none."""
        if token in self.skipped:
            return ""
        self.ids.append(token)
        text = self._decode(self.ids)
        certain = text.rstrip(REPLACEMENT)
        new = self._give(certain)
        if certain == text and len(text) > len(self.prefix):
            self._finish_piece(len(self.ids))
        elif len(self.ids) - self.read > MAX_UNFINISHED:
            for end in range(len(self.ids) - MAX_CHARACTER, len(self.ids) - 2 * MAX_CHARACTER, -1):
                if text.startswith(piece := self._decode(self.ids[:end])):  # so it does not end within a character
                    new += self._give(piece)
                    self._finish_piece(end)
                    break
        return new

    def rest(self) -> str:
        """The text that was held back, now that no more tokens come."""
        return self._give(self._decode(self.ids))

    def _give(self, text: str) -> str:
        new = text[len(self.prefix) + self.given :]
        self.given += len(new)
        return new

    def _finish_piece(self, end: int) -> None:
        self.given = max(len(self.prefix) + self.given - len(self._decode(self.ids[:end])), 0)
        self.ids, self.read = self.ids[self.read :], end - self.read
        self.prefix = self._decode(self.ids[: self.read])

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)


class Stop(NamedTuple):
    """Where a text ends: before `string`, which stands at `offset` and was complete with the `num_tokens`-th token."""

    string: str
    num_tokens: int
    offset: int


class StopStrings:
    """Looks for the first of some strings in the text of a request's tokens.

    The first is the one that ends first, as if the text came character by character; of two that end together, the
    longer. It may have begun before min_new_tokens, but not ended. The text is cut before it, as OpenAI and vLLM do.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str], min_new_tokens: int = 0) -> None:
        self.stop = stop
        self.min_new_tokens = min_new_tokens
        self.found: Stop | None = None
        self.num_tokens = 0
        self._incremental = IncrementalText(tokenizer)
        self._pieces: list[str] = []
        self._length = 0  # characters in the pieces
        self._tail = ""  # their last characters, in which a stop string may have begun
        self._tail_length = max((len(string) for string in stop), default=1) - 1

    @property
    def text(self) -> str:
        """What is certain of the text so far, cut before the stop string that was found."""
        text = "".join(self._pieces)
        return text if self.found is None else text[: self.found.offset]

    def feed(self, tokens: Iterable[int]) -> Stop | None:
        """Take the request's next tokens, up to the one that completes a stop string, and say which that is."""
        for token in tokens:
            if self.found is not None:
                break
            self.num_tokens += 1
            self._look_at(self._incremental.add(token))
        return self.found

    def finish(self) -> Stop | None:
        """No more tokens come: characters that they left unfinished are part of the text, as replacement characters."""
        if self.found is None:
            self._look_at(self._incremental.rest())
        return self.found

    def _look_at(self, piece: str) -> None:
        if not piece:
            return
        text, begin = self._tail + piece, self._length - len(self._tail)
        if self.num_tokens > self.min_new_tokens:
            ends = []
            for string in self.stop:
                at = text.find(string, max(len(self._tail) - len(string) + 1, 0))
                if at >= 0:
                    ends.append((at + len(string), at, string))
            if ends:
                _, at, string = min(ends)
                self.found = Stop(string, self.num_tokens, begin + at)
        self._pieces.append(piece)
        self._length += len(piece)
        self._tail = text[-self._tail_length :] if self._tail_length else ""
