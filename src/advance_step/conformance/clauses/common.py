"""What the clauses of several contracts are made of: tensors and tables, calls that must be refused, sentences."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from random import Random
from typing import Any

from advance_step.conformance.case import Case, Cells

BLOCK_SIZE = 16

# Sentences that stand in more than one contract.
ERROR = "an error before anything is written"
BAD_VALUE = "CPU: an error before anything is written; accelerator: that row gets slot -1"
NAMED = "an error names the argument, what was expected and what came"
NEGATIVE_PAGE = 'a negative page id is "no page": slot -1, on every device'
SLOT_64 = "slot arithmetic is 64-bit everywhere, whatever the tables' dtype"
TABLE_STRIDES = "block_tables: any strides"
VECTOR_STRIDES = "vectors of any positive stride; what lies between is not written"
SHARED_MEMORY = f"shared memory between arguments. {ERROR}"
ONE_DEVICE = f"all tensors on one device. {ERROR}"


def vector(values: list[int], dtype: str = "int64", stride: int = 1) -> Cells:
    """[n], also for n = 0."""
    return Cells(values, dtype, (len(values),), (stride,))


def column(values: list[int], dtype: str = "int64", stride: int = 1) -> Cells:
    """[n, 1], also for n = 0; `stride` cells from row to row."""
    return Cells([[value] for value in values], dtype, (len(values), 1), (stride, 1))


def draw(rng: Random, count: int, most: int) -> list[int]:
    """`count` numbers in [1, most): what an argument holds before it is written."""
    return [rng.randrange(1, most) for _ in range(count)]


def distinct_pages(rng: Random, rows: int, columns: int) -> list[list[int]]:
    """A block table in which no page id occurs twice."""
    ids = rng.sample(range(1, 4 * rows * columns + 2), rows * columns)
    return [ids[row * columns : (row + 1) * columns] for row in range(rows)]


def some_negative_pages(rng: Random, rows: int) -> list[list[int]]:
    """A table of two columns whose rows 1, 2 and 3 have a page that is none."""
    pages = distinct_pages(rng, rows, 2)
    pages[1][1] = pages[2][0] = -1
    pages[3][0] = -7
    return pages


def change(case: Case, /, **args: Any) -> Case:
    """`case` with other arguments, or with more."""
    return replace(case, args=case.args | args)


def refuse(case: Case, names: tuple[str, ...] = (), /, **args: Any) -> Case:
    """`case` with arguments in which the host must see a fault, and name one of `names`."""
    return replace(case, args=case.args | args, refused=True, names=names)


def refuse_dtypes(case: Case, wrong: Iterable[tuple[str, str]]) -> list[Case]:
    """A call for each (argument, dtype that it must not have)."""
    return [refuse(case, **{name: recast(case.args[name], dtype)}) for name, dtype in wrong]


def refuse_sizes(case: Case, names: Iterable[str], sizes: Iterable[int]) -> list[Case]:
    """A call for each argument with each number of rows that it must not have."""
    return [refuse(case, **{name: resized(case.args[name], size)}) for name in names for size in sizes]


def refuse_device(case: Case, name: str) -> list[Case]:
    """The call with argument `name` on another device."""
    return [refuse(case, **{name: replace(case.args[name], device="meta")})]


def recast(cells: Cells, dtype: str) -> Cells:
    return replace(cells, dtype=dtype)


def resized(cells: Cells, size: int) -> Cells:
    """`cells` with `size` rows, the new ones equal to the last."""
    shape = None if cells.shape is None else (size, *cells.shape[1:])
    return replace(cells, values=(cells.values + cells.values[-1:] * size)[:size], shape=shape)


def tensors(case: Case) -> list[str]:
    """The names of the arguments that are tensors with memory of their own."""
    return [name for name, value in case.args.items() if isinstance(value, Cells)]
