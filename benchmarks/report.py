"""What the benchmarks share: the machine in a line, the results file, the plot."""

from __future__ import annotations

import platform
import re
import time
from pathlib import Path

import torch

import advance_step

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            cpu = line.split(":", 1)[1].strip()
            break
    served = advance_step.backend_info()["devices"]["cpu"]["executor"]
    return f"{cpu}, {torch.get_num_threads()} threads, torch {torch.__version__}, CPU served by {served}"


def gpu_slug() -> str:
    """The GPU's name as a file's name has it: h200."""
    return re.sub("[^a-z0-9]+", "-", torch.cuda.get_device_name().lower().replace("nvidia", "")).strip("-")


def verdict(what: str, value: float | None, sign: str, bar: float) -> str:
    """A line that holds a ratio to its bar."""
    if value is None:
        return f"- {what}: {sign} {bar}: not measured"
    met = {"<=": value <= bar, ">=": value >= bar, "<": value < bar}[sign]
    return f"- {what}: {value:.2f}, {sign} {bar}: {'met' if met else 'NOT met'}"


def write(name: str, title: str, method: str, sections: dict[str, str]) -> None:
    """Writes benchmarks/results/<name>.md."""
    RESULTS.mkdir(exist_ok=True)
    body = "\n\n".join(f"## {heading}\n{text}" for heading, text in sections.items())
    path = RESULTS / f"{name}.md"
    path.write_text(f"# {title}\n\n{time.strftime('%Y-%m-%d')}\n\n```\n{method.strip()}\n```\n\n{body}\n")
    print(f"wrote {path.relative_to(RESULTS.parent.parent)}")


def plot(name: str, table: dict[int, dict[str, float]]) -> None:
    """Writes benchmarks/results/<name>.png: time per call against rows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    for column in dict.fromkeys(c for row in table.values() for c in row):
        rows = [r for r in table if column in table[r]]
        style = {"linestyle": "--", "color": "grey", "alpha": 0.8} if column in ("no-op C++", "copy") else {}
        axes.plot(rows, [table[r][column] for r in rows], marker="o", markersize=3, label=column, **style)
    axes.set(xscale="log", yscale="log", xlabel="rows", ylabel="µs per call", title="One decode step on the CPU, hot")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(RESULTS / f"{name}.png", dpi=130)
    print(f"wrote {(RESULTS / name).relative_to(RESULTS.parent.parent)}.png")
