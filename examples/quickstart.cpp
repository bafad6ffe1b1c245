// Quickstart: write a score_mod as a C++ lambda, register it, run it fused, compare with the eager reference.
#include <attnjit/attnjit.hpp>
#include <cstdio>
#include <vector>

#include "common.h"

int main() {
  // 1 batch, 8 query heads that share 2 key/value heads, 300 positions, head dimension 64. Tensors are (B, H, S, D).
  const std::vector<float> q = random_values(8 * 300 * 64, 1);
  const std::vector<float> k = random_values(2 * 300 * 64, 2);
  const std::vector<float> v = random_values(2 * 300 * 64, 3);
  std::vector<float> o(q.size()), eager(q.size());

  auto context = attnjit::Context::create();
  if (!context) return std::fprintf(stderr, "%s\n", context.status().message().c_str()), 1;

  // The lambda runs once and writes down its expression: a distance penalty, softly capped, and causal.
  attnjit::Status status = context->register_mod("my_mod", [](auto score, auto b, auto h, auto q_idx, auto kv_idx) {
    auto biased = score - 0.125 * (h + 1) * (q_idx - kv_idx);
    return attnjit::where(q_idx >= kv_idx, 20 * attnjit::tanh(biased / 20), -attnjit::inf);
  });

  attnjit::Attention attention{.q = {q.data(), {1, 8, 300, 64}},
                               .k = {k.data(), {1, 2, 300, 64}},
                               .v = {v.data(), {1, 2, 300, 64}},
                               .o = {o.data(), {1, 8, 300, 64}},
                               .score_mod = "my_mod"};
  if (status) status = context->forward(attention);  // compiles at the first call, then runs what was compiled

  attention.o = {eager.data(), {1, 8, 300, 64}};
  attention.backend = attnjit::Backend::kMath;  // unfused, every score in memory
  if (status) status = context->forward(attention);
  if (!status) return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;

  const float difference = largest_difference(o, eager);
  std::printf("largest difference between fused and eager: %.2g\n", difference);
  return difference < 1e-4f ? 0 : 1;
}
