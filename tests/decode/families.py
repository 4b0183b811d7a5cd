"""Tiny configs of transformers' causal LMs, and what becomes of each: served, or refused for a reason."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SMALL = {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,  # wide, so that the likeliest token is likeliest by far
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
WINDOW = {"sliding_window": 7}
MIXED = WINDOW | {"layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "num_experts_per_tok": 2}
EXPERTS |= {"moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
ABSENT = object()  # not given to the config
MLA = EXPERTS | {"head_dim": ABSENT, "num_key_value_heads": 6, "q_lora_rank": 12, "kv_lora_rank": 16}
MLA |= {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "first_k_dense_replace": 1}
GEMMA4 = MIXED | {"global_head_dim": 16, "vocab_size_per_layer_input": 97, "num_kv_shared_layers": 0}
SHARED = {  # the last two layers attend to the keys and values of those before
    "sliding_window": 7,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "vocab_size_per_layer_input": 97,
}
FULL = {"layer_types": ["full_attention"] * 2}

# What a config has besides SMALL; a name after a space is a variant of the family.
SERVED: dict[str, dict[str, Any]] = {
    "afmoe": EXPERTS | MIXED,
    "apertus": {},
    "arcee": {},
    "aria_text": {"moe_num_experts": 4},
    "beam": MIXED,
    "bert is_decoder": {"is_decoder": True},
    "bitnet": {},
    "cohere": {},
    "cohere2": MIXED,
    "cohere2_moe": EXPERTS | MIXED,
    "ctrl": {},
    "cwm": MIXED | {"bos_token_id": 1, "eos_token_id": 1},
    "deepseek_v2": MLA | {"topk_method": "greedy"},
    "deepseek_v3": MLA,
    "deepseek_v3 q_lora_rank=None": MLA | {"q_lora_rank": None},
    "deepseek_v3 v_head_dim=qk_rope_head_dim": MLA | {"v_head_dim": 4},
    "diffllama": {},
    "dots1": EXPERTS | FULL | {"n_shared_experts": 1, "routed_scaling_factor": 1.0, "first_k_dense_replace": 1},
    "ernie4_5": {},
    "ernie4_5_moe": EXPERTS | {"moe_num_experts": 4},
    "exaone4": MIXED,
    "exaone_moe": EXPERTS | MIXED,
    "flex_olmo": EXPERTS,
    "flint": EXPERTS,
    "gemma": {},
    "gemma2": MIXED | {"attn_logit_softcapping": 20.0, "query_pre_attn_scalar": 8},
    "gemma3_text": MIXED,
    "gemma3n_text": SHARED | {"activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED | {"global_head_dim": 16},
    "gemma4_text attention_k_eq_v": GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    "gemma4_unified_text": MIXED | {"global_head_dim": 16},
    "glm": {},
    "glm4": {},
    "glm4_moe": EXPERTS,
    "glm4_moe_lite": MLA,
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {},
    "gpt_oss": EXPERTS | MIXED,
    "granite": {},
    "granite_swa": MIXED,
    "granitemoe": EXPERTS,
    "granitemoe_swa": EXPERTS | MIXED,
    "granitemoeshared": EXPERTS,
    "helium": {},
    "hrm_text": {},
    "hunyuan_v1_dense": {},
    "hunyuan_v1_moe": EXPERTS,
    "internlm3": {},
    "jais2": {},
    "jetmoe": EXPERTS,
    "llama": {},
    "minicpm3": MLA,
    "minimax_m2": EXPERTS,
    "ministral": MIXED,
    "mistral": WINDOW,
    "mixtral": EXPERTS | WINDOW,
    "modernbert-decoder": MIXED | {"bos_token_id": 1, "eos_token_id": 1, "cls_token_id": 1, "sep_token_id": 1},
    "nanochat": {},
    "olmo": {},
    "olmo2": {},
    "olmo3": MIXED,
    "olmoe": EXPERTS,
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 48},
    "persimmon": {},
    "phi": {},
    "phi3": WINDOW,
    "phimoe": EXPERTS | WINDOW,
    "qwen2": {},
    "qwen2 use_sliding_window": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": EXPERTS,
    "qwen3": {},
    "qwen3_moe": EXPERTS,
    "seed_oss": {},
    "smollm3": {},
    "starcoder2": WINDOW,
    "vaultgemma": MIXED,
    "youtu": MLA,
}
INTERFACE = "it is not on transformers' attention interface"
OTHER_MASK = "attention that is not causal, or has a mask of its own"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bart": ({}, INTERFACE),
    "bert": ({}, OTHER_MASK),
    "bloom": ({}, INTERFACE),
    "camembert": ({}, OTHER_MASK),
    "codegen": ({}, INTERFACE),
    "doge": ({}, OTHER_MASK),
    "electra": ({}, OTHER_MASK),
    "ernie": ({}, OTHER_MASK),
    "falcon": ({"head_dim": ABSENT}, INTERFACE),
    "falcon_mamba": ({}, INTERFACE),
    "gemma3_text use_bidirectional_attention": (MIXED | {"use_bidirectional_attention": True}, OTHER_MASK),
    "gptj": ({}, INTERFACE),
    "lfm3": ({}, "it has layers of ['conv']"),
    "llama rope_type=dynamic": (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic RoPE follows the longest row of a batch",
    ),
    "llama4_text": ({}, "it has layers of ['chunked_attention']"),
    "mamba": ({}, INTERFACE),
    "minimax": ({}, "it has layers of ['linear_attention']"),
    "moshi": (WINDOW, "transformers' cache keeps 7 tokens, of which its attention is not told"),
    "mpt": ({}, INTERFACE),
    "nemotron": ({}, "its layers do not hand keyword arguments on to attention"),
    "roberta": ({}, OTHER_MASK),
    "rwkv": ({}, INTERFACE),
    "stablelm": ({}, INTERFACE),
    "xglm": ({}, INTERFACE),
}


def family_model(family: str) -> Any:
    """A model of a family with random weights, float32."""
    name, *_ = family.split(" ")
    extra = SERVED[family] if family in SERVED else REFUSED[family][0]
    options = {key: value for key, value in (SMALL | extra).items() if value is not ABSENT}
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[name](**options)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def document() -> str:
    """The lists as docs/decoding.md has them."""
    served = ", ".join(f"`{family}`" for family in SERVED)
    reasons: dict[str, list[str]] = {}
    for family, (_, reason) in REFUSED.items():
        reasons.setdefault(reason, []).append(f"`{family}`")
    refused = "".join(f"| {reason} | {', '.join(families)} |\n" for reason, families in reasons.items())
    return f"Served: {served}.\n\n| refused, because | |\n| --- | --- |\n{refused}"
