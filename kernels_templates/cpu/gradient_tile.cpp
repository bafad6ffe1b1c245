// The backward's tile around a score_mod and its derivative: compiled as tile.cpp is, by the pipeline written there.
#include "kernels_templates/cpu/exp2.h"
#include "kernels_templates/cpu/tile_abi.h"

// The modified score in natural units; -inf where the element is dropped. Arguments as attnjit_mod's in tile.cpp.
extern "C" float attnjit_mod_value(float score, long long b, long long h, long long q_idx, long long kv_idx,
                                   const attnjit::cpu::CapturedView* captured, const void* staged, long long element);
// The gradient of the score, given that of the modified score; both are 0 together. Stores what the element adds to
// captured gradients, and where the tile is to say so its place, at `element` of each sink's part.
extern "C" float attnjit_mod_gradient(float score, float gradient, long long b, long long h, long long q_idx,
                                      long long kv_idx, const attnjit::cpu::CapturedView* captured, const void* staged,
                                      long long element, float* contributions, long long* places);

namespace attnjit::cpu {
namespace {

constexpr float kLog2e = 1.44269504f;

// One vector of lanes over all rows. What is written aliases nothing: what the mod reads may be hoisted over the
// stores.
inline void gradient_lanes(float* __restrict scores, float* __restrict gradients, float* __restrict contributions,
                           long long* __restrict places, const GradientTileParams& params, int first) {
  const long long rows = params.rows;
  const long long b = params.b;
  const long long h = params.h;
  const long long q_idx = params.q_idx + first;
  const long long kv_idx = params.kv_idx;
  const CapturedView* const captured = params.captured;
  const void* const staged = params.staged;
  const float infinity = __builtin_inff();
  const Vector lse = *(const Vector*)(params.lse + first);
  const Vector delta = *(const Vector*)(params.delta + first);
  const IntVector empty = lse == infinity;
#pragma clang loop unroll(disable)
  for (long long row = 0; row < rows; ++row) {
    Vector* const p_row = (Vector*)(scores + row * kPanelLanes);
    Vector* const gradient_row = (Vector*)(gradients + row * kPanelLanes);
    const long long element = row * kPanelLanes + first;
    // Local arrays and loops of their width: see tile.cpp. What value and derivative have in common is found again once
    // both are in vectors.
    alignas(Vector) float score[kWidth];
    alignas(Vector) float value[kWidth];
    *(Vector*)score = *p_row;
#pragma clang loop vectorize(assume_safety) vectorize_width(ATTNJIT_VECTOR_WIDTH) interleave_count(1) unroll(disable)
    for (int i = 0; i < kWidth; ++i)
      value[i] = attnjit_mod_value(score[i], b, h, q_idx + i, kv_idx + row, captured, staged, element + i);
    const Vector modified = *(const Vector*)value;
    // 0, whatever stands beside it: dropped, or in a row that keeps nothing.
    const IntVector dropped = (modified == -infinity) | empty;
    const Vector p = dropped ? Vector{} : exp2_nonpositive((modified - lse) * kLog2e);
    // 0 times a gradient that is not finite would not be 0.
    const Vector gradient = p == 0.0f ? Vector{} : p * (*gradient_row - delta);
    *p_row = p;
    alignas(Vector) float lane[kWidth];
    *(Vector*)lane = gradient;
#pragma clang loop vectorize(assume_safety) vectorize_width(ATTNJIT_VECTOR_WIDTH) interleave_count(1) unroll(disable)
    for (int i = 0; i < kWidth; ++i)
      lane[i] = attnjit_mod_gradient(score[i], lane[i], b, h, q_idx + i, kv_idx + row, captured, staged, element + i,
                                     contributions, places);
    *gradient_row = *(const Vector*)lane;
  }
}

}  // namespace
}  // namespace attnjit::cpu

extern "C" void attnjit_gradient_tile(const attnjit::cpu::GradientTileParams* params) {
  using namespace attnjit::cpu;
#pragma clang loop unroll(disable)
  for (int first = 0; first < kPanelLanes; first += kWidth)
    gradient_lanes(params->scores + first, params->gradients + first, params->contributions, params->places, *params,
                   first);
}
