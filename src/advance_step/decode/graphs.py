"""The decode step in CUDA graphs: captured ahead for a few batch sizes, replayed without the host."""

from collections.abc import Callable, Iterable

import torch

from advance_step import warmup


class StepGraphs:
    """What replays the step for each size that it was captured for, (rows, pages)."""

    def __init__(self, replays: dict[tuple[int, int], Callable[[], None]]) -> None:
        self.replays = replays
        self.rows, self.pages = (sorted(set(sizes)) for sizes in zip(*replays, strict=True))

    def fit(self, rows: int, pages: int) -> tuple[int, int]:
        """The smallest captured size that holds this one."""
        return next(r for r in self.rows if r >= rows), next(p for p in self.pages if p >= pages)

    def replay(self, rows: int, pages: int) -> None:
        """The step on a size that `fit` gave; returns before the device has run it."""
        self.replays[rows, pages]()


def capture(
    step: Callable[[int, int], None], rows: Iterable[int], pages: Iterable[int], device: torch.device
) -> StepGraphs:
    """`step(rows, pages)` in a CUDA graph for every pair of sizes, the largest first: all share its pool of memory.

    step: device work only, on buffers that keep their addresses. It is also run once for each pair before it is
        captured, so that nothing is compiled, loaded or chosen while capturing: a run must change nothing that counts.
    """
    replays: dict[tuple[int, int], Callable[[], None]] = {}
    columns = sorted(pages, reverse=True)
    with torch.cuda.device(device):
        warmup(device)
        pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        for size in [(r, p) for r in sorted(rows, reverse=True) for p in columns]:
            with torch.cuda.stream(stream):
                step(*size)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=pool, stream=stream):
                step(*size)
            replays[size] = graph.replay
        torch.cuda.current_stream().wait_stream(stream)
    return StepGraphs(replays)


def doubling(first: int, last: int) -> list[int]:
    """`first`, twice as much, and so on below `last`, and `last` itself."""
    sizes = [min(first, last)]
    while sizes[-1] < last:
        sizes.append(min(2 * sizes[-1], last))
    return sizes
