// The softmax tile around a score_mod: compiled once per instruction set to bitcode at build time, joined with the
// mod's code, optimised and loaded at run time.
//
// The joined module must define attnjit_mod with the attribute alwaysinline. What the loops below rely on to end as
// straight vector code is this pipeline, in this order (SLP and unrolling off):
//   internalize(attnjit_tile), always-inline, globaldce, function(sroa<modify-cfg>, early-cse<memssa>, instcombine,
//   loop-mssa(licm), loop-vectorize, sroa<modify-cfg>, early-cse<memssa>, instcombine, loop-mssa(licm))
// on functions whose target-cpu, target-features and prefer-vector-width have been overwritten for the machine.
#include "kernels_templates/cpu/tile_abi.h"

// The modified score in log2 units; -inf where the element is dropped. `score` is what TileParams::scores holds,
// `element` its place there, and in each part of TileParams::staged.
extern "C" float attnjit_mod(float score, long long b, long long h, long long q_idx, long long kv_idx,
                             const attnjit::cpu::CapturedView* captured, const void* staged, long long element);

namespace attnjit::cpu {
namespace {

constexpr int kWidth = ATTNJIT_VECTOR_WIDTH;
static_assert(kPanelLanes % kWidth == 0);

typedef float Vector __attribute__((vector_size(kWidth * sizeof(float))));
typedef int IntVector __attribute__((vector_size(kWidth * sizeof(int))));

// 2^x for x <= 0: 0 below -126 (no denormals, -inf included), NaN for NaN, exactly 1 for 0. Degree-5 minimax fits of
// 2^f with the constant term held at 1; relative error below 3e-7.
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

// One vector of lanes over all rows. `scores` aliases nothing: what the mod reads may be hoisted over its stores.
inline void softmax_lanes(float* __restrict scores, const TileParams& params, int first) {
  const long long rows = params.rows;
  const long long b = params.b;
  const long long h = params.h;
  const long long q_idx = params.q_idx + first;
  const long long kv_idx = params.kv_idx;
  const CapturedView* const captured = params.captured;
  const void* const staged = params.staged;
  const Vector old_max = *(const Vector*)(params.row_max + first);
  // Two chains each for maximum and sum, taking turns: one alone is bound by the latency of its operation.
  Vector max = old_max;
  Vector other_max = old_max;
#pragma clang loop unroll(disable)
  for (long long row = 0; row < rows; ++row) {
    // A local array of one vector's width and a loop of that width: after inlining the mod, the vectoriser makes one
    // vector iteration of it, and the array disappears.
    alignas(Vector) float lane[kWidth];
    *(Vector*)lane = *(const Vector*)(scores + row * kPanelLanes);
#pragma clang loop vectorize(assume_safety) vectorize_width(ATTNJIT_VECTOR_WIDTH) interleave_count(1) unroll(disable)
    for (int i = 0; i < kWidth; ++i)
      lane[i] = attnjit_mod(lane[i], b, h, q_idx + i, kv_idx + row, captured, staged, row * kPanelLanes + first + i);
    const Vector score = *(const Vector*)lane;
    *(Vector*)(scores + row * kPanelLanes) = score;
    // A NaN score loses here and shows in its exponential.
    const Vector next = score > max ? score : max;
    max = other_max;
    other_max = next;
  }
  max = other_max > max ? other_max : max;
  // Every element so far dropped: any finite reference makes their exponentials 0.
  const Vector reference = max == -__builtin_inff() ? Vector{} : max;
  const Vector rescale = exp2_nonpositive(old_max - reference);
  Vector sum = {};
  Vector other_sum = {};
#pragma clang loop unroll(disable)
  for (long long row = 0; row < rows; ++row) {
    Vector* const element = (Vector*)(scores + row * kPanelLanes);
    const Vector p = exp2_nonpositive(*element - reference);
    *element = p;
    const Vector next = sum + p;
    sum = other_sum;
    other_sum = next;
  }
  Vector* const row_sum = (Vector*)(params.row_sum + first);
  *row_sum = *row_sum * rescale + (sum + other_sum);
  *(Vector*)(params.row_max + first) = max;
  *(Vector*)(params.rescale + first) = rescale;
}

}  // namespace
}  // namespace attnjit::cpu

extern "C" void attnjit_tile(const attnjit::cpu::TileParams* params) {
  using namespace attnjit::cpu;
  // Lanes outside, rows inside: what depends on the lane alone stays in registers over all rows.
#pragma clang loop unroll(disable)
  for (int first = 0; first < kPanelLanes; first += kWidth) softmax_lanes(params->scores + first, *params, first);
}
