"""The faults of published kernels, each as the rule that it follows, and the rule that explains a failure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import Any

from advance_step.conformance.case import CONTRACTS, Case, gather
from advance_step.conformance.judge import Fault
from advance_step.conformance.oracle import PAD_SLOT, Slot

Page = Callable[[list[list[int]], int, int], int]  # (table, row, column) -> page id

ROW_0 = "only row 0 has the right page"
ROWS_PAST_N = "rows past N untouched"
NTH_PAD_ROW = "every Nth pad row cleared"
LAST_COLUMN = "last column instead of no page"
NEGATIVE_PAGE = "negative page id taken for a page"
SLOT_32 = "32-bit slot"
NO_ERROR = "pad slot where the CPU must raise"


def explain(case: Case, fault: Fault) -> str | None:
    """The fewest known deviations that together give exactly what the target wrote, by name; None if none do."""
    if case.refused or not fault.after:
        return None
    contract = CONTRACTS[case.contract]
    right = contract.rule(gather(fault.before), fault.int32)
    live, rows, width = _rows(case.contract, fault.before)
    cuts = [("", live), *_untouched(case.contract, fault, live, width)]
    pads = [("", 1), *_cleared(case.contract, fault, live, rows)]
    for (slot_names, slot), cut, pad in sorted(product(_slots(fault.table_stride), cuts, pads), key=_count):
        outcome = contract.rule(gather(fault.before), fault.int32, slot)
        names = [NO_ERROR] * bool(outcome.errors) + [name for name in (*slot_names, cut[0], pad[0]) if name]
        for argument in contract.rows:
            before, written = fault.before[argument], outcome.written[argument]
            written[cut[1] * width : live * width] = before[cut[1] * width : live * width]
            if argument in contract.slots:
                for row in range(live, rows):
                    written[row] = before[row] if (row - live) % pad[1] else written[row]
        without_effect = not right.errors and all(
            outcome.written[name] == right.written[name] for name in contract.rows
        )
        if without_effect or not names:
            continue
        if all(_same(outcome.written[name], fault.after[name]) for name in contract.rows):
            return " + ".join(names)
    return None


def _count(combination: tuple[tuple[list[str], Slot], tuple[str, int], tuple[str, int]]) -> int:
    (slot_names, _), cut, pad = combination
    return len(slot_names) + bool(cut[0]) + bool(pad[0])


def _slots(stride: int) -> Iterator[tuple[list[str], Slot]]:
    """Every way to come from a position to a slot that a published kernel has, alone and with the others."""
    pages: list[tuple[str, Page]] = [
        ("", lambda table, row, column: table[row][column]),
        (ROW_0, lambda table, row, column: table[0][column]),
        (ROW_0, lambda table, row, column: table[0][column] + stride * row),
    ]
    widths: list[tuple[str, Callable[[int], int]]] = [
        ("", lambda slot: slot),
        (SLOT_32, lambda slot: (slot + 2**31) % 2**32 - 2**31),
        (SLOT_32, lambda slot: slot % 2**32),
    ]
    for (a, page_of), b, c, (d, wrap) in product(pages, ("", LAST_COLUMN), ("", NEGATIVE_PAGE), widths):
        yield [name for name in (a, b, c, d) if name], partial(_slot, page_of, bool(b), bool(c), wrap)


def _slot(
    page_of: Page,
    clamps: bool,
    negative: bool,
    wrap: Callable[[int], int],
    table: list[list[int]],
    row: int,
    position: int,
    block_size: int,
) -> int | None:
    column = min(position // block_size, len(table[row]) - 1) if clamps else position // block_size
    if not 0 <= column < len(table[row]):
        return None
    page = page_of(table, row, column)
    return wrap(page * block_size + position % block_size) if page >= 0 or negative else PAD_SLOT


def _rows(contract: str, before: dict[str, Any]) -> tuple[int, int, int]:
    """How many rows are live, how many there are, and how many cells of a flat tensor belong to one."""
    if contract == "eagle":
        live = len(before["positions_1d"])
        return live, live if before.get("input_batch_size") is None else before["input_batch_size"], 1
    if contract == "until-stop":
        return len(before["status"]), len(before["status"]), 1
    if contract == "slot-mapping":  # a row is a token
        rows = len(before["slot_mapping"])
        return min(max(before["query_start_loc"][-1], 0), rows), rows, 1
    return before["num_queries"], before["num_seqs"], len(before["seq_lens"]) // max(before["num_seqs"], 1)


def _untouched(contract: str, fault: Fault, live: int, width: int) -> Iterator[tuple[str, int]]:
    """The row from which on every live row is as before the call, if there is one."""
    row = live
    while row > 0 and all(
        fault.before[name][(row - 1) * width : row * width] == fault.after[name][(row - 1) * width : row * width]
        for name in CONTRACTS[contract].rows
    ):
        row -= 1
    if 0 < row < live:
        yield f"{ROWS_PAST_N} (N={row})", row


def _cleared(contract: str, fault: Fault, live: int, rows: int) -> Iterator[tuple[str, int]]:
    """The distance of the padding rows that were written, if the first one was and not all of them were."""
    written = [
        row
        for row in range(live, rows)
        if any(fault.before[name][row] != fault.after[name][row] for name in CONTRACTS[contract].slots)
    ]
    if written and written[0] == live and len(written) < rows - live:
        nth = written[1] - live if len(written) > 1 else rows - live
        yield f"{NTH_PAD_ROW} (N={nth if len(written) > 1 else f'{nth} or more'})", nth


def _same(expected: Any, got: Any) -> bool:
    if isinstance(expected, list):
        return all(_same(e, g) for e, g in zip(expected, got, strict=True))
    return expected is None or expected == got
