// The C++ spelling: a lambda's text parses to the tree that the equivalent text gives.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "attnjit/expr.hpp"
#include "dsl/functions.h"
#include "dsl/parser.h"
#include "dsl/printer.h"

namespace attnjit::dsl {
namespace {

// The text of a lambda, after checking that it means the same as `equivalent`.
template <typename Mod>
void expect_means(const Mod& mod, std::string_view equivalent, ModKind kind = ModKind::kScoreMod) {
  const auto traced = parse(mod.text(), kind);
  ASSERT_TRUE(traced) << format_error(traced.error(), mod.text());
  const auto written = parse(equivalent, kind);
  ASSERT_TRUE(written) << format_error(written.error(), equivalent);
  EXPECT_TRUE(same_structure(*traced, *written)) << mod.text() << "\n" << equivalent;
  EXPECT_EQ(mod.text(), print(*traced));
}

TEST(DslFrontEnd, WritesTheTextOfALambda) {
  const auto causal = score_mod(
      [](auto score, auto b, auto h, auto q_idx, auto kv_idx) { return where(q_idx >= kv_idx, score, -attnjit::inf); });
  EXPECT_EQ(causal.text(), "where(q_idx >= kv_idx, score, -inf)");
  const auto window = mask_mod([](auto b, auto h, auto q_idx, auto kv_idx) {
    return q_idx >= kv_idx && (q_idx - kv_idx <= 128 || kv_idx == 0);
  });
  EXPECT_EQ(window.text(), "q_idx >= kv_idx and (q_idx - kv_idx <= 128 or kv_idx == 0)");
  EXPECT_EQ(score_mod([](auto score, auto, auto, auto, auto) { return score; }).text(), "score");
  EXPECT_EQ(mask_mod([](auto, auto, auto, auto) { return true; }).text(), "true");
}

TEST(DslFrontEnd, KeepsPrecedence) {
  const auto check = [](auto lambda, std::string_view text) { expect_means(score_mod(lambda), text); };
  check([](auto s, auto b, auto h, auto q, auto k) { return s - (b - h) * 2 + -q / (k + 1); },
        "score - (b - h) * 2 + -q_idx / (kv_idx + 1)");
  check([](auto s, auto b, auto h, auto q, auto k) { return pow(-s, 2) - pow(2, pow(s, -1)) - -pow(s, 2); },
        "(-score) ** 2 - 2 ** score ** -1 - -score ** 2");
  check([](auto s, auto b, auto h, auto q, auto k) { return floordiv(q, k + 1) % 3 + floordiv(q * k, 2); },
        "q_idx // (kv_idx + 1) % 3 + q_idx * kv_idx // 2");
  check([](auto s, auto b, auto h, auto q, auto k) { return where(!(h > 1 && b > 1) || !(h == 1), s, +b); },
        "where(not (h > 1 and b > 1) or not h == 1, score, b)");
  check([](auto s, auto b, auto h, auto q, auto k) { return (q & 7) | ~(k & (h | 1)); },
        "q_idx & 7 | ~(kv_idx & (h | 1))");
  check([](auto s, auto b, auto h, auto q, auto k) { return where((q < k) == (b != h), 1, 2.5); },
        "where((q_idx < kv_idx) == (b != h), 1, 2.5)");
  check([](auto s, auto b, auto h, auto q, auto k) { return where((q <= k) & (k > 5), 1 - s, 2 / s); },
        "where((q_idx <= kv_idx) & (kv_idx > 5), 1 - score, 2 / score)");
}

TEST(DslFrontEnd, WritesLiterals) {
  const auto text = [](auto literal) {
    return score_mod([&](auto, auto, auto, auto, auto) { return Value(literal); }).text();
  };
  EXPECT_EQ(text(2), "2");
  EXPECT_EQ(text(-2), "-2");
  EXPECT_EQ(text(2.0), "2.0");
  EXPECT_EQ(text(0.1), "0.1");
  EXPECT_EQ(text(0.1f), "0.1");
  EXPECT_EQ(text(-1.5e-20), "-1.5e-20");
  EXPECT_EQ(text(1e22), "1e+22");
  EXPECT_EQ(text(-0.0), "-0.0");
  EXPECT_EQ(text(-attnjit::inf), "-inf");
  EXPECT_EQ(text(attnjit::nan), "nan");
  EXPECT_EQ(text(false), "false");
  EXPECT_EQ(text(std::int8_t{-7}), "-7");
  EXPECT_EQ(text(std::uint64_t{7}), "7");
  EXPECT_EQ(text(std::numeric_limits<std::int64_t>::min()), "-9223372036854775808");
  EXPECT_TRUE(parse(text(std::numeric_limits<std::int64_t>::min())));
  EXPECT_FALSE(parse(text(std::numeric_limits<std::uint64_t>::max())));
}

TEST(DslFrontEnd, ReadsCapturedValues) {
  const auto bias = captured("bias");
  const auto slopes = captured("slopes");
  const auto k = captured("k");
  expect_means(score_mod([&](auto score, auto b, auto h, auto q_idx, auto kv_idx) {
                 return score * k + bias(b, h, q_idx - kv_idx + 127) - slopes[h] * 2.5f;
               }),
               "score * k + bias[b, h, q_idx - kv_idx + 127] - slopes[h] * 2.5");
  // A tensor may have a name that means something else without brackets; a scalar may not.
  expect_means(score_mod([](auto score, auto, auto h, auto, auto) { return score * captured("sin")[h]; }),
               "score * sin[h]");
}

TEST(DslFrontEnd, RefusesNamesThatTextCannotRead) {
  const auto scalar = [](const std::string& name) {
    return score_mod([&](auto score, auto, auto, auto, auto) { return score * captured(name); });
  };
  EXPECT_THROW(scalar("two words"), std::invalid_argument);
  EXPECT_THROW(scalar(""), std::invalid_argument);
  EXPECT_THROW(scalar("1st"), std::invalid_argument);
  for (const char* name : {"score", "b", "h", "q_idx", "kv_idx", "m", "n", "token_q", "token_kv", "where", "and",
                           "lambda", "inf", "true"}) {
    EXPECT_THROW(scalar(name), std::invalid_argument) << name;
  }
  for (const FunctionInfo& function : functions()) {
    EXPECT_THROW(scalar(std::string(function.name)), std::invalid_argument) << function.name;
  }
  EXPECT_NO_THROW(scalar("slope"));
  // Whatever the header lets pass as a scalar is one in text.
  for (const std::string_view name : expression::kReserved) EXPECT_NE(name_kind(name), NameKind::kFree) << name;
  for (const std::string_view name : expression::kKeywords) EXPECT_EQ(name_kind(name), NameKind::kKeyword) << name;
}

TEST(DslFrontEnd, SharesValuesByLet) {
  const auto mod = score_mod([](auto score, auto b, auto h, auto q_idx, auto kv_idx) {
    auto x = q_idx - kv_idx;
    for (int i = 0; i < 100; ++i) x = x * x;
    return score + x;
  });
  EXPECT_LT(mod.text().size(), 4000u);
  EXPECT_TRUE(mod.text().starts_with("let t0 = q_idx - kv_idx; let t1 = t0 * t0; "));
  EXPECT_TRUE(parse(mod.text()));
  expect_means(score_mod([](auto score, auto, auto, auto, auto) {
                 auto s = score * captured("t0");
                 return tanh(s) + s;
               }),
               "let s = score * t0; tanh(s) + s");
  EXPECT_EQ(score_mod([](auto score, auto, auto h, auto, auto) {
              auto s = score + h;
              return s * s + registered("t0");
            }).text(),
            "let t1 = score + h; t1 * t1 + t0()");
  EXPECT_EQ(score_mod([](auto score, auto, auto h, auto, auto) { return score * h + h + score; }).text(),
            "score * h + h + score");
}

TEST(DslFrontEnd, WritesChainsOfAnyLength) {
  const auto chain = [](int length) {
    return score_mod([&](auto score, auto, auto h, auto, auto) {
      Value x = score;
      for (int i = 0; i < length; ++i) x = 1 - exp(x);
      return x;
    });
  };
  EXPECT_TRUE(parse(chain(1000).text()));
  EXPECT_FALSE(parse(chain(100000).text())) << "beyond the limits: an error, not a crash";
}

TEST(DslFrontEnd, KnowsEveryFunction) {
  const auto all = score_mod([](auto x, auto, auto, auto, auto) {
    const Value numbers = min(x, 1, 2) + max(x, 1, 2) + clamp(x, -1, 1) + abs(x) + exp(x) + exp2(x) + log(x) + log2(x) +
                          log1p(x) + sqrt(x) + rsqrt(x) + tanh(x) + sigmoid(x) + silu(x) + gelu(x) + relu(x) + erf(x) +
                          sin(x) + cos(x) + floor(x) + ceil(x) + round(x) + sign(x) + to_float(x) + to_int(x);
    return where(isinf(x) || isnan(x) || to_bool(x), numbers, 0);
  });
  const auto expr = parse(all.text());
  ASSERT_TRUE(expr) << format_error(expr.error(), all.text());
  std::set<Function> used;
  for (const Node& node : expr->nodes) {
    if (node.op == Op::kCall) used.insert(node.function);
  }
  EXPECT_EQ(used.size(), functions().size());
  expect_means(all,
               "where(isinf(score) or isnan(score) or bool(score), min(score, 1, 2) + max(score, 1, 2) + clamp(score, "
               "-1, 1) + abs(score) + exp(score) + exp2(score) + log(score) + log2(score) + log1p(score) + sqrt(score) "
               "+ rsqrt(score) + tanh(score) + sigmoid(score) + silu(score) + gelu(score) + relu(score) + erf(score) + "
               "sin(score) + cos(score) + floor(score) + ceil(score) + round(score) + sign(score) + float(score) + "
               "int(score), 0)");
}

TEST(DslFrontEnd, CallsRegisteredMods) {
  const auto mod = score_mod([](auto, auto, auto, auto, auto) {
    return where(registered("causal") && registered("document", captured("ids")), registered("softcap", 30),
                 -attnjit::inf);
  });
  EXPECT_EQ(mod.text(), "where(causal() and document(ids), softcap(30), -inf)");
  EXPECT_TRUE(same_structure(*parse(mod.text()), *parse("where(causal and document(ids), softcap(30), -inf)")));
}

// A traced value has no truth value in C++.
static_assert(!std::is_constructible_v<bool, Value>);

}  // namespace
}  // namespace attnjit::dsl
