"""The two formats of a line of JSON, and the fields that say how it is sampled."""

from __future__ import annotations

import json

import pytest

from advance_step.generate.json_lines import parse_line
from advance_step.generate.records import LineError, Prompt

CHAT = {
    "custom_id": "request-1",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {
        "model": "meta-llama/Meta-Llama-3-8B-Instruct",
        "messages": [
            {"role": "system", "content": "You are a helpful assistant."},
            {"role": "user", "content": "Hello world!"},
        ],
        "max_completion_tokens": 1000,
    },
}  # the first line of the example of vLLM's run-batch
TEXT = {"custom_id": "t", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once"}}


def parse(entry: dict, raw: bool = False) -> Prompt:
    return parse_line(json.dumps(entry), 4, raw)


def body(entry: dict, **fields: object) -> dict:
    return entry | {"body": entry["body"] | fields}


def test_our_own_line():
    prompt = parse({"prompt": "a\nb", "topic": {"x": [1]}, "temperature": 0.5, "max_tokens": 3, "seed": None})
    assert prompt == Prompt(4, 4, "a\nb", True, {"temperature": 0.5, "max_new_tokens": 3}, False, {"topic": {"x": [1]}})
    assert parse({"prompt": "a", "id": "x"}, raw=True) == Prompt(4, "x", "a", False)
    assert parse({"prompt": [5, 6]}).content == [5, 6]


def test_messages():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": parts, "name": "n"}]
    expected = [{"role": "system", "content": "s"}, {"role": "user", "content": "a\nb", "name": "n"}]
    assert parse({"messages": messages}).content == expected


def test_lines_of_the_batch_format():
    prompt = parse(CHAT)
    assert prompt.id == "request-1" and prompt.endpoint == "chat/completions"
    assert prompt.content == CHAT["body"]["messages"]
    assert prompt.sampling == {"max_new_tokens": 1000} and prompt.fields == {}
    prompt = parse(body(TEXT, temperature=1, top_p=0.5, seed=3, stop=["."], n=2, logprobs=1, frequency_penalty=0.1))
    assert (prompt.content, prompt.templated, prompt.endpoint) == ("Once", False, "completions")
    sampling = {"temperature": 1, "top_p": 0.5, "seed": 3, "stop": ["."], "n": 2, "logprobs": 1}
    assert prompt.sampling == sampling | {"frequency_penalty": 0.1}


@pytest.mark.parametrize(
    "given, logprobs",
    [
        ({"logprobs": True}, 0),
        ({"logprobs": True, "top_logprobs": 5}, 5),
        ({"logprobs": False}, None),
        ({"logprobs": None, "top_logprobs": None}, None),
    ],
)
def test_log_probabilities_of_the_chat_api(given, logprobs):
    assert parse(body(CHAT, **given)).sampling.get("logprobs") == logprobs


def test_fields_that_ask_for_nothing_are_fine():
    neutral = {"stream": False, "tools": [], "response_format": {"type": "text"}, "logit_bias": None, "top_k": -1}
    assert parse(body(CHAT, **neutral, user="me")).sampling == {"max_new_tokens": 1000, "top_k": 0}


@pytest.mark.parametrize(
    "entry, reason, id_",
    [
        ({}, "expected prompt or messages, got '{}'", 4),
        ({"text": "a"}, 'expected prompt or messages, got \'{"text": "a"}\'', 4),
        ({"prompt": "a", "messages": []}, "expected prompt or messages, got both", 4),
        ({"prompt": "", "id": "x"}, "prompt: expected a text that is not empty, or token ids, got ''", "x"),
        ({"prompt": ["a", "b"]}, "prompt: expected a text that is not empty, or token ids, got ", 4),
        ({"prompt": "a", "id": [2]}, "id: expected an integer or a string, got [2]", None),
        ({"prompt": "a", "id": True}, "id: expected an integer or a string, got True", None),
        ({"prompt": "a", "text": "b"}, "text: expected no field of this name, which the result has, got one", 4),
        ({"prompt": "a", "best_of": 3}, "best_of: this field is not served, got 3", 4),
        (
            {"prompt": "a", "max_tokens": 3, "max_new_tokens": 4},
            "max_tokens: expected max_new_tokens=4, as the line has it too, got 3",
            4,
        ),
        ({"messages": []}, 'messages: expected [{"role": ..., "content": ...}, ...], got ', 4),
        ({"messages": [{"content": "a"}]}, 'messages: expected {"role": ..., "content": ...}, got ', 4),
        ({"messages": [{"role": "user"}]}, "messages: expected content that is a text, got None", 4),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages: expected content that is a text, got ",
            4,
        ),
        (CHAT | {"custom_id": 5}, "custom_id: expected a string, got 5", None),
        (CHAT | {"method": "GET"}, "method: expected \"POST\", got 'GET'", "request-1"),
        (CHAT | {"url": "/v1/embeddings"}, "url: expected /v1/chat/completions or /v1/completions, got ", "request-1"),
        (CHAT | {"body": None}, "body: expected an object, got None", "request-1"),
        (CHAT | {"more": 1}, "'more': this field is not known, got 1", "request-1"),
        (body(CHAT, prompt="a"), "'prompt': this field is not known, got 'a'", "request-1"),
        (body(CHAT, temprature=1), "'temprature': this field is not known, got 1", "request-1"),
        (body(CHAT, stream=True), "stream: this field is not served, got True", "request-1"),
        (body(CHAT, tools=[{"type": "function"}]), "tools: this field is not served, got ", "request-1"),
        (body(CHAT, top_logprobs=5), 'top_logprobs: expected "logprobs": true beside it, got ', "request-1"),
        (body(TEXT, return_token_ids=1), "return_token_ids: expected true or false, got 1", "t"),
    ],
)
def test_what_is_refused_with_which_words(entry, reason, id_):
    with pytest.raises(LineError) as error:
        parse(entry)
    assert str(error.value).startswith(reason)
    assert error.value.id == id_
    assert error.value.batch == ("custom_id" in entry)
