// Sums of captured gradients: exact accumulators, whatever the order.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "kernels_templates/cuda/params.h"
#include "support/cuda_emulation.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
namespace attnjit::cuda {
using namespace emulation;
}
#include "kernels_templates/cuda/gradients.cuh"
#pragma GCC diagnostic pop

namespace attnjit::cuda {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kSmallest = std::numeric_limits<float>::denorm_min();
constexpr float kLargest = std::numeric_limits<float>::max();

float sum_of(const std::vector<float>& values) {
  unsigned long long accumulator[kAccumulatorWords] = {};
  for (const float value : values) accumulate(accumulator, value);
  return accumulated(accumulator);
}

TEST(CudaGradients, OneValueComesBack) {
  std::mt19937 random(1);
  for (int i = 0; i < 100000; ++i) {
    // All exponents; every second one subnormal or close to it.
    const std::uint32_t bits = i % 2 == 0 ? random() : random() % 0x02000000u | (random() & 0x80000000u);
    const auto value = std::bit_cast<float>(bits);
    if (!std::isfinite(value)) continue;
    ASSERT_EQ(sum_of({value}), value) << bits;
  }
  for (const float value : {kSmallest, -kSmallest, kLargest, -kLargest, 0.0f}) EXPECT_EQ(sum_of({value}), value);
}

TEST(CudaGradients, RoundsOnce) {
  // Ties go to even, and anything behind a tie decides it.
  EXPECT_EQ(sum_of({0x1p24f, 1.0f}), 0x1p24f);
  EXPECT_EQ(sum_of({0x1p24f, 2.0f, 1.0f}), 0x1p24f + 4.0f);
  EXPECT_EQ(sum_of({0x1p24f, 1.0f, kSmallest}), 0x1p24f + 2.0f);
  EXPECT_EQ(sum_of({-0x1p24f, -1.0f, -kSmallest}), -0x1p24f - 2.0f);
  EXPECT_EQ(sum_of({0x1p24f, 1.0f, -kSmallest}), 0x1p24f);
  // What cancels leaves nothing behind.
  EXPECT_EQ(sum_of({kLargest, 1.0f, -kLargest}), 1.0f);
  EXPECT_EQ(sum_of({kLargest, kLargest, kSmallest, -kLargest, -kLargest}), kSmallest);
  EXPECT_EQ(sum_of({-3.0f, 3.0f}), 0.0f);
  // The end of float's range.
  EXPECT_EQ(sum_of({kLargest, kLargest}), kInf);
  EXPECT_EQ(sum_of({-kLargest, -kLargest}), -kInf);
  EXPECT_EQ(sum_of({kLargest, 0x1p102f}), kLargest);
  EXPECT_EQ(sum_of({kLargest, 0x1p103f}), kInf);
}

TEST(CudaGradients, NotFinite) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(sum_of({1.0f, kInf, -kLargest}), kInf);
  EXPECT_EQ(sum_of({-kInf, kLargest}), -kInf);
  EXPECT_TRUE(std::isnan(sum_of({kInf, -kInf})));
  EXPECT_TRUE(std::isnan(sum_of({1.0f, nan})));
  EXPECT_TRUE(std::isnan(sum_of({kInf, nan})));
}

// Integers times a power of two: a 64-bit sum is exact, and converts with one rounding.
TEST(CudaGradients, SumsAreExactInAnyOrder) {
  std::mt19937 random(2);
  for (int i = 0; i < 2000; ++i) {
    std::vector<float> values(1 + random() % 300);
    std::int64_t sum = 0;
    const int exponent = static_cast<int>(random() % 200) - 140;
    for (float& value : values) {
      const std::int64_t integer = static_cast<std::int64_t>(static_cast<std::int32_t>(random()) >> 8) << random() % 30;
      value = std::ldexp(static_cast<float>(integer), exponent);
      sum += integer;
    }
    const float expected = std::ldexp(static_cast<float>(sum), exponent);
    // Where the result is subnormal it would be rounded twice here.
    if (std::fabs(expected) < std::numeric_limits<float>::min() && expected != 0.0f) continue;
    for (int order = 0; order < 3; ++order) {
      ASSERT_EQ(sum_of(values), expected) << i;
      std::shuffle(values.begin(), values.end(), random);
    }
  }
}

TEST(CudaGradients, ManyAdditionsToOneDigit) {
  unsigned long long accumulator[kAccumulatorWords] = {};
  for (int i = 0; i < 1 << 20; ++i) accumulate(accumulator, 0x1.fffffep7f);
  EXPECT_EQ(accumulated(accumulator), static_cast<float>(std::ldexp(0x1.fffffep7, 20)));
}

TEST(CudaGradients, AddingAndStoring) {
  float floats[3] = {};
  const GradientView view{.data = floats, .stride = {1}};
  add_gradient<false>(view, 1, 2.0f);
  add_gradient<false>(view, 1, 0.5f);
  store_gradient(view, 2ll, 3.0f);
  store_gradient(view, 2ll, 0.0f);  // of a position that does not exist
  EXPECT_EQ(floats[0], 0.0f);
  EXPECT_EQ(floats[1], 2.5f);
  EXPECT_EQ(floats[2], 3.0f);
  unsigned long long words[2 * kAccumulatorWords] = {};
  const GradientView exact{.data = words, .stride = {1}};
  add_gradient<true>(exact, 1, 2.0f);
  add_gradient<true>(exact, 1, 0.5f);
  EXPECT_EQ(accumulated(words), 0.0f);
  EXPECT_EQ(accumulated(words + kAccumulatorWords), 2.5f);
}

}  // namespace
}  // namespace attnjit::cuda
