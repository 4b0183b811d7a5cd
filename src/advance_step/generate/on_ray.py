"""A job on many machines: Ray's actors, an engine each, decode blocks of lines; this process reads and writes.

Lines are read here, as blocks get free, and results written here, so that a job on Ray has the same input, output,
header and lock as any other. (Ray Data would read the input by itself, whole files at a time, and knows neither which
lines an output has nor in which order they are to stand; its pipelines are therefore not used.)
"""

import logging
import math
import signal
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from transformers.utils.logging import disable_progress_bar

from advance_step.generate.engine import make_decoder
from advance_step.generate.inputs import Input
from advance_step.generate.model import load_model
from advance_step.generate.outputs import Output
from advance_step.generate.records import BadLine, Prompt
from advance_step.generate.requests import RequestMaker
from advance_step.generate.run import Run
from advance_step.generate.settings import DTYPES, Settings

INSTALL = '--ray: ray is not installed: pip install "advance-step[ray]"'
Record = Prompt | BadLine

CORES = 4  # of a worker on a CPU, where --ray-cores does not say otherwise and the machine has them
BATCHES = 4  # of a block, at most: a batch runs empty at a block's end
BLOCKS_EACH = 4  # of an input whose length is known, for each worker, at least: they finish at the same time
AHEAD = 2  # blocks that a worker has: the one that it decodes, and the next
MOST_DEATHS = 3  # of workers, over one block


@dataclass
class BlockResult:
    """What a worker makes of a block: a result for each line, in the order of the lines, and how many are errors."""

    entries: list[dict[str, Any]]
    num_failed: int
    first_failed: BadLine | None
    tokens: int


class BlockOutput(Output):
    """The output of one block, in memory."""

    def __init__(self) -> None:
        super().__init__("a block", -1)
        self.entries: list[dict[str, Any]] = []

    def write(self, entry: dict[str, Any]) -> None:
        """Keep a line."""
        self.entries.append(entry)


class Worker:
    """A model and its decoder in a process of their own: what Ray makes an actor of."""

    def start(self, settings: Settings) -> None:
        """Load the model. ValueError where it cannot be decoded."""
        disable_progress_bar()
        self.settings = settings
        dtype = DTYPES[settings.dtype]
        self.model, self.tokenizer = load_model(settings.model, dtype, print, settings.device)
        self.maker = RequestMaker(self.model, self.tokenizer, settings)
        self.decoder = make_decoder(self.model, self.tokenizer, settings, None)

    def decode(self, block: list[Record]) -> BlockResult:
        """The results of the block's lines."""
        out = BlockOutput()
        run = Run(Input("a block", iter(block), "", len(block)), out, self.settings)
        before = self.decoder.figures.tokens
        for done in self.decoder.run(run.requests(iter(block), self.decoder, self.maker)):
            for request in done:
                run.finish(request, self.model, self.tokenizer)
        return BlockResult(out.entries, run.num_failed, run.first_failed, self.decoder.figures.tokens - before)


def blocks(records: Iterator[Record], lines: int) -> Iterator[list[Record]]:
    """The records in lists of so many, each read when it is asked for."""
    while block := list(islice(records, lines)):
        yield block


class Cluster:
    """The workers, for as long as the context lasts.

    A local Ray is started, or the one that RAY_ADDRESS names is joined. Raises ValueError where ray is not installed or
    has not what one worker needs.
    """

    def __init__(self, settings: Settings) -> None:
        # A worker keeps the order of its block, by which results are told apart; the rest is done here.
        self.settings = replace(settings, ordered=True, verify=0, ray=False, ray_cores=None)
        self.cores = settings.ray_cores
        self.on_gpu = settings.device != "cpu"
        self.workers: list[Any] = []
        self.resources: dict[str, int] = {}

    def __enter__(self) -> "Cluster":
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ValueError(INSTALL) from error
        own = signal.getsignal(signal.SIGTERM)
        self.ray: Any = ray
        ray.init(include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        signal.signal(signal.SIGTERM, own)  # Ray's would end the process where it stands
        try:
            self._size()
            self.workers = [self.ray.remote(**self.resources)(Worker).remote() for _ in range(self.count)]
            self._get([worker.start.remote(self.settings) for worker in self.workers])
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            self.ray.kill(worker)
        self.ray.shutdown()

    def _size(self) -> None:
        """How many workers there is room for, and what each takes."""
        have = self.ray.cluster_resources()
        cpus, gpus = int(have.get("CPU", 0)), int(have.get("GPU", 0))
        nodes = [int(node["Resources"].get("CPU", 0)) for node in self.ray.nodes() if node["Alive"]]
        if self.on_gpu:
            self.resources, self.count = {"num_gpus": 1, "num_cpus": 1}, min(gpus, cpus)
            if not self.count:
                raise ValueError(f"--ray: expected a GPU for a worker, got a cluster of {gpus} GPUs and {cpus} cores")
            return
        cores = self.cores or min(CORES, max(nodes, default=1) or 1)
        self.resources = {"num_cpus": cores}
        self.count = sum(node // cores for node in nodes)
        if not self.count:
            raise ValueError(f"--ray-cores: expected at most the {max(nodes, default=0)} of a machine, got {cores}")

    def describe(self) -> str:
        """The workers, in words."""
        each = (
            "a GPU"
            if self.on_gpu
            else "1 core"
            if self.resources["num_cpus"] == 1
            else f"{self.resources['num_cpus']} cores"
        )
        return f"{self.count} worker{'s' if self.count > 1 else ''}, {each} each"

    def lines_of_a_block(self, total: int | None) -> int:
        """How many lines a worker is given at a time, of an input with so many."""
        most = BATCHES * self.settings.batch_size
        share = math.ceil(total / (BLOCKS_EACH * self.count)) if total else most
        return max(1, min(most, max(share, min(self.settings.batch_size, math.ceil((total or most) / self.count)))))

    def decode(self, blocks: Iterator[list[Record]]) -> Iterator[tuple[int, BlockResult]]:
        """The result of each block, with its number, as they get ready.

        A block whose worker dies is decoded again, by another one; RuntimeError where that happens over and over.
        """
        numbered = enumerate(blocks)
        waiting: deque[tuple[int, list[Record]]] = deque()  # to be decoded again
        under_way: dict[Any, tuple[int, list[Record], int]] = {}  # by Ray's reference: number, block, worker
        deaths: dict[int, int] = {}
        while True:
            for worker in range(self.count):
                while sum(at == worker for *_, at in under_way.values()) < AHEAD:
                    given = waiting.popleft() if waiting else next(numbered, None)
                    if given is None:
                        break
                    under_way[self.workers[worker].decode.remote(given[1])] = (*given, worker)
            if not under_way:
                return
            ready, _ = self.ray.wait(list(under_way), num_returns=1)
            number, block, worker = under_way.pop(ready[0])
            try:
                result = self._get(ready[0])
            except self.ray.exceptions.RayActorError as error:
                deaths[number] = deaths.get(number, 0) + 1
                if deaths[number] == MOST_DEATHS:
                    lines = f"{block[0].line} to {block[-1].line}"
                    raise RuntimeError(f"--ray: {MOST_DEATHS} workers died over lines {lines}: {error}") from error
                waiting.append((number, block))
                lost = [reference for reference, (*_, at) in under_way.items() if at == worker]
                waiting.extend(under_way.pop(reference)[:2] for reference in lost)
                self.workers[worker] = self.ray.remote(**self.resources)(Worker).remote()
                self._get(self.workers[worker].start.remote(self.settings))
            else:
                yield number, result

    def _get(self, references: Any) -> Any:
        """What the workers return; what they raise is raised here as if it were done here."""
        try:
            return self.ray.get(references)
        except self.ray.exceptions.RayTaskError as error:
            raise (error.cause if isinstance(error.cause, (ValueError, OSError)) else error) from None
