"""The check against transformers itself."""

from typing import Any

import torch
from transformers import GenerationConfig

from advance_step.decode import Request
from advance_step.generate.model import stop_token_ids


def differing(model: Any, requests: list[Request]) -> list[Request]:
    """The finished requests for which transformers' own greedy `generate` gives other tokens. One at a time: slow.

    The model is put back on transformers' SDPA attention.
    """
    model.set_attn_implementation("sdpa")
    stop = stop_token_ids(model)
    wrong = []
    for request in requests:
        # A config of its own: greedy and nothing else, whatever penalties the model's config would add.
        config = GenerationConfig(
            do_sample=False,
            max_new_tokens=request.sampling.max_new_tokens,
            eos_token_id=stop or None,
            pad_token_id=stop[0] if stop else 0,
        )
        prompt = torch.tensor([request.prompt_ids], device=model.device)  # [1, tokens]
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        if output[0, prompt.shape[1] :].tolist() != request.tokens:
            wrong.append(request)
    return wrong
