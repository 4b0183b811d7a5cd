"""Where results go: a file that only this job writes, whole lines only, or a stream."""

import fcntl
import json
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from advance_step.generate.records import digest_of_id
from advance_step.generate.results import of_what
from advance_step.generate.run_header import RunHeader

STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")


@dataclass
class Output:
    """Results as JSON lines.

    name: for messages.
    descriptor: of the open file.
    size: of a regular file, the bytes of its whole lines; None: a stream, from which nothing can be taken back.
    done: digests of the ids that an earlier run has finished (`digest_of_id`).
    failed_lines: numbers of the lines of the input that an earlier run could not decode.
    """

    name: str
    descriptor: int
    size: int | None = None
    done: set[int] = field(default_factory=set)
    failed_lines: set[int] = field(default_factory=set)

    def write(self, entry: dict[str, Any]) -> None:
        """Write a line, whole. OSError where that fails; a file then ends with the line before."""
        left = memoryview(data := json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        try:
            while left:
                try:
                    left = left[os.write(self.descriptor, left) :]
                except BlockingIOError:  # a pipe that does not wait by itself
                    select.select([], [self.descriptor], [])
        except BaseException as error:
            if self.size is not None:
                os.ftruncate(self.descriptor, self.size)
            if isinstance(error, OSError):
                raise OSError(error.errno, error.strerror, self.name) from error
            raise
        if self.size is not None:
            self.size += len(data)


@contextmanager
def open_output(path: str, header: RunHeader, resume: bool) -> Iterator[Output]:
    """The output at `path`: standard output ("-"), a FIFO or a device, or a file that is there or not.

    A file is locked as long as it is open, and the header of its run lies beside it. An earlier output is known by that
    header before anything of it is touched; a last line that was cut off is then truncated away, in place. A file that
    nothing was written to is not left behind.

    resume: go on with an earlier output, whose header must be equal.
    Raises ValueError for a file that is no such output or that another process writes, and OSError.
    """
    kind = os.stat(path).st_mode if os.path.exists(path) else stat.S_IFREG
    if path not in STDOUT and stat.S_ISREG(kind):
        with _open_file(Path(path), header, resume) as output:
            yield output
        return
    if stat.S_ISDIR(kind):
        raise ValueError(f"--output: expected a file, got {path}, a directory")
    if resume:
        raise ValueError(f"--resume: expected an --output that is a file, got {path}")
    descriptor = os.dup(1) if path in STDOUT else os.open(path, os.O_WRONLY)
    try:
        yield Output(path, descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _open_file(path: Path, header: RunHeader, resume: bool) -> Iterator[Output]:
    if path.suffix == ".gz":
        raise ValueError(f"--output: expected a name without .gz, as results are not compressed, got {path}")
    beside = path.with_name(f"{path.name}.run.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    new = [] if path.exists() or path.is_symlink() else [path]  # files that this run has made
    output = Output(str(path), _open_locked(path), size=0)
    try:
        earlier = RunHeader.read(beside) if beside.exists() else None
        if os.fstat(output.descriptor).st_size == 0:
            header.write(beside)
            new.append(beside)
        elif not resume:
            advice = " (--resume goes on with it)" if earlier else ""
            raise ValueError(f"--output: expected a new file, got {path}, which exists{advice}")
        elif earlier is None:
            raise ValueError(f"--resume: expected an output of this command, got {path} without {beside.name}")
        else:
            earlier.check_same(header, path)
            _take_over(output)
        yield output
        os.fsync(output.descriptor)
    finally:
        if not output.size:
            for file in new:
                file.unlink(missing_ok=True)
        os.close(output.descriptor)


def _open_locked(path: Path) -> int:
    """The file, made if it is not there, locked until it is closed. ValueError where another process has the lock."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                return descriptor  # otherwise the run that had the lock has removed the file meanwhile
        except BlockingIOError as error:
            os.close(descriptor)
            raise ValueError(f"--output: expected a file that no other run writes, got {path}") from error
        os.close(descriptor)


def _take_over(output: Output) -> None:
    """Note what an earlier run has written, and cut off what it has not finished writing."""
    size = 0
    with open(output.descriptor, "rb", closefd=False) as stream:
        for number, line in enumerate(stream, 1):
            if not line.endswith(b"\n"):
                break
            try:
                id_, failed_line = of_what(json.loads(line))
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                got, where = line[:40].decode(errors="replace"), f"{output.name}:{number}"
                raise ValueError(f"{where}: expected a line of an earlier output, got {got!r}") from error
            if failed_line is not None:
                output.failed_lines.add(failed_line)
            elif id_ is not None:
                output.done.add(digest_of_id(id_))
            size += len(line)
    os.ftruncate(output.descriptor, size)
    os.lseek(output.descriptor, size, os.SEEK_SET)
    output.size = size
