// base/tensor.h — what a kernel sees (View: pointer, dtype, shape) and what owns memory (Tensor).
// Always dense, last dimension fastest.
#pragma once
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <ostream>
#include <type_traits>

#include "base/dtype.h"
#include "base/error.h"

namespace kda {

struct Shape {
  static constexpr int kMaxRank = 4;
  std::array<int64_t, kMaxRank> dim{1, 1, 1, 1};
  int rank = 0;

  Shape() = default;
  Shape(std::initializer_list<int64_t> d) {
    KDA_CHECK(d.size() <= kMaxRank, "Shape: at most ", kMaxRank, " dimensions, got ", d.size());
    for (int64_t x : d) dim[size_t(rank++)] = x;
  }
  int64_t operator[](int i) const { return dim[size_t(i)]; }
  int64_t size() const {
    int64_t n = 1;
    for (int i = 0; i < rank; ++i) n *= dim[size_t(i)];
    return n;
  }
  bool operator==(const Shape&) const = default;
  friend std::ostream& operator<<(std::ostream& o, const Shape& s) {
    o << '[';
    for (int i = 0; i < s.rank; ++i) o << (i ? "," : "") << s.dim[size_t(i)];
    return o << ']';
  }
};

// A typed pointer with its shape, into the memory of some backend. Owns nothing.
struct ConstView {
  const void* data = nullptr;
  Dtype dtype = Dtype::f32;
  Shape shape;

  int64_t dim(int i) const { return shape[i]; }
  int64_t size() const { return shape.size(); }
  size_t bytes() const { return size_t(size()) * size_of(dtype); }
  // The pointer, once the element type is what the caller says; throws Error otherwise.
  template <class T>
  const T* as() const {
    KDA_CHECK(dtype == dtype_of<std::remove_const_t<T>>, "tensor ", shape, " is ", name_of(dtype), ", needed ",
              name_of(dtype_of<std::remove_const_t<T>>));
    return static_cast<const T*>(data);
  }
};

struct View {
  void* data = nullptr;
  Dtype dtype = Dtype::f32;
  Shape shape;

  operator ConstView() const { return {data, dtype, shape}; }
  int64_t dim(int i) const { return shape[i]; }
  int64_t size() const { return shape.size(); }
  size_t bytes() const { return size_t(size()) * size_of(dtype); }
  template <class T>
  T* as() const {
    KDA_CHECK(dtype == dtype_of<T>, "tensor ", shape, " is ", name_of(dtype), ", needed ", name_of(dtype_of<T>));
    return static_cast<T*>(data);
  }
};

// Shorthands for typed memory: view(p, {T,D}).
template <class T>
View view(T* data, Shape s) {
  return {data, dtype_of<T>, s};
}
template <class T>
ConstView view(const T* data, Shape s) {
  return {data, dtype_of<T>, s};
}

// A view with shared ownership of the memory behind it: a mapped file, an arena, device memory.
struct Tensor {
  std::shared_ptr<void> storage;
  View v;

  explicit operator bool() const { return v.data != nullptr; }
  operator View() const { return v; }
  operator ConstView() const { return v; }
  const Shape& shape() const { return v.shape; }
  Dtype dtype() const { return v.dtype; }
};

// Host memory, 64-byte aligned, zeroed. Large tensors ask for huge pages.
Tensor host_tensor(Dtype, Shape);

// The right operand of a matrix product, [N,K] row-major: y = x W^T.
// dtype f32, bf16, f16: `scale` is empty. i8: value = scale[n] * int8, scale f32 [N].
struct WeightView {
  ConstView w;
  ConstView scale;
};

}  // namespace kda
