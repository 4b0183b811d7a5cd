"""A job on Ray: the lines of one process, whatever dies on the way.

Most jobs join a cluster that lives as long as this module: some machines of one core each, which are all on this one.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

from advance_step.generate import job
from advance_step.generate.records import Prompt
from advance_step.generate.settings import Settings

ray = pytest.importorskip("ray", reason="ray is not installed: the extra ray")

import psutil  # noqa: E402
from ray_machines import Machines, stopped_while_it_decodes, wait_for, workers  # noqa: E402

from advance_step.generate import on_ray  # noqa: E402
from advance_step.generate.on_ray import Blocks, Cluster  # noqa: E402
from advance_step.generate.ray_worker import BlockResult, Worker  # noqa: E402

SAMPLING = {"max_new_tokens": 40, "seed": 0}
COUNT = 40


def settings(model: Path, **options: object) -> Settings:
    return Settings(model=str(model), dtype="float32", sampling=SAMPLING, batch_size=1, **options)


def on_workers(model: Path, **options: object) -> Settings:
    return settings(model, ray=True, ray_cores=1, **options)


@pytest.fixture(autouse=True)
def ten_minutes():
    """No test takes longer, whatever waits for whatever."""

    def stop(number: int, frame: object) -> None:
        raise AssertionError("it took ten minutes")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(600)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def cluster():
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")  # it tells nobody
        patched.delenv("RAY_ADDRESS", raising=False)
        machines = Machines()
        yield machines
        machines.cluster.shutdown()


@pytest.fixture
def machines(cluster, monkeypatch) -> Machines:
    """Two, and the command joins them."""
    cluster.grow_to(2)
    monkeypatch.setenv("RAY_ADDRESS", cluster.cluster.address)
    return cluster


def lines() -> list[str]:
    made = [json.dumps({"id": f"line {number}", "prompt": "a" * (1 + number % 5)}) for number in range(COUNT)]
    made[17] = "bad"
    return made


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("lines") / "in.jsonl"
    path.write_text("\n".join(lines()) + "\n")
    return path


@pytest.fixture(scope="module")
def expected(tiny, source, tmp_path_factory) -> list[str]:
    """What one process makes of the lines, in their order."""
    output = tmp_path_factory.mktemp("alone") / "out.jsonl"
    assert job.generate([], str(source), str(output), False, settings(tiny, ordered=True)) == 1
    return output.read_text().splitlines()


def written(output: Path) -> int:
    return output.read_bytes().count(b"\n") if output.exists() else 0


def meanwhile(do: Callable[[], None]) -> threading.Thread:
    """Beside the job that comes next; a failure in it fails the test, and does not keep the process."""
    thread = threading.Thread(target=do, daemon=True)
    thread.start()
    return thread


def test_the_same_lines_though_a_worker_is_killed_while_it_decodes(machines, tiny, expected, tmp_path, capsys):
    """The lines come by a FIFO whose writer waits for answers: first to less than a block."""
    fifo, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(fifo)
    killed: list[psutil.Process] = []

    def kill_one(sent: int) -> bool:
        if not killed and (worker := stopped_while_it_decodes(psutil.Process())):
            killed.append(worker)
            worker.kill()
        return bool(killed) or written(output) == sent

    def produce() -> None:
        with fifo.open("w") as stream:
            stream.write("\n".join(lines()[:3]) + "\n")
            stream.flush()
            wait_for(lambda: written(output) == 3)
            for begin in range(3, COUNT, 9):
                end = min(begin + 9, COUNT)
                stream.write("\n".join(lines()[begin:end]) + "\n")
                stream.flush()
                wait_for(lambda sent=end: kill_one(sent))

    producer = meanwhile(produce)
    assert job.generate([], str(fifo), str(output), False, on_workers(tiny, ordered=True)) == 1
    producer.join(60)
    assert killed and output.read_text().splitlines() == expected
    said = capsys.readouterr().err
    assert "on Ray: 2 workers, 1 core each" in said
    assert said.count("--ray: a worker died, line") == 1
    assert "1 line failed, the first: line 18: expected a JSON object" in said


def test_a_machine_is_lost_and_no_other_has_room(machines, tiny, source, expected, tmp_path, capsys):
    output = tmp_path / "out.jsonl"

    def lose_one() -> None:
        worker = wait_for(lambda: stopped_while_it_decodes(psutil.Process()))
        machines.lose(machines.of(worker))

    loser = meanwhile(lose_one)
    assert job.generate([], str(source), str(output), False, on_workers(tiny, ordered=True)) == 1
    loser.join(60)
    assert output.read_text().splitlines() == expected
    assert len(machines.nodes) == 1 and "--ray: a worker died, line" in capsys.readouterr().err


def test_every_machine_is_lost(machines, tiny, source, tmp_path, capsys, monkeypatch):
    """Ray says of replacements that they died as well, or lets them wait: which, depends on what it notices first."""
    output = tmp_path / "out.jsonl"
    monkeypatch.setattr(on_ray, "ROOM_SECONDS", 1.0)

    def lose_all() -> None:
        wait_for(lambda: written(output) >= 4 and stopped_while_it_decodes(psutil.Process()))
        while machines.nodes:
            machines.lose(machines.nodes[0])

    loser = meanwhile(lose_all)
    with pytest.raises(ChildProcessError, match="--ray: no worker is left"):
        job.generate([], str(source), str(output), False, on_workers(tiny))
    loser.join(60)
    assert f"{finished(output)} of 40 prompts are finished and kept in {output}" in capsys.readouterr().err


def test_no_machine_is_left_to_start_on(machines, tiny, monkeypatch):
    monkeypatch.setattr(on_ray, "ROOM_SECONDS", 1.0)
    with Cluster(on_workers(tiny)) as cluster:
        assert cluster.describe() == "2 workers, 1 core each"
        while machines.nodes:
            machines.lose(machines.nodes[0])
        wait_for(lambda: not any(machine["CPU"] for machine in cluster._machines()))
        with pytest.raises(ChildProcessError, match="--ray: no worker is left, and no machine that has room for one"):
            list(cluster.decode(Blocks(iter([Prompt(0, 0, "a", False)]), 2)))


def test_workers_that_die_over_and_over(machines, tiny, source, tmp_path, monkeypatch, capsys):
    """As the kernel kills a process that takes more memory than there is."""
    died, starts, first = (tmp_path / name for name in ("died once", "starts", "first"))

    class OverABlock(Worker):
        def start(self, settings, path):
            with suppress(FileExistsError):
                died.mkdir()  # by one worker only
                os.kill(os.getpid(), signal.SIGKILL)
            return []

        def decode(self, block):
            if block[0].line == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return BlockResult([{"id": record.id, "text": ""} for record in block], None, 0)

    class TheLastOne(Worker):
        def start(self, settings, path):
            starts.mkdir(exist_ok=True)
            (starts / str(os.getpid())).touch()
            try:
                first.mkdir()
            except FileExistsError:
                os.kill(os.getpid(), signal.SIGKILL)
            return []

        def decode(self, block):
            while len(list(starts.iterdir())) < 4:
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGKILL)

    for kind, message, deaths in [
        (OverABlock, "--ray: 3 workers died over lines 1 to 4: The actor died unexpectedly", {1}),
        # 4 where the one that decodes is seen to be dead, and replaced, before the third that died as it started
        (TheLastOne, "--ray: no worker is left, [34] died in a row as they started: The actor died", {3, 4}),
    ]:
        monkeypatch.setattr(on_ray, "Worker", kind)
        with pytest.raises(ChildProcessError, match=message):
            job.generate([], str(source), str(tmp_path / f"{kind.__name__}.jsonl"), False, on_workers(tiny))
        assert capsys.readouterr().err.count("a worker died as it started: ") in deaths
        assert not ray.is_initialized()


def test_what_ray_or_a_worker_raises(machines, tiny, source, tmp_path, monkeypatch):
    gate = tmp_path / "open"

    class Gated(Worker):
        def start(self, settings, path):
            return []

        def decode(self, block):
            if block[0].content == "fail":
                raise LookupError("a mistake of ours")
            while not gate.exists():
                time.sleep(0.02)
            return BlockResult([{}] * len(block), None, 0)

    monkeypatch.setattr(on_ray, "Worker", Gated)
    prompts = [Prompt(number, number, "a", False) for number in range(12)]
    with Cluster(on_workers(tiny)) as cluster:
        decoding = cluster.decode(Blocks(iter(prompts), 2))
        given = cluster._hand_out

        def give_and_cancel(blocks: Blocks) -> bool:
            """The task that a worker has waiting is lost: no RayActorError, the worker lives."""
            there = given(blocks)
            if not gate.exists() and (waiting := [r for r, (m, b) in cluster.asked.items() if b in m.blocks[1:]]):
                ray.cancel(waiting[0])
                gate.touch()
            return there

        monkeypatch.setattr(cluster, "_hand_out", give_and_cancel)
        done = [record.line for block, _ in decoding for record in block]
        assert gate.exists() and sorted(done) == list(range(12))
        with pytest.raises(LookupError, match="a mistake of ours"):
            list(cluster.decode(Blocks(iter([Prompt(0, 0, "fail", False)]), 2)))


def command(tiny: Path, source: Path, output: Path) -> list[str]:
    arguments = [sys.executable, "-m", "advance_step", "generate", "--model", str(tiny), "--dtype", "float32"]
    arguments += ["--max-new-tokens", str(SAMPLING["max_new_tokens"]), "--batch-size", "1", "--input", str(source)]
    return [*arguments, "--output", str(output), "--ray", "--ray-cores", "1"]


def environment(address: str | None) -> dict[str, str]:
    """Of a command that joins a cluster, or starts a Ray of two workers."""
    kept = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    own = {"RAY_OVERRIDE_RESOURCES": json.dumps({"CPU": 2})}
    return kept | {"RAY_USAGE_STATS_ENABLED": "0"} | ({"RAY_ADDRESS": address} if address else own)


@dataclass
class Started:
    """A command in the middle of a job: one of its workers stands still. below: the processes of its own."""

    command: subprocess.Popen[str]
    output: Path
    still: psutil.Process
    workers: list[psutil.Process]
    below: list[psutil.Process]


@contextmanager
def begun(tiny: Path, source: Path, output: Path, address: str | None = None) -> Iterator[Started]:
    """The command, as soon as some lines are written, on a Ray of its own or at an address."""
    run = subprocess.Popen(
        command(tiny, source, output),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(address),
        start_new_session=True,
    )
    below: list[psutil.Process] = []
    try:
        process = psutil.Process(run.pid)
        wait_for(lambda: written(output) >= 4 or run.poll() is not None)
        assert run.poll() is None, run.communicate()[1]
        root = psutil.Process() if address else process
        still = wait_for(lambda: stopped_while_it_decodes(root))
        below = process.children(recursive=True)
        yield Started(run, output, still, workers(root), below)
    finally:
        if run.poll() is None:
            below += psutil.Process(run.pid).children(recursive=True)
            run.kill()
        for left in below:
            if left.is_running():
                left.kill()


def finished(output: Path) -> int:
    return sum("text" in json.loads(line) for line in output.read_text().splitlines())


def test_killed_and_resumed(machines, tiny, source, expected, tmp_path):
    """By kill -9; then on Ray, and in one process, since where a line was decoded makes no difference."""
    output, alone = tmp_path / "out.jsonl", tmp_path / "alone.jsonl"
    with begun(tiny, source, output) as job_of_two:
        job_of_two.command.kill()
        job_of_two.command.wait(60)
        job_of_two.still.resume()
        assert not psutil.wait_procs(job_of_two.workers, timeout=120)[1]  # they do not outlive the command
    assert 4 <= written(output) < COUNT
    kept = output.read_text()
    shutil.copy(output, alone)
    shutil.copy(f"{output}.run.json", f"{alone}.run.json")
    for path, options in ((output, on_workers(tiny)), (alone, settings(tiny))):
        assert job.generate([], str(source), str(path), True, options) == 1
        assert path.read_text().startswith(kept[: kept.rindex("\n") + 1])
        assert sorted(path.read_text().splitlines()) == sorted(expected)


def test_ctrl_c(tiny, source, tmp_path):
    """A terminal sends it to every process of the command. Its Ray ends with it."""
    output = tmp_path / "out.jsonl"
    with begun(tiny, source, output) as started:
        os.killpg(started.command.pid, signal.SIGINT)
        started.still.resume()
        said = started.command.communicate(timeout=120)[1]
        assert started.command.returncode == 130, said
        assert not psutil.wait_procs(started.below, timeout=120)[1]
    assert f"interrupted: {finished(output)} of 40 prompts are finished and kept in {output}" in said
    assert finished(output) >= 3


def test_sigterm_on_a_cluster_that_was_joined(machines, tiny, source, tmp_path):
    """The cluster goes on, the workers end."""
    output = tmp_path / "out.jsonl"
    with begun(tiny, source, output, machines.cluster.address) as started:
        started.command.terminate()
        started.still.resume()
        said = started.command.communicate(timeout=120)[1]
        assert started.command.returncode == 143, said
        assert started.workers and not psutil.wait_procs(started.workers, timeout=120)[1]
        wait_for(lambda: not workers(psutil.Process()))  # nor one that was only starting
    assert f"interrupted: {finished(output)} of 40 prompts are finished and kept in {output}" in said
    assert finished(output) >= 3


def test_sigterm_while_ray_starts(tiny, source, tmp_path):
    output = tmp_path / "out.jsonl"
    run = subprocess.Popen(command(tiny, source, output), env=environment(None), stderr=subprocess.PIPE, text=True)
    below: list[psutil.Process] = wait_for(lambda: psutil.Process(run.pid).children(recursive=True))
    run.terminate()
    said = run.communicate(timeout=120)[1]
    assert run.returncode == 143, said
    assert "interrupted: 0 of 40 prompts are finished" in said
    assert not psutil.wait_procs(below, timeout=120)[1] and not output.exists()


def test_a_relative_model_and_what_it_says(machines, tiny, tmp_path, monkeypatch, capsys):
    """The workers stand elsewhere; results have the model's name as it was given."""
    shutil.copytree(tiny, tmp_path / "here" / "model")
    (tmp_path / "here" / "model" / "generation_config.json").write_text(json.dumps({"top_k": 3, "do_sample": True}))
    monkeypatch.chdir(tmp_path / "here")
    body = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
    requests = [{"custom_id": str(n), "method": "POST", "url": "/v1/chat/completions", "body": body} for n in range(3)]
    Path("in.jsonl").write_text("\n".join(map(json.dumps, requests)))
    found = []
    for name, make in (("alone", settings), ("ray", on_workers)):
        assert job.generate([], "in.jsonl", f"{name}.jsonl", False, make(Path("model"), ordered=True)) == 0
        responses = [json.loads(line)["response"]["body"] for line in Path(f"{name}.jsonl").read_text().splitlines()]
        said = [line for line in capsys.readouterr().err.splitlines() if "generation_config" in line]
        found.append(([(body["model"], body["choices"]) for body in responses], said))
    assert found[0] == found[1]
    assert found[0][0][0][0] == "model" and len(found[0][1]) == 1 and "top_k=3" in found[0][1][0]


def test_what_does_not_go_with_it(machines, tiny, tmp_path, monkeypatch):
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
    with pytest.raises(ValueError, match="--ray-cores: expected at most the 1 of a machine, got 3"):
        job.generate([], source, output, False, settings(tiny, ray=True, ray_cores=3))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "ray", None)
        with pytest.raises(ValueError, match=r'--ray: ray is not installed: pip install "advance-step\[ray\]"'):
            job.generate([], source, output, False, on_workers(tiny))
    assert not Path(output).exists() and not ray.is_initialized()


def test_what_a_worker_refuses_is_said_as_ever(machines, tmp_path):
    from tiny_directory import save_tiny

    directory = save_tiny(tmp_path / "model", "llama")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(
        json.dumps(config | {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}})
    )
    (tmp_path / "in.txt").write_text("a\n")
    with pytest.raises(ValueError, match="dynamic RoPE follows the longest row of a batch"):
        job.generate([], str(tmp_path / "in.txt"), str(tmp_path / "out.jsonl"), False, on_workers(directory))
    assert not ray.is_initialized()


def test_blocks_of_lines(tiny):
    prompts = [Prompt(number, number, "a", False) for number in range(5)]
    come = Blocks(iter([*prompts[:3], None, None, *prompts[3:]]), 2)
    taken = [come.next(hurry) for hurry in (False, False, True, False, False, False)]
    assert [[prompt.line for prompt in block] if block else None for block in taken] == [
        *([0, 1], None, [2], [3, 4]),
        *(None, None),
    ]
    assert come.ended
    cluster = Cluster(settings(tiny))
    cluster.count = 2
    assert [cluster.lines_of_a_block(total) for total in (None, 1, 3, 10, 1000)] == [4, 1, 1, 2, 4]
    cluster.settings.batch_size = 8
    assert [cluster.lines_of_a_block(total) for total in (None, 10, 100, 10_000)] == [32, 5, 13, 32]
