// What the operators of a decode step on a CPU demand of their arguments: a ValueError says what was expected.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <stdexcept>
#include <string>

namespace advance_step {

// Called as demand(holds, "argument: expected ...") in the name of an operator.
struct Demand {
  const char* operator_name;

  void operator()(bool holds, const char* words) const {
    if (!holds) throw std::invalid_argument(std::string(operator_name) + ": " + words);
  }
};

inline bool is_shape(const torch::stable::Tensor& tensor, std::initializer_list<int64_t> sizes) {
  if (tensor.dim() != static_cast<int64_t>(sizes.size())) return false;
  int64_t d = 0;
  for (const int64_t size : sizes) {
    if (tensor.size(d++) != size) return false;
  }
  return true;
}

}  // namespace advance_step
