"""The report of a run: judged before anything is loaded, written however the run ends."""

import logging
import os
import platform
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers

from advance_step import __version__, backend_info
from advance_step.decode.loop import Decoder
from advance_step.decode.request import Request
from advance_step.generate.interrupts import Terminated
from advance_step.generate.outputs import STDOUT
from advance_step.generate.report.page import Facts, render
from advance_step.generate.report.recorder import Recorder
from advance_step.generate.screen import say
from advance_step.generate.settings import Settings

if TYPE_CHECKING:
    from advance_step.generate.run import Run

MAX_VALUE = 200  # characters of a setting: a JSON schema may be long

BEGINNING = b"<!doctype html>\n<html"  # of every report: such a file may be replaced by another

logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it tells the user's terminal of its font cache


class Report:
    """A page of what a run does, at `path`.

    others: the files that the run reads and writes.
    model, settings: as they were given.

    Raises ValueError for a path at which no report can be, or that cannot be written.
    """

    def __init__(self, path: str, others: Sequence[str], model: Path, settings: Settings) -> None:
        self.path = _checked(path, others)
        self.model = model
        self.settings = settings
        self.begun = datetime.now()
        self.recorder: Recorder | None = None
        self._used: dict[str, Any] = {}

    def begin(self, decoder: Decoder) -> None:
        """The run begins to decode."""
        self.recorder = Recorder(decoder.batch_size, decoder.pool.size)
        self._used = {
            "--batch-size": decoder.batch_size,
            "--block-size": decoder.block_size,
            "--num-pages": decoder.pool.size,
            "--steps-per-sync": decoder.steps_per_sync,
            "--compile": decoder.compiled,
            "Attention": decoder.attention,
        }

    def look(self, decoder: Decoder, finished: Sequence[Request]) -> None:
        """Note what the decoder has done; after each of its yields."""
        assert self.recorder is not None
        self.recorder.look(decoder.figures, decoder.occupancy, finished)

    @contextmanager
    def of(self, run: "Run") -> Iterator[None]:
        """Within it the run is under way; at its end the page is written, and the run's own error goes on.

        OSError where the page cannot be written after a run that finished.
        """
        earlier = run.finished + run.num_failed, run.num_failed
        try:
            yield
        except BaseException as error:
            try:
                self._write(run, earlier, error)
            except Exception as unwritten:  # the run's own error is the one to hear of
                say(f"--report: {unwritten}")
            raise
        self._write(run, earlier, None)

    def _write(self, run: "Run", earlier: tuple[int, int], error: BaseException | None) -> None:
        if self.recorder:
            self.recorder.close()
        lines, failed = earlier
        facts = Facts(
            model=self.model.name,
            input=run.source.name,
            begun=f"{self.begun:%Y-%m-%d %H:%M:%S}",
            ended="finished" if error is None else "interrupted" if isinstance(error, KeyboardInterrupt) else "failed",
            why=_why(error),
            finished=run.finished - (lines - failed),
            failed=run.num_failed - failed,
            earlier=lines,
            total=run.total,
            settings=self._settings(),
            versions=_versions(),
        )
        _replace(self.path, render(facts, self.recorder))
        say(f"report: {self.path}")

    def _settings(self) -> dict[str, Any]:
        """Options by their names, as the run used them; those that nothing was said of are left out."""
        given = asdict(self.settings)
        given |= given.pop("sampling") | {"model": str(self.model)}
        said = {name: value for name, value in given.items() if value is not None and value is not False}
        return {f"--{name.replace('_', '-')}": str(value)[:MAX_VALUE] for name, value in said.items()} | self._used


def _checked(path: str, others: Sequence[str]) -> Path:
    """The path of a report that can be written: tried out, without a trace."""
    found = Path(path)
    if path in STDOUT:
        raise ValueError(f"--report: expected a file, got {path}, which results may go to")
    if found.exists():
        if not found.is_file():
            raise ValueError(f"--report: expected a file, got {path}{', a directory' if found.is_dir() else ''}")
        if any(os.path.exists(other) and os.path.samefile(other, found) for other in others):
            raise ValueError(f"--report: expected another file than --input and --output, got {path}")
        with found.open("rb") as stream:
            if stream.read(len(BEGINNING)) not in (BEGINNING, b""):
                raise ValueError(f"--report: expected a new file or an earlier report, got {path}, which is another")
    if os.path.abspath(path) in map(os.path.abspath, others):
        raise ValueError(f"--report: expected another file than --input and --output, got {path}")
    try:
        found.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=found.parent).close()
    except OSError as error:
        raise ValueError(f"--report: expected a path that can be written, got {path}: {error.strerror}") from error
    return found


def _replace(path: Path, page: str) -> None:
    """Write the page, whole at every moment."""
    unfinished = path.with_name(path.name + ".part")
    try:
        unfinished.write_text(page, encoding="utf-8", errors="replace")  # a path may have bytes that are none
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def _why(error: BaseException | None) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "it was terminated (SIGTERM)" if isinstance(error, Terminated) else "it was interrupted (Ctrl-C)"
    if isinstance(error, BrokenPipeError):
        return "nobody read its output any more"
    return str(error) or type(error).__name__


def _versions() -> dict[str, Any]:
    found = backend_info()
    cpu = found["devices"]["cpu"]["executor"]
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "advance-step": __version__,
        "torch": found["torch"],
        "transformers": transformers.__version__,
        "Python": found["python"],
        "Machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads of torch",
        "GPUs": ", ".join(devices) or "none",
        "Operators on the CPU by": cpu,
    }
