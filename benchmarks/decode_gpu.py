"""Decoding on a GPU: the captured loop beside the same graphs fed by the host, and transformers' own generate.

    python benchmarks/decode_gpu.py [--rows 1 8 16 32 64] [--prompt 128] [--new-tokens 128] [--steps-per-sync 8]

A Llama of SmolLM2-135M's size with random weights in bfloat16, random prompts, greedy, without stop tokens.

- "captured": our loop; a step is one graph of model, sampling and advance, and the host looks once per sync.
- "host-rebuilt": the same graph without the advance; at each step the host waits for the tokens, makes the step's
  inputs as Python lists, and copies them from pinned memory into the graph's buffers, as nano-vllm prepares a step.
- "generate": transformers, its default attention, left padding (here all prompts are equally long).

Both of ours as they are and with the model compiled (not with --quick). Columns take turns, round by round; a figure is
the median over the rounds, a ratio the median of the ratios within a round. "host": µs of a step in which the host is
not in a call that waits for the device. Prefill is not in it. A figure with * is of a column that made other tokens
than "captured".
Writes benchmarks/results/<device>-decode-<date>.md. With --device cpu the columns run uncaptured and nothing is
written: to try the benchmark itself, on a model of a tenth of the layers.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import transformers
from report import gpu_slug, verdict, write

from advance_step import backend_info
from advance_step.decode import Decoder, Request, SamplingParams
from advance_step.decode.steps import CapturedSteps, EagerSteps, Step

BAR = 1.3  # captured / host-rebuilt, at 8 to 64 rows


class Run(NamedTuple):
    """Seconds of a step: in all, and of them those in which the host did not wait; and the tokens of each row."""

    step: float
    host: float | None
    tokens: list[list[int]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 8, 16, 32, 64])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--steps-per-sync", type=int, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quick", action="store_true", help="3 rounds instead of 9, and no compiled columns")
    options = parser.parse_args()
    on_gpu = options.device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        sys.exit("no GPU")
    model = llama(layers=30 if on_gpu else 3).to(options.device)
    table: dict[int, dict[str, list[Run]]] = {}
    attention = ""
    for rows in options.rows:
        generator = torch.Generator().manual_seed(rows)
        prompts = torch.randint(3, 40_000, (rows, options.prompt), generator=generator).tolist()
        columns: dict[str, Callable[[], Run]] = {}
        for suffix, compile in (("", False), (", compiled", True)):
            if compile and (options.quick or not on_gpu):
                continue
            torch._dynamo.reset()
            decoder = decoder_for(model, prompts, options.new_tokens, options.steps_per_sync, compile)
            columns[f"captured{suffix}"] = captured(decoder, prompts, options.new_tokens)
            decoder = decoder_for(model, prompts, options.new_tokens, options.steps_per_sync, compile)
            columns[f"host-rebuilt{suffix}"] = host_rebuilt(decoder, prompts, options.new_tokens, compile)
            attention = decoder.attention
        columns["generate"] = generate(model, prompts, options.new_tokens)
        for run in columns.values():  # captures, compiles, warms
            run()
        rounds = 3 if options.quick else 9
        table[rows] = {name: [] for name in columns}
        for _ in range(rounds):
            for name, run in columns.items():
                table[rows][name].append(run())
        print(as_table({rows: table[rows]}), flush=True)
    kind = torch.cuda.get_device_name() if on_gpu else "CPU"
    served = backend_info()["devices"]["cuda" if on_gpu else "cpu"]["executor"]
    title = f"Decoding on a GPU: {kind}, torch {torch.__version__}, transformers {transformers.__version__}"
    settings = (
        f"{options.prompt} prompt tokens and {options.new_tokens} new ones a row, "
        f"{options.steps_per_sync} steps to a sync; attention by {attention}; operators served by {served}"
    )
    sections = {"Decoding": f"{settings}.\n\n{as_table(table)}", "Bars": bars(table)}
    if on_gpu:
        write(f"{gpu_slug()}-decode-{time.strftime('%Y-%m-%d')}", title, __doc__ or "", sections)
    print(f"\n{title}\n{settings}\n" + sections["Bars"])


def llama(layers: int) -> Any:
    """SmolLM2-135M but for its weights, which are random."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=layers,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def decoder_for(model: Any, prompts: list[list[int]], new_tokens: int, steps_per_sync: int, compile: bool) -> Decoder:
    """A row for every prompt, and all of them there before the clock starts."""
    return Decoder.for_requests(
        model,
        requests_for(prompts, new_tokens),
        batch_size=len(prompts),
        steps_per_sync=steps_per_sync,
        max_num_batched_tokens=sum(map(len, prompts)),
        compile=compile,
    )


class Waiting:
    """Seconds that the host has waited for the device, in calls that do."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on(self, call: Callable[..., Any], *args: Any) -> Any:
        begin = time.perf_counter()
        result = call(*args)
        self.seconds += time.perf_counter() - begin
        return result


def requests_for(prompts: list[list[int]], new_tokens: int) -> list[Request]:
    return [Request(row, prompt, SamplingParams(max_new_tokens=new_tokens)) for row, prompt in enumerate(prompts)]


def per_step(seconds: float, waiting: Waiting, requests: list[Request]) -> Run:
    """Of a run that took so long from the first tokens on."""
    steps = len(requests[0].tokens) - 1
    return Run(seconds / steps, (seconds - waiting.seconds) / steps, [request.tokens for request in requests])


def captured(decoder: Decoder, prompts: list[list[int]], new_tokens: int) -> Callable[[], Run]:
    """Our loop as it is; only the clock is added, around the host's look."""
    waiting, sync = Waiting(), decoder.batch.state.sync
    decoder.batch.state.sync = lambda rows: waiting.on(sync, rows)  # type: ignore[method-assign]

    def run() -> Run:
        requests = requests_for(prompts, new_tokens)
        steps = decoder.run(requests)
        next(steps)  # the prefill
        assert all(request.tokens for request in requests)
        waiting.seconds = 0.0
        begin = time.perf_counter()
        for _ in steps:
            pass
        seconds = time.perf_counter() - begin
        return per_step(seconds, waiting, requests)

    return run


class SampledStep(Step):
    """A step that ends with the sampled tokens: what follows is the host's."""

    def __call__(self, rows: int, pages: int) -> None:
        self.sample(rows, pages)


def host_rebuilt(decoder: Decoder, prompts: list[list[int]], new_tokens: int, compile: bool) -> Callable[[], Run]:
    """The host makes every step's inputs from its own lists."""
    state, device, block_size = decoder.batch.state, decoder.model.device, decoder.block_size
    on_gpu, waiting = device.type == "cuda", Waiting()
    step = SampledStep(decoder.forward, state, decoder.batch.sampler)
    ways = CapturedSteps(step, compile) if on_gpu else EagerSteps(step)

    def on_device(values: Any, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=dtype, pin_memory=on_gpu)
        return tensor.to(device, non_blocking=True)

    def rebuild(requests: list[Request], pages: list[list[int]]) -> None:
        """As nano-vllm's prepare_decode and what follows it."""
        tokens, positions, slots, lens = [], [], [], []
        for request, row_pages in zip(requests, pages, strict=True):
            length = request.seq_len
            tokens.append(request.tokens[-1])
            positions.append(length - 1)
            lens.append(length)
            slots.append(row_pages[(length - 1) // block_size] * block_size + (length - 1) % block_size)
        widest = max(map(len, pages))
        tables = [row_pages + [decoder.cache.spare_page] * (widest - len(row_pages)) for row_pages in pages]
        rows = len(requests)
        state.input_tokens[:rows] = on_device(tokens, torch.int64)
        state.input_positions[:rows] = on_device(positions, torch.int64)
        state.slot_mappings[0][:rows] = on_device(slots, torch.int64)
        state.seq_lens[:rows] = on_device(lens, torch.int32)
        state.block_tables[0][:rows, :widest] = on_device(tables, torch.int32)

    @torch.inference_mode()
    def run() -> Run:
        requests = requests_for(prompts, new_tokens)
        steps = decoder.run(requests)
        next(steps)  # the prefill
        assert all(request.tokens for request in requests) and decoder.scheduler is not None
        decoder.scheduler.reserve(new_tokens)
        pages = [row.pages for row in decoder.scheduler.rows]
        waiting.seconds = 0.0
        begin = time.perf_counter()
        for _ in range(new_tokens - 1):
            rebuild(requests, pages)
            ways.run(len(requests), -(-max(request.seq_len for request in requests) // block_size), 1)
            for request, token in zip(requests, waiting.on(state.sampled[: len(requests)].tolist), strict=True):
                request.tokens.append(token)
        seconds = time.perf_counter() - begin
        steps.close()
        return per_step(seconds, waiting, requests)

    return run


def generate(model: Any, prompts: list[list[int]], new_tokens: int) -> Callable[[], Run]:
    """transformers' own loop; the first token comes with the prefill, whose time is taken apart."""
    ids = torch.tensor(prompts, device=model.device)
    mask = torch.ones_like(ids)

    def timed(tokens: int) -> tuple[float, torch.Tensor]:
        config = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, pad_token_id=0
        )
        begin = time.perf_counter()
        out = model.generate(ids, attention_mask=mask, generation_config=config)
        out = out[:, ids.shape[1] :].cpu()  # waits for the device
        return time.perf_counter() - begin, out

    def run() -> Run:
        model.set_attn_implementation("sdpa")
        prefill, _ = timed(1)
        seconds, out = timed(new_tokens)
        return Run((seconds - prefill) / (new_tokens - 1), None, out.tolist())

    return run


def as_table(table: dict[int, dict[str, list[Run]]]) -> str:
    names = list(dict.fromkeys(name for runs in table.values() for name in runs))
    head = [f"{name}: tokens/s (ms a step; host µs)" for name in names]
    others = [name for name in names if not name.startswith("captured")]
    head += [f"captured / {name}" for name in others]
    lines = ["| rows | " + " | ".join(head) + " |", "| ---: |" + " ---: |" * len(head)]
    for rows, runs in table.items():
        cells = []
        for name in names:
            step = statistics.median(run.step for run in runs[name])
            hosts = [run.host for run in runs[name] if run.host is not None]
            host = f"; {statistics.median(hosts) * 1e6:.0f}" if hosts else ""
            star = "" if runs[name][0].tokens == runs["captured"][0].tokens else "*"
            cells.append(f"{rows / step:,.0f}{star} ({step * 1e3:.2f}{host})")
        cells += [f"{ratio(runs, partner(name), name):.2f}x" for name in others]
        lines.append(f"| {rows} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def partner(other: str) -> str:
    """The column of ours that stands beside this one."""
    return "captured, compiled" if other.endswith("compiled") else "captured"


def ratio(runs: dict[str, list[Run]], ours: str, other: str) -> float:
    """How many times as many tokens a second, round by round."""
    return statistics.median(b.step / a.step for a, b in zip(runs[ours], runs[other], strict=True))


def bars(table: dict[int, dict[str, list[Run]]]) -> str:
    lines = []
    for rows, runs in table.items():
        for other in [name for name in runs if name.startswith("host-rebuilt") and 8 <= rows <= 64]:
            what = f"tokens/s, {partner(other)} / {other}, {rows} rows"
            lines.append(verdict(what, ratio(runs, partner(other), other), ">=", BAR))
    return "\n".join(lines) or "- none of these numbers of rows"


if __name__ == "__main__":
    main()
