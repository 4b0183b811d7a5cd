// The loops of attention over keys and values of bfloat16 by tiles.
//
// Keys and values are read as they lie in the pages: 16 keys are the rows of a tile, and of values, two tokens' are
// interleaved. A weight, of float32, takes part as two numbers of bfloat16, which together have 16 of its 24 bits.
#pragma once

#include "attention.h"
#include "tiles.h"

#ifdef ADVANCE_STEP_AMX

namespace advance_step {

// Tile 0 has the products of 16 tokens with the queries, 1 the queries, 2 the tokens, 3 the weights, 4 to 7 the totals.
class TileLoops {
 public:
  static constexpr int64_t kStart = kTileRows;  // keys are taken 16 by 16, from a multiple on

  static bool serve(const PagedAttention<BFloat16>& attention) {
    return has_tiles() && 2 * attention.queries() <= kTileRows && attention.key_dim % kBlock == 0 &&
           attention.value_dim % kBlock == 0 && attention.pages.block_size % kTileRows == 0;
  }

  ADVANCE_STEP_TILES TileLoops(const PagedAttention<BFloat16>& attention, int64_t reach, int64_t width)
      : attention_(attention),
        queries_(attention.queries()),
        reach_(reach),
        width_(width),
        pairs_(new uint32_t[attention.key_dim / 2 * kLanes]()),
        weights_(new BFloat16[2 * queries_ * reach]) {
    TileShapes shapes;
    shapes.set(0, kTileRows, queries_ * sizeof(float));
    shapes.set(1, kTileRows, queries_ * sizeof(float));
    shapes.set(2, kTileRows, kTileBytes);
    shapes.set(3, 2 * queries_, kTileBytes);
    for (int part = 0; part < 4; ++part) shapes.set(4 + part, 2 * queries_, kTileBytes);
    shapes.load();
  }
  ADVANCE_STEP_TILES ~TileLoops() { _tile_release(); }

  // As VectorLoops::score.
  ADVANCE_STEP_TILES void score(const Keys& keys, float* scores) {
    for (int64_t i = 0; i < queries_; ++i) {
      const BFloat16* const query = attention_.query_of(keys, i);
      for (int64_t d = 0; d < attention_.key_dim; d += 2) {
        std::memcpy(&pairs_[d / 2 * kLanes + i], query + d, sizeof(uint32_t));
      }
    }
    written();
    alignas(64) float products[kTileRows][kLanes];  // of a key, with each query
    const __m512i column = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                              _mm512_set1_epi32(kLanes));
    const __m512 scaling = _mm512_set1_ps(attention_.scaling);
    for (int64_t j = 0; j < keys.count; j += kTileRows) {
      const BFloat16* const from = attention_.at(keys, 0, keys.start + j);
      attention_.prefetch(keys, 0, keys.start + j + kAhead);
      _tile_zero(0);
      for (int64_t d = 0; d < attention_.key_dim; d += kBlock) {
        _tile_loadd(2, from + d, attention_.pages.dim * sizeof(BFloat16));
        _tile_loadd(1, &pairs_[d / 2 * kLanes], kTileBytes);
        _tile_dpbf16ps(0, 2, 1);
      }
      _tile_stored(0, products, kTileBytes);
      for (int64_t i = 0; i < queries_; ++i) {
        const __m512 of_query = _mm512_i32gather_ps(column, &products[0][i], sizeof(float));
        _mm512_storeu_ps(scores + i * reach_ + j, _mm512_mul_ps(of_query, scaling));
      }
    }
  }

  // As VectorLoops::weigh.
  ADVANCE_STEP_TILES void weigh(const Keys& keys, const float* weights, float* totals) {
    for (int64_t i = 0; i < queries_; ++i) {
      for (int64_t j = 0; j < padded(keys.count, kBlock); j += kLanes) {
        const float none[kLanes] = {};
        BFloat16* const large = &weights_[i * reach_ + j];
        split(j < keys.count ? weights + i * reach_ + j : none, large, large + queries_ * reach_);
      }
    }
    written();
    int64_t d = 0;
    for (; d + 2 * kBlock <= attention_.value_dim; d += 2 * kBlock) weigh<4>(keys, d, totals + d);
    if (d < attention_.value_dim) weigh<2>(keys, d, totals + d);
  }

  // As VectorLoops::finish.
  ADVANCE_STEP_INLINE void finish(const float* totals, BFloat16* to) const {
    for (int64_t d = 0; d < attention_.value_dim; d += kLanes) narrow_in_order(load(totals + d), to + d);
  }

 private:
  // The totals of `Parts` times 16 elements of the values, from the d-th on.
  template <int Parts>
  ADVANCE_STEP_TILES void weigh(const Keys& keys, int64_t d, float* totals) {
    static const BFloat16 none[4 * kLanes] = {};
    alignas(64) BFloat16 lines[Parts][kTileRows][kBlock];  // of 16 elements, of two tokens, one by one
    _tile_zero(4);
    _tile_zero(5);
    if constexpr (Parts == 4) {
      _tile_zero(6);
      _tile_zero(7);
    }
    for (int64_t j = 0; j < keys.count; j += kBlock) {
      for (int64_t some = j; some < j + kBlock; some += kTileRows) {
        const BFloat16* const from = some < keys.count ? attention_.at(keys, 1, keys.start + some) + d : none;
        if (d == 0) attention_.prefetch(keys, 1, keys.start + some + kAhead);
        for (int64_t i = 0; i < kTileRows; i += 2) {
          const bool first = some + i >= keys.hidden && some + i < keys.count;
          const bool second = some + i + 1 >= keys.hidden && some + i + 1 < keys.count;
          const BFloat16* const one = first ? from + i * attention_.pages.dim : none;
          const BFloat16* const other = second ? from + (i + 1) * attention_.pages.dim : none;
          for (int part = 0; part < Parts; part += 2) {
            interleave(one + part * kLanes, other + part * kLanes, lines[part][(some - j + i) / 2],
                       lines[part + 1][(some - j + i) / 2]);
          }
        }
      }
      written();
      _tile_loadd(3, &weights_[j], reach_ * sizeof(BFloat16));
      _tile_loadd(2, lines[0], kTileBytes);
      _tile_dpbf16ps(4, 3, 2);
      _tile_loadd(2, lines[1], kTileBytes);
      _tile_dpbf16ps(5, 3, 2);
      if constexpr (Parts == 4) {
        _tile_loadd(2, lines[2], kTileBytes);
        _tile_dpbf16ps(6, 3, 2);
        _tile_loadd(2, lines[3], kTileBytes);
        _tile_dpbf16ps(7, 3, 2);
      }
    }
    alignas(64) float sums[Parts][kTileRows][kLanes];
    _tile_stored(4, sums[0], kTileBytes);
    _tile_stored(5, sums[1], kTileBytes);
    if constexpr (Parts == 4) {
      _tile_stored(6, sums[2], kTileBytes);
      _tile_stored(7, sums[3], kTileBytes);
    }
    for (int64_t i = 0; i < queries_; ++i) {
      for (int part = 0; part < Parts; ++part) {
        join(sums[part][i], sums[part][queries_ + i], totals + i * width_ + part * kLanes);
      }
    }
  }

  // Clang passes no vectors between functions of different targets; these take none, and become part of their callers.

  // 16 weights as the nearest numbers of bfloat16, and as those nearest to what they are more than that.
  static ADVANCE_STEP_INLINE void split(const float* weights, BFloat16* large, BFloat16* small) {
    narrow_in_order(load(weights), large);
    narrow_in_order(load(weights) - widen_in_order(large), small);
  }

  // Sums of both. An infinite value times a second part of 0 is no number, and means nothing.
  static ADVANCE_STEP_INLINE void join(const float* large, const float* small, float* to) {
    const Floats rest = load(small);
    store(to, load(large) + bits_as<Floats>(bits_as<Ints>(rest) & (rest == rest)));
  }

  // 32 elements of one token and of another, in turns: the first 16 of each, the last 16 of each.
  static ADVANCE_STEP_TILES void interleave(const BFloat16* one, const BFloat16* other, BFloat16* first,
                                            BFloat16* last) {
    const __m512i turns = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                           37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i a = _mm512_loadu_si512(one), b = _mm512_loadu_si512(other);
    _mm512_storeu_si512(first, _mm512_permutex2var_epi16(a, turns, b));
    _mm512_storeu_si512(last, _mm512_permutex2var_epi16(a, _mm512_add_epi16(turns, _mm512_set1_epi16(16)), b));
  }

  const PagedAttention<BFloat16>& attention_;
  const int64_t queries_, reach_, width_;
  const std::unique_ptr<uint32_t[]> pairs_;    // [key_dim / 2, 16]: elements of all queries, two by two
  const std::unique_ptr<BFloat16[]> weights_;  // [2 * queries, reach]: the weights, and what they are more than that
};

}  // namespace advance_step

#endif
