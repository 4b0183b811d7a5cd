"""docs/generate.md: its lines are good input, and results look as it says."""

from __future__ import annotations

import json
import re
from pathlib import Path

from typer.main import get_command

from advance_step.cli import app
from advance_step.decode.json_output import check_schema
from advance_step.generate.fields import SAMPLING
from advance_step.generate.job import generate
from advance_step.generate.json_lines import parse_line
from advance_step.generate.settings import Settings

PAGE = (Path(__file__).parent.parent.parent / "docs" / "generate.md").read_text()


def test_the_lines_of_the_page_run(tiny, tmp_path):
    own, result, batch, _, error = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)
    (tmp_path / "in.jsonl").write_text(own + batch + "bad")
    sampling = {"max_new_tokens": 4, "seed": 0}
    settings = Settings(model=str(tiny), dtype="float32", sampling=sampling, ordered=True)
    assert generate([], str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl"), False, settings) == 1
    sky, chat, samples, *answers, bad = map(json.loads, (tmp_path / "out.jsonl").read_text().splitlines())
    assert list(sky) == list(json.loads(result))
    assert chat["messages"][0] == {"role": "system", "content": "Be brief."}
    assert len(samples["completions"]) == 2
    assert {"text", "tokens", "token_ids", "finish_reason", "logprobs"} == set(samples["completions"][0])
    assert [answer["custom_id"] for answer in answers] == ["request-1", "request-2"]
    assert all(answer["response"]["status_code"] == 200 for answer in answers)
    assert answers[0]["response"]["body"]["model"] == str(tiny)
    documented = json.loads(error)
    assert {"id": None, "line": 6, "error": "x"}.keys() == documented.keys()
    assert bad["error"]["message"] == f"line 6: {documented['error']}"


def test_the_schema_of_the_page_is_served():
    line = re.findall(r"```json\n(.*?)```", PAGE, re.DOTALL)[3]
    prompt = parse_line(line, 1, raw=False)
    check_schema(prompt.json_schema)
    assert prompt.json_schema["required"] == ["name", "inhabitants"]


def test_what_the_page_names_is_there():
    named = set(re.findall(r"`(--[a-z-]+)`", PAGE)) - {"--merge", "--served-model-name"}  # of other commands
    options = {name for option in get_command(app).commands["generate"].params for name in option.opts}
    assert named - options - {"--verify"} == set() and "--resume" in named
    fields = PAGE[PAGE.index("- Sampling: ") : PAGE.index("- Every other field")]
    assert SAMPLING - set(re.findall(r"`([a-z_]+)`", fields)) == set()
