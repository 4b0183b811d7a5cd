"""Wrong implementations, written for the purpose: one for each known deviation, and some that misbehave otherwise."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from right import implementation, refuse
from torch import Tensor

from advance_step.conformance.case import CONTRACTS

Function = Callable[..., None]


def row_0_slot(table: list[list[int]], row: int, position: int, block_size: int) -> int | None:
    if not 0 <= position < len(table[0]) * block_size:
        return None
    page = table[0][position // block_size]
    return -1 if page < 0 else page * block_size + position % block_size


def last_column_slot(table: list[list[int]], row: int, position: int, block_size: int) -> int | None:
    if position < 0:
        return None
    page = table[row][min(position // block_size, len(table[row]) - 1)] if table[row] else -1
    return -1 if page < 0 else page * block_size + position % block_size


def int32_slot(table: list[list[int]], row: int, position: int, block_size: int) -> int | None:
    if not 0 <= position < len(table[row]) * block_size:
        return None
    page = table[row][position // block_size]
    if page < 0:
        return -1
    low = (page * block_size + position % block_size) & 0xFFFFFFFF
    return low - 2**32 if low >= 2**31 else low


def negative_page_slot(table: list[list[int]], row: int, position: int, block_size: int) -> int | None:
    if not 0 <= position < len(table[row]) * block_size:
        return None
    return table[row][position // block_size] * block_size + position % block_size


def undone(contract: str, rows: Callable[[int, int], list[int]]) -> Function:
    """A right implementation, but that the rows that `rows(num_queries, num_seqs)` gives stay as they were."""
    right = implementation(contract)
    names = CONTRACTS[contract].positional

    def call(*args: Any, **keyword: Any) -> None:
        by_name = dict(zip(names, args, strict=False))
        if contract == "eagle":
            live = by_name["positions_1d"].size(0)
            total = by_name.get("input_batch_size", live)
        elif contract == "slot-mapping":
            live, total = int(by_name["query_start_loc"][-1]), by_name["slot_mapping"].size(0)
        else:
            live, total = by_name["num_queries"], by_name["num_seqs"]
        written = [by_name[name] for name in CONTRACTS[contract].rows]
        before = [tensor.clone() for tensor in written]
        right(*args, **keyword)
        for tensor, old in zip(written, before, strict=True):
            keep = [row for row in rows(live, total) if row < tensor.size(0)]
            if tensor.size(0) in (live, total):  # not the flat form of the speculative mode
                tensor[keep] = old[keep]

    return call


def rows_past(contract: str, n: int) -> Function:
    return undone(contract, lambda live, total: list(range(n, live)))


def nth_pad_row(contract: str, n: int) -> Function:
    return undone(contract, lambda live, total: [row for row in range(live, total) if (row - live) % n])


def published_npu(cores: int = 40) -> Function:
    """The plain mode of the published Ascend kernel: a core a row, and every row's page from row 0, plus its stride."""
    right = implementation("npu")

    def call(
        input_tokens: Tensor,
        sampled_token_ids: Tensor,
        input_positions: Tensor,
        seq_lens: Tensor,
        slot_mapping: Tensor,
        block_tables: Tensor,
        num_seqs: int,
        num_queries: int,
        block_size: int,
        **speculative: Tensor,
    ) -> None:
        state = (input_tokens, sampled_token_ids, input_positions, seq_lens, slot_mapping, block_tables)
        if speculative:
            right(*state, num_seqs, num_queries, block_size, **speculative)
            return
        args = dict(zip(CONTRACTS["npu"].positional, (*state, num_seqs, num_queries, block_size), strict=True))
        refuse("npu", args, {name: value for name, value in args.items() if isinstance(value, Tensor)})
        right(
            *(tensor.clone() for tensor in state), num_seqs, num_queries, block_size
        )  # raises for values out of place
        for row in range(num_queries, num_seqs, cores):
            input_tokens[row], input_positions[row], slot_mapping[row] = 0, 0, -1
        for row in range(min(cores, num_queries)):
            position = int(seq_lens[row])
            page = int(block_tables[0, position // block_size]) + block_tables.stride(0) * row
            input_tokens[row] = sampled_token_ids[row, 0]
            input_positions[row] = position
            seq_lens[row] = position + 1
            slot_mapping[row] = page * block_size + position % block_size

    return call


def writes_past_the_end(contract: str) -> Function:
    right = implementation(contract)

    def call(*args: Any, **keyword: Any) -> None:
        right(*args, **keyword)
        slots = args[CONTRACTS[contract].positional.index("slot_mapping")]
        slots.as_strided((1,), (1,), slots.storage_offset() + slots.numel()).fill_(-1)

    return call


def writes_a_table(contract: str) -> Function:
    right = implementation(contract)

    def call(*args: Any, **keyword: Any) -> None:
        right(*args, **keyword)
        args[CONTRACTS[contract].positional.index("block_tables")][0, 0] += 1

    return call


def raises_too_late(contract: str) -> Function:
    """Advances what it can before it sees that the call is to be refused."""
    right, unchecked = implementation(contract), implementation(contract, checks=False)

    def call(*args: Any, **keyword: Any) -> None:
        copies = [arg.clone() if isinstance(arg, Tensor) else arg for arg in args]
        try:
            right(*copies, **keyword)
        except ValueError:
            args[CONTRACTS[contract].positional.index("input_tokens")].view(-1)[0] = 0
            raise
        unchecked(*args, **keyword)

    return call


def mistaken_slots(mistake: Callable[[dict[str, Any]], dict[str, Any]]) -> Function:
    """compute_slot_mapping done right, but of other arguments: `mistake` gives those that it takes for the call's."""
    right = implementation("slot-mapping")

    def call(*args: Any, **keyword: Any) -> None:
        names = CONTRACTS["slot-mapping"].positional
        given = dict(zip(names, args, strict=True)) | keyword
        refuse("slot-mapping", given, {name: value for name, value in given.items() if isinstance(value, Tensor)})
        right(*(tensor.clone() if isinstance(tensor, Tensor) else tensor for tensor in args), **keyword)  # may raise
        taken = given | mistake(given)
        right(*(taken.pop(name) for name in names), **taken)

    return call


def moved_borders(given: dict[str, Any], by: int) -> dict[str, Any]:
    """Every request between the first and the last begins `by` tokens later."""
    starts = given["query_start_loc"].clone()
    starts[1:-1] = (starts[1:-1] + by).clamp(0, int(starts[-1]))
    return {"query_start_loc": starts}


def counted_positions(given: dict[str, Any]) -> dict[str, Any]:
    starts = given["query_start_loc"].tolist()
    counted = given["positions"].clone()
    for begin, end in pairwise(starts):
        counted[begin:end] = torch.arange(end - begin)
    return {"positions": counted}


# What is mistaken, and the clauses that must find it.
SLOT_MISTAKES: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], set[str]]] = {
    "the next request's row at a border": (
        lambda given: moved_borders(given, -1),
        {"own-row-of-the-table", "prompts", "more-than-64x132-rows"},
    ),
    "the request's row after its border": (
        lambda given: moved_borders(given, 1),
        {"own-row-of-the-table", "prompts", "more-than-64x132-rows"},
    ),
    "a position counted from the first token": (counted_positions, {"prompts", "one-token-a-request"}),
    "the tail not written": (
        lambda given: {"slot_mapping": given["slot_mapping"][: int(given["query_start_loc"][-1])]},
        {"several-pad-rows", "more-than-48-rows", "no-rows"},
    ),
    "the tail written from the last position on": (
        lambda given: {"slot_mapping": given["slot_mapping"][: given["positions"].size(0)]},
        {"several-pad-rows", "no-rows"},
    ),
    "-1 for every pad slot": (lambda given: {"pad_slot": -1}, {"pad-slot"}),
    "rank 0 on every rank": (
        lambda given: {"cp_rank": 0},
        {"context-parallel", "context-parallel-interleave"},
    ),
    "one token at a time": (lambda given: {"cp_interleave": 1}, {"context-parallel-interleave"}),
    "the whole cache on every rank": (
        lambda given: {"cp_world_size": 1, "cp_rank": 0, "block_table": wider(given)},
        {"context-parallel", "context-parallel-interleave"},
    ),
}


def wider(given: dict[str, Any]) -> Tensor:
    """The table with each column once for each rank."""
    return given["block_table"].repeat(1, given.get("cp_world_size", 1))


def returns_a_tensor(contract: str) -> Callable[..., Tensor]:
    right = implementation(contract)

    def call(*args: Any, **keyword: Any) -> Tensor:
        right(*args, **keyword)
        return torch.empty(0)

    return call


def says_nothing(contract: str) -> Function:
    """Refuses what it must, but not in words that name the argument."""
    right = implementation(contract)

    def call(*args: Any, **keyword: Any) -> None:
        try:
            right(*args, **keyword)
        except Exception as error:
            raise ValueError("invalid argument") from error

    return call


right_eagle = implementation("eagle")


def dying_eagle(*args: Any) -> None:
    """Dies of a signal where a position is past the table, as a wild read can."""
    positions, table, _, block_size = args[:4]
    if positions.numel() and int(positions.max()) + 1 >= table.size(1) * block_size and int(positions.max()) < 4000:
        os.abort()
    right_eagle(*args)


def quitting_eagle(*args: Any) -> None:
    """Ends its process, and says that all is well."""
    os._exit(0)


published = published_npu()
eagle_without_a_guard = implementation("eagle", last_column_slot)


def noisy_eagle(*args: Any) -> None:
    """Prints from Python, past Python, and from a process of its own; the rule is right."""
    print("from Python")
    os.write(1, b"past Python\n")
    os.system("echo from a process")
    right_eagle(*args)


def hanging_eagle(*args: Any) -> None:
    """Gives no answer, and leaves a process behind that holds what it was given open."""
    if os.fork() == 0:
        time.sleep(600)
    time.sleep(600)


def exiting_eagle(*args: Any) -> None:
    raise SystemExit(0)


def interrupting_eagle(*args: Any) -> None:
    raise KeyboardInterrupt


def raising_eagle(*args: Any) -> None:
    """Raises what is no Exception."""
    raise BaseException("odd")


def meta_eagle(*args: Any) -> None:
    """Right, and leaves torch's default device on meta."""
    torch.set_default_device(None)
    right_eagle(*args)
    torch.set_default_device("meta")


def threaded_eagle(*args: Any) -> None:
    """Right, and leaves a thread that does not end."""
    threading.Thread(target=time.sleep, args=(600,)).start()
    right_eagle(*args)
