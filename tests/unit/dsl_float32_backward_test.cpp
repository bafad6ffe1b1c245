// The gold gradients of attention against finite differences of its forward; a float32 kernel within its bounds.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "dsl/float32_backward.h"
#include "tests/support/expression_text.h"
#include "tests/support/finite_differences.h"
#include "tests/support/random_expression.h"
#include "tests/support/random_inputs.h"

namespace attnjit::dsl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// One key/value head with inputs of its own.
struct Head {
  BackwardHead shape;
  std::vector<double> q, k, v, grad_out, grad_lse;

  Head(const BackwardHead& of, std::mt19937_64& random, double step) : shape(of) {
    std::normal_distribution<double> normal;
    const auto fill = [&](std::vector<double>* values, std::int64_t count) {
      for (std::int64_t i = 0; i < count; ++i) values->push_back(std::nearbyint(normal(random) / step) * step);
    };
    const std::int64_t rows = of.num_heads * of.seqlen_q;
    fill(&q, rows * of.head_dim);
    fill(&k, of.seqlen_kv * of.head_dim);
    fill(&v, of.seqlen_kv * of.head_dim_v);
    fill(&grad_out, rows * of.head_dim_v);
    fill(&grad_lse, rows);
  }
  BackwardHead view() const {
    BackwardHead head = shape;
    head.q = q;
    head.k = k;
    head.v = v;
    head.grad_out = grad_out;
    head.grad_lse = grad_lse;
    return head;
  }
};

// sum(grad_out * o) + sum(grad_lse * lse) over the rows with a kept element.
double loss(const Head& head, double scale, Interpreter* mod, Interpreter* mask, double* largest) {
  const BackwardHead& s = head.shape;
  double result = 0.0;
  for (std::int64_t row = 0; row < s.num_heads * s.seqlen_q; ++row) {
    std::vector<double> m;
    double maximum = -kInfinity, sum = 0.0, out = 0.0;
    for (std::int64_t j = 0; j < s.seqlen_kv; ++j) {
      double score = 0.0;
      for (std::int64_t d = 0; d < s.head_dim; ++d) {
        score += head.q[static_cast<std::size_t>(row * s.head_dim + d)] *
                 head.k[static_cast<std::size_t>(j * s.head_dim + d)];
      }
      const Point point{scale * score, s.b, s.h + row / s.seqlen_q, row % s.seqlen_q, j};
      const Element element = mod->score_mod(point);
      m.push_back(mask && !mask->mask_mod(point) ? -kInfinity : element.value);
      maximum = std::max(maximum, m.back());
      if (m.back() != -kInfinity) *largest = std::max(*largest, std::fabs(m.back()));
    }
    if (maximum == -kInfinity) continue;
    for (std::int64_t j = 0; j < s.seqlen_kv; ++j) {
      const double p = std::exp(m[static_cast<std::size_t>(j)] - maximum);
      sum += p;
      for (std::int64_t d = 0; d < s.head_dim_v; ++d) {
        out += p * head.v[static_cast<std::size_t>(j * s.head_dim_v + d)] *
               head.grad_out[static_cast<std::size_t>(row * s.head_dim_v + d)];
      }
    }
    const double part = out / sum + head.grad_lse[static_cast<std::size_t>(row)] * (maximum + std::log(sum));
    *largest = std::max(*largest, std::fabs(part));
    result += part;
  }
  return result;
}

TEST(DslFloat32Backward, GoldIsTheGradientOfTheForward) {
  std::mt19937_64 random(3);
  int compared = 0, sharp = 0, captured_sharp = 0;
  for (int e = 0; e < 150; ++e) {
    auto expression = test::random_expression(
        random, {.size = 1 + static_cast<int>(random() % 16), .moderate = true, .jumps = false, .max_captures = 3});
    for (test::RandomCapture& capture : expression.captures) {
      if (capture.dtype.find("float") != std::string::npos) capture.dtype = "float32";
    }
    test::Captures captures = test::random_captures(random, expression);
    for (auto& [name, tensor] : captures) {
      if (tensor.dtype != DType::kF32) continue;
      for (std::size_t i = 0; i < tensor.bytes.size(); i += 4) {
        const float value = static_cast<float>(static_cast<int>(random() % 1000) - 500) / 256.0f;
        std::memcpy(&tensor.bytes[i], &value, 4);
      }
    }
    const auto expr = test::bound(expression.text, captures);
    ASSERT_TRUE(expr) << expression.text;
    const auto mask = test::bound("kv_idx < 4 or q_idx == 1", {}, ModKind::kMaskMod);
    const auto views = test::views(*expr, captures);
    const bool masked = random() % 2 == 0;
    Head head({.b = 1, .h = 2, .num_heads = 2, .seqlen_q = 3, .seqlen_kv = 5, .head_dim = 3, .head_dim_v = 2}, random,
              0x1p-8);
    BackwardOptions options{.dtype = DType::kF32, .scale = 0.75};
    for (std::size_t c = 0; c < views.size(); ++c) options.captures |= (views[c].dtype == DType::kF32 ? 1u : 0u) << c;
    Float32Backward backward(options, *expr, views, masked ? &*mask : nullptr, {});
    const HeadGradients found = backward.run(head.view());
    EXPECT_TRUE(found.agree) << expression.text;
    Interpreter mod(*expr, views), mask_mod(*mask, {});
    const auto value = [&](double* largest) {
      return loss(head, options.scale, &mod, masked ? &mask_mod : nullptr, largest);
    };
    const auto compare = [&](const test::Differences& expected, double ours, std::string_view what, int* sharp_ones) {
      if (!expected.usable || !std::isfinite(ours)) return;
      ++compared;
      *sharp_ones += std::fabs(ours) > 1e-6 && expected.tolerance < 1e-3 * std::fabs(ours);
      EXPECT_NEAR(ours, expected.value, expected.tolerance + 1e-12) << expression.text << "\n  d " << what;
    };
    const auto move = [&](double* x) {
      return test::differences([&, x](double distance, double* largest) {
        const double original = *x;
        *x += distance;
        const double result = value(largest);
        *x = original;
        return result;
      });
    };
    for (std::size_t i = 0; i < head.q.size(); i += 5) compare(move(&head.q[i]), found.dq.value[i], "q", &sharp);
    for (std::size_t i = 0; i < head.k.size(); i += 4) compare(move(&head.k[i]), found.dk.value[i], "k", &sharp);
    for (std::size_t i = 0; i < head.v.size(); i += 3) compare(move(&head.v[i]), found.dv.value[i], "v", &sharp);
    for (std::size_t c = 0; c < views.size(); ++c) {
      if (!(options.captures >> c & 1)) continue;
      const JudgedGradient gradient = backward.captured(static_cast<int>(c));
      test::Captured& tensor = captures.at(expr->captures[c].name);
      for (std::size_t i = 0; i < tensor.bytes.size(); i += 4) {
        compare(test::differences([&](double distance, double* largest) {
                  float original;
                  std::memcpy(&original, &tensor.bytes[i], 4);
                  const float moved = original + static_cast<float>(distance);
                  std::memcpy(&tensor.bytes[i], &moved, 4);
                  const double result = value(largest);
                  std::memcpy(&tensor.bytes[i], &original, 4);
                  return result;
                }),
                gradient.value[i / 4], expr->captures[c].name, &captured_sharp);
      }
    }
  }
  EXPECT_GT(sharp, 1000) << compared << " compared";
  EXPECT_GT(captured_sharp, 150);
}

}  // namespace
}  // namespace attnjit::dsl
