// Linear layers of a model on a CPU: the operator advance_step_decode::packed_linear, which decode/packed_linear.py
// defines and documents.
#include "linear.h"
#include "demand.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

namespace advance_step {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Bytes of weights below which a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 16;

constexpr Demand demand{"packed_linear"};

using Blocks = void (*)(const PackedLinear&, int64_t, int64_t);

// The loops for the build's own target and, on x86, for two kinds of processors that have more.
void by_vectors(const PackedLinear& linear, int64_t begin, int64_t end) { linear.by_vectors<4, 1>(begin, end); }
#ifdef __x86_64__
__attribute__((target("avx2,fma"))) void by_vectors_avx2(const PackedLinear& linear, int64_t begin, int64_t end) {
  linear.by_vectors<4, 1>(begin, end);
}
__attribute__((target("avx512f"))) void by_vectors_avx512(const PackedLinear& linear, int64_t begin, int64_t end) {
  linear.by_vectors<8, 2>(begin, end);
}
#endif

// The loops that this processor runs fastest.
Blocks fastest() {
#ifdef ADVANCE_STEP_AMX
  if (has_tiles()) return by_tiles;
#endif
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return by_vectors_avx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return by_vectors_avx2;
#endif
  return by_vectors;
}

void run(const PackedLinear& linear) {
  if (linear.rows == 0) return;
  const int64_t bytes = linear.ins * kLanes * static_cast<int64_t>(sizeof(BFloat16));  // of a block
  const auto loops = fastest();
  torch::stable::parallel_for(0, linear.blocks(), (kWorthAThread + bytes - 1) / bytes,
                              [&](int64_t begin, int64_t end) { loops(linear, begin, end); });
}

Tensor packed_linear(const Tensor& given, const Tensor& weight, std::optional<Tensor> bias, int64_t out_features) {
  demand(given.scalar_type() == ScalarType::BFloat16, "input: expected bfloat16");
  demand(given.dim() > 0, "input: expected [..., in_features]");
  const int64_t ins = given.size(given.dim() - 1), room = padded(ins, kBlock);
  demand(out_features > 0 && ins > 0, "out_features, in_features: expected numbers > 0");
  demand(weight.scalar_type() == ScalarType::BFloat16 && weight.is_contiguous() &&
             is_shape(weight, {padded(out_features, kLanes) / kLanes, room / 2, kLanes, 2}),
         "weight: expected what pack_weight makes of [out_features, in_features] in bfloat16");
  demand(!bias ||
             (bias->scalar_type() == ScalarType::BFloat16 && is_shape(*bias, {out_features}) && bias->is_contiguous()),
         "bias: expected bfloat16 [out_features], contiguous");
  std::vector<int64_t> sizes;
  int64_t rows = 1;
  for (int64_t d = 0; d + 1 < given.dim(); ++d) rows *= sizes.emplace_back(given.size(d));
  sizes.push_back(out_features);
  const Tensor input = room == ins ? torch::stable::contiguous(given) : torch::stable::pad(given, {0, room - ins});
  Tensor out = torch::stable::new_empty(input, sizes);
  run(PackedLinear{rows, room, out_features, static_cast<const BFloat16*>(input.data_ptr()),
                   static_cast<const BFloat16*>(weight.data_ptr()),
                   bias ? static_cast<const BFloat16*>(bias->data_ptr()) : nullptr,
                   static_cast<BFloat16*>(out.data_ptr())});
  return out;
}

}  // namespace
}  // namespace advance_step

STABLE_TORCH_LIBRARY_IMPL(advance_step_decode, CPU, m) {
  m.impl("packed_linear", TORCH_BOX(&advance_step::packed_linear));
}
