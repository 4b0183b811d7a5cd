"""Stop strings against a search in the text that all tokens decode to at once."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from advance_step.decode.stop_strings import REPLACEMENT, Stop, StopStrings

WORDS = ["a", "b", "ab", "stop", "st", "op", " a", " stop", " st", "é", "€", "\n\n", "s"]


def byte_level() -> Any:
    """GPT-2's kind: a token is any bytes, characters or not."""
    letters = dict(zip(byte_order(), range(256), strict=True))
    spelled = [spell(word.encode()) for word in WORDS] + [spell(b"\x82\xac"), spell(b"st\xe2\x82")]
    vocabulary = {"<end>": 256} | letters
    vocabulary |= {token: 257 + i for i, token in enumerate(t for t in spelled if t not in letters)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")


def byte_order() -> list[str]:
    """The letter that stands for each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(rest)) for b in range(256)]


def spell(text: bytes) -> str:
    return "".join(byte_order()[b] for b in text)


def sentence_piece() -> Any:
    """Llama 2's kind: the first token loses its space, and unknown characters are tokens of a byte each."""
    pieces = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", *(w.replace(" ", "▁") for w in WORDS)]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


def word_piece() -> Any:
    """BERT's kind: spaces are nobody's token."""
    pieces = ["[UNK]", "[SEP]", *WORDS, *(f"##{word}" for word in WORDS)]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, sep_token="[SEP]")


TOKENIZERS = {"byte level": byte_level(), "sentence piece": sentence_piece(), "word piece": word_piece()}


@st.composite
def texts(draw: Any) -> tuple[Any, list[int]]:
    """A tokenizer and tokens of it: any of a byte-level one, of the others those of whole characters."""
    name = draw(st.sampled_from(sorted(TOKENIZERS)))
    tokenizer = TOKENIZERS[name]
    if name == "byte level":
        unit = st.one_of(st.integers(0, len(tokenizer) - 1), st.integers(256, len(tokenizer) - 1)).map(lambda t: [t])
    elif name == "sentence piece":
        unit = st.one_of(
            st.integers(258, len(tokenizer) - 1).map(lambda t: [t]),
            st.just([1]),
            st.sampled_from("é€𝄞").map(lambda c: [2 + b for b in c.encode()]),
        )
    else:
        unit = st.integers(0, len(tokenizer) - 1).map(lambda t: [t])
    return tokenizer, [token for tokens in draw(st.lists(unit, max_size=40)) for token in tokens]


STOP = st.lists(
    st.one_of(st.sampled_from([*WORDS, "opst", "stop s", " "]), st.text("abst op€", min_size=1)), max_size=3
)


def expected(tokenizer: Any, tokens: list[int], stop: list[str], least: int) -> tuple[Stop | None, str]:
    """The stop and the text, from decodes of everything, every time."""
    seen = 0  # characters that are not looked at, or in vain
    for count in range(1, len(tokens) + 2):  # the last round: no more tokens come
        text = tokenizer.decode(tokens[:count], skip_special_tokens=True)
        if count <= len(tokens):
            text = text.rstrip(REPLACEMENT)
        count = min(count, len(tokens))
        ends = [(end, len(s)) for s in stop for end in range(seen + 1, len(text) + 1) if text[:end].endswith(s)]
        if ends and count > least:
            end = min(ends)[0]
            length = max(length for e, length in ends if e == end)
            return Stop(text[end - length : end], count, end - length), text[: end - length]
        seen = max(seen, len(text))
    return None, tokenizer.decode(tokens, skip_special_tokens=True)


@given(texts(), STOP, st.integers(0, 5), st.integers(1, 7))
@settings(deadline=None, max_examples=300)
@example((TOKENIZERS["byte level"], [0xE2, 0x82, 0xAC] * 20 + [0xFF] * 60 + [0xE2, 0x82, 0xAC]), ["\ufffd€"], 3, 1)
@example((TOKENIZERS["sentence piece"], [265, *[1] * 40, 265]), ["a a"], 0, 3)  # specials between words leave no trace
def test_the_stop_is_where_a_search_in_the_whole_text_finds_it(text, stop, least, at_once):
    tokenizer, tokens = text
    stops = StopStrings(tokenizer, stop, least)
    for first in range(0, len(tokens), at_once):
        stops.feed(tokens[first : first + at_once])
    found = stops.finish()
    assert (found, stops.text) == expected(tokenizer, tokens, stop, least)


def test_nothing_is_taken_after_the_stop():
    tokenizer = TOKENIZERS["byte level"]
    stops = StopStrings(tokenizer, ["b"])
    assert stops.feed(b"a") is None and stops.text == "a"
    assert stops.feed(b"abc") == stops.feed(b"b") == stops.finish() == Stop("b", 3, 2)
    assert stops.text == "aa" and stops.num_tokens == 3


@pytest.mark.parametrize("token", [ord("a"), 0xFF, 0xE2, 0x80, 256])  # letters; three kinds of no characters; skipped
def test_a_long_text_costs_bounded_decodes(monkeypatch, token):
    tokenizer, longest = byte_level(), 0
    decode = tokenizer.decode

    def counted(ids: list[int], **kwargs: Any) -> str:
        nonlocal longest
        longest = max(longest, len(ids))
        return decode(ids, **kwargs)

    monkeypatch.setattr(tokenizer, "decode", counted)
    stops = StopStrings(tokenizer, ["stop"])
    stops.feed([token] * 3000)
    assert longest <= 40
    stops.feed(b"stop")
    assert stops.found is not None and stops.found.num_tokens == 3004
    assert stops.text == decode([token] * 3000, skip_special_tokens=True)


def test_a_real_tokenizer(real):
    tokenizer = real[1]
    text = "Grüße! 你好, мир 🌍 — 1 + 1 = 2.\n\nQ: What?\nA: Nothing…"
    tokens = tokenizer.encode(text, add_special_tokens=False)
    for stop in ["\n\nQ", "мир", "🌍", "hing…", " = 2"]:
        stops = StopStrings(tokenizer, [stop])
        stops.feed(tokens)
        assert stops.text == text[: text.index(stop)]
        assert stops.found is not None and stops.found.offset == text.index(stop)
        assert stop in tokenizer.decode(tokens[: stops.found.num_tokens])
        assert stop not in tokenizer.decode(tokens[: stops.found.num_tokens - 1])
