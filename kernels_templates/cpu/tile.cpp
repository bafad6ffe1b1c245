// The softmax tile around a score_mod: compiled once per instruction set to bitcode at build time, joined with the
// mod's code, optimised and loaded at run time.
//
// The joined module must define attnjit_mod with the attribute alwaysinline. What the loops below rely on to end as
// straight vector code is this pipeline, in this order (SLP and unrolling off):
//   internalize(attnjit_tile), always-inline, globaldce, function(sroa<modify-cfg>, early-cse<memssa>, instcombine,
//   loop-mssa(licm), loop-vectorize, sroa<modify-cfg>, early-cse<memssa>, instcombine, loop-mssa(licm))
// on functions whose target-cpu, target-features and prefer-vector-width have been overwritten for the machine.
#include "kernels_templates/cpu/exp2.h"
#include "kernels_templates/cpu/tile_abi.h"

// The modified score in log2 units; -inf where the element is dropped. `score` is what TileParams::scores holds,
// `element` its place there, and in each part of TileParams::staged.
extern "C" float attnjit_mod(float score, long long b, long long h, long long q_idx, long long kv_idx,
                             const attnjit::cpu::CapturedView* captured, const void* staged, long long element);

namespace attnjit::cpu {
namespace {

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
