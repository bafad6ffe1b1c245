// The derivative of expressions: every operator and function, kinks, what contributes nothing, and finite differences.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numbers>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "dsl/derivative.h"
#include "tests/support/expression_text.h"
#include "tests/support/finite_differences.h"
#include "tests/support/random_expression.h"
#include "tests/support/random_inputs.h"

namespace attnjit::dsl {
namespace {

using test::captured;
using test::Captures;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// Gradients of captured elements, by the capture's number and the element's place in a packed tensor.
using CapturedGradients = std::map<std::pair<int, std::int64_t>, double>;

CapturedGradients sums(const ElementGradient& gradient, std::span<const CaptureView> captures) {
  CapturedGradients result;
  for (const Contribution& each : gradient.contributions) {
    const CaptureView& view = captures[static_cast<std::size_t>(each.capture)];
    std::int64_t offset = 0;
    for (int i = 0; i < view.rank; ++i) {
      EXPECT_GE(each.index[i], 0);
      EXPECT_LT(each.index[i], view.extent[i]);
      offset = offset * view.extent[i] + each.index[i];
    }
    result[{each.capture, offset}] += each.value;
  }
  return result;
}

double dscore(std::string_view text, const Point& point, double grad = 1.0, const Captures& captures = {}) {
  const auto expr = test::bound(text, captures);
  if (!expr) {
    ADD_FAILURE() << format_error(expr.error(), text);
    return kNan;
  }
  return Derivative(*expr, test::views(*expr, captures)).at(point, grad).dscore;
}

// Of the first captured tensor.
std::vector<double> dcaptured(std::string_view text, const Point& point, double grad, const Captures& captures) {
  const auto expr = test::bound(text, captures);
  if (!expr) {
    ADD_FAILURE() << format_error(expr.error(), text);
    return {};
  }
  const auto views = test::views(*expr, captures);
  std::int64_t count = 1;
  for (int i = 0; i < views[0].rank; ++i) count *= views[0].extent[i];
  std::vector<double> result(static_cast<std::size_t>(count));
  Derivative derivative(*expr, views);
  for (const auto& [place, value] : sums(derivative.at(point, grad), views)) {
    if (place.first == 0) result[static_cast<std::size_t>(place.second)] = value;
  }
  return result;
}

struct DerivativeCase {
  const char* text;
  double score;
  double derivative;
};

void expect_derivatives(std::initializer_list<DerivativeCase> cases) {
  for (const DerivativeCase& c : cases) {
    const Point point{.score = c.score, .b = 1, .h = 2, .q_idx = 5, .kv_idx = 3};
    // A gradient that is not 1 shows what forgets to multiply by it.
    const double found = dscore(c.text, point, 3.0);
    if (!std::isfinite(c.derivative)) {
      EXPECT_TRUE(std::isnan(c.derivative) ? std::isnan(found) : found == c.derivative) << c.text << " gives " << found;
    } else {
      EXPECT_NEAR(found, 3.0 * c.derivative, 1e-14 * (1.0 + std::fabs(c.derivative))) << c.text << " at " << c.score;
    }
  }
}

TEST(DslDerivative, DifferentiatesOperators) {
  expect_derivatives({{"score", 0.5, 1},
                      {"-score", 0.5, -1},
                      {"score + 2 * score", 0.5, 3},
                      {"h - score", 0.5, -1},
                      {"score * score", 0.5, 1},
                      {"score * h", 0.5, 2},
                      {"score / 4", 0.5, 0.25},
                      {"4 / score", 0.5, -16},
                      {"score / score", 0.5, 0},
                      {"score // 0.3", 0.5, 0},
                      {"score % 0.3", 0.5, 1},
                      {"7.5 % score", 2, -3},
                      {"7.5 % score", -2, 4},
                      {"score ** 3", 2, 12},
                      {"score ** 0", 0, 0},
                      {"score ** 0", 2, 0},
                      {"score ** 1", 0, 1},
                      {"score ** -1", 2, -0.25},
                      {"2 ** score", 3, 8 * std::log(2.0)},
                      {"score ** score", 2, 4 * (1 + std::log(2.0))},
                      {"0.0 ** score", 2, 0},
                      {"float(score) + float(h)", 0.5, 1},
                      {"int(score)", 2.5, 0},
                      {"float(score > 0) + bool(score)", 2.5, 0},
                      {"let x = score * score; x + x * x", 2, 2 * 2 + 4 * 8.0},
                      {"q_idx - kv_idx", 0.5, 0}});
}

TEST(DslDerivative, DifferentiatesFunctions) {
  const double x = 0.7, s = 1 / (1 + std::exp(-x)), t = std::tanh(x);
  const double density = std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi);
  expect_derivatives({{"exp(score)", x, std::exp(x)},
                      {"exp2(score)", x, std::exp2(x) * std::log(2.0)},
                      {"log(score)", x, 1 / x},
                      {"log2(score)", x, 1 / x / std::log(2.0)},
                      {"log1p(score)", x, 1 / (1 + x)},
                      {"sqrt(score)", x, 0.5 / std::sqrt(x)},
                      {"rsqrt(score)", x, -0.5 / x / std::sqrt(x)},
                      {"tanh(score)", x, 1 - t * t},
                      {"tanh(score)", 800, 0},
                      {"sigmoid(score)", x, s * (1 - s)},
                      {"sigmoid(score)", -800, 0},
                      {"silu(score)", x, s * (1 + x * (1 - s))},
                      {"silu(score)", -800, 0},
                      {"gelu(score)", x, 0.5 * (1 + std::erf(x / std::sqrt(2.0))) + x * density},
                      {"erf(score)", x, 2 / std::sqrt(std::numbers::pi) * std::exp(-x * x)},
                      {"sin(score)", x, std::cos(x)},
                      {"cos(score)", x, -std::sin(x)},
                      {"floor(score)", x, 0},
                      {"ceil(score)", x, 0},
                      {"round(score)", x, 0},
                      {"sign(score)", x, 0},
                      {"where(isinf(score) or isnan(score), 0, 2 * score)", x, 2}});
}

TEST(DslDerivative, KinksArePyTorchs) {
  expect_derivatives(
      {{"min(score, 2)", 1, 1},       {"min(score, 2)", 2, 0.5},    {"min(score, 2)", 3, 0},
       {"max(score, 2)", 1, 0},       {"max(score, 2)", 2, 0.5},    {"max(score, 2)", 3, 1},
       {"min(score, score)", 3, 1},   {"max(score, 2, 1)", 2, 0.5}, {"max(score, 2, 2)", 2, 0.25},
       {"min(2 * score, nan)", 1, 2}, {"clamp(score, 1, 3)", 0, 0}, {"clamp(score, 1, 3)", 1, 1},
       {"clamp(score, 1, 3)", 2, 1},  {"clamp(score, 1, 3)", 3, 1}, {"clamp(score, 1, 3)", 4, 0},
       {"clamp(score, 3, 1)", 2, 0},  {"clamp(0, score, 3)", 1, 1}, {"clamp(0, score, 3)", 3, 0},
       {"clamp(0, score, 3)", -1, 0}, {"clamp(4, 1, score)", 3, 1}, {"clamp(4, 1, score)", 5, 0},
       {"clamp(2, 3, score)", 1, 1},  {"clamp(2, 3, score)", 3, 0}, {"clamp(nan, 1, score)", 3, 0},
       {"abs(score)", 2, 1},          {"abs(score)", -2, -1},       {"abs(score)", 0, 0},
       {"relu(score)", 2, 1},         {"relu(score)", -2, 0},       {"relu(score)", 0, 0},
       {"relu(score)", kNan, 0},      {"abs(score)", kNan, kNan},   {"where(score > 0, 2 * score, 3 * score)", 0, 3}});
  EXPECT_EQ(dscore("2 * score if score > 0 else 3 * score", {.score = 1}), 2);
  // Integers have none, and neither have the parts that only they depend on.
  EXPECT_EQ(dscore("max(q_idx, kv_idx) * score", {.score = 1, .q_idx = 4}), 4);
}

TEST(DslDerivative, PolesAreWhatTheFormulaGives) {
  expect_derivatives({{"sqrt(score)", 0, kInf},
                      {"log(score)", 0, kInf},
                      {"1 / score", 0, -kInf},
                      {"rsqrt(score)", 0, -kInf},
                      {"score ** 0.5", 0, kInf},
                      {"sqrt(score * score)", 0, kNan},
                      {"nan * score", 1, kNan}});
}

TEST(DslDerivative, WhatIsNotChosenContributesNothing) {
  expect_derivatives({{"where(score > 0, log(score), score)", 0, 1},
                      {"where(score > 0, log(score), score)", -1, 1},
                      {"where(score > 0, score, sqrt(score) * inf)", 1, 1},
                      {"where(h == 2, score, nan * score)", 1, 1},
                      {"min(score, 1 / (score - 1) ** 2)", 0.99, 1},
                      {"relu(-exp(-log(score)))", 0, 0},
                      {"relu(sqrt(score))", 0, 0},
                      {"clamp(1 / score, -1, 1)", 0, 0},
                      {"max(score, -1 / score)", 0, 1}});
}

TEST(DslDerivative, DroppedElementsAndZeroGradientsContributeNothing) {
  const Captures bias = {{"bias", captured<float>(DType::kF32, {3}, {1, 2, 3})}};
  const Point kept{.score = 0.5, .h = 1, .q_idx = 5, .kv_idx = 3};
  const Point dropped{.score = 0.5, .h = 1, .q_idx = 2, .kv_idx = 3};
  for (const char* text :
       {"where(q_idx >= kv_idx, score, -inf) + bias[h]", "score + bias[h] + where(q_idx >= kv_idx, 0, -inf)",
        "score + bias[h] if q_idx >= kv_idx else -inf"}) {
    EXPECT_EQ(dscore(text, kept, 2.0, bias), 2.0) << text;
    EXPECT_EQ(dcaptured(text, kept, 2.0, bias), (std::vector<double>{0, 2, 0})) << text;
    EXPECT_EQ(dscore(text, dropped, 2.0, bias), 0.0) << text;
    EXPECT_EQ(dcaptured(text, dropped, 2.0, bias), (std::vector<double>{0, 0, 0})) << text;
  }
  EXPECT_EQ(dscore("log(score) * bias[h]", {.score = 0}, 0.0, bias), 0.0);
  EXPECT_EQ(dcaptured("score * bias[h]", {.score = kInf}, 0.0, bias), (std::vector<double>{0, 0, 0}));
  EXPECT_EQ(dscore("tanh(where(q_idx >= kv_idx, score, -inf))", dropped), 0.0);
  EXPECT_TRUE(std::isnan(dscore("score", kept, kNan)));
  EXPECT_EQ(dscore("where(h == 1, 1, score)", kept, kNan), 0.0);
}

TEST(DslDerivative, GoesToTheElementThatWasRead) {
  const Captures one = {{"t", captured<float>(DType::kF32, {2, 3}, {1, 2, 3, 4, 5, 6})}};
  const Point point{.score = 0.5, .h = 1, .q_idx = 2, .kv_idx = 7};
  EXPECT_EQ(dcaptured("score * t[h, q_idx]", point, 2.0, one), (std::vector<double>{0, 0, 0, 0, 0, 1}));
  // Clamped on both sides.
  EXPECT_EQ(dcaptured("score + t[h, kv_idx]", point, 2.0, one), (std::vector<double>{0, 0, 0, 0, 0, 2}));
  EXPECT_EQ(dcaptured("score + t[-3, q_idx - kv_idx]", point, 2.0, one), (std::vector<double>{2, 0, 0, 0, 0, 0}));
  // Read twice: at one place, and at two.
  EXPECT_EQ(dcaptured("t[h, 0] * t[h, 0]", point, 1.0, one), (std::vector<double>{0, 0, 0, 8, 0, 0}));
  EXPECT_EQ(dcaptured("let x = t[0, 0]; x * t[0, 1]", point, 1.0, one), (std::vector<double>{2, 1, 0, 0, 0, 0}));
  // The index has none, nor has a tensor of integers.
  const Captures two = {{"t", captured<float>(DType::kF32, {4}, {1, 2, 3, 4})},
                        {"ids", captured<std::int32_t>(DType::kInt32, {2}, {1, 3})}};
  EXPECT_EQ(dcaptured("score + t[0] + t[ids[h]] * ids[h]", point, 1.0, two), (std::vector<double>{1, 0, 0, 3}));
  EXPECT_EQ(dcaptured("score + t[int(t[0])]", point, 1.0, two), (std::vector<double>{0, 1, 0, 0}));
  const Captures scalar = {{"g", captured<float>(DType::kF32, {}, {0.5f})}};
  EXPECT_EQ(dcaptured("score * g", point, 3.0, scalar), (std::vector<double>{1.5}));
}

TEST(DslDerivative, AgreesWithFiniteDifferences) {
  std::mt19937_64 random(11);
  int compared = 0, skipped = 0, sharp = 0, captured_sharp = 0;
  for (int e = 0; e < 700; ++e) {
    auto expression = test::random_expression(
        random,
        {.size = 1 + static_cast<int>(random() % 25), .moderate = random() % 4 != 0, .jumps = random() % 4 == 0});
    for (test::RandomCapture& capture : expression.captures) {
      if (capture.dtype.find("float") != std::string::npos) capture.dtype = "float32";
    }
    Captures captures = test::random_captures(random, expression);
    // Exact in float32 with the step added.
    for (auto& [name, tensor] : captures) {
      if (tensor.dtype != DType::kF32) continue;
      for (std::size_t i = 0; i < tensor.bytes.size(); i += 4) {
        const float value = static_cast<float>(static_cast<int>(random() % 2000) - 1000) / 256.0f;
        std::memcpy(&tensor.bytes[i], &value, 4);
      }
    }
    const auto expr = test::bound(expression.text, captures);
    ASSERT_TRUE(expr) << expression.text;
    const auto views = test::views(*expr, captures);
    Interpreter interpreter(*expr, views);
    Derivative derivative(*expr, views);
    for (int p = 0; p < 4; ++p) {
      Point point = test::random_point(random);
      point.score = static_cast<double>(static_cast<int>(random() % 2000) - 1000) / 256.0;
      if (!interpreter.score_mod(point).keep) {
        const ElementGradient gradient = derivative.at(point, 1.0);
        EXPECT_EQ(gradient.dscore, 0.0);
        EXPECT_TRUE(gradient.contributions.empty());
        continue;
      }
      const ElementGradient gradient = derivative.at(point, 1.0);
      const CapturedGradients found = sums(gradient, views);
      const auto value = [&](double* largest) {
        const double result = interpreter.score_mod(point).value;
        for (std::size_t n = 0; n < expr->nodes.size(); ++n) {
          const double f = interpreter.values()[n].f;
          if (expr->nodes[n].type == Type::kFloat && std::isfinite(f)) *largest = std::max(*largest, std::fabs(f));
        }
        return result;
      };
      const auto compare = [&](const test::Differences& expected, double ours, const std::string& what,
                               int* sharp_ones) {
        if (!expected.usable || !std::isfinite(ours)) {
          ++skipped;
          return;
        }
        ++compared;
        *sharp_ones += ours != 0.0 && expected.tolerance < 1e-4 * std::fabs(ours);
        EXPECT_NEAR(ours, expected.value, expected.tolerance)
            << expression.text << "\n  d " << what << " at score " << point.score << " q_idx " << point.q_idx
            << " kv_idx " << point.kv_idx << " b " << point.b << " h " << point.h;
      };
      const double score = point.score;
      compare(test::differences([&](double distance, double* largest) {
                point.score = score + distance;
                const double result = value(largest);
                point.score = score;
                return result;
              }),
              gradient.dscore, "score", &sharp);
      for (std::size_t c = 0; c < views.size(); ++c) {
        test::Captured& tensor = captures.at(expr->captures[c].name);
        if (tensor.dtype != DType::kF32) continue;
        for (std::size_t i = 0; i < tensor.bytes.size(); i += 4) {
          float original;
          std::memcpy(&original, &tensor.bytes[i], 4);
          const auto at = found.find({static_cast<int>(c), static_cast<std::int64_t>(i / 4)});
          compare(test::differences([&](double distance, double* largest) {
                    const float moved = original + static_cast<float>(distance);
                    std::memcpy(&tensor.bytes[i], &moved, 4);
                    const double result = value(largest);
                    std::memcpy(&tensor.bytes[i], &original, 4);
                    return result;
                  }),
                  at == found.end() ? 0.0 : at->second, expr->captures[c].name + std::to_string(i / 4),
                  &captured_sharp);
        }
      }
    }
  }
  EXPECT_GT(sharp, 700) << compared << " compared, " << skipped << " skipped";
  EXPECT_GT(captured_sharp, 300);
  EXPECT_LT(skipped, compared / 10);
}

}  // namespace
}  // namespace attnjit::dsl
