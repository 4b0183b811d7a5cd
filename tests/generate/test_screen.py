"""What is shown: text as it grows, and the line of figures."""

from __future__ import annotations

import io
import re
import sys

import pytest

from advance_step.decode.request import Figures, Request
from advance_step.generate.records import BadLine, Prompt
from advance_step.generate.screen import as_read, failures, progress_bar, progress_line, summary, text_stream, write
from advance_step.generate.texts import Text


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


def test_a_character_that_the_terminal_has_not_is_replaced(monkeypatch):
    for encoding, expected in (
        ("ascii", b"na?ve ?"),
        ("latin-1", b"na\xefve ?"),
        ("utf-8", "na\u00efve \u2713".encode()),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(stream := io.BytesIO(), encoding=encoding))
        write("na\u00efve \u2713")
        assert stream.getvalue() == expected


def test_a_log_has_no_bar_whatever_the_environment_says(monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    with progress_bar() as bar:
        bar.update(bar.add_task("", total=2), completed=1, description="x")
    assert capsys.readouterr() == ("", "")


def test_words_for_a_reader():
    text = Text(" It is. ", [1], "stop")
    assert as_read(Prompt(1, "a", "Is it?", True), [text]) == "[a] Is it?\nIt is.\n\n"
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    assert as_read(Prompt(1, 1, chat, True), [text, text]) == "[1] u\nIt is.\n\nIt is.\n\n"
    assert as_read(Prompt(1, 1, [5, 6], True), [text]) == "[1] [5, 6]\nIt is.\n\n"
    assert failures(2, None, None) == "2 lines failed in an earlier run"
    assert failures(1, BadLine(3, "why"), None) == "1 line failed"


def test_progress_says_what_is_known():
    figures = Figures(steps=10, tokens=50, prefill_seconds=1.0, decode_seconds=4.0)
    rates = "10 tokens/s, 3 rows live"
    assert progress_line(figures, 3, 0, 90, 0, 5.0) == f"0/90 prompts, 0:00:05 so far, {rates}"
    assert progress_line(figures, 3, 10, 100, 0, 5.0) == f"10/100 prompts, 0:00:45 left, 2.0 prompts/s, {rates}"
    assert progress_line(figures, 3, 10, None, 0, 5.0) == f"10/? prompts, 0:00:05 so far, 2.0 prompts/s, {rates}"
    assert progress_line(figures, 3, 9, 109, 7, 90.0) == f"9/109 prompts, 1:15:00 left, 45.0 s/prompt, {rates}"


@pytest.mark.parametrize(
    "columns, shown", [(60, "1234/90000 prompts, 0:53:21 left, 30.9 prompts/s"), (160, "9 rows live")]
)
def test_the_bar_on_a_terminal(monkeypatch, columns, shown):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", str(columns))
    line = "1234/90000 prompts, 0:53:21 left, 30.9 prompts/s, 3086 tokens/s, 9 rows live"
    with progress_bar() as bar:
        bar.update(bar.add_task("", total=90000), completed=1234, description=line)
    assert shown in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.getvalue())
