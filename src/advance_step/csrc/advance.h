// The update rule of every operator, stated once for host and device, free of torch.
//
// Each struct is one operator's step: the tensors it works on and what happens to one row. The CPU core loops over the
// rows, the CUDA core gives each row a thread. No row reads or writes outside its buffers, whatever the tensors hold.
#pragma once

#include "paging.h"

namespace advance_step {

// npu_advance_step_flashattn (plain mode) and advance_step_flashattn.
template <class Len, class Page, class Token, class Stride>
struct PlainStep {
  int64_t num_seqs, num_queries;
  Vector<int64_t, Stride> input_tokens;
  Vector<const Token, Stride> sampled_token_ids;
  Vector<int64_t, Stride> input_positions;
  Vector<Len, Stride> seq_lens;
  Vector<int64_t, Stride> slot_mapping;
  BlockTable<Matrix<const Page, Stride>> block_tables;  // limited to lengths that can grow: length + 1 fits Len

  ADVANCE_STEP_FN void row(int64_t i) const {
    if (i < num_queries) {
      const Len length = seq_lens[i];
      input_tokens[i] = sampled_token_ids[i];
      input_positions[i] = length;
      seq_lens[i] = static_cast<Len>(wrapping_add(length, 1));
      slot_mapping[i] = block_tables.slot(i, length);
    } else {
      input_tokens[i] = 0;
      input_positions[i] = 0;
      slot_mapping[i] = kPadSlot;
    }
  }
};

// npu_advance_step_flashattn (speculative mode): T = 1 + S entries a row.
struct SpeculativeStep {
  int64_t columns;  // T
  Matrix<int64_t> input_tokens;
  Matrix<const int64_t> sampled_token_ids;
  Matrix<int64_t> input_positions, seq_lens, slot_mapping;
  BlockTable<Matrix<const int64_t>> block_tables;
  Matrix<const int64_t> spec_token;
  Vector<const int64_t> accepted_num;

  // Whether row i has a token to go on with and a page for each of its next positions.
  bool can_advance(int64_t i) const {
    if (sampled_token_ids(i, 0) == -1) return false;
    for (int64_t j = 0; j < columns; ++j) {
      // Before the last + 1, which therefore cannot overflow.
      const int64_t before = input_positions(i, j), moved = wrapping_add(before, accepted_num[i]);
      const bool overflowed = ((before ^ moved) & (accepted_num[i] ^ moved)) < 0;
      if (overflowed || moved < -1 || moved >= block_tables.limit - 1) return false;
    }
    return true;
  }
  // A "row" of the executors is one of the num_seqs * T entries: no entry reads what another writes.
  ADVANCE_STEP_FN void row(int64_t k) const { entry(k / columns, k % columns); }
  ADVANCE_STEP_FN void entry(int64_t i, int64_t j) const {
    if (j > 0) {
      input_tokens(i, j) = spec_token(i, j - 1);
    } else {
      int64_t count = 0;  // sampled before the first -1; with none, the row keeps its token
      while (count < columns && sampled_token_ids(i, count) != -1) ++count;
      if (count > 0) input_tokens(i, 0) = sampled_token_ids(i, count - 1);
    }
    const int64_t before = input_positions(i, j), accepted = accepted_num[i];
    const int64_t position = wrapping_add(before, wrapping_add(accepted, 1));
    const bool wrapped = (position > before) != (accepted >= 0);
    input_positions(i, j) = position;
    seq_lens(i, j) = wrapping_add(position, 1);
    slot_mapping(i, j) = wrapped ? kPadSlot : block_tables.slot(i, position);
  }
};

// advance_step_flashinfer: the page metadata, from the positions that PlainStep has just written.
template <class Page, class Stride>
struct FlashInferPages {
  int64_t num_queries;
  Matrix<const Page, Stride> block_tables;
  BlockSize block_size;
  Vector<int32_t, Stride> indices;
  int64_t num_indices;
  Vector<int32_t, Stride> indptr, last_page_len, bound;

  // How many pages of its table a sequence uses whose last token is at `position`.
  ADVANCE_STEP_FN int64_t count(int64_t position) const {
    if (position < 0) return 0;
    const int64_t column = block_size.column(position);
    return column < block_tables.columns ? column + 1 : block_tables.columns;
  }
  // Whether what is said of a row fits the 32 bits that FlashInfer reads: its last page's length and its page ids.
  bool fits(int64_t i, int64_t position) const {
    if (block_size.offset(position) >= INT32_MAX) return false;
    const int64_t pages = count(position);
    uint64_t all = 0;  // an id that fits lies in [0, 2^32) once 2^31 is added: a loop that compilers vectorise
    for (int64_t j = 0; j < pages; ++j) all |= static_cast<uint64_t>(block_tables(i, j)) + (uint64_t{1} << 31);
    return all >> 32 == 0;
  }
  // `end`: the pages of all rows up to this one.
  ADVANCE_STEP_FN void row(int64_t i, int64_t position, int64_t end) const {
    indptr[i + 1] = static_cast<int32_t>(end);
    if (i < num_queries) {
      bound[i] = static_cast<int32_t>(count(position));
      last_page_len[i] = static_cast<int32_t>(block_size.offset(position) + 1);
    }
  }
  // The ids of row i, from page `first` on each `step`-th, once every row has its indptr; as many as there is room for.
  ADVANCE_STEP_FN void copy_ids(int64_t i, int64_t first, int64_t step) const {
    const int64_t start = indptr[i], room = num_indices - start;
    if (start < 0) return;  // more pages in all than 32 bits can count
    const int64_t pages = bound[i] < room ? bound[i] : room;
    for (int64_t j = first; j < pages; j += step) indices[start + j] = static_cast<int32_t>(block_tables(i, j));
  }
};

// eagle_step_update_slot_mapping_and_metadata
template <class Position, class Len, class Page, class Stride>
struct EagleStep {
  int64_t batch_size;
  Position last;  // position of a sequence
  Len longest;
  Vector<const Position, Stride> positions;
  BlockTable<Matrix<const Page, Stride>> block_table;
  Vector<Len, Stride> seq_lens;
  Vector<Position, Stride> out_clamped_positions;
  Vector<int64_t, Stride> out_slot_mapping;

  ADVANCE_STEP_FN void row(int64_t i) const {
    if (i >= batch_size) {
      out_slot_mapping[i] = kPadSlot;
    } else if (positions[i] >= last) {
      out_clamped_positions[i] = 0;
      out_slot_mapping[i] = kPadSlot;
      seq_lens[i] = 1;
    } else {
      const Position position = positions[i] + 1;
      out_clamped_positions[i] = position;
      out_slot_mapping[i] = block_table.slot(i, position);
      seq_lens[i] = seq_lens[i] < longest ? seq_lens[i] + 1 : longest;
    }
  }
};

enum RowStatus : int32_t { kRunning, kStopped, kLength, kNoPage, kPadding };

template <class Stride>
struct KVGroup {
  Vector<int64_t, Stride> slot_mapping;
  BlockTable<IntMatrix<Stride>> block_table;
};

constexpr int kMaxGroups = 16;

// advance_until_stop, for up to kGroups KV groups; with one, as most models have, there is no loop over them.
template <class Stride, int kGroups>
struct UntilStopStep {
  int64_t pad_slot, num_stop_tokens;
  Vector<int64_t, Stride> input_tokens, input_positions;
  IntVector<Stride> sampled_token_ids, seq_lens, num_generated, max_seq_lens;
  Vector<int32_t, Stride> status;
  Matrix<int64_t, Stride> output_tokens;
  Vector<const int64_t, Stride> stop_token_ids;
  int num_groups;
  KVGroup<Stride> groups[kGroups];

  ADVANCE_STEP_FN int group_count() const { return kGroups == 1 ? 1 : num_groups; }
  ADVANCE_STEP_FN bool stops(int64_t token) const {
    for (int64_t s = 0; s < num_stop_tokens; ++s) {
      if (stop_token_ids[s] == token) return true;
    }
    return false;
  }
  // Whether `position` has a page in every group; its slots are written on the way.
  ADVANCE_STEP_FN bool place(int64_t i, int64_t position) const {
    bool placed = true;
    for (int g = 0; g < group_count(); ++g) {
      const int64_t slot = groups[g].block_table.slot(i, position);
      groups[g].slot_mapping[i] = slot;
      placed &= slot != kPadSlot;
    }
    return placed;
  }
  // What becomes of a running row, whose slots are written on the way if it may go on.
  ADVANCE_STEP_FN RowStatus next_status(int64_t i, int64_t token, int64_t length) const {
    if (stops(token)) return kStopped;
    if (length == INT64_MAX || length + 1 >= max_seq_lens.get(i)) return kLength;
    if (!place(i, length)) return kNoPage;
    return length == seq_lens.largest() ? kLength : kRunning;
  }
  ADVANCE_STEP_FN void row(int64_t i) const {
    if (status[i] == kRunning) {
      const int64_t token = sampled_token_ids.get(i), length = seq_lens.get(i), count = num_generated.get(i);
      RowStatus next = kLength;
      if (static_cast<uint64_t>(count) < static_cast<uint64_t>(output_tokens.columns)) {
        next = next_status(i, token, length);
        if (next != kNoPage) {
          output_tokens(i, count) = token;
          num_generated.set(i, count + 1);
        }
        if (next == kRunning) {
          input_tokens[i] = token;
          input_positions[i] = length;
          seq_lens.set(i, length + 1);
          return;
        }
      }
      status[i] = next;
    }
    for (int g = 0; g < group_count(); ++g) groups[g].slot_mapping[i] = pad_slot;
  }
};

}  // namespace advance_step
