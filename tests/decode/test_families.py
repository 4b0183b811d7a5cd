"""Many families of causal LMs: the tokens of transformers' own generate, or one refusal with a reason."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from families import REFUSED, SERVED, document, family_model

from advance_step.decode import Decoder, Request, SamplingParams, model_check
from advance_step.decode.layouts import layouts_of
from advance_step.decode.model_check import check_model

DOCS = Path(__file__).parents[2] / "docs/decoding.md"
PROMPTS = [[5, 17, 80], [9] * 2 + list(range(20, 36)), [44]]  # past the window of 7; it is reached while decoding
NEW_TOKENS = 8


@pytest.fixture(autouse=True)
def quiet() -> None:
    transformers.utils.logging.set_verbosity(logging.ERROR)


def own_tokens(model: object, prompt: list[int]) -> list[int]:
    """By transformers' generate and eager attention; a token that ends a text is decoded on."""
    model.set_attn_implementation("eager")
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    model.generation_config = config
    ids = torch.tensor([prompt])
    return model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", SERVED)
def test_the_same_tokens(family):
    model = family_model(family)
    expected = [own_tokens(model, prompt) for prompt in PROMPTS]
    requests = [
        Request(i, prompt, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        for i, prompt in enumerate(PROMPTS)
    ]
    decoder = Decoder.for_requests(model, requests, batch_size=2, block_size=4, max_num_batched_tokens=11)
    for _ in decoder.run(requests):
        pass
    assert [request.tokens for request in requests] == expected
    assert len({token for tokens in expected for token in tokens}) > 2  # not one token for ever, which says little


@pytest.mark.parametrize("family", REFUSED)
def test_refused_by_name(family):
    model = family_model(family)
    with pytest.raises(ValueError) as error:
        check_model(model)
    assert str(error.value) == f"model: {type(model).__name__} cannot be decoded over pages: {REFUSED[family][1]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "deepseek_v3", "beam"])
def test_rounding_is_no_reason(family, dtype):
    """Nor are an implementation of attention of the user's choice, or logits in another dtype."""
    model = family_model(family).to(dtype)
    model.set_attn_implementation("eager")
    assert check_model(model) == layouts_of(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "mistral", "gpt_oss", "deepseek_v3"])
def test_a_key_less_is_a_reason(family, dtype, monkeypatch):
    """The probe by itself: here each token sees two tokens instead of all, or of the model's window."""
    model = family_model(family).to(dtype)
    monkeypatch.setattr(
        model_check, "layouts_of", lambda model: [replace(layout, window=2) for layout in layouts_of(model)]
    )
    with pytest.raises(ValueError, match=r"its logits differ from its own attention's by .* of their spread"):
        check_model(model)


def test_a_model_that_raises_is_refused_by_name():
    model = family_model("llama")
    hook = model.model.layers[1].register_forward_pre_hook(lambda *args: 1 // 0)
    with pytest.raises(ValueError, match=r"model: LlamaForCausalLM cannot be decoded over pages: .* by zero"):
        check_model(model)
    hook.remove()
    assert model.config._attn_implementation == "sdpa"
    check_model(model)


def test_the_documentation_lists_them():
    assert document() in DOCS.read_text()
    assert len({family.split(" ")[0] for family in (*SERVED, *REFUSED)}) >= 40
