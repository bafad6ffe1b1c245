// Bounds of modified scores, against the interpreter and what is compiled.
#include <gmock/gmock.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <random>

#include "compiler/cuda_mod.h"
#include "compiler/frontend.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::vector<Tensor> tensors() {
  const auto infinity = std::numeric_limits<float>::infinity();
  return {Tensor::of<float>("t", DType::kF32, {4}, {1e30f, -infinity, 0.5f, std::nanf("")}),
          Tensor::of<float>("c", DType::kF32, {}, {-7.5f}),
          Tensor::of<std::int64_t>("n", DType::kInt64, {3}, {std::numeric_limits<std::int64_t>::max(), -4, 9})};
}

std::optional<ScoreBounds> bounds_of(const std::string& text) {
  const auto facts = analyze(Mod(text, tensors()).problem);
  EXPECT_FALSE(facts.error) << (facts.error ? facts.error->message : "");
  return facts.value.score_bounds;
}

// Of an expression that has some.
ScoreBounds known_bounds_of(const std::string& text) {
  const std::optional<ScoreBounds> bounds = bounds_of(text);
  EXPECT_TRUE(bounds) << text;
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  return bounds.value_or(ScoreBounds{kNan, kNan});
}

TEST(CompilerScoreBounds, OfLiterals) {
  struct Expected {
    const char* text;
    float low, high;
  };
  for (const auto& [text, low, high] : std::vector<Expected>{
           {"softcap(30)", -30, 30},
           {"20 * tanh(score * c) + 1", -19, 21},
           {"clamp(score, -8, 9)", -8, 9},
           {"min(max(score + t[h], -2), 5)", -2, 5},
           {"sigmoid(score)", 0, 1},
           {"-3 * sigmoid(score + c)", -3, 0},
           {"sin(score) + cos(score)", -2, 2},
           {"where(score > 0, softcap(4), erf(score))", -4, 4},
           {"softcap(30) + clamp(q_idx - kv_idx, -5, 5)", -35, 35},
           {"softcap(2) * softcap(2)", 0, 4},
           {"abs(clamp(score, -3, 2)) - (n[h] % 4)", -3, 3},
           {"max(where(score > 1, 1, score), -1)", -1, 1},
           {"where(q_idx >= kv_idx, softcap(30), -inf)", -30, 30},
           {"softcap(30) + where(q_idx >= kv_idx, 0, -inf)", -30, 30},
           {"round(softcap(2.5))", -2, 2},
           {"float(int(clamp(score, 2, 9.5)))", 0, 9},  // of NaN 0
       }) {
    const ScoreBounds bounds = known_bounds_of(text);
    EXPECT_EQ(bounds.low, low) << text;
    EXPECT_EQ(bounds.high, high) << text;
  }
}

// Near one a GPU's logarithm has an absolute precision only, which a factor makes large.
TEST(CompilerScoreBounds, OfLogarithmsNearOne) {
  const ScoreBounds bounds = known_bounds_of("6e8 * log(clamp(score, 1.0, 1.0000001))");
  EXPECT_LT(bounds.low, -500.0f);
  EXPECT_GT(bounds.high, 500.0f);
}

TEST(CompilerScoreBounds, AreUnknownOtherwise) {
  for (const char* const text :
       {"score", "causal", "score + softcap(30)", "softcap(30) + h", "softcap(30) + c", "c * tanh(score / c)",
        "min(score, 3)", "exp(score)", "relu(score)", "1 / softcap(2)", "log(sigmoid(score))", "t[h] * sigmoid(score)",
        "1e38 * tanh(score) + 3e38", "where(score > 0, 1, c)", "silu(score)", "exp(100 * tanh(score))"})
    EXPECT_FALSE(bounds_of(text)) << text;
}

// Expressions between literals, of ones that are not.
class Generator {
 public:
  explicit Generator(std::uint64_t seed) : random_(seed) {}

  std::string bounded(int depth) {
    if (depth == 0) return below(2) ? literal() : one_of({"tanh(score)", "sigmoid(score)", "clamp(score, -2, 3)"});
    const auto inner = [&] { return bounded(depth - 1); };
    const auto free = [&] { return any(depth - 1); };
    switch (below(20)) {
      case 0:
        return "tanh(" + free() + ")";
      case 1:
        return "sigmoid(" + free() + ")";
      case 2:
        return one_of({"sin(", "cos(", "erf("}) + free() + ")";
      case 3:
        return "clamp(" + free() + ", -" + magnitude() + ", " + magnitude() + ")";
      case 4:
        return "min(max(" + free() + ", " + literal() + "), " + literal() + ")";
      case 5:
        return "where(" + free() + one_of({" < ", " >= ", " == "}) + inner() + ", " + inner() + ", " + inner() + ")";
      case 6:
      case 7:
        return "(" + inner() + " + " + inner() + ")";
      case 8:
        return "(" + inner() + " - " + inner() + ")";
      case 9:
      case 10:
        return "(" + inner() + " * " + inner() + ")";
      case 11:
        return "(" + inner() + " / (" + magnitude() + " + sigmoid(" + free() + ")))";
      case 12:
        return one_of({"exp(", "exp2("}) + "tanh(" + free() + ") * " + magnitude() + ")";
      case 13:
        return one_of({"log(", "log2(", "sqrt(", "rsqrt(", "log1p("}) + magnitude() + " + abs(" + inner() + "))";
      case 14:
        return one_of({"floor(", "ceil(", "round(", "abs(", "gelu(", "relu(", "sign(", "-("}) + inner() + ")";
      case 15:
        return "(" + free() + " % " + magnitude() + ")";
      case 16:
        return "float(int(" + inner() + ") * " + one_of({"3", "-2"}) + " + clamp(q_idx - n[h], -4, 7))";
      case 17:
        return named_ ? "(let_ * let_)" : "sigmoid(score)";
      case 18:
        return "where(score " + one_of({"<", "<=", ">", ">="}) + " " + magnitude() + ", " + magnitude() + ", " +
               inner() + ")";
      default:
        return "(n[h] % 5 + float(" + free() + " > 0))";
    }
  }

  std::string text(int depth) {
    named_ = false;
    const std::string value = bounded(1);
    named_ = true;
    const std::string result = bounded(depth);
    return "let let_ = " + value + "; " + (below(4) == 0 ? "where(" + any(1) + " > 0, " + result + ", -inf)" : result);
  }

  double score() {
    constexpr double kEdges[] = {kInfinity, -kInfinity, 0, 1e30, -1e30, 3e38, 1e-40, 1, -1, 700, -700};
    return below(3) == 0 ? kEdges[below(11)] : std::normal_distribution<double>(0, 6)(random_);
  }
  std::int64_t position(std::size_t n) { return static_cast<std::int64_t>(below(n)); }

 private:
  std::size_t below(std::size_t n) { return random_() % n; }
  std::string one_of(std::initializer_list<const char*> texts) { return texts.begin()[below(texts.size())]; }
  // Exact as float32.
  std::string magnitude() { return one_of({"0.125", "1", "2.5", "7", "30", "1.75", "0.375"}); }
  std::string literal() { return one_of({"", "-"}) + magnitude(); }
  std::string any(int depth) {
    if (depth <= 0) return one_of({"score", "score", "t[h]", "c", "(kv_idx - q_idx)", "score * 0.25"});
    switch (below(6)) {
      case 0:
        return "(score * " + any(depth - 1) + ")";
      case 1:
        return "(" + any(depth - 1) + " / " + any(depth - 1) + ")";
      case 2:
        return "(" + bounded(depth - 1) + " + " + any(depth - 1) + ")";
      case 3:
        return "exp(" + any(depth - 1) + ")";
      case 4:
        return "score";
      default:
        return bounded(depth - 1);
    }
  }

  std::mt19937_64 random_;
  bool named_ = false;  // whether there is a let_
};

TEST(CompilerScoreBounds, HoldForRandomExpressions) {
  const int count = random_count(1200);
  Generator generator(1);
  int found = 0, near = 0;
  for (int i = 0; i < count; ++i) {
    const std::string text = generator.text(1 + i % 4);
    const Mod mod(text, tensors());
    const auto facts = analyze(mod.problem);
    ASSERT_FALSE(facts.error) << text << ": " << facts.error->message;
    const std::optional<ScoreBounds>& bounds = facts.value.score_bounds;
    if (!bounds) continue;
    ++found;
    ASSERT_LE(bounds->low, bounds->high) << text;
    std::vector<dsl::Point> points;
    points.reserve(100);
    for (int k = 0; k < 100; ++k)
      points.push_back({.score = generator.score(),
                        .b = generator.position(2),
                        .h = generator.position(4),
                        .q_idx = generator.position(64),
                        .kv_idx = generator.position(96)});
    dsl::Interpreter interpreter(mod.problem.score_mod, mod.views);
    // Of literals that the compiler folds as float32 and functions enlarge, and of native code.
    const double slack = 1e-5 * (1 + std::max(std::abs(bounds->low), std::abs(bounds->high)));
    double least = kInfinity, largest = -kInfinity;
    std::vector<bool> kept;
    for (const dsl::Point& point : points) {
      const auto result = interpreter.score_mod(point);
      kept.push_back(result.keep);
      if (!result.keep || std::isnan(result.value)) continue;
      EXPECT_GE(result.value, static_cast<double>(bounds->low) - slack) << text << " of " << point.score;
      EXPECT_LE(result.value, static_cast<double>(bounds->high) + slack) << text << " of " << point.score;
      least = std::min(least, result.value), largest = std::max(largest, result.value);
    }
    const double width = static_cast<double>(bounds->high) - static_cast<double>(bounds->low);
    near += largest - least > 0.5 * width || width == 0 ? 1 : 0;
    if (i % 8 != 0) continue;
    // Native code, in log2 units.
    const Elementwise compiled(mod);
    const std::vector<float> values = compiled.log2_values(points);
    for (std::size_t k = 0; k < values.size(); ++k) {
      const double value = static_cast<double>(values[k]) / std::numbers::log2e;
      if (!kept[k] || std::isnan(value) || std::isinf(value)) continue;
      EXPECT_GE(value, static_cast<double>(bounds->low) - slack) << text << " of " << points[k].score;
      EXPECT_LE(value, static_cast<double>(bounds->high) + slack) << text << " of " << points[k].score;
    }
  }
  RecordProperty("bounded_percent", 100 * found / count);
  RecordProperty("near_percent", 100 * near / std::max(found, 1));
  EXPECT_GT(found, count * 8 / 10);
  EXPECT_GT(near, found / 3);
}

}  // namespace
}  // namespace attnjit::compiler::testing
