"""Rows that come and go, as the operators see them."""

from __future__ import annotations

import pytest
import torch

from advance_step import DecodeState, RowStatus

PAD = 99
ADMITTED = [(5, 9, [10, 11], 1), (8, 10, [20, 21, 22], 2), (2, 4, [30], 3)]  # tokens, at most, pages, last token


def batch() -> DecodeState:
    """Four rows, of which three are live, of 5, 8 and 2 tokens in pages of 4; token 6 stops a row."""
    state = DecodeState.allocate(4, 12, 4, steps_per_sync=2, stop_token_ids=[6], pad_page=PAD)
    assert [state.admit(*admitted) for admitted in ADMITTED] == [0, 1, 2]
    return state


def advance(state: DecodeState, *sampled: int) -> None:
    state.sampled.copy_(torch.tensor(sampled))
    state.advance_until_stop()


def buffers(state: DecodeState) -> list[torch.Tensor]:
    return [buffer for buffer, _ in state._padding()] + [state.stop_token_ids]


def test_padding_is_neutral():
    state = DecodeState.allocate(2, 12, 4, steps_per_sync=2, pad_page=PAD)
    before = [buffer.clone() for buffer in buffers(state)]
    state.advance_until_stop()
    assert all(map(torch.equal, before, buffers(state)))
    assert state.status.tolist() == [RowStatus.PADDING] * 2
    assert state.slot_mappings[0].tolist() == [-1, -1] and state.seq_lens.tolist() == [1, 1]
    assert (state.block_tables[0] == PAD).all() and state.sync() == []


def test_an_admitted_row_stands_at_its_last_token():
    state = batch()
    assert state.input_tokens.tolist() == [1, 2, 3, 0]
    assert state.input_positions.tolist() == [4, 7, 1, 0]
    assert state.block_tables[0].tolist() == [[10, 11, -1], [20, 21, 22], [30, -1, -1], [PAD] * 3]


def test_an_admitted_row_advances_to_its_first_new_token():
    state = batch()
    advance(state, 7, 8, 9, 0)
    assert state.input_tokens.tolist() == [7, 8, 9, 0]
    assert state.input_positions.tolist() == [5, 8, 2, 0]
    assert state.seq_lens.tolist() == [6, 9, 3, 1]
    assert state.slot_mappings[0].tolist() == [11 * 4 + 1, 22 * 4, 30 * 4 + 2, -1]


def test_only_the_named_rows_advance():
    state = batch()
    state.sampled.copy_(torch.tensor([7, 8, 9, 0]))
    state.advance_until_stop(slice(1, 3))
    assert state.input_tokens.tolist() == [1, 8, 9, 0]
    assert state.seq_lens.tolist() == [5, 9, 3, 1]
    state.advance_until_stop(slice(0, 1))
    assert state.input_tokens.tolist() == [7, 8, 9, 0]


def test_a_sync_gives_what_was_recorded_since_the_last():
    state = batch()
    advance(state, 7, 6, 9, 0)
    advance(state, 8, 1, 5, 0)
    assert state.sync() == [
        (RowStatus.RUNNING, [7, 8]),
        (RowStatus.STOPPED, [6]),
        (RowStatus.LENGTH, [9, 5]),  # of 4 tokens at most
    ]
    advance(state, 3, 3, 3, 3)
    assert state.sync(slice(2)) == [(RowStatus.RUNNING, [3]), (RowStatus.STOPPED, [])]


def test_a_row_without_a_page_stands_still_until_it_has_one():
    state = DecodeState.allocate(2, 12, 4, steps_per_sync=4)
    row = state.admit(3, 12, [5], last_token=7)
    advance(state, 8, 0)  # position 3, the page's last
    before = [buffer.clone() for buffer in buffers(state)]
    advance(state, 9, 0)
    advance(state, 9, 0)
    assert state.status[row] == RowStatus.NO_PAGE and state.slot_mappings[0].tolist() == [-1, -1]
    changed = [not torch.equal(*pair) for pair in zip(before, buffers(state), strict=True)]
    assert sum(changed) == 3  # sampled, status, slot
    assert state.sync() == [(RowStatus.NO_PAGE, [8])]
    state.grow(row, [6])
    assert state.status[row] == RowStatus.RUNNING
    advance(state, 9, 0)
    assert state.slot_mappings[0].tolist() == [6 * 4, -1] and state.input_tokens.tolist() == [9, 0]


def test_growing_wakes_no_row_that_is_done():
    state = batch()
    advance(state, 6, 8, 9, 0)
    state.grow(0, [12])
    assert state.status[0] == RowStatus.STOPPED
    assert state.block_tables[0][0].tolist() == [10, 11, 12]


def test_several_kv_groups():
    state = DecodeState.allocate(2, 16, [4, 8], pad_page=[50, 60])
    row = state.admit(4, 16, [[1], [2]], last_token=3)
    advance(state, 5, 0)
    assert state.sync() == [(RowStatus.NO_PAGE, [])]  # the second group has a place for it, the first has none
    state.grow(row, [[7], []])
    advance(state, 5, 0)
    assert [slots.tolist() for slots in state.slot_mappings] == [[7 * 4, -1], [2 * 8 + 4, -1]]
    state.remove(row)
    assert [table[0].tolist() for table in state.block_tables] == [[50] * 4, [60] * 2]


def test_steps_of_an_engine_that_stops_rows_itself():
    state = batch()
    state.sampled[:3] = torch.tensor([6, 8, 9])
    state.advance_step()
    assert state.input_tokens.tolist() == [6, 8, 9, 0]
    assert state.slot_mappings[0].tolist() == [11 * 4 + 1, 22 * 4, 30 * 4 + 2, -1]
    assert state.seq_lens.tolist() == [6, 9, 3, 1] and state.num_generated.tolist() == [0] * 4


def test_the_last_live_row_takes_a_removed_ones_place():
    state = batch()
    advance(state, 7, 8, 9, 0)
    state.remove(0)
    assert state.num_rows == 2
    assert state.input_tokens.tolist() == [9, 8, 0, 0]
    assert state.input_positions.tolist() == [2, 8, 0, 0]
    assert state.seq_lens.tolist() == [3, 9, 1, 1]
    assert state.slot_mappings[0].tolist() == [30 * 4 + 2, 22 * 4, -1, -1]
    assert state.block_tables[0].tolist() == [[30, -1, -1], [20, 21, 22], [PAD] * 3, [PAD] * 3]
    assert state.max_seq_lens.tolist() == [4, 10, 0, 0]
    assert state.status.tolist() == [RowStatus.RUNNING] * 2 + [RowStatus.PADDING] * 2
    state.grow(0, [31])
    assert state.block_tables[0][0].tolist() == [30, 31, -1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0), (2, 0), (2, 1, 0), (0, 0), (1, 1, 0)])
def test_removing_several_is_removing_one_after_the_other(order: tuple[int, ...]):
    together, apart = batch(), batch()
    for state in (together, apart):
        advance(state, 7, 8, 9, 0)
    together.remove(*order)
    for row in order:
        apart.remove(row)
    assert all(map(torch.equal, buffers(together), buffers(apart)))
    assert together.num_pages == apart.num_pages


def test_a_removed_row_has_recorded_nothing():
    """Even if nobody looked: a run may end between two syncs."""
    state = batch()
    advance(state, 7, 8, 9, 0)
    state.remove(0)
    assert state.num_generated.tolist() == [1, 1, 0, 0]


def test_buffers_keep_their_addresses():
    state = batch()
    before = [buffer.data_ptr() for buffer in buffers(state)]
    state.admit(4, 8, [50], 1)
    advance(state, 7, 8, 9, 1)
    state.sync()
    state.remove(1)
    state.grow(0, [12])
    assert [buffer.data_ptr() for buffer in buffers(state)] == before


def test_int64_throughout_for_operators_that_want_it():
    state = DecodeState.allocate(3, 12, 4, dtype=torch.int64)
    state.admit(5, 9, [10, 11], 1)
    advance(state, 7, 0, 0)
    assert state.seq_lens.dtype == state.block_tables[0].dtype == torch.int64
    assert state.slot_mappings[0].tolist() == [11 * 4 + 1, -1, -1]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda state: state.admit(0, 8, [1], 1), "seq_len: expected 0 < seq_len < max_seq_len=8, got 0"),
        (lambda state: state.admit(8, 8, [1, 2], 1), "seq_len: expected 0 < seq_len < max_seq_len=8, got 8"),
        (lambda state: state.admit(5, 8, [1], 1), "pages[0]: expected at least 2 pages, got 1"),
        (
            lambda state: state.admit(5, 8, [1, 2, 3, 4], 1),
            "pages[0]: expected at most 3 pages, 0 of which the row has",
        ),
        (lambda state: state.admit(5, 8, [1, -2], 1), "pages[0]: expected page ids >= 0, got -2"),
        (lambda state: state.admit(5, 8, [[1, 2], [3]], 1), "pages: expected a list for each of 1 KV groups"),
        (lambda state: state.grow(3, [1]), "row: expected a live row, 0 <= row < 3, got 3"),
        (lambda state: state.grow(0, [1, 2]), "pages[0]: expected at most 3 pages, 2 of which the row has, got 2 more"),
        (lambda state: state.remove(3), "row: expected a live row, 0 <= row < 3, got 3"),
        (lambda state: state.remove(2, 2), "row: expected a live row, 0 <= row < 2, got 2"),
        (lambda state: DecodeState.allocate(0, 8, 4), "num_seqs: expected num_seqs >= 1, got 0"),
        (lambda state: DecodeState.allocate(1, 8, [4, 0]), "block_size[1]: expected block_size[1] >= 1, got 0"),
        (lambda state: DecodeState.allocate(1, 8, 4, steps_per_sync=0), "steps_per_sync: expected steps_per_sync >= 1"),
        (
            lambda state: DecodeState.allocate(1, 8, 4, pad_page=[1, 2]),
            "pad_page: expected one for each of 1 KV groups",
        ),
        (lambda state: DecodeState.allocate(1, 8, 4, dtype=torch.int16), "dtype: expected torch.int32 or torch.int64"),
    ],
)
def test_what_is_refused_changes_nothing(call, message):
    state = batch()
    before, pages = [buffer.clone() for buffer in buffers(state)], [list(count) for count in state.num_pages]
    with pytest.raises(ValueError) as refused:
        call(state)
    assert message in str(refused.value)
    assert all(map(torch.equal, before, buffers(state))) and state.num_pages == pages


def test_a_full_batch_refuses_another():
    state = batch()
    state.admit(1, 4, [40], 1)
    with pytest.raises(ValueError, match="expected a padding row, got 4 live rows of num_seqs=4"):
        state.admit(1, 4, [41], 1)


def test_advance_step_knows_one_kv_group():
    state = DecodeState.allocate(2, 16, [4, 8])
    with pytest.raises(ValueError, match="expected one KV group, got 2"):
        state.advance_step()
