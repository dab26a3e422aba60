// tests/kernels/weight.h — a matrix of a stored type for tests of products, and their comparison.
#pragma once
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <string>
#include <vector>

#include "tests/check.h"
#include "tests/ref/matmul.h"

namespace kda::test {

// W of a stored type, its memory ending where the allocation ends (so that the sanitizer sees a read past it), with its
// values in double.
struct Weight {
  std::vector<char> bytes;
  std::vector<float> scale;
  std::vector<double> values;
  WeightView view;

  Weight(const std::string& name, Dtype d, int64_t N, int64_t K) {
    const auto v = test::values(name, N * K);
    bytes.resize(v.size() * size_of(d));
    for (int64_t n = 0; n < N && d == Dtype::i8; ++n) scale.push_back(0.001f * float(1 + n % 7));
    for (size_t i = 0; i < v.size(); ++i) {
      const auto put = [&](auto t) {
        std::memcpy(bytes.data() + i * sizeof t, &t, sizeof t);
        values.push_back(double(float(t)));
      };
      switch (d) {
        case Dtype::f32: put(v[i]); break;
        case Dtype::bf16: put(bf16(v[i])); break;
        case Dtype::f16: put(f16(v[i])); break;
        default: put(int8_t(std::lround(v[i] * 127))); values.back() *= double(scale[i / size_t(K)]);
      }
    }
    view.w = {bytes.data(), d, {N, K}};
    if (d == Dtype::i8) view.scale = kda::view(static_cast<const float*>(scale.data()), {N});
  }
};

// |got - want| <= tolerance * terms, element by element.
inline testing::AssertionResult near(const std::vector<float>& got, const ref::Product& want, double tolerance) {
  if (got.size() != want.y.size()) return testing::AssertionFailure() << "sizes differ";
  for (size_t i = 0; i < got.size(); ++i)
    if (!(std::abs(double(got[i]) - want.y[i]) <= tolerance * want.terms[i] + 1e-30))
      return testing::AssertionFailure() << "element " << i << ": got " << got[i] << ", want " << want.y[i]
                                         << ", allowed " << tolerance << " * " << want.terms[i];
  return testing::AssertionSuccess();
}

}  // namespace kda::test
