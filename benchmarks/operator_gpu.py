"""Time of the operators on this GPU, beside an empty kernel and the other ways to write the step, in one run.

    python benchmarks/operator_gpu.py [--quick] [--vllm-source DIR]...

Host: µs of the calling thread per eager call, in batches short enough that no launch waits for the device. Device: µs
per step in a CUDA graph of many steps, replayed; of each replay, the time between two events over the number of steps.
Columns are timed in turn, repeat by repeat, so that a drift of the machine meets all of them; figures are medians.
"empty kernel": an operator of the same schema, whose kernel has the same grid and parameters and does nothing.
"native": the public function. "Triton": its launch alone, without the contract's checks. "eager torch": the reference.
"vLLM": its kernel, where --vllm-source names a checkout with it (0.9 or before for the step; a later one for eagle).
A figure with * is of a column that did not do what the reference does to the same state.
Writes benchmarks/results/<device>-operators-<date>.md.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import torch
from gpu_columns import EAGLE, FLASHINFER, PLAIN, SLOTS, UNTIL_STOP, Call, State, columns, copy, load_floor, load_vllm
from report import gpu_slug, verdict, write

import advance_step
from advance_step import reference

ROWS = [1, 8, 64, 256, 1024, 4096, 65_536, 1_048_576]
FAMILY_ROWS = [8, 256, 4096, 65_536, 1_048_576]
COPIED = 65_536  # rows from which a copy of as many bytes stands beside the step
STEPS, FEW_STEPS = 100, 10  # in a graph; few where a step takes more than SLOW µs
SLOW = 1000
BATCH = 16  # eager calls between two looks at the clock: with 50 kernels each, fewer than the device queues
Table = dict[int, dict[str, float]]
Wrong = set[tuple[str, int, str]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer repeats, to 4096 rows")
    parser.add_argument("--vllm-source", type=Path, action="append", default=[], help="a checkout of vLLM; repeatable")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU")
    served = advance_step.backend_info()["devices"]["cuda"]
    if served["executor"] != "native":
        sys.exit(f"the native core does not serve CUDA here: {served['why']}")
    load_floor()
    vllm = load_vllm(options.vllm_source)
    most = 4096 if options.quick else ROWS[-1]
    host: dict[str, Table] = {}
    device: dict[str, Table] = {}
    wrong: Wrong = set()
    notes: list[str] = []
    for name in (PLAIN, EAGLE, UNTIL_STOP, FLASHINFER, SLOTS):
        sizes = ROWS if name == PLAIN else FAMILY_ROWS
        host[name], device[name] = {}, {}
        for rows in [r for r in sizes if r <= most]:
            repeats = 5 if options.quick else 25 if rows < COPIED else 9
            state = State(name, rows, STEPS)
            calls = runnable(state, columns(state, vllm), wrong, notes)
            host[name][rows] = host_times(state, calls, repeats)
            if rows >= COPIED:
                calls["copy"] = copy(state)
            device[name][rows] = device_times(state, calls, repeats)
            print(name, rows, device[name][rows], flush=True)
            del state, calls
            torch.cuda.empty_cache()
    sections = {}
    for name in host:
        sections[f"{name}: host, µs per call"] = as_table(name, host[name], wrong)
        sections[f"{name}: device, µs per step"] = as_table(name, device[name], wrong) + "\n\n" + bytes_moved(name)
    sections["Bars"] = bars(host[PLAIN], device[PLAIN], wrong)
    if notes:
        sections["Wrong or refused"] = "\n".join(f"- {note}" for note in notes)
    gpu = torch.cuda.get_device_name()
    title = f"Operators on a GPU: {gpu}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    write(f"{gpu_slug()}-operators-{time.strftime('%Y-%m-%d')}", title, __doc__ or "", sections)
    print("\n" + sections["Bars"])


def runnable(state: State, calls: dict[str, Call | None], wrong: Wrong, notes: list[str]) -> dict[str, Call]:
    """The columns that run here, each run once and held to the reference: that compiles and loads them, too."""
    state.reset()
    getattr(reference, f"{state.name}_ref")(*state.arguments)
    expected = [tensor.clone() for tensor in state.written]
    able = {}
    for column, call in calls.items():
        if call is None:
            continue
        state.reset()
        try:
            call()
        except RuntimeError as error:  # a batch that vLLM's grid cannot cover, a program that torch cannot compile
            if column not in ("vLLM", "torch.compile"):
                raise
            notes.append(f"{column}, {state.name}, {state.rows:,} rows: {str(error).splitlines()[0]}")
            continue
        able[column] = call
        rows_wrong = sum(int((got != right).sum()) for got, right in zip(state.written, expected, strict=True))
        if rows_wrong and column != "empty kernel":
            if column != "vLLM":
                sys.exit(f"{column} of {state.name} is wrong in {rows_wrong} cells at {state.rows} rows")
            wrong.add((state.name, state.rows, column))
            notes.append(f"{column}, {state.name}, {state.rows:,} rows: {rows_wrong:,} cells are wrong")
    return able


def host_times(state: State, calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """µs of this thread per call."""
    times: dict[str, list[float]] = {column: [] for column in calls}
    gc.disable()
    for _ in range(repeats):
        for column, call in calls.items():
            state.reset()
            call()
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(BATCH):
                call()
            times[column].append((time.perf_counter() - start) / BATCH * 1e6)
            torch.cuda.synchronize()
    gc.enable()
    return {column: statistics.median(of) for column, of in times.items()}


def device_times(state: State, calls: dict[str, Call], repeats: int) -> dict[str, float]:
    """µs of the device per step of a replayed graph."""
    graphs = {}
    for column, call in calls.items():
        state.reset()
        steps = STEPS if elapsed(call) < SLOW else FEW_STEPS
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(steps):
                call()
        graphs[column] = (graph, steps)
    times: dict[str, list[float]] = {column: [] for column in calls}
    for repeat in range(repeats + 2):
        for column, (graph, steps) in graphs.items():
            state.reset()
            took = elapsed(graph.replay) / steps
            if repeat >= 2:  # the first ones load the graph and raise the clocks
                times[column].append(took)
    return {column: statistics.median(of) for column, of in times.items()}


def elapsed(run: Call) -> float:
    """µs on the device."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e3


def as_table(name: str, table: Table, wrong: Wrong) -> str:
    names = ["empty kernel", "native", "Triton", "eager torch", "torch.compile", "vLLM"]
    if any("copy" in times for times in table.values()):
        names += ["copy", "native's % of the copy's bandwidth"]
    lines = ["| rows | " + " | ".join(names) + " |", "| ---: |" + " ---: |" * len(names)]
    for rows, times in table.items():
        if "copy" in times:
            times = times | {names[-1]: 100 * times["copy"] / times["native"]}
        cells = [
            (f"{times[column]:,.2f}" + "*" * ((name, rows, column) in wrong)) if column in times else absent(column)
            for column in names
        ]
        lines.append(f"| {rows:,} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def absent(column: str) -> str:
    return "" if "copy" in column else "not run"


def bytes_moved(name: str) -> str:
    least, moved = State(name, 1024, STEPS).bytes_a_row()
    alone = f"; {moved:.0f} as the memory moves them, 32 for what lies alone (a page id, an output token)"
    return (
        f"A step reads and writes {least:.0f} bytes a row{alone if moved > least else ''}. "
        f"The copy moves {moved:.0f}: half of them read, half written."
    )


def bars(host: Table, device: Table, wrong: Wrong) -> str:
    """What the project holds itself to, for `advance_step_flashattn`."""
    small = {rows: times["native"] / times["empty kernel"] for rows, times in device.items() if rows <= 4096}
    worst = max(small, key=lambda rows: small[rows])
    lines = [verdict(f"device, native / empty kernel up to 4,096 rows, worst at {worst:,}", small[worst], "<=", 1.15)]
    most = ROWS[-1]
    share = device[most]["copy"] / device[most]["native"] if most in device else None
    lines.append(verdict(f"device, native's share of the copy's bandwidth at {most:,} rows", share, ">=", 0.70))
    beside = [rows for rows in host if "vLLM" in host[rows] and (PLAIN, rows, "vLLM") not in wrong]
    ratios = [host[rows]["native"] / host[rows]["vLLM"] for rows in beside]
    lines.append(verdict("host, native / vLLM's operator, worst of all rows", max(ratios, default=None), "<", 1.0))
    return "\n".join(lines)


if __name__ == "__main__":
    main()
