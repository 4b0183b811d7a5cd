"""The whole job with a tiny model: results, failures, resuming, verification."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
from tiny_directory import run_job

from advance_step.generate.job import generate
from advance_step.generate.settings import Settings

TEXTS = ["Hello", "Name three colours.", "a", "Why is the sky blue?", "b" * 40]


def settings(tiny: Path, **options: object) -> Settings:
    defaults = {"model": str(tiny), "dtype": "float32", "sampling": {"max_new_tokens": 6, "seed": 0}, "batch_size": 2}
    return Settings(**defaults | options)


def job(tiny: Path, input: Path, output: Path, resume: bool = False, **options: object) -> int:
    return generate([], str(input), str(output), resume, settings(tiny, **options))


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def by_line(path: Path) -> list[str]:
    """The lines of an output in one order, without what only says when."""
    return sorted(path.read_text().split("\n")[:-1])


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": text, "id": f"p{n}"}) + "\n" for n, text in enumerate(TEXTS)))
    return path


def test_results_are_verified_and_keep_fields(tiny, tmp_path, capsys):
    (tmp_path / "in.jsonl").write_text('{"prompt": "Hello", "topic": "x"}\n{"prompt": [43, 74], "id": "ids"}')
    assert job(tiny, tmp_path / "in.jsonl", tmp_path / "out.jsonl", verify=2) == 0
    first, second = sorted(lines(tmp_path / "out.jsonl"), key=lambda line: str(line["id"]))
    assert first["topic"] == "x" and (first["tokens"], first["finish_reason"]) == (6, "length")
    assert second["prompt"] == [43, 74]
    said = capsys.readouterr().err
    assert "2 prompts, 12 tokens in " in said
    assert "verified: 2 of 2 as transformers' generate, token for token (greedy, float32)\n" in said


def test_bad_lines_are_counted_and_the_exit_code_says_so(tiny, tmp_path, capsys):
    long = json.dumps({"prompt": "x" * 300})
    narrator = json.dumps({"messages": [{"role": "narrator", "content": "x"}], "id": "n"})
    (tmp_path / "in.jsonl").write_text(f'{{"prompt": "a"}}\n{{"pro\n{long}\n{narrator}\n{{"prompt": [97]}}\n')
    output = tmp_path / "out.jsonl"
    assert job(tiny, tmp_path / "in.jsonl", output, ordered=True) == 1
    good, cut, full, refused, token = lines(output)
    assert good["tokens"] == 6
    assert cut == {
        "id": None,
        "line": 2,
        "error": "expected a JSON object, got '{\"pro' (Unterminated string starting at)",
    }
    assert full["error"] == "prompt: expected fewer than 256 tokens (the context), got 319"
    assert refused == {"id": "n", "line": 4, "error": "messages: the model's chat template refuses them: no narrator"}
    assert token["error"] == "expected token ids in [0, 97), got 97"
    assert capsys.readouterr().err.splitlines()[-1].startswith("4 lines failed, the first: line 2: expected a JSON obj")
    before = output.read_text()
    assert job(tiny, tmp_path / "in.jsonl", output, resume=True, ordered=True) == 1
    assert output.read_text() == before
    assert capsys.readouterr().err.splitlines() == [
        f"{output} has every prompt already",
        "4 lines failed in an earlier run",
    ]


def test_new_tokens_end_with_the_context(tiny, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps({"prompt": [50] * 250, "max_tokens": 100}))
    assert job(tiny, tmp_path / "in.jsonl", tmp_path / "out.jsonl") == 0
    assert lines(tmp_path / "out.jsonl")[0]["tokens"] == 6


def test_in_the_order_of_the_input(tiny, tmp_path):
    """The first line takes longest."""
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": "a", "max_tokens": n}) + "\n" for n in (20, 1, 2, 1)) + "bad\n")
    for ordered in (False, True):
        assert job(tiny, path, tmp_path / f"{ordered}.jsonl", ordered=ordered) == 1
    unordered = [line.get("id") for line in lines(tmp_path / "False.jsonl")]
    assert unordered != [1, 2, 3, 4, None] and sorted(map(str, unordered)) == ["1", "2", "3", "4", "None"]
    assert [line.get("id") for line in lines(tmp_path / "True.jsonl")] == [1, 2, 3, 4, None]


def test_resume_decodes_what_is_missing(tiny, prompts, tmp_path, capsys):
    output, whole = tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    assert job(tiny, prompts, whole) == job(tiny, prompts, output) == 0
    text = output.read_text().split("\n")
    output.write_text(text[0] + "\n" + text[1] + "\n" + text[2][:9])
    capsys.readouterr()
    assert job(tiny, prompts, output, resume=True) == 0
    assert "3 prompts, " in capsys.readouterr().err
    assert by_line(output) == by_line(whole)


def test_resume_of_a_finished_output_still_verifies(tiny, prompts, tmp_path, capsys):
    output = tmp_path / "out.jsonl"
    assert job(tiny, prompts, output) == 0
    before = output.read_text()
    capsys.readouterr()
    assert job(tiny, prompts, output, resume=True, verify=3) == 0
    assert "verified: 3 of 3 as transformers' generate" in capsys.readouterr().err
    assert output.read_text() == before


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"raw": True}, {"sampling": {"max_new_tokens": 7, "seed": 0}}]
)
def test_resume_with_other_settings_is_refused(tiny, prompts, tmp_path, change):
    assert job(tiny, prompts, tmp_path / "out.jsonl") == 0
    with pytest.raises(ValueError, match=r"--resume: .*out\.jsonl was made with --.*, got --"):
        job(tiny, prompts, tmp_path / "out.jsonl", resume=True, **change)


def test_resume_with_another_model_or_input_is_refused(tiny, prompts, tmp_path):
    from tiny_directory import save_tiny

    assert job(tiny, prompts, tmp_path / "out.jsonl") == 0
    with pytest.raises(ValueError, match="was made with another --model"):
        job(save_tiny(tmp_path / "other", "qwen2"), prompts, tmp_path / "out.jsonl", resume=True)
    prompts.write_text(prompts.read_text() + '{"prompt": "more"}\n')
    with pytest.raises(ValueError, match="has the results of another --input"):
        job(tiny, prompts, tmp_path / "out.jsonl", resume=True)


def test_without_a_chat_template_nothing_is_written(tiny, prompts, tmp_path):
    from transformers import AutoTokenizer

    model = tmp_path / "model"
    model.mkdir()
    for file in tiny.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = None
    (model / "chat_template.jinja").unlink()
    tokenizer.save_pretrained(model)
    with pytest.raises(ValueError, match="the model has no chat template: use --raw"):
        job(model, prompts, tmp_path / "out.jsonl")
    assert not list(tmp_path.glob("out*"))
    assert job(model, prompts, tmp_path / "out.jsonl", raw=True) == 0


def test_an_interrupt_keeps_what_is_finished(tiny, prompts, tmp_path, capsys, monkeypatch):
    """Before the second result is written."""
    from advance_step.generate import outputs

    output, write = tmp_path / "out.jsonl", outputs.Output.write

    def interrupted(self, entry) -> None:
        if self.size:
            os.kill(os.getpid(), signal.SIGINT)
        write(self, entry)

    with monkeypatch.context() as patched:
        patched.setattr(outputs.Output, "write", interrupted)
        assert job(tiny, prompts, output) == 130
    said = f"interrupted: 1 of 5 prompts are finished and kept in {output} (--resume goes on from there)"
    assert capsys.readouterr().err.splitlines()[-1] == said
    assert len(lines(output)) == 1
    assert job(tiny, prompts, output, resume=True) == 0 and len(lines(output)) == 5


def start(*arguments: object) -> multiprocessing.Process:
    """A job in a process of its own; all of them are forked from one that has imported what they need."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["advance_step.generate.job", "transformers.models.llama.modeling_llama"])
    process = context.Process(target=run_job, args=arguments)
    process.start()
    return process


def wait_for(process: multiprocessing.Process, output: Path, size: int) -> None:
    """Until the output has so many bytes, or the process has ended."""
    while process.is_alive() and not (output.exists() and output.stat().st_size >= size):
        time.sleep(0.001)


@pytest.fixture
def many(tmp_path: Path) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Count to {n}."}) + "\n" for n in range(60)) + "bad\n")
    return path


@pytest.mark.parametrize(("number", "code"), [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 143)])
def test_stopped_ten_times_and_resumed(tiny, many, tmp_path, number, code):
    """At random moments; by SIGTERM once something new is written, since before that the job may not have begun."""
    whole, output, moments = tmp_path / "whole.jsonl", tmp_path / "out.jsonl", random.Random(5)
    assert job(tiny, many, whole) == 1
    for _ in range(10):
        process = start(tiny, many, output)
        written = output.stat().st_size if output.exists() else 0
        least = 1 if number == signal.SIGTERM else 0
        wait_for(process, output, written + least + moments.randrange(whole.stat().st_size // 15))
        os.kill(process.pid, number)
        process.join()
        assert process.exitcode == code
        assert number == signal.SIGKILL or output.read_bytes().endswith(b"\n")
    assert 0 < len(lines(output)) < 61
    process = start(tiny, many, output)
    process.join()
    assert process.exitcode == 1
    assert by_line(output) == by_line(whole)
