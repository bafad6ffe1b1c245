// What expressions mean: arithmetic at its edges, functions, captured reads and dropped elements.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "dsl/interpreter.h"
#include "tests/support/expression_text.h"

namespace attnjit::dsl {
namespace {

using test::captured;
using test::Captures;
using test::evaluate;
using test::mask;
using test::value;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr Point kPoint{.score = 0.75, .b = 2, .h = 3, .q_idx = 10, .kv_idx = 7};

struct ValueCase {
  const char* text;
  double value;
};

void expect_values(std::initializer_list<ValueCase> cases) {
  for (const ValueCase& c : cases) {
    const double found = value(c.text, kPoint);
    if (std::isnan(c.value)) {
      EXPECT_TRUE(std::isnan(found)) << c.text << " is " << found;
    } else {
      EXPECT_DOUBLE_EQ(found, c.value) << c.text;
    }
  }
}

TEST(DslInterpreter, ComputesTheRegisteredMods) {
  expect_values({{"noop", 0.75},
                 {"rel", 3.75},
                 {"head_bias", 6.75},
                 {"softcap(2)", 2 * std::tanh(0.375)},
                 {"alibi_exp2(8)", 0.75 - 3 * std::exp2(-4)},
                 {"causal", 0.75},
                 {"sliding_window(3)", 0.75},
                 {"sliding_window(2)", -kInf},
                 {"prefix_lm(8)", 0.75}});
  EXPECT_EQ(value("prefix_lm(8)", {.score = 1, .q_idx = 0, .kv_idx = 7}), 1);
  EXPECT_EQ(value("prefix_lm(7)", {.score = 1, .q_idx = 0, .kv_idx = 7}), -kInf);
  EXPECT_TRUE(mask("causal and sliding_window(3)", kPoint));
  EXPECT_FALSE(mask("causal and sliding_window(2)", kPoint));
  EXPECT_FALSE(mask("causal", {.q_idx = 3, .kv_idx = 4}));
  EXPECT_TRUE(mask("causal", {.q_idx = 4, .kv_idx = 4}));
  const Captures captures = {{"alibi_slopes", captured<float>(DType::kF32, {4}, {1, 2, 3, 0.5f})},
                             {"docs", captured<std::int32_t>(DType::kInt32, {8}, {0, 0, 0, 1, 1, 1, 2, 2})}};
  EXPECT_EQ(value("alibi", kPoint, captures), 0.75 + 0.5 * -3);
  EXPECT_TRUE(mask("document(docs)", {.q_idx = 5, .kv_idx = 3}, captures));
  EXPECT_FALSE(mask("document(docs)", {.q_idx = 5, .kv_idx = 2}, captures));
}

TEST(DslInterpreter, DividesIntsTotally) {
  expect_values({{"7 // 2", 3},
                 {"-7 // 2", -4},
                 {"7 // -2", -4},
                 {"-7 // -2", 3},
                 {"7 // 0", 0},
                 {"7 % 3", 1},
                 {"-7 % 3", 2},
                 {"7 % -3", -2},
                 {"-7 % -3", -1},
                 {"7 % 0", 0},
                 {"-6 % 3", 0},
                 {"-9223372036854775808 // -1", -0x1p63},
                 {"-9223372036854775808 % -1", 0},
                 {"7 / 2", 3.5},
                 {"1 / 0", kInf},
                 {"0 / 0", NAN},
                 {"h // (b - 2)", 0},
                 {"h % (b - 2)", 0}});
}

TEST(DslInterpreter, DividesFloatsAsPython) {
  expect_values({{"7.5 // 2", 3},
                 {"-7.5 // 2", -4},
                 {"7.5 % 2", 1.5},
                 {"-7.5 % 2", 0.5},
                 {"7.5 % -2", -0.5},
                 {"1.0 // 0", kInf},
                 {"1.0 % 0", NAN},
                 {"-1 % inf", kInf},
                 {"1.0 // 0.1", 10}});
}

TEST(DslInterpreter, IntsWrapAndStayExact) {
  expect_values({{"9223372036854775807 + 1", -0x1p63},
                 {"-9223372036854775808 - 1", 0x1p63},
                 {"(9007199254740993 - 9007199254740992)", 1},
                 {"where(9007199254740993 == 9007199254740992, 1, 0)", 0}});
}

TEST(DslInterpreter, RaisesToPowers) {
  expect_values({{"h ** 2", 9},
                 {"2 ** 62 + 2 ** 62", -0x1p63},
                 {"3 ** 0", 1},
                 {"0 ** 0", 1},
                 {"2 ** -1", 0.5},
                 {"-2 ** 2", -4},
                 {"2.5 ** 2", 6.25},
                 {"(-8) ** (1 / 3)", NAN},
                 {"h ** b", 9},
                 {"where(3 ** 39 == 3 ** 39 + 1, 1, 0)", 0}});
}

TEST(DslInterpreter, FollowsPyTorchAtTheEdges) {
  expect_values({{"min(nan, 1)", NAN},
                 {"min(1, nan)", NAN},
                 {"max(nan, 1)", NAN},
                 {"max(1.0, nan)", NAN},
                 {"clamp(nan, 0, 1)", NAN},
                 {"clamp(1, nan, 2)", NAN},
                 {"clamp(1, 0, nan)", NAN},
                 {"clamp(5, 0, 1)", 1},
                 {"clamp(-5, 0, 1)", 0},
                 {"clamp(5, 3, 1)", 1},
                 {"round(0.5)", 0},
                 {"round(1.5)", 2},
                 {"round(2.5)", 2},
                 {"round(-2.5)", -2},
                 {"sign(0)", 0},
                 {"sign(0.0)", 0},
                 {"sign(-2.5)", -1},
                 {"sign(-3)", -1},
                 {"sign(nan)", NAN},
                 {"int(2.9)", 2},
                 {"int(-2.9)", -2},
                 {"int(nan)", 0},
                 {"int(inf)", 0x1p63},
                 {"int(-inf)", -0x1p63},
                 {"where(int(1e30) == 9223372036854775807, 1, 0)", 1},
                 {"float(7) / 2", 3.5},
                 {"where(bool(nan), 1, 2)", 1},
                 {"where(bool(0.0), 1, 2)", 2},
                 {"where(isnan(nan), 1, 2)", 1},
                 {"where(isinf(-inf), 1, 2)", 1},
                 {"where(isinf(nan), 1, 2)", 2},
                 {"where(nan == nan, 1, 2)", 2},
                 {"where(nan != nan, 1, 2)", 1},
                 {"abs(-3)", 3},
                 {"abs(-9223372036854775808)", -0x1p63},
                 {"relu(-2)", 0},
                 {"relu(-2.5)", 0},
                 {"relu(2.5)", 2.5},
                 {"relu(nan)", NAN},
                 {"exp(1)", std::exp(1)},
                 {"exp2(3)", 8},
                 {"log(8)", std::log(8)},
                 {"log2(8)", 3},
                 {"log(0)", -kInf},
                 {"log(-1)", NAN},
                 {"log1p(1e-20)", 1e-20},
                 {"sqrt(2)", std::sqrt(2)},
                 {"sqrt(-1)", NAN},
                 {"rsqrt(4)", 0.5},
                 {"rsqrt(0)", kInf},
                 {"tanh(0.5)", std::tanh(0.5)},
                 {"sigmoid(0)", 0.5},
                 {"sigmoid(-1000)", 0},
                 {"silu(2)", 2 / (1 + std::exp(-2))},
                 {"gelu(1)", 0.5 * (1 + std::erf(std::sqrt(0.5)))},
                 {"erf(0.5)", std::erf(0.5)},
                 {"sin(1)", std::sin(1)},
                 {"cos(1)", std::cos(1)},
                 {"floor(-1.5)", -2},
                 {"ceil(-1.5)", -1},
                 {"floor(7) // 2", 3},
                 {"min(3, 1, 2)", 1},
                 {"max(1, 3, 2.5)", 3}});
}

TEST(DslInterpreter, MixesTypes) {
  expect_values({{"true + true", 2},
                 {"-(h > 1)", -1},
                 {"(h > 1) * score", 0.75},
                 {"1 if h > 1 else 2.5", 1},
                 {"h & 6", 2},
                 {"h | 4", 7},
                 {"~h", -4},
                 {"where(~(h > 1), 1, 2)", 2},
                 {"where((h > 1) & (b > 5), 1, 2)", 2},
                 {"where((h > 1) | (b > 5), 1, 2)", 1},
                 {"where(h == 3.0, 1, 2)", 1},
                 {"where(true == 1, 1, 2)", 1},
                 {"where(0 < score < 1 < h, 1, 2)", 1},
                 {"where(not h < 3 and b >= 2, 1, 2)", 1}});
}

TEST(DslInterpreter, LiteralsStayFiniteAndApartFromZero) {
  using Limits = std::numeric_limits<float>;
  EXPECT_EQ(float32_literal(0.1), 0.1f);
  EXPECT_EQ(float32_literal(1e39), Limits::max());
  EXPECT_EQ(float32_literal(-1e39), -Limits::max());
  EXPECT_EQ(float32_literal(1e-300), Limits::denorm_min());
  EXPECT_EQ(float32_literal(-5e-324), -Limits::denorm_min());
  EXPECT_EQ(float32_literal(0.0), 0.0f);
  EXPECT_EQ(float32_literal(std::numeric_limits<double>::infinity()), Limits::infinity());
  EXPECT_TRUE(std::isnan(float32_literal(std::nan(""))));
}

TEST(DslInterpreter, ClampsCapturedReads) {
  const Captures captures = {{"t", captured<float>(DType::kF32, {2, 3}, {0, 1, 2, 10, 11, 12})}};
  EXPECT_EQ(value("t[1, 2]", {}, captures), 12);
  EXPECT_EQ(value("t[h, kv_idx]", kPoint, captures), 12);
  EXPECT_EQ(value("t[-1, -5]", {}, captures), 0);
  EXPECT_EQ(value("t[-9223372036854775808, 9223372036854775807]", {}, captures), 2);
  EXPECT_EQ(value("t[int(nan), int(inf)]", {}, captures), 2);
  EXPECT_EQ(value("t[h > 1, true]", kPoint, captures), 11);
}

TEST(DslInterpreter, WidensEveryDtype) {
  const Captures captures = {
      {"flag", captured<std::uint8_t>(DType::kBool, {}, {2})},
      {"i8", captured<std::int8_t>(DType::kInt8, {}, {-5})},
      {"u8", captured<std::uint8_t>(DType::kUInt8, {}, {251})},
      {"i16", captured<std::int16_t>(DType::kInt16, {}, {-300})},
      {"i32", captured<std::int32_t>(DType::kInt32, {}, {-70000})},
      {"i64", captured<std::int64_t>(DType::kInt64, {}, {std::int64_t{1} << 53})},
      {"f16", captured<std::uint16_t>(DType::kF16, {5}, {0x3555, 0x0001, 0xfc00, 0x7e00, 0xc000})},
      {"bf16", captured<std::uint16_t>(DType::kBF16, {2}, {0x3eab, 0xff80})},
      {"f32", captured<float>(DType::kF32, {}, {0.1f})}};
  EXPECT_EQ(value("flag + 0", {}, captures), 1);
  EXPECT_EQ(value("where(flag, 5, 6)", {}, captures), 5);
  EXPECT_EQ(value("i8", {}, captures), -5);
  EXPECT_EQ(value("u8", {}, captures), 251);
  EXPECT_EQ(value("i16", {}, captures), -300);
  EXPECT_EQ(value("i32", {}, captures), -70000);
  EXPECT_EQ(value("(i64 + 1) - i64", {}, captures), 1);
  EXPECT_EQ(value("f16[0]", {}, captures), 0.333251953125);
  EXPECT_EQ(value("f16[1]", {}, captures), std::ldexp(1.0, -24));
  EXPECT_EQ(value("f16[2]", {}, captures), -kInf);
  EXPECT_TRUE(std::isnan(value("f16[3]", {}, captures)));
  EXPECT_EQ(value("f16[4]", {}, captures), -2);
  EXPECT_EQ(value("bf16[0]", {}, captures), 0.333984375);
  EXPECT_EQ(value("bf16[1] * 2", {}, captures), -kInf);
  EXPECT_EQ(value("f32", {}, captures), static_cast<double>(0.1f));
}

// Each clamped index of the last evaluation as "name.dimension=index".
std::string clamped(const std::string& text, const Point& point) {
  const Captures captures = {{"t", captured<float>(DType::kF32, {4}, {1, 2, 3, 4})},
                             {"u", captured<float>(DType::kF32, {2, 3}, {1, 2, 3, 4, 5, 6})},
                             {"c", captured<float>(DType::kF32, {}, {7})}};
  const auto expr = test::bound(text, captures);
  if (!expr) return format_error(expr.error(), text);
  Interpreter interpreter(*expr, test::views(*expr, captures));
  interpreter.score_mod(point);
  std::string all;
  for (const ClampedIndex& each : interpreter.clamped_indices()) {
    all += (all.empty() ? "" : " ") + expr->captures[static_cast<std::size_t>(each.capture)].name + "." +
           std::to_string(each.dimension) + "=" + std::to_string(each.index);
  }
  return all;
}

TEST(DslInterpreter, ReportsClampedIndicesThatDecide) {
  const Point point = {.score = 1, .b = 0, .h = 1, .q_idx = 3, .kv_idx = 5};
  EXPECT_EQ(clamped("score + t[q_idx] + c", point), "");
  EXPECT_EQ(clamped("score + t[kv_idx]", point), "t.0=5");
  EXPECT_EQ(clamped("score + t[q_idx - kv_idx]", point), "t.0=-2");
  EXPECT_EQ(clamped("score + u[q_idx, -1]", point), "u.0=3 u.1=-1");
  // What a choice does not take, and what does not drop a dropped element.
  EXPECT_EQ(clamped("where(q_idx >= kv_idx, t[q_idx - kv_idx], score)", point), "");
  EXPECT_EQ(clamped("where(q_idx < kv_idx, t[q_idx - kv_idx], score)", point), "t.0=-2");
  EXPECT_EQ(clamped("where(t[kv_idx] > 0, score, -inf)", point), "t.0=5");
  EXPECT_EQ(clamped("where(t[kv_idx] < 0, score, -inf)", point), "t.0=5");
  EXPECT_EQ(clamped("causal + t[kv_idx]", point), "t.0=5");
  EXPECT_EQ(clamped("where(causal, score, -inf) + t[kv_idx]", point), "");
  EXPECT_EQ(clamped("t[kv_idx] - where(causal, score, -inf)", point), "t.0=5");
  EXPECT_EQ(clamped("let x = t[kv_idx]; where(causal, x, score * x)", point), "t.0=5");
}

struct KeepCase {
  const char* text;
  bool keep;
};

TEST(DslInterpreter, DropsElementsByTheRule) {
  const KeepCase cases[] = {
      {"-inf", false},
      {"score", true},
      {"where(false, score, -inf)", false},
      {"where(true, score, -inf)", true},
      {"where(true, -inf, score)", false},
      {"where(false, score, -inf) + nan", false},
      {"inf + where(false, score, -inf)", false},
      {"score + where(false, 0, -inf)", false},
      {"where(false, score, -inf) - inf", false},
      {"score - where(false, score, -inf)", true},
      {"2 * where(false, score, -inf)", false},
      {"where(false, score, -inf) * 0.5", false},
      {"0 * where(false, score, -inf)", true},
      {"-2 * where(false, score, -inf)", true},
      {"h * where(false, score, -inf)", true},
      {"where(false, score, -inf) / 2", true},
      {"min(score, where(false, 0, -inf))", false},
      {"min(where(false, 0, -inf), score, 1)", false},
      {"max(score, where(false, 0, -inf))", true},
      {"tanh(where(false, score, -inf))", true},
      {"-where(false, score, -inf)", true},
      {"-(-inf)", true},
      {"log(0)", true},
      {"score + log(0)", true},
      {"where(true, where(false, 1, -inf), 5)", false},
      {"let x = where(false, score, -inf); x + x", false},
      {"score - inf", true},
  };
  for (const KeepCase& c : cases) {
    const Element element = evaluate(c.text, kPoint);
    EXPECT_EQ(element.keep, c.keep) << c.text;
    if (!c.keep) {
      EXPECT_EQ(element.value, -kInf) << c.text;
    }
  }
}

TEST(DslInterpreter, SharedValuesCostNothingExtra) {
  std::string text = "let x0 = score + where(h > 1, 0, -inf); ";
  for (int i = 1; i < 1000; ++i) {
    const std::string last = "x" + std::to_string(i - 1);
    text.append("let x" + std::to_string(i)).append(" = min(" + last).append(", " + last).append("); ");
  }
  EXPECT_EQ(value(text + "x999", kPoint), 0.75);
  EXPECT_FALSE(evaluate(text + "x999", {.h = 1}).keep);
}

}  // namespace
}  // namespace attnjit::dsl
