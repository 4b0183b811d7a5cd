"""Prompts in, texts out: the files of a batch job."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from advance_step.decode import Request, SamplingParams


@dataclass
class Prompt:
    """One line of the input."""

    id: int | str
    text: str


def read_prompts(path: Path) -> list[Prompt]:
    """The prompts of a file: .jsonl with {"prompt": ..., "id": ...} a line (id may be left out), else one a line.

    Blank lines are skipped; a prompt without an id has its line number. Raises ValueError with the line number.
    """
    if not path.is_file():
        raise FileNotFoundError(f"--input: expected a file, got {path}")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: expected UTF-8 text, got {error}") from error
    read = _from_json if path.suffix == ".jsonl" else _from_text
    prompts = [read(line, number, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if not prompts:
        raise ValueError(f"{path}: expected at least one prompt, got none")
    seen: set[int | str] = set()
    for prompt in prompts:
        if prompt.id in seen:
            raise ValueError(f"{path}: expected each id once, got {prompt.id!r} twice")
        seen.add(prompt.id)
    return prompts


def _from_text(line: str, number: int, where: str) -> Prompt:
    return Prompt(number, line.strip())


def _from_json(line: str, number: int, where: str) -> Prompt:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: expected a JSON object, got {line[:40]!r} ({error.msg})") from error
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str) or not entry["prompt"]:
        raise ValueError(f'{where}: expected {{"prompt": "some text"}}, got {line[:60]!r}')
    id_ = entry.get("id", number)
    if isinstance(id_, bool) or not isinstance(id_, (int, str)):
        raise ValueError(f"{where}: expected an id that is an integer or a string, got {id_!r}")
    return Prompt(id_, entry["prompt"])


def encode(tokenizer: Any, text: str, raw: bool) -> list[int]:
    """Token ids of a prompt: as it stands if `raw`, otherwise as the user's turn in the model's chat template."""
    if raw:
        return list(tokenizer(text).input_ids)
    if not tokenizer.chat_template:
        raise ValueError("the model has no chat template: use --raw")
    turn = [{"role": "user", "content": text}]
    templated = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(templated, add_special_tokens=False).input_ids)


def to_request(tokenizer: Any, prompt: Prompt, raw: bool, max_new_tokens: int, context: int) -> Request:
    """The prompt as a request; new tokens end with the model's context. ValueError if the prompt alone fills it."""
    ids = encode(tokenizer, prompt.text, raw)
    if not ids:
        raise ValueError(f"prompt {prompt.id!r}: expected at least one token, got none from {prompt.text!r}")
    if len(ids) >= context:
        raise ValueError(f"prompt {prompt.id!r}: expected fewer than {context} tokens (the context), got {len(ids)}")
    return Request(prompt.id, ids, SamplingParams(max_new_tokens=min(max_new_tokens, context - len(ids))))


def kept(path: Path) -> dict[int | str, str]:
    """The prompts by id that an output file has finished; a last line that was cut off is removed from the file."""
    if not path.exists():
        return {}
    whole, newline, torn = path.read_bytes().rpartition(b"\n")
    if torn:
        path.write_bytes(whole + newline)
    finished: dict[int | str, str] = {}
    for number, line in enumerate(whole.decode().split("\n"), 1):
        if not line:
            continue
        try:
            entry = json.loads(line)
            finished[entry["id"]] = entry["prompt"]
        except (json.JSONDecodeError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: expected a line of an earlier output, got {line[:40]!r}") from error
    return finished


def write_result(stream: TextIO, prompt: Prompt, request: Request, text: str) -> None:
    """A finished prompt as one line, on disk when this returns to the loop."""
    entry = {
        "id": prompt.id,
        "prompt": prompt.text,
        "text": text,
        "tokens": len(request.tokens),
        "finish_reason": request.finish_reason,
    }
    stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
    stream.flush()
