"""One vLLM engine: the same prompts without and with our operators, twice; what came of it as JSON.

    python vllm_runs.py plain|draft OUTPUT

In a process of its own, since an engine leaves state behind in its process. "plain" has the worker in this process and
starts without the plugin; "draft" has it in a process of its own, where vLLM loads the plugin by its entry point. The
scheduler is in this process: every run has the same batches.
"""

from __future__ import annotations

import json
import os
import random
import sys
from pathlib import Path

MAX_MODEL_LEN = 256
NEW_TOKENS = 16
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the scheduler
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",  # threads that spin for each other crawl on a busy machine
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",  # collective_rpc with functions
}


def ragged_prompts() -> list[list[int]]:
    """32 prompts of 1 to 255 tokens: every other one begins with the same 64; four come within 16 of the length."""
    draw = random.Random(0)
    shared = [draw.randrange(100, 40000) for _ in range(64)]
    lengths = [1, 3, 245, 250, 252, 255] + [draw.randrange(2, 120) for _ in range(26)]
    prompts = [[draw.randrange(100, 40000) for _ in range(length)] for length in lengths]
    return [shared[: len(prompt)] + prompt[64:] if i % 2 else prompt for i, prompt in enumerate(prompts)]


def main(engine: str, output: Path) -> None:
    os.environ.update(ENVIRONMENT)
    import vllm_hooks
    from vllm import LLM, SamplingParams

    from advance_step.generate.gguf import unpacked
    from advance_step.generate.model import find_model

    model = str(unpacked(find_model(None), print))
    speculation = {"method": "draft_model", "model": model, "num_speculative_tokens": 3} if engine == "draft" else None
    llm = LLM(
        model=model,
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=32,
        max_num_batched_tokens=128,  # less than a prompt: prefill comes in chunks
        enable_chunked_prefill=True,
        enable_prefix_caching=True,
        speculative_config=speculation,
        distributed_executor_backend="mp" if engine == "draft" else "uni",
    )
    greedy = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
    llm.generate([{"prompt_token_ids": [5, 6, 7]}], greedy, use_tqdm=False)
    (patched_at_start,) = llm.collective_rpc(vllm_hooks.is_patched)
    (served_at_start,) = llm.collective_rpc(vllm_hooks.served)

    prompts = [{"prompt_token_ids": prompt} for prompt in ragged_prompts()]
    runs = []
    for patched in (False, True, False, True):
        llm.reset_prefix_cache()
        llm.collective_rpc(vllm_hooks.begin, args=(patched,))
        done = llm.generate(prompts, greedy, use_tqdm=False)
        (measured,) = llm.collective_rpc(vllm_hooks.end)
        tokens = [list(request.outputs[0].token_ids) for request in done]
        cached = sum(request.num_cached_tokens or 0 for request in done)
        runs.append({"patched": patched, "tokens": tokens, "cached": cached, **measured})
    result = {"patched_at_start": patched_at_start, "served_at_start": served_at_start, "runs": runs}
    result["worker"] = llm.collective_rpc(vllm_hooks.process)
    result["at_the_models_length"] = llm.collective_rpc(vllm_hooks.drafts_at_the_models_length)[0]
    output.write_text(json.dumps(result | {"scheduler": [os.getpid()]}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
