// Tiles of 16 rows of 64 bytes, and products of them: AMX, which some x86 processors have for bfloat16.
//
// _tile_dpbf16ps(c, a, b) adds to float32 c [m, n] the products of a [m, 32] with b [16, n, 2], which holds of each of
// n columns the elements 0 and 1, then 2 and 3, and so on.
#pragma once

#include <cstdint>

#if defined(__x86_64__) && defined(__linux__) && ((defined(__clang__) && __clang_major__ >= 12) || __GNUC__ >= 11)
#define ADVANCE_STEP_AMX
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Of functions that use tiles; the processors that have them have all of this.
#define ADVANCE_STEP_TILES __attribute__((target("avx512f,avx512bw,fma,amx-tile,amx-bf16")))

namespace advance_step {

constexpr int64_t kTileRows = 16, kTileBytes = 64;

// Whether the processor has tiles of bfloat16, and the kernel lets this process use them.
inline bool ask_for_tiles() {
  unsigned int a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(d >> 22 & 1) || !(d >> 24 & 1)) return false;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw")) return false;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // of Linux's arch_prctl
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

inline bool has_tiles() {
  static const bool found = ask_for_tiles();  // once a process
  return found;
}

// Between writing memory and loading a tile from it: GCC's _tile_loadd and _tile_loadconfig do not tell the compiler
// that they read memory, so that it might write later, or never.
inline void written() { __asm__ volatile("" ::: "memory"); }

// What each of the eight tiles holds, as _tile_loadconfig takes it.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};

  void set(int tile, int64_t tile_rows, int64_t bytes) {
    rows[tile] = static_cast<uint8_t>(tile_rows);
    row_bytes[tile] = static_cast<uint16_t>(bytes);
  }

  ADVANCE_STEP_TILES void load() const {
    written();
    _tile_loadconfig(this);
  }
};

}  // namespace advance_step

#endif
