"""SIGTERM as Ctrl-C: what is finished is kept, and the exit code says which of the two it was."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED, TERMINATED, BROKEN_PIPE = (128 + number for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE))


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within it, in the main thread, SIGTERM raises Terminated, which ends what KeyboardInterrupt would."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def exit_code(interrupt: KeyboardInterrupt) -> int:
    """As a shell would have it of a process that the signal has ended."""
    return TERMINATED if isinstance(interrupt, Terminated) else INTERRUPTED
