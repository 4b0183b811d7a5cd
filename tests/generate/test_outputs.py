"""Where results go: whose file it is, what an earlier run has left, and what cannot be written."""

from __future__ import annotations

import errno
import json
import os
import resource
import threading

import pytest

from advance_step.generate.outputs import open_output
from advance_step.generate.records import digest_of_id
from advance_step.generate.run_header import RunHeader

HEADER = RunHeader("in.jsonl", "1234", "tiny", "5678", {"dtype": "float32", "raw": False, "max_new_tokens": 8})
LINES = [{"id": 1, "text": "a\u2028\u00e9"}, {"id": "b", "text": "b"}, {"id": None, "line": 3, "error": "why"}]


def write(path, lines=LINES) -> None:
    with open_output(str(path), HEADER, resume=False) as output:
        for line in lines:
            output.write(line)


def test_results_are_whole_lines_beside_the_header_of_their_run(tmp_path):
    write(tmp_path / "new" / "out.jsonl")
    assert [json.loads(line) for line in (tmp_path / "new" / "out.jsonl").read_text().split("\n")[:-1]] == LINES
    assert RunHeader.read(tmp_path / "new" / "out.jsonl.run.json") == HEADER
    assert len(os.listdir(tmp_path / "new")) == 2


def test_a_run_goes_on_wherever_the_last_one_was_cut_off(tmp_path):
    write(path := tmp_path / "out.jsonl")
    whole = path.read_bytes()
    ends = [n + 1 for n, byte in enumerate(whole) if byte == 10]
    for length in range(1, len(whole)):
        path.write_bytes(whole[:length])
        before = path.stat().st_ino
        with open_output(str(path), HEADER, resume=True) as output:
            kept = max((end for end in ends if end <= length), default=0)
            assert output.size == kept == path.stat().st_size
            ids = [entry["id"] for entry, end in zip(LINES[:2], ends, strict=False) if end <= length]
            assert output.done == {digest_of_id(id_) for id_ in ids}
            output.write({"id": 4, "text": "c"})
        assert path.read_bytes() == whole[:kept] + b'{"id": 4, "text": "c"}\n'
        assert path.stat().st_ino == before  # in place: never a moment without what was finished
    path.write_bytes(whole)
    with open_output(str(path), HEADER, resume=True) as output:
        assert output.failed_lines == {3}


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("text", ["notes\nlast line, unfinished", '{"id": 1, "prompt": "a", "text": "b"}\n{"id'])
def test_a_file_that_is_no_output_of_this_command_is_left_alone(tmp_path, text, resume):
    path = tmp_path / "notes.txt"
    path.write_text(text)
    message = (
        rf"--resume: expected an output of this command, got {path} without notes.txt.run.json"
        if resume
        else f"--output: expected a new file, got {path}, which exists$"
    )
    with pytest.raises(ValueError, match=message), open_output(str(path), HEADER, resume):
        pass
    assert path.read_text() == text and os.listdir(tmp_path) == ["notes.txt"]


def test_an_output_that_was_edited_is_left_alone(tmp_path):
    write(path := tmp_path / "out.jsonl")
    text = '{"id": 1, "text": "a"}\n{"name": 2}\n{"id'
    path.write_text(text)
    with (
        pytest.raises(ValueError, match=r"out.jsonl:2: expected a line of an earlier output, got '\{\"name\": 2\}"),
        open_output(str(path), HEADER, resume=True),
    ):
        pass
    assert path.read_text() == text


def test_an_earlier_output_is_not_overwritten(tmp_path):
    write(path := tmp_path / "out.jsonl")
    with pytest.raises(ValueError, match=r"which exists \(--resume goes on with it\)$"):
        write(path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"input": "b.txt", "input_fingerprint": "9"}, "has the results of another --input (in.jsonl), got b.txt"),
        ({"model": "big", "model_fingerprint": "9"}, "was made with another --model (tiny), got big"),
        (
            {"settings": {"dtype": "bfloat16", "raw": False, "max_new_tokens": 8}},
            "was made with --dtype float32, got --dtype bfloat16",
        ),
        (
            {"settings": {"dtype": "float32", "raw": True, "max_new_tokens": 9, "top_p": 0.5}},
            "was made with --max-new-tokens 8 --raw False no --top-p, got --max-new-tokens 9 --raw True --top-p 0.5",
        ),
    ],
)
def test_another_run_does_not_go_on_with_it(tmp_path, change, message):
    write(path := tmp_path / "out.jsonl")
    before = path.read_bytes()
    other = RunHeader(**vars(HEADER) | change)
    with pytest.raises(ValueError) as error, open_output(str(path), other, resume=True):
        pass
    assert str(error.value) == f"--resume: {path} {message}"
    assert path.read_bytes() == before and RunHeader.read(tmp_path / "out.jsonl.run.json") == HEADER


def test_the_same_input_under_another_name_is_the_same(tmp_path):
    write(path := tmp_path / "out.jsonl")
    with open_output(str(path), RunHeader(**vars(HEADER) | {"input": "moved.jsonl"}), resume=True) as output:
        assert len(output.done) == 2


def test_one_run_at_a_time(tmp_path):
    path = tmp_path / "out.jsonl"
    with open_output(str(path), HEADER, resume=False):
        for resume in (False, True):
            with (
                pytest.raises(ValueError, match=f"--output: expected a file that no other run writes, got {path}"),
                open_output(str(path), HEADER, resume),
            ):
                pass
    assert os.listdir(tmp_path) == []


def test_what_nothing_was_written_to_is_not_left_behind(tmp_path):
    with pytest.raises(KeyError), open_output(str(tmp_path / "out.jsonl"), HEADER, resume=False):
        raise KeyError
    assert os.listdir(tmp_path) == []
    write(tmp_path / "out.jsonl")  # and is no hindrance


def test_a_header_that_is_something_else_is_left_alone(tmp_path):
    beside = tmp_path / "out.jsonl.run.json"
    beside.write_text('{"mine": 1}')
    with pytest.raises(ValueError, match=r"out\.jsonl\.run\.json: expected what advance-step writes beside its output"):
        write(tmp_path / "out.jsonl")
    assert beside.read_text() == '{"mine": 1}' and os.listdir(tmp_path) == [beside.name]


def test_what_is_no_output_is_refused(tmp_path):
    with pytest.raises(ValueError, match=f"--output: expected a file, got {tmp_path}, a directory"):
        write(tmp_path)
    with pytest.raises(ValueError, match=r"--output: expected a name without \.gz"):
        write(tmp_path / "out.jsonl.gz")
    for name in ("-", "/dev/null"):
        with (
            pytest.raises(ValueError, match=f"--resume: expected an --output that is a file, got {name}"),
            open_output(name, HEADER, resume=True),
        ):
            pass
    assert os.listdir(tmp_path) == []


def test_a_fifo_and_stdout_are_written_to(tmp_path, capfd):
    os.mkfifo(fifo := tmp_path / "fifo")
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(fifo.read_bytes()))
    reader.start()
    write(fifo)
    reader.join()
    assert [json.loads(line) for line in read[0].splitlines()] == LINES
    for name in ("-", "/dev/stdout"):
        write(name)
        assert [json.loads(line) for line in capfd.readouterr().out.split("\n")[:-1]] == LINES
    assert os.listdir(tmp_path) == ["fifo"]


def test_a_device_without_room_says_so():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write("/dev/full")


def test_a_pipe_that_nobody_reads(tmp_path):
    read, written = os.pipe()
    os.close(read)
    with pytest.raises(BrokenPipeError):
        write(f"/dev/fd/{written}")
    os.close(written)


def test_a_pipe_that_does_not_wait_is_waited_for():
    read, written = os.pipe()
    os.set_blocking(written, False)
    data: list[bytes] = []

    def read_all() -> None:
        with open(read, "rb") as stream:
            data.append(stream.read())

    reader = threading.Thread(target=read_all)
    reader.start()
    with open_output(f"/dev/fd/{written}", HEADER, resume=False) as output:
        os.close(written)
        os.set_blocking(output.descriptor, False)
        for _ in range(4):
            output.write({"id": 1, "text": "a" * 100_000})  # more than a pipe holds
    reader.join()
    assert [len(json.loads(line)["text"]) for line in data[0].splitlines()] == [100_000] * 4


@pytest.mark.parametrize("room", [200, 203, 218])
def test_a_full_disk_leaves_whole_lines(tmp_path, room):
    """The limit of a file's size stands for the disk: it also takes a part of the line that does not fit."""
    path, line = tmp_path / "out.jsonl", {"id": 1, "text": "a"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open_output(str(path), HEADER, resume=False) as output:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
        try:
            with pytest.raises(OSError, match=f"File too large: '{path}'") as error:
                while True:
                    output.write(line)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    size = len(json.dumps(line)) + 1
    assert error.value.errno == errno.EFBIG
    assert path.read_text() == (json.dumps(line) + "\n") * (room // size)
    with open_output(str(path), HEADER, resume=True) as output:
        output.write(line)
    assert path.stat().st_size == (room // size + 1) * size
