// Training: a bias for each relative position, read by the expression, is fitted so that attention gives a target. The
// loss falls, and the gradients that the first step takes are checked by finite differences.
#include <attnjit/attnjit.hpp>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "common.h"

namespace {

constexpr std::int64_t kHeads = 2, kSeqlen = 48, kDim = 16, kReach = 12, kDistances = 2 * kReach + 1;
constexpr float kLearningRate = 60.0f;

int failed(const attnjit::Status& status) {
  std::fprintf(stderr, "%s\n", status.message().c_str());
  return 1;
}

// Half the mean square of o - target, and its gradient.
double loss(const std::vector<float>& o, const std::vector<float>& target, std::vector<float>* grad_out) {
  double sum = 0.0;
  for (std::size_t i = 0; i < o.size(); ++i) {
    const float difference = o[i] - target[i];
    sum += 0.5 * difference * difference;
    (*grad_out)[i] = difference / static_cast<float>(o.size());
  }
  return sum / static_cast<double>(o.size());
}

}  // namespace

int main() {
  const auto size = static_cast<std::size_t>(kHeads * kSeqlen * kDim);
  const std::vector<float> q = random_values(size, 1), k = random_values(size, 2), v = random_values(size, 3);
  std::vector<float> o(size), target(size), grad_out(size), lse(kHeads * kSeqlen);
  std::vector<float> bias(kHeads * kDistances), grad_bias(bias.size());

  auto context = attnjit::Context::create();
  if (!context) return failed(context.status());

  // Distances beyond the table's ends share its last elements, and add their gradients up there.
  const attnjit::ScoreMod mod = attnjit::score_mod([](auto score, auto b, auto h, auto q_idx, auto kv_idx) {
    return score + attnjit::captured("bias")(h, attnjit::clamp(q_idx - kv_idx + kReach, 0, 2 * kReach));
  });
  attnjit::Attention attention{.q = {q.data(), {1, kHeads, kSeqlen, kDim}},
                               .k = {k.data(), {1, kHeads, kSeqlen, kDim}},
                               .v = {v.data(), {1, kHeads, kSeqlen, kDim}},
                               .o = {o.data(), {1, kHeads, kSeqlen, kDim}},
                               .lse = {lse.data(), {1, kHeads, kSeqlen}},
                               .score_mod = mod,
                               .captures = {{"bias", {bias.data(), {kHeads, kDistances}}}}};
  const attnjit::Gradients gradients{.grad_out = {grad_out.data(), {1, kHeads, kSeqlen, kDim}},
                                     .captures = {{"bias", {grad_bias.data(), {kHeads, kDistances}}}}};
  auto plans = context->prepare_training(attention, gradients);
  if (!plans) return failed(plans.status());
  const attnjit::Workspace workspace(std::max(plans->forward.workspace_size(), plans->backward.workspace_size()));

  // The target is what a bias that is to be found gives: nearer keys count more, in each head in its own way.
  const std::vector<float> start = bias;
  for (std::int64_t i = 0; i < kHeads * kDistances; ++i) {
    const auto distance = static_cast<float>(i % kDistances - kReach);
    bias[static_cast<std::size_t>(i)] = i < kDistances ? -0.3f * std::fabs(distance) : 0.2f * distance;
  }
  if (const attnjit::Status status = plans->forward.run(attention, workspace); !status) return failed(status);
  target = o;
  bias = start;

  double first = 0.0, last = 0.0;
  for (int step = 0; step <= 200; ++step) {
    attnjit::Status status = plans->forward.run(attention, workspace);
    if (status) {
      last = loss(o, target, &grad_out);
      status = plans->backward.run_backward(attention, gradients, workspace);
    }
    if (!status) return failed(status);
    if (step == 0) first = last;
    if (step % 40 == 0) std::printf("step %3d: loss %.3e\n", step, last);

    if (step == 0) {
      std::vector<float> unused(size);
      for (const std::size_t i : {std::size_t{0}, std::size_t{kReach}, std::size_t{kDistances + 3}}) {
        constexpr float kStep = 1.0f / 16;
        const float kept = bias[i];
        double side[2] = {};
        for (int s = 0; s < 2; ++s) {
          bias[i] = kept + (s == 0 ? kStep : -kStep);
          status = plans->forward.run(attention, workspace);
          if (!status) return failed(status);
          side[s] = loss(o, target, &unused);
        }
        bias[i] = kept;
        const double expected = (side[0] - side[1]) / (2 * kStep);
        std::printf("  d bias[%zu] = %+.4e, by differences %+.4e\n", i, grad_bias[i], expected);
        // float32's rounding of the losses, and the third derivative.
        if (!(std::fabs(grad_bias[i] - expected) <= 1e-2 * std::fabs(expected) + 1e-6)) return 1;
      }
    }
    for (std::size_t i = 0; i < bias.size(); ++i) bias[i] -= kLearningRate * grad_bias[i];
  }
  return last < first / 20 ? 0 : 1;
}
