"""A Ray cluster of several machines on this one, and the processes of its workers: no other Ray's are looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import psutil  # accelerate brings it
from ray.cluster_utils import Cluster

MEMORY = {"object_store_memory": 100_000_000}


class Machines:
    """A head that no worker has room on, and beside it machines of one core each, of which each can be lost."""

    def __init__(self) -> None:
        notice_soon = {
            "health_check_initial_delay_ms": 0,
            "health_check_period_ms": 500,
            "health_check_failure_threshold": 10,
        }
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": notice_soon}
        self.cluster = Cluster(initialize_head=True, head_node_args=head | MEMORY)
        self.nodes: list[Any] = []

    def grow_to(self, count: int) -> None:
        """As many machines as that."""
        while len(self.nodes) < count:
            self.nodes.append(self.cluster.add_node(num_cpus=1, **MEMORY))
        self.cluster.wait_for_nodes(timeout=120)

    def lose(self, node: Any) -> None:
        """A machine goes as it would with its power: its Ray and its workers at once."""
        lost = [worker for worker in workers(psutil.Process()) if node is self.of(worker)]
        self.nodes.remove(node)
        self.cluster.remove_node(node, allow_graceful=False)
        for worker in lost:
            with suppress(psutil.NoSuchProcess):
                worker.kill()

    def of(self, worker: psutil.Process) -> Any:
        """The machine that a worker is on."""
        above = {parent.pid for parent in worker.parents()}
        return next(
            node for node in self.nodes if any(info.process.pid in above for info in node.all_processes["raylet"])
        )


def workers(root: psutil.Process) -> list[psutil.Process]:
    """Workers that a process has started, through Ray."""
    found = []
    for process in root.children(recursive=True):
        with suppress(psutil.NoSuchProcess, IndexError):  # gone meanwhile
            if process.cmdline()[0].startswith("ray::Worker"):
                found.append(process)
    return found


def stopped_while_it_decodes(root: psutil.Process) -> psutil.Process | None:
    """A worker that stands still in the middle of a block, where one was found at it; Ray's title says what it does."""
    for worker in workers(root):
        with suppress(psutil.NoSuchProcess, IndexError):
            worker.suspend()
            wait_for(lambda worker=worker: worker.status() == psutil.STATUS_STOPPED)
            if worker.cmdline()[0] == "ray::Worker.decode":
                return worker
            worker.resume()
    return None


def wait_for(found: Callable[[], Any], seconds: float = 240) -> Any:
    """What a function finds, as soon as it is something."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if result := found():
            return result
        time.sleep(0.02)
    raise AssertionError(f"it did not happen in {seconds} seconds")
