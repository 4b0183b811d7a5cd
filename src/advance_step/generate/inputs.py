"""Where prompts come from: a file, compressed or not, a pipe, or the command line. Read as they are needed."""

import gzip
import hashlib
import io
import json
import os
import stat
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import BinaryIO

from advance_step.generate.json_lines import parse_line
from advance_step.generate.records import BadLine, LineError, Prompt, digest_of_id, excerpt

STDIN = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")

Line = tuple[int, bytes]  # its number, from 1, and its bytes without the newline


@dataclass
class Input:
    """Prompts, each read when it is asked for.

    name: of the file, for messages.
    records: prompts and bad lines, in order; to be gone through once.
    fingerprint: what tells this input from another one: of a file its bytes, of a stream its first line.
    total: how many lines there are, where that is known.
    is_stream: whether the next record may be long in coming: a pipe, a FIFO, a terminal.
    """

    name: str
    records: Iterator[Prompt | BadLine]
    fingerprint: str
    total: int | None
    is_stream: bool = False


def from_arguments(texts: Sequence[str], raw: bool) -> Input:
    """Prompts that were given on the command line. ValueError for one that is no text."""
    prompts = [Prompt(number, number, _argument(text, number), not raw) for number, text in enumerate(texts, 1)]
    fingerprint = _sha256(json.dumps([prompt.content for prompt in prompts]).encode())
    return Input("the command line", iter(prompts), fingerprint, len(prompts))


def open_input(path: str, raw: bool) -> Input:
    """The prompts of a file, a FIFO, or standard input ("-").

    What is compressed by gzip is read as it is; a byte-order mark is skipped. Lines are JSON where the name says so
    (.jsonl, .ndjson, .json) or where the first of them is an object and the name says nothing; otherwise each is a
    prompt. Blank ones are skipped.

    Raises FileNotFoundError, another OSError, or ValueError for what is no such file, before anything is decoded; a
    line that is no prompt becomes a BadLine. Compressed data that ends early or is broken is a ValueError, where it is.
    """
    if path in STDIN:
        stream, regular = open(sys.stdin.fileno(), "rb", closefd=False), False  # noqa: SIM115  (read as lines are needed)
    else:
        mode = os.stat(path).st_mode if os.path.exists(path) else 0
        if not mode or stat.S_ISDIR(mode):
            raise FileNotFoundError(f"--input: expected a file, got {path}{', a directory' if mode else ''}")
        stream, regular = open(path, "rb"), stat.S_ISREG(mode)  # noqa: SIM115
    fingerprint, total = _read_through(stream) if regular else ("", None)
    compressed = stream.peek(2)[:2] == GZIP
    if compressed:
        stream, total = io.BufferedReader(gzip.GzipFile(fileobj=stream)), None
    lines = _lines(stream, path)
    first = next(lines, None)
    if first is None:
        raise ValueError(f"{path}: expected at least one prompt, got none")
    if first[1].startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in first[1]:
        raise ValueError(f"{path}: expected UTF-8 text, got UTF-16 or no text")
    as_json = _is_json(path, first[1])
    if as_json and first[1].lstrip().startswith(b"["):
        raise ValueError(f"{path}: expected a JSON object a line, got an array (jq -c '.[]' makes lines of it)")
    records = _records(chain([first], lines), as_json, raw)
    return Input(path, records, fingerprint or _sha256(first[1]), total, not regular)


def check_not_the_same(input: str, output: str) -> None:
    """ValueError for an output that is the input, by whatever name."""
    if os.path.exists(output) and output not in ("-", "/dev/stdout"):
        found = os.fstat(sys.stdin.fileno()) if input in STDIN else os.stat(input) if os.path.exists(input) else None
        if found and stat.S_ISREG(found.st_mode) and os.path.samestat(found, os.stat(output)):
            raise ValueError(f"--output: expected another file than --input, got {output}")


def _lines(stream: BinaryIO, name: str) -> Iterator[Line]:
    """The lines that are not blank."""
    number = 0
    with stream:
        while True:
            try:
                line = stream.readline()
            except (EOFError, gzip.BadGzipFile, zlib.error) as error:
                raise ValueError(f"{name}: expected gzip data after line {number}, got {error}") from error
            if not line:
                return
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                yield number, line.removesuffix(b"\n")


def _records(lines: Iterator[Line], as_json: bool, raw: bool) -> Iterator[Prompt | BadLine]:
    """What each line is; a line whose id an earlier one has is a bad one."""
    seen: set[int] = set()
    batch = False  # a line that cannot be read at all is taken for one of the format of those before it
    for number, line in lines:
        try:
            text = line.decode()
            if as_json:
                prompt = parse_line(text, number, raw)
            elif text.strip():
                prompt = Prompt(number, number, text.strip(), not raw)
            else:  # of blanks that Unicode has beside ASCII's
                continue
            batch = prompt.endpoint is not None
            key = digest_of_id(prompt.id)
            if key in seen:
                raise LineError(f"id: expected each once, got {excerpt(prompt.id)} again", prompt.id, batch)
            seen.add(key)
        except UnicodeDecodeError as error:
            yield BadLine(number, f"expected UTF-8 text, got {error}", None, batch)
        except LineError as error:
            yield BadLine(number, str(error), error.id, batch if error.batch is None else error.batch)
        else:
            yield prompt


def _is_json(path: str, first: bytes) -> bool:
    suffix = Path(path.lower().removesuffix(".gz")).suffix
    if suffix in JSON_SUFFIXES or suffix == ".txt":
        return suffix != ".txt"
    try:
        return isinstance(json.loads(first), dict)
    except (ValueError, RecursionError):
        return False


def _read_through(stream: BinaryIO) -> tuple[str, int]:
    """The SHA-256 of a file, and how many lines it has; it then stands at its beginning again."""
    digest, total, last = hashlib.sha256(), 0, b"\n"
    while block := stream.read(1 << 20):
        digest.update(block)
        total += block.count(b"\n")
        last = block[-1:]
    stream.seek(0)
    return digest.hexdigest(), total + (last != b"\n")


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _argument(text: str, number: int) -> str:
    """An argument as text, where the locale did not know its bytes for UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:  # bytes that were escaped when the arguments were decoded
        try:
            text = os.fsencode(text).decode()
        except UnicodeError as error:
            raise ValueError(f"prompt {number}: expected UTF-8 text, got {text!r}") from error
    if not text:
        raise ValueError(f"prompt {number}: expected a text that is not empty, got ''")
    return text
