"""What is shown: text as it grows, and the line of figures."""

from __future__ import annotations

from advance_step.decode.request import Figures, Request
from advance_step.generate.screen import summary, text_stream


def test_text_grows_and_half_characters_wait(real):
    _, tokenizer = real
    text = "na\u00efve \U0001f600 caf\u00e9"
    ids = tokenizer(text).input_ids
    written: list[str] = []
    stream = text_stream(tokenizer, written.append)
    request = Request(1, [])
    for token in ids:
        request.tokens.append(token)
        stream(request)
        assert not any(part.endswith("\ufffd") for part in written)
    assert "".join(written) == text
    assert len([part for part in written if part]) > 3  # as it grows, not at the end


def test_what_was_held_back_comes_when_the_request_is_finished(real):
    _, tokenizer = real
    half = tokenizer("\U0001f600").input_ids[:1]
    written: list[str] = []
    stream = text_stream(tokenizer, written.append)
    request = Request(1, [], tokens=half)
    stream(request)
    assert "".join(written) == ""
    request.finish_reason = "length"
    stream(request)
    assert "".join(written) == "\ufffd"


def test_summary():
    figures = Figures(steps=10, tokens=50, prefill_seconds=1.0, decode_seconds=4.0, advance_seconds=0.002)
    line = "3 prompts, 50 tokens in 5.0 s: 10.0 tokens/s, 400.0 ms per step, 0.05% of it advancing"
    assert summary(figures, 3) == line
    figures.advance_seconds = 0.0
    assert summary(figures, 3) == "3 prompts, 50 tokens in 5.0 s: 10.0 tokens/s, 400.0 ms per step"
    assert summary(Figures(tokens=1, prefill_seconds=0.5), 1) == "1 prompt, 1 token in 0.5 s"
