"""Prompts as token ids: templates, BOS, and what the model cannot read."""

from __future__ import annotations

import copy

import pytest
from tiny_directory import tiny_tokenizer
from tiny_models import decoder_for, tiny_model

from advance_step.decode.request import Request
from advance_step.decode.sampling_params import SamplingParams
from advance_step.generate.records import LineError, Prompt
from advance_step.generate.requests import RequestMaker, prompt_ids, remarks, to_text
from advance_step.generate.settings import Settings

OPTIONS = {"max_new_tokens": 128, "seed": 0}


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


def maker(model, tokenizer, context: int = 256, **sampling: object) -> RequestMaker:
    model = copy.copy(model)
    model.config = copy.copy(model.config)
    model.config.max_position_embeddings = context
    return RequestMaker(model, tokenizer, Settings(sampling=OPTIONS | sampling))


def encoded(tokenizer, content, templated: bool = True) -> str:
    return tokenizer.decode(prompt_ids(tokenizer, Prompt(1, 1, content, templated)))


def test_a_text_is_the_users_turn_or_stands_as_it_is(tokenizer):
    assert encoded(tokenizer, "Hi") == "<s>[user:Hi][assistant:"
    assert encoded(tokenizer, "Hi", templated=False) == "Hi"
    assert prompt_ids(tokenizer, Prompt(1, 1, [5, 6], True)) == [5, 6]


def test_system_turns(tokenizer):
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    for templated in (True, False):
        assert encoded(tokenizer, messages, templated) == "<s>[system:s][user:u][assistant:"


def test_no_second_beginning_of_a_text():
    """With a tokenizer that puts one before every text, as Llama's does."""
    tokenizer = tiny_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer("Hi").input_ids == [0, 43, 74]
    assert prompt_ids(tokenizer, Prompt(1, 1, "Hi", False)) == [0, 43, 74]
    assert prompt_ids(tokenizer, Prompt(1, 1, "<s>Hi", False)) == [0, 43, 74]
    assert encoded(tokenizer, "Hi") == "<s>[user:Hi][assistant:"


def test_the_real_models_template(real):
    _, tokenizer = real
    templated = encoded(tokenizer, "Hi")
    assert templated.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert templated.count("<|im_start|>") == 3  # system, user, assistant: no second start token


def test_what_a_template_refuses_and_where_there_is_none(tokenizer):
    with pytest.raises(LineError, match="messages: the model's chat template refuses them: no narrator"):
        encoded(tokenizer, [{"role": "narrator", "content": "x"}])
    plain = tiny_tokenizer()
    plain.chat_template = None
    with pytest.raises(ValueError, match="the model has no chat template: use --raw"):
        encoded(plain, "Hi")
    assert encoded(plain, "Hi", templated=False) == "Hi"


@pytest.mark.parametrize(
    "line, message",
    [
        ({"content": ""}, "prompt: expected at least one token, got none"),
        ({"content": "abc"}, r"prompt: expected fewer than 3 tokens \(the context\), got 3"),
        ({"content": "a", "sampling": {"temperature": -1}}, "temperature: expected temperature >= 0, got -1"),
        ({"content": "a", "sampling": {"n": 2}}, "n: expected 1 with temperature=0"),
    ],
)
def test_lines_that_cannot_be_decoded(tokenizer, llama, line, message):
    prompt = Prompt(**{"line": 1, "id": 1, "templated": False} | line)
    with pytest.raises(LineError, match=message):
        maker(llama, tokenizer, context=3).requests(prompt)


def test_new_tokens_end_with_the_context(tokenizer, llama):
    prompt = Prompt(1, 1, "abc", False, {"min_new_tokens": 90})
    (request,) = maker(llama, tokenizer, context=8).requests(prompt)
    assert (request.sampling.max_new_tokens, request.sampling.min_new_tokens) == (5, 5)


def test_the_line_goes_before_the_options_and_they_before_the_model(tokenizer):
    model = tiny_model("llama")
    model.generation_config.update(do_sample=True, temperature=0.5, top_k=7, top_p=0.5, num_beams=4, max_length=20)
    options = OPTIONS | {"top_p": 0.75}
    (request,) = maker(model, tokenizer, top_p=0.75).requests(Prompt(1, 1, "abc", False, {"temperature": 2.0}))
    assert (request.sampling.temperature, request.sampling.top_p, request.sampling.top_k) == (2.0, 0.75, 7)
    assert remarks(model, options) == [
        "from the model's generation_config, where no option says otherwise: temperature=0.5, top_k=7",
        "not honoured of the model's generation_config: num_beams=4",
    ]
    assert remarks(tiny_model("llama"), OPTIONS) == []
    assert remarks(tiny_model("llama"), options) == ["without effect at temperature 0: --top-p"]
    model.generation_config.top_p = 7.0
    with pytest.raises(ValueError, match="--model: generation_config: top_p: expected 0 <= top_p <= 1, got 7"):
        remarks(model, OPTIONS)


def test_seeds_follow_from_the_option_and_the_line(tokenizer, llama):
    def seeds(line: int, option: int, **sampling: object) -> list[int]:
        prompt = Prompt(line, line, "abc", False, {"temperature": 1.0} | sampling)
        requests = maker(llama, tokenizer, seed=option).requests(prompt)
        return [request.sampling.seed for request in requests]

    assert seeds(1, 0) == seeds(1, 0) != seeds(2, 0) != seeds(2, 1)
    assert seeds(1, 0, seed=9) == seeds(2, 1, seed=9) == [9]
    assert len(set(seeds(1, 0, n=3))) == 3


def test_a_finished_request_as_a_text(tokenizer, llama):
    params = SamplingParams(max_new_tokens=4, logprobs=2, ignore_eos=True)
    (request,) = [done for some in decoder_for(llama).run([Request(1, [43, 74], params)]) for done in some]
    text = to_text(tokenizer, request)
    letters = "".join(token.token for token in text.logprobs if token.token not in tokenizer.all_special_tokens)
    assert text.text == letters and len(text.token_ids) == len(text.logprobs) == 4
    assert all(len(token.top) == 2 and token.top[0] == (token.token, token.logprob) for token in text.logprobs)
