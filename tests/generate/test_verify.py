"""The check against generate finds a difference where there is one."""

from __future__ import annotations

from tiny_models import decoder_for, requests_for, run

from advance_step.generate.verify import differing


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
