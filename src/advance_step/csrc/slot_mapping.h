// The rule of compute_slot_mapping, for host and device, free of torch.
//
// The CPU core walks from request to request over a range of tokens; the CUDA core gives each token a thread, which
// looks its request up. Neither reads or writes outside the buffers, whatever the tensors hold.
#pragma once

#include "paging.h"

namespace advance_step {

// A "row" of the executors is one token, an entry of slot_mapping.
template <class Position, class Page, class Stride>
struct SlotMappingStep {
  int64_t num_requests;   // R
  int64_t num_positions;  // P
  IntVector<Stride> query_start_loc;
  Vector<const Position, Stride> positions;
  Matrix<const Page, Stride> block_table;
  BlockSize block_size;          // tokens of a page on one rank
  BlockSize virtual_block_size;  // on all cp_world_size ranks together
  int64_t cp_world_size, cp_rank, cp_interleave, pad_slot;
  Vector<int64_t, Stride> slot_mapping;
  bool one_token_each = false;  // query_start_loc is known to be 0, 1, 2, ..., as in decoding

  // The last request that begins at or before token t; one of [0, R), or 0.
  ADVANCE_STEP_FN int64_t request_of(int64_t t) const {
    int64_t request = 0;
    for (int64_t left = num_requests; left > 1;) {
      const int64_t half = left / 2;
      if (query_start_loc.get(request + half) <= t) request += half;
      left -= half;
    }
    return request;
  }
  ADVANCE_STEP_FN int64_t slot(int64_t request, int64_t position) const {
    if (position < 0) return pad_slot;
    const int64_t column = virtual_block_size.column(position);
    if (column >= block_table.columns) return pad_slot;
    const int64_t page = block_table(request, column);
    if (page < 0) return pad_slot;
    if (cp_world_size == 1) return block_size.slot(page, position, column);
    const int64_t offset = position - column * virtual_block_size.value;
    const int64_t run = offset / cp_interleave;  // of cp_interleave tokens, which one rank has
    if (run % cp_world_size != cp_rank) return pad_slot;
    const int64_t local_offset = run / cp_world_size * cp_interleave + offset % cp_interleave;
    return wrapping_add(wrapping_mul(page, block_size.value), local_offset);
  }
  ADVANCE_STEP_FN void row(int64_t t) const {
    const int64_t request = request_of(t);
    const bool in_request = t < num_positions && request < num_requests && query_start_loc.get(request) <= t &&
                            t < query_start_loc.get(request + 1);
    slot_mapping[t] = in_request ? slot(request, positions[t]) : pad_slot;
  }

  // The last position that has a column; -1 where the table has none. Past 2^63 - 1 there are no positions.
  int64_t last_position() const {
    const int64_t size = virtual_block_size.value;
    return block_table.columns > INT64_MAX / size ? INT64_MAX : block_table.columns * size - 1;
  }
  // Whether query_start_loc is 0, 1, 2, ...: every request has one token.
  bool has_one_token_each() const {
    return query_start_loc.wide ? counts_up(query_start_loc.template as<int64_t>())
                                : counts_up(query_start_loc.template as<int32_t>());
  }
  // Whether query_start_loc begins with 0 and does not fall.
  bool is_query_start_loc() const {
    return query_start_loc.wide ? begins_and_rises(query_start_loc.template as<int64_t>())
                                : begins_and_rises(query_start_loc.template as<int32_t>());
  }
  // The rows [begin, end), once the values are known to be good.
  void rows(int64_t begin, int64_t end) const {
    if (query_start_loc.wide) {
      rows(query_start_loc.template as<int64_t>(), begin, end);
    } else {
      rows(query_start_loc.template as<int32_t>(), begin, end);
    }
  }

 private:
  // Both or words together, and leave no loop early: such loops are vectorised.
  template <class T>
  bool counts_up(Vector<const T, Stride> starts) const {
    T differences = 0;
    for (int64_t r = 0; r <= num_requests; ++r) differences |= starts[r] ^ static_cast<T>(r);
    return num_requests <= largest<T>() && differences == 0;
  }
  template <class T>
  bool begins_and_rises(Vector<const T, Stride> starts) const {
    T falls = 0;
    for (int64_t r = 0; r < num_requests; ++r) falls |= static_cast<T>(starts[r + 1] < starts[r]);
    return starts[0] == 0 && falls == 0;
  }
  template <class Starts>
  void rows(Starts starts, int64_t begin, int64_t end) const {
    if (cp_world_size == 1 && block_size.is_power()) {
      const int shift = block_size.shift;
      const int64_t mask = block_size.value - 1;
      walk(starts, begin, end, [=, table = block_table, pad = pad_slot](int64_t request, int64_t position) {
        const int64_t page = table(request, position >> shift);
        return page < 0 ? pad : static_cast<int64_t>(static_cast<uint64_t>(page) << shift) | (position & mask);
      });
    } else {
      walk(starts, begin, end, [this](int64_t request, int64_t position) { return slot(request, position); });
    }
  }
  template <class Starts, class Slot>
  void walk(Starts starts, int64_t begin, int64_t end, Slot slot) const {
    int64_t t = begin;
    if (one_token_each) {
      for (const int64_t stop = num_requests < end ? num_requests : end; t < stop; ++t) {
        slot_mapping[t] = slot(t, positions[t]);
      }
      return pad(t, end);
    }
    for (int64_t request = request_of(begin); request < num_requests && t < end; ++request) {
      const int64_t last = starts[request + 1];
      for (const int64_t stop = last < end ? last : end; t < stop; ++t) slot_mapping[t] = slot(request, positions[t]);
    }
    pad(t, end);
  }
  void pad(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; ++t) slot_mapping[t] = pad_slot;
  }
};

}  // namespace advance_step
