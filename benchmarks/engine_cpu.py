"""The engine on this CPU: pages that run out, shared prefixes, drafts, and memory over a long run.

    python benchmarks/engine_cpu.py [--only pool prefix drafts memory]

pool: 200 ragged prompts through a pool with a tenth of the pages that they would have together, of one token each
    (the free page that is kept for each row then does not last long); a tiny model with random weights, float32,
    greedy and with seeds; every text is compared with the one decoded alone.
prefix: SmolLM2-135M-Instruct in float32, 32 prompts behind a common one of 1,024 tokens; time of their prefill with
    shared pages and without, and whether the tokens are the same.
drafts: the same model in bfloat16, the summaries and code edits of examples/, greedily; tokens per second of decoding
    with 4 draft tokens by prompt lookup and without, and how many of the drafts were right. In bfloat16 the logits of
    one token and of several differ by rounding, so the tokens are compared in float32, in a run of their own.
memory: 10,000 requests of 64 tokens in one run (the tiny model), drawn as rows get free; the process's memory.

Writes benchmarks/results/engine-cpu-<date>.md.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from report import machine, write

from advance_step.decode import Decoder, Request, SamplingParams
from advance_step.decode.text import encode
from advance_step.generate.model import load_model

EXAMPLES = Path(__file__).parent.parent / "examples"


def tiny() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=97, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def finish(decoder: Decoder, requests: list[Request]) -> list[list[int]]:
    for _ in decoder.run(requests):
        pass
    return [request.tokens for request in requests]


def pool() -> str:
    model, draw = tiny(), random.Random(0)
    shapes = [
        ([draw.randrange(1, 97) for _ in range(draw.randrange(1, 20))], draw.randrange(1, 44)) for _ in range(200)
    ]
    lines = ["| sampling | pages | preemptions | texts as alone |", "| --- | ---: | ---: | ---: |"]
    for name, options in {"greedy": {}, "temperature 0.8, top_p 0.9": {"temperature": 0.8, "top_p": 0.9}}.items():

        def requests(options: dict[str, Any] = options) -> list[Request]:
            return [
                Request(i, prompt, SamplingParams(max_new_tokens=n, seed=i, **options))
                for i, (prompt, n) in enumerate(shapes)
            ]

        all_pages = sum(request.pages_needed(1) for request in requests())
        sizes = {"block_size": 1, "max_seq_len": 64, "num_pages": all_pages // 10}
        decoder = Decoder(model, batch_size=64, steps_per_sync=3, **sizes)
        together = finish(decoder, requests())
        alone = Decoder(model, batch_size=1, **sizes, share_prefixes=False)
        right = sum(tokens == finish(alone, [request])[0] for tokens, request in zip(together, requests(), strict=True))
        preemptions = decoder.figures.preemptions
        lines.append(f"| {name} | {sizes['num_pages']} of {all_pages} | {preemptions} | {right} of 200 |")
    return "\n".join(lines)


def prefix() -> str:
    model, tokenizer = load_model(None, torch.float32, print)
    words = (EXAMPLES / "summaries_and_edits.jsonl").read_text()
    common = (encode(tokenizer, words) * 2)[:1024]
    tails = [encode(tokenizer, f" Question {number}: what is said of this?") for number in range(32)]
    seconds: dict[bool, list[float]] = {True: [], False: []}
    tokens = {}
    for _ in range(3):
        for share in (True, False):
            requests = [Request(i, common + tail, SamplingParams(max_new_tokens=4)) for i, tail in enumerate(tails)]
            decoder = Decoder.for_requests(model, requests, batch_size=32, share_prefixes=share)
            tokens[share] = finish(decoder, requests)
            seconds[share].append(decoder.figures.prefill_seconds)
    with_, without = (statistics.median(seconds[share]) for share in (True, False))
    same = sum(one == other for one, other in zip(tokens[True], tokens[False], strict=True))
    return (
        "| prefill with shared pages, s | without, s | ratio | same tokens |\n| ---: | ---: | ---: | ---: |\n"
        f"| {with_:.2f} | {without:.2f} | {with_ / without:.3f} | {same} of 32 |"
    )


def drafts() -> str:
    path = EXAMPLES / "summaries_and_edits.jsonl"
    texts = [json.loads(line)["prompt"] for line in path.read_text().splitlines()]
    lines = [
        "| rows | tokens/s without | with 4 drafts | ratio | drafts that were right | tokens a step and row |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    model, tokenizer = load_model(None, torch.bfloat16, print)
    for rows in (1, 8):
        rates: dict[int, list[float]] = {0: [], 4: []}
        figures = {}
        for _ in range(3):
            for draft_tokens in rates:
                requests = drafted(tokenizer, texts, 128)
                decoder = Decoder.for_requests(
                    model, requests, batch_size=rows, stop_token_ids=[2], draft_tokens=draft_tokens
                )
                finish(decoder, requests)
                done = decoder.figures
                rates[draft_tokens].append((done.tokens - len(texts)) / done.decode_seconds)
                figures[draft_tokens] = done
        without, with_ = (statistics.median(rates[draft_tokens]) for draft_tokens in (0, 4))
        ratio = statistics.median(b / a for a, b in zip(rates[0], rates[4], strict=True))
        right = figures[4].accepted_tokens / max(figures[4].draft_tokens, 1)
        a_step = figures[0].steps / figures[4].steps
        lines.append(f"| {rows} | {without:.1f} | {with_:.1f} | {ratio:.2f} | {right:.0%} | {a_step:.2f} |")
    model, _ = load_model(None, torch.float32, print)
    found = []
    for draft_tokens in (0, 4):
        requests = drafted(tokenizer, texts, 64)
        decoder = Decoder.for_requests(model, requests, stop_token_ids=[2], draft_tokens=draft_tokens)
        found.append(finish(decoder, requests))
    same = sum(one == other for one, other in zip(*found, strict=True))
    return "\n".join([*lines, f"\nIn float32, 64 tokens: {same} of {len(texts)} texts the same."])


def drafted(tokenizer: Any, texts: list[str], new: int) -> list[Request]:
    ids = [encode(tokenizer, [{"role": "user", "content": text}]) for text in texts]
    return [Request(i, prompt, SamplingParams(max_new_tokens=new)) for i, prompt in enumerate(ids)]


def memory() -> str:
    model = tiny()
    decoder = Decoder(model, batch_size=64, block_size=16, max_seq_len=96, num_pages=400, steps_per_sync=8)
    draw = random.Random(0)

    def requests() -> Iterator[Request]:
        for number in range(10_000):
            prompt = [draw.randrange(1, 97) for _ in range(draw.randrange(1, 32))]
            yield Request(number, prompt, SamplingParams(max_new_tokens=64))

    finished, resident, begin = 0, {}, time.perf_counter()
    for done in decoder.run(requests()):
        finished += len(done)
        for mark in (500, 1000, 2500, 5000, 7500, 10_000):
            if finished >= mark and mark not in resident:
                resident[mark] = rss()
    head = " | ".join(f"{mark:,}" for mark in resident)
    cells = " | ".join(f"{kib / 1024:.1f}" for kib in resident.values())
    return (
        f"| requests finished | {head} |\n| --- |{' ---: |' * len(resident)}\n| resident, MiB | {cells} |\n\n"
        f"{decoder.figures.tokens:,} tokens in {time.perf_counter() - begin:.0f} s."
    )


def rss() -> int:
    """KiB of this process that are in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmRSS:")[1].split()[0])


def main() -> None:
    questions = {"pool": pool, "prefix": prefix, "drafts": drafts, "memory": memory}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(questions), default=list(questions))
    transformers.utils.logging.disable_progress_bar()
    sections = {}
    for name in parser.parse_args().only:
        sections[name] = questions[name]()
        print(f"{name}\n{sections[name]}\n", flush=True)
    title = f"The engine on the CPU: {machine()}, transformers {transformers.__version__}"
    write(f"engine-cpu-{time.strftime('%Y-%m-%d')}", title, __doc__ or "", sections)


if __name__ == "__main__":
    main()
