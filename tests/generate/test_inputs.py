"""What is read: formats by name and by content, streams, and what a bad line becomes."""

from __future__ import annotations

import gzip
import json
import os
import threading
import tracemalloc

import pytest

from advance_step.generate.inputs import check_not_the_same, from_arguments, open_input
from advance_step.generate.records import BadLine, Prompt

BOM = b"\xef\xbb\xbf"
OBJECTS = b'{"prompt": "one"}\n\n{"prompt": "two", "id": "b"}'
TWO_PROMPTS = [(1, 1, "one"), (3, "b", "two")]


def read(path, data: bytes, raw: bool = False) -> list[Prompt | BadLine]:
    path.write_bytes(data)
    return list(open_input(str(path), raw).records)


def shown(records) -> list[tuple]:
    return [(record.line, record.id, record.content) for record in records]


@pytest.mark.parametrize("name", ["p.jsonl", "p.ndjson", "p.json", "p.JSONL", "p.jsonl.gz", "p.JSON.GZ", "p", "p.in"])
@pytest.mark.parametrize("start", [b"", BOM])
def test_json_lines_by_name_or_content(tmp_path, name, start):
    data = gzip.compress(start + OBJECTS) if name.lower().endswith(".gz") else start + OBJECTS
    assert shown(read(tmp_path / name, data)) == TWO_PROMPTS


@pytest.mark.parametrize("name", ["p.txt", "p.TXT", "p.txt.gz"])
def test_text_is_a_prompt_a_line(tmp_path, name):
    data = BOM + '{"prompt": "x"}\n\n  two  \r\nthr\u2028ee\n\u3000\n'.encode()
    data = gzip.compress(data) if name.endswith(".gz") else data
    assert shown(read(tmp_path / name, data)) == [(1, 1, '{"prompt": "x"}'), (3, 3, "two"), (4, 4, "thr\u2028ee")]


def test_text_of_an_unknown_name(tmp_path):
    assert shown(read(tmp_path / "prompts", b"[one]\ntwo")) == [(1, 1, "[one]"), (2, 2, "two")]


def test_gzip_is_known_by_its_content(tmp_path):
    assert shown(read(tmp_path / "p.jsonl", gzip.compress(OBJECTS))) == TWO_PROMPTS


def test_a_fifo_is_read_as_it_is_written(tmp_path):
    os.mkfifo(fifo := tmp_path / "fifo")
    read_one = threading.Event()

    def writer() -> None:
        with open(fifo, "wb", buffering=0) as stream:
            stream.write(b'{"prompt": "one"}\n')
            assert read_one.wait(timeout=60)  # a reader that asked for all of it first would wait for ever
            stream.write(b'{"prompt": "two"}\n')

    thread = threading.Thread(target=writer)
    thread.start()
    source = open_input(str(fifo), False)
    assert next(source.records).content == "one"
    read_one.set()
    assert [record.content for record in source.records] == ["two"]
    thread.join()
    assert source.total is None


@pytest.mark.parametrize("name", ["-", "/dev/stdin"])
def test_stdin(tmp_path, monkeypatch, name):
    (tmp_path / "in").write_bytes(OBJECTS)
    with open(tmp_path / "in") as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert shown(open_input(name, False).records) == TWO_PROMPTS


@pytest.mark.parametrize(
    "line, reason",
    [
        (b'{"prompt": ', "expected a JSON object, got '{\"prompt\": ' (Expecting value)"),
        (b"[1]", "expected a JSON object, got '[1]'"),
        (b'{"prompt": "\\ud83d"}', "expected text that is Unicode, got half a character: "),
        (b'{"prompt": "a", "x": ["\\ud83d"]}', "expected text that is Unicode, got half a character: "),
        (b'{"prompt": "a", "id": "\\ud83d"}', "expected text that is Unicode, got half a character: "),
        (b'{"prompt": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "expected JSON of at most 100 levels, got more: "),
        (b'{"prompt": "a", "x": ' + b"[" * 200 + b"]" * 200 + b"}", "expected JSON of at most 100 levels, got more: "),
        (b'{"prompt": "a", "id": ' + b"9" * 5_000 + b"}", "expected a JSON object, got "),
        (b'{"prompt": "a", "x": NaN}', "(NaN is not JSON)"),
        (b'{"prompt": "a", "x": 1e999}', "(1e999 is too large)"),
        (b'{"prompt": "a", "prompt": "b"}', "('prompt' is there twice)"),
        (b'{"prompt": "\xff"}', "expected UTF-8 text, got 'utf-8' codec can't decode byte 0xff"),
        (b'{"prompt": "a", "id": "first"}', "id: expected each once, got 'first' again"),
        (b'{"prompt": "a", "id": 1}', "id: expected each once, got 1 again"),
    ],
)
def test_a_bad_line_is_a_record_and_the_rest_is_read(tmp_path, line, reason):
    first = b'{"prompt": "a"}\n{"prompt": "a", "id": "first"}\n'
    *before, bad, after = read(tmp_path / "p.jsonl", first + line + b'\n{"prompt": "last"}')
    assert [record.content for record in (*before, after)] == ["a", "a", "last"]
    assert isinstance(bad, BadLine) and bad.line == 3 and reason in bad.reason
    str(bad).encode()  # what is written of it can be


def test_an_id_may_be_used_after_a_bad_line_with_it(tmp_path):
    bad, good = read(tmp_path / "p.jsonl", b'{"id": 7}\n{"id": 7, "prompt": "a"}')
    assert (bad.id, good.id, good.content) == (7, 7, "a")


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("p.jsonl", b"\n \n", "expected at least one prompt, got none"),
        ("p.txt", "a".encode("utf-16"), "expected UTF-8 text, got UTF-16 or no text"),
        ("p.txt", b"\x7fELF\0", "expected UTF-8 text, got UTF-16 or no text"),
        ("p.json", b'[{"prompt": "a"}]', "expected a JSON object a line, got an array (jq -c '.[]' makes lines of it)"),
    ],
)
def test_what_is_no_input_is_refused_at_once(tmp_path, name, data, message):
    with pytest.raises(ValueError) as error:
        read(tmp_path / name, data)
    assert str(error.value) == f"{tmp_path / name}: {message}"


def test_what_is_no_file_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--input: expected a file, got .*/none$"):
        open_input(str(tmp_path / "none"), False)
    with pytest.raises(FileNotFoundError, match=r"--input: expected a file, got .*, a directory$"):
        open_input(str(tmp_path), False)


def test_compressed_data_that_ends_early_is_an_error_where_it_does(tmp_path):
    data = gzip.compress(b"".join(b'{"prompt": "%d"}\n' % n for n in range(20_000)))
    (tmp_path / "p.jsonl.gz").write_bytes(data[: len(data) // 2])
    records = open_input(str(tmp_path / "p.jsonl.gz"), False).records
    with pytest.raises(ValueError, match=r"p\.jsonl\.gz: expected gzip data after line \d+, got Compressed file ended"):
        for count, _ in enumerate(records, 1):  # noqa: B007
            pass
    assert count > 1000


def test_fingerprints_tell_inputs_apart(tmp_path):
    first, second = tmp_path / "1.txt", tmp_path / "2.txt"
    first.write_text("a\nb\n")
    second.write_text("a\nc\n")
    fingerprints = [open_input(str(path), False).fingerprint for path in (first, second, first)]
    assert fingerprints[0] == fingerprints[2] != fingerprints[1]
    assert open_input(str(first), False).total == 2
    assert from_arguments(["a"], False).fingerprint != from_arguments(["b"], False).fingerprint


def test_arguments_that_the_locale_could_not_decode():
    escaped = "caf\u00e9".encode().decode("ascii", "surrogateescape")
    assert shown(from_arguments(["x", escaped], False).records) == [(1, 1, "x"), (2, 2, "caf\u00e9")]
    with pytest.raises(ValueError, match="prompt 1: expected UTF-8 text, got"):
        from_arguments([b"\xff".decode("ascii", "surrogateescape")], False)


def test_the_input_is_not_the_output(tmp_path):
    (tmp_path / "a").write_text("x")
    (tmp_path / "soft").symlink_to(tmp_path / "a")
    (tmp_path / "hard").hardlink_to(tmp_path / "a")
    for name in ("a", "soft", "hard"):
        with pytest.raises(ValueError, match="--output: expected another file than --input, got .*/" + name):
            check_not_the_same(str(tmp_path / "a"), str(tmp_path / name))
    check_not_the_same(str(tmp_path / "a"), str(tmp_path / "b"))
    check_not_the_same("/dev/null", "/dev/null")


def test_memory_does_not_grow_with_the_lines(tmp_path):
    """But for the ids, as 64 bits each."""
    path = tmp_path / "p.jsonl"
    with open(path, "w") as stream:
        for number in range(10_000):
            stream.write(json.dumps({"id": f"line-{number:06}", "prompt": "word " * 1_000}) + "\n")  # 50 MB
    source = open_input(str(path), False)
    tracemalloc.start()
    count = sum(1 for _ in source.records)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == source.total == 10_000
    assert peak < 5e6
