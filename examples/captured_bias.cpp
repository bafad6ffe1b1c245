// Captured tensors: a learned bias per head and distance is read by the expression and bound at run time; one compiled
// plan serves new values of it.
#include <attnjit/attnjit.hpp>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common.h"

int main() {
  constexpr std::int64_t kHeads = 4, kSeqlen = 200, kDim = 32, kReach = 64;
  const std::vector<float> q = random_values(kHeads * kSeqlen * kDim, 1);
  const std::vector<float> k = random_values(kHeads * kSeqlen * kDim, 2);
  const std::vector<float> v = random_values(kHeads * kSeqlen * kDim, 3);
  std::vector<float> bias = random_values(kHeads * (2 * kReach + 1), 4);  // (heads, distance from -64 to 64)
  std::vector<float> o(q.size()), eager(q.size());

  auto context = attnjit::Context::create();
  if (!context) return std::fprintf(stderr, "%s\n", context.status().message().c_str()), 1;

  // `bias` in the expression is whatever tensor is given under that name. Reads beyond it take the nearest element, so
  // distances over 64 share the last bias.
  const auto table = attnjit::captured("bias");
  const attnjit::ScoreMod mod = attnjit::score_mod(
      [&](auto score, auto b, auto h, auto q_idx, auto kv_idx) { return score + table(h, q_idx - kv_idx + kReach); });
  std::printf("score_mod: %s\n", mod.text().c_str());

  attnjit::Attention attention{.q = {q.data(), {1, kHeads, kSeqlen, kDim}},
                               .k = {k.data(), {1, kHeads, kSeqlen, kDim}},
                               .v = {v.data(), {1, kHeads, kSeqlen, kDim}},
                               .o = {o.data(), {1, kHeads, kSeqlen, kDim}},
                               .score_mod = mod,
                               .captures = {{"bias", {bias.data(), {kHeads, 2 * kReach + 1}}}}};
  auto plan = context->prepare(attention);
  if (!plan) return std::fprintf(stderr, "%s\n", plan.status().message().c_str()), 1;
  const attnjit::Workspace workspace(plan->workspace_size());

  float difference = 0.0f;
  for (int step = 0; step < 3; ++step) {
    for (float& value : bias) value *= 0.5f;  // as an optimiser would between two steps
    attnjit::Status status = plan->run(attention, workspace);

    attnjit::Attention reference = attention;
    reference.o = {eager.data(), {1, kHeads, kSeqlen, kDim}};
    reference.backend = attnjit::Backend::kMath;
    if (status) status = context->forward(reference);
    if (!status) return std::fprintf(stderr, "%s\n", status.message().c_str()), 1;
    difference = std::max(difference, largest_difference(o, eager));
  }
  std::printf("largest difference between fused and eager: %.2g\n", difference);
  return difference < 1e-4f ? 0 : 1;
}
