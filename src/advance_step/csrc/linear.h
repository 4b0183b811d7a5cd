// Linear layers over weights that are laid out for it, on a CPU: the computation, free of torch.
//
// Where a batch has few rows, a layer takes as long as its weights take to be read, so each is read once, from one end
// to the other. Weights are bfloat16, sums are in float32. The loops are those of this processor's vectors or, where it
// has them, of its tiles (AMX), which stay at the speed of memory for ten times as many rows.
#pragma once

#include <initializer_list>
#include <memory>

#include "lanes.h"
#include "tiles.h"

namespace advance_step {

constexpr int64_t kPanel = 1 << 19;  // bytes of input that stay in a processor's cache while the weights go by

struct PackedLinear {
  int64_t rows, ins, outs;  // ins: a multiple of kBlock
  const BFloat16* input;    // [rows, ins]
  const BFloat16* weight;  // [blocks, ins / 2, kLanes, 2]: a block is kLanes outputs, the last one filled up with zeros
  const BFloat16* bias;    // [outs], or null
  BFloat16* out;           // [rows, outs]

  int64_t blocks() const { return padded(outs, kLanes) / kLanes; }
  const BFloat16* weight_of(int64_t block, int64_t in) const { return weight + (block * ins + in) * kLanes; }

  // Calls work(row, block) for `count` rows from each `row` on and `step` blocks from each `block` on, of all rows and
  // the blocks [begin, end). Where pieces of `count` rows do not add up, some rows are in two of them. The inputs of as
  // many rows as stay in a processor's cache meet all blocks before the next come.
  template <class Work>
  ADVANCE_STEP_INLINE void in_pieces(int64_t count, int64_t begin, int64_t end, int64_t step, const Work& work) const {
    const int64_t fit = kPanel / (ins * static_cast<int64_t>(sizeof(BFloat16))) / count * count;
    const int64_t panel = fit > count ? fit : count;
    for (int64_t first = 0; first < rows; first += panel) {
      for (int64_t block = begin; block < end; block += step) {
        for (int64_t row = first; row < rows && row < first + panel; row += count) {
          work(row + count <= rows ? row : rows - count, block);
        }
      }
    }
  }

  // Adds the bias to the sums [kLanes] of a row and a block of outputs, rounds and stores them.
  ADVANCE_STEP_INLINE void finish(int64_t row, int64_t block, const float* from) const {
    const Floats sums = load(from);
    const int64_t first = block * kLanes;
    BFloat16* const to = out + row * outs + first;
    if (first + kLanes <= outs) {
      narrow_in_order(bias ? sums + widen_in_order(bias + first) : sums, to);
    } else {
      BFloat16 values[kLanes] = {};
      if (bias) std::memcpy(values, bias + first, (outs - first) * sizeof(BFloat16));
      narrow_in_order(sums + widen_in_order(values), values);
      std::memcpy(to, values, (outs - first) * sizeof(BFloat16));
    }
  }

  // The blocks [begin, end) of outputs, for all rows, by vectors; at most `Rows` rows and `Blocks` blocks at a time.
  template <int64_t Rows, int64_t Blocks>
  ADVANCE_STEP_INLINE void by_vectors(int64_t begin, int64_t end) const {
    if constexpr (Rows > 1) {
      if (rows < Rows) return by_vectors<Rows / 2, Blocks>(begin, end);
    }
    const std::unique_ptr<float[]> room(new float[Rows * ins]);
    in_pieces(Rows, begin, end, Blocks, [&](int64_t row, int64_t block) __attribute__((always_inline)) {
      if (block + Blocks <= end) {
        sum<Rows, Blocks>(row, block, room.get());
      } else {
        for (int64_t left = block; left < end; ++left) sum<Rows, 1>(row, left, room.get());
      }
    });
  }

  template <int64_t Rows, int64_t Blocks>
  ADVANCE_STEP_INLINE void sum(int64_t row, int64_t block, float* wide) const {
    for (int64_t i = 0; i < Rows; ++i) {
      for (int64_t in = 0; in < ins; in += kBlock) widen(input + (row + i) * ins + in, wide + i * ins + in);
    }
    Floats sums[Rows][Blocks] = {};
    for (int64_t in = 0; in < ins; in += kBlock) {
      for (int64_t pair = 0; pair < kLanes; ++pair) {
        for (int64_t b = 0; b < Blocks; ++b) {
          float weights[kBlock];
          const BFloat16* const from = weight_of(block + b, in + 2 * pair);
          __builtin_prefetch(from + Blocks * ins * kLanes);
          widen(from, weights);
          const Floats first = load(weights), second = load(weights + kLanes);
          for (int64_t i = 0; i < Rows; ++i) {
            const float* const x = wide + i * ins + in + pair;
            sums[i][b] += x[0] * first + x[kLanes] * second;
          }
        }
      }
    }
    for (int64_t i = 0; i < Rows; ++i) {
      for (int64_t b = 0; b < Blocks; ++b) {
        float of_block[kLanes];
        store(of_block, sums[i][b]);
        finish(row + i, block + b, of_block);
      }
    }
  }
};

#ifdef ADVANCE_STEP_AMX

// Of `count` rows and two blocks of outputs. Tiles 0 to 3 are sums of [rows 0-15, rows 16-31] by [block, next block], 4
// and 5 the rows' inputs, 6 and 7 the blocks' weights.
inline TileShapes shapes_of(int64_t count) {
  const int64_t upper = count < kTileRows ? count : kTileRows, lower = count > upper ? count - upper : 1;
  TileShapes shapes;
  for (const int tile : {0, 1, 4}) shapes.set(tile, upper, kTileBytes);
  for (const int tile : {2, 3, 5}) shapes.set(tile, lower, kTileBytes);
  for (const int tile : {6, 7}) shapes.set(tile, kTileRows, kTileBytes);
  return shapes;
}

// `count` rows from `row` on, more than 16 if Lower, and two blocks of outputs, or the same one twice.
template <bool Lower>
ADVANCE_STEP_TILES inline void sum_tiles(const PackedLinear& linear, int64_t row, int64_t count, int64_t block,
                                         int64_t next) {
  const int64_t ins = linear.ins, row_bytes = ins * static_cast<int64_t>(sizeof(BFloat16));
  const BFloat16* const input = linear.input + row * ins;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t in = 0; in < ins; in += kBlock) {
    const BFloat16 *const weights = linear.weight_of(block, in), *const weights_of_next = linear.weight_of(next, in);
    if (row == 0) {
      for (int64_t line = 0; line < kTileRows; ++line) {  // of the two blocks that come then
        __builtin_prefetch(weights + 2 * ins * kLanes + line * kBlock, 0, 2);
        __builtin_prefetch(weights_of_next + 2 * ins * kLanes + line * kBlock, 0, 2);
      }
    }
    _tile_loadd(4, input + in, row_bytes);
    _tile_loadd(6, weights, kTileBytes);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, weights_of_next, kTileBytes);
    _tile_dpbf16ps(1, 4, 7);
    if constexpr (Lower) {
      _tile_loadd(5, input + kTileRows * ins + in, row_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  alignas(64) float sums[4][kTileRows][kLanes];
  _tile_stored(0, sums[0], kTileBytes);
  _tile_stored(1, sums[1], kTileBytes);
  _tile_stored(2, sums[2], kTileBytes);
  _tile_stored(3, sums[3], kTileBytes);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t half = i / kTileRows * 2;
    linear.finish(row + i, block, sums[half][i % kTileRows]);
    linear.finish(row + i, next, sums[half + 1][i % kTileRows]);
  }
}

// As by_vectors, by tiles.
ADVANCE_STEP_TILES inline void by_tiles(const PackedLinear& linear, int64_t begin, int64_t end) {
  const int64_t count = linear.rows < 2 * kTileRows ? linear.rows : 2 * kTileRows;
  const auto sum = count > kTileRows ? sum_tiles<true> : sum_tiles<false>;
  shapes_of(count).load();
  linear.in_pieces(count, begin, end, 2, [&](int64_t row, int64_t block) {
    sum(linear, row, count, block, block + 1 < end ? block + 1 : block);
  });
  _tile_release();
}

#endif

}  // namespace advance_step
