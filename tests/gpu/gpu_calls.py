"""Calls of every operator, drawn at random on the CPU, with sentinels around each tensor; and their copies on a device.

A tenth of the lengths lie past the table, are negative or at the limits of their dtype, and a tenth of the pages are
none: on a GPU each costs its row the slot and nothing else. Nothing here is checked by an operator's host demands.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import torch
from torch import Tensor

INT32, INT64 = torch.int32, torch.int64
SENTINEL = -77
LIMITS = {  # lengths and positions that no table has
    INT32: [-1, -2, -(2**31), 2**31 - 1, 2**31 - 2],
    INT64: [-1, -2, -(2**63), 2**63 - 1, 2**63 - 2, 2**31, 2**32 + 5],
}
COLUMNS = 7  # of each block table
Arguments = dict[str, Any]


class Draw:
    """The tensors of one call. Bit k of `mix` chooses the dtype of its k-th integer tensor that may have either.

    `spread` gives each tensor strides of its own; `margin` is how many sentinels lie on either side of it.
    """

    def __init__(self, seed: object, mix: int = 0, spread: bool = True, margin: int = 64) -> None:
        self.random = Random(f"{seed} {mix} {spread}")
        self.generator = torch.Generator().manual_seed(self.random.getrandbits(32))
        self.mix, self.spread, self.margin = mix, spread, margin

    def dtype(self) -> torch.dtype:
        wide, self.mix = self.mix & 1, self.mix >> 1
        return INT64 if wide else INT32

    def tensor(self, dtype: torch.dtype, *shape: int, low: int = 0, high: int = 1000) -> Tensor:
        """Values in [low, high), in a buffer with sentinels around and, if `spread`, between them."""
        gaps = [self.random.choice([0, 1, 2]) if self.spread else 0 for _ in shape]
        step = self.random.choice([1, 1, 3]) if self.spread else 1
        swapped = self.spread and len(shape) == 2 and self.random.random() < 0.3
        sizes = [size + gap for size, gap in zip(shape, gaps, strict=True)][:: -1 if swapped else 1]
        length = step
        for size in sizes:
            length *= size
        buffer = torch.full((length + 2 * self.margin,), SENTINEL, dtype=dtype)
        view = buffer[self.margin : self.margin + length].view(*sizes, step)[..., 0]
        view = (view.t() if swapped else view)[tuple(slice(size) for size in shape)]
        return view.copy_(torch.randint(low, high, shape, generator=self.generator, dtype=dtype))

    def spoil(self, tensor: Tensor, values: list[int], share: float = 0.1) -> Tensor:
        """Puts `values` into a share of the elements."""
        chosen = torch.tensor(values, dtype=tensor.dtype)[
            torch.randint(len(values), tensor.shape, generator=self.generator)
        ]
        mask = torch.rand(tensor.shape, generator=self.generator) < share
        return tensor.copy_(torch.where(mask, chosen, tensor))

    def lengths(self, dtype: torch.dtype, *shape: int, block_size: int) -> Tensor:
        return self.spoil(self.tensor(dtype, *shape, high=COLUMNS * block_size + 2), LIMITS[dtype])

    def table(self, dtype: torch.dtype, rows: int) -> Tensor:
        """[rows, COLUMNS]: ids as large as the dtype holds, whose slots need 64 bits."""
        return self.spoil(self.tensor(dtype, rows, COLUMNS, high=2**31 - 1 if dtype == INT32 else 2**40), [-1, -3])

    def block_size(self) -> int:
        return self.random.choice([1, 3, 16, 16, 128])


def plain(draw: Draw, rows: int) -> Arguments:
    live, block_size = max(rows - rows // 16, 1), draw.block_size()
    return {
        "num_seqs": rows,
        "num_queries": live,
        "block_size": block_size,
        "input_tokens": draw.tensor(INT64, rows),
        "sampled_token_ids": draw.tensor(draw.dtype(), live, 1),
        "input_positions": draw.tensor(INT64, rows),
        "seq_lens": draw.lengths(draw.dtype(), rows, block_size=block_size),
        "slot_mapping": draw.tensor(INT64, rows),
        "block_tables": draw.table(draw.dtype(), rows),
    }


def npu(draw: Draw, rows: int) -> Arguments:
    """Of int64 alone, and with a padding row at least: the Ascend contract is strict."""
    draw.mix = -1
    return plain(draw, rows + 1) | {"num_queries": rows, "sampled_token_ids": draw.tensor(INT64, rows, 1)}


def speculative(draw: Draw, rows: int) -> Arguments:
    proposals, block_size = draw.random.choice([1, 2, 4]), draw.block_size()
    width = 1 + proposals
    shape = (rows, width) if draw.random.random() < 0.5 else (rows * width,)
    return {
        "input_tokens": draw.tensor(INT64, *shape),
        "sampled_token_ids": draw.spoil(draw.tensor(INT64, rows, width), [-1], 0.3),
        "input_positions": draw.lengths(INT64, *shape, block_size=block_size),
        "seq_lens": draw.tensor(INT64, *shape),
        "slot_mapping": draw.tensor(INT64, *shape),
        "block_tables": draw.table(INT64, rows),
        "num_seqs": rows,
        "num_queries": rows,
        "block_size": block_size,
        "spec_token": draw.tensor(INT64, rows, proposals),
        "accepted_num": draw.spoil(draw.tensor(INT64, rows, high=width), LIMITS[INT64]),
    }


def flashinfer(draw: Draw, rows: int) -> Arguments:
    """At times with fewer indices than there are pages: the rest is not written."""
    return plain(draw, rows) | {
        "paged_kv_indices": draw.tensor(INT32, rows * draw.random.choice([1, COLUMNS, COLUMNS])),
        "paged_kv_indptr": draw.tensor(INT32, rows + 1),
        "paged_kv_last_page_len": draw.tensor(INT32, rows),
        "block_table_bound": draw.tensor(INT32, rows),
    }


def eagle(draw: Draw, rows: int) -> Arguments:
    block_size, dtype, padding = draw.block_size(), draw.dtype(), draw.random.choice([0, 3, 300])
    positions = draw.lengths(dtype, rows, block_size=block_size)
    return {
        "positions_1d": positions,
        "block_table_tensor": draw.table(draw.dtype(), rows + 2),
        "seq_lens": draw.lengths(draw.dtype(), rows + 1, block_size=block_size),
        "block_size": block_size,
        "max_model_len": draw.random.choice([5 * block_size, 2**40]),
        "out_clamped_positions": positions if draw.random.random() < 0.7 else draw.tensor(dtype, rows),
        "out_slot_mapping": draw.tensor(INT64, rows + padding + 1),
        "input_batch_size": rows + padding,
    }


def until_stop(draw: Draw, rows: int) -> Arguments:
    groups = range(draw.random.choice([1, 2, 3]))
    block_sizes = [draw.block_size() for _ in groups]
    most = 70 if rows < 10_000 else 5  # tokens that output_tokens holds of a row
    return {
        "input_tokens": draw.tensor(INT64, rows),
        "sampled_token_ids": draw.tensor(draw.dtype(), rows),
        "input_positions": draw.tensor(INT64, rows),
        "seq_lens": draw.lengths(draw.dtype(), rows, block_size=min(block_sizes)),
        "slot_mappings": [draw.tensor(INT64, rows) for _ in groups],
        "block_tables": [draw.table(INT64 if g % 2 else draw.dtype(), rows) for g in groups],
        "block_sizes": block_sizes,
        "status": draw.spoil(draw.tensor(INT32, rows, high=1), [1, 2, 3, 4]),
        "output_tokens": draw.tensor(INT64, rows, most),
        "num_generated": draw.spoil(draw.tensor(draw.dtype(), rows, high=most), [-1, most, 2**31 - 1]),
        "stop_token_ids": draw.tensor(INT64, draw.random.choice([0, 5])),
        "max_seq_lens": draw.tensor(draw.dtype(), rows, high=2 * COLUMNS * min(block_sizes)),
        "pad_slot": draw.random.choice([-1, 0, 2**40]),
    }


def slot_mapping(draw: Draw, rows: int) -> Arguments:
    """Requests of 0 to 3 tokens; then entries that pad, and positions and rows of no request."""
    world_size = draw.random.choice([1, 1, 2, 3])
    block_size = draw.block_size()
    counts = torch.randint(0, 4, (rows,), generator=draw.generator)
    starts = draw.tensor(draw.dtype(), rows + 1).zero_()
    starts[1:] = counts.cumsum(0)
    num_tokens = int(counts.sum())
    return {
        "query_start_loc": starts,
        "positions": draw.lengths(draw.dtype(), num_tokens + 3, block_size=block_size * world_size),
        "block_table": draw.table(draw.dtype(), rows + 2),
        "slot_mapping": draw.tensor(INT64, num_tokens + draw.random.choice([0, 3, 300])),
        "block_size": block_size,
        "cp_world_size": world_size,
        "cp_rank": draw.random.randrange(world_size),
        "cp_interleave": draw.random.choice([run for run in (1, 4, block_size) if block_size % run == 0]),
        "pad_slot": draw.random.choice([-1, 0, 2**40]),
    }


# What draws a call, and how many of its tensors may be int32 or int64.
CALLS: dict[str, tuple[Callable[[Draw, int], Arguments], int]] = {
    "npu_advance_step_flashattn": (npu, 0),
    "npu_advance_step_flashattn (speculative)": (speculative, 0),
    "advance_step_flashattn": (plain, 3),
    "advance_step_flashinfer": (flashinfer, 3),
    "eagle_step_update_slot_mapping_and_metadata": (eagle, 3),
    "advance_until_stop": (until_stop, 5),
    "compute_slot_mapping": (slot_mapping, 3),
}


def draw_call(call: str, rows: int, mix: int = 0, **how: Any) -> Arguments:
    return CALLS[call][0](Draw((call, rows), mix, **how), rows)


def function(module: Any, call: str, suffix: str = "") -> Callable[..., None]:
    return getattr(module, call.split(" ")[0] + suffix)


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    """Every tensor of a call by name; those of a list as name[0], name[1], ..."""
    lists = {name: value for name, value in arguments.items() if isinstance(value, list)}
    named = arguments | {f"{name}[{i}]": item for name, items in lists.items() for i, item in enumerate(items)}
    return {name: value for name, value in named.items() if isinstance(value, Tensor)}


def whole(tensor: Tensor) -> Tensor:
    """The buffer that a tensor lies in, sentinels and all."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def on(device: str, arguments: Arguments) -> Arguments:
    """A copy of a call on a device, buffer by buffer: strides and shared memory stay as they are."""
    moved: dict[int, Tensor] = {}

    def move(value: Any) -> Any:
        if isinstance(value, list):
            return [move(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        address = value.untyped_storage().data_ptr()
        if address not in moved:
            moved[address] = whole(value).to(device, copy=True)
        return moved[address].as_strided(value.shape, value.stride(), value.storage_offset())

    return {name: move(value) for name, value in arguments.items()}


def refill(arguments: Arguments, step: int) -> None:
    """New values for what each step reads anew, in place: what was sampled, proposed, accepted."""
    generator = torch.Generator().manual_seed(step)
    width = arguments["sampled_token_ids"].size(-1) if arguments.get("spec_token") is not None else 1
    for name, low, high in (("sampled_token_ids", -1, 300), ("spec_token", 0, 300), ("accepted_num", 0, width)):
        if arguments.get(name) is not None:
            tensor = arguments[name]
            tensor.copy_(torch.randint(low, high, tensor.shape, generator=generator, dtype=tensor.dtype))


def assert_same(got: Arguments, expected: Arguments, what: object) -> None:
    """Every cell of every buffer, those around the tensors too."""
    wanted = tensors(expected)
    for name, tensor in tensors(got).items():
        here, right = whole(tensor).cpu(), whole(wanted[name]).cpu()
        if not torch.equal(here, right):
            at = (here != right).nonzero().flatten()
            wrong = [(int(i), int(here[i]), int(right[i])) for i in at[:5]]
            place = f"shape {list(tensor.shape)}, from cell {tensor.storage_offset()} on in strides {tensor.stride()}"
            raise AssertionError(
                f"{what}: {name} ({place}): {len(at)} cells of its buffer differ; (cell, got, expected): {wrong}"
            )
