"""Turns a refused call into "argument, expected, got".

`Call` holds one call's arguments by name and has a method for each kind of demand that a contract makes. The contracts
themselves, a line per argument, are in `_contracts.py`.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

# Whether values in tensors are to be checked on accelerators too, where that waits for the device.
CHECK_VALUES = os.environ.get("ADVANCE_STEP_CHECK", "0") not in ("", "0")


class DtypeError(TypeError, ValueError):
    """An argument has a dtype that the operator's contract does not allow, or is no tensor."""


class Call:
    """One call's arguments by name; each method refuses what does not meet one demand, in the caller's words.

    A shape is written as the documents write it: ``"[num_seqs, W]"``. A symbol in it stands for the int argument of
    that name or, if there is none, for the size with which it first occurs. ``">= batch_size"`` asks for at least that
    size. A list of tensors counts as the arguments ``name[0]``, ``name[1]``, ...
    """

    def __init__(self, operator: str, arguments: dict[str, object]) -> None:
        self.operator = operator
        self.arguments: dict[str, object] = {}
        for name, value in arguments.items():
            self.arguments[name] = value
            if isinstance(value, list | tuple):
                self.arguments |= {f"{name}[{i}]": item for i, item in enumerate(value)}
        # An int, or what stands for one while a graph is traced.
        self.sizes: dict[str, Any] = {n: v for n, v in self.arguments.items() if isinstance(v, int | torch.SymInt)}

    def __getitem__(self, name: str) -> Tensor:
        value = self.arguments[name]
        assert isinstance(value, Tensor)
        return value

    @property
    def tensors(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.arguments.items() if isinstance(value, Tensor)}

    def named(self, names: Collection[str]) -> dict[str, Tensor]:
        """The tensors of the arguments called `names`, those in lists too."""
        return {name: value for name, value in self.tensors.items() if name.split("[")[0] in names}

    def refusal(self, argument: str, expected: str, got: object, kind: type[ValueError] = ValueError) -> ValueError:
        called = ", ".join(f"{name}={_describe(value)}" for name, value in self.arguments.items())
        return kind(f"{self.operator}: {argument}: expected {expected}, got {got}\n  in {self.operator}({called})")

    def demand(self, name: str, holds: bool, expected: str) -> None:
        if not holds:
            raise self.refusal(name, expected, self.sizes.get(name, _describe(self.arguments[name])))

    def scalar(self, name: str, at_least: int) -> None:
        if name not in self.sizes:
            raise self.refusal(name, "an int", _describe(self.arguments[name]), DtypeError)
        self.demand(name, self.sizes[name] >= at_least, f"{name} >= {at_least}")
        self.demand(name, self.sizes[name] <= 2**63 - 1, f"{name} < 2**63")

    def list(self, name: str) -> int:
        """The length of a list."""
        value = self.arguments[name]
        if not isinstance(value, list | tuple):
            raise self.refusal(name, "a list", _describe(value), DtypeError)
        return len(value)

    def tensor(self, name: str, dtypes: tuple[torch.dtype, ...], *shapes: str) -> None:
        """Refuses `name` unless it has one of `dtypes` and one of `shapes`."""
        value = self.arguments[name]
        right_dtype = isinstance(value, Tensor) and value.dtype in dtypes and not _kind(value)
        if isinstance(value, Tensor) and right_dtype and any(self._fits(value, shape) for shape in shapes):
            return
        symbols = " ".join(shapes).translate(str.maketrans("[],", "   ")).split()
        known = ", ".join(f"{s}={self.sizes[s]}" for s in dict.fromkeys(symbols) if s in self.sizes)
        expected = f"{' or '.join(map(_name, dtypes))} {' or '.join(shapes)}" + (f" with {known}" if known else "")
        raise self.refusal(name, expected, _describe(value), ValueError if right_dtype else DtypeError)

    def same_dtype(self, name: str, other: str) -> None:
        if self[name].dtype != self[other].dtype:
            expected = f"{_name(self[other].dtype)}, the dtype of {other}"
            raise self.refusal(name, expected, _describe(self[name]), DtypeError)

    def one_device(self) -> None:
        (first, device), *others = [(name, value.device) for name, value in self.tensors.items()]
        for name, other in others:
            if other != device:
                raise self.refusal(name, f"a tensor on {device}, as {first} is", f"one on {other}")

    def own_memory(self, written: Collection[str], same: Collection[tuple[str, str]] = ()) -> None:
        """Refuses an argument that is written and shares memory with itself or with another argument.

        Each pair in `same` may start at one address with one stride: element by element the same memory.
        """
        tensors = self.tensors
        before: set[str] = set()
        for name in self.named(written):
            before.add(name)
            if _meets_itself(tensors[name]):
                expected = "elements that lie apart in memory, since they are written"
                raise self.refusal(name, expected, f"strides {tuple(tensors[name].stride())}")
            for other in [n for n in tensors if n not in before]:
                if _meets(tensors[name], tensors[other]) and not (
                    (name, other) in same and _is_start_of(tensors[other], tensors[name])
                ):
                    raise self.refusal(
                        name, f"memory of its own, since it is written, apart from {other}", "shared memory"
                    )

    def positions(self, name: str, rows: int, table: str, steps: str | None = None) -> None:
        """Refuses data: a row of `name` (of the first `rows`) whose next position has no place in block table `table`.

        The next position is the length that stands in `name`; or, where `steps` names an argument, 1 + that + `name`.
        """
        lens, (table_rows, columns) = self[name], self[table].shape
        largest, limit = torch.iinfo(lens.dtype).max, columns * self.sizes["block_size"]
        lens = lens.view(rows, -1) if steps else lens[:rows, None]  # [rows, T] or [rows, 1]
        step = self[steps][:, None] if steps else torch.zeros_like(lens)
        moved = lens + step
        overflowed = ((lens ^ moved) & (step ^ moved)) < 0
        least = -1 if steps else 0
        bad = overflowed | (moved < least) | (moved >= min(limit, largest) + least)
        if (at := first(bad)) is not None:
            bound = f"W * block_size with {table} [{table_rows}, W], W={columns}, block_size={self.sizes['block_size']}"
            expected = f"0 <= position < {bound if limit <= largest else largest} in every live row"
            position = int(lens[at]) + int(step[at[0], 0]) - least
            raise self.refusal(name, expected, f"position {position} in row {at[0]}")

    def _fits(self, value: Tensor, shape: str) -> bool:
        symbols = shape.strip("[]").split(", ")
        return value.dim() == len(symbols) and all(map(self._is, symbols, value.shape))

    def _is(self, symbol: str, size: int) -> bool:
        if symbol.startswith(">= "):
            return bool(size >= self.sizes[symbol[3:]])
        return bool(size == (int(symbol) if symbol.isdigit() else self.sizes.setdefault(symbol, size)))


def first(bad: Tensor) -> tuple[int, ...] | None:
    """The index of the first True in `bad`, or None. On an accelerator this waits for the device."""
    found = bad.nonzero()
    return tuple(found[0].tolist()) if found.numel() else None


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        kind = f" ({_kind(value)})" if _kind(value) else ""
        return f"{_name(value.dtype)} {list(value.shape)} on {value.device}{kind}"
    return repr(value) if value is None or isinstance(value, int) else type(value).__name__


def _kind(value: Tensor) -> str:
    """What keeps the values of a tensor from lying in its memory at its strides, or ""."""
    if value.layout != torch.strided:
        return _name(value.layout)
    return "negated view" if value.is_neg() else ""


def _span(value: Tensor) -> tuple[int, int]:
    """The addresses [begin, end) that the tensor's elements lie in; empty for one without elements or memory."""
    begin = value.data_ptr()
    if value.numel() == 0 or begin == 0:
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return begin, begin + (last + 1) * value.element_size()


def _meets(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share memory; columns of one buffer, equally strided, are known to lie apart."""
    (a_begin, a_end), (b_begin, b_end) = _span(a), _span(b)
    if a_begin == a_end or b_begin == b_end or a_end <= b_begin or b_end <= a_begin:
        return False
    step = a.stride(0) * a.element_size()
    if a.dim() == b.dim() == 1 and step > 0 and step == b.stride(0) * b.element_size():
        apart = (b_begin - a_begin) % step
        return apart < a.element_size() or step - apart < b.element_size()
    return True


def _meets_itself(value: Tensor) -> bool:
    if value.numel() == 0:
        return False
    reach = 0
    for stride, size in sorted((s, n) for s, n in zip(value.stride(), value.shape, strict=True) if n > 1):
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def _is_start_of(part: Tensor, whole: Tensor) -> bool:
    """Whether element i of `part`, [n] or [n, 1], is element i of `whole`."""
    same_place = part.data_ptr() == whole.data_ptr() and part.stride(0) == whole.stride(0)
    return same_place and part.dtype == whole.dtype and part.numel() == part.size(0)
