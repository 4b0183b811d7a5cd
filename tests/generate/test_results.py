"""What a result looks like, in either format, and that it tells which line it stands for."""

from __future__ import annotations

import json
import time

from advance_step.generate.json_lines import parse_line
from advance_step.generate.records import BadLine
from advance_step.generate.results import error_result, of_what, result
from advance_step.generate.texts import Logprob, Text

CHAT = '{"custom_id": "c", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [{"role": "user", '
CHAT += '"content": "x"}], "return_token_ids": true}}'
COMPLETION = '{"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}'
STOPPED = Text(
    "one", [5, 6], "stop", "END", [Logprob("on", -0.5, [("on", -0.5), ("a", -1.0)]), Logprob("e", -0.25, [])]
)
CUT = Text("two", [7], "length")


def test_our_own():
    prompt = parse_line('{"prompt": "p", "id": "x", "more": 1, "return_token_ids": true, "seed": 2}', 3, False)
    expected = {"id": "x", "prompt": "p", "more": 1, "text": "two", "tokens": 1, "token_ids": [7]}
    assert result(prompt, 4, [CUT], "m") == expected | {"finish_reason": "length"}
    prompt.return_token_ids = False
    completions = result(prompt, 4, [CUT, STOPPED], "m")["completions"]
    assert completions[0] == {"text": "two", "tokens": 1, "finish_reason": "length"}
    top = {"on": -0.5, "a": -1.0}
    assert completions[1]["logprobs"][0] == {"token": "on", "logprob": -0.5, "top": top}
    messages = [{"role": "user", "content": "x"}]
    prompt = parse_line(json.dumps({"messages": messages}), 3, False)
    assert result(prompt, 4, [CUT], "m")["messages"] == messages


def test_the_answer_to_a_chat():
    before = int(time.time())
    line = result(parse_line(CHAT, 3, False), 4, [STOPPED, CUT], "m")
    name = line["id"].removeprefix("advance-step-")
    body = line["response"].pop("body")
    assert line == {
        "id": f"advance-step-{name}",
        "custom_id": "c",
        "response": {"status_code": 200, "request_id": f"batch-{name}"},
        "error": None,
    }
    assert before <= body.pop("created") <= time.time()
    content = [
        {
            "token": "on",
            "logprob": -0.5,
            "bytes": [111, 110],
            "top_logprobs": [
                {"token": "on", "logprob": -0.5, "bytes": [111, 110]},
                {"token": "a", "logprob": -1.0, "bytes": [97]},
            ],
        },
        {"token": "e", "logprob": -0.25, "bytes": [101], "top_logprobs": []},
    ]
    assert body == {
        "id": f"chatcmpl-{name}",
        "object": "chat.completion",
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "one", "refusal": None},
                "logprobs": {"content": content},
                "finish_reason": "stop",
                "stop_reason": "END",
                "token_ids": [5, 6],
            },
            {
                "index": 1,
                "message": {"role": "assistant", "content": "two", "refusal": None},
                "logprobs": None,
                "finish_reason": "length",
                "stop_reason": None,
                "token_ids": [7],
            },
        ],
        "usage": {"prompt_tokens": 4, "total_tokens": 7, "completion_tokens": 3},
    }


def test_the_answer_to_a_completion():
    body = result(parse_line(COMPLETION, 3, False), 4, [STOPPED], "m")["response"]["body"]
    assert body["object"] == "text_completion" and body["id"].startswith("cmpl-")
    logprobs = {
        "text_offset": [0, 2],
        "token_logprobs": [-0.5, -0.25],
        "tokens": ["on", "e"],
        "top_logprobs": [{"on": -0.5, "a": -1.0}, {}],
    }
    choice = {"index": 0, "text": "one", "logprobs": logprobs, "finish_reason": "stop", "stop_reason": "END"}
    assert body["choices"] == [choice]


def test_error_records():
    assert error_result(BadLine(3, "why", "x")) == {"id": "x", "line": 3, "error": "why"}
    line = error_result(BadLine(3, "why", "c", batch=True))
    assert line["custom_id"] == "c"
    assert line["response"]["status_code"] == 400 and line["response"]["body"] is None
    assert line["error"] == {"code": "invalid_request", "message": "line 3: why", "line": 3}


def test_every_line_tells_what_it_stands_for():
    """Also one of our own that carries fields of the batch format."""
    own = parse_line('{"prompt": "p", "id": 9, "custom_id": "c", "response": {}, "line": 8}', 3, False)
    lines = [
        (result(own, 4, [CUT], "m"), (9, None)),
        (result(own, 4, [CUT, CUT], "m"), (9, None)),
        (result(parse_line(CHAT, 3, False), 4, [CUT], "m"), ("c", None)),
        (error_result(BadLine(3, "why")), (None, 3)),
        (error_result(BadLine(3, "why", "c", batch=True)), (None, 3)),
    ]
    for entry, what in lines:
        assert of_what(json.loads(json.dumps(entry))) == what
