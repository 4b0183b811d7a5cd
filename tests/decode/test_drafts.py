"""Drafts from a row's own text: never another token, greedy or sampled, whatever the pages and the batch."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, decoder_for, generate, requests_for, run, tiny_model

from advance_step.decode import Request, SamplingParams
from advance_step.decode.drafts import PromptLookup


def test_what_followed_the_end_of_the_text_before():
    lookup = PromptLookup([1, 2, 3, 4, 5, 1, 2, 3])
    assert lookup.propose(3) == [4, 5, 1]
    assert lookup.propose(9) == [4, 5, 1, 2, 3]  # as far as the text goes
    lookup.extend([9, 2, 3])
    assert lookup.propose(2) == [9, 2]  # the latest place


def test_the_longest_end_counts():
    assert PromptLookup([7, 1, 2, 3, 5, 8, 2, 3, 6, 7, 1, 2, 3]).propose(1) == [5]  # of 1 2 3, not of 2 3 alone


def test_nothing_is_proposed_for_a_text_without_repeats():
    assert PromptLookup([1, 2, 3, 4]).propose(4) == []
    assert PromptLookup([1]).propose(4) == []
    assert PromptLookup([1, 1]).propose(4) == []  # one token is not enough to go by


def repeating(prompts: list[list[int]]) -> list[list[int]]:
    return [(prompt * 12)[:24] for prompt in prompts]


@pytest.mark.parametrize("draft_tokens", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_are_the_same(family, prompts, draft_tokens):
    model = tiny_model(family)
    expected = [generate(model, prompt, 20) for prompt in repeating(prompts)]
    decoder = decoder_for(model, block_size=4, draft_tokens=draft_tokens, batch_size=3)
    assert run(decoder, requests_for(repeating(prompts), 20)) == expected
    assert 0 < decoder.figures.accepted_tokens <= decoder.figures.draft_tokens


@pytest.mark.parametrize("options", [{}, {"num_pages": 13}, {"max_num_batched_tokens": 10}, {"batch_size": 1}])
def test_few_pages_and_pieces(llama, prompts, options):
    expected = [generate(llama, prompt, 20) for prompt in repeating(prompts)]
    decoder = decoder_for(llama, block_size=4, draft_tokens=3, **options)
    assert run(decoder, requests_for(repeating(prompts), 20)) == expected
    assert decoder.pool.available == decoder.pool.size
    assert (decoder.figures.preemptions > 0) == ("num_pages" in options)


def test_fewer_steps_than_tokens(llama, prompts):
    """Which is what it is for: a tiny model with random weights soon repeats itself."""
    decoder = decoder_for(llama, draft_tokens=4, max_seq_len=96, batch_size=1)
    run(decoder, requests_for(repeating(prompts[:1]), 64))
    assert decoder.figures.steps < 63
    assert decoder.figures.tokens == 64 == decoder.figures.steps + decoder.figures.accepted_tokens + 1


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.7},
        {"temperature": 0.3, "top_p": 0.9, "top_k": 40},
        {"repetition_penalty": 0.8},
        {"temperature": 0.5, "presence_penalty": 0.5, "frequency_penalty": 0.5, "min_new_tokens": 6},
    ],
    ids=str,
)
def test_sampled_tokens_are_the_same(llama, prompts, sampling):
    def requests():
        return [
            Request(i, prompt, SamplingParams(max_new_tokens=20, seed=i, **sampling))
            for i, prompt in enumerate(repeating(prompts))
        ]

    expected = run(decoder_for(llama), requests())
    decoder = decoder_for(llama, draft_tokens=4)
    assert run(decoder, requests()) == expected
    assert decoder.figures.accepted_tokens > 0


def test_stops_within_a_step(llama, prompts):
    whole = [generate(llama, prompt, 20) for prompt in repeating(prompts)]
    stop = [tokens[7] for tokens in whole[:3]]
    expected = [generate(llama, prompt, 20, stop) for prompt in repeating(prompts)]
    assert (
        run(decoder_for(llama, draft_tokens=4, stop_token_ids=stop), requests_for(repeating(prompts), 20)) == expected
    )


def test_logprobs_of_accepted_tokens(llama, prompts):
    def requests():
        return [
            Request(i, prompt, SamplingParams(max_new_tokens=12, logprobs=2))
            for i, prompt in enumerate(repeating(prompts))
        ]

    without, with_drafts = requests(), requests()
    run(decoder_for(llama), without)
    run(decoder_for(llama, draft_tokens=4), with_drafts)
    for one, other in zip(without, with_drafts, strict=True):
        assert len(one.logprobs) == len(other.logprobs) == 12
        ours = torch.tensor([noted.logprob for noted in other.logprobs])
        assert torch.allclose(torch.tensor([noted.logprob for noted in one.logprobs]), ours, atol=1e-4)
        assert [[t for t, _ in noted.top] for noted in one.logprobs] == [[t for t, _ in n.top] for n in other.logprobs]


def test_drafts_are_made_by_the_host(llama):
    with pytest.raises(ValueError, match="draft_tokens: expected 0 with steps_per_sync > 1"):
        decoder_for(llama, draft_tokens=2, steps_per_sync=2)
