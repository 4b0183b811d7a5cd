// The floor under a call on CUDA: operators of the same schemas that read their arguments, check nothing, and launch a
// kernel of the same grid and parameters that does nothing.
#include <cuda_runtime.h>

#include "call.h"
#include "slot_mapping.h"

namespace {

using namespace advance_step;

constexpr int kThreads = 256;  // as in cuda.cu

template <class Step>
__global__ void __launch_bounds__(kThreads) empty(const __grid_constant__ Step, int64_t) {}

template <class Step>
void launch(const Argument& tensor, int64_t rows) {
  int32_t device;
  void* stream;
  ensure(aoti_torch_get_device_index(tensor.tensor, &device));
  ensure(aoti_torch_get_current_cuda_stream(device, &stream));
  const auto blocks = static_cast<unsigned>((rows + kThreads - 1) / kThreads);
  empty<<<blocks, kThreads, 0, static_cast<cudaStream_t>(stream)>>>(Step{}, rows);
  if (cudaGetLastError() != cudaSuccess) throw std::runtime_error("the empty kernel could not be launched");
}

using Plain = PlainStep<int32_t, int32_t, int64_t, int64_t>;

template <int kTensors>
void plain(StableIValue* stack, uint64_t, uint64_t) {
  Call call("", stack);
  const Argument first = call.tensor(3);
  for (int i = 4; i < 3 + kTensors; ++i) call.tensor(i);
  launch<Plain>(first, call.integer(0));
}

void eagle(StableIValue* stack, uint64_t, uint64_t) {
  Call call("", stack);
  const Argument positions = call.tensor(0);
  for (int i : {1, 2, 5, 6}) call.tensor(i);
  if (call.given(7)) call.optional_integer(7);
  launch<EagleStep<int64_t, int32_t, int32_t, int64_t>>(positions, positions.size[0]);
}

void until_stop(StableIValue* stack, uint64_t, uint64_t) {
  Call call("", stack);
  const Argument tokens = call.tensor(0);
  for (int i : {1, 2, 3, 7, 8, 9, 10, 11}) call.tensor(i);
  for (int list : {4, 5}) {
    const int64_t groups = call.list(list);
    for (int64_t g = 0; g < groups; ++g) call.tensor_in(list, g);
  }
  call.list(6);
  launch<UntilStopStep<int64_t, 1>>(tokens, tokens.size[0]);
}

void slot_mapping(StableIValue* stack, uint64_t, uint64_t) {
  Call call("", stack);
  for (int i : {0, 1, 2}) call.tensor(i);
  const Argument slots = call.tensor(3);
  launch<SlotMappingStep<int64_t, int32_t, int64_t>>(slots, slots.size[0]);
}

}  // namespace

// SCHEMAS is a list of m.def("...") and comes from the operators themselves (gpu_columns.py).
STABLE_TORCH_LIBRARY(advance_step_floor, m){SCHEMAS}

STABLE_TORCH_LIBRARY_IMPL(advance_step_floor, CUDA, m) {
  m.impl("advance_step_flashattn", plain<6>);
  m.impl("advance_step_flashinfer", plain<10>);
  m.impl("eagle_step_update_slot_mapping_and_metadata", eagle);
  m.impl("advance_until_stop", until_stop);
  m.impl("compute_slot_mapping", slot_mapping);
}
