// The CPU: everything is checked before the first write, then one pass over the rows.
#include <algorithm>
#include <atomic>

#include "operators.h"

namespace advance_step {
namespace {

// Rows below which a second thread costs more than it saves (benchmarks/operator_cpu.py --grain).
constexpr int64_t kGrain = 2048;

// f(begin, end) over [0, n), in parallel above the grain.
template <class F>
void for_ranges(int64_t n, F f) {
  if (n <= kGrain) return f(0, n);
  ensure(torch_parallel_for(
      0, n, kGrain, [](int64_t begin, int64_t end, void* context) { (*static_cast<F*>(context))(begin, end); }, &f));
}

struct Cpu {
  static constexpr bool kChecksData = true;

  explicit Cpu(const Argument&) {}

  // The dispatcher brings a call here only if all its tensors are on the CPU.
  static bool holds(const Argument* const*, const Argument* const*) { return true; }

  template <class F>
  static void with_stride(const Argument* const* begin, const Argument* const* end, F f) {
    if (std::all_of(begin, end, [](const Argument* a) { return a->stride[a->dim - 1] == 1; })) {
      f(One{});
    } else {
      f(int64_t{});
    }
  }

  // Whether bad(i) has its top bit set for any row; or-ing words is a loop that compilers vectorise.
  template <class Bad>
  static bool any_row(int64_t rows, const Bad& bad) {
    std::atomic<bool> any{false};
    for_ranges(rows, [&](int64_t begin, int64_t end) {
      const Bad local = bad;
      uint64_t all = 0;
      for (int64_t i = begin; i < end; ++i) all |= local(i);
      if (all >> 63) any = true;
    });
    return any;
  }

  // The step is copied into the loop's frame: no write through its pointers can be taken to change it there.
  template <class Step>
  void rows(const Step& step, int64_t rows) const {
    for_ranges(rows, [&step](int64_t begin, int64_t end) {
      const Step local = step;
      for (int64_t i = begin; i < end; ++i) local.row(i);
    });
  }

  template <class Step>
  void tokens(const Step& step, int64_t tokens) const {
    for_ranges(tokens, [&step](int64_t begin, int64_t end) {
      const Step local = step;
      local.rows(begin, end);
    });
  }

  template <class Step, class Pages>
  void rows_and_pages(const Step& step, const Pages& pages) const {
    rows(step, step.num_seqs);
    int64_t end = pages.indptr[0] = 0;
    for (int64_t i = 0; i < step.num_seqs; ++i) {
      const int64_t position = step.input_positions[i];
      if (i < step.num_queries) end += pages.count(position);
      pages.row(i, position, end);
    }
    for_ranges(step.num_queries, [&pages](int64_t begin, int64_t end) {
      const Pages local = pages;
      for (int64_t i = begin; i < end; ++i) local.copy_ids(i, 0, 1);
    });
  }
};

}  // namespace
}  // namespace advance_step

STABLE_TORCH_LIBRARY_IMPL(advance_step, CPU, m) { advance_step::register_operators<advance_step::Cpu>(m); }
