"""Holds a target to its clauses in a process of its own, so that one that dies fails a clause and not the kit.

Run as a module, it is that process: one line of JSON a clause, on the pipe that it was given.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict
from threading import Timer

from advance_step.conformance.judge import brief
from advance_step.conformance.run import FAILS, Result, check_clause, clauses, load

SECONDS_A_CLAUSE = 300


class NotLoadedError(RuntimeError):
    """The target cannot be imported, or the executor is not on this machine."""


def check_apart(
    target: str | None, pending: list[tuple[str, str]], device: str, environment: dict[str, str] | None = None
) -> Iterator[Result]:
    """Holds `target` (None: our own operators) to the (contract, clause) pairs `pending`, in order.

    A process that dies, or is silent for five minutes, fails the clause that it was at; the rest go on in a new one.
    Raises NotLoadedError if the target cannot be loaded.
    """
    pending = list(pending)
    while pending:
        read, write = os.pipe()
        job = json.dumps({"target": target, "pending": pending, "device": device, "pipe": write})
        child = subprocess.Popen(
            [sys.executable, "-m", __name__, job], pass_fds=[write], env=os.environ | (environment or {})
        )
        os.close(write)
        silent = False

        def kill(child: subprocess.Popen = child) -> None:
            nonlocal silent
            silent = True
            child.kill()

        with os.fdopen(read) as pipe:
            while pending:
                watch = Timer(SECONDS_A_CLAUSE, kill)
                watch.start()
                line = pipe.readline()
                watch.cancel()
                if not line:
                    break
                answer = json.loads(line)
                if "not_loaded" in answer:
                    child.wait()
                    raise NotLoadedError(answer["not_loaded"])
                yield Result(**answer)
                pending.pop(0)
        status = child.wait()
        if pending and status:
            contract, name = pending.pop(0)
            how = f"no answer within {SECONDS_A_CLAUSE} s" if silent else f"the process died: {_ending(status)}"
            yield Result(contract, name, clauses(contract)[name].sentence, FAILS, how)


def _served(device: str) -> None:
    """Raises if another executor than the forced one serves the device."""
    from advance_step import backend_info

    info = backend_info()
    kind = device.split(":")[0]
    served = info["devices"].get(kind, {"executor": "reference", "why": "no other has kernels for it"})
    if info["forced"] not in (None, served["executor"]):
        raise NotLoadedError(f"{kind} is served by {served['executor']}: {served['why']}")


def _ending(status: int) -> str:
    return signal.Signals(-status).name if status < 0 else f"exit status {status}"


def _work(target: str | None, pending: list[tuple[str, str]], device: str, pipe: int) -> None:
    with os.fdopen(pipe, "w", buffering=1) as out:
        try:
            loaded = {contract: load(target, contract) for contract, _ in pending}
            if target is None:
                _served(device)
        except Exception as error:
            print(json.dumps({"not_loaded": brief(error)}), file=out)
            return
        for contract, name in pending:
            result = check_clause(loaded[contract], contract, name, device)
            print(json.dumps(asdict(result)), file=out)
            if result.outcome == FAILS and device != "cpu":
                return  # an accelerator does not recover from a wild access; the next process starts with a sound one


if __name__ == "__main__":
    sys.path.insert(0, os.getcwd())  # a console script does not have it; a kernel under work lies there
    _work(**json.loads(sys.argv[1]))
