"""Decoding on this CPU: this project's loop, transformers' generate and vLLM, in one run.

    python benchmarks/decode_cpu.py [--sizes 1,64 8,64 32,64 64,64 1,1024 ...] [--rounds 5] [--quick]
    VLLM_PYTHON=.venv-vllm/bin/python python benchmarks/decode_cpu.py

SmolLM2-135M-Instruct in bfloat16 decodes prompts of as many random tokens as brings the middle of the new ones to the
context, greedily and without stop tokens. Every column is a process of its own (decode_cpu_columns.py), and they take
turns, size by size and round by round; one that waits sleeps. A figure is the median time of a step in which all rows
decode and none is prefilled, over all rounds (two, where there are more than 16,384 tokens); a ratio is the median over
the rounds of the ratio within a round, so that a drift of the machine meets both sides. vLLM's columns are there where
VLLM_PYTHON names an interpreter that has it. The floor is the time that reading the weights, keys and values takes at
the bandwidth that summing a large tensor shows. Prefill: 32 prompts of 512 tokens, until each has its first token.
Where the time goes: torch's profiler over 8 steps, whose own cost is in it. Writes
benchmarks/results/decode-cpu-<date>.md and .png.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from report import RESULTS, machine, verdict, write

from advance_step.generate.gguf import unpacked
from advance_step.generate.model import find_model

SCRIPT = Path(__file__).parent / "decode_cpu_columns.py"
WARM = 2  # steps
PREFILL = {"rows": 32, "length": 512, "new_tokens": 1}
Size = tuple[int, int]  # rows, context
Times = dict[str, list[float]]  # milliseconds a step of each column, round by round


class Column:
    """An engine in a process of its own."""

    def __init__(self, name: str, python: str, directory: Path) -> None:
        command = [python, str(SCRIPT), name, str(directory), str(torch.get_num_threads())]
        log = (RESULTS.parent.parent / "build" / f"decode-cpu-{name.replace(' ', '-')}.log").open("w")
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True)
        self.loaded = self._answer()["loaded"]

    def run(self, **size: Any) -> Any:
        """What the engine answers for such a batch."""
        assert self.process.stdin
        print(json.dumps(size), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> Any:
        assert self.process.stdout
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args}: ended; its log is in build/")
        return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [f"{rows},{context}" for context in (64, 1024) for rows in (1, 8, 32, 64)]
    parser.add_argument("--sizes", nargs="+", default=every, help="rows,context")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--quick", action="store_true", help="2 rounds, context 64, no vLLM")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.sizes = 2, ["1,64", "8,64", "32,64"]
    (RESULTS.parent.parent / "build").mkdir(exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    found = find_model(None)
    directory = unpacked(found, print) if found.is_file() else found
    columns = {name: Column(name, sys.executable, directory) for name in ("ours", "ours compiled", "generate")}
    vllm = None if options.quick else os.environ.get("VLLM_PYTHON")
    if vllm:
        columns |= {name: Column(name, vllm, directory) for name in ("vLLM", "vLLM compiled")}
    compiling = [columns["ours compiled"].run(rows=2, length=8, new_tokens=4)["made"]]
    bandwidth = read_bandwidth()
    table: dict[Size, Times] = {}
    for size in options.sizes:
        rows, context = map(int, size.split(","))
        table[rows, context] = measure(columns, rows, context, options)
        print(as_table({(rows, context): table[rows, context]}, directory, bandwidth), flush=True)
    prefill: Times = {name: [] for name in columns}
    for _ in range(options.rounds):
        for name, column in columns.items():
            prefill[name].append(PREFILL["rows"] * PREFILL["length"] / column.run(**PREFILL)["prefill"])
    sections = {
        f"A step, in milliseconds (weights and pages are read at {bandwidth / 1e9:.1f} GB/s)": as_table(
            table, directory, bandwidth
        ),
        "Bars": bars(table, directory, bandwidth),
        "Prefill, tokens a second": "\n".join(f"- {n}: {statistics.median(v):.0f}" for n, v in prefill.items()),
        "Until the first step": f"- ours compiled, the compiler's results on disk or not: {compiling[0]:.1f} s\n"
        + "\n".join(f"- {name}: loaded in {column.loaded:.1f} s" for name, column in columns.items()),
        "Where the time of a step goes, in milliseconds": profiles(columns),
    }
    name = f"decode-cpu-{time.strftime('%Y-%m-%d')}"
    write(name, f"Decoding on the CPU: {machine()}, transformers {transformers.__version__}", __doc__ or "", sections)
    plot(name, table)


def measure(columns: dict[str, Column], rows: int, context: int, options: argparse.Namespace) -> Times:
    """The median milliseconds of a step of each column in each round."""
    times: Times = {name: [] for name in columns}
    size = {"rows": rows, "length": context - options.new_tokens // 2, "new_tokens": options.new_tokens}
    for _ in range(options.rounds if rows * context < 2**14 else min(2, options.rounds)):
        for name, column in columns.items():
            times[name].append(statistics.median(column.run(**size)["steps"][WARM:]) * 1e3)
    return times


def ratio(times: Times, ours: str, theirs: str) -> float | None:
    """How many times as fast ours is, as the median over the rounds."""
    if theirs not in times:
        return None
    return statistics.median(b / a for a, b in zip(times[ours], times[theirs], strict=True))


def read_bandwidth() -> float:
    """Bytes a second of summing 1 GiB."""
    large = torch.ones(2**27, dtype=torch.int64)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        large.sum()
        times.append(time.perf_counter() - begin)
    return large.nbytes / min(times)


def floor(size: Size, directory: Path, bandwidth: float) -> float:
    """Milliseconds that a step takes at least: all weights, and the keys and values of all rows."""
    config = transformers.AutoConfig.from_pretrained(directory)
    hidden, layers, vocabulary = config.hidden_size, config.num_hidden_layers, config.vocab_size
    key = config.num_key_value_heads * config.head_dim
    weights = layers * (2 * hidden * hidden + 2 * hidden * key + 3 * hidden * config.intermediate_size)
    elements = weights + vocabulary * hidden + size[0] * size[1] * layers * 2 * key
    return 2 * elements / bandwidth * 1e3


def as_table(table: dict[Size, Times], directory: Path, bandwidth: float) -> str:
    names = list(next(iter(table.values())))
    ratios = [("ours compiled", "vLLM compiled"), ("ours", "vLLM"), ("ours compiled", "generate"), ("ours", "generate")]
    ratios = [pair for pair in ratios if pair[1] in names]
    head = ["rows", "context", "floor", *names, *(f"{a} as fast as {b}" for a, b in ratios)]
    lines = ["| " + " | ".join(head) + " |", "| " + "---: | " * len(head)]
    for size, times in table.items():
        cells = [*map(str, size), f"{floor(size, directory, bandwidth):.1f}"]
        cells += [f"{statistics.median(times[name]):.1f}" for name in names]
        cells += [f"{ratio(times, a, b):.2f}x" for a, b in ratios]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(table: dict[Size, Times], directory: Path, bandwidth: float) -> str:
    lines = []
    for (rows, context), times in table.items():
        at = f"{rows} rows, context {context}"
        least = 1.0 if context == 64 else 0.9
        lines.append(
            verdict(f"compiled / vLLM compiled, {at}", ratio(times, "ours compiled", "vLLM compiled"), ">=", least)
        )
        lines.append(verdict(f"eager / vLLM eager, {at}", ratio(times, "ours", "vLLM"), ">=", 0.9))
        if rows == 1:
            step = statistics.median(times["ours compiled"]) / floor((rows, context), directory, bandwidth)
            lines.append(verdict(f"compiled / floor, {at}", step, "<=", 2.0))
    return "\n".join(lines)


def profiles(columns: dict[str, Column]) -> str:
    """What a step's time goes to, by rows and column."""
    found: dict[str, dict[str, float]] = {}
    for rows in (1, 8, 32):
        for name in ("ours", "ours compiled"):
            size = {"rows": rows, "length": 40, "new_tokens": 48, "profile": True}
            for what, spent in columns[name].run(**size)["profile"].items():
                found.setdefault(what, {})[f"{name}, {rows}"] = spent
    heads = list(dict.fromkeys(head for by in found.values() for head in by))
    lines = ["| | " + " | ".join(heads) + " |", "| --- | " + "---: | " * len(heads)]
    for what, by in sorted(found.items(), key=lambda item: -max(item[1].values())):
        lines.append(f"| {what} | " + " | ".join(f"{by.get(head, 0.0):.2f}" for head in heads) + " |")
    return "\n".join(lines)


def plot(name: str, table: dict[Size, Times]) -> None:
    """Writes benchmarks/results/<name>.png: tokens a second against rows, a panel for each context."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    contexts = list(dict.fromkeys(context for _, context in table))
    figure, panels = pyplot.subplots(
        1, len(contexts), figsize=(5 * len(contexts), 4), layout="constrained", squeeze=False
    )
    for axes, context in zip(panels[0], contexts, strict=True):
        sizes = [size for size in table if size[1] == context]
        for column in table[sizes[0]]:
            speeds = [rows / statistics.median(table[rows, context][column]) * 1e3 for rows, _ in sizes]
            axes.plot([rows for rows, _ in sizes], speeds, marker="o", markersize=3, label=column)
        axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="tokens a second", title=f"context {context}")
        axes.grid(alpha=0.3)
    panels[0][0].legend(fontsize=8)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"wrote {(RESULTS / name).relative_to(RESULTS.parent.parent)}.png")


if __name__ == "__main__":
    main()
