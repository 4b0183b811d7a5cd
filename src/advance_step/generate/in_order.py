"""Results in the order of their lines, whatever order they are finished in."""

from collections import deque
from collections.abc import Callable


class InOrder:
    """Lets each line write when it is ready; if `ordered`, only after every line before it."""

    def __init__(self, ordered: bool) -> None:
        self._ordered = ordered
        self._expected: deque[int] = deque()
        self._ready: dict[int, Callable[[], None]] = {}

    def expect(self, line: int) -> None:
        """The next line that will write."""
        self._expected.append(line)

    def ready(self, line: int, write: Callable[[], None]) -> None:
        """Let an expected line write, now or when its turn comes."""
        if not self._ordered:
            self._expected.clear()
            write()
            return
        self._ready[line] = write
        while self._expected and (write_next := self._ready.pop(self._expected[0], None)):
            self._expected.popleft()
            write_next()
