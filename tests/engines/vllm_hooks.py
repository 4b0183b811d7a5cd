"""What the tests run inside vLLM's worker process, by `LLM.collective_rpc`: our operators in or out, calls timed.

A module of its own, so that a worker process can import it.
"""

from __future__ import annotations

import os
import time
from collections import defaultdict
from typing import Any

import torch
import vllm.v1.spec_decode.llm_base_proposer as proposer
from vllm.v1.worker.block_table import BlockTable

from advance_step.plugins import vllm as plugin

EAGLE = "eagle_step_update_slot_mapping_and_metadata"

_untimed: tuple[Any, Any] = (None, None)
_times: defaultdict[str, list[float]] = defaultdict(list)  # microseconds a call, by what was called


def process(worker: Any) -> int:
    return os.getpid()


def is_patched(worker: Any) -> bool:
    return plugin.is_patched()


def served(worker: Any) -> dict[str, int]:
    return dict(plugin.served)


def drafts_at_the_models_length(worker: Any) -> list[list[list[int]]]:
    """Positions, lengths and slots that vLLM's own function gives, and ours, where a draft passes the model's length.

    vLLM 0.32 has this rule, but drafts for no batch with a row that could get there.
    """
    results = []
    for step in (plugin.unpatch, plugin.patch):
        step()
        positions, seq_lens = torch.tensor([3, 254, 255, 31]), torch.tensor([4, 255, 256, 32], dtype=torch.int32)
        block_table = torch.arange(4 * 8, dtype=torch.int32).view(4, 8)
        slots = torch.full((6,), -9)
        getattr(proposer, EAGLE)(
            positions_1d=positions,
            block_table_tensor=block_table,
            seq_lens=seq_lens,
            block_size=32,
            max_model_len=256,
            out_clamped_positions=positions,
            out_slot_mapping=slots,
            input_batch_size=6,
        )
        results.append([positions.tolist(), seq_lens.tolist(), slots.tolist()])
    return results


def begin(worker: Any, patched: bool) -> None:
    """From here on calls go to our operators, or to vLLM's own, and are timed."""
    global _untimed
    (plugin.patch if patched else plugin.unpatch)()
    plugin.served.clear()
    _times.clear()
    _untimed = slots, eagle = BlockTable.compute_slot_mapping, getattr(proposer, EAGLE)

    def timed_slots(self: Any, num_reqs: int, query_start_loc: Any, positions: Any) -> None:
        start = time.perf_counter()
        slots(self, num_reqs, query_start_loc, positions)
        elapsed = time.perf_counter() - start
        kind = "one token a request" if len(positions) == num_reqs else "prefill, or tokens of a draft"
        _times[f"compute_slot_mapping, {kind}"].append(elapsed * 1e6)

    def timed_eagle(**arguments: Any) -> None:
        start = time.perf_counter()
        eagle(**arguments)
        _times[EAGLE].append((time.perf_counter() - start) * 1e6)

    BlockTable.compute_slot_mapping = timed_slots
    setattr(proposer, EAGLE, timed_eagle)


def end(worker: Any) -> dict[str, Any]:
    """No more timing; what was served and timed since `begin`."""
    BlockTable.compute_slot_mapping = _untimed[0]
    setattr(proposer, EAGLE, _untimed[1])
    return {"served": dict(plugin.served), "times": dict(_times)}
