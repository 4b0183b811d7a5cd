"""The check against generate finds a difference where there is one, and compares with what was decoded."""

from __future__ import annotations

import pytest
from tiny_models import decoder_for, requests_for, run, tiny_model

from advance_step.decode.request import Request
from advance_step.decode.sampling_params import SamplingParams
from advance_step.generate.verify import differing, is_comparable


def test_a_wrong_token_is_found(llama, prompts):
    requests = requests_for(prompts[:3], 6)
    run(decoder_for(llama), requests)
    assert differing(llama, requests) == []
    requests[1].tokens[4] += 1
    assert differing(llama, requests) == [requests[1]]


def test_a_text_cut_short_is_found(llama, prompts):
    (request,) = requests = requests_for(prompts[:1], 6)
    run(decoder_for(llama), requests)
    request.tokens.pop()
    assert differing(llama, requests) == [request]


@pytest.mark.parametrize(
    "asked",
    [
        {"repetition_penalty": 3.0},
        {"num_beams": 3},
        {"forced_eos_token_id": 5},
        {"min_new_tokens": 9},
        {"suppress_tokens": list(range(90))},
        {"no_repeat_ngram_size": 1},
        {"do_sample": True, "temperature": 9.0},
    ],
)
def test_what_the_models_own_config_asks_for_is_not_mixed_in(prompts, asked):
    model = tiny_model("llama")
    requests = requests_for(prompts[:2], 6)
    run(decoder_for(model), requests)
    model.generation_config.update(**asked)
    assert differing(model, requests) == []
    assert all(getattr(model.generation_config, name) == value for name, value in asked.items())


def test_a_family_without_sdpa_is_compared_in_eager(prompts):
    model = tiny_model("gemma2")
    requests = requests_for(prompts[:2], 6)
    run(decoder_for(model), requests)
    assert differing(model, requests) == []


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.5},
        {"min_new_tokens": 6, "stop_token_ids": [3, 4]},
        {"stop_token_ids": [3, 4]},
        {"ignore_eos": True},
    ],
)
def test_the_very_settings_are_compared(prompts, params):
    model = tiny_model("llama")
    model.generation_config.eos_token_id = list(range(40, 97))
    requests = [Request(n, prompt, SamplingParams(max_new_tokens=12, **params)) for n, prompt in enumerate(prompts)]
    for _ in decoder_for(model, stop_token_ids=range(40, 97)).run(requests):
        pass
    assert differing(model, requests) == []
    assert len({len(request.tokens) for request in requests}) > 1 or "ignore_eos" in params


def test_what_cannot_be_compared():
    for params in ({"temperature": 1.0}, {"presence_penalty": 1.0}, {"frequency_penalty": 1.0}):
        assert not is_comparable(SamplingParams(**params))
    assert is_comparable(SamplingParams(repetition_penalty=2.0, min_new_tokens=3, stop=("x",)))
