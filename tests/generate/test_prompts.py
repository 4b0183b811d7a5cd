"""Batch files: what is read, what is refused with which words, what an interrupted job keeps."""

from __future__ import annotations

import io
import json

import pytest

from advance_step.decode.request import Request
from advance_step.generate.prompts import Prompt, encode, kept, read_prompts, to_request, write_result


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def test_text_is_a_prompt_a_line(tmp_path):
    path = write(tmp_path / "p.txt", "one\n\n  two  \r\nthr\u2028ee\n")
    assert read_prompts(path) == [Prompt(1, "one"), Prompt(3, "two"), Prompt(4, "thr\u2028ee")]


def test_jsonl_has_ids_or_line_numbers(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"prompt": "a\\nb", "id": "x"}\n\n{"prompt": "c", "more": 1}')
    assert read_prompts(path) == [Prompt("x", "a\nb"), Prompt(3, "c")]


@pytest.mark.parametrize(
    "text, message",
    [
        ('{"prompt": "a"}\n{"prompt": ', "p.jsonl:2: expected a JSON object, got '{\"prompt\": ' (Expecting value)"),
        ('{"text": "a"}', """p.jsonl:1: expected {"prompt": "some text"}, got '{"text": "a"}'"""),
        ('{"prompt": ""}', """p.jsonl:1: expected {"prompt": "some text"}, got '{"prompt": ""}'"""),
        ("[1]", """p.jsonl:1: expected {"prompt": "some text"}, got '[1]'"""),
        ('{"prompt": "a", "id": [2]}', "p.jsonl:1: expected an id that is an integer or a string, got [2]"),
        ('{"prompt": "a", "id": 2}\n{"prompt": "b"}', "p.jsonl: expected each id once, got 2 twice"),
        ("\n \n", "p.jsonl: expected at least one prompt, got none"),
    ],
)
def test_bad_jsonl_names_the_line(tmp_path, text, message):
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path / "p.jsonl", text))
    assert str(error.value) == f"{tmp_path}/{message}"


def test_input_that_is_no_text_or_not_there(tmp_path):
    (tmp_path / "p.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match=r"p\.txt: expected UTF-8 text, got"):
        read_prompts(tmp_path / "p.txt")
    with pytest.raises(FileNotFoundError, match=r"--input: expected a file, got .*none\.txt"):
        read_prompts(tmp_path / "none.txt")


def test_what_is_written_is_what_is_kept(tmp_path):
    stream = io.StringIO()
    prompt = Prompt("x", "day\u2028 \u00e9")
    write_result(stream, prompt, Request("x", [1], tokens=[3, 4], finish_reason="stop"), "t\u2028\n")
    line = {"id": "x", "prompt": prompt.text, "text": "t\u2028\n", "tokens": 2, "finish_reason": "stop"}
    assert json.loads(stream.getvalue()) == line
    path = write(tmp_path / "out.jsonl", stream.getvalue())
    assert kept(path) == {"x": prompt.text}


def test_a_line_that_was_cut_off_is_removed(tmp_path):
    whole = '{"id": 1, "prompt": "a"}\n'
    path = write(tmp_path / "out.jsonl", whole + '{"id": 2, "pro')
    assert kept(path) == {1: "a"}
    assert path.read_text() == whole
    assert kept(tmp_path / "none.jsonl") == {}


def test_a_file_of_something_else_is_not_resumed(tmp_path):
    path = write(tmp_path / "out.jsonl", '{"id": 1, "prompt": "a"}\n{"name": 2}\n')
    with pytest.raises(ValueError, match=r"out.jsonl:2: expected a line of an earlier output, got '\{\"name\": 2\}'"):
        kept(path)


def test_chat_template_and_raw(real):
    _, tokenizer = real
    assert tokenizer.decode(encode(tokenizer, "Hi", raw=True)) == "Hi"
    templated = tokenizer.decode(encode(tokenizer, "Hi", raw=False))
    assert templated.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert templated.count("<|im_start|>") == 3  # system, user, assistant: no second start token


def test_requests_end_with_the_context(real):
    _, tokenizer = real
    request = to_request(tokenizer, Prompt(1, "one two three"), True, 100, context=8)
    assert len(request.prompt_ids) + request.max_new_tokens == 8
    with pytest.raises(ValueError, match=r"prompt 'p': expected fewer than 3 tokens \(the context\), got 3"):
        to_request(tokenizer, Prompt("p", "one two three"), True, 100, context=3)
