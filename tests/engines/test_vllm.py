"""vLLM itself, on a CPU in float32: the same tokens with and without our operators, and the calls that they served."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from vllm_runs import MAX_MODEL_LEN, NEW_TOKENS, ragged_prompts

HERE = Path(__file__).parent
SLOTS, EAGLE = "compute_slot_mapping", "eagle_step_update_slot_mapping_and_metadata"
REPLACED = {"plain": {SLOTS}, "draft": {SLOTS, EAGLE}}  # what each engine calls of it

Engine = tuple[str, dict[str, Any]]


@pytest.fixture(scope="module", params=["plain", "draft"])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, runs_of_engines: Any) -> Engine:
    name = request.param
    output = tmp_path_factory.mktemp(name) / "runs.json"
    variables = {"PYTHONPATH": str(HERE), "ADVANCE_STEP_VLLM": "1" if name == "draft" else ""}
    command = [sys.executable, str(HERE / "vllm_runs.py"), name, str(output)]
    ran = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    result = json.loads(output.read_text())
    runs_of_engines[name] = result["runs"]
    return name, result


def test_the_entry_point_patches_the_worker_if_asked_to(engine: Engine) -> None:
    name, result = engine
    assert (result["worker"] != result["scheduler"]) is (name == "draft")
    assert result["patched_at_start"] is (name == "draft")
    assert set(result["served_at_start"]) == (REPLACED[name] if name == "draft" else set())


def test_tokens_are_the_same(engine: Engine) -> None:
    first, *others = (run["tokens"] for run in engine[1]["runs"])
    assert all(tokens == first for tokens in others)


def test_requests_reach_their_end_and_the_models_length(engine: Engine) -> None:
    prompts = ragged_prompts()
    room = [min(NEW_TOKENS, MAX_MODEL_LEN - len(prompt)) for prompt in prompts]
    assert len(prompts) == 32 and sum(len(prompt) + NEW_TOKENS > MAX_MODEL_LEN for prompt in prompts) == 4
    for run in engine[1]["runs"]:
        assert [len(tokens) for tokens in run["tokens"]] == room
        assert run["cached"] > 0, "no prefix was found in the cache"


def test_a_draft_that_passes_the_models_length(engine: Engine) -> None:
    theirs, ours = engine[1]["at_the_models_length"]
    assert ours == theirs == [[4, 255, 0, 32], [5, 256, 1, 33], [4, 15 * 32 + 31, -1, 25 * 32, -1, -1]]


def test_our_operators_served_every_call_with_the_patch_and_none_without(engine: Engine) -> None:
    name, result = engine
    for run in result["runs"]:
        made = {
            operator: sum(len(times) for call, times in run["times"].items() if call.startswith(operator))
            for operator in REPLACED[name]
        }
        assert all(made.values())
        assert run["served"] == (made if run["patched"] else {})
