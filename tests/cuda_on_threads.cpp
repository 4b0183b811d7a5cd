// The CUDA kernels of advance_step_flashinfer run as they stand in cuda.cu, every CUDA thread a thread of the CPU, with
// real barriers where the kernels have them; held to a plain loop. test_cuda_source.py cuts kernels.inc out of cuda.cu.
#include <algorithm>
#include <barrier>
#include <cstdio>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "advance.h"

struct Index {
  int x;
};
thread_local Index threadIdx, blockIdx;
std::unique_ptr<std::barrier<>> block;
std::vector<std::unique_ptr<std::barrier<>>> warps;
std::vector<int64_t> lanes;  // what each thread of the block gives to its warp

#define __global__
#define __device__
#define __grid_constant__
#define __launch_bounds__(threads)
#define __shared__ static  // blocks run one after the other
void __syncthreads() { block->arrive_and_wait(); }
int64_t __shfl_up_sync(unsigned, int64_t value, int distance) {
  std::barrier<>& warp = *warps[threadIdx.x / 32];
  lanes[threadIdx.x] = value;
  warp.arrive_and_wait();
  const int64_t got = threadIdx.x % 32 >= distance ? lanes[threadIdx.x - distance] : value;
  warp.arrive_and_wait();
  return got;
}

namespace advance_step {
#include "kernels.inc"
}
using namespace advance_step;

template <class Kernel>
void launch(int blocks, int threads, Kernel kernel) {
  for (int b = 0; b < blocks; ++b) {
    block = std::make_unique<std::barrier<>>(threads);
    lanes.assign(threads, 0);
    warps.clear();
    for (int w = 0; w < threads / 32; ++w) warps.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> all;
    for (int t = 0; t < threads; ++t) {
      all.emplace_back([=] {
        threadIdx.x = t, blockIdx.x = b;
        kernel();
      });
    }
    for (auto& thread : all) thread.join();
  }
}

using Ints = std::vector<int32_t>;
constexpr int64_t kColumns = 5, kBlock = 16;

// `num_indices`: as many as fit are written, and nothing past them.
bool right(int64_t rows, int64_t live, int64_t num_indices, std::mt19937_64& random) {
  std::vector<int64_t> tokens(rows), positions(rows), slots(rows), sampled(live, 3);
  Ints lens(rows), table(rows * kColumns), indices(num_indices + 8, -77), indptr(rows + 1, -77);
  Ints last(rows, -77), bound(rows, -77);
  for (auto& length : lens) length = static_cast<int32_t>(random() % 100) - 5;  // some negative, some past the table
  for (auto& page : table) page = static_cast<int32_t>(random() % 1000);
  Ints expected_indices = indices, expected_indptr(rows + 1, 0), expected_last = last, expected_bound = bound;
  int64_t end = 0;
  for (int64_t i = 0; i < rows; ++i) {
    if (i < live) {
      const int64_t p = lens[i], pages = p < 0 ? 0 : std::min(p / kBlock + 1, kColumns);
      expected_bound[i] = static_cast<int32_t>(pages);
      expected_last[i] = static_cast<int32_t>((p % kBlock + kBlock) % kBlock + 1);
      for (int64_t j = 0; j < pages; ++j, ++end) {
        if (end < num_indices) expected_indices[end] = table[i * kColumns + j];
      }
    }
    expected_indptr[i + 1] = static_cast<int32_t>(end);
  }
  const Matrix<const int32_t> ids{table.data(), kColumns, kColumns, 1};
  const auto block_tables = BlockTable<Matrix<const int32_t>>::of(ids, kBlock, INT32_MAX);
  const PlainStep<int32_t, int32_t, int64_t, int64_t> step{
      rows, live, {tokens.data(), 1}, {sampled.data(), 1}, {positions.data(), 1}, {lens.data(), 1}, {slots.data(), 1},
      block_tables};
  const FlashInferPages<int32_t, int64_t> pages{
      live, ids, BlockSize::of(kBlock), {indices.data(), 1}, num_indices, {indptr.data(), 1}, {last.data(), 1},
      {bound.data(), 1}};
  launch(1, kScanThreads, [&] { advance_and_scan(step, pages); });
  launch(static_cast<int>((live * kWarp + kThreads - 1) / kThreads), kThreads, [&] { copy_pages(pages, live); });
  return indices == expected_indices && indptr == expected_indptr && last == expected_last && bound == expected_bound;
}

int main() {
  std::mt19937_64 random(1);
  for (int64_t rows : {1, 33, 1024, 1025, 2100}) {
    for (int64_t indices : {rows * kColumns, rows}) {
      if (!right(rows, rows - rows / 5, indices, random)) return std::printf("wrong at %d rows\n", (int)rows), 1;
    }
  }
  std::puts("right");
}
