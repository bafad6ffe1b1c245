// CUDA's words and functions for a host compiler: what emitted mods use, so that they run without a GPU. It stands in
// the place of kernels_templates/cuda/ptx.cuh, in front of functions.cuh.
#pragma once

#include <math.h>

#include <bit>
#include <cstdint>
#include <limits>

#define __device__
#define __forceinline__ inline

inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a < b ? b : a; }
inline long long min(long long a, long long b) { return a < b ? a : b; }
inline long long max(long long a, long long b) { return a < b ? b : a; }

template <typename T>
T __ldg(const T* address) {
  return *address;
}
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __uint_as_float(unsigned bits) { return std::bit_cast<float>(bits); }
// As the instruction does it, which gives no 0 for NaN.
inline long long __float2ll_rz(float x) {
  if (!(x < 0x1p63f)) return x != x ? std::numeric_limits<long long>::min() : std::numeric_limits<long long>::max();
  return x < -0x1p63f ? std::numeric_limits<long long>::min() : static_cast<long long>(x);
}
inline float rsqrtf(float x) { return static_cast<float>(1 / std::sqrt(static_cast<double>(x))); }
inline float normcdff(float x) { return static_cast<float>(0.5 * std::erfc(-0.70710678118654752440 * x)); }

namespace attnjit::cuda {

inline float min_nan(float a, float b) { return a != a || b != b ? a + b : a < b ? a : b; }
inline float max_nan(float a, float b) { return a != a || b != b ? a + b : a < b ? b : a; }

inline float widen_f16(unsigned short bits) {
  const std::uint32_t magnitude = (bits & 0x7fffu) << 13;
  const bool special = (bits & 0x7c00) == 0x7c00;
  const float finite = std::bit_cast<float>(magnitude) * 0x1p112f;
  const std::uint32_t widened = special ? magnitude | 0x7f800000 : std::bit_cast<std::uint32_t>(finite);
  return std::bit_cast<float>(widened | (bits & 0x8000u) << 16);
}

// As far off as the instructions may be, each with the same sign.
inline float off(float exact, float relative) { return exact * (1 + relative); }
inline float exp2_approx(float x) { return off(exp2f(x), 0x1p-22f); }
inline float log2_approx(float x) { return off(log2f(x), 0x1p-22f); }
inline float sqrt_approx(float x) { return off(sqrtf(x), 0x1p-22f); }
inline float reciprocal_approx(float x) { return off(1 / x, 0x1p-22f); }
inline float divide_approx(float a, float b) { return off(a / b, 0x1p-22f); }
inline float tanh_approx(float x) { return off(tanhf(x), 0x1p-11f); }

}  // namespace attnjit::cuda
