// Tensors as typed views, and where a token lies: the arithmetic that every operator shares, free of torch.
//
// Nothing here reads outside a table, whatever the tensors hold: a position without a page gets the pad slot.
#pragma once

#include <cstdint>
#include <type_traits>

#if defined(__CUDACC__)
#define ADVANCE_STEP_FN __host__ __device__ __forceinline__
#else
#define ADVANCE_STEP_FN inline __attribute__((always_inline))
#endif

namespace advance_step {

constexpr int64_t kPadSlot = -1;

// A stride in elements is an int64_t or, where the compiler should know that buffers are contiguous, a One.
using One = std::integral_constant<int64_t, 1>;

// [n]
template <class T, class Stride = int64_t>
struct Vector {
  T* data;
  Stride stride;
  ADVANCE_STEP_FN T& operator[](int64_t i) const { return data[i * stride]; }
};

// [rows, columns]
template <class T, class Stride = int64_t>
struct Matrix {
  T* data;
  int64_t columns, row_stride;
  Stride column_stride;
  ADVANCE_STEP_FN T& operator()(int64_t row, int64_t column) const {
    return data[row * row_stride + column * column_stride];
  }
};

// int32 or int64, decided at run time: where a type parameter for each tensor would make too many kernels.
template <class Stride>
struct IntVector {
  void* data;
  Stride stride;
  bool wide;
  ADVANCE_STEP_FN int64_t get(int64_t i) const {
    return wide ? static_cast<int64_t*>(data)[i * stride] : static_cast<int32_t*>(data)[i * stride];
  }
  ADVANCE_STEP_FN void set(int64_t i, int64_t value) const {
    if (wide) {
      static_cast<int64_t*>(data)[i * stride] = value;
    } else {
      static_cast<int32_t*>(data)[i * stride] = static_cast<int32_t>(value);
    }
  }
  ADVANCE_STEP_FN int64_t largest() const { return wide ? INT64_MAX : INT32_MAX; }
  // As what `wide` says that it is: for a loop that is to decide once.
  template <class T>
  Vector<const T, Stride> as() const {
    return {static_cast<const T*>(data), stride};
  }
};
template <class Stride>
struct IntMatrix {
  const void* data;
  int64_t columns, row_stride;
  Stride column_stride;
  bool wide;
  ADVANCE_STEP_FN int64_t operator()(int64_t row, int64_t column) const {
    const int64_t at = row * row_stride + column * column_stride;
    return wide ? static_cast<const int64_t*>(data)[at] : static_cast<const int32_t*>(data)[at];
  }
};

template <class T>
ADVANCE_STEP_FN constexpr T largest() {
  return sizeof(T) == 8 ? static_cast<T>(INT64_MAX) : static_cast<T>(INT32_MAX);
}
// `value`, or the largest T where that is less.
template <class T>
ADVANCE_STEP_FN constexpr T at_most(int64_t value) {
  return value < largest<T>() ? static_cast<T>(value) : largest<T>();
}

// Wraps where the true value does not fit; signed overflow would be undefined.
ADVANCE_STEP_FN int64_t wrapping_add(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) + static_cast<uint64_t>(b));
}
ADVANCE_STEP_FN int64_t wrapping_mul(int64_t a, int64_t b) {
  return static_cast<int64_t>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}

// Tokens per page. A division takes most of a row's time, so a power of two is shifted instead.
struct BlockSize {
  int64_t value;
  int shift;  // log2(value), or -1 where value is no power of two

  static BlockSize of(int64_t value) {
    if ((value & (value - 1)) != 0) return {value, -1};
    int shift = 0;
    while ((value >> shift) > 1) ++shift;
    return {value, shift};
  }
  // Of two, as nearly always: the compiler is to lay out the loops for that.
  ADVANCE_STEP_FN bool is_power() const { return __builtin_expect(shift >= 0, 1); }
  // Of a position >= 0; 32-bit division is several times faster, and nearly every position fits.
  ADVANCE_STEP_FN int64_t column(int64_t position) const {
    if (is_power()) return position >> shift;
    if (((position | value) >> 32) == 0) return static_cast<uint32_t>(position) / static_cast<uint32_t>(value);
    return position / value;
  }
  // position % value, not below 0.
  ADVANCE_STEP_FN int64_t offset(int64_t position) const {
    const int64_t remainder = position % value;
    return remainder < 0 ? remainder + value : remainder;
  }
  // page * value + position % value; wraps where that does not fit 64 bits.
  ADVANCE_STEP_FN int64_t slot(int64_t page, int64_t position, int64_t column) const {
    if (is_power()) return static_cast<int64_t>(static_cast<uint64_t>(page) << shift) | (position & (value - 1));
    return wrapping_add(wrapping_mul(page, value), position - column * value);
  }
};

// The page ids of every sequence, Matrix or IntMatrix, and what is read from them.
template <class Ids>
struct BlockTable {
  Ids ids;
  BlockSize block_size;
  int64_t limit;  // positions [0, limit) have a column; never past 2^63 - 1

  static BlockTable of(Ids ids, int64_t block_size, int64_t most = INT64_MAX) {
    const int64_t limit = ids.columns > most / block_size ? most : ids.columns * block_size;
    return {ids, BlockSize::of(block_size), limit};
  }
  // Where the token at `position` of sequence `row` lies in the cache: page id * block size + offset, 64-bit.
  ADVANCE_STEP_FN int64_t slot(int64_t row, int64_t position) const {
    if (static_cast<uint64_t>(position) >= static_cast<uint64_t>(limit)) return kPadSlot;
    const int64_t column = block_size.column(position);
    const int64_t page = ids(row, column);
    return page < 0 ? kPadSlot : block_size.slot(page, position, column);
  }
};

}  // namespace advance_step
