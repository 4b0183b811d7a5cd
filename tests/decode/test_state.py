"""Rows that come and go, as the operator sees them."""

from __future__ import annotations

import torch

from advance_step import RowStatus
from advance_step.decode.state import BatchState

SPARE = 99
ADMITTED = [(5, 9, [10, 11]), (8, 10, [20, 21, 22]), (2, 4, [30])]  # tokens, at most, pages


def batch() -> BatchState:
    """Four rows, of which three are live, of 5, 8 and 2 tokens in pages of 4; token 6 stops a row."""
    state = BatchState.allocate(4, 3, 2, [6], 4, SPARE, torch.device("cpu"))
    for row, admitted in enumerate(ADMITTED):
        state.admit(row, *admitted)
    return state


def advance(state: BatchState, *sampled: int) -> None:
    state.sampled.copy_(torch.tensor(sampled))
    state.advance(slice(4))


def test_padding_is_neutral():
    state = BatchState.allocate(2, 3, 2, [], 4, SPARE, torch.device("cpu"))
    before = {name: tensor.clone() for name, tensor in vars(state).items() if isinstance(tensor, torch.Tensor)}
    state.advance(slice(2))
    assert all(torch.equal(before[name], getattr(state, name)) for name in before)
    assert state.status.tolist() == [RowStatus.PADDING] * 2
    assert state.slot_mapping.tolist() == [-1, -1] and state.seq_lens.tolist() == [1, 1]


def test_an_admitted_row_advances_to_its_first_new_token():
    state = batch()
    advance(state, 7, 8, 9, 0)
    assert state.input_tokens.tolist() == [7, 8, 9, 0]
    assert state.input_positions.tolist() == [5, 8, 2, 0]
    assert state.seq_lens.tolist() == [6, 9, 3, 1]
    assert state.slot_mapping.tolist() == [11 * 4 + 1, 22 * 4, 30 * 4 + 2, -1]


def test_only_the_named_rows_advance():
    state = batch()
    state.sampled.copy_(torch.tensor([7, 8, 9, 0]))
    state.advance(slice(1, 3))
    assert state.input_tokens.tolist() == [0, 8, 9, 0]
    assert state.seq_lens.tolist() == [5, 9, 3, 1]


def test_the_look_gives_what_was_recorded_since_the_last():
    state = batch()
    advance(state, 7, 6, 9, 0)
    advance(state, 8, 1, 5, 0)
    assert state.look(slice(3)) == [
        (RowStatus.RUNNING, [7, 8]),
        (RowStatus.STOPPED, [6]),
        (RowStatus.LENGTH, [9, 5]),  # of 4 tokens at most
    ]
    advance(state, 3, 3, 3, 3)
    assert state.look(slice(2)) == [(RowStatus.RUNNING, [3]), (RowStatus.STOPPED, [])]


def test_the_last_live_row_takes_a_removed_ones_place():
    state = batch()
    advance(state, 7, 8, 9, 0)
    state.remove(0, last=2)
    assert state.input_tokens.tolist() == [9, 8, 0, 0]
    assert state.input_positions.tolist() == [2, 8, 0, 0]
    assert state.seq_lens.tolist() == [3, 9, 1, 1]
    assert state.slot_mapping.tolist() == [30 * 4 + 2, 22 * 4, -1, -1]
    assert state.block_tables.tolist() == [[30, SPARE, SPARE], [20, 21, 22], [SPARE] * 3, [SPARE] * 3]
    assert state.max_seq_lens.tolist() == [4, 10, 0, 0]
    assert state.status.tolist() == [RowStatus.RUNNING] * 2 + [RowStatus.PADDING] * 2


def test_a_removed_row_has_recorded_nothing():
    """Even if nobody looked: a run may end within a window."""
    state = batch()
    advance(state, 7, 8, 9, 0)
    state.remove(0, last=2)
    assert state.num_generated.tolist() == [1, 1, 0, 0]


def test_removing_the_last_row_leaves_the_others():
    state = batch()
    state.remove(2, last=2)
    assert state.seq_lens.tolist() == [5, 8, 1, 1]
    assert state.block_tables.tolist() == [[10, 11, SPARE], [20, 21, 22], [SPARE] * 3, [SPARE] * 3]
    assert state.status.tolist() == [RowStatus.RUNNING] * 2 + [RowStatus.PADDING] * 2


def test_a_row_is_admitted_over_what_was_there():
    state = batch()
    state.admit(1, 3, 7, [40])
    assert state.block_tables[1].tolist() == [40, SPARE, SPARE]
    assert state.seq_lens[1] == 3 and state.max_seq_lens[1] == 7


def test_buffers_keep_their_addresses():
    state = batch()
    before = [tensor.data_ptr() for tensor in vars(state).values() if isinstance(tensor, torch.Tensor)]
    state.admit(3, 4, 8, [50])
    advance(state, 7, 8, 9, 1)
    state.look(slice(4))
    state.remove(1, last=3)
    assert [tensor.data_ptr() for tensor in vars(state).values() if isinstance(tensor, torch.Tensor)] == before
