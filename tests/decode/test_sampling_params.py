"""What a request may ask for, and what a model's generation config adds to it."""

from __future__ import annotations

import dataclasses

import pytest
from transformers import GenerationConfig

from advance_step.decode.sampling_params import IGNORED, SamplingParams, ignored_fields


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (dict(max_new_tokens=0), "max_new_tokens: expected an integer, max_new_tokens >= 1, got 0"),
        (dict(max_new_tokens=1.5), "max_new_tokens: expected an integer, max_new_tokens >= 1, got 1.5"),
        (dict(max_new_tokens=True), "max_new_tokens: expected an integer, max_new_tokens >= 1, got True"),
        (dict(temperature=-1), "temperature: expected temperature >= 0, got -1"),
        (dict(temperature=float("nan")), "temperature: expected a finite temperature >= 0, got nan"),
        (dict(temperature=float("inf")), "temperature: expected a finite temperature >= 0, got inf"),
        (dict(temperature="hot"), "temperature: expected temperature >= 0, got 'hot'"),
        (dict(temperature=1e-6), "temperature: expected 0 or temperature >= 1e-05, got 1e-06"),
        (dict(top_k=-1), "top_k: expected an integer, top_k >= 0, got -1"),
        (dict(top_p=1.1), "top_p: expected 0 <= top_p <= 1, got 1.1"),
        (dict(min_p=-0.1), "min_p: expected 0 <= min_p <= 1, got -0.1"),
        (dict(repetition_penalty=0), "repetition_penalty: expected repetition_penalty > 0, got 0"),
        (dict(repetition_penalty=-1.0), "repetition_penalty: expected repetition_penalty > 0, got -1.0"),
        (dict(presence_penalty=2.5), "presence_penalty: expected -2 <= presence_penalty <= 2, got 2.5"),
        (dict(frequency_penalty=-3), "frequency_penalty: expected -2 <= frequency_penalty <= 2, got -3"),
        (dict(seed=2**63), f"seed: expected None or a 64-bit integer, got {2**63}"),
        (dict(seed=1.0), "seed: expected None or a 64-bit integer, got 1.0"),
        (dict(stop=["a", ""]), "stop: expected strings that are not empty, got ''"),
        (dict(stop=[3]), "stop: expected strings that are not empty, got 3"),
        (dict(stop=None), "stop: expected a list or a tuple, got None"),
        (dict(stop_token_ids=3), "stop_token_ids: expected a list or a tuple, got 3"),
        (dict(stop_token_ids=[-1]), "stop_token_ids: expected token ids >= 0, got -1"),
        (dict(stop_token_ids="ab"), "stop_token_ids: expected a list or a tuple, got 'ab'"),
        (dict(ignore_eos=1), "ignore_eos: expected a bool, got 1"),
        (dict(min_new_tokens=-1), "min_new_tokens: expected an integer, min_new_tokens >= 0, got -1"),
        (dict(min_new_tokens=200), "min_new_tokens: expected min_new_tokens <= max_new_tokens=128, got 200"),
        (dict(logprobs=-1), "logprobs: expected an integer, logprobs >= 0, got -1"),
        (dict(n=0), "n: expected an integer, n >= 1, got 0"),
        (dict(n=2), "n: expected 1 with temperature=0, where all samples are equal, got 2"),
        (dict(logits_processors=[3]), "logits_processors: expected functions, got 3"),
    ],
)
def test_what_is_refused(argument, message):
    with pytest.raises(ValueError) as caught:
        SamplingParams(**argument)
    assert str(caught.value) == message


def test_what_is_taken():
    params = SamplingParams(temperature=1, n=3, stop="end", stop_token_ids=[2, 3], logits_processors=[max])
    assert params.stop == ("end",) and params.stop_token_ids == (2, 3) and params.logits_processors == (max,)
    assert hash(params) == hash(dataclasses.replace(params))
    for argument in (dict(stop=["a", "b"]), dict(top_p=0), dict(seed=-(2**63)), dict(logprobs=0), dict(top_p=1)):
        SamplingParams(**argument)


def test_a_generation_config_fills_what_the_caller_leaves_open():
    config = GenerationConfig(
        do_sample=True, temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1, max_new_tokens=50,
        min_new_tokens=3, stop_strings=["User:"], eos_token_id=2,
    )  # fmt: skip
    filled = SamplingParams(
        temperature=0.6, top_k=20, top_p=0.95, min_p=0.05, repetition_penalty=1.1, max_new_tokens=50,
        min_new_tokens=3, stop=("User:",),
    )  # fmt: skip
    assert SamplingParams.from_generation_config(config) == filled
    given = dict(temperature=0.0, top_k=0, max_new_tokens=9, stop=(), seed=4)
    assert SamplingParams.from_generation_config(config, **given) == dataclasses.replace(filled, **given)
    assert ignored_fields(config) == []


@pytest.mark.parametrize(
    ("fields", "temperature"),
    [
        (dict(), 0.0),
        (dict(do_sample=False), 0.0),
        (dict(temperature=0.6, top_p=0.9), 0.0),  # without do_sample, transformers is greedy
        (dict(do_sample=True), 1.0),
        (dict(do_sample=True, temperature=0.6), 0.6),
    ],
)
def test_a_generation_config_that_does_not_sample_is_greedy(fields, temperature):
    config = GenerationConfig(**fields)
    assert SamplingParams.from_generation_config(config).temperature == temperature
    assert SamplingParams.from_generation_config(config, temperature=0.3).temperature == 0.3
    assert ignored_fields(config) == []


def test_what_a_generation_config_asks_for_in_vain_is_named():
    config = GenerationConfig(num_beams=4, typical_p=0.9, suppress_tokens=[1, 2], max_length=99, bad_words_ids=[[3]])
    expected = ["max_length=99", "num_beams=4", "typical_p=0.9", "bad_words_ids=[[3]]", "suppress_tokens=[1, 2]"]
    assert ignored_fields(config) == expected
    assert ignored_fields(GenerationConfig(max_length=99, max_new_tokens=9)) == []  # transformers drops it too
    assert ignored_fields(GenerationConfig(num_beams=1, no_repeat_ngram_size=0, guidance_scale=1.0)) == []


# Fields of a GenerationConfig that do not change the tokens, or are honoured, here or by the engine.
WITHOUT_EFFECT = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "renormalize_logits", "output_attentions",
    "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate", "pad_token_id", "bos_token_id",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "speculation_type", "use_mtp", "compile_config", "disable_compile",
    "continuous_batching_config", "low_memory", "prefill_chunk_size", "_from_model_config", "transformers_version",
}  # fmt: skip
HONOURED = {
    "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "max_new_tokens", "min_new_tokens",
    "stop_strings", "eos_token_id",
}  # fmt: skip


def test_every_field_of_a_generation_config_is_accounted_for():
    """A new field of transformers is to be honoured or named: this says that there is one."""
    assert set(vars(GenerationConfig())) - WITHOUT_EFFECT - HONOURED == set(IGNORED) & set(vars(GenerationConfig()))
