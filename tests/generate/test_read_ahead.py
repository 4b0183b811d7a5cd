"""Input that comes slowly holds up no row."""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from pathlib import Path

import pytest
from tiny_models import decoder_for, requests_for, run, tiny_model

from advance_step.decode import Request, SamplingParams
from advance_step.generate import job
from advance_step.generate.read_ahead import read_ahead
from advance_step.generate.records import Prompt
from advance_step.generate.settings import Settings


def prompts(count: int) -> list[Prompt]:
    return [Prompt(number, number, "a", False) for number in range(count)]


def test_records_come_in_order_and_are_waited_for():
    made = prompts(200)
    assert list(read_ahead(iter(made), lambda: True)) == made


def test_none_is_there_yet():
    go_on = threading.Event()

    def slow():
        yield prompts(1)[0]
        go_on.wait()
        yield prompts(2)[1]

    waits = iter([True, False, False, True])
    records = read_ahead(slow(), lambda: next(waits))
    assert [next(records).line, next(records), next(records)] == [0, None, None]
    go_on.set()
    assert next(records).line == 1


def test_what_reading_raises_comes_after_what_was_read():
    def broken():
        yield from prompts(3)
        raise ValueError("cut short")

    records = read_ahead(broken(), lambda: True)
    assert [record.line for record in itertools.islice(records, 3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="cut short"):
        next(records)


def test_a_decoder_is_given_requests_when_there_are_some():
    """And goes on with the rows that it has; without any it yields, and asks again."""
    model = tiny_model("llama")
    ids = [[5, 6], [7, 8, 9], [10]]
    expected = run(decoder_for(model), requests_for(ids, 12))
    made = [Request(i, prompt, SamplingParams(max_new_tokens=12)) for i, prompt in enumerate(ids)]
    given = [None, made[0], None, None, None, made[1], *[None] * 40, made[2], None]
    empty = 0
    for done in decoder_for(model).run(given):
        empty += not done
    assert [request.tokens for request in made] == expected
    assert empty > 20


@pytest.mark.parametrize("ordered", [False, True])
def test_each_line_is_answered_before_the_next_is_written(tiny, tmp_path, ordered):
    """With rows free for all of them: whoever waits for a batch to fill waits for ever."""
    fifo, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    os.mkfifo(fifo)
    answered = []

    def converse() -> None:
        with fifo.open("w") as stream:
            for number in range(4):
                stream.write(json.dumps({"id": number, "prompt": "a" * (number + 1)}) + "\n")
                stream.flush()
                for _ in range(3000):
                    if output.exists() and output.read_bytes().count(b"\n") == number + 1:
                        answered.append(number)
                        break
                    time.sleep(0.1)

    user = threading.Thread(target=converse)
    user.start()
    sampling = {"max_new_tokens": 6, "seed": 0}
    settings = Settings(model=str(tiny), dtype="float32", sampling=sampling, batch_size=4, ordered=ordered)
    assert job.generate([], str(fifo), str(output), False, settings) == 0
    user.join()
    assert answered == [0, 1, 2, 3]
    assert [json.loads(line)["id"] for line in Path(output).read_text().splitlines()] == [0, 1, 2, 3]
