// base/dtype.h — element types of tensors and the 16-bit float conversions.
#pragma once
#include <bit>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kda {

enum class Dtype : uint8_t { f32, bf16, f16, f64, i8, u8, i16, i32, i64, boolean, f8_e4m3 };

size_t size_of(Dtype);             // bytes of one element
std::string_view name_of(Dtype);   // "f32", "bf16", ..

// The upper half of an IEEE single. Rounds to nearest, ties to even; a NaN stays a NaN.
struct bf16 {
  uint16_t bits;
  bf16() = default;
  explicit bf16(float x) {
    const uint32_t u = std::bit_cast<uint32_t>(x);
    bits = (u & 0x7fffffffu) > 0x7f800000u ? uint16_t((u >> 16) | 0x40u)
                                           : uint16_t((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
  }
  explicit operator float() const { return std::bit_cast<float>(uint32_t(bits) << 16); }
};

// IEEE half precision. Rounds to nearest, ties to even; overflow gives infinity.
struct f16 {
  uint16_t bits;
  f16() = default;
  explicit f16(float x);
  explicit operator float() const;
};

template <class T> inline constexpr Dtype dtype_of = Dtype::u8;
template <> inline constexpr Dtype dtype_of<float> = Dtype::f32;
template <> inline constexpr Dtype dtype_of<double> = Dtype::f64;
template <> inline constexpr Dtype dtype_of<bf16> = Dtype::bf16;
template <> inline constexpr Dtype dtype_of<f16> = Dtype::f16;
template <> inline constexpr Dtype dtype_of<int8_t> = Dtype::i8;
template <> inline constexpr Dtype dtype_of<int16_t> = Dtype::i16;
template <> inline constexpr Dtype dtype_of<int32_t> = Dtype::i32;
template <> inline constexpr Dtype dtype_of<int64_t> = Dtype::i64;

}  // namespace kda
