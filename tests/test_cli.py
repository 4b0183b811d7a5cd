"""The main job through the command line, on the real model, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

from advance_step.cli import app
from advance_step.generate.inputs import open_input
from advance_step.generate.model import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"
TEXTS = ["Why is the sky blue?", "Name three colours.", "Hi"]


def advance_step(*arguments: object, code: str = "") -> subprocess.CompletedProcess[str]:
    """`advance-step` with these arguments; `code` runs before it."""
    script = f"{code}\nimport sys, advance_step.__main__ as command; sys.argv[0] = 'advance-step'; command.main()"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def without(*modules: str) -> str:
    """Code after which these modules are as good as not installed."""
    return f"import sys; sys.modules.update(dict.fromkeys({modules!r}))"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A directory with a tiny model and its tokenizer."""
    from tiny_directory import save_tiny

    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """What transformers' own generate makes of TEXTS: 8 tokens each, greedy, float32."""
    model, tokenizer = load_model(None, torch.float32, print)
    texts = []
    for text in TEXTS:
        turn = [{"role": "user", "content": text}]
        prompt = tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        output = model.generate(**prompt, max_new_tokens=8, do_sample=False)
        texts.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True))
    return texts


@pytest.fixture(scope="module")
def job(tmp_path_factory) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The main job: three prompts, two rows, verified."""
    directory = tmp_path_factory.mktemp("job")
    (directory / "in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in TEXTS))
    options = ["--dtype", "float32", "--max-new-tokens", 8, "--batch-size", 2, "--block-size", 3, "--verify", 3]
    output = directory / "out.jsonl"
    return advance_step("generate", "--input", directory / "in.jsonl", "--output", output, *options), output


def test_a_batch_equals_transformers_generate(job, expected):
    ran, output = job
    assert ran.returncode == 0, ran.stderr
    assert "verified: 3 of 3 as transformers' generate, token for token (greedy, float32)" in ran.stderr
    done = {line["id"]: line for line in lines(output)}
    assert {id_: line["prompt"] for id_, line in done.items()} == dict(enumerate(TEXTS, 1))
    assert [done[id_]["text"] for id_ in sorted(done)] == expected
    for line in done.values():
        assert (line["finish_reason"], line["tokens"]) == ("length", 8) or line["finish_reason"] == "stop"
    assert f"3 prompts, {sum(line['tokens'] for line in done.values())} tokens in " in ran.stderr
    assert "ms per step, " in ran.stderr and "% of it advancing" in ran.stderr


def test_a_log_has_no_control_codes(job):
    ran, _ = job
    assert ran.stdout == ""
    assert "\r" not in ran.stderr and "\x1b" not in ran.stderr


def test_one_prompt_goes_to_stdout(expected):
    ran = advance_step("generate", TEXTS[0], "--dtype", "float32", "--max-new-tokens", 8)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == expected[0] + "\n"
    assert ran.stderr.startswith("1 prompt, 8 tokens in ")


def test_nobody_reads_and_characters_that_the_locale_has_not(tiny):
    """`... | head -1` ends quietly; an ASCII locale takes an argument in UTF-8 and prints what it can."""
    script = f"""
        set -o pipefail; run() {{ "$PYTHON" -m advance_step generate --model {tiny} --max-new-tokens 4 "$@"; }}
        printf 'a\\nb\\nc\\n' | run --input - --output - --batch-size 1 | head -1; echo "codes ${{PIPESTATUS[*]}}"
        LC_ALL=C PYTHONIOENCODING=ascii PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 FORCE_COLOR=1 run "a caf\u00e9" "b"
    """
    ran = subprocess.run(["bash", "-c", script], capture_output=True, env=os.environ | {"PYTHON": sys.executable})
    first, codes, *texts = ran.stdout.decode("ascii").splitlines()
    assert json.loads(first)["prompt"] == "a" and codes == "codes 0 141 0"
    assert ran.returncode == 0 and "[1] a caf?" in texts and "[2] b" in texts
    assert b"Broken pipe" not in ran.stderr and b"Traceback" not in ran.stderr and b"\x1b" not in ran.stderr


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "expected prompts or --input, got neither"),
        (["x", "--input", "in.txt"], "expected prompts or --input, got both"),
        (["--input", "nowhere.txt"], "--input: expected a file, got nowhere.txt"),
        (["x", "--dtype", "int8"], "--dtype: expected one of float32, bfloat16, float16, got int8"),
        (["x", "--model", "nowhere"], "--model: expected a directory or a .gguf file, got nowhere"),
        (["x", "--top-p", "2"], "top_p: expected 0 <= top_p <= 1, got 2.0"),
        (["x", "--resume"], "--resume: expected an --output to go on with, got none"),
        (["--input", "examples/prompts.txt", "--output", "."], "--output: expected a file, got ., a directory"),
    ],
)
def test_bad_input_is_an_error_before_any_work(arguments, said, monkeypatch):
    monkeypatch.chdir(EXAMPLES.parent)
    ran = CliRunner().invoke(app, ["generate", *arguments])
    assert (ran.exit_code, ran.output) == (1, f"advance-step generate: {said}\n")


def test_a_device_that_is_not_there():
    ran = CliRunner().invoke(app, ["generate", "Hi", "--device", "cuda:77"])
    assert ran.exit_code == 1 and ran.output.startswith("advance-step generate: no device 'cuda:77': ")


@pytest.mark.parametrize(
    "option", ["--block-size", "--batch-size", "--max-new-tokens", "--steps-per-sync", "--num-pages"]
)
def test_sizes_below_one_are_refused(option):
    ran = CliRunner().invoke(app, ["generate", "x", option, "0"])
    assert ran.exit_code == 2
    assert f"Invalid value for '{option}'" in ran.output


@pytest.mark.parametrize("arguments", [[], ["info"]])
def test_info_needs_torch_alone(arguments):
    ran = advance_step(*arguments, code=without("typer", "rich", "transformers"))
    assert ran.returncode == 0, ran.stderr
    first, *devices = ran.stdout.splitlines()
    assert first.startswith("advance-step ") and ", torch " in first
    assert [line.split()[0] for line in devices] == ["cpu", "cuda", "xpu", "npu", "vllm"]


@pytest.mark.parametrize("missing", ["typer", "rich", "transformers"])
def test_generate_says_what_to_install(missing):
    ran = advance_step("generate", "x", code=without(missing))
    install = 'pip install "advance-step[models]"'
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr == f"advance-step generate: {missing} is not installed: {install}\n"


def test_example_prompts_are_good_input():
    texts, objects = (
        list(open_input(str(EXAMPLES / name), False).records) for name in ("prompts.txt", "prompts.jsonl")
    )
    assert len(texts) == 8 and [prompt.id for prompt in objects] == ["sky", "rain", "lock", "mail"]


def test_every_option_of_generate_is_in_a_group():
    options = [option for option in get_command(app).commands["generate"].params if option.name != "prompts"]
    groups = {option.name: option.rich_help_panel for option in options}
    assert [name for name, group in groups.items() if not group] == []
    assert groups["report"] == groups["verify"] == "Checks and reports"
