"""Tiny models of several families with random weights, and their tokens by our loop and by transformers' own."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from advance_step.decode import Decoder, Request, SamplingParams

transformers.utils.logging.disable_progress_bar()

COMMON = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # wide, so that the likeliest token is likeliest by far
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON),
    "llama-mha": lambda: transformers.LlamaConfig(**COMMON | {"num_key_value_heads": 6}),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON),  # biases
    "qwen3": lambda: transformers.Qwen3Config(**COMMON),  # norms on queries and keys
    "mistral": lambda: transformers.MistralConfig(**COMMON, sliding_window=7),
    "gemma2": lambda: transformers.Gemma2Config(  # softcap, and a window in every other layer
        **COMMON, sliding_window=7, attn_logit_softcapping=20.0, query_pre_attn_scalar=8
    ),
}


def tiny_model(family: str) -> Any:
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(FAMILIES[family](), dtype=torch.float32).eval()


def requests_for(prompts: list[list[int]], max_new_tokens: int) -> list[Request]:
    return [
        Request(number, prompt, SamplingParams(max_new_tokens=max_new_tokens)) for number, prompt in enumerate(prompts)
    ]


def decoder_for(model: Any, **options: Any) -> Decoder:
    """A decoder with room for every row at its longest, unless `options` say otherwise."""
    settings = {"batch_size": 4, "block_size": 16, "max_seq_len": 64, "stop_token_ids": ()} | options
    pages = -(-settings["max_seq_len"] // settings["block_size"]) * settings["batch_size"]
    return Decoder(model, **{"num_pages": pages} | settings)


def run(decoder: Decoder, requests: list[Request]) -> list[list[int]]:
    """The tokens of each request, in the requests' order."""
    finished = [request for done in decoder.run(requests) for request in done]
    assert sorted(request.id for request in finished) == [request.id for request in requests]
    return [request.tokens for request in requests]


def generate(model: Any, prompt: list[int], max_new_tokens: int, stop: list[int] | None = None) -> list[int]:
    """What transformers' own generate gives for one prompt."""
    model.set_attn_implementation("eager" if model.config.model_type == "gemma2" else "sdpa")
    config = transformers.GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stop, pad_token_id=0
    )
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    return output[0, len(prompt) :].tolist()


def ragged_prompts() -> list[list[int]]:
    """With lengths around the ends of pages of 16."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, 97, (n,), generator=generator).tolist() for n in (5, 16, 1, 31, 17, 15, 2)]
