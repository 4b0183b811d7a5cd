"""Properties of every operator, on the executor that serves the CPU, against the plain-Python oracle.

The values are hostile: lengths and page ids at the ends of their types, tensors of no elements, pages of 1 and of 2**31
tokens. `judge` also holds the sentinels around every buffer, the errors' words, and what must not have been written.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

import advance_step
from advance_step.conformance import CONTRACTS
from advance_step.conformance.case import Case
from advance_step.conformance.clauses.eagle import eagle_case
from advance_step.conformance.clauses.npu import spec_case
from advance_step.conformance.clauses.plain import step_case
from advance_step.conformance.clauses.slot_mapping import slot_case
from advance_step.conformance.clauses.until_stop import stop_case
from advance_step.conformance.judge import judge
from advance_step.conformance.oracle import INT32_MAX, INT64_MAX

BLOCK_SIZES = st.sampled_from([1, 2, 3, 16, 128, 2**31])
DTYPES = st.sampled_from(["int32", "int64"])
EXAMPLES = settings(max_examples=150, derandomize=True, deadline=None, database=None)


def ends(dtype: str) -> tuple[int, int]:
    return (-(2**31), INT32_MAX) if dtype == "int32" else (-(2**63), INT64_MAX)


@st.composite
def lengths(draw: st.DrawFn, rows: int, dtype: str, room: int, hostile: bool) -> list[int]:
    """Lengths with a place in a table of `room` tokens and, if `hostile`, some anywhere in their type."""
    low, high = ends(dtype)
    last = max(min(room, high) - 1, 0)
    near = st.sampled_from([0, last // 2, last]) | st.integers(0, last)
    edges = st.sampled_from([low, -1, min(room, high), min(room + 1, high), high - 1, high]) | st.integers(low, high)
    return [draw(near | edges if hostile else near) for _ in range(rows)]


@st.composite
def pages(draw: st.DrawFn, rows: int, columns: int, dtype: str, most: int) -> list[list[int]]:
    """A table with ids up to `most`, some negative, some at the ends of their type."""
    low, high = ends(dtype)
    high = min(high, most)
    page = st.integers(0, min(1000, high)) | st.sampled_from([low, -1, 0, high])
    return [[draw(page) for _ in range(columns)] for _ in range(rows)]


@st.composite
def strides(draw: st.DrawFn, rows: int, columns: int) -> tuple[int, int] | None:
    return draw(st.sampled_from([None, (columns + 3, 1), (1, rows + 2), (2 * columns + 1, 2)]))


def hold(case: Case) -> None:
    fault = judge(case, getattr(advance_step, CONTRACTS[case.contract].operator), "cpu")
    assert fault is None, f"{fault.detail}\n{case.args}"


@pytest.mark.parametrize("contract", ["npu", "vllm", "flashinfer"])
@EXAMPLES
@given(data=st.data())
def test_step(contract: str, data: st.DataObject) -> None:
    npu = contract == "npu"
    lens, ids, sampled = ("int64",) * 3 if npu else (data.draw(DTYPES), data.draw(DTYPES), data.draw(DTYPES))
    live, pads = data.draw(st.integers(int(npu), 5)), data.draw(st.integers(int(npu), 4))
    block_size, columns = data.draw(BLOCK_SIZES), data.draw(st.integers(int(npu), 4))
    case = step_case(
        contract,
        Random(0),
        data.draw(lengths(live, lens, columns * block_size, data.draw(st.booleans()))),
        pads,
        block_size,
        columns,
        pages=data.draw(pages(live + pads, columns, ids, INT64_MAX)),
        table_strides=data.draw(strides(live + pads, columns)),
        vector_stride=data.draw(st.integers(1, 3)),
        lens_dtype=lens,
        table_dtype=ids,
        sampled_dtype=sampled,
        sampled_flat=not npu and data.draw(st.booleans()),
    )
    hold(case)


@EXAMPLES
@given(data=st.data())
def test_speculative_step(data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 5)), data.draw(st.integers(2, 4))
    block_size, columns = data.draw(BLOCK_SIZES), data.draw(st.integers(1, 4))
    hostile = data.draw(st.booleans())
    room = columns * block_size
    if hostile:
        accepted = data.draw(st.lists(st.sampled_from([-5, -1, 0, 2, INT64_MAX]), min_size=rows, max_size=rows))
        positions = [data.draw(lengths(width, "int64", room, True)) for _ in range(rows)]
    else:
        accepted = data.draw(st.lists(st.integers(0, width - 1), min_size=rows, max_size=rows))
        positions = [[p - 1 - n for p in data.draw(lengths(width, "int64", room, False))] for n in accepted]
    token = st.integers(0, INT64_MAX) | st.just(-1)
    first = token if hostile else st.integers(0, INT64_MAX)
    case = spec_case(
        Random(0),
        positions,
        accepted,
        [[data.draw(first), *(data.draw(token) for _ in range(width - 1))] for _ in range(rows)],
        data.draw(st.booleans()),
        columns,
        block_size,
        pages=data.draw(pages(rows, columns, "int64", INT64_MAX)),
        table_strides=data.draw(strides(rows, columns)),
    )
    hold(case)


@EXAMPLES
@given(data=st.data())
def test_eagle_step(data: st.DataObject) -> None:
    lens, ids = data.draw(DTYPES), data.draw(DTYPES)
    rows, block_size, columns = data.draw(st.integers(0, 6)), data.draw(BLOCK_SIZES), data.draw(st.integers(0, 4))
    low, high = ends(lens)
    case = eagle_case(
        Random(0),
        data.draw(lengths(rows, "int64", columns * block_size, True)),
        data.draw(st.none() | st.integers(0, 4)),
        data.draw(st.sampled_from([1, 2, 40, 4096, INT32_MAX, 2**40, INT64_MAX])),
        block_size,
        seq_lens=[data.draw(st.sampled_from([low, 0, 5, 40, high - 1, high])) for _ in range(rows)],
        table_strides=data.draw(strides(rows, columns)),
        vector_stride=data.draw(st.integers(1, 3)),
        table_dtype=ids,
        lens_dtype=lens,
        pages=data.draw(pages(rows, columns, ids, INT64_MAX)),
        columns=columns,
    )
    hold(case)


@EXAMPLES
@given(data=st.data())
def test_until_stop(data: st.DataObject) -> None:
    ints = {name: data.draw(DTYPES) for name in ("seq_lens", "max_seq_lens", "num_generated", "block_tables")}
    rows, output = data.draw(st.integers(0, 6)), data.draw(st.integers(0, 4))
    groups = tuple(data.draw(st.lists(st.tuples(BLOCK_SIZES, st.integers(0, 3)), min_size=1, max_size=3)))
    room = min(size * columns for size, columns in groups)
    wild = data.draw(st.booleans())
    case = stop_case(
        Random(0),
        data.draw(lengths(rows, ints["seq_lens"], room, True)),
        tokens=data.draw(st.lists(st.sampled_from([0, 2, 3, 4, INT32_MAX, -1]), min_size=rows, max_size=rows)),
        status=data.draw(st.lists(st.sampled_from([0, 0, 0, 1, 2, 3, 4, -1, 99]), min_size=rows, max_size=rows)),
        most=data.draw(lengths(rows, ints["max_seq_lens"], room + 2, True)),
        generated=[
            data.draw(st.sampled_from([0, output, *(ends(ints["num_generated"]) if wild else ())]) | st.integers(0, 5))
            for _ in range(rows)
        ],
        stops=data.draw(st.lists(st.sampled_from([-1, 2, 3, INT64_MAX]), max_size=3)),
        output=output,
        groups=groups,
        # An id whose slots overflow 64 bits has no slot to compare, and none to tell from the pad slot.
        pages=[
            data.draw(pages(rows, columns, ints["block_tables"], INT64_MAX // size - 1)) for size, columns in groups
        ],
        vector_stride=data.draw(st.integers(1, 3)),
        ints=ints,
        sampled_column=data.draw(st.booleans()),
    )
    hold(replace(case, args=case.args | {"pad_slot": data.draw(st.sampled_from([-1, 0, 2**40]))}))


@EXAMPLES
@given(data=st.data())
def test_slot_mapping(data: st.DataObject) -> None:
    dtypes = {f"{name}_dtype": data.draw(DTYPES) for name in ("starts", "positions", "table")}
    counts = data.draw(st.lists(st.integers(0, 5), max_size=5))
    block_size, columns = data.draw(BLOCK_SIZES), data.draw(st.integers(0, 4))
    world_size = data.draw(st.sampled_from([1, 1, 2, 3]))
    spare = data.draw(st.integers(0, 2))
    rows, room, hostile = len(counts) + spare, columns * block_size * world_size, data.draw(st.booleans())
    case = slot_case(
        Random(0),
        [data.draw(lengths(count, dtypes["positions_dtype"], room, hostile)) for count in counts],
        data.draw(st.integers(0, 3)),
        block_size,
        columns,
        pages=data.draw(pages(rows, columns, dtypes["table_dtype"], INT64_MAX)),
        spare_rows=spare,
        spare_positions=data.draw(st.integers(0, 2)),
        table_strides=data.draw(strides(rows, columns)),
        vector_stride=data.draw(st.integers(1, 3)),
        cp_world_size=world_size,
        cp_rank=data.draw(st.integers(0, world_size - 1)),
        cp_interleave=data.draw(st.sampled_from([n for n in (1, 2, 8, block_size) if block_size % n == 0])),
        pad_slot=data.draw(st.sampled_from([-1, 0, 2**40])),
        **dtypes,
    )
    low, high = ends(dtypes["starts_dtype"])
    if hostile and data.draw(st.booleans()):
        start = st.sampled_from([low, -1, 0, 1, sum(counts) + 3, high])
        starts = [data.draw(start) for _ in range(len(counts) + 1)]
        case = replace(case, args=case.args | {"query_start_loc": replace(case.args["query_start_loc"], values=starts)})
    hold(case)
