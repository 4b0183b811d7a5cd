// The floor under a call: operators of the same schemas that do nothing, registered in C++ (TORCH_LIBRARY) and, as the
// native core is, through the stable ABI.
#include <torch/csrc/stable/library.h>
#include <torch/library.h>

namespace {

using at::Tensor;
using Optional = const std::optional<Tensor>&;

void npu(Tensor, const Tensor&, Tensor, Tensor, Tensor, const Tensor&, int64_t, int64_t, int64_t, Optional, Optional) {}
void flashattn(int64_t, int64_t, int64_t, Tensor, const Tensor&, Tensor, Tensor, Tensor, const Tensor&) {}
void eagle(const Tensor&, const Tensor&, Tensor, int64_t, int64_t, Tensor, Tensor, std::optional<int64_t>) {}
void until_stop(Tensor, const Tensor&, Tensor, Tensor, at::TensorList, at::TensorList, at::IntArrayRef, Tensor, Tensor,
                Tensor, const Tensor&, const Tensor&, int64_t) {}

void free_tensor(StableIValue value) { aoti_torch_delete_tensor_object(reinterpret_cast<AtenTensorHandle>(value)); }

void stable_npu(StableIValue* stack, uint64_t, uint64_t) {
  for (int i : {0, 1, 2, 3, 4, 5}) free_tensor(stack[i]);
}

}  // namespace

// SCHEMAS is a list of m.def("...") and comes from the operators themselves (operator_cpu.py).
TORCH_LIBRARY(advance_step_noop, m) { SCHEMAS }

TORCH_LIBRARY_IMPL(advance_step_noop, CPU, m) {
  m.impl("npu_advance_step_flashattn", npu);
  m.impl("advance_step_flashattn", flashattn);
  m.impl("eagle_step_update_slot_mapping_and_metadata", eagle);
  m.impl("advance_until_stop", until_stop);
}

STABLE_TORCH_LIBRARY_IMPL(advance_step_noop, CPU, m) { m.impl("stable_npu_advance_step_flashattn", stable_npu); }
