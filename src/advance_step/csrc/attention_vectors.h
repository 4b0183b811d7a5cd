// The loops of attention over keys and values by vectors, for every dtype and processor.
#pragma once

#include "attention.h"

namespace advance_step {

// Keys and values are widened, kLanes at a time, and then meet all queries. Width: of a key and of a value, where it is
// one of those that the loops are compiled for; else 0. Shuffles: whether `sums` is fast.
template <class T, int64_t Width, bool Shuffles>
class VectorLoops {
 public:
  static constexpr int64_t kStart = 1;  // keys are taken from any token on

  // reach, width: floats between the scores of two queries, and between their totals.
  ADVANCE_STEP_INLINE VectorLoops(const PagedAttention<T>& attention, int64_t reach, int64_t width)
      : attention_(attention),
        reach_(reach),
        key_width_(Width ? Width : padded(attention.key_dim, kBlock)),
        value_width_(Width ? Width : width),
        queries_(new float[attention.queries() * key_width_]()),
        block_(new float[kLanes * (key_width_ > value_width_ ? key_width_ : value_width_)]()) {}

  // The scores of all queries against the keys.
  ADVANCE_STEP_INLINE void score(const Keys& keys, float* scores) {
    for (int64_t i = 0; i < attention_.queries(); ++i) {
      widen_all(attention_.query_of(keys, i), attention_.key_dim, queries_.get() + i * key_width_);
    }
    for (int64_t j = 0; j < keys.count; j += kLanes) {
      gather(keys, 0, j, attention_.key_dim, key_width_);
      for (int64_t i = 0; i < attention_.queries(); ++i) {
        dots(queries_.get() + i * key_width_, scores + i * reach_ + j);
      }
    }
  }

  // The sums of the values by their weights, of all queries.
  ADVANCE_STEP_INLINE void weigh(const Keys& keys, const float* weights, float* totals) {
    std::memset(totals, 0, attention_.queries() * value_width_ * sizeof(float));
    for (int64_t j = 0; j < keys.count; j += kLanes) {
      const int64_t count = gather(keys, 1, j, attention_.value_dim, value_width_);
      for (int64_t i = 0; i < attention_.queries(); ++i) {
        add(weights + i * reach_ + j, count, totals + i * value_width_);
      }
    }
  }

  // The totals of one query, in the dtype and the order of the output.
  ADVANCE_STEP_INLINE void finish(const float* totals, T* to) const {
    const int64_t size = attention_.value_dim;
    int64_t i = 0;
    for (; i + kBlock <= size; i += kBlock) narrow(totals + i, to + i);
    if (i < size) {
      T rest[kBlock];
      narrow(totals + i, rest);
      std::memcpy(to + i, rest, (size - i) * sizeof(T));
    }
  }

 private:
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

  // Widens keys or values (`which`) of up to kLanes tokens from the j-th on into the block; returns how many.
  ADVANCE_STEP_INLINE int64_t gather(const Keys& keys, int64_t which, int64_t j, int64_t size, int64_t width) {
    const int64_t block_size = attention_.pages.block_size, token = keys.start + j;
    attention_.prefetch(keys, which, token + kAhead);
    const int64_t count = keys.count - j < kLanes ? keys.count - j : kLanes;
    const T* from = attention_.at(keys, which, token);
    for (int64_t i = 0; i < count; ++i) {
      widen_all(from, size, block_.get() + i * width);
      from += attention_.pages.dim;
      if ((token + i + 1) % block_size == 0 && i + 1 < count) from = attention_.at(keys, which, token + i + 1);
    }
    return count;
  }

  // Scores of one query against the keys of the block; lanes of keys that are not there mean nothing.
  ADVANCE_STEP_INLINE void dots(const float* query, float* to) const {
    const int64_t width = Width ? Width : key_width_;
    Floats products[kLanes];
    for (int64_t j = 0; j < kLanes; ++j) {
      products[j] = Floats{};
      for (int64_t d = 0; d < width; d += kLanes) products[j] += load(query + d) * load(block_.get() + j * width + d);
    }
    if constexpr (Shuffles) {
      store(to, sums(products) * attention_.scaling);
    } else {
      for (int64_t j = 0; j < kLanes; ++j) to[j] = sum(products[j]) * attention_.scaling;
    }
  }

  // Adds the values of the block to the sums of one query, each by its weight.
  ADVANCE_STEP_INLINE void add(const float* weights, int64_t count, float* sums) const {
    const float* const values = block_.get();
    if constexpr (Width) {
      Floats to[Width / kLanes];
      for (int64_t d = 0; d < Width / kLanes; ++d) to[d] = load(sums + d * kLanes);
      for (int64_t j = 0; j < count; ++j) {
        for (int64_t d = 0; d < Width / kLanes; ++d) to[d] += weights[j] * load(values + j * Width + d * kLanes);
      }
      for (int64_t d = 0; d < Width / kLanes; ++d) store(sums + d * kLanes, to[d]);
    } else {
      for (int64_t d = 0; d < value_width_; d += kLanes) {
        Floats to = load(sums + d);
        for (int64_t j = 0; j < count; ++j) to += weights[j] * load(values + j * value_width_ + d);
        store(sums + d, to);
      }
    }
  }

  const PagedAttention<T>& attention_;
  const int64_t reach_, key_width_, value_width_;
  const std::unique_ptr<float[]> queries_, block_;
};

}  // namespace advance_step
