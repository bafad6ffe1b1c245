// A mod applied to arrays of points, one vector of lanes at a time: what tests see of a compiled mod, free of softmax.
#include "kernels_templates/cpu/tile_abi.h"

extern "C" float attnjit_mod(float score, long long b, long long h, long long q_idx, long long kv_idx,
                             const attnjit::cpu::CapturedView* captured, const void* staged, long long element);

// `indices` holds b, h, q_idx and kv_idx of every point, one array of `count` after the other.
extern "C" void attnjit_elementwise(const float* scores, const long long* indices, float* values, long long count,
                                    const attnjit::cpu::CapturedView* captured) {
#pragma clang loop vectorize(assume_safety) vectorize_width(ATTNJIT_VECTOR_WIDTH) interleave_count(1) unroll(disable)
  for (long long i = 0; i < count; ++i)
    values[i] = attnjit_mod(scores[i], indices[i], indices[count + i], indices[2 * count + i], indices[3 * count + i],
                            captured, nullptr, 0);
}
