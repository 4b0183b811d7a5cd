// Vectors of 16 floats for loops over keys and values: elements of any dtype to float32 and back, sums, exponentials.
//
// By the vector extensions of GCC and Clang, so that one source serves every processor. 16-bit elements are widened in
// pairs, which takes no shuffles: see `place`.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#define ADVANCE_STEP_INLINE inline __attribute__((always_inline))

// Vectors are passed to functions that are always inlined, whatever the ABI.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace advance_step {

inline int64_t padded(int64_t size, int64_t to) { return (size + to - 1) / to * to; }

constexpr int64_t kLanes = 16;
typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint32_t Words __attribute__((vector_size(64)));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class To, class From>
ADVANCE_STEP_INLINE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

ADVANCE_STEP_INLINE Floats load(const float* from) {
  Floats values;
  std::memcpy(&values, from, sizeof(values));
  return values;
}
ADVANCE_STEP_INLINE void store(float* to, Floats values) { std::memcpy(to, &values, sizeof(values)); }

// 32 elements as float32 in two vectors. Of 16-bit ones the first vector has those of even places, the second the
// others, which takes no shuffles: all that is widened has the order of `place`.
constexpr int64_t kBlock = 2 * kLanes;
ADVANCE_STEP_INLINE void widen(const float* from, float* to) { std::memcpy(to, from, kBlock * sizeof(float)); }
ADVANCE_STEP_INLINE void widen(const BFloat16* from, float* to) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  store(to, bits_as<Floats>(pairs << 16));
  store(to + kLanes, bits_as<Floats>(pairs & 0xffff0000));
}
ADVANCE_STEP_INLINE Floats float_of(Words half) {
  const Floats magnitude = bits_as<Floats>((half & 0x7fff) << 13) * 0x1p112f;    // rebiases the exponent
  const Words special = bits_as<Words>((half & 0x7c00) == 0x7c00) & 0x7f800000;  // infinities and NaNs keep theirs
  return bits_as<Floats>(bits_as<Words>(magnitude) | special | ((half & 0x8000) << 16));
}
ADVANCE_STEP_INLINE void widen(const Float16* from, float* to) {
  Words pairs;
  std::memcpy(&pairs, from, sizeof(pairs));
  store(to, float_of(pairs & 0xffff));
  store(to + kLanes, float_of(pairs >> 16));
}
template <class T>
ADVANCE_STEP_INLINE int64_t place(int64_t i) {
  if (sizeof(T) == 4) return i;
  return i / kBlock * kBlock + i % 2 * kLanes + i % kBlock / 2;
}

// Back from the order of `place`, to the nearest, of two the even one, as torch rounds.
ADVANCE_STEP_INLINE void narrow(const float* from, float* to) { std::memcpy(to, from, kBlock * sizeof(float)); }
ADVANCE_STEP_INLINE Words rounded(Floats values) {
  const Words bits = bits_as<Words>(values), nan = bits_as<Words>(values != values);
  return (bits + 0x7fff + ((bits >> 16) & 1)) | (nan & 0x7fc00000);
}
ADVANCE_STEP_INLINE void narrow(const float* from, BFloat16* to) {
  const Words pairs = (rounded(load(from)) >> 16) | (rounded(load(from + kLanes)) & 0xffff0000);
  std::memcpy(to, &pairs, sizeof(pairs));
}
ADVANCE_STEP_INLINE void narrow_one(float value, Float16* to) {
  const uint32_t sign = (bits_as<uint32_t>(value) >> 16) & 0x8000;
  const float magnitude = std::fabs(value);
  uint32_t bits;
  if (!(magnitude < 65520.0f)) {
    bits = std::isnan(value) ? 0x7e00 : 0x7c00;
  } else if (magnitude < 0x1p-14f) {  // a subnormal one: in steps of 2^-24, which the addition rounds to
    bits = bits_as<uint32_t>(magnitude + 0.5f) - bits_as<uint32_t>(0.5f);
  } else {
    const auto wide = bits_as<uint32_t>(magnitude) - (uint32_t{112} << 23);
    bits = (wide + 0xfff + ((wide >> 13) & 1)) >> 13;
  }
  to->bits = static_cast<uint16_t>(sign | bits);
}
ADVANCE_STEP_INLINE void narrow(const float* from, Float16* to) {
  for (int64_t i = 0; i < kBlock; ++i) narrow_one(from[place<Float16>(i)], to + i);
}

// 16 elements of bfloat16 to float32 and back, in their order.
typedef uint16_t Halves __attribute__((vector_size(32)));
ADVANCE_STEP_INLINE Floats widen_in_order(const BFloat16* from) {
  Halves halves;
  std::memcpy(&halves, from, sizeof(halves));
  return bits_as<Floats>(__builtin_convertvector(halves, Words) << 16);
}
ADVANCE_STEP_INLINE void narrow_in_order(Floats values, BFloat16* to) {
  const Halves halves = __builtin_convertvector(rounded(values) >> 16, Halves);
  std::memcpy(to, &halves, sizeof(halves));
}

typedef float Eight __attribute__((vector_size(32)));
typedef float Four __attribute__((vector_size(16)));

ADVANCE_STEP_INLINE float sum(Floats values) {
  Eight halves[2];
  std::memcpy(halves, &values, sizeof(values));
  const Eight eight = halves[0] + halves[1];
  Four quarters[2];
  std::memcpy(quarters, &eight, sizeof(eight));
  const Four four = quarters[0] + quarters[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

// The sums of 16 vectors, in their order. By shuffles of two vectors, which only AVX-512 has for so wide ones.
#if defined(__clang__)
#define ADVANCE_STEP_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define ADVANCE_STEP_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Ints{__VA_ARGS__})
#endif
ADVANCE_STEP_INLINE Floats sums(Floats* v) {
  for (int i = 0; i < 8; ++i) {
    v[i] = ADVANCE_STEP_SHUFFLE(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           ADVANCE_STEP_SHUFFLE(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = ADVANCE_STEP_SHUFFLE(v[i], v[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           ADVANCE_STEP_SHUFFLE(v[i], v[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  }
  for (int i = 0; i < 2; ++i) {
    v[i] = ADVANCE_STEP_SHUFFLE(v[i], v[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           ADVANCE_STEP_SHUFFLE(v[i], v[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  }
  return ADVANCE_STEP_SHUFFLE(v[0], v[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         ADVANCE_STEP_SHUFFLE(v[0], v[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}
ADVANCE_STEP_INLINE float largest(Floats values) {
  float most = values[0];
  for (int64_t lane = 1; lane < kLanes; ++lane) most = values[lane] > most ? values[lane] : most;
  return most;
}

// e^x for x <= 0, and 0 below -87, to a relative error of about 2^-22.
ADVANCE_STEP_INLINE Floats exponential(Floats x) {
  const Ints large_enough = ~(x < -87.0f);  // a NaN stays one
  x = bits_as<Floats>(bits_as<Ints>(x) & large_enough);
  const Floats magic = Floats{} + 12582912.0f;  // 1.5 * 2^23: added, the sum's last bits are the rounded integer
  const Floats shifted = x * 1.44269504f + magic, power = shifted - magic;
  const Floats r = x - power * 0.693359375f + power * 2.12194440e-4f;
  Floats p = Floats{} + 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const Ints scale = (bits_as<Ints>(shifted) - bits_as<Ints>(magic) + 127) << 23;
  return bits_as<Floats>(bits_as<Ints>(p * bits_as<Floats>(scale)) & large_enough);
}

}  // namespace advance_step
