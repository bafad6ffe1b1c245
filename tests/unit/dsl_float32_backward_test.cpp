// The gold gradients of attention against finite differences of its forward; a float32 kernel within its bounds.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <optional>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <utility>
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

// ---- A float32 kernel, which rounds P and dS to the input type.

// A mod by hand: its value, and its derivatives by the score and by the captured element that it reads.
struct HandMod {
  const char* text;
  struct Result {
    float value, dscore, dcaptured;
    std::int64_t place;
  };
  Result (*at)(float score, const Point& point, const std::vector<float>& captured);
};

constexpr float kDropped = -std::numeric_limits<float>::infinity();

constexpr HandMod kMods[] = {
    {"score + 0 * t[h]",
     [](float s, const Point& p, const std::vector<float>&) { return HandMod::Result{s, 1, 0, p.h}; }},
    {"score + t[q_idx - kv_idx + 20]",
     [](float s, const Point& p, const std::vector<float>& t) {
       const auto place = std::clamp<std::int64_t>(p.q_idx - p.kv_idx + 20, 0, 39);
       return HandMod::Result{s + t[static_cast<std::size_t>(place)], 1, 1, place};
     }},
    {"where(q_idx >= kv_idx, score * t[h], -inf)",
     [](float s, const Point& p, const std::vector<float>& t) {
       const float g = t[static_cast<std::size_t>(p.h)];
       return HandMod::Result{p.q_idx >= p.kv_idx ? s * g : kDropped, g, s, p.h};
     }},
    {"3 * tanh(score * t[kv_idx] / 3)",
     [](float s, const Point& p, const std::vector<float>& t) {
       const float g = t[static_cast<std::size_t>(std::min<std::int64_t>(p.kv_idx, 39))];
       const float r = std::tanh(s * g / 3.0f), d = 1.0f - r * r;
       return HandMod::Result{3.0f * r, d * g, d * s, std::min<std::int64_t>(p.kv_idx, 39)};
     }},
    {"relu(score) + score * sigmoid(score + t[q_idx])",
     [](float s, const Point& p, const std::vector<float>& t) {
       const auto place = std::min<std::int64_t>(p.q_idx, 39);
       const float g = 1.0f / (1.0f + std::exp(-(s + t[static_cast<std::size_t>(place)])));
       const float d = s * (g * (1.0f - g));
       return HandMod::Result{std::max(s, 0.0f) + s * g, (s > 0.0f ? 1.0f : 0.0f) + g + d, d, place};
     }},
};

float round_float(DType dtype, double x) {
  if (dtype == DType::kF32 || x == 0.0) return static_cast<float>(x);
  const bool half = dtype == DType::kF16;
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), half ? -14 : -126) - (half ? 10 : 7));
  return static_cast<float>(std::nearbyint(x / ulp) * ulp);
}

// `error`: dS is off by this share.
struct KernelGradients {
  std::vector<float> dq, dk, dv, captured;
};
KernelGradients kernel(const Head& head, const HeadGradients& gold, const HandMod& mod, const std::vector<float>& t,
                       const BackwardOptions& options, float error) {
  const BackwardHead& s = head.shape;
  const auto dim = static_cast<std::size_t>(s.head_dim), dim_v = static_cast<std::size_t>(s.head_dim_v);
  const auto keys = static_cast<std::size_t>(s.seqlen_kv);
  KernelGradients result{.dq = std::vector<float>(head.q.size()),
                         .dk = std::vector<float>(head.k.size()),
                         .dv = std::vector<float>(head.v.size()),
                         .captured = std::vector<float>(t.size())};
  const auto dot = [](const double* a, const double* b, std::size_t count) {
    float sum = 0.0f;
    for (std::size_t d = 0; d < count; ++d) sum += static_cast<float>(a[d]) * static_cast<float>(b[d]);
    return sum;
  };
  const float scale = static_cast<float>(options.scale);
  for (std::size_t row = 0; row < head.q.size() / dim; ++row) {
    const float lse = static_cast<float>(gold.lse[row]);
    if (std::isinf(lse)) continue;
    float delta = 0.0f;
    for (std::size_t d = 0; d < dim_v; ++d) {
      delta += static_cast<float>(head.grad_out[row * dim_v + d]) * round_float(options.dtype, gold.o[row * dim_v + d]);
    }
    delta -= static_cast<float>(head.grad_lse[row]);
    for (std::size_t j = 0; j < keys; ++j) {
      const auto i = static_cast<std::int64_t>(row);
      const Point point{0.0, s.b, s.h + i / s.seqlen_q, i % s.seqlen_q, static_cast<std::int64_t>(j)};
      const float score = dot(&head.q[row * dim], &head.k[j * dim], dim) * scale;
      const HandMod::Result m = mod.at(score, point, t);
      if (m.value == kDropped) continue;
      const float p = std::exp2((m.value - lse) * 1.44269504f);
      const float dm = p * (dot(&head.grad_out[row * dim_v], &head.v[j * dim_v], dim_v) - delta) * (1.0f + error);
      const float rounded_p = round_float(options.dtype, p), ds = round_float(options.dtype, dm * m.dscore);
      for (std::size_t d = 0; d < dim; ++d) {
        result.dq[row * dim + d] += ds * static_cast<float>(head.k[j * dim + d]);
        result.dk[j * dim + d] += ds * static_cast<float>(head.q[row * dim + d]);
      }
      for (std::size_t d = 0; d < dim_v; ++d) {
        result.dv[j * dim_v + d] += rounded_p * static_cast<float>(head.grad_out[row * dim_v + d]);
      }
      result.captured[static_cast<std::size_t>(m.place)] += dm * m.dcaptured;
    }
  }
  for (float& x : result.dq) x = round_float(options.dtype, x * scale);
  for (float& x : result.dk) x = round_float(options.dtype, x * scale);
  for (float& x : result.dv) x = round_float(options.dtype, x);
  return result;
}

// The largest share of its bound that an error reaches, and by rule 1 of docs/numerics.md the mean error's share.
struct Judged {
  double worst = 0.0, ratio = 0.0;
};
Judged judge(const std::vector<float>& ours, const JudgedGradient& gold) {
  Judged result;
  double error_sum = 0.0, allowed = 0.0;
  for (std::size_t i = 0; i < ours.size(); ++i) {
    const double error = std::fabs(static_cast<double>(ours[i]) - gold.value[i]);
    EXPECT_LT(gold.bound[i], kInfinity);
    if (error > 0.0) result.worst = std::max(result.worst, error / gold.bound[i]);
    error_sum += error;
    allowed += 1.5 * std::fabs(gold.ideal[i] - gold.value[i]) + 2e-5 * std::fabs(gold.value[i]) + gold.scatter[i] / 8.0;
  }
  result.ratio = error_sum > 0.0 ? error_sum / allowed : 0.0;
  return result;
}

void expect_right_kernel_only(DType dtype) {
  std::mt19937_64 random(17);
  for (const HandMod& mod : kMods) {
    std::vector<float> t;
    t.reserve(40);
    for (int i = 0; i < 40; ++i) t.push_back(static_cast<float>(static_cast<int>(random() % 512) - 128) / 256.0f);
    const test::Captures captures = {{"t", test::captured<float>(DType::kF32, {40}, t)}};
    const auto expr = test::bound(mod.text, captures);
    ASSERT_TRUE(expr) << mod.text;
    const Head head({.b = 0, .h = 2, .num_heads = 2, .seqlen_q = 70, .seqlen_kv = 90, .head_dim = 32, .head_dim_v = 24},
                    random, 0x1p-5);
    const BackwardOptions options{.dtype = dtype, .scale = 0.1767766922712326, .captures = 1};
    Float32Backward backward(options, *expr, test::views(*expr, captures), nullptr, {});
    const HeadGradients gold = backward.run(head.view());
    ASSERT_TRUE(gold.agree) << mod.text;
    EXPECT_EQ(std::ranges::count(gold.decided, 0), 0) << mod.text;
    const JudgedGradient captured = backward.captured(0);
    const KernelGradients right = kernel(head, gold, mod, t, options, 0.0f);
    for (const auto& [name, judged] : {std::pair("dq", judge(right.dq, gold.dq)),
                                       {"dk", judge(right.dk, gold.dk)},
                                       {"dv", judge(right.dv, gold.dv)},
                                       {"dt", judge(right.captured, captured)}}) {
      EXPECT_LE(judged.worst, 1.0) << mod.text << ' ' << name;
      EXPECT_LE(judged.ratio, 1.0) << mod.text << ' ' << name;
    }
    const KernelGradients wrong = kernel(head, gold, mod, t, options, 0.02f);
    EXPECT_GT(judge(wrong.dq, gold.dq).ratio, 2.0) << mod.text;
    EXPECT_GT(judge(wrong.dk, gold.dk).ratio, 2.0) << mod.text;
    const bool has_captured = std::ranges::any_of(captured.value, [](double value) { return value != 0.0; });
    EXPECT_EQ(judge(wrong.captured, captured).worst > 1.0, has_captured) << mod.text;
    // Nor are the bounds wide.
    double bounds = 0.0, values = 0.0;
    for (std::size_t i = 0; i < gold.dq.value.size(); ++i) {
      bounds += gold.dq.bound[i];
      values += std::fabs(gold.dq.value[i]);
    }
    EXPECT_LT(bounds, (dtype == DType::kBF16 ? 0.08 : 0.01) * values) << mod.text;
  }
}

TEST(DslFloat32Backward, AFloat32KernelIsWithinTheBoundsAndAWrongOneIsNot) {
  for (const DType dtype : {DType::kF32, DType::kBF16, DType::kF16}) {
    SCOPED_TRACE(dtype_name(dtype));
    expect_right_kernel_only(dtype);
  }
}

// Where an element may be on either side of a jump its row's dq has no bound, nor has what else it may reach.
TEST(DslFloat32Backward, JumpsLeaveOutWhatTheyMove) {
  std::mt19937_64 random(9);
  Head head({.num_heads = 1, .seqlen_q = 6, .seqlen_kv = 7, .head_dim = 2, .head_dim_v = 2}, random, 0x1p-4);
  // Query 2 has a score of exactly 0.5 with key 3, and otherwise less than the edge.
  for (std::size_t j = 0; j < 7; ++j) head.k[2 * j] = j == 3 ? 0.5 : 0.0, head.k[2 * j + 1] = 0.0;
  for (std::size_t i = 0; i < 6; ++i) head.q[2 * i] = i == 2 ? 1.0 : 0.25;
  const test::Captures captures = {{"t", test::captured<float>(DType::kF32, {7}, {0, 0, 0, 0, 0, 0, 0})}};
  const auto expr = test::bound("where(score >= 0.5, score + 2, score) + t[kv_idx]", captures);
  ASSERT_TRUE(expr);
  Float32Backward backward({.dtype = DType::kF32, .captures = 1}, *expr, test::views(*expr, captures), nullptr, {});
  const HeadGradients gold = backward.run(head.view());
  for (std::size_t i = 0; i < 6; ++i) {
    EXPECT_EQ(gold.decided[i], i != 2) << i;
    EXPECT_EQ(gold.dq.bound[2 * i] == kInfinity, i == 2) << i;
  }
  // A hull is finite: what the row adds to dK, dV and the captured gradient is large, and has a bound.
  for (std::size_t j = 0; j < 7; ++j) {
    EXPECT_EQ(gold.dv.bound[2 * j] > 0.01, j == 3) << j << ' ' << gold.dv.bound[2 * j];
    EXPECT_LT(gold.dv.bound[2 * j], kInfinity);
    EXPECT_EQ(backward.captured(0).bound[j] > 0.01, j == 3) << j;
  }
}

TEST(DslFloat32Backward, WhatIsDroppedIsExactlyZeroAndPoisonStaysInItsRow) {
  std::mt19937_64 random(21);
  const Head head({.num_heads = 2, .seqlen_q = 4, .seqlen_kv = 5, .head_dim = 3, .head_dim_v = 2}, random, 0x1p-4);
  const auto expr = test::bound("where(q_idx == 1 and kv_idx == 2, nan, score * score)");
  const auto mask = test::bound("q_idx != 3 and kv_idx != 4", {}, ModKind::kMaskMod);
  ASSERT_TRUE(expr && mask);
  Float32Backward backward({.dtype = DType::kBF16}, *expr, {}, &*mask, {});
  const HeadGradients gold = backward.run(head.view());
  EXPECT_TRUE(gold.agree);
  for (std::size_t row = 0; row < 8; ++row) {
    for (std::size_t d = 0; d < 3; ++d) {
      const std::size_t at = row * 3 + d;
      if (row % 4 == 3) {
        EXPECT_EQ(gold.dq.value[at], 0.0);
        EXPECT_EQ(gold.dq.bound[at], 0.0);
      } else {
        EXPECT_EQ(std::isnan(gold.dq.value[at]), row % 4 == 1);
        EXPECT_LT(gold.dq.bound[at], kInfinity);
      }
    }
    EXPECT_EQ(gold.lse[row] == -kInfinity, row % 4 == 3);
  }
  for (std::size_t j = 0; j < 5; ++j) {
    for (std::size_t d = 0; d < 2; ++d) {
      EXPECT_EQ(std::isnan(gold.dv.value[j * 2 + d]), j != 4);
      EXPECT_LT(gold.dv.bound[j * 2 + d], kInfinity);
      if (j == 4) {
        EXPECT_EQ(gold.dv.value[j * 2 + d], 0.0);
        EXPECT_EQ(gold.dv.bound[j * 2 + d], 0.0);
      }
    }
  }
}

TEST(DslFloat32Backward, KeptElementsOfMinusInfinityContributeNothing) {
  std::mt19937_64 random(23);
  const Head head({.num_heads = 1, .seqlen_q = 3, .seqlen_kv = 4, .head_dim = 2, .head_dim_v = 2}, random, 0x1p-4);
  // The derivative there is NaN.
  const auto expr = test::bound("where(kv_idx == 1, log(score * 0), score)");
  const HeadGradients gold = Float32Backward({.dtype = DType::kF32}, *expr, {}, nullptr, {}).run(head.view());
  EXPECT_TRUE(gold.agree);
  for (const JudgedGradient* each : {&gold.dq, &gold.dk, &gold.dv}) {
    for (std::size_t i = 0; i < each->value.size(); ++i) {
      EXPECT_TRUE(std::isfinite(each->value[i]));
      EXPECT_LT(each->bound[i], 1e-4);
      if (each != &gold.dq && i / 2 == 1) {
        EXPECT_EQ(each->value[i], 0.0);
        EXPECT_EQ(each->bound[i], 0.0);
      }
    }
  }
}

// o and lse of more keys than the head has. `lse` of each row; o is 0.25.
struct GivenHead : Head {
  GivenHead(std::mt19937_64& random, std::vector<double> of_rows)
      : Head({.num_heads = 1,
              .seqlen_q = static_cast<std::int64_t>(of_rows.size()),
              .seqlen_kv = 5,
              .head_dim = 3,
              .head_dim_v = 2},
             random, 0x1p-4),
        o(2 * of_rows.size(), 0.25),
        lse(std::move(of_rows)) {}
  BackwardHead given_view() const {
    BackwardHead head = view();
    head.o = o;
    head.lse = lse;
    return head;
  }
  std::vector<double> o, lse;
};

// An lse that is given alone says what its row is; a score, what its element is.
TEST(DslFloat32Backward, AGivenLseDecidesItsRow) {
  constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
  std::mt19937_64 random(31);
  const GivenHead head(random, {3.0, kNan, kInfinity, -kInfinity, 3.0});
  const auto expr = test::bound("where(kv_idx == 3, -inf, score)");
  const auto mask = test::bound("kv_idx != 4", {}, ModKind::kMaskMod);
  ASSERT_TRUE(expr && mask);
  const auto run = [&](const BackwardHead& view) {
    return Float32Backward({.dtype = DType::kBF16}, *expr, {}, &*mask, {}).run(view);
  };
  const HeadGradients gold = run(head.given_view());
  for (std::size_t at = 0; at < gold.dq.value.size(); ++at) {
    const std::size_t row = at / 3;
    EXPECT_EQ(std::isnan(gold.dq.value[at]), row == 1 || row == 2) << at;
    EXPECT_EQ(gold.dq.bound[at] == kInfinity, row == 2) << at;
    if (row == 3) {
      EXPECT_EQ(gold.dq.value[at], 0.0);
      EXPECT_EQ(gold.dq.bound[at], 0.0);
    }
  }
  for (std::size_t row = 0; row < 5; ++row) EXPECT_EQ(gold.decided[row], row != 2) << row;
  // Without the row of +infinity the NaN of the other is what a column has to have, but one that is dropped.
  GivenHead without = head;
  without.lse[2] = 3.0;
  const HeadGradients columns = run(without.given_view());
  for (const JudgedGradient* each : {&columns.dk, &columns.dv}) {
    const std::size_t features = each == &columns.dk ? 3 : 2;
    for (std::size_t at = 0; at < each->value.size(); ++at) {
      EXPECT_EQ(std::isnan(each->value[at]), at / features < 3) << at;
      EXPECT_LT(each->bound[at], kInfinity) << at;
    }
  }
}

// No forward gives these: what is computed from the two is not known, but of that element.
TEST(DslFloat32Backward, AGivenLseMayContradictAScore) {
  std::mt19937_64 random(32);
  for (const char* const score : {"nan", "inf"}) {
    const GivenHead head(random, {3.0, -kInfinity, 3.0});
    const auto expr =
        test::bound(std::string("where(q_idx < 2 and kv_idx == 1, ") + score + " * (1 + 0 * score), score)");
    ASSERT_TRUE(expr);
    const HeadGradients gold = Float32Backward({.dtype = DType::kF32}, *expr, {}, nullptr, {}).run(head.given_view());
    for (std::size_t at = 0; at < gold.dv.value.size(); ++at) {
      EXPECT_EQ(gold.dv.bound[at] == kInfinity, at / 2 == 1) << score << ' ' << at;
    }
    for (std::size_t row = 0; row < 3; ++row) EXPECT_EQ(gold.decided[row], row == 2) << score << ' ' << row;
  }
}

// What the part's keys alone would leave open lse does not: each element is within its own jump.
TEST(DslFloat32Backward, JumpsOfAPartAreBoundedByItsElements) {
  std::mt19937_64 random(33);
  GivenHead head(random, {0.0, 0.0, 0.0});
  for (double& value : head.q) value = 1.0;
  for (std::size_t at = 0; at < head.k.size(); ++at) head.k[at] = at % 3 == 0 ? 1.0 : 0.0;
  // A score of 1 and a jump of 2 below or at 3.
  head.lse = {3.0 + std::log(5.0), 20.0, 20.0};
  const auto expr = test::bound("where(score >= 1, score + 2, score)");
  ASSERT_TRUE(expr);
  const auto run = [&](const BackwardHead& view) {
    return Float32Backward({.dtype = DType::kF32}, *expr, {}, nullptr, {}).run(view);
  };
  EXPECT_EQ(std::ranges::count(run(head.view()).decided, 0), 3);
  const HeadGradients gold = run(head.given_view());
  EXPECT_EQ(std::ranges::count(gold.decided, 0), 0);
  for (std::size_t at = 0; at < gold.dq.bound.size(); ++at) {
    EXPECT_LT(gold.dq.bound[at], at / 3 == 0 ? 100.0 : 1e-4) << at;
    EXPECT_GT(gold.dq.bound[at], 0.0) << at;
  }
}

// ---- What may not be finite has no bound, times 0 or not.

// Whether no element has a bound where `is_open(row, feature)`, and every one elsewhere.
template <typename IsOpen>
void expect_open(const JudgedGradient& gradient, std::size_t features, IsOpen&& is_open, std::string_view what) {
  for (std::size_t at = 0; at < gradient.bound.size(); ++at) {
    const bool open = is_open(at / features, at % features);
    EXPECT_EQ(gradient.bound[at] == kInfinity, open) << what << ' ' << at << ' ' << gradient.bound[at];
    if (!open) EXPECT_LT(gradient.bound[at], kInfinity) << what << ' ' << at;
  }
}

// A dS beyond float16's range is infinite in float16 only.
TEST(DslFloat32Backward, ADsThatOverflowsIsNotNothingTimesZero) {
  std::mt19937_64 random(41);
  Head head({.num_heads = 1, .seqlen_q = 3, .seqlen_kv = 4, .head_dim = 3, .head_dim_v = 2}, random, 0x1p-4);
  for (std::vector<double>* const of : {&head.q, &head.k}) {
    for (std::size_t at = 0; at < of->size(); at += 3) (*of)[at] = 0.0;
  }
  const auto expr = test::bound("score * 10000000");
  ASSERT_TRUE(expr);
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const HeadGradients gold =
        Float32Backward({.dtype = dtype, .scale = 1e-7}, *expr, {}, nullptr, {}).run(head.view());
    for (const JudgedGradient* each : {&gold.dq, &gold.dk}) {
      expect_open(*each, 3, [&](std::size_t, std::size_t) { return dtype == DType::kF16; }, dtype_name(dtype));
    }
    expect_open(gold.dv, 2, [](std::size_t, std::size_t) { return false; }, dtype_name(dtype));
  }
}

// A row of lse = +infinity may be NaN.
TEST(DslFloat32Backward, ARowThatMayBeNanIsNotNothingTimesZero) {
  std::mt19937_64 random(42);
  GivenHead head(random, {3.0, kInfinity, 3.0});
  for (std::size_t d = 0; d < 3; ++d) head.q[3 + d] = 0.0;
  for (std::size_t j = 0; j < 5; ++j) head.k[3 * j] = 0.0;
  head.grad_out[2] = 0.0;
  const auto expr = test::bound("score");
  const auto mask = test::bound("kv_idx != 4", {}, ModKind::kMaskMod);
  ASSERT_TRUE(expr && mask);
  const HeadGradients gold = Float32Backward({.dtype = DType::kF32}, *expr, {}, &*mask, {}).run(head.given_view());
  expect_open(gold.dq, 3, [](std::size_t row, std::size_t) { return row == 1; }, "dq");
  expect_open(gold.dk, 3, [](std::size_t key, std::size_t) { return key != 4; }, "dk");
  expect_open(gold.dv, 2, [](std::size_t key, std::size_t) { return key != 4; }, "dv");
}

// A forward of its own may have normalised a row otherwise: P is anything, but a number.
TEST(DslFloat32Backward, AnUndecidedPIsNothingTimesZero) {
  std::mt19937_64 random(43);
  Head head({.num_heads = 1, .seqlen_q = 3, .seqlen_kv = 4, .head_dim = 2, .head_dim_v = 2}, random, 0x1p-4);
  for (std::size_t j = 0; j < 4; ++j) head.k[2 * j] = j == 3 ? 0.5 : 0.0, head.k[2 * j + 1] = 0.0;
  for (std::size_t i = 0; i < 3; ++i) head.q[2 * i] = i == 1 ? 1.0 : 0.25;
  head.grad_out[2] = 0.0;
  const auto run = [&](const char* text) {
    const auto expr = test::bound(text);
    EXPECT_TRUE(expr) << text;
    return Float32Backward({.dtype = DType::kF16, .own_forward = true}, *expr, {}, nullptr, {}).run(head.view());
  };
  const HeadGradients gold = run("where(score >= 0.5, score + 2, score)");
  EXPECT_EQ(gold.decided[1], 0);
  expect_open(gold.dv, 2, [](std::size_t, std::size_t d) { return d == 1; }, "dv");
  // Of a score that may exceed the others by more than float16 holds, or that may be anything, it is no number.
  expect_open(
      run("where(score >= 0.5, score + 20, score)").dv, 2,
      [](std::size_t key, std::size_t d) { return d == 1 || key == 3; }, "far");
  expect_open(
      run("where(score >= 0.5, -inf, score)").dv, 2, [](std::size_t key, std::size_t d) { return d == 1 || key == 3; },
      "dropped");
}

// P = 0 times what is not finite, unless the mask dropped it.
TEST(DslFloat32Backward, AnInfiniteDeltaOrDpReachesElementsOfMinusInfinity) {
  std::mt19937_64 random(44);
  const float infinite = std::numeric_limits<float>::infinity();
  const test::Captures captures = {{"t", test::captured<float>(DType::kF32, {5}, {0, -infinite, 0, 0, -infinite})}};
  const auto expr = test::bound("score + t[kv_idx]", captures);
  const auto mask = test::bound("kv_idx != 4", {}, ModKind::kMaskMod);
  ASSERT_TRUE(expr && mask);
  const GivenHead usual(random, {3.0, 3.0, -kInfinity});
  // Which keys of the first row are open to anything.
  const auto expect = [&](const GivenHead& head, const char* what, auto&& is_open) {
    Float32Backward backward({.dtype = DType::kF32, .captures = 1}, *expr, test::views(*expr, captures), &*mask, {});
    const HeadGradients gold = backward.run(head.given_view());
    bool any = false;
    for (std::size_t key = 0; key < 5; ++key) any = any || is_open(key);
    expect_open(gold.dq, 3, [&](std::size_t row, std::size_t) { return any && row == 0; }, what);
    expect_open(gold.dk, 3, [&](std::size_t key, std::size_t) { return is_open(key); }, what);
    expect_open(gold.dv, 2, [](std::size_t, std::size_t) { return false; }, what);
    expect_open(backward.captured(0), 1, [&](std::size_t key, std::size_t) { return is_open(key); }, what);
    for (const std::size_t key : {1, 4}) {
      EXPECT_EQ(gold.dv.bound[2 * key], 0.0) << what;
      if (!is_open(key)) EXPECT_EQ(gold.dk.bound[3 * key], 0.0) << what;
    }
  };
  expect(usual, "finite", [](std::size_t) { return false; });
  for (const double value : {kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
    GivenHead head = usual;
    head.o[0] = value;
    expect(head, "o", [](std::size_t key) { return key != 4; });
    // Nothing is done in a row of lse = -infinity.
    head = usual;
    head.o[4] = value;
    expect(head, "o of an empty row", [](std::size_t) { return false; });
  }
  GivenHead head = usual;
  head.lse[1] = -kInfinity;
  head.v[2 * 1] = head.v[2 * 4] = kInfinity;
  expect(head, "v", [](std::size_t key) { return key == 1; });
}

// exp(-infinity - lse) is 0 for an lse of +infinity, too: only kept elements of other scores have no bound.
TEST(DslFloat32Backward, AnLseOfInfinityLeavesElementsOfMinusInfinityAtZero) {
  std::mt19937_64 random(48);
  const float infinite = std::numeric_limits<float>::infinity();
  const test::Captures captures = {{"t", test::captured<float>(DType::kF32, {5}, {0, -infinite, 0, 0, -infinite})}};
  const auto expr = test::bound("where(q_idx == 1, t[1], score + t[kv_idx])", captures);
  ASSERT_TRUE(expr);
  GivenHead head(random, {kInfinity, kInfinity, 3.0});
  const auto expect = [&](const char* what, auto&& is_open) {
    Float32Backward backward({.dtype = DType::kF32, .captures = 1}, *expr, test::views(*expr, captures), nullptr, {});
    const HeadGradients gold = backward.run(head.given_view());
    // Of row 1 every P is 0.
    for (std::size_t row = 0; row < 3; ++row) EXPECT_EQ(gold.decided[row], row != 0) << what;
    expect_open(gold.dv, 2, [](std::size_t key, std::size_t) { return key % 3 != 1; }, what);
    expect_open(gold.dk, 3, [&](std::size_t key, std::size_t) { return is_open(key); }, what);
    expect_open(backward.captured(0), 1, [&](std::size_t key, std::size_t) { return is_open(key); }, what);
    for (const std::size_t key : {1, 4}) EXPECT_EQ(gold.dv.bound[2 * key], 0.0) << what;
  };
  expect("finite", [](std::size_t key) { return key % 3 != 1; });
  head.o[0] = kInfinity;
  expect("o", [](std::size_t) { return true; });
  // Of an lse of NaN it is NaN.
  head.lse[0] = std::numeric_limits<double>::quiet_NaN();
  Float32Backward backward({.dtype = DType::kF32, .captures = 1}, *expr, test::views(*expr, captures), nullptr, {});
  const HeadGradients gold = backward.run(head.given_view());
  EXPECT_EQ(gold.decided[0], 0);
  expect_open(gold.dv, 2, [](std::size_t key, std::size_t) { return key % 3 == 1; }, "NaN");
}

// What a forward of its own leaves open makes delta no number, be grad_out 0 there.
TEST(DslFloat32Backward, AnUnspecifiedOIsNotNothingTimesZero) {
  std::mt19937_64 random(49);
  const float infinite = std::numeric_limits<float>::infinity();
  const test::Captures captures = {{"t", test::captured<float>(DType::kF32, {5}, {0, -infinite, 0, 0, 0})}};
  const auto expr = test::bound("score + t[kv_idx]", captures);
  const auto mask = test::bound("q_idx != 2 and kv_idx != 4", {}, ModKind::kMaskMod);
  ASSERT_TRUE(expr && mask);
  Head head({.num_heads = 1, .seqlen_q = 3, .seqlen_kv = 5, .head_dim = 3, .head_dim_v = 2}, random, 0x1p-4);
  for (std::size_t row = 0; row < 3; ++row) head.grad_out[2 * row] = 0.0;
  const auto expect = [&](bool own_forward, bool is_open, const std::string& what) {
    Float32Backward backward({.dtype = DType::kBF16, .own_forward = own_forward, .captures = 1}, *expr,
                             test::views(*expr, captures), &*mask, {});
    const HeadGradients gold = backward.run(head.view());
    const auto key_is_open = [&](std::size_t key, std::size_t) { return is_open && key != 4; };
    expect_open(gold.dq, 3, [&](std::size_t row, std::size_t) { return is_open && row != 2; }, what + " dq");
    expect_open(gold.dk, 3, key_is_open, what + " dk");
    expect_open(gold.dv, 2, [](std::size_t, std::size_t) { return false; }, what + " dv");
    expect_open(backward.captured(0), 1, key_is_open, what + " t");
  };
  expect(true, false, "finite");
  for (const double value : {kInfinity, std::numeric_limits<double>::quiet_NaN()}) {
    // At a key that every row drops: a tile's product is 0 times it.
    head.v[2 * 4] = value;
    expect(true, true, std::to_string(value));
    expect(false, false, std::to_string(value) + " given gold");
  }
}

// Nor is an o that may be past its type's range.
TEST(DslFloat32Backward, AnOThatMayOverflowIsNotNothingTimesZero) {
  std::mt19937_64 random(50);
  Head head({.num_heads = 1, .seqlen_q = 2, .seqlen_kv = 4, .head_dim = 3, .head_dim_v = 2}, random, 0x1p-4);
  for (std::size_t key = 0; key < 4; ++key) head.v[2 * key] = 65504.0;
  for (std::size_t row = 0; row < 2; ++row) head.grad_out[2 * row] = 0.0;
  const auto expr = test::bound("score");
  ASSERT_TRUE(expr);
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kF32}) {
    const HeadGradients gold =
        Float32Backward({.dtype = dtype, .own_forward = true}, *expr, {}, nullptr, {}).run(head.view());
    for (const JudgedGradient* each : {&gold.dq, &gold.dk}) {
      expect_open(*each, 3, [&](std::size_t, std::size_t) { return dtype == DType::kF16; }, dtype_name(dtype));
    }
    expect_open(gold.dv, 2, [](std::size_t, std::size_t) { return false; }, dtype_name(dtype));
  }
}

// In a row that float32 does not decide o is some number, unless a value is none or a score may be none.
TEST(DslFloat32Backward, AnUndecidedRowIsOfNumbersWhereItsValuesAndScoresAre) {
  std::mt19937_64 random(51);
  const float infinite = std::numeric_limits<float>::infinity();
  const test::Captures captures = {{"t", test::captured<float>(DType::kF32, {4}, {0, 0, -infinite, 0})}};
  const auto mask = test::bound("kv_idx != 3", {}, ModKind::kMaskMod);
  ASSERT_TRUE(mask);
  Head head({.num_heads = 1, .seqlen_q = 1, .seqlen_kv = 4, .head_dim = 2, .head_dim_v = 2}, random, 0x1p-4);
  head.q = {1.0, 0.0};
  for (std::size_t key = 0; key < 4; ++key) head.k[2 * key] = key == 1 ? 0.5 : 0.0;
  head.grad_out = {0.0, 0.0};
  head.grad_lse = {0.0};
  const auto expect = [&](const char* text, bool p_is_open, bool ds_is_open, DType dtype = DType::kF32) {
    const auto expr = test::bound(text, captures);
    ASSERT_TRUE(expr) << text;
    const BackwardOptions options{.dtype = dtype, .own_forward = true};
    const HeadGradients gold =
        Float32Backward(options, *expr, test::views(*expr, captures), &*mask, {}).run(head.view());
    EXPECT_EQ(gold.decided[0], 0) << text;
    expect_open(gold.dv, 2, [&](std::size_t key, std::size_t) { return p_is_open && key != 3; }, text);
    expect_open(gold.dk, 2, [&](std::size_t key, std::size_t) { return ds_is_open && key != 3; }, text);
  };
  constexpr const char* kJump = "where(score >= 0.5, score + 2, score) + t[kv_idx]";
  expect(kJump, false, false);
  expect("where(score > 0.5, nan * score, score) + t[kv_idx]", true, true);
  expect("where(score > 0.5, inf * score, score) + t[kv_idx]", true, true);
  expect("where(score > 0.5, nan * score, where(kv_idx == 1, -inf, score + t[kv_idx]))", true, true);
  head.v[2 * 3] = std::numeric_limits<double>::quiet_NaN();
  expect(kJump, false, true);
  // A mean of values that float16 just holds may be rounded beyond it.
  head.v[2 * 3] = 0.0;
  expect(kJump, false, false, DType::kF16);
  head.v[2 * 0] = 65504.0;
  expect(kJump, false, false);
  expect(kJump, false, true, DType::kF16);
}

// An lse that is far below a score is of no forward: float32 has no P for it, nor has float16 for one less far.
TEST(DslFloat32Backward, AGivenLseFarBelowAScoreLeavesItNoBound) {
  struct FarCase {
    double lse;
    DType dtype;
    bool open;
  };
  for (const FarCase& each : std::initializer_list<FarCase>{{-1000.0, DType::kF32, true},
                                                            {-1000.0, DType::kBF16, true},
                                                            {-100.0, DType::kF32, true},
                                                            {-60.0, DType::kF32, false},
                                                            {-60.0, DType::kBF16, false},
                                                            {-20.0, DType::kF16, true},
                                                            {-20.0, DType::kBF16, false},
                                                            {-4.0, DType::kF16, false}}) {
    const std::string what = std::string(dtype_name(each.dtype)) + ' ' + std::to_string(each.lse);
    std::mt19937_64 random(45);
    GivenHead head(random, {3.0, each.lse, 3.0});
    head.grad_out[2] = head.q[3] = 0.0;
    for (std::size_t j = 0; j < 5; ++j) head.k[3 * j] = 0.0;
    const auto expr = test::bound("0.125 * score");
    ASSERT_TRUE(expr);
    const HeadGradients gold = Float32Backward({.dtype = each.dtype}, *expr, {}, nullptr, {}).run(head.given_view());
    for (std::size_t row = 0; row < 3; ++row) EXPECT_EQ(gold.decided[row], !(each.open && row == 1)) << what;
    expect_open(gold.dq, 3, [&](std::size_t row, std::size_t) { return each.open && row == 1; }, what);
    expect_open(gold.dk, 3, [&](std::size_t, std::size_t) { return each.open; }, what);
    expect_open(gold.dv, 2, [&](std::size_t, std::size_t) { return each.open; }, what);
  }
  // A P that float32 holds, and a product with it that it does not, though dS would be in range again.
  std::mt19937_64 random(46);
  GivenHead head(random, {3.0, -87.0, 3.0});
  for (std::size_t d = 2; d < 4; ++d) head.grad_out[d] = 1024.0;
  const auto expr = test::bound("0.0001 * score");
  ASSERT_TRUE(expr);
  const HeadGradients gold = Float32Backward({.dtype = DType::kF32}, *expr, {}, nullptr, {}).run(head.given_view());
  expect_open(gold.dq, 3, [](std::size_t row, std::size_t) { return row == 1; }, "dm");
  // Nor does nothing that flows into the row make a number of an infinite P.
  head.lse[1] = -100.0;
  head.grad_out[2] = head.grad_out[3] = head.grad_lse[1] = 0.0;
  const HeadGradients still = Float32Backward({.dtype = DType::kF32}, *expr, {}, nullptr, {}).run(head.given_view());
  expect_open(still.dq, 3, [](std::size_t row, std::size_t) { return row == 1; }, "dq");
  expect_open(still.dv, 2, [](std::size_t, std::size_t) { return true; }, "dv");
}

// An element that its score may keep or drop has a P without a bound: its row is counted, and no other.
TEST(DslFloat32Backward, RowsOfAPartWithAPWithoutBoundAreCounted) {
  std::mt19937_64 random(47);
  GivenHead head(random, {3.0, 3.0, 3.0});
  for (std::size_t at = 0; at < head.q.size(); ++at) head.q[at] = at == 3 ? 1.0 : at % 3 == 0 ? 0.5 : 0.0;
  for (std::size_t j = 0; j < 5; ++j) head.k[3 * j] = j == 2 ? 1.0 : 0.0;
  const auto expr = test::bound("where(score >= 1, -inf, score)");
  ASSERT_TRUE(expr);
  const HeadGradients gold = Float32Backward({.dtype = DType::kF32}, *expr, {}, nullptr, {}).run(head.given_view());
  for (std::size_t row = 0; row < 3; ++row) EXPECT_EQ(gold.decided[row], row != 1) << row;
  expect_open(gold.dv, 2, [](std::size_t key, std::size_t) { return key == 2; }, "dv");
}

// A tile multiplies what stands at dropped positions by 0: unspecified where that is not finite, and only there.
TEST(DslFloat32Backward, InfiniteInputsSpoilTheirFeaturesOnly) {
  std::mt19937_64 random(22);
  Head head({.num_heads = 1, .seqlen_q = 4, .seqlen_kv = 5, .head_dim = 3, .head_dim_v = 2}, random, 0x1p-4);
  head.k[4 * 3 + 1] = std::numeric_limits<double>::quiet_NaN();
  head.v[4 * 2] = kInfinity;
  const auto expr = test::bound("where(kv_idx < 4, score, -inf)");
  Float32Backward backward({.dtype = DType::kF16}, *expr, {}, nullptr, {});
  const HeadGradients gold = backward.run(head.view());
  for (std::size_t i = 0; i < gold.dq.value.size(); ++i) {
    EXPECT_TRUE(std::isfinite(gold.dq.value[i]));
    EXPECT_EQ(gold.dq.bound[i] == kInfinity, i % 3 == 1);
  }
  for (const JudgedGradient* each : {&gold.dk, &gold.dv}) {
    for (std::size_t i = 0; i < each->value.size(); ++i) {
      EXPECT_TRUE(std::isfinite(each->value[i]));
      EXPECT_LT(each->bound[i], kInfinity);
    }
  }
}

}  // namespace
}  // namespace attnjit::dsl
