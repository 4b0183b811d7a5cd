"""`python -m advance_step` and the `advance-step` command: what serves each device and vLLM, or a command of cli.py.

The former needs torch alone; the commands need the extra [cli].
"""

from __future__ import annotations

import sys

from advance_step._backends import describe
from advance_step.plugins import vllm


def main() -> None:
    if sys.argv[1:] in ([], ["info"]):
        print(describe(), vllm.describe(), sep="\n")
        return
    try:
        from advance_step.cli import app
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich"):
            raise
        extra = "models" if sys.argv[1] == "generate" else "cli"
        sys.exit(f'advance-step {sys.argv[1]}: {error.name} is not installed: pip install "advance-step[{extra}]"')
    app()


if __name__ == "__main__":
    main()
