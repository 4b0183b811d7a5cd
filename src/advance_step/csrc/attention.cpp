// Attention over pages, on a CPU: the operator advance_step_decode::paged_attention, which decode/cpu_attention.py
// defines and documents.
#include "attention_tiles.h"
#include "attention_vectors.h"
#include "demand.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <functional>
#include <optional>
#include <type_traits>
#include <vector>

namespace advance_step {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Work, in multiplications, below which a second thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 18;

// New tokens below which it is not worth a thread to store them.
constexpr int64_t kWorthWriting = 128;

// The most new tokens of a row that the loops here take. Of more, matrix products read each key less often.
constexpr int64_t kFewTokens = 16;

constexpr Demand demand{"paged_attention"};

// Of [1, heads, tokens, dim], as one row.
template <class T>
Heads<const T> heads_of(const Tensor& tensor) {
  return {static_cast<const T*>(tensor.data_ptr()), 0, tensor.stride(1), tensor.stride(2)};
}

template <class T>
using Units = void (*)(const PagedAttention<T>&, int64_t, int64_t);

// The loops for the build's own target and, on x86, for kinds of processors that have more.
template <class T, int64_t Width>
void units(const PagedAttention<T>& attention, int64_t begin, int64_t end) {
  attention.template units<VectorLoops<T, Width, false>>(begin, end);
}
#ifdef __x86_64__
template <class T, int64_t Width>
__attribute__((target("avx2,fma"))) void units_avx2(const PagedAttention<T>& attention, int64_t begin, int64_t end) {
  attention.template units<VectorLoops<T, Width, false>>(begin, end);
}
template <class T, int64_t Width>
__attribute__((target("avx512f"))) void units_avx512(const PagedAttention<T>& attention, int64_t begin, int64_t end) {
  attention.template units<VectorLoops<T, Width, true>>(begin, end);
}
#endif
#ifdef ADVANCE_STEP_AMX
ADVANCE_STEP_TILES void units_tiles(const PagedAttention<BFloat16>& attention, int64_t begin, int64_t end) {
  attention.units<TileLoops>(begin, end);
}
#endif

// The loops that this processor runs fastest.
template <class T, int64_t Width>
Units<T> fastest() {
#ifdef __x86_64__
  if (__builtin_cpu_supports("avx512f")) return units_avx512<T, Width>;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return units_avx2<T, Width>;
#endif
  return units<T, Width>;
}

template <class T>
Units<T> fastest(const PagedAttention<T>& attention) {
#ifdef ADVANCE_STEP_AMX
  if constexpr (std::is_same_v<T, BFloat16>) {
    if (TileLoops::serve(attention)) return units_tiles;
  }
#endif
  const int64_t width = attention.key_dim == attention.value_dim ? attention.key_dim : 0;
  return width == 64 ? fastest<T, 64>() : width == 128 ? fastest<T, 128>() : fastest<T, 0>();
}

template <class T>
void attend(const PagedAttention<T>& attention) {
  int64_t keys = 0;
  for (int64_t row = 0; row < attention.rows; ++row) {
    int64_t first, last;
    attention.keys_of(row, &first, &last);
    keys += last - first + 1;
  }
  const int64_t count = attention.rows * attention.pages.kv_heads;
  const int64_t work = keys * attention.heads * attention.tokens * (attention.key_dim + attention.value_dim);
  const int64_t grain = work > kWorthAThread ? (count * kWorthAThread + work - 1) / work : count;
  const auto loops = fastest(attention);
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { loops(attention, begin, end); });
}

// The rows that come one after the other with as many tokens, each time as one.
template <class T>
std::vector<PagedAttention<T>> runs_of(const PagedAttention<T>& rows, const int64_t* starts, int64_t count) {
  std::vector<PagedAttention<T>> runs;
  for (int64_t row = 0; row < count; ++row) {
    const int64_t first = starts[row], tokens = starts[row + 1] - first;
    if (runs.empty() || runs.back().tokens != tokens) runs.push_back(rows.from(row, first, tokens));
    ++runs.back().rows;
  }
  return runs;
}

// By matrix products of torch, in Python: of rows with many tokens, whose keys and values are in the pages.
void attend_by_products(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& pages,
                        const Tensor& positions, const Tensor& block_tables, const Tensor& starts, double scaling,
                        int64_t window, double softcap, const std::optional<Tensor>& sinks, const Tensor& out) {
  using torch::stable::detail::from;
  std::array<StableIValue, 12> stack{from(query),     from(key),          from(value),  from(pages),
                                     from(positions), from(block_tables), from(starts), from(scaling),
                                     from(window),    from(softcap),      from(sinks),  from(out)};
  STABLE_TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("advance_step_decode::attend_by_products", "", stack.data(), TORCH_ABI_VERSION));
}

Tensor paged_attention(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& pages,
                       const Tensor& slot_mapping, const Tensor& positions, const Tensor& block_tables,
                       const Tensor& starts, double scaling, int64_t window, double softcap,
                       std::optional<Tensor> sinks) {
  const ScalarType dtype = pages.scalar_type();
  for (const Tensor* tensor : {&query, &key, &value}) {
    demand(tensor->dim() == 4 && tensor->size(0) == 1 && tensor->scalar_type() == dtype && tensor->stride(3) == 1,
           "query, key, value: expected [1, heads, tokens, dim] in the dtype of pages, the last dimension contiguous");
  }
  demand(pages.dim() == 5 && pages.size(1) == 2 && pages.is_contiguous(),
         "pages: expected [pages, 2, kv_heads, block_size, dim], contiguous");
  const int64_t heads = query.size(1), tokens = query.size(2), key_dim = query.size(3);
  const int64_t kv_heads = pages.size(2), value_dim = value.size(3), dim = pages.size(4);
  demand(is_shape(key, {1, kv_heads, tokens, key_dim}) && is_shape(value, {1, kv_heads, tokens, value_dim}),
         "key, value: expected [1, kv_heads, tokens, dim], of the sizes of query and pages");
  demand(pages.size(0) > 0 && pages.size(3) > 0 && kv_heads > 0 && heads % kv_heads == 0 && key_dim <= dim &&
             value_dim <= dim,
         "pages: expected a page, heads that divide the queries', and room for a key and a value");
  for (const Tensor* tensor : {&slot_mapping, &positions}) {
    demand(tensor->scalar_type() == ScalarType::Long && is_shape(*tensor, {tokens}) && tensor->is_contiguous(),
           "slot_mapping, positions: expected int64 [tokens], contiguous");
  }
  const bool wide = block_tables.scalar_type() == ScalarType::Long;
  demand(block_tables.dim() == 2 && block_tables.size(1) > 0 && (wide || block_tables.scalar_type() == ScalarType::Int),
         "block_tables: expected int32 or int64 [rows, columns], with a column");
  const int64_t rows = block_tables.size(0);
  demand(starts.scalar_type() == ScalarType::Long && is_shape(starts, {rows + 1}) && starts.is_contiguous(),
         "starts: expected int64 [rows + 1], contiguous");
  const auto ends = static_cast<const int64_t*>(starts.data_ptr());
  demand(ends[0] == 0 && ends[rows] == tokens &&
             std::adjacent_find(ends, ends + rows + 1, std::greater_equal<>()) == ends + rows + 1,
         "starts: expected 0, rising, up to the number of tokens");
  demand(!sinks || (is_shape(*sinks, {heads}) && sinks->scalar_type() == dtype && sinks->is_contiguous()),
         "sinks: expected [heads] in the dtype of pages");
  demand(window >= 0 && softcap >= 0, "window, softcap: expected numbers >= 0");
  Tensor out = torch::stable::new_empty(query, {1, tokens, heads, value_dim});
  const auto with = [&](auto element) {
    using T = decltype(element);
    const PagedAttention<T> first{0,
                                  0,
                                  heads,
                                  key_dim,
                                  value_dim,
                                  heads_of<T>(query),
                                  heads_of<T>(key),
                                  heads_of<T>(value),
                                  {static_cast<T*>(pages.data_ptr()), pages.size(0), kv_heads, pages.size(3), dim},
                                  static_cast<const int64_t*>(slot_mapping.data_ptr()),
                                  static_cast<const int64_t*>(positions.data_ptr()),
                                  block_tables.data_ptr(),
                                  wide,
                                  block_tables.stride(0),
                                  block_tables.stride(1),
                                  block_tables.size(1),
                                  static_cast<float>(scaling),
                                  static_cast<float>(softcap),
                                  window,
                                  sinks ? static_cast<const T*>(sinks->data_ptr()) : nullptr,
                                  static_cast<T*>(out.data_ptr())};
    const auto runs = runs_of(first, ends, rows);
    for (const auto& run : runs) {
      if (const char* fault = run.fault()) demand(false, fault);
    }
    for (const auto& run : runs) {
      torch::stable::parallel_for(0, run.rows * run.tokens, kWorthWriting,
                                  [&](int64_t begin, int64_t end) { run.write(begin, end); });
    }
    const auto few = [](const auto& run) { return run.tokens <= kFewTokens; };
    const auto in_order = [](const auto& run) { return run.in_order(); };
    if (!std::all_of(runs.begin(), runs.end(), few) && std::all_of(runs.begin(), runs.end(), in_order)) {
      attend_by_products(query, key, value, pages, positions, block_tables, starts, scaling, window, softcap, sinks,
                         out);
    } else {
      for (const auto& run : runs) attend(run);
    }
  };
  if (dtype == ScalarType::Float) {
    with(float{});
  } else if (dtype == ScalarType::BFloat16) {
    with(BFloat16{});
  } else {
    demand(dtype == ScalarType::Half, "pages: expected float32, bfloat16 or float16");
    with(Float16{});
  }
  return out;
}

}  // namespace
}  // namespace advance_step

STABLE_TORCH_LIBRARY_IMPL(advance_step_decode, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&advance_step::paged_attention));
}
