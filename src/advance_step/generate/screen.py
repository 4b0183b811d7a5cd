"""What a person sees while prompts are decoded."""

import sys
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from advance_step.decode import Decoder, Figures, Request


def say(line: str) -> None:
    """A remark, beside the output."""
    print(line, file=sys.stderr, flush=True)


def progress_bar() -> Progress:
    """Prompts done, tokens, tokens per second, live rows; on stderr, and only if that is a terminal."""
    console = Console(stderr=True)
    return Progress(
        MofNCompleteColumn(),
        TextColumn("prompts"),
        BarColumn(),
        TextColumn("{task.description}"),
        console=console,
        disable=not console.is_terminal,
        redirect_stdout=sys.stdout.isatty(),  # texts printed under the bar scroll above it; a pipe keeps its own
    )


def progress_line(decoder: Decoder) -> str:
    """The moving part of the bar."""
    figures = decoder.figures
    return f"{figures.tokens} tokens, {figures.tokens / figures.seconds:.0f} tokens/s, {decoder.num_rows} rows live"


def summary(figures: Figures, finished: int) -> str:
    """The line of figures that a run ends with."""
    prompts = "1 prompt" if finished == 1 else f"{finished} prompts"
    tokens = "1 token" if figures.tokens == 1 else f"{figures.tokens} tokens"
    line = f"{prompts}, {tokens} in {figures.seconds:.1f} s"
    if figures.steps:
        step = f"{figures.decode_seconds / figures.steps * 1e3:.1f} ms per step"
        line += f": {figures.tokens / figures.seconds:.1f} tokens/s, {step}"
        if figures.advance_seconds:  # not known of a step that a GPU replays as a whole
            line += f", {figures.advance_seconds / figures.decode_seconds:.2%} of it advancing"
    return line


def text_stream(tokenizer: Any, write: Callable[[str], Any]) -> Callable[[Request], None]:
    """A function that is given the request after each look at it and writes the text that is new.

    Text that may still change (a character whose bytes are not all there) is held back until the request is finished.
    """
    written = ""

    def stream(request: Request) -> None:
        nonlocal written
        text = tokenizer.decode(request.tokens, skip_special_tokens=True)
        if request.finish_reason or not text.endswith("\ufffd"):
            write(text[len(written) :])
            written = text

    return stream
