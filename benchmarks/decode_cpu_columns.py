"""The engines that decode_cpu.py times against each other, each in a process of its own.

    python benchmarks/decode_cpu_columns.py COLUMN MODEL_DIRECTORY THREADS

reads sizes from standard input, a line of JSON each ({"rows": 8, "length": 40, "new_tokens": 48}), decodes so many
prompts of so many tokens, and answers with a line: the seconds of every step in which all rows decoded and none was
prefilled, and those of the prefill. With "profile": true it answers where the time of some steps went. It imports
nothing of this project for the columns of others, so that vLLM can be in an environment of its own.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

Prompts = list[list[int]]
# Seconds of the prefill, then those of each step of all rows; and what a profiler saw of some steps.
Answer = dict[str, Any]
PROFILED = 8  # steps


def prompts_of(rows: int, length: int) -> Prompts:
    """Tokens without a meaning, different in each row."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(1000, 40_000, (rows, length), generator=generator).tolist()


class Ours:
    """advance_step's decoder."""

    def __init__(self, directory: str, compile: bool) -> None:
        from pathlib import Path

        from advance_step.decode import pack_linears
        from advance_step.generate.loading import load_weights

        self.model = load_weights(Path(directory), dtype=torch.bfloat16)
        pack_linears(self.model)
        self.compile = compile

    def run(self, prompts: Prompts, new_tokens: int, profile: bool = False) -> Answer:
        from advance_step.decode import Decoder, Request, SamplingParams

        sampling = SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)
        requests = [Request(row, prompt, sampling) for row, prompt in enumerate(prompts)]
        begin = time.perf_counter()
        decoder = Decoder.for_requests(
            self.model, requests, batch_size=len(prompts), block_size=16, share_prefixes=False, compile=self.compile
        )
        made = time.perf_counter() - begin
        begin = time.perf_counter()
        steps = decoder.run(requests)
        answer: Answer = {"made": made, "steps": []}
        for _ in steps:
            now = time.perf_counter()
            if decoder.figures.steps:
                answer["steps"].append(now - begin)
            else:
                answer["prefill"] = answer.get("prefill", 0.0) + now - begin
            begin = time.perf_counter()
            if profile and decoder.figures.steps == PROFILED:
                answer["profile"] = profiled(steps)
                begin = time.perf_counter()
        return answer


class Transformers:
    """transformers' own generate, with its default attention (SDPA)."""

    def __init__(self, directory: str) -> None:
        import transformers

        transformers.utils.logging.disable_progress_bar()
        self.model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()

    def run(self, prompts: Prompts, new_tokens: int) -> Answer:
        import transformers

        times = []

        class Clock(transformers.StoppingCriteria):
            """Stops nothing; notes when each token was there."""

            def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
                times.append(time.perf_counter())
                return torch.zeros(len(input_ids), dtype=torch.bool)

        ids = torch.tensor(prompts)  # [rows, length]
        self.model.generation_config = transformers.GenerationConfig()
        config = transformers.GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
        begin = time.perf_counter()
        self.model.generate(
            ids, attention_mask=torch.ones_like(ids), generation_config=config, stopping_criteria=[Clock()]
        )
        steps = [after - before for before, after in itertools.pairwise(times)]
        return {"prefill": times[0] - begin, "steps": steps}


class Vllm:
    """vLLM on the CPU, its engine stepped by hand in this process."""

    def __init__(self, directory: str, compile: bool) -> None:
        os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_KVCACHE_SPACE": "4"}
        from vllm import LLM, SamplingParams

        self.sampling = SamplingParams
        self.engine = LLM(
            directory,
            dtype="bfloat16",
            enforce_eager=not compile,
            max_model_len=2048,
            max_num_seqs=64,
            enable_prefix_caching=False,
        ).llm_engine
        self.count = 0

    def run(self, prompts: Prompts, new_tokens: int) -> Answer:
        sampling = self.sampling(temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False)
        for prompt in prompts:
            self.engine.add_request(str(self.count), {"prompt_token_ids": prompt}, sampling)
            self.count += 1
        begun = begin = time.perf_counter()
        answer: Answer = {"prefill": 0.0, "steps": []}
        seen: set[str] = set()
        while self.engine.has_unfinished_requests():
            outputs = self.engine.step()
            now = time.perf_counter()
            new = {output.request_id for output in outputs} - seen
            seen |= new
            if len(outputs) == len(prompts) and not new:
                answer["steps"].append(now - begin)
            elif len(seen) == len(prompts) and new:
                answer["prefill"] = now - begun  # with the decoding of rows that were there before
            begin = time.perf_counter()
        return answer


COLUMNS: dict[str, Callable[[str], Any]] = {
    "ours": lambda directory: Ours(directory, compile=False),
    "ours compiled": lambda directory: Ours(directory, compile=True),
    "generate": Transformers,
    "vLLM": lambda directory: Vllm(directory, compile=False),
    "vLLM compiled": lambda directory: Vllm(directory, compile=True),
}


def profiled(steps: Iterator[Any]) -> dict[str, float]:
    """Milliseconds a step, by what took them."""
    with torch.profiler.profile(record_shapes=True) as profile:
        begin = time.perf_counter()
        for _ in range(PROFILED):
            next(steps)
        wall = time.perf_counter() - begin
    found: dict[str, float] = {}
    for event in profile.key_averages(group_by_input_shape=True):
        name = what(event.key, event.input_shapes)
        found[name] = found.get(name, 0.0) + event.self_cpu_time_total / 1e3 / PROFILED
    found["Python, and what no operator does"] = wall * 1e3 / PROFILED - sum(found.values())
    return found


def what(operator: str, shapes: list[list[int]]) -> str:
    """What an operator is part of."""
    if operator == "advance_step_decode::packed_linear":
        return f"linear {shapes[0][-1]} -> {shapes[1][0] * shapes[1][2]}"
    if operator == "advance_step_decode::paged_attention":
        return "attention"
    if operator.startswith("advance_step::"):
        return "advance"
    if operator.startswith("## Call CompiledFxGraph"):
        return "compiled kernels, and the Python between them"
    return "other operators"


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what an engine prints is no answer
    name, directory, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    begin = time.perf_counter()
    column = COLUMNS[name](directory)
    print(json.dumps({"loaded": time.perf_counter() - begin}), file=answers, flush=True)
    for line in sys.stdin:
        size = json.loads(line)
        prompts = prompts_of(size.pop("rows"), size.pop("length"))
        with torch.inference_mode():
            print(json.dumps(column.run(prompts, **size)), file=answers, flush=True)


if __name__ == "__main__":
    main()
