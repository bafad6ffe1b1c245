// The backward's tile as plain code, around a mod and a derivative that the test chooses.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <random>

#include "tests/unit/cpu_testing.h"

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed"
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif
#define ATTNJIT_VECTOR_WIDTH 4
#include "kernels_templates/cpu/gradient_tile.cpp"  // NOLINT(bugprone-suspicious-include): built here as plain code

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Elements of which (q_idx + kv_idx) % 5 is 3 are dropped.
bool kept(long long q_idx, long long kv_idx) { return (q_idx + kv_idx) % 5 != 3; }

}  // namespace

float attnjit_mod_value(float score, long long b, long long h, long long q_idx, long long kv_idx,
                        const attnjit::cpu::CapturedView*, const void*, long long) {
  return kept(q_idx, kv_idx) ? 2.0f * score + static_cast<float>(b + h) : -kInf;
}

// One sink: the gradient itself, at a place that tells the element.
float attnjit_mod_gradient(float, float gradient, long long, long long, long long q_idx, long long kv_idx,
                           const attnjit::cpu::CapturedView*, const void*, long long element, float* contributions,
                           long long* places) {
  contributions[element] = gradient;
  places[element] = q_idx * 1000 + kv_idx;
  return 2.0f * gradient;
}

namespace attnjit::cpu {
namespace {

TEST(KernelsGradientTile, ValueThenGradientAtEveryElement) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  test::PanelBuffer scores(kTileRows), gradients(kTileRows), contributions(kTileRows), places(2 * kTileRows);
  test::PanelBuffer lse(1), delta(1);
  for (std::int64_t i = 0; i < kTileRows * kPanelLanes; ++i) {
    scores[i] = normal(random);
    // Of what is dropped, and of a row that keeps nothing, the value matters as little as the gradient.
    gradients[i] = kept(100 + i % kPanelLanes, 40 + i / kPanelLanes) ? normal(random) : kNan;
    if (i % kPanelLanes == 7) scores[i] = gradients[i] = i % 2 ? kNan : kInf;
  }
  for (int lane = 0; lane < kPanelLanes; ++lane) {
    lse[lane] = lane == 7 ? kInf : 12.0f + 0.1f * static_cast<float>(lane);
    delta[lane] = normal(random);
  }
  lse[9] = kNan;
  const test::PanelBuffer given_scores = scores, given_gradients = gradients;
  const long long rows = 77;
  const GradientTileParams params{.scores = scores.data(),
                                  .gradients = gradients.data(),
                                  .lse = lse.data(),
                                  .delta = delta.data(),
                                  .b = 3,
                                  .h = 5,
                                  .q_idx = 100,
                                  .kv_idx = 40,
                                  .rows = rows,
                                  .captured = nullptr,
                                  .contributions = contributions.data(),
                                  .places = reinterpret_cast<long long*>(places.data())};
  attnjit_gradient_tile(&params);
  for (long long row = 0; row < rows; ++row) {
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      const long long i = row * kPanelLanes + lane;
      EXPECT_EQ(params.places[i], (100 + lane) * 1000 + 40 + row);
      if (lane == 7 || !kept(100 + lane, 40 + row)) {
        EXPECT_EQ(scores[i], 0.0f);
        EXPECT_EQ(gradients[i], 0.0f);
        EXPECT_EQ(contributions[i], 0.0f);
      } else if (lane == 9) {
        // A row whose lse is NaN has no gradients; it does not pass as a row without elements.
        EXPECT_TRUE(std::isnan(scores[i]));
        EXPECT_TRUE(std::isnan(gradients[i]));
      } else {
        const double p = std::exp(2.0 * given_scores[i] + 8 - lse[lane]);
        const double gradient = p * (given_gradients[i] - delta[lane]);
        const double size = p * (std::abs(given_gradients[i]) + std::abs(delta[lane])) * 1e-5;
        EXPECT_NEAR(scores[i], p, 1e-5 * p);
        EXPECT_NEAR(contributions[i], gradient, size);
        EXPECT_NEAR(gradients[i], 2 * gradient, 2 * size);
      }
    }
  }
  EXPECT_EQ(scores[rows * kPanelLanes], given_scores[rows * kPanelLanes]);
  EXPECT_TRUE(scores.guard_intact());
  EXPECT_TRUE(gradients.guard_intact());
  EXPECT_TRUE(contributions.guard_intact());
}

}  // namespace
}  // namespace attnjit::cpu
