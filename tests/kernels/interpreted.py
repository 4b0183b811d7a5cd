"""Every kernel, bit for bit against the reference twin: `test_kernels.py` runs this file in Triton's interpreter, and
`tests/lowered/` on what triton-ascend makes of the kernels.

The kernels are called themselves, not through the operators, whose checks on a CPU would refuse the values without a
meaning that half of these cases are about. Every tensor lies in a buffer of sentinels with strides of its own; the
whole buffer is compared, so that a write out of place is seen.
"""

from __future__ import annotations

import itertools
from random import Random
from typing import Any

import pytest
import torch

from advance_step import kernels, reference

INT32, INT64 = torch.int32, torch.int64
SENTINEL = -77
# 128 rows are one program's, 2048 one tile's of the scan; 8448 is where a grid of 64 programs for each of a GPU's 132
# multiprocessors would end.
ROWS = [0, 1, 2, 63, 64, 65, 127, 128, 129, 257]
MANY_ROWS = [2049, 8449]
LIMITS = {
    INT32: [-1, -2, -(2**31), 2**31 - 1, 2**31 - 2],
    INT64: [-1, -2, -(2**63), 2**63 - 1, 2**63 - 2, 2**31, 2**32 + 5],
}
BLOCK_SIZES = [1, 3, 16, 128, 2**31, 2**40 + 1, 2**63 - 1]


class Case:
    """One call's arguments, drawn at random, in buffers with sentinels between and around the elements."""

    def __init__(self, seed: object) -> None:
        self.random = Random(f"{seed}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        self.buffers: list[torch.Tensor] = []

    def tensor(self, dtype: torch.dtype, *shape: int, low: int = 0, high: int = 1000) -> torch.Tensor:
        """Values in [low, high), in a buffer with sentinels around and, two times in three, between them."""
        gaps = [self.random.choice([0, 1, 2]) for _ in shape]
        swapped = len(shape) == 2 and self.random.random() < 0.3
        sizes = [size + gap for size, gap in zip(shape, gaps, strict=True)][:: -1 if swapped else 1]
        step = self.random.choice([1, 1, 3])
        length = step
        for size in sizes:
            length *= size
        margin = self.random.choice([5, 8])
        buffer = torch.full((length + 2 * margin,), SENTINEL, dtype=dtype)
        self.buffers.append(buffer)
        view = buffer[margin : margin + length].view(*sizes, step)[..., 0]
        view = (view.t() if swapped else view)[tuple(slice(size) for size in shape)]
        view.copy_(torch.randint(low, high, shape, generator=self.generator, dtype=dtype))
        return view

    def spoil(self, tensor: torch.Tensor, values: list[int], share: float = 0.2) -> torch.Tensor:
        """Puts `values` into a share of the elements."""
        for at in itertools.product(*map(range, tensor.shape)):
            if self.random.random() < share:
                tensor[at] = self.random.choice(values)
        return tensor

    def lengths(self, dtype: torch.dtype, rows: int, columns: int, block_size: int, *entries: int) -> torch.Tensor:
        """Most have a page; some lie past the table, are negative, or at the limits of the dtype."""
        high = max(1, min(columns * block_size + 2, torch.iinfo(dtype).max))
        share = 0.2 if rows <= 300 else 0.001
        return self.spoil(self.tensor(dtype, rows, *entries, high=high), LIMITS[dtype], share)

    def table(self, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """Most pages are large ones; a tenth are none."""
        table = self.tensor(dtype, rows, columns, high=torch.iinfo(dtype).max)
        return table.masked_fill_(torch.rand(rows, columns, generator=self.generator) < 0.1, -3)


def compare(name: str, make: Any) -> None:
    """`make` builds the same call twice: one for the kernel, one for the twin."""
    (case, call), (twin, expected) = make(), make()
    getattr(kernels, name)(**call)
    getattr(reference, f"{name}_ref")(**expected)
    for buffer, right in zip(case.buffers, twin.buffers, strict=True):
        wrong = (buffer != right).nonzero().flatten().tolist()
        assert not wrong, f"{name}: {wrong[:9]} of {buffer} differ, expected {right}, in {call}"


def plain(case: Case, rows: int, live: int, dtypes: Any, block_size: int | None = None) -> dict[str, Any]:
    length, page, token = dtypes
    block_size = block_size or case.random.choice(BLOCK_SIZES)
    columns = case.random.choice([0, 1, 2, 7])
    sampled = [live, 1] if case.random.random() < 0.5 else [live]
    return {
        "num_seqs": rows,
        "num_queries": live,
        "block_size": block_size,
        "input_tokens": case.tensor(INT64, rows),
        "sampled_token_ids": case.tensor(token, *sampled),
        "input_positions": case.tensor(INT64, rows),
        "seq_lens": case.lengths(length, rows, columns, block_size),
        "slot_mapping": case.tensor(INT64, rows),
        "block_tables": case.table(page, rows, columns),
    }


def mixes(count: int) -> list[Any]:
    """Every mix of dtypes of `count` arguments."""
    mixed = itertools.product([INT32, INT64], repeat=count)
    return [pytest.param(dtypes, id="-".join(f"{dtype}"[-2:] for dtype in dtypes)) for dtypes in mixed]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtypes", mixes(3))
def test_plain(rows, dtypes):
    for live in {rows, rows // 2, 0}:

        def make(live=live):
            case = Case((rows, dtypes, live))
            return case, plain(case, rows, live, dtypes)

        compare("advance_step_flashattn", make)
        if dtypes == (INT64, INT64, INT64):
            compare("npu_advance_step_flashattn", make)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("length", [INT32, INT64])
def test_plain_block_sizes(block_size, length):
    def make():
        case = Case((block_size, length))
        return case, plain(case, 300, 299, (length, INT64, INT64), block_size)

    compare("advance_step_flashattn", make)


@pytest.mark.parametrize("rows", MANY_ROWS)
def test_plain_many_rows(rows):
    def make():
        case = Case(rows)
        return case, plain(case, rows, rows - 100, (INT32, INT32, INT64), 16)

    compare("advance_step_flashattn", make)


def speculative(case: Case, rows: int, proposals: int, flat: bool) -> dict[str, Any]:
    columns, entries, block_size = 6, 1 + proposals, case.random.choice(BLOCK_SIZES)
    shape = (rows * entries,) if flat else (rows, entries)
    share = 0.1 if rows <= 300 else 0.001
    positions = case.tensor(INT64, *shape, high=min(columns * block_size, 2**62))
    return {
        "input_tokens": case.tensor(INT64, *shape),
        "sampled_token_ids": case.spoil(case.tensor(INT64, rows, entries), [-1], 2 * share),
        "input_positions": case.spoil(positions, LIMITS[INT64], share),
        "seq_lens": case.tensor(INT64, *shape),
        "slot_mapping": case.tensor(INT64, *shape),
        "block_tables": case.table(INT64, rows, columns),
        "num_seqs": rows,
        "num_queries": rows,
        "block_size": block_size,
        "spec_token": case.tensor(INT64, rows, proposals),
        "accepted_num": case.spoil(case.tensor(INT64, rows, high=entries), LIMITS[INT64], share),
    }


@pytest.mark.parametrize("rows", [1, 2, 65, 128, 129, 257])
@pytest.mark.parametrize("proposals", [1, 2, 5])
@pytest.mark.parametrize("flat", [True, False])
def test_speculative(rows, proposals, flat):
    for seed in range(2):

        def make(seed=seed):
            case = Case((rows, proposals, flat, seed))
            return case, speculative(case, rows, proposals, flat)

        compare("npu_advance_step_flashattn", make)


def test_speculative_many_rows():
    def make():
        case = Case(0)
        return case, speculative(case, 8449, 2, flat=True)

    compare("npu_advance_step_flashattn", make)


def flashinfer(
    case: Case, rows: int, live: int, dtypes: Any, indices: int, block_size: int | None = None
) -> dict[str, Any]:
    return plain(case, rows, live, dtypes, block_size) | {
        "paged_kv_indices": case.tensor(INT32, indices),
        "paged_kv_indptr": case.tensor(INT32, rows + 1),
        "paged_kv_last_page_len": case.tensor(INT32, rows),
        "block_table_bound": case.tensor(INT32, rows),
    }


@pytest.mark.parametrize("rows", [0, 1, 2, 15, 16, 17, 65, 257])
@pytest.mark.parametrize("dtypes", mixes(3))
def test_flashinfer(rows, dtypes):
    """With indices enough for every page, too few, and none."""
    for live, indices in [(rows, rows * 7), (rows // 2, rows), (rows, 0)]:

        def make(live=live, indices=indices):
            case = Case((rows, dtypes, live, indices))
            return case, flashinfer(case, rows, live, dtypes, indices)

        compare("advance_step_flashinfer", make)


@pytest.mark.parametrize("rows", MANY_ROWS)
def test_flashinfer_many_rows(rows):
    def make():
        case = Case(rows)
        return case, flashinfer(case, rows, rows - 100, (INT32, INT32, INT64), rows * 7, 16)

    compare("advance_step_flashinfer", make)


@pytest.mark.parametrize("columns", [127, 128, 129, 9000])
def test_flashinfer_long_rows(columns):
    """A tile is 128 columns, and 9000 columns are more tiles than programs."""

    def make():
        case = Case(columns)
        call = flashinfer(case, 19, 18, (INT32, INT32, INT64), 18 * columns, 4)
        call["block_tables"] = case.table(INT32, 19, columns)
        call["seq_lens"][:] = case.tensor(INT32, 19, high=4 * columns)
        call["seq_lens"][3] = 4 * columns - 1
        return case, call

    compare("advance_step_flashinfer", make)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtypes", mixes(3))
def test_eagle(rows, dtypes):
    position, length, page = dtypes
    for padding, in_place in [(None, True), (0, False), (200, True)]:

        def make(padding=padding, in_place=in_place):
            case = Case((rows, dtypes, padding))
            block_size, columns = case.random.choice(BLOCK_SIZES), case.random.choice([0, 1, 4])
            more = case.random.choice([0, 3])
            positions = case.lengths(position, rows, columns, block_size)
            return case, {
                "positions_1d": positions,
                "block_table_tensor": case.table(page, rows + more, columns),
                "seq_lens": case.lengths(length, rows + more, columns, block_size),
                "block_size": block_size,
                "max_model_len": case.random.choice([1, 40, 2**31, 2**63 - 1]),
                "out_clamped_positions": positions if in_place else case.tensor(position, rows + more),
                "out_slot_mapping": case.tensor(INT64, rows + more + (padding or 0)),
                "input_batch_size": None if padding is None else rows + padding,
            }

        compare("eagle_step_update_slot_mapping_and_metadata", make)


def until_stop(case: Case, rows: int, dtypes: Any, groups: int) -> dict[str, Any]:
    token, length, page, count, limit = dtypes
    columns = [case.random.choice([1, 3, 7]) for _ in range(groups)]
    sizes = [case.random.choice(BLOCK_SIZES[:4] if rows > 300 else BLOCK_SIZES) for _ in range(groups)]
    most = case.random.choice([0, 1, 6])
    share = 0.1 if rows <= 300 else 0.001
    longest = min(columns[0] * sizes[0], 2**30)
    return {
        "input_tokens": case.tensor(INT64, rows),
        "sampled_token_ids": case.tensor(token, rows, high=12),
        "input_positions": case.tensor(INT64, rows),
        "seq_lens": case.lengths(length, rows, columns[0], sizes[0]),
        "slot_mappings": [case.tensor(INT64, rows) for _ in range(groups)],
        "block_tables": [case.table(page, rows, n) for n in columns],
        "block_sizes": sizes,
        "status": case.tensor(INT32, rows, high=1 if case.random.random() < 0.5 else 5),
        "output_tokens": case.tensor(INT64, rows, most),
        "num_generated": case.spoil(case.tensor(count, rows, high=most + 1), LIMITS[count], share),
        "stop_token_ids": case.tensor(INT64, case.random.choice([0, 1, 3]), high=12),
        "max_seq_lens": case.spoil(case.tensor(limit, rows, high=2 * longest), LIMITS[limit], share),
        "pad_slot": case.random.choice([-1, 0, 123, -(2**63), 2**40]),
    }


@pytest.mark.parametrize("dtypes", mixes(5))
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_until_stop(dtypes, groups):
    few = Random(f"{dtypes}").choice([0, 1, 2, 63, 64, 65])
    for rows in (few, 257):

        def make(rows=rows):
            case = Case((rows, dtypes, groups))
            return case, until_stop(case, rows, dtypes, groups)

        compare("advance_until_stop", make)


@pytest.mark.parametrize("groups", [1, 2])
def test_until_stop_many_rows(groups):
    def make():
        case = Case(groups)
        return case, until_stop(case, 8449, (INT32, INT32, INT32, INT64, INT32), groups)

    compare("advance_until_stop", make)


@pytest.mark.parametrize("rows", [1, 9, 129])
@pytest.mark.parametrize(
    "name", ["advance_step_flashattn", "advance_step_flashinfer", "npu_advance_step_flashattn", "advance_until_stop"]
)
def test_sampled_tokens_in_place(name, rows):
    """The sampled tokens may be the input tokens themselves."""

    def make():
        case = Case((name, rows))
        if name == "npu_advance_step_flashattn":
            call = speculative(case, rows, 3, flat=False)
            call["input_tokens"] = call["sampled_token_ids"]
        else:
            if name == "advance_until_stop":
                call = until_stop(case, rows, (INT64, INT32, INT32, INT64, INT32), 2)
            elif name == "advance_step_flashinfer":
                call = flashinfer(case, rows, rows, (INT32, INT64, INT64), rows * 7, 16)
            else:
                call = plain(case, rows, rows, (INT64, INT32, INT64), 16)
            call["sampled_token_ids"] = call["input_tokens"]
        return case, call

    compare(name, make)


def test_every_outcome_of_until_stop_is_among_the_cases():
    """Else the cases above would show less than they seem to."""
    seen: set[tuple[int, int]] = set()
    for seed in range(20):
        call = until_stop(Case(seed), 257, (INT64, INT32, INT32, INT64, INT32), 2)
        before = call["status"].clone()
        kernels.advance_until_stop(**call)
        seen |= set(zip(before.tolist(), call["status"].tolist(), strict=True))
    assert seen == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 1), (2, 2), (3, 3), (4, 4)}


def slot_mapping(case: Case, requests: int, dtypes: Any, block_size: int | None = None) -> dict[str, Any]:
    """Requests of no tokens, one and several; some positions have no slot. A third of the calls is context parallel."""
    start, position, page = dtypes
    counts = [case.random.choice([0, 1, 1, 2, 40]) for _ in range(requests)]
    tokens = sum(counts)
    starts = case.tensor(start, requests + 1)
    starts.copy_(torch.tensor([0, *itertools.accumulate(counts)]))
    columns, world_size = case.random.choice([0, 1, 2, 7]), case.random.choice([1, 1, 2, 3])
    block_size = min(block_size or case.random.choice(BLOCK_SIZES), 2**63 // world_size - 1)
    divisors = [n for n in (1, 2, 8, block_size) if block_size % n == 0]
    positions = tokens + case.random.choice([0, 3])
    return {
        "query_start_loc": starts,
        "positions": case.lengths(position, positions, columns * world_size, block_size),
        "block_table": case.table(page, requests + case.random.choice([0, 2]), columns),
        "slot_mapping": case.tensor(INT64, tokens + case.random.choice([0, 1, 130])),
        "block_size": block_size,
        "cp_world_size": world_size,
        "cp_rank": case.random.randrange(world_size),
        "cp_interleave": case.random.choice(divisors),
        "pad_slot": case.random.choice([-1, 0, 2**40]),
    }


@pytest.mark.parametrize("requests", [0, 1, 3, 8, 33])
@pytest.mark.parametrize("dtypes", mixes(3))
def test_slot_mapping(requests, dtypes):
    for seed in range(2):

        def make(seed=seed):
            case = Case((requests, dtypes, seed))
            return case, slot_mapping(case, requests, dtypes)

        compare("compute_slot_mapping", make)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("position", [INT32, INT64])
def test_slot_mapping_block_sizes(block_size, position):
    def make():
        case = Case((block_size, position))
        return case, slot_mapping(case, 9, (INT32, position, INT64), block_size)

    compare("compute_slot_mapping", make)


def test_slot_mapping_many_requests():
    def make():
        case = Case(0)
        return case, slot_mapping(case, 257, (INT32, INT64, INT32), 16)

    compare("compute_slot_mapping", make)


@pytest.mark.parametrize("dtypes", mixes(3))
def test_slot_mapping_of_a_broken_query_start_loc(dtypes):
    """Of a token that several requests claim, or none, the slot is that of one that claims it, or the pad slot."""
    for seed in range(3):
        case = Case((dtypes, seed))
        call = slot_mapping(case, 9, dtypes, 16) | {"cp_world_size": 1, "cp_rank": 0, "cp_interleave": 1}
        case.spoil(call["query_start_loc"], LIMITS[dtypes[0]] + [0, 5, 1000], 0.4)
        kernels.compute_slot_mapping(**call)
        starts, positions, table = (call[name].tolist() for name in ("query_start_loc", "positions", "block_table"))
        for token, slot in enumerate(call["slot_mapping"].tolist()):
            allowed = {call["pad_slot"]}
            for request, (begin, end) in enumerate(itertools.pairwise(starts)):
                if begin <= token < end and token < len(positions):
                    page = positions[token] // 16
                    if 0 <= page < len(table[request]) and table[request][page] >= 0:
                        allowed.add((table[request][page] * 16 + positions[token] % 16 + 2**63) % 2**64 - 2**63)
            assert slot in allowed, (token, starts)
        # Every other cell is as it was: another case of the same seed, with the slots put in.
        twin = Case((dtypes, seed))
        other = slot_mapping(twin, 9, dtypes, 16)
        twin.spoil(other["query_start_loc"], LIMITS[dtypes[0]] + [0, 5, 1000], 0.4)
        other["slot_mapping"].copy_(call["slot_mapping"])
        assert all(map(torch.equal, case.buffers, twin.buffers))
