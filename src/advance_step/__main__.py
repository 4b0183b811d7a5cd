"""`python -m advance_step` and the `advance-step` command: what serves each device, or a command of cli.py.

The former needs torch alone; the commands need the extra [cli].
"""

from __future__ import annotations

import sys

from advance_step import backend_info


def main() -> None:
    if sys.argv[1:] in ([], ["info"]):
        print(info())
        return
    try:
        from advance_step.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        extra = "models" if sys.argv[1] == "generate" else "cli"
        sys.exit(f'advance-step {sys.argv[1]}: {error.name} is not installed: pip install "advance-step[{extra}]"')
    app()


def info() -> str:
    """Versions, then a line per device: what serves it, and why."""
    found = backend_info()
    lines = [f"advance-step {found['advance_step']}, torch {found['torch']}, Python {found['python']}"]
    if found["forced"]:
        lines[0] += f", ADVANCE_STEP_BACKEND={found['forced']}"
    lines += [f"{device:<5} {by['executor']:<10} {by['why']}" for device, by in found["devices"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
