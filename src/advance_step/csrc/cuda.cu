// CUDA: no value is read by the host; a row out of place gets the pad slot. One launch per call on the current stream
// (two for advance_step_flashinfer), a thread a row or an entry, any number of rows; no allocation, no query, no wait.
#include <cuda_runtime.h>

#include <cstdlib>

#include "operators.h"

namespace advance_step {
namespace {

constexpr int kThreads = 256, kScanThreads = 1024, kWarp = 32;

template <class Step>
__global__ void __launch_bounds__(kThreads) advance_rows(const __grid_constant__ Step step, int64_t rows) {
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < rows) step.row(i);
}

// The sum of `value` over the threads up to this one, in a block of kScanThreads; all must call it.
__device__ int64_t block_scan(int64_t value) {
  __shared__ int64_t warp_sums[kScanThreads / kWarp];
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  for (int d = 1; d < kWarp; d *= 2) {
    const int64_t below = __shfl_up_sync(0xffffffff, value, d);
    if (lane >= d) value += below;
  }
  if (lane == kWarp - 1) warp_sums[warp] = value;
  __syncthreads();
  for (int w = 0; w < warp; ++w) value += warp_sums[w];
  __syncthreads();
  return value;
}

// One block, kScanThreads rows at a time: the steps, and the running sum of their pages.
template <class Step, class Pages>
__global__ void __launch_bounds__(kScanThreads)
    advance_and_scan(const __grid_constant__ Step step, const __grid_constant__ Pages pages) {
  __shared__ int64_t before;
  if (threadIdx.x == 0) before = pages.indptr[0] = 0;
  __syncthreads();
  for (int64_t first = 0; first < step.num_seqs; first += kScanThreads) {
    const int64_t i = first + threadIdx.x;
    int64_t position = 0, count = 0;
    if (i < step.num_seqs) {
      step.row(i);
      position = step.input_positions[i];
      if (i < step.num_queries) count = pages.count(position);
    }
    const int64_t end = before + block_scan(count);
    if (i < step.num_seqs) pages.row(i, position, end);
    __syncthreads();
    if (threadIdx.x == kScanThreads - 1) before = end;
    __syncthreads();
  }
}

// A warp a row.
template <class Pages>
__global__ void __launch_bounds__(kThreads) copy_pages(const __grid_constant__ Pages pages, int64_t rows) {
  const int64_t i = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kWarp;
  if (i >= rows) return;
  pages.copy_ids(i, threadIdx.x % kWarp, kWarp);
}

// Makes the tensors' device the current one for as long as it lives, and knows its current stream.
class Cuda {
 public:
  static constexpr bool kChecksData = false;

  explicit Cuda(const Argument& argument) {
    int32_t device;
    ensure(aoti_torch_get_device_index(argument.tensor, &device));
    check(cudaGetDevice(&before_));
    if (device != before_) check(cudaSetDevice(device));
    void* stream;
    ensure(aoti_torch_get_current_cuda_stream(device, &stream));
    device_ = device;
    stream_ = static_cast<cudaStream_t>(stream);
  }
  ~Cuda() {
    if (device_ != before_) cudaSetDevice(before_);
  }
  Cuda(const Cuda&) = delete;
  Cuda& operator=(const Cuda&) = delete;

  // All on one CUDA device.
  static bool holds(const Argument* const* begin, const Argument* const* end) {
    static const int32_t cuda = aoti_torch_device_type_cuda();
    int32_t first = -1, type, index;
    for (; begin != end; ++begin) {
      ensure(aoti_torch_get_device_type((*begin)->tensor, &type));
      ensure(aoti_torch_get_device_index((*begin)->tensor, &index));
      if (type != cuda || (first >= 0 && index != first)) return false;
      first = index;
    }
    return true;
  }

  template <class F>
  static void with_stride(const Argument* const*, const Argument* const*, F f) {
    f(int64_t{});
  }

  template <class Step>
  void rows(const Step& step, int64_t rows) const {
    if (rows > 0) advance_rows<<<blocks(rows), kThreads, 0, stream_>>>(step, rows);
    check(cudaGetLastError());
  }

  template <class Step>
  void tokens(const Step& step, int64_t tokens) const {
    rows(step, tokens);
  }

  template <class Step, class Pages>
  void rows_and_pages(const Step& step, const Pages& pages) const {
    advance_and_scan<<<1, kScanThreads, 0, stream_>>>(step, pages);
    if (step.num_queries > 0) {
      copy_pages<<<blocks(step.num_queries * kWarp), kThreads, 0, stream_>>>(pages, step.num_queries);
    }
    check(cudaGetLastError());
  }

 private:
  static unsigned blocks(int64_t threads) { return static_cast<unsigned>((threads + kThreads - 1) / kThreads); }
  static void check(cudaError_t error) {
    if (error != cudaSuccess) throw std::runtime_error(std::string("advance_step: ") + cudaGetErrorString(error));
  }

  int before_ = 0, device_ = 0;
  cudaStream_t stream_ = nullptr;
};

}  // namespace
}  // namespace advance_step

// ADVANCE_STEP_CHECK=1 asks for errors that only a look at the values can give: the checked executors serve then.
STABLE_TORCH_LIBRARY_IMPL(advance_step, CUDA, m) {
  const char* check = std::getenv("ADVANCE_STEP_CHECK");
  if (check == nullptr || *check == '\0' || std::string(check) == "0") {
    advance_step::register_operators<advance_step::Cuda>(m);
  }
}
