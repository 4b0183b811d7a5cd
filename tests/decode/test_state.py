"""Rows that come and go, as the operator sees them."""

from __future__ import annotations

import torch

from advance_step import advance_step_flashattn
from advance_step.decode.state import BatchState

SPARE = 99


def batch() -> BatchState:
    """Four rows, of which three are live, of 5, 8 and 2 tokens in pages of 4."""
    state = BatchState.allocate(4, 3, SPARE, torch.device("cpu"))
    for row, (length, pages) in enumerate([(5, [10, 11]), (8, [20, 21, 22]), (2, [30])]):
        state.admit(row, length, pages)
    state.sampled.copy_(torch.tensor([7, 8, 9, 0]))
    return state


def advance(state: BatchState, live: int) -> None:
    advance_step_flashattn(
        4,
        live,
        4,
        state.input_tokens,
        state.sampled[:live],
        state.input_positions,
        state.seq_lens,
        state.slot_mapping,
        state.block_tables,
    )


def test_an_admitted_row_advances_to_its_first_new_token():
    state = batch()
    advance(state, 3)
    assert state.input_tokens.tolist() == [7, 8, 9, 0]
    assert state.input_positions.tolist() == [5, 8, 2, 0]
    assert state.seq_lens.tolist() == [6, 9, 3, 1]
    assert state.slot_mapping.tolist() == [11 * 4 + 1, 22 * 4, 30 * 4 + 2, -1]


def test_the_last_live_row_takes_a_removed_ones_place():
    state = batch()
    state.remove(0, last=2)
    assert state.block_tables.tolist() == [[30, SPARE, SPARE], [20, 21, 22], [SPARE] * 3, [SPARE] * 3]
    advance(state, 2)
    assert state.input_tokens.tolist() == [9, 8, 0, 0]
    assert state.input_positions.tolist() == [2, 8, 0, 0]
    assert state.seq_lens.tolist() == [3, 9, 1, 1]
    assert state.slot_mapping.tolist() == [30 * 4 + 2, 22 * 4, -1, -1]


def test_removing_the_last_row_leaves_the_others():
    state = batch()
    state.remove(2, last=2)
    assert state.seq_lens.tolist() == [5, 8, 1, 1]
    assert state.block_tables.tolist() == [[10, 11, SPARE], [20, 21, 22], [SPARE] * 3, [SPARE] * 3]


def test_a_row_is_admitted_over_what_was_there():
    state = batch()
    state.admit(1, 3, [40])
    assert state.block_tables[1].tolist() == [40, SPARE, SPARE]
    assert state.seq_lens[1] == 3


def test_buffers_keep_their_addresses():
    state = batch()
    before = [tensor.data_ptr() for tensor in vars(state).values() if isinstance(tensor, torch.Tensor)]
    state.admit(3, 4, [50])
    advance(state, 4)
    state.remove(1, last=3)
    assert [tensor.data_ptr() for tensor in vars(state).values() if isinstance(tensor, torch.Tensor)] == before
