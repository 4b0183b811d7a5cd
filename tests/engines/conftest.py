"""The table at the end of `make test-vllm`: what each replaced call took in the engine, before and after."""

from __future__ import annotations

from statistics import median
from typing import Any

import pytest

RUNS = pytest.StashKey[dict[str, list[dict[str, Any]]]]()  # each engine's runs, as vllm_runs.py has them


def pytest_configure(config: pytest.Config) -> None:
    config.stash[RUNS] = {}


@pytest.fixture(scope="session")
def runs_of_engines(pytestconfig: pytest.Config) -> dict[str, list[dict[str, Any]]]:
    return pytestconfig.stash[RUNS]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not config.stash[RUNS]:
        return
    terminalreporter.section("the replaced calls in vLLM's engine: how many, and the median of their microseconds")
    terminalreporter.write_line("| engine | call | calls without / with | vLLM's own | ours |")
    terminalreporter.write_line("| --- | --- | ---: | ---: | ---: |")
    for engine, runs in config.stash[RUNS].items():
        for call in runs[0]["times"]:
            theirs, ours = (
                [time for run in runs if run["patched"] is patched for time in run["times"].get(call, [])]
                for patched in (False, True)
            )
            times = f"{median(theirs):.1f} | {median(ours):.1f}"
            terminalreporter.write_line(f"| {engine} | {call} | {len(theirs)} / {len(ours)} | {times} |")
