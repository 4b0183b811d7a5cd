"""An output on a disk that is full: a real one, of two megabytes, in a mount namespace of its own."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest

NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount"]

# Within the namespace: the job on a tmpfs of 2 MB, what it leaves, and the job again when there is room.
SCRIPT = """
set -u
mount -t tmpfs -o size=2m none "$1"
disk=$1 python=$2 model=$3 input=$4 kept=$5
run() {
    "$python" -m advance_step generate --model "$model" --dtype float32 --input "$input" --output "$disk/out.jsonl" \\
        --max-new-tokens 4 "$@"
    echo "exit code $?" >&2
}
run
cp "$disk/out.jsonl" "$kept.full"
mount -o remount,size=20m none "$disk"
run --resume
cp "$disk/out.jsonl" "$kept.whole"
"""


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="this system lets nobody make a mount namespace",
)
def test_two_megabytes(tiny, tmp_path):
    (disk := tmp_path / "disk").mkdir()
    source, kept = tmp_path / "in.jsonl", tmp_path / "kept"
    with source.open("w") as stream:
        for number in range(30):
            stream.write(json.dumps({"id": number, "prompt": "a", "carried": "x" * 100_000}) + "\n")
    command = ["bash", "-c", SCRIPT, "bash"]
    run = subprocess.run(
        [*NAMESPACE, *command, disk, sys.executable, tiny, source, kept], capture_output=True, text=True
    )
    said = run.stderr.splitlines()
    assert said.count("exit code 1") == 1 and said[-1] == "exit code 0", run.stderr
    finished = (tmp_path / "kept.full").read_text()
    assert finished.endswith("\n")
    whole = [json.loads(line)["id"] for line in finished.splitlines()]
    assert 5 < len(whole) < 21
    assert f"{len(whole)} of 30 prompts are finished and kept in {disk}/out.jsonl (--resume goes on from there)" in said
    assert any("No space left on device" in line and "out.jsonl" in line for line in said)
    results = [json.loads(line) for line in (tmp_path / "kept.whole").read_text().splitlines()]
    assert sorted(result["id"] for result in results) == list(range(30))
    assert all(len(result["carried"]) == 100_000 for result in results)
