// The vector of the CPU's compiled tiles, and 2^x over it.
#pragma once

#include "kernels_templates/cpu/tile_abi.h"

namespace attnjit::cpu {
namespace {

constexpr int kWidth = ATTNJIT_VECTOR_WIDTH;
static_assert(kPanelLanes % kWidth == 0);

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int IntVector __attribute__((vector_size(kWidth * sizeof(int))));

// 2^x for x <= 0, and a little above: 0 below -126 (no denormals, -inf included), NaN for NaN, exactly 1 for 0.
// Degree-5 minimax fits of 2^f with the constant term held at 1; relative error below 3e-7.
#if ATTNJIT_VECTOR_WIDTH == 16

inline Vector exp2_nonpositive(Vector x) {
  // f = x - floor(x), 0 for -inf; scalef multiplies by 2^floor(x).
  const Vector f = __builtin_ia32_reduceps512_mask(x, 0x09, Vector{}, -1, 4);
  Vector p = f * 0.0018671301f + 0.00901703023f;
  p = p * f + 0.0557999132f;
  p = p * f + 0.24016445f;
  p = p * f + 0.693151312f;
  p = p * f + 1.0f;
  const auto normal = __builtin_ia32_cmpps512_mask(x, Vector{} - 126.0f, 5, -1, 4);  // not less: NaN, too
  return __builtin_ia32_scalefps512_mask(p, x, Vector{}, normal, 4);
}

#else

inline Vector exp2_nonpositive(Vector x) {
  // Adding 1.5 * 2^23 leaves round(x) in the low bits; 127 more makes them the biased exponent of 2^round(x).
  const float magic = 12582912.0f + 127.0f;
  const Vector biased = x + magic;
  const Vector f = x - (biased - magic);
  Vector p = f * 1.32647239e-3f + 9.67151287e-3f;
  p = p * f + 5.55073375e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  // A product, not an addition of exponents: the payload of a NaN must not reach the exponent.
  const Vector power = (Vector)((IntVector)biased << 23);
  return x < -126.0f ? Vector{} : p * power;
}

#endif

}  // namespace
}  // namespace attnjit::cpu
