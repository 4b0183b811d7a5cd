"""A job on many machines: Ray's actors, an engine each, decode blocks of lines; this process reads and writes.

Lines are read here, as workers get free, and results written here, so that a job on Ray has the same input, output,
header and lock as any other. (Ray Data is not used: where a machine is lost, it would run the task that read the input
again, and the lines of a pipe come only once.)
"""

import logging
import math
import os
import re
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass, field, replace
from typing import Any

from advance_step.generate.interrupts import Terminated
from advance_step.generate.ray_worker import BlockResult, Worker
from advance_step.generate.records import BadLine, Prompt
from advance_step.generate.screen import say
from advance_step.generate.settings import Settings

INSTALL = '--ray: ray is not installed: pip install "advance-step[ray]"'
Record = Prompt | BadLine

CORES = 4  # of a worker on a CPU, where --ray-cores does not say otherwise and the machine has them
BATCHES = 4  # of a block, at most: a batch runs empty at a block's end
BLOCKS_EACH = 4  # of an input whose length is known, for each worker, at least: they finish at the same time
AHEAD = 2  # blocks that a worker has: the one that it decodes, and the next
MOST_DEATHS = 3  # of workers over one block, and of workers that start, in a row
LINES_SECONDS = 0.02  # between two looks at an input whose next line is not there yet, while workers are busy
ROOM_SECONDS = 10.0  # between two looks at the cluster, while no worker runs


class Blocks:
    """Records in lists of `lines`, each read when it is asked for.

    A record is None where the input's next line is not there yet.
    """

    def __init__(self, records: Iterator[Record | None], lines: int) -> None:
        self.records = records
        self.lines = lines
        self.ended = False
        self._gathered: list[Record] = []

    def next(self, hurry: bool) -> list[Record] | None:
        """The next list; None at the end, and where its lines are not all there yet. In a hurry, those that are do."""
        while len(self._gathered) < self.lines and not self.ended:
            try:
                record = next(self.records)
            except StopIteration:
                self.ended = True
                break
            if record is None:
                if hurry:
                    break
                return None
            self._gathered.append(record)
        block, self._gathered = self._gathered, []
        return block or None


@dataclass
class Block:
    """Lines that a worker decodes together. deaths: of workers, while they did."""

    records: list[Record]
    deaths: int = 0

    def __str__(self) -> str:
        first, last = self.records[0].line, self.records[-1].line
        return f"line {first}" if first == last else f"lines {first} to {last}"


@dataclass(eq=False)
class Member:
    """A worker as the cluster sees it: whether its start has returned, and the blocks that it has, oldest first."""

    actor: Any
    started: bool = False
    blocks: list[Block] = field(default_factory=list)


class Cluster:
    """The workers, for as long as the context lasts.

    A local Ray is started, or the one that RAY_ADDRESS names is joined. Raises ValueError where ray is not installed or
    has not what one worker needs, and ConnectionError where it cannot be started or joined. What Ray itself raises
    within the context leaves it as a ChildProcessError.
    """

    def __init__(self, settings: Settings) -> None:
        # A worker keeps the order of its block, by which results are told apart; the rest is done here.
        self.settings = replace(settings, ordered=True, verify=0, ray=False, ray_cores=None)
        self.path = settings.model and os.path.abspath(settings.model)  # workers stand elsewhere
        self.cores = settings.ray_cores
        self.on_gpu = settings.device != "cpu"
        self.count = 0  # of workers that there are to be
        self.needs: dict[str, int] = {}  # of one of them, by Ray's name
        self.members: list[Member] = []  # those that start or run
        self.failed_starts = 0  # in a row, of the last of which it is said why
        self.why_failed = ""
        self.again: deque[Block] = deque()  # of workers that died
        self.asked: dict[Any, tuple[Member, Block | None]] = {}  # by Ray's reference; None: to start
        self.remarked = False
        self.stdout = redirect_stdout(sys.stderr)  # Ray prints there what befalls it; results may go to the real one

    def __enter__(self) -> "Cluster":
        try:
            import ray
        except ModuleNotFoundError as error:
            raise ValueError(INSTALL) from error
        self.ray: Any = ray
        self.stdout.__enter__()
        try:
            self._join()
            self._size()
        except BaseException as error:
            self.__exit__(type(error), error)
            raise
        return self

    def __exit__(self, kind: object = None, error: object = None, traceback: object = None) -> None:
        for member in self.members:
            self._kill(member)
        self.ray.shutdown()
        self.stdout.__exit__(None, None, None)
        if isinstance(error, self.ray.exceptions.RayError):
            raise ChildProcessError(f"--ray: {_in_one_line(error)}") from error

    def _join(self) -> None:
        own = signal.getsignal(signal.SIGTERM)
        try:
            address = os.environ.get("RAY_ADDRESS") or "local"  # without one, Ray would join any that runs here
            self.ray.init(address, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
        except SystemExit as error:  # what Ray makes of SIGTERM
            raise Terminated from error
        except Exception as error:  # of whatever kind: Ray's own are of many
            raise ConnectionError(f"--ray: {_in_one_line(error)}") from error
        finally:
            signal.signal(signal.SIGTERM, own)

    def _size(self) -> None:
        """How many workers there is room for, and what each takes."""
        machines = self._machines()
        most = max((machine.get("CPU", 0) for machine in machines), default=0)
        cores = 1 if self.on_gpu else self.cores or min(CORES, max(1, most))
        self.needs = {"CPU": cores} | ({"GPU": 1} if self.on_gpu else {})
        self.count = self._room(machines)
        if not self.count and self.on_gpu:
            gpus, cpus = (sum(machine.get(name, 0) for machine in machines) for name in ("GPU", "CPU"))
            raise ValueError(f"--ray: expected a GPU for a worker, got a cluster of {gpus} GPUs and {cpus} cores")
        if not self.count:
            raise ValueError(f"--ray-cores: expected at most the {most} of a machine, got {cores}")

    def _machines(self) -> list[dict[str, int]]:
        """What each machine that is there has, whoever uses it now."""
        alive = (node["Resources"] for node in self.ray.nodes() if node["Alive"])
        return [{name: int(resources.get(name, 0)) for name in ("CPU", "GPU")} for resources in alive]

    def _room(self, machines: list[dict[str, int]]) -> int:
        """How many workers the machines could have."""
        return sum(min(machine[name] // need for name, need in self.needs.items()) for machine in machines)

    def describe(self) -> str:
        """The workers, in words."""
        cores = self.needs["CPU"]
        each = "a GPU" if self.on_gpu else "1 core" if cores == 1 else f"{cores} cores"
        return f"{self.count} worker{'s' if self.count > 1 else ''}, {each} each"

    def lines_of_a_block(self, total: int | None) -> int:
        """How many lines a worker is given at a time, of an input with so many."""
        most = BATCHES * self.settings.batch_size
        share = math.ceil(total / (BLOCKS_EACH * self.count)) if total else most
        return max(1, min(most, max(share, min(self.settings.batch_size, math.ceil((total or most) / self.count)))))

    def decode(self, blocks: Blocks) -> Iterator[tuple[list[Record], BlockResult]]:
        """Each block's records and what was made of them, as they get ready.

        A worker that dies is replaced as soon as there is room, and its blocks are decoded again. ChildProcessError
        where workers die over and over, over one block or as they start, and where there is no room for any.
        """
        while True:
            self._start_workers()
            lines_are_there = self._hand_out(blocks)
            if blocks.ended and not self.again and not any(member.blocks for member in self.members):
                return
            reference = self._wait(ROOM_SECONDS if lines_are_there else LINES_SECONDS)
            if reference is None:
                continue
            member, block = self.asked.pop(reference)
            try:
                result = self.ray.get(reference)
            except self.ray.exceptions.RayTaskError as error:
                raise error.cause from error  # as if it were done here
            except self.ray.exceptions.RayError as error:
                self._bury(member, error)
                continue
            if block is None:
                self._started(member, result)
                continue
            member.blocks.remove(block)
            self.failed_starts = 0
            yield block.records, result

    def _start_workers(self) -> None:
        """As many as are missing; none any more, for now, where they die at it."""
        while len(self.members) < self.count and self.failed_starts < MOST_DEATHS:
            takes = {f"num_{name.lower()}s": need for name, need in self.needs.items()}
            member = Member(self.ray.remote(**takes)(Worker).remote())
            self.members.append(member)
            self.asked[member.actor.start.remote(self.settings, self.path)] = (member, None)
        if not self.members:
            many = f"{self.failed_starts} died in a row as they started"
            raise ChildProcessError(f"--ray: no worker is left, {many}: {self.why_failed}")

    def _started(self, member: Member, remarks: list[str]) -> None:
        """A worker is there: it gets blocks from now on. What it has to say, it says for all of them."""
        member.started = True
        if not self.remarked:
            for remark in remarks:
                say(remark)
        self.remarked = True

    def _hand_out(self, blocks: Blocks) -> bool:
        """Give workers that have fewer than AHEAD the next blocks, idle ones first; False where lines are not there."""
        for held in range(AHEAD):
            for member in self.members:
                if not member.started or len(member.blocks) != held:
                    continue
                if self.again:
                    block = self.again.popleft()
                elif records := blocks.next(hurry=not held):
                    block = Block(records)
                else:
                    return blocks.ended
                member.blocks.append(block)
                self.asked[member.actor.decode.remote(block.records)] = (member, block)
        return True

    def _wait(self, seconds: float) -> Any:
        """What was asked for and is ready; None after so many seconds. ChildProcessError where no worker can come."""
        ready, _ = self.ray.wait(list(self.asked), num_returns=1, timeout=seconds)
        if ready:
            return ready[0]
        if not any(member.started for member in self.members) and not self._room(self._machines()):
            raise ChildProcessError("--ray: no worker is left, and no machine that has room for one")
        return None

    def _bury(self, member: Member, error: Exception) -> None:
        """A worker is dead, or cannot be reached: what it had is decoded again, by others."""
        self._kill(member)
        self.members.remove(member)
        self.asked = {reference: asked for reference, asked in self.asked.items() if asked[0] is not member}
        self.again.extend(member.blocks)
        why = _in_one_line(error)
        if not member.started:
            self.failed_starts += 1
            self.why_failed = why
            say(f"--ray: a worker died as it started: {why}")
            return
        block = member.blocks[0]
        block.deaths += 1
        if block.deaths == MOST_DEATHS:
            raise ChildProcessError(f"--ray: {MOST_DEATHS} workers died over {block}: {why}")
        say(f"--ray: a worker died, {block} will be decoded again: {why}")

    def _kill(self, member: Member) -> None:
        with suppress(self.ray.exceptions.RayError):  # it may be dead
            self.ray.kill(member.actor)


def _in_one_line(error: BaseException) -> str:
    plain = re.sub(r"\x1b\[\d+m", "", str(error))  # without Ray's colours
    return " ".join(plain.split())
