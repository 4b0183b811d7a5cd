"""Decoding on this CPU: the paged loop, eager and compiled, beside transformers' own generate, in one run.

    python benchmarks/decode_cpu.py [--quick] [--rows 1 8 32] [--new-tokens 48] [--dtype bfloat16]

SmolLM2-135M-Instruct decodes the prompts of examples/prompts.txt (in turn, where there are more rows), greedily and
without stop tokens, so that every column makes the same number of steps. generate has its default attention (SDPA)
and left padding. The columns take turns, run by run; a run is warmed by its first two steps. A figure is the median
time of a step over all runs; a ratio is the median over the rounds of the ratio within a round, so that a drift of the
machine meets both sides. Prefill is not in it. Each number of rows is measured in a process of its own: a second one
compiled in the same process was measured at half its speed. Writes benchmarks/results/decode-cpu-<date>.md.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from report import machine, write

from advance_step.decode import Decoder, Request, SamplingParams
from advance_step.decode.text import encode
from advance_step.generate.model import load_model

BLOCK_SIZE = 16
WARM = 2  # steps
PROMPTS = Path(__file__).parent.parent / "examples" / "prompts.txt"
Run = Callable[[], list[float]]  # seconds of each step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 7, and no compiled column")
    options = parser.parse_args()
    table, notes = {}, []
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for rows in options.rows:
            table[rows], compiling = pool.apply(measured, (rows, options))
            if compiling is not None:
                notes.append(f"- {rows} rows: the first compiled run took {compiling:.0f} s")
            print(as_table({rows: table[rows]}), flush=True)
    sections = {f"{options.dtype}, {options.new_tokens} new tokens": as_table(table), "Compiling": "\n".join(notes)}
    title = f"Decoding on the CPU: {machine()}, transformers {transformers.__version__}"
    print(f"\n{title}\n" + "\n".join(text for text in sections.values() if text))
    write(f"decode-cpu-{time.strftime('%Y-%m-%d')}", title, __doc__ or "", {k: v for k, v in sections.items() if v})


def measured(rows: int, options: argparse.Namespace) -> tuple[dict[str, list[float]], float | None]:
    """The seconds of a step of every column, round by round, and those of the first compiled run."""
    transformers.utils.logging.disable_progress_bar()
    model, tokenizer = load_model(None, getattr(torch, options.dtype), print)
    texts = PROMPTS.read_text().splitlines()
    prompts = [encode(tokenizer, [{"role": "user", "content": texts[row % len(texts)]}]) for row in range(rows)]
    columns, compiling = {"eager": paged(model, prompts, options.new_tokens, compile=False)}, None
    if not options.quick:
        begin = time.perf_counter()
        columns["--compile"] = paged(model, prompts, options.new_tokens, compile=True)
        columns["--compile"]()
        compiling = time.perf_counter() - begin
    columns["generate"] = generate(model, prompts, options.new_tokens)
    return measure(columns, rounds=3 if options.quick else 7), compiling


def paged(model: Any, prompts: list[list[int]], new_tokens: int, compile: bool) -> Run:
    """Our loop with a row for every prompt."""

    def requests() -> list[Request]:
        return [Request(row, prompt, SamplingParams(max_new_tokens=new_tokens)) for row, prompt in enumerate(prompts)]

    decoder = Decoder.for_requests(
        model, requests(), batch_size=len(prompts), block_size=BLOCK_SIZE, share_prefixes=False, compile=compile
    )

    def run() -> list[float]:
        steps = decoder.run(requests())
        next(steps)  # the prefill
        return seconds_between([time.perf_counter(), *(time.perf_counter() for _ in steps)])

    return run


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> Run:
    """transformers' own loop over the same prompts, padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])  # [rows, longest]
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    config = transformers.GenerationConfig(do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)

    class Clock(transformers.StoppingCriteria):
        """Stops nothing; notes when each token was there."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool)

    def run() -> list[float]:
        model.set_attn_implementation("sdpa")
        clock = Clock()
        model.generate(ids, attention_mask=mask, generation_config=config, stopping_criteria=[clock])
        return seconds_between(clock.times)

    return run


def seconds_between(times: list[float]) -> list[float]:
    return [after - before for before, after in itertools.pairwise(times)]


def measure(columns: dict[str, Run], rounds: int) -> dict[str, list[float]]:
    """The median seconds of a step of each column in each round."""
    times: dict[str, list[float]] = {name: [] for name in columns}
    for _ in range(rounds):
        for name, run in columns.items():
            times[name].append(statistics.median(run()[WARM:]))
    return times


def as_table(table: dict[int, dict[str, list[float]]]) -> str:
    names = list(next(iter(table.values())))
    head = [f"{name}, tokens/s (ms a step)" for name in names]
    head += [f"{name} / generate" for name in names if name != "generate"]
    lines = ["| rows | " + " | ".join(head) + " |", "| ---: |" + " ---: |" * len(head)]
    for rows, times in table.items():
        step = {name: statistics.median(found) for name, found in times.items()}
        cells = [f"{rows / step[name]:.0f} ({step[name] * 1e3:.1f})" for name in names]
        for name in names[:-1]:
            rounds = zip(times["generate"], times[name], strict=True)
            cells.append(f"{statistics.median(theirs / ours for theirs, ours in rounds):.2f}x")
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
