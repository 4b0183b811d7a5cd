"""A right implementation of every contract, made from the oracle: the kit must find nothing wrong with it.

What the host refuses is written out here as a table of dtypes and shapes, apart from the operators' own checks.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from advance_step.conformance.case import CONTRACTS, STATE, gather
from advance_step.conformance.oracle import Outcome, Slot, slot

LONG, INT, INTS = {torch.int64}, {torch.int32}, {torch.int32, torch.int64}
MAY_BE_ONE = ({"input_tokens", "sampled_token_ids"}, {"positions_1d", "out_clamped_positions"})


def implementation(contract: str, slot: Slot = slot, checks: bool = True) -> Callable[..., None]:
    """A function that does on any device what the oracle says, with tables read by `slot`.

    Without `checks` it refuses nothing, and does on the CPU what an accelerator does.
    """
    described = CONTRACTS[contract]

    def call(*positional: Any, **keyword: Any) -> None:
        args = dict(zip(described.positional, positional, strict=False)) | keyword
        flat: dict[str, Any] = {}
        for name, value in args.items():
            if isinstance(value, list) and name != "block_sizes":
                flat |= {f"{name}[{g}]": tensor for g, tensor in enumerate(value)}
            else:
                flat[name] = value
        tensors = {name: value for name, value in flat.items() if isinstance(value, Tensor)}
        if checks:
            refuse(contract, args, tensors)
        int32 = frozenset(name for name, tensor in tensors.items() if tensor.dtype == torch.int32)
        values = {name: tensors[name].tolist() if name in tensors else value for name, value in flat.items()}
        outcome = described.rule(gather(values), int32, slot)
        if checks and outcome.errors and next(iter(tensors.values())).device.type == "cpu":
            name, row = next(iter(outcome.errors.items()))
            raise ValueError(f"{name}: expected a value in its range, got another in row {row}")
        write(outcome, tensors)

    return call


def write(outcome: Outcome, tensors: dict[str, Tensor]) -> None:
    for name, values in outcome.written.items():
        tensor = tensors[name]
        tensor.copy_(torch.tensor(merged(values, tensor.tolist()), dtype=tensor.dtype).reshape(tensor.shape))


def merged(values: Any, old: Any) -> Any:
    """`values`, with what was there in the cells that are open."""
    if isinstance(values, list):
        return [merged(value, before) for value, before in zip(values, old, strict=True)]
    return old if values is None else values


def refuse(contract: str, args: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for name, least in scalars(contract, args).items():
        for value in args[name] if isinstance(args[name], list) else [args[name]]:
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
    for name, (dtypes, shapes) in demands(contract, args, tensors).items():
        got = tensors.get(name)
        if got is None or got.dtype not in dtypes or not any(fits(got.shape, shape) for shape in shapes):
            raise ValueError(f"{name}: expected {dtypes} {shapes}, got {got}")
    device = next(iter(tensors.values())).device
    for name, tensor in tensors.items():
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    written = {name for name in tensors if name.split("[")[0] in WRITTEN[contract]}
    for (a, x), (b, y) in combinations(tensors.items(), 2):
        same = {a, b} in MAY_BE_ONE and x.data_ptr() == y.data_ptr()
        if {a, b} & written and not same and cells_of(x) & cells_of(y):
            raise ValueError(f"{a} and {b}: expected memory apart")


WRITTEN = {
    "npu": STATE,
    "vllm": STATE,
    "flashinfer": (*STATE, "paged_kv_indices", "paged_kv_indptr", "paged_kv_last_page_len", "block_table_bound"),
    "eagle": ("seq_lens", "out_clamped_positions", "out_slot_mapping"),
    "until-stop": (*STATE[:3], "slot_mappings", "status", "output_tokens", "num_generated"),
    "slot-mapping": ("slot_mapping",),
}


def fits(shape: tuple[int, ...], wanted: tuple[int | range | None, ...]) -> bool:
    """A range takes the sizes in it, None takes any."""
    return len(shape) == len(wanted) and all(
        want is None or (size in want if isinstance(want, range) else size == want)
        for size, want in zip(shape, wanted, strict=True)
    )


def cells_of(tensor: Tensor) -> set[int]:
    index = torch.zeros(tensor.shape, dtype=torch.int64)
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        shape = [size if d == axis else 1 for d in range(tensor.dim())]
        index = index + (torch.arange(size) * stride).reshape(shape)
    return {tensor.data_ptr() + tensor.element_size() * i for i in index.flatten().tolist()}


def scalars(contract: str, a: dict[str, Any]) -> dict[str, int]:
    if contract == "npu":
        return {"num_seqs": 1, "num_queries": 1, "block_size": 1}
    if contract == "eagle":
        least = {"block_size": 1, "max_model_len": 1}
        return least | ({"input_batch_size": a["positions_1d"].size(0)} if "input_batch_size" in a else {})
    if contract == "slot-mapping":
        least = {"block_size": 1, "cp_world_size": 1, "cp_rank": 0, "cp_interleave": 1}
        return {name: value for name, value in least.items() if name in a}
    return {"block_sizes": 1} if contract == "until-stop" else {"num_seqs": 0, "num_queries": 0, "block_size": 1}


def demands(contract: str, a: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, tuple[set, list[tuple]]]:
    """Each tensor's dtypes and shapes."""
    if contract == "eagle":
        n = a["positions_1d"].size(0)
        at_least = range(n, 2**63 - 1)
        return {
            "positions_1d": (LONG, [(n,)]),
            "block_table_tensor": (INTS, [(at_least, None)]),
            "seq_lens": (INTS, [(at_least,)]),
            "out_clamped_positions": (LONG, [(at_least,)]),
            "out_slot_mapping": (LONG, [(range(a.get("input_batch_size", n), 2**63 - 1),)]),
        }
    if contract == "until-stop":
        n = a["input_tokens"].size(0)
        if not len(a["slot_mappings"]) == len(a["block_tables"]) == len(a["block_sizes"]) > 0:
            raise ValueError("block_sizes: expected one for each slot mapping and block table")
        groups = range(len(a["slot_mappings"]))
        return (
            {
                name: (LONG, [(n,)])
                for name in ("input_tokens", "input_positions", *(f"slot_mappings[{g}]" for g in groups))
            }
            | {name: (INTS, [(n,)]) for name in ("seq_lens", "max_seq_lens", "num_generated")}
            | {f"block_tables[{g}]": (INTS, [(n, None)]) for g in groups}
            | {"sampled_token_ids": (INTS, [(n,), (n, 1)]), "status": (INT, [(n,)])}
            | {"output_tokens": (LONG, [(n, None)]), "stop_token_ids": (LONG, [(None,)])}
        )
    if contract == "slot-mapping":
        size, world_size = a["block_size"], a.get("cp_world_size", 1)
        if size * world_size >= 2**63 or a.get("cp_rank", 0) >= world_size or size % a.get("cp_interleave", 1):
            raise ValueError("block_size, cp_world_size, cp_rank, cp_interleave: expected ranks that share a page")
        requests = a["query_start_loc"].numel() - 1
        return {
            "query_start_loc": (INTS, [(range(1, 2**63 - 1),)]),
            "positions": (INTS, [(None,)]),
            "block_table": (INTS, [(range(max(requests, 0), 2**63 - 1), None)]),
            "slot_mapping": (LONG, [(None,)]),
        }
    rows, live, ints = a["num_seqs"], a["num_queries"], LONG if contract == "npu" else INTS
    state, sampled = [(rows,)], [(live, 1)] if contract == "npu" else [(live,), (live, 1)]
    found = {}
    if contract == "npu" and ("spec_token" in a or "accepted_num" in a):
        width = 1 + a["spec_token"].size(1)  # a KeyError if it is not given: an error, as demanded
        state, sampled = [(rows, width), (rows * width,)], [(rows, width)]
        found = {"spec_token": (LONG, [(rows, range(1, 2**63 - 1))]), "accepted_num": (LONG, [(rows,)])}
        if live != rows:
            raise ValueError("num_queries: expected num_seqs")
    elif live > rows or (contract == "npu" and live == rows):
        raise ValueError(f"num_queries: expected less than num_seqs={rows}, got {live}")
    if contract == "flashinfer":
        found = {name: (INT, [(rows,)]) for name in ("paged_kv_last_page_len", "block_table_bound")}
        found |= {"paged_kv_indptr": (INT, [(rows + 1,)]), "paged_kv_indices": (INT, [(None,)])}
    columns = range(1, 2**63 - 1) if contract == "npu" else None
    return found | {
        "input_tokens": (LONG, state),
        "sampled_token_ids": (ints, sampled),
        "input_positions": (LONG, state),
        "seq_lens": (ints, state),
        "slot_mapping": (LONG, state),
        "block_tables": (ints, [(rows, columns)]),
    }
