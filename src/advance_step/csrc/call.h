// One call as the native core sees it: the boxed arguments, what its contract demands of them, and the refusal.
//
// The core decides only whether a call is good. Why it is not is said by Python (errors.py), which is asked for the
// words, so that every executor refuses in the same ones and the good path pays for none of them.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/c/shim.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <type_traits>

#include "advance.h"

// The two functions of libtorch that are called from outside its stable ABI, which has no way to tell autograd of a
// write in place. A torch without them refuses to load the core (backend_info() says so), and the reference serves.
namespace at {
class Tensor;
namespace native {
bool is_inference(const Tensor&);
}
}  // namespace at
namespace torch::autograd::impl {
void bump_version(const at::Tensor&);
}

namespace advance_step {

inline void ensure(AOTITorchError error) {
  if (error != TORCH_SUCCESS) throw std::runtime_error("advance_step: a call to libtorch's C interface failed");
}

inline const int32_t kInt32 = aoti_torch_dtype_int32(), kInt64 = aoti_torch_dtype_int64();

// What the core needs to know of a tensor, read once.
struct Argument {
  AtenTensorHandle tensor;
  char* data;
  int64_t dim, item;
  const int64_t *size, *stride;
  int32_t dtype;
  char* end;  // of the addresses that its elements lie in; `data` where it has none

  Argument() = default;
  explicit Argument(AtenTensorHandle handle) : tensor(handle) {
    ensure(aoti_torch_get_dtype(tensor, &dtype));
    if (!is_int()) {  // every contract refuses it, and of a None there is nothing more to read
      data = end = nullptr;
      dim = 0;
      return;
    }
    void* address;
    int64_t *sizes, *strides;
    ensure(aoti_torch_get_data_ptr(tensor, &address));
    ensure(aoti_torch_get_dim(tensor, &dim));
    ensure(aoti_torch_get_sizes(tensor, &sizes));
    ensure(aoti_torch_get_strides(tensor, &strides));
    data = static_cast<char*>(address);
    size = sizes;
    stride = strides;
    item = is_int64() ? 8 : 4;
    int64_t last = 0;
    bool empty = false;
    for (int64_t d = 0; d < dim; ++d) {
      empty |= size[d] == 0;
      last += (size[d] - 1) * stride[d];
    }
    end = empty ? data : data + (last + 1) * item;
  }

  bool is_int64() const { return dtype == kInt64; }
  bool is_int32() const { return dtype == kInt32; }
  bool is_int() const { return is_int64() || is_int32(); }
  bool is_vector(int64_t n) const { return dim == 1 && size[0] == n; }
  bool is_matrix(int64_t rows, int64_t columns) const { return dim == 2 && size[0] == rows && size[1] == columns; }
  bool has_rows(int64_t rows) const { return dim == 2 && size[0] == rows; }

  template <class T, class Stride = int64_t>
  Vector<T, Stride> vector() const {
    return {reinterpret_cast<T*>(data), stride_as<Stride>(0)};
  }
  template <class T, class Stride = int64_t>
  Matrix<T, Stride> matrix() const {
    return {reinterpret_cast<T*>(data), size[1], stride[0], stride_as<Stride>(1)};
  }
  // [rows * columns] or [rows, columns], as the latter.
  template <class T>
  Matrix<T> matrix(int64_t columns) const {
    if (dim == 2) return matrix<T>();
    return {reinterpret_cast<T*>(data), columns, stride[0] * columns, stride[0]};
  }

  template <class Stride>
  IntVector<Stride> int_vector() const {
    return {data, stride_as<Stride>(0), is_int64()};
  }
  template <class Stride>
  IntMatrix<Stride> int_matrix() const {
    return {data, size[1], stride[0], stride_as<Stride>(1), is_int64()};
  }

  template <class Stride>
  Stride stride_as([[maybe_unused]] int64_t d) const {
    if constexpr (std::is_same_v<Stride, One>) {
      return {};
    } else {
      return stride[d];
    }
  }

  // The same questions, and the same answers, as errors.py's _meets_itself, _meets and _is_start_of.
  bool meets_itself() const {
    if (data == end) return false;
    int64_t reach = 0;
    const bool swapped = dim == 2 && stride[0] < stride[1];
    for (int64_t k = 0; k < dim; ++k) {
      const int64_t d = swapped ? k : dim - 1 - k;
      if (size[d] <= 1) continue;
      if (stride[d] <= reach) return true;
      reach += stride[d] * (size[d] - 1);
    }
    return false;
  }
  bool meets(const Argument& other) const {
    if (end <= other.data || other.end <= data) return false;  // nearly always
    if (data == end || other.data == other.end) return false;
    const int64_t step = dim == 1 ? stride[0] * item : 0;
    if (step <= 0 || other.dim != 1 || other.stride[0] * other.item != step) return true;
    const int64_t apart = ((other.data - data) % step + step) % step;
    return apart < item || step - apart < other.item;
  }
  bool starts_as(const Argument& other) const {
    return data == other.data && dtype == other.dtype && stride[0] == other.stride[0];
  }
};

// The boxed arguments of one call. Its tensors are read by tensor() and freed at the end, whichever way that comes.
class Call {
 public:
  Call(const char* refusal, StableIValue* stack) : refusal_(refusal), stack_(stack) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;
  ~Call() {
    for (int i = 0; i < written_count_; ++i) bump_version(written_[i]);
    for (int i = 0; i < held_; ++i) aoti_torch_delete_tensor_object(tensors_[i]);
    for (int i = 0; i < boxes_held_; ++i) delete boxes_[i];
    for (int i = 0; i < lists_held_; ++i) torch_delete_list(lists_[i]);
    for (int i = 0; i < elements_held_; ++i) aoti_torch_delete_tensor_object(elements_[i]);
  }

  int64_t integer(int i) const { return static_cast<int64_t>(stack_[i]); }
  Argument tensor(int i) { return hold(reinterpret_cast<AtenTensorHandle>(stack_[i])); }
  bool given(int i) const { return stack_[i] != 0; }
  // Of a `Tensor?` or an `int?` that is given(): a pointer to the boxed value.
  Argument optional_tensor(int i) { return hold(reinterpret_cast<AtenTensorHandle>(unbox(i))); }
  int64_t optional_integer(int i) { return static_cast<int64_t>(unbox(i)); }

  // A `Tensor[]` or an `int[]`: its size, then its items. A list does not free its tensors: each must be read.
  int64_t list(int i) {
    const auto list = reinterpret_cast<StableListHandle>(stack_[i]);
    lists_[lists_held_++] = list;
    size_t size;
    ensure(torch_list_size(list, &size));
    return static_cast<int64_t>(size);
  }
  Argument tensor_in(int i, int64_t k) {
    const auto tensor = reinterpret_cast<AtenTensorHandle>(item(i, k));
    elements_[elements_held_++] = tensor;
    return Argument(tensor);
  }
  int64_t integer_in(int i, int64_t k) const { return static_cast<int64_t>(item(i, k)); }

  void demand(bool holds) {
    if (!holds) refuse();
  }

  // `written` come first in `all`; each must share no memory with itself or another. `same`, of the read ones, may
  // also be the very memory that the first written one starts with. Autograd hears of them if the call is not refused.
  void demand_own_memory(const Argument* const* all, int count, int written, const Argument* same) {
    for (int i = 0; i < written; ++i) {
      demand(!all[i]->meets_itself());
      for (int other = i + 1; other < count; ++other) {
        if (all[i]->meets(*all[other])) demand(i == 0 && all[other] == same && all[0]->starts_as(*same));
      }
      written_[written_count_++] = all[i]->tensor;
    }
  }

  // Hands the whole call to Python, which finds what is wrong with it, and raises its words.
  [[noreturn]] void refuse() {
    written_count_ = held_ = elements_held_ = boxes_held_ = lists_held_ =
        0;  // the dispatcher takes what is on the stack
    ensure(torch_call_dispatcher(refusal_, "", stack_, TORCH_ABI_VERSION));
    const auto text = reinterpret_cast<StringHandle>(stack_[0]);
    const char* words;
    ensure(torch_string_c_str(text, &words));
    std::string message(words);
    ensure(torch_delete_string(text));
    if (message.empty()) message = std::string(refusal_) + ": the native core refused a call that its contract allows";
    throw std::invalid_argument(message);  // ValueError in Python
  }

 private:
  Argument hold(AtenTensorHandle tensor) {
    tensors_[held_++] = tensor;
    return Argument(tensor);
  }

  // Makes a backward that needs the value of before raise. A tensor made under inference_mode counts no versions.
  static void bump_version(AtenTensorHandle tensor) {
    const auto& written = *reinterpret_cast<const at::Tensor*>(tensor);  // as in torch's own aoti_torch/utils.h
    if (!at::native::is_inference(written)) torch::autograd::impl::bump_version(written);
  }

  StableIValue unbox(int i) {
    boxes_[boxes_held_++] = reinterpret_cast<StableIValue*>(stack_[i]);
    return *boxes_[boxes_held_ - 1];
  }
  StableIValue item(int i, int64_t k) const {
    StableIValue value;
    ensure(torch_list_get_item(reinterpret_cast<StableListHandle>(stack_[i]), static_cast<size_t>(k), &value));
    return value;
  }

  const char* refusal_;
  StableIValue* stack_;
  AtenTensorHandle tensors_[16], elements_[2 * kMaxGroups], written_[6 + kMaxGroups];
  StableIValue* boxes_[2];
  StableListHandle lists_[3];
  int held_ = 0, elements_held_ = 0, boxes_held_ = 0, lists_held_ = 0, written_count_ = 0;
};

// Calls f with a value of the argument's integer type.
template <class F>
void with_int_type(const Argument& argument, F f) {
  if (argument.is_int64()) {
    f(int64_t{});
  } else {
    f(int32_t{});
  }
}

}  // namespace advance_step
