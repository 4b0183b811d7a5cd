"""What a person sees while prompts are decoded."""

import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from advance_step.decode.request import Figures, Request
from advance_step.decode.text import text_of
from advance_step.generate.outputs import Output
from advance_step.generate.records import BadLine, Prompt
from advance_step.generate.texts import Text


def say(line: str) -> None:
    """A remark, beside the output."""
    print(line, file=sys.stderr, flush=True)


def write(text: str) -> None:
    """Put a text on stdout; what its encoding does not have becomes a question mark."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True)


def as_read(prompt: Prompt, texts: list[Text]) -> str:
    """A result for a reader: the prompt, or a chat's last turn, and what was made of it."""
    content = prompt.content
    asked = content if isinstance(content, str) else content[-1]
    shown = asked["content"] if isinstance(asked, dict) else asked if isinstance(asked, str) else content
    return f"[{prompt.id}] {shown}\n" + "".join(f"{text.text.strip()}\n\n" for text in texts)


def failures(count: int, first: BadLine | None, out: Output | None) -> str:
    """The line that says how many lines failed, and why the first one of this run did."""
    line = "1 line failed" if count == 1 else f"{count} lines failed"
    if first is None:
        return f"{line} in an earlier run"
    return f"{line}, the first: {first}" if out else line


def progress_bar() -> Progress:
    """A bar, and `progress_line` beside it; on stderr, and only if that is a terminal."""
    terminal = sys.stderr.isatty()  # rich would take FORCE_COLOR for one
    return Progress(
        BarColumn(bar_width=20),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        disable=not terminal,
        redirect_stdout=sys.stdout.isatty(),  # texts printed under the bar scroll above it; a pipe keeps its own
    )


def progress_line(figures: Figures, live: int, lines: int, total: int | None, earlier: int, seconds: float) -> str:
    """What stands beside the bar: what is known of how much is done, of the time that is left, and of rates.

    live: rows. lines: those that are done, of `total`, None where nobody knows. earlier: of those, the ones that were
    done before this run, which has taken so many seconds. A narrow terminal cuts the end off.
    """
    done = lines - earlier
    parts = [f"{lines}/{'?' if total is None else total} prompts"]
    if done and total is not None:
        parts.append(f"{timedelta(seconds=round(max(0, total - lines) * seconds / done))} left")
    else:
        parts.append(f"{timedelta(seconds=int(seconds))} so far")
    if done:
        parts.append(f"{done / seconds:.1f} prompts/s" if done >= seconds else f"{seconds / done:.1f} s/prompt")
    return ", ".join([*parts, f"{figures.tokens / figures.seconds:.0f} tokens/s", f"{live} rows live"])


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
        text = text_of(tokenizer, request)
        if request.finish_reason or not text.endswith("\ufffd"):
            write(text[len(written) :])
            written = text

    return stream
