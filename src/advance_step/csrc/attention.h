// Attention of a decode step over pages, on a CPU: the computation, free of torch.
//
// A unit of work is one row and one head of keys: the queries that share them, of all the row's tokens, go over the
// row's pages together, so that each key and each value is read and widened once. All arithmetic is in float32.
#pragma once

#include <limits>
#include <memory>

#include "lanes.h"

namespace advance_step {

constexpr int64_t kAhead = 4 * kLanes;  // tokens between what is read and what is fetched

// A strided view [rows, heads, tokens, dim] whose last dimension is contiguous.
template <class T>
struct Heads {
  T* data;
  int64_t row, head, token;
  T* at(int64_t r, int64_t h, int64_t t) const { return data + r * row + h * head + t * token; }
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

  int64_t group() const { return heads / pages.kv_heads; }

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

  // Stores the new keys and values by slot; those of a negative slot nowhere.
  void write() const {
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t t = 0; t < tokens; ++t) {
        const int64_t slot = slot_mapping[row * tokens + t];
        if (slot < 0) continue;
        const int64_t page = slot / pages.block_size, offset = slot % pages.block_size;
        for (int64_t head = 0; head < pages.kv_heads; ++head) {
          put(pages.at(page, 0, head, offset), key.at(row, head, t), key_dim);
          put(pages.at(page, 1, head, offset), value.at(row, head, t), value_dim);
        }
      }
    }
  }

  void put(T* to, const T* from, int64_t size) const {
    std::memcpy(to, from, size * sizeof(T));
    std::memset(static_cast<void*>(to + size), 0, (pages.dim - size) * sizeof(T));
  }

  // `size` elements, widened, and zeros up to a whole number of blocks.
  static ADVANCE_STEP_INLINE void widen_all(const T* from, int64_t size, float* to) {
    int64_t i = 0;
    for (; i + kBlock <= size; i += kBlock) widen(from + i, to + i);
    if (i < size) {
      T rest[kBlock] = {};
      std::memcpy(rest, from + i, (size - i) * sizeof(T));
      widen(rest, to + i);
    }
  }

  static ADVANCE_STEP_INLINE void narrow_all(const float* from, int64_t size, T* to) {
    int64_t i = 0;
    for (; i + kBlock <= size; i += kBlock) narrow(from + i, to + i);
    if (i < size) {
      T rest[kBlock];
      narrow(from + i, rest);
      std::memcpy(to + i, rest, (size - i) * sizeof(T));
    }
  }

  static int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

  // Has the memory fetch keys or values of as many tokens as gather takes, from `first` on, of one page. The pages of a
  // row lie anywhere, so that no processor foresees the next.
  ADVANCE_STEP_INLINE void prefetch(int64_t row, int64_t head, int64_t which, int64_t first) const {
    const int64_t column = first / pages.block_size, offset = first % pages.block_size;
    if (column >= columns) return;
    const auto from = reinterpret_cast<const char*>(pages.at(page(row, column), which, head, offset));
    const int64_t left = pages.block_size - offset, tokens_there = left < kLanes ? left : kLanes;
    const auto bytes = static_cast<int64_t>(sizeof(T)) * pages.dim * tokens_there;
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(from + i);
  }

  // Keys or values (`which`) of `count` tokens from `first` on, widened, each `width` floats.
  ADVANCE_STEP_INLINE void gather(int64_t row, int64_t head, int64_t which, int64_t first, int64_t count, int64_t size,
                                  int64_t width, float* to) const {
    prefetch(row, head, which, first + kAhead);
    int64_t column = first / pages.block_size, offset = first % pages.block_size;
    const T* from = pages.at(page(row, column), which, head, offset);
    for (int64_t j = 0; j < count; ++j) {
      widen_all(from, size, to + j * width);
      from += pages.dim;
      if (++offset == pages.block_size && j + 1 < count) {
        offset = 0;
        from = pages.at(page(row, ++column), which, head, 0);
      }
    }
  }

  // Units [begin, end) of rows * kv_heads, all rows of a head one after the other. Width: of a key and of a value,
  // widened, where it is one of those that the loops are compiled for; else 0. Shuffles: whether `sums` is fast.
  template <int64_t Width, bool Shuffles>
  ADVANCE_STEP_INLINE void units(int64_t begin, int64_t end) const {
    const int64_t queries = group() * tokens;
    const int64_t key_width = Width ? Width : padded(key_dim, kBlock);
    const int64_t value_width = Width ? Width : padded(value_dim, kBlock);
    const int64_t wide = key_width > value_width ? key_width : value_width;
    int64_t longest = 0;
    for (int64_t row = 0; row < rows; ++row) {
      int64_t first, last;
      keys_of(row, &first, &last);
      if (last - first + 1 > longest) longest = last - first + 1;
    }
    const int64_t reach = padded(longest, kLanes);
    const std::unique_ptr<float[]> room(new float[queries * (key_width + value_width + reach) + kLanes * wide]());
    float* const q = room.get();
    float* const totals = q + queries * key_width;
    float* const scores = totals + queries * value_width;
    float* const block = scores + queries * reach;  // of widened keys or values
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t head = unit / rows, row = unit % rows;
      int64_t first, last;
      keys_of(row, &first, &last);
      const int64_t count = last - first + 1;
      for (int64_t i = 0; i < queries; ++i) {
        widen_all(query.at(row, head * group() + i / tokens, i % tokens), key_dim, q + i * key_width);
      }
      for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t some = count - j < kLanes ? count - j : kLanes;
        gather(row, head, 0, first + j, some, key_dim, key_width, block);
        for (int64_t i = 0; i < queries; ++i) {
          dots<Shuffles>(q + i * key_width, block, key_width, scores + i * reach + j);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        int64_t begin_seen, end_seen;
        seen(positions[row * tokens + i % tokens], &begin_seen, &end_seen);
        softmax(scores + i * reach, count, begin_seen - first, end_seen - first, head * group() + i / tokens);
      }
      std::memset(totals, 0, queries * value_width * sizeof(float));
      for (int64_t j = 0; j < count; j += kLanes) {
        const int64_t some = count - j < kLanes ? count - j : kLanes;
        gather(row, head, 1, first + j, some, value_dim, value_width, block);
        for (int64_t i = 0; i < queries; ++i) {
          add<Width>(scores + i * reach + j, block, some, value_width, totals + i * value_width);
        }
      }
      for (int64_t i = 0; i < queries; ++i) {
        T* const to = out + ((row * tokens + i % tokens) * heads + head * group() + i / tokens) * value_dim;
        narrow_all(totals + i * value_width, value_dim, to);
      }
    }
  }

  // Scores of one query against the keys of a vector of scores; lanes of keys that are not there mean nothing.
  template <bool Shuffles>
  ADVANCE_STEP_INLINE void dots(const float* q, const float* keys, int64_t width, float* to) const {
    Floats products[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      products[j] = Floats{};
      for (int64_t d = 0; d < width; d += kLanes) products[j] += load(q + d) * load(keys + j * width + d);
    }
    if constexpr (Shuffles) {
      store(to, sums(products) * scaling);
    } else {
      for (int64_t j = 0; j < kLanes; ++j) to[j] = sum(products[j]) * scaling;
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
      float wide[kBlock];
      widen_all(sinks + head, 1, wide);
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

  // Adds values to the sums, each by its weight.
  template <int64_t Width>
  static ADVANCE_STEP_INLINE void add(const float* weights, const float* values, int64_t count, int64_t width,
                                      float* sums) {
    if constexpr (Width) {
      Floats to[Width / kLanes];
      for (int64_t d = 0; d < Width / kLanes; ++d) to[d] = load(sums + d * kLanes);
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t d = 0; d < Width / kLanes; ++d) to[d] += weights[j] * load(values + j * Width + d * kLanes);
      }
      for (int64_t d = 0; d < Width / kLanes; ++d) store(sums + d * kLanes, to[d]);
    } else {
      for (int64_t d = 0; d < width; d += kLanes) {
        Floats to = load(sums + d);
        for (int64_t j = 0; j < count; ++j) to += weights[j] * load(values + j * width + d);
        store(sums + d, to);
      }
    }
  }
};

}  // namespace advance_step
