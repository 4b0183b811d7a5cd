"""Records of a stream whose next line may be long in coming, while rows are live that need not wait for it."""

import threading
from collections.abc import Callable, Iterator
from queue import Empty, Queue
from typing import Any

from advance_step.generate.records import BadLine, Prompt

MOST_AHEAD = 64  # records


def read_ahead(records: Iterator[Prompt | BadLine], may_wait: Callable[[], bool]) -> Iterator[Prompt | BadLine | None]:
    """The records, read by a thread of their own; None where the next one is not there yet.

    may_wait: asked then; if it says so, the next record is waited for.
    What reading raises is raised here, after the records before it. The thread ends with the records, or the process.
    """
    queue: Queue[tuple[Any, BaseException | None]] = Queue(MOST_AHEAD)
    end = object()

    def read() -> None:
        try:
            for record in records:
                queue.put((record, None))
        except BaseException as error:  # whatever it is, it is the reader's to raise
            queue.put((end, error))
        else:
            queue.put((end, None))

    threading.Thread(target=read, name="advance-step input", daemon=True).start()
    while True:
        try:
            record, error = queue.get(block=may_wait())
        except Empty:
            yield None
            continue
        if error is not None:
            raise error
        if record is end:
            return
        yield record
