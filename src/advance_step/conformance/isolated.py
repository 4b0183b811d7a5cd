"""Holds a target to its clauses in a process of its own, so that one that dies fails a clause and not the kit.

Run as a module, it is that process: it writes "loaded", then one line of JSON a clause, to the pipe that it was given.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from threading import Timer
from typing import IO

from advance_step import check_device
from advance_step.conformance.run import FAILS, Result, check_clause, clauses, load

TIMEOUT = 300.0  # seconds a clause


class NotLoadedError(RuntimeError):
    """The target cannot be imported, or the executor is not on this machine."""


def check_isolated(
    target: str | None,
    pending: list[tuple[str, str]],
    device: str,
    environment: dict[str, str] | None = None,
    timeout: float = TIMEOUT,
) -> Iterator[Result]:
    """Holds `target` (None: our own operators) to the (contract, clause) pairs `pending`, in order.

    A process that dies, or is silent for `timeout` seconds, fails the clause that it was at; the rest go on in a new
    one. What the target prints goes to stderr.
    Raises NotLoadedError if the target cannot be loaded.
    """
    pending = list(pending)
    while pending:
        before = len(pending)
        read, write = os.pipe()
        job = json.dumps({"target": target, "pending": pending, "device": device, "pipe": write})
        command = [sys.executable, "-m", __name__, job]
        with (
            tempfile.TemporaryFile("w+", errors="replace") as printed,
            tempfile.TemporaryFile("w+", errors="replace") as errors,
            os.fdopen(read) as pipe,
        ):
            child = subprocess.Popen(
                command,
                pass_fds=[write],
                stdout=printed,
                stderr=errors,
                env=os.environ | (environment or {}),
                start_new_session=True,  # what the target starts ends with it, and does not hold the pipe open
            )
            os.close(write)
            try:
                loaded = _next_line(pipe, child, max(timeout, TIMEOUT))  # imports, compilers
                while loaded and pending and (line := _next_line(pipe, child, timeout)):
                    yield Result(**json.loads(line))
                    pending.pop(0)
                status = child.wait(timeout)
            except subprocess.TimeoutExpired:
                _kill(child)
                status = child.wait()
            finally:
                _kill(child)
            printed.seek(0)
            sys.stderr.write(printed.read())
            errors.seek(0)
            said = errors.read()
        if not loaded:
            raise NotLoadedError(said.strip().rpartition("\n")[2] or f"the process {_exit_reason(status, timeout)}")
        sys.stderr.write(said)
        if pending and (status or len(pending) == before):  # it may also have ended itself in good order
            contract, name = pending.pop(0)
            yield Result(
                contract, name, clauses(contract)[name].sentence, FAILS, f"the process {_exit_reason(status, timeout)}"
            )


def _next_line(pipe: IO[str], child: subprocess.Popen[bytes], timeout: float) -> str:
    """The child's next line; "" if it ended, or was silent for too long and is now killed."""
    watch = Timer(timeout, _kill, [child])
    watch.start()
    try:
        return pipe.readline()
    finally:
        watch.cancel()


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Ends the child and what it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)


def _exit_reason(status: int, timeout: float) -> str:
    if status == -signal.SIGKILL:
        return f"was killed: by the system, or after {timeout:g} s without an answer"
    return f"died: {signal.Signals(-status).name}" if status < 0 else f"ended: exit status {status}"


def _hold_to(target: str | None, pending: list[tuple[str, str]], device: str, pipe: int) -> None:
    with os.fdopen(pipe, "w", buffering=1) as out:
        loaded = {contract: load(target, contract) for contract, _ in pending}
        check_device(device)  # only now: a target may have brought it
        if target is None:
            _require_forced_executor(device)
        print("loaded", file=out)
        for contract, name in pending:
            try:
                result = check_clause(loaded[contract], contract, name, device)
            except KeyboardInterrupt:  # the target's: the user's does not reach this session of processes
                sentence = clauses(contract)[name].sentence
                result = Result(contract, name, sentence, FAILS, "raised KeyboardInterrupt")
            print(json.dumps(asdict(result)), file=out)
            if result.outcome == FAILS and device != "cpu":
                return  # an accelerator does not recover from a wild access; the next process starts with a sound one


def _require_forced_executor(device: str) -> None:
    """Raises if another executor than the forced one serves the device."""
    from advance_step import backend_info

    info, kind = backend_info(), device.partition(":")[0]
    served = info["devices"].get(kind, {"executor": "reference", "why": "no other has kernels for it"})
    if info["forced"] not in (None, served["executor"]):
        raise RuntimeError(f"{kind} is served by {served['executor']}: {served['why']}")


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # a console script does not have it; a kernel under work lies there
    _hold_to(**json.loads(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)  # threads that the target left are not waited for
