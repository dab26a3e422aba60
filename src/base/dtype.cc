#include "base/dtype.h"

namespace kda {

size_t size_of(Dtype t) {
  switch (t) {
    case Dtype::f64:
    case Dtype::i64: return 8;
    case Dtype::f32:
    case Dtype::i32: return 4;
    case Dtype::bf16:
    case Dtype::f16:
    case Dtype::i16: return 2;
    case Dtype::i8:
    case Dtype::u8:
    case Dtype::boolean:
    case Dtype::f8_e4m3: return 1;
  }
  return 0;
}

std::string_view name_of(Dtype t) {
  switch (t) {
    case Dtype::f64: return "f64";
    case Dtype::i64: return "i64";
    case Dtype::f32: return "f32";
    case Dtype::i32: return "i32";
    case Dtype::bf16: return "bf16";
    case Dtype::f16: return "f16";
    case Dtype::i16: return "i16";
    case Dtype::i8: return "i8";
    case Dtype::u8: return "u8";
    case Dtype::boolean: return "bool";
    case Dtype::f8_e4m3: return "f8_e4m3";
  }
  return "?";
}

f16::operator float() const {
  const uint32_t sign = uint32_t(bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 0x3ffu;
  if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent) return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
  const float tiny = float(mantissa) * 0x1p-24f;  // zero or subnormal: exact in fp32
  return sign ? -tiny : tiny;
}

f16::f16(float x) {
  const uint32_t u = std::bit_cast<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  if (a > 0x7f800000u) {
    bits = uint16_t(sign | 0x7e00u);
  } else if (a >= 0x477ff000u) {  // rounds past the largest half
    bits = uint16_t(sign | 0x7c00u);
  } else if (a < 0x38800000u) {   // subnormal half: let the fp32 adder round at 2^-24
    bits = uint16_t(sign | (std::bit_cast<uint32_t>(std::bit_cast<float>(a) + 0.5f) - 0x3f000000u));
  } else {
    bits = uint16_t(sign | ((a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13));
  }
}

}  // namespace kda
