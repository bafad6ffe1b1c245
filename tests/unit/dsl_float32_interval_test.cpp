// The derivatives beside which intervals stand, against the oracle's; and a float32 evaluation inside the intervals.
#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "dsl/derivative.h"
#include "dsl/float32_interval.h"
#include "tests/support/expression_text.h"
#include "tests/support/random_expression.h"
#include "tests/support/random_inputs.h"

namespace attnjit::dsl {
namespace {

TEST(DslFloat32Interval, DerivativesAgreeWithTheOracle) {
  std::mt19937_64 random(5);
  int points = 0, sure = 0, reads = 0;
  for (int e = 0; e < 1500; ++e) {
    const auto expression =
        test::random_expression(random, {.size = 1 + static_cast<int>(random() % 30), .moderate = random() % 2 == 0});
    const auto captures = test::random_captures(random, expression);
    const auto expr = test::bound(expression.text, captures);
    ASSERT_TRUE(expr) << expression.text;
    const auto views = test::views(*expr, captures);
    Derivative derivative(*expr, views);
    Interpreter interpreter(*expr, views);
    Float32Interval interval(*expr, views);
    for (int p = 0; p < 5; ++p) {
      const Point point = test::random_point(random);
      if (!interpreter.score_mod(point).keep) continue;
      const ElementGradient expected = derivative.at(point, 1.0);
      if (interval.evaluate(point, 1e-6).unsure) continue;
      const Interval found = interval.differentiate();
      ++points;
      const auto compare = [&](double oracle, const Interval& x) {
        if (x.unsure) return;
        ++sure;
        if (std::isnan(oracle) || std::isnan(x.lo)) {
          EXPECT_TRUE(std::isnan(oracle) && std::isnan(x.lo)) << expression.text << " at " << point.score;
          return;
        }
        if (std::isinf(oracle)) {
          EXPECT_TRUE(oracle == x.value && (oracle == x.lo || oracle == x.hi)) << expression.text;
          return;
        }
        const double tolerance = 1e-9 * (1.0 + std::fabs(oracle));
        EXPECT_TRUE(oracle == x.value || std::fabs(oracle - x.value) <= tolerance)
            << expression.text << "\n at " << point.score << ": " << oracle << ", not " << x.value;
        EXPECT_TRUE(oracle >= x.lo - tolerance && oracle <= x.hi + tolerance) << expression.text;
      };
      compare(expected.dscore, found);
      double total = 0.0, expected_total = 0.0;
      bool unsure = false;
      for (const ReadDerivative& read : interval.read_derivatives()) {
        total += read.derivative.value;
        unsure = unsure || read.derivative.unsure || read.place_unsure;
        ++reads;
      }
      for (const Contribution& each : expected.contributions) expected_total += each.value;
      if (!unsure && std::isfinite(total)) {
        EXPECT_NEAR(total, expected_total, 1e-9 * (1.0 + std::fabs(total))) << expression.text;
      }
    }
  }
  EXPECT_GT(points, 3000);
  EXPECT_GT(sure, points * 3 / 4);
  EXPECT_GT(reads, 1000);
}

}  // namespace
}  // namespace attnjit::dsl
