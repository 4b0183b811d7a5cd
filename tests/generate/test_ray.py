"""A job on a local Ray of two workers: the lines of one process, whatever dies on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from advance_step.generate import job
from advance_step.generate.records import Prompt
from advance_step.generate.settings import Settings

ray = pytest.importorskip("ray", reason="ray is not installed: the extra ray")

from advance_step.generate.on_ray import Cluster, blocks  # noqa: E402

SAMPLING = {"max_new_tokens": 6, "seed": 0}
COUNT = 40


def settings(model: Path, **options: object) -> Settings:
    return Settings(model=str(model), dtype="float32", sampling=SAMPLING, batch_size=1, **options)


def on_ray(model: Path, **options: object) -> Settings:
    return settings(model, ray=True, ray_cores=1, **options)


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    """Ray counts what it is told; and it tells nobody."""
    monkeypatch.setenv("RAY_OVERRIDE_RESOURCES", json.dumps({"CPU": 2}))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def lines() -> list[str]:
    made = [json.dumps({"id": f"line {number}", "prompt": "a" * (1 + number % 5)}) for number in range(COUNT)]
    made[17] = "bad"
    return made


@pytest.fixture(scope="module")
def expected(tiny, tmp_path_factory) -> list[str]:
    """What one process makes of the lines, in their order."""
    directory = tmp_path_factory.mktemp("alone")
    (directory / "in.jsonl").write_text("\n".join(lines()))
    code = job.generate(
        [], str(directory / "in.jsonl"), str(directory / "out.jsonl"), False, settings(tiny, ordered=True)
    )
    assert code == 1
    return (directory / "out.jsonl").read_text().splitlines()


def worker_processes() -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if entry.read_bytes().startswith(b"ray::Worker"):
                found.append(int(entry.parent.name))
        except OSError:  # gone
            continue
    return found


def wait_for(condition) -> None:
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.1)
    raise AssertionError("it did not happen in five minutes")


def test_the_same_lines_though_a_worker_is_killed(tiny, expected, tmp_path, capsys):
    """The lines come by a FIFO: the second half when the first results are there, and a worker is dead."""
    fifo, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(fifo)
    killed = []

    def produce() -> None:
        with fifo.open("w") as stream:
            stream.write("\n".join(lines()[:16]) + "\n")  # blocks of 4, two for each of two workers
            stream.flush()
            wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= 4)
            killed.extend(worker_processes()[:1])
            os.kill(killed[0], signal.SIGKILL)
            stream.write("\n".join(lines()[16:]) + "\n")

    producer = threading.Thread(target=produce)
    producer.start()
    assert job.generate([], str(fifo), str(output), False, on_ray(tiny, ordered=True)) == 1
    producer.join()
    assert killed and output.read_text().splitlines() == expected
    said = capsys.readouterr().err
    assert "on Ray: 2 workers, 1 core each" in said
    assert "1 line failed, the first: line 18: expected a JSON object" in said
    assert not ray.is_initialized()


def test_the_driver_killed_and_resumed(tiny, expected, tmp_path):
    """By kill -9; then in one process, since where a line was decoded makes no difference."""
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(source)
    command = [sys.executable, "-m", "advance_step", "generate", "--model", str(tiny), "--dtype", "float32"]
    command += ["--max-new-tokens", "6", "--batch-size", "1", "--input", str(source), "--output", str(output)]
    run = subprocess.Popen([*command, "--ray", "--ray-cores", "1"], stderr=subprocess.DEVNULL)
    with source.open("w") as stream:
        stream.write("\n".join(lines()[:24]) + "\n")
        stream.flush()
        wait_for(lambda: output.exists() and output.read_bytes().count(b"\n") >= 4)
        run.send_signal(signal.SIGKILL)
        run.wait()
    finished = output.read_bytes().count(b"\n")
    assert 4 <= finished < COUNT
    source.unlink()
    source.write_text("\n".join(lines()))
    # A stream is known by its first line, a file by its bytes: the header says so, and the file is another input.
    header = output.with_name("out.jsonl.run.json")
    entry = json.loads(header.read_text())
    entry["input_fingerprint"] = fingerprint(source)
    header.write_text(json.dumps(entry))
    done = subprocess.run([*command, "--resume"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert sorted(output.read_text().splitlines()) == sorted(expected)
    wait_for(lambda: not worker_processes())  # they do not outlive their driver


def fingerprint(path: Path) -> str:
    from advance_step.generate.inputs import open_input

    return open_input(str(path), False).fingerprint


def test_what_does_not_go_with_it(tiny, tmp_path, monkeypatch):
    (tmp_path / "in.txt").write_text("a\n")
    source, output = str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl")
    for options, arguments, message in [
        ({}, (None, False), "--ray: expected an --output, got none"),
        ({}, (output, False, "x.html"), "--report: expected none with --ray"),
        ({"device": "cuda:1", "ray_cores": None}, (output, False), "--device: expected cpu or cuda with --ray"),
    ]:
        out, resume, *report = arguments
        given = settings(tiny, **{"ray": True, "ray_cores": 1} | options)
        with pytest.raises(ValueError, match=message):
            job.generate([], source, out, resume, given, *report)
    with pytest.raises(ValueError, match="--ray-cores: expected none without --ray or on GPUs, got 2"):
        settings(tiny, ray_cores=2)
    with pytest.raises(ValueError, match="--ray-cores: expected at most the 2 of a machine, got 3"):
        job.generate([], source, output, False, settings(tiny, ray=True, ray_cores=3))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        with pytest.raises(ValueError, match=r'--ray: ray is not installed: pip install "advance-step\[ray\]"'):
            job.generate([], source, output, False, on_ray(tiny))
    assert not Path(output).exists() and not ray.is_initialized()


def test_what_a_worker_refuses_is_said_as_ever(tmp_path):
    from tiny_directory import save_tiny

    directory = save_tiny(tmp_path / "model", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    )
    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(ValueError, match="dynamic RoPE follows the longest row of a batch"):
        job.generate([], str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), False, on_ray(directory))
    assert not ray.is_initialized()


def test_blocks_of_lines(tiny):
    prompts = [Prompt(number, number, "a", False) for number in range(10)]
    assert [[p.line for p in block] for block in blocks(iter(prompts), 4)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    cluster = Cluster(settings(tiny))
    cluster.count = 2
    assert [cluster.lines_of_a_block(total) for total in (None, 1, 3, 10, 1000)] == [4, 1, 1, 2, 4]
    cluster.settings.batch_size = 8
    assert [cluster.lines_of_a_block(total) for total in (None, 10, 100, 10_000)] == [32, 5, 13, 32]
