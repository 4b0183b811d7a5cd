"""Runs an unmodified script on the emulated NPU as `python` would run it (`advance-step emulate-npu script.py`)."""

from __future__ import annotations

import atexit
import importlib.machinery
import os
import runpy
import signal
import sys
import types
from collections.abc import Sequence

import torch

from advance_step.ascend.emulation import enable


def run(script: str, args: Sequence[str] = ()) -> int:
    """Run `python script args...` on the emulated NPU and return its exit code; `script` may be "-m" or "-c", as there.

    The script is the process's `__main__` from then on. SystemExit passes through, for the interpreter to end by it;
    KeyboardInterrupt ends the process, as the signal does.
    """
    try:
        enable()
    except RuntimeError as refusal:
        return _refuse(str(refusal))
    if script in ("-m", "-c") and not args:
        return _refuse(f"argument expected for the {script} option")
    if script not in ("-m", "-c") and not os.path.exists(script):
        return _refuse(f"{script}: no such file")
    try:
        _execute(script, list(args))
    except (Exception, KeyboardInterrupt) as error:
        _strip(error)
        sys.excepthook(type(error), error, error.__traceback__)
        if isinstance(error, KeyboardInterrupt):
            atexit._run_exitfuncs()
            sys.stdout.flush()
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        return 1
    return 0


def _refuse(reason: str) -> int:
    print(f"advance-step emulate-npu: {reason}", file=sys.stderr)
    return 2


def _execute(script: str, args: list[str]) -> None:
    main = types.ModuleType("__main__")
    vars(main).update(__builtins__=sys.modules["builtins"], __annotations__={}, __file__=None)
    del main.__file__
    sys.modules["__main__"] = main
    if script == "-m":
        sys.argv[:] = ["-m", *args[1:]]
        _first_on_path(os.getcwd())
        runpy._run_module_as_main(args[0])  # type: ignore[attr-defined]
    elif script == "-c":
        sys.argv[:] = ["-c", *args[1:]]
        _first_on_path("")
        main.__loader__ = importlib.machinery.BuiltinImporter
        exec(compile(args[0], "<string>", "exec"), vars(main))
    elif os.path.isdir(script) or _is_archive(script):
        sys.argv[:] = [script, *args]
        _first_on_path(os.path.abspath(script))
        runpy._run_module_as_main("__main__", alter_argv=False)  # type: ignore[attr-defined]
    else:
        sys.argv[:] = [script, *args]
        path = os.path.join(os.getcwd(), script)  # as python has it: not normalised
        _first_on_path(os.path.dirname(os.path.realpath(script)))
        main.__file__ = path
        main.__cached__ = None  # type: ignore[attr-defined]
        main.__loader__ = importlib.machinery.SourceFileLoader("__main__", path)
        with open(path, "rb") as file:
            source = file.read()
        exec(compile(source, path, "exec"), vars(main))


def _is_archive(path: str) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)


def _first_on_path(directory: str) -> None:
    """Puts the script's place where this command's own stands."""
    if not getattr(sys.flags, "safe_path", False):  # python -P and PYTHONSAFEPATH: neither is there
        sys.path[:1] = [directory]


def _strip(error: BaseException | None) -> None:
    """Takes the emulation's frames out of the tracebacks of `error` and of what led to it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        frames, trace = [], error.__traceback__
        while trace is not None:
            if not _is_plumbing(trace.tb_frame.f_code.co_filename):
                frames.append(trace)
            trace = trace.tb_next
        stripped = None
        for trace in reversed(frames):
            stripped = types.TracebackType(stripped, trace.tb_frame, trace.tb_lasti, trace.tb_lineno)
        error.__traceback__ = stripped
        error = error.__cause__ or error.__context__


def _is_plumbing(filename: str) -> bool:
    """Whether a frame is that of the emulation rather than of the script or of what the script calls."""
    return filename.startswith(os.path.dirname(__file__)) or filename in (torch._ops.__file__, "<frozen runpy>")
