// 16-bit floats on any compiler, rounded to nearest even as hardware does.
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace attnjit::test {

inline std::uint16_t to_bf16(float x) {
  const auto bits = std::bit_cast<std::uint32_t>(x);
  return static_cast<std::uint16_t>(x != x ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline float from_bf16(std::uint16_t bits) { return std::bit_cast<float>(std::uint32_t{bits} << 16); }

inline std::uint16_t to_f16(float x) {
  const unsigned sign = std::signbit(x) ? 0x8000u : 0u;
  const float magnitude = std::fabs(x);
  unsigned bits = 0x7fff;  // NaN
  if (magnitude >= 65520.0f) {
    bits = 0x7c00;
  } else if (magnitude < 0x1p-14f) {
    bits = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 24)));
  } else if (x == x) {
    const int exponent = std::ilogb(magnitude);
    const auto mantissa = static_cast<unsigned>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
    bits = (static_cast<unsigned>(exponent + 15) << 10) + mantissa - 1024;  // 2048 carries
  }
  return static_cast<std::uint16_t>(sign | bits);
}
inline float from_f16(std::uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0x1f) return mantissa ? NAN : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

}  // namespace attnjit::test
