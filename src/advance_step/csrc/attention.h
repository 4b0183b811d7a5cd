// Attention over pages, of rows that have as many new tokens, on a CPU: the computation, free of torch.
//
// A unit of work is one row and one head of keys: the queries that share them, of all the row's tokens, go over the
// row's pages together, so that each key and each value is read once. The loops over keys and values are those of the
// processor: attention_vectors.h, attention_tiles.h. Sums are in float32.
#pragma once

#include <limits>
#include <memory>

#include "lanes.h"

namespace advance_step {

constexpr int64_t kAhead = 4 * kLanes;  // tokens between what is read and what is prefetched

// A strided view [rows, heads, tokens, dim] whose last dimension is contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t row, head, token;
  T* at(int64_t r, int64_t h, int64_t t) const { return data + r * row + h * head + t * token; }
  // Rows of `tokens`, the first of which starts at `first`, of tokens that lie one after the other.
  Heads from(int64_t first, int64_t tokens) const { return {data + first * token, tokens * token, head, token}; }
};

// Pages [pages, 2, kv_heads, block_size, dim], contiguous; 2: keys and values.
template <class T>
struct Pages {
  T* data;
  int64_t pages, kv_heads, block_size, dim;
  T* at(int64_t page, int64_t which, int64_t head, int64_t offset) const {
    return data + (((page * 2 + which) * kv_heads + head) * block_size + offset) * dim;
  }
};

// The keys that a unit goes over: `count` of a row from `start` on, the first `hidden` of which none of its tokens
// sees.
struct Keys {
  int64_t row, head, start, count, hidden;
};

template <class T>
struct PagedAttention {
  int64_t rows, tokens, heads, key_dim, value_dim;
  Heads<const T> query, key, value;
  Pages<T> pages;
  const int64_t *slot_mapping, *positions;  // each [rows, tokens]
  const void* block_tables;                 // int32 or int64 [rows, columns], of these strides
  bool wide_tables;
  int64_t row_stride, column_stride, columns;
  float scaling, softcap;  // 0: scores are not capped
  int64_t window;          // tokens that a token sees, itself among them; 0: all before it
  const T* sinks;          // [heads], or null
  T* out;                  // [rows, tokens, heads, value_dim], contiguous

  // The rows from `row` on, of `new_tokens` each, the first of which is at `first` of the new tokens of all rows; none
  // of them yet.
  PagedAttention from(int64_t row, int64_t first, int64_t new_tokens) const {
    PagedAttention those = *this;
    those.rows = 0;
    those.tokens = new_tokens;
    those.query = query.from(first, new_tokens);
    those.key = key.from(first, new_tokens);
    those.value = value.from(first, new_tokens);
    those.slot_mapping += first;
    those.positions += first;
    const int64_t entry = wide_tables ? sizeof(int64_t) : sizeof(int32_t);
    those.block_tables = static_cast<const char*>(block_tables) + row * row_stride * entry;
    those.out += first * heads * value_dim;
    return those;
  }

  int64_t group() const { return heads / pages.kv_heads; }
  int64_t queries() const { return group() * tokens; }  // of a unit: head by head, a head's by token
  const T* query_of(const Keys& keys, int64_t i) const {
    return query.at(keys.row, keys.head * group() + i / tokens, i % tokens);
  }

  // The keys that a token at `position` sees, of those that its row's table has room for.
  ADVANCE_STEP_INLINE void seen(int64_t position, int64_t* first, int64_t* last) const {
    const int64_t room = columns * pages.block_size;
    *last = position < room ? position : room - 1;
    *first = window && position >= window ? position - window + 1 : 0;
    if (*first > *last) *first = *last;
  }

  // The page that holds a row's tokens of a column; those that the row does not have are the last page's.
  int64_t page(int64_t row, int64_t column) const {
    const int64_t at = row * row_stride + column * column_stride;
    const int64_t page =
        wide_tables ? static_cast<const int64_t*>(block_tables)[at] : static_cast<const int32_t*>(block_tables)[at];
    return page < 0 ? pages.pages - 1 : page;
  }

  // The first and the last key that any of the row's tokens sees.
  ADVANCE_STEP_INLINE void keys_of(int64_t row, int64_t* first, int64_t* last) const {
    seen(positions[row * tokens], first, last);
    for (int64_t t = 1; t < tokens; ++t) {
      int64_t begin, end;
      seen(positions[row * tokens + t], &begin, &end);
      if (begin < *first) *first = begin;
      if (end > *last) *last = end;
    }
  }

  // What would be read or written outside of the buffers, or null.
  const char* fault() const {
    const int64_t slots = pages.pages * pages.block_size;
    for (int64_t i = 0; i < rows * tokens; ++i) {
      if (slot_mapping[i] >= slots) return "slot_mapping: expected slots of the pages, got a larger one";
      if (positions[i] < 0) return "positions: expected positions >= 0, got a negative one";
    }
    for (int64_t row = 0; row < rows; ++row) {
      int64_t first, last;
      keys_of(row, &first, &last);
      for (int64_t column = first / pages.block_size; column <= last / pages.block_size; ++column) {
        if (page(row, column) >= pages.pages) return "block_tables: expected pages that there are, got a larger one";
      }
    }
    return nullptr;
  }

  // Whether each row's tokens stand at positions that follow one another, and that its table has room for.
  bool in_order() const {
    for (int64_t row = 0; row < rows; ++row) {
      const int64_t* const of_row = positions + row * tokens;
      if (of_row[0] + tokens > columns * pages.block_size) return false;
      for (int64_t t = 1; t < tokens; ++t) {
        if (of_row[t] != of_row[0] + t) return false;
      }
    }
    return true;
  }

  // Stores the new keys and values by slot, of the tokens [begin, end) of rows * tokens; of a negative slot nowhere.
  void write(int64_t begin, int64_t end) const {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t slot = slot_mapping[i];
      if (slot < 0) continue;
      const int64_t page = slot / pages.block_size, offset = slot % pages.block_size;
      for (int64_t head = 0; head < pages.kv_heads; ++head) {
        put(pages.at(page, 0, head, offset), key.at(i / tokens, head, i % tokens), key_dim);
        put(pages.at(page, 1, head, offset), value.at(i / tokens, head, i % tokens), value_dim);
      }
    }
  }

  void put(T* to, const T* from, int64_t size) const {
    std::memcpy(to, from, size * sizeof(T));
    std::memset(static_cast<void*>(to + size), 0, (pages.dim - size) * sizeof(T));
  }

  // The keys or values (`which`) of a row's tokens from one on, as far as they are in its page.
  const T* at(const Keys& keys, int64_t which, int64_t token) const {
    return pages.at(page(keys.row, token / pages.block_size), which, keys.head, token % pages.block_size);
  }

  // Has the memory fetch keys or values of kLanes tokens, or as many as are in the page. The pages of a row lie
  // anywhere, so that no processor foresees the next.
  ADVANCE_STEP_INLINE void prefetch(const Keys& keys, int64_t which, int64_t token) const {
    const int64_t offset = token % pages.block_size;
    if (token >= columns * pages.block_size) return;
    const auto from = reinterpret_cast<const char*>(at(keys, which, token));
    const int64_t left = pages.block_size - offset, tokens_there = left < kLanes ? left : kLanes;
    const auto bytes = static_cast<int64_t>(sizeof(T)) * pages.dim * tokens_there;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i, 0, 2);
  }

  // Units [begin, end) of rows * kv_heads. A row's heads come one after the other: they lie in the same pages.
  template <class Loops>
  ADVANCE_STEP_INLINE void units(int64_t begin, int64_t end) const {
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t first, last;
      keys_of(row, &first, &last);
      if (last - first + 1 > longest) longest = last - first + 1;
    }
    const int64_t reach = padded(longest + Loops::kStart - 1, kBlock), width = padded(value_dim, kBlock);
    const std::unique_ptr<float[]> room(new float[queries() * (reach + width)]());
    float *const scores = room.get(), *const totals = scores + queries() * reach;
    Loops loops(*this, reach, width);
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t row = unit / pages.kv_heads, head = unit % pages.kv_heads;
      int64_t first, last;
      keys_of(row, &first, &last);
      const int64_t start = first / Loops::kStart * Loops::kStart;
      const Keys keys{row, head, start, last - start + 1, first - start};
      loops.score(keys, scores);
      for (int64_t i = 0; i < queries(); ++i) {
        seen(positions[row * tokens + i % tokens], &first, &last);
        softmax(scores + i * reach, keys.count, first - start, last - start, head * group() + i / tokens);
      }
      loops.weigh(keys, scores, totals);
      for (int64_t i = 0; i < queries(); ++i) {
        loops.finish(totals + i * width,
                     out + ((row * tokens + i % tokens) * heads + head * group() + i / tokens) * value_dim);
      }
    }
  }

  // Scores [count] to the weights of the keys; those outside of [begin, end] weigh nothing.
  ADVANCE_STEP_INLINE void softmax(float* scores, int64_t count, int64_t begin, int64_t end, int64_t head) const {
    const float none = -std::numeric_limits<float>::infinity();
    if (softcap != 0) {
      for (int64_t j = 0; j < count; ++j) scores[j] = std::tanh(scores[j] / softcap) * softcap;
    }
    for (int64_t j = 0; j < begin; ++j) scores[j] = none;
    for (int64_t j = end + 1; j < padded(count, kLanes); ++j) scores[j] = none;
    Floats most = load(scores);
    for (int64_t j = kLanes; j < count; j += kLanes) {
      const Floats next = load(scores + j);
      most = next > most ? next : most;
    }
    float sink = none;
    if (sinks) {
      T one[kBlock] = {sinks[head]};
      float wide[kBlock];
      widen(one, wide);
      sink = wide[0];
    }
    const float top = largest(most) > sink ? largest(most) : sink;
    Floats total = {};
    for (int64_t j = 0; j < count; j += kLanes) {
      const Floats weights = exponential(load(scores + j) - top);
      store(scores + j, weights);
      total += weights;
    }
    const float all = sum(total) + (sinks ? std::exp(sink - top) : 0.0f);
    for (int64_t j = 0; j < count; j += kLanes) store(scores + j, load(scores + j) / all);
  }
};

}  // namespace advance_step
