"""The native core's attention over pages: every dtype and shape against float64, what it writes, what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_attention import needs_core, written_out

from advance_step.decode.cpu_attention import DTYPES, attend

pytestmark = needs_core

SENTINEL = 7.0


class Call:
    """The arguments of one call: pages full of numbers between two that no table names."""

    def __init__(
        self,
        rows=3,
        tokens=1,
        heads=6,
        kv_heads=2,
        key_dim=64,
        value_dim=64,
        block_size=16,
        columns=4,
        dtype=torch.float32,
        tables=torch.int64,
        window=0,
        softcap=0.0,
        sinks=False,
        strided=False,
    ) -> None:
        torch.manual_seed(0)
        self.rows, self.tokens, self.block_size, self.value_dim = rows, tokens, block_size, value_dim
        self.pages = torch.randn(rows * columns + 2, 2, kv_heads, block_size, max(key_dim, value_dim)).to(dtype)
        self.pages[[0, -1]] = SENTINEL
        self.block_tables = 1 + torch.randperm(rows * columns).view(rows, columns).to(tables)
        if strided:
            self.block_tables = self.block_tables.T.contiguous().T
        last = torch.randint(tokens - 1, columns * block_size, (rows, 1))
        last[0] = columns * block_size - 1
        self.positions = last - tokens + 1 + torch.arange(tokens)
        page = self.block_tables.long().gather(1, self.positions // block_size)
        self.slot_mapping = page * block_size + self.positions % block_size
        self.query = torch.randn(rows, heads, tokens, key_dim).to(dtype)
        self.key = torch.randn(rows, kv_heads, tokens, key_dim).to(dtype)
        self.value = torch.randn(rows, kv_heads, tokens, value_dim).to(dtype)
        self.scaling, self.window, self.softcap = 0.3, window, softcap
        self.sinks = torch.randn(heads).to(dtype) if sinks else None

    def arguments(self) -> dict[str, Any]:
        """What the operator is given."""
        # As transformers hands them over: [1, tokens, heads, dim], transposed.
        packed = {name: getattr(self, name).transpose(1, 2).flatten(0, 1)[None] for name in ("query", "key", "value")}
        return {
            **{name: tensor.contiguous().transpose(1, 2) for name, tensor in packed.items()},
            "pages": self.pages,
            "slot_mapping": self.slot_mapping.flatten(),
            "positions": self.positions.flatten(),
            "block_tables": self.block_tables,
            "starts": torch.arange(len(self.query) + 1) * self.tokens,
            "scaling": self.scaling,
            "window": self.window,
            "softcap": self.softcap,
            "sinks": self.sinks,
        }

    def __call__(self) -> torch.Tensor:
        """[rows, tokens, heads, value_dim]."""
        return attend(**self.arguments()).view(len(self.query), self.tokens, -1, self.value_dim)

    def expected(self) -> torch.Tensor:
        """In float64, from the pages as they are after the call."""
        out = torch.empty(self.rows, self.tokens, self.query.shape[1], self.value_dim, dtype=torch.float64)
        for row in range(self.rows):
            own = self.pages[self.block_tables[row].long()].permute(1, 0, 3, 2, 4).flatten(1, 2)
            keys, values = own[0][..., : self.query.shape[3]], own[1][..., : self.value_dim]
            for token in range(self.tokens):
                position = int(self.positions[row, token])
                out[row, token] = written_out(
                    self.query[row, :, token], keys, values, position, self.scaling,
                    self.window or None, self.softcap or None, self.sinks,
                )  # fmt: skip
        return out


@pytest.mark.parametrize(
    "shape",
    [
        {},
        {"rows": 1, "columns": 70},  # more than a thread's work, in one row
        {"rows": 33, "columns": 9, "tokens": 5},
        {"block_size": 1, "columns": 37},
        {"block_size": 20, "key_dim": 80, "value_dim": 80},
        {"key_dim": 5, "value_dim": 3, "block_size": 3},  # fewer than a vector's lanes
        {"key_dim": 96, "value_dim": 96, "columns": 7},
        {"key_dim": 32, "value_dim": 160, "block_size": 48},
        {"heads": 8, "kv_heads": 1, "rows": 9},  # as many queries as the loops by tiles take
        {"heads": 9, "kv_heads": 1, "rows": 9},
        {"heads": 2, "kv_heads": 2, "tokens": 8, "window": 19, "block_size": 32},
        {"key_dim": 24, "value_dim": 16, "heads": 7, "kv_heads": 1},
        {"key_dim": 16, "value_dim": 40, "heads": 4, "kv_heads": 4, "tokens": 2},
        {"window": 1, "tokens": 2},
        {"window": 21, "columns": 8},
        {"window": 10_000},
        {"softcap": 2.0, "window": 9, "sinks": True, "tokens": 3},
        {"sinks": True, "tables": torch.int32},
        {"tables": torch.int32, "strided": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
def test_it_is_attention(dtype, shape):
    call = Call(dtype=dtype, **shape)
    before = call.pages.clone()
    out = call()
    assert out.dtype == dtype and out.is_contiguous()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.double(), call.expected(), rtol=tolerance, atol=tolerance)
    for row in range(call.rows):  # what it wrote, and nothing else
        for token in range(call.tokens):
            slot = int(call.slot_mapping[row, token])
            place = before[slot // call.block_size, :, :, slot % call.block_size]
            place.zero_()
            place[0, :, : call.key.shape[3]] = call.key[row, :, token]
            place[1, :, : call.value_dim] = call.value[row, :, token]
    assert torch.equal(call.pages, before)


def test_rows_without_a_slot_or_a_page():
    """A padding row writes nothing; where a table has no page, the last page is read."""
    call = Call()
    call.slot_mapping[1] = -1
    call.block_tables[2] = -1
    call.slot_mapping[2] = -1
    before = call.pages.clone()
    out = call()
    page, offset = divmod(int(call.slot_mapping[0, 0]), 16)
    before[page, :, :, offset] = torch.stack((call.key[0, :, 0], call.value[0, :, 0]))
    assert torch.equal(call.pages, before)
    call.block_tables[2] = len(call.pages) - 1
    torch.testing.assert_close(out.double(), call.expected(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(out[2], torch.full_like(out[2], SENTINEL))


@pytest.mark.parametrize("window", [0, 5])
def test_a_position_past_the_table_sees_what_the_table_has(window):
    call = Call(tokens=3, window=window)
    call.positions[1], call.slot_mapping[1] = torch.tensor([62, 64, 900]), -1
    out = call()
    call.positions[1] = torch.tensor([62, 64, 64 + 3])
    if window:  # of a window that lies behind the table, its last key
        last = call.block_tables[1, -1]
        torch.testing.assert_close(out[1, 2], call.pages[last, 1, :, -1].repeat_interleave(3, 0))
        out[1, 2] = call.expected()[1, 2]
    torch.testing.assert_close(out.double(), call.expected(), rtol=1e-5, atol=1e-5)


def test_a_result_does_not_depend_on_its_neighbours():
    call = Call(rows=9, columns=12, dtype=torch.bfloat16)
    whole = call()
    for row in range(9):
        alone = Call(rows=9, columns=12, dtype=torch.bfloat16)
        for name in ("query", "key", "value", "slot_mapping", "block_tables", "positions"):
            setattr(alone, name, getattr(alone, name)[row : row + 1])
        assert torch.equal(alone()[0], whole[row])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [4, 64])
def test_special_numbers_are_kept(dtype, dim):
    """Infinities and NaNs of values come through, and the largest and smallest numbers of a half."""
    for value in (6e-8, -3.1e-5, 65504.0, float("inf"), float("-inf"), float("nan")):
        call = Call(rows=1, columns=1, key_dim=dim, value_dim=dim, dtype=dtype)
        call.positions[:], call.slot_mapping[:] = 0, call.block_tables[:, :1] * 16
        call.value = torch.full_like(call.value, value)
        torch.testing.assert_close(call(), torch.full((1, 1, 6, dim), value, dtype=dtype), equal_nan=True)


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("window", [0, 1, 21])
def test_what_no_token_sees_does_not_matter(dtype, window):
    """Not even NaNs, as in memory that another row has left, before the window and after the position."""
    call = Call(dtype=dtype, columns=5, window=window)
    expected = call()
    for row in range(call.rows):
        own = call.pages[call.block_tables[row]]
        for token in range(5 * 16):
            if not 0 <= call.positions[row, 0] - token < (window or 10_000):
                own[token // 16, :, :, token % 16] = torch.nan
        call.pages[call.block_tables[row]] = own
    assert torch.equal(call(), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [{}, {"columns": 1, "block_size": 3}], ids=str)
def test_a_key_that_is_no_number_shows(dtype, shape):
    """In the heads that see it, and in no other row."""
    call = Call(dtype=dtype, **shape)
    call.key[1, 1, 0, 3] = torch.nan
    out = call()
    assert out[1, :, 3:].isnan().all() and not out[1, :, :3].isnan().any() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize(
    "name, value, message",
    [
        ("slot_mapping", 14 * 16, "slot_mapping: expected slots of the pages, got a larger one"),
        ("positions", -1, "positions: expected positions >= 0, got a negative one"),
        ("block_tables", 14, "block_tables: expected pages that there are, got a larger one"),
    ],
)
def test_nothing_is_read_or_written_outside(name, value, message):
    call = Call()
    getattr(call, name)[2, 0] = value
    before = call.pages.clone()
    with pytest.raises(ValueError, match=message):
        call()
    assert torch.equal(call.pages, before)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("query", lambda t: t.double(), "query, key, value: expected"),
        ("query", lambda t: t[0], "query, key, value: expected"),
        ("query", lambda t: t.expand(2, -1, -1, -1), "query, key, value: expected"),
        ("key", lambda t: t.transpose(2, 3), "query, key, value: expected"),
        ("key", lambda t: t[:, :1], "key, value: expected"),
        ("value", lambda t: t[:, :, :2], "key, value: expected"),
        ("pages", lambda t: t.transpose(2, 3), "pages: expected .* contiguous"),
        ("pages", lambda t: t[..., :63].contiguous(), "pages: expected a page, heads that divide"),
        ("pages", lambda t: t[:0], "pages: expected a page, heads that divide"),
        ("slot_mapping", lambda t: t.int(), "slot_mapping, positions: expected int64"),
        ("positions", lambda t: t[:0], "slot_mapping, positions: expected int64"),
        ("block_tables", lambda t: t[:2], r"starts: expected int64 \[rows \+ 1\]"),
        ("starts", lambda t: t.int(), r"starts: expected int64 \[rows \+ 1\]"),
        ("starts", lambda t: t + 1, "starts: expected 0, rising, up to"),
        ("starts", lambda t: t - 1, "starts: expected 0, rising, up to"),
        ("starts", lambda t: t * 2, "starts: expected 0, rising, up to"),
        ("starts", lambda t: torch.tensor([0, 2, 1, 3]), "starts: expected 0, rising, up to"),
        ("starts", lambda t: torch.tensor([0, 1, 1, 3]), "starts: expected 0, rising, up to"),
        ("block_tables", lambda t: t[:, :0], "block_tables: expected int32 or int64"),
        ("block_tables", lambda t: t.short(), "block_tables: expected int32 or int64"),
        ("sinks", lambda t: torch.zeros(5), r"sinks: expected \[heads\]"),
        ("window", lambda n: -1, "window, softcap: expected numbers >= 0"),
    ],
)
def test_bad_arguments_are_refused(name, change, message):
    arguments = Call().arguments()
    before = arguments["pages"].clone()
    arguments[name] = change(arguments[name])
    with pytest.raises(ValueError, match=message):
        attend(**arguments)
    assert name == "pages" or torch.equal(arguments["pages"], before)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match="pages: expected float32, bfloat16 or float16"):
        Call(dtype=torch.float64)()


def test_opcheck():
    torch.library.opcheck(attend, tuple(Call(tokens=2, sinks=True).arguments().values()))


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.parametrize("shape", [{}, {"window": 21}, {"softcap": 2.0, "sinks": True}], ids=str)
def test_rows_of_different_numbers_of_tokens(dtype, shape):
    """Few tokens and whole prompts, alone and together; each row as by itself."""
    counts = [1, 1, 3, 40, 17, 2]
    call = Call(rows=len(counts), tokens=40, columns=5, dtype=dtype, **shape)
    whole, kept = call.arguments(), call.pages.clone()
    chosen = torch.cat([40 * row + torch.arange(count) for row, count in enumerate(counts)])
    for name, dimension in {"query": 2, "key": 2, "value": 2, "slot_mapping": 0, "positions": 0}.items():
        whole[name] = whole[name].index_select(dimension, chosen)
    whole["starts"] = torch.tensor([0, *counts]).cumsum(0)
    out = attend(**whole)
    assert out.shape == (1, len(chosen), 6, 64)
    written = call.pages.clone()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    expected = call.expected()  # from the pages as they are now
    torch.testing.assert_close(out[0].double(), expected.flatten(0, 1)[chosen], rtol=tolerance, atol=tolerance)
    call.pages.copy_(kept)
    begin = 0
    for row, count in enumerate(counts):  # each in a call of its own
        own = dict(whole)
        for name in ("query", "key", "value"):
            own[name] = whole[name][:, :, begin : begin + count]
        for name in ("slot_mapping", "positions"):
            own[name] = whole[name][begin : begin + count]
        own |= {"block_tables": whole["block_tables"][row : row + 1], "starts": torch.tensor([0, count])}
        torch.testing.assert_close(attend(**own)[0], out[0, begin : begin + count], rtol=tolerance, atol=tolerance)
        begin += count
    assert torch.equal(call.pages, written)


def test_many_tokens_that_do_not_follow_one_another():
    """As the operator says it; no engine asks for it."""
    call = Call(tokens=20, columns=4)
    for row in range(3):
        order = torch.randperm(64)[:20]
        call.positions[row] = order
        call.slot_mapping[row] = call.block_tables[row][order // 16] * 16 + order % 16
    torch.testing.assert_close(call().double(), call.expected(), rtol=1e-5, atol=1e-5)
