"""Calls a target once, every tensor a view into a larger buffer of sentinels, and says what is wrong afterwards."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from advance_step.conformance.case import CONTRACTS, Case, Cells, View, gather
from advance_step.conformance.oracle import Outcome
from advance_step.errors import CHECK_VALUES

GUARD = 1024  # sentinel cells on either side of a tensor: a whole block of a kernel that forgot its mask
SENTINEL = 0x5A5A5A5A  # positive: read as a page id, it gives a slot that cannot be taken for the pad slot


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in the buffer of `owner`."""

    owner: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = GUARD

    def of(self, buffers: dict[str, Tensor]) -> Tensor:
        return buffers[self.owner].as_strided(self.shape, self.strides, self.offset)


@dataclass
class Fault:
    """What is wrong and, where it is in cells that the contract writes, what the call held `before` and `after`."""

    detail: str
    before: dict[str, Any] = field(default_factory=dict)  # by name, as lists and ints
    after: dict[str, Any] = field(default_factory=dict)
    int32: frozenset[str] = frozenset()
    table_stride: int = 0


def judge(case: Case, target: Callable[..., object], device: str) -> Fault | None:
    """None if `target` does what the oracle says in every cell of every buffer; else the first thing that is wrong."""
    contract = CONTRACTS[case.contract]
    buffers, places = lay_out(case.args)
    before = {name: places[name].of(buffers).tolist() if name in places else case.args[name] for name in case.args}
    int32 = frozenset(name for name, place in places.items() if buffers[place.owner].dtype == torch.int32)
    outcome = Outcome({}) if case.refused else contract.rule(gather(before), int32)
    must_raise = case.refused or (bool(outcome.errors) and checks_data(device))
    expected = {} if must_raise else outcome.written

    held = {name: buffer.to(case.args[name].device or device, copy=True) for name, buffer in buffers.items()}
    passed = gather({name: places[name].of(held) if name in places else case.args[name] for name in case.args})
    returned, error = None, None
    try:
        returned = target(
            *(passed[name] for name in contract.positional if name in passed),
            **{name: passed[name] for name in contract.keyword if name in passed},
        )
        after = fetch(held)
    except KeyboardInterrupt:  # the user's, where the target runs in this process
        raise
    except BaseException as caught:  # a target is anybody's code: whatever it raises is a finding
        error = caught
        try:
            after = fetch(held)
        except Exception as lost:
            return Fault(f"raised {brief(error)}; the device can no longer be read: {brief(lost)}")

    wrong = first_difference(places, buffers, after, expected)
    if error is not None:
        if not must_raise:
            return Fault(f"raised {brief(error)}")
        if wrong:
            return Fault(f"raised, but had written: {wrong}; the error: {brief(error)}")
        return judge_message(error, contract.table, outcome.errors or dict.fromkeys(case.names))
    if must_raise:
        why = (
            "a call that must be refused"
            if case.refused
            else f"data in {' and '.join(outcome.errors)} that must be refused"
        )
        wrong = f"no error for {why}; " + (wrong or "nothing was written")
    elif wrong is None:
        return None if returned is None else Fault(f"returned {type(returned).__name__}, expected None")
    if first_difference(places, buffers, after, {name: None for name in outcome.written}):
        return Fault(str(wrong))  # a write out of place, which no rule of `deviations` gives
    held_after = {name: place.of(after).tolist() for name, place in places.items() if place.owner in after}
    table = places.get(contract.table)
    stride = table.strides[0] if table and len(table.strides) == 2 else 0
    return Fault(str(wrong), before, held_after, int32, stride)


def checks_data(device: str) -> bool:
    """Whether a value out of place must raise on `device`, rather than get the pad slot."""
    return torch.device(device).type == "cpu" or CHECK_VALUES


def lay_out(args: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Place]]:
    """A buffer on the CPU for every `Cells` in `args`, filled, and the place of every tensor."""
    buffers, places = {}, {}
    for name, cells in args.items():
        if isinstance(cells, Cells):
            dtype = getattr(torch, cells.dtype)
            integer = torch.int32 if dtype == torch.int32 else torch.int64
            values = torch.tensor(cells.values, dtype=integer, device="cpu").to(dtype)
            values = values.reshape(cells.shape) if cells.shape is not None else values
            strides = cells.strides or values.stride()
            reach = sum((size - 1) * stride for size, stride in zip(values.shape, strides, strict=True) if size)
            buffers[name] = torch.full((2 * GUARD + 1 + max(reach, 0),), SENTINEL, device="cpu").to(values.dtype)
            places[name] = Place(name, tuple(values.shape), tuple(strides))
            places[name].of(buffers).copy_(values)
    for name, view in args.items():
        if isinstance(view, View):
            strides = torch.empty(view.shape, device="meta").stride()
            places[name] = Place(view.of, view.shape, tuple(strides), GUARD + view.start)
    return buffers, places


def fetch(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """The buffers on the CPU, and with them any error of the device that was still on its way."""
    return {name: buffer.cpu() for name, buffer in held.items() if buffer.device.type != "meta"}


def first_difference(
    places: dict[str, Place],
    buffers: dict[str, Tensor],
    after: dict[str, Tensor],
    expected: Mapping[str, list[Any] | None],
) -> str | None:
    """The first cell of `after` that is neither as before the call nor, inside a written tensor, as `expected`.

    None, in place of a value or of all of a tensor's, is expected of what may be anything.
    """
    wanted = {name: buffers[name].clone() for name in after}
    for name, values in expected.items():
        place = places[name]
        if values is None:
            place.of(wanted).copy_(place.of(after))
            continue
        info = torch.iinfo(wanted[place.owner].dtype)
        flat = values if len(place.shape) == 1 else [cell for row in values for cell in row]
        # A value that the tensor's dtype cannot hold is not the contract's to ask for, so its cell is open too.
        is_open = [value is None or not info.min <= value <= info.max for value in flat]
        closed = [0 if o else v for o, v in zip(is_open, flat, strict=True)]
        cells = torch.tensor(closed, dtype=wanted[place.owner].dtype, device="cpu")
        mask = torch.tensor(is_open, dtype=torch.bool, device="cpu").reshape(place.shape)
        place.of(wanted).copy_(torch.where(mask, place.of(after), cells.reshape(place.shape)))
    for owner, buffer in wanted.items():
        differs = buffer != after[owner]
        if not differs.any():
            continue
        names = [name for name, place in places.items() if place.owner == owner]
        names.sort(key=lambda name: name not in expected)  # a written view of the buffer says more than its owner
        for name in names:
            found = places[name].of({owner: differs}).nonzero()
            if len(found):
                at = tuple(found[0].tolist())
                want, got = places[name].of(wanted)[at].item(), places[name].of(after)[at].item()
                count, of = len(found), places[name].of(wanted).numel()
                return f"{name}[{', '.join(map(str, at))}] is {got}, expected {want} ({count} of {of} cells wrong)"
        first = int(differs.nonzero()[0])
        return f"wrote outside {owner}: {int(differs.sum())} cells, the first {first - GUARD} cells from its beginning"
    return None


def judge_message(error: BaseException, table: str, faults: Mapping[str, int | None]) -> Fault | None:
    """The fault of an error that names none of the arguments in `faults`, or for none of those the right row.

    A position without a place may as well be said to be the table's fault.
    """
    message = str(error)
    if not faults or any(
        (name in message or (row is not None and table in message))
        and (row is None or re.search(rf"\b{row}\b", message) is not None)
        for name, row in faults.items()
    ):
        return None
    expected = " or ".join(name if row is None else f"{name} and row {row}" for name, row in faults.items())
    return Fault(f"the error does not name {expected}: {brief(error)}")


def brief(error: BaseException) -> str:
    """The error's type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:200]
