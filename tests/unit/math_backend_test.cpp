// The eager backend against a plain loop over the interpreter, with every vector width and with and without a BLAS.
#include "runtime/math_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "dsl/bind.h"
#include "dsl/interpreter.h"
#include "dsl/parser.h"
#include "tests/unit/math_testing.h"

namespace attnjit::runtime {
namespace {

using namespace cpu_testing;

// One problem with random inputs, its results and the oracle's.
class Problem : public MathProblem {
 public:
  explicit Problem(const Shape& shape) : MathProblem(shape) {}

  // Runs `score_mod` and judges every element; returns the first complaint, empty when all is well. `spoil` may falsify
  // the result before it is judged.
  std::string check(const std::string& score_mod, const std::string& mask_mod = "", const MathOptions& options = {},
                    int threads = 2, void (*spoil)(Tensor& o, std::vector<float>& lse) = nullptr) {
    if (std::string error = bind(score_mod, mask_mod); !error.empty()) return error;
    call_.q = q.view();
    call_.k = k.view();
    call_.v = v.view();
    const Shape::Layout layout = shape_.layout == Shape::kOverlapping ? Shape::kPacked : shape_.layout;
    Tensor o(shape_.batch, shape_.heads, shape_.seqlen_q, shape_.head_dim_v, shape_.dtype, layout);
    call_.o = o.view();
    const auto rows = static_cast<std::size_t>(shape_.batch * shape_.heads * shape_.seqlen_q);
    std::vector<float> lse(rows, 77.0f), row_max(rows, 77.0f);
    const RowView view{nullptr, {shape_.heads * shape_.seqlen_q, shape_.seqlen_q, 1}};
    call_.lse = call_.row_max = view;
    call_.lse.data = lse.data();
    call_.row_max.data = row_max.data();
    call_.scale = shape_.scale;

    const MathPlan plan(call_, score_, mask_ ? &*mask_ : nullptr, options);
    description = plan.describe();
    GuardedWorkspace workspace(plan.workspace_size());
    ThreadPool pool(threads);
    plan.run(call_, workspace.data(), pool);
    if (!workspace.intact()) return "wrote outside its workspace";
    if (!o.untouched_between()) return "wrote between the rows of o";
    if (spoil != nullptr) spoil(o, lse);
    return judge(o, lse, row_max);
  }

  // Everywhere and in every way of computing it.
  void check_all(const std::string& score_mod, const std::string& mask_mod = "") {
    for (const MathOptions& options : all_options()) {
      EXPECT_EQ(check(score_mod, mask_mod, options), "")
          << score_mod << " mask " << mask_mod << ", " << options.passes->isa
          << (options.blas ? " with BLAS" : " without BLAS") << "\n"
          << description;
    }
  }

  std::string description;

 private:
  std::string judge(const Tensor& o, const std::vector<float>& lse, const std::vector<float>& row_max) {
    dsl::Interpreter score_mod(score_, views_);
    std::optional<dsl::Interpreter> mask_mod;
    if (mask_) mask_mod.emplace(*mask_, views_);
    const auto n = static_cast<std::size_t>(shape_.seqlen_kv);
    // Unit roundoffs of o's type.
    const double unit = shape_.dtype == DType::kF32 ? 0x1p-24 : shape_.dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
    std::size_t row = 0;
    for (std::int64_t b = 0; b < shape_.batch; ++b) {
      for (std::int64_t h = 0; h < shape_.heads; ++h) {
        const std::int64_t h_kv = h / (shape_.heads / shape_.heads_kv);
        for (std::int64_t i = 0; i < shape_.seqlen_q; ++i, ++row) {
          std::vector<double> m(n), p(n);
          double maximum = -kInf, largest = 0.0;
          bool has_nan = false;
          for (std::size_t j = 0; j < n; ++j) {
            const auto kv = static_cast<std::int64_t>(j);
            double score = 0.0;
            for (std::int64_t d = 0; d < shape_.head_dim; ++d) score += q.get(b, h, i, d) * k.get(b, h_kv, kv, d);
            const dsl::Point point{score * static_cast<double>(shape_.scale), b, h, i, kv};
            m[j] = score_mod.score_mod(point).value;
            if (mask_mod && !mask_mod->mask_mod(point)) m[j] = -kInf;
            if (std::fabs(m[j]) > std::numeric_limits<float>::max()) m[j] = std::copysign(kInf, m[j]);
            has_nan |= std::isnan(m[j]);
            maximum = std::max(maximum, m[j]);
            if (std::isfinite(m[j])) largest = std::max(largest, std::fabs(m[j]));
          }
          const double bad = has_nan || maximum == kInf ? kNaN : 0.0;
          double sum = 0.0;
          for (std::size_t j = 0; j < n; ++j) sum += p[j] = maximum == -kInf ? 0.0 : std::exp(m[j] - maximum);
          const double expected_lse = maximum == -kInf && !has_nan ? -kInf : maximum + std::log(sum) + bad;
          // As in the oracle, +inf wins over NaN.
          const double expected_max = has_nan && maximum != kInf ? kNaN : maximum;
          const double tolerance_m = 64 * 0x1p-24 * (1.0 + largest);
          const auto where = [&](const char* what, double got, double expected) {
            return std::string(what) + " of b " + std::to_string(b) + " h " + std::to_string(h) + " q " +
                   std::to_string(i) + " is " + std::to_string(got) + ", expected " + std::to_string(expected);
          };
          if (!near(lse[row], expected_lse, tolerance_m)) return where("lse", lse[row], expected_lse);
          if (!near(row_max[row], expected_max, tolerance_m)) return where("row_max", row_max[row], expected_max);
          for (std::int64_t d = 0; d < shape_.head_dim_v; ++d) {
            double expected = 0.0, magnitude = 0.0;
            for (std::size_t j = 0; j < n && maximum != -kInf; ++j) {
              const double value = v.get(b, h_kv, static_cast<std::int64_t>(j), d);
              if (p[j] != 0.0) expected += p[j] / sum * value;
              if (p[j] != 0.0) magnitude += p[j] / sum * std::fabs(value);
            }
            const double got = o.get(b, h, i, d);
            if (!near(got, expected + bad, unit * std::fabs(expected) + 2 * tolerance_m * (magnitude + 0x1p-24))) {
              return where("o", got, expected + bad);
            }
          }
        }
      }
    }
    return "";
  }
};

TEST(MathBackend, PlainMods) {
  Problem problem({});
  for (const char* text : {"score", "score + (q_idx - kv_idx)", "score + 2*h", "score * 2.5 - 1", "2*b - 0.125*kv_idx",
                           "score - 0.5**(h + 1) * abs(q_idx - kv_idx)", "7.0", "b", "kv_idx * 1.0", "q_idx / 3"}) {
    problem.check_all(text);
  }
}

TEST(MathBackend, FloatFunctions) {
  Problem problem({.scale = 2.0f});
  for (const char* text : {"exp(score/4)",
                           "exp2(score/3)",
                           "log(abs(score) + 0.5)",
                           "log2(score*score + 1)",
                           "log1p(score*score)",
                           "sqrt(abs(score) + 0.25)",
                           "rsqrt(score*score + 0.5)",
                           "tanh(score)",
                           "20*tanh(score/20)",
                           "sigmoid(score)",
                           "silu(score)",
                           "gelu(score)",
                           "relu(score)",
                           "erf(score)",
                           "sin(score)",
                           "cos(3*score)",
                           "floor(score*1.7)",
                           "ceil(score*1.7)",
                           "round(score*1.7)",
                           "sign(score)",
                           "abs(score)",
                           "-score",
                           "min(score, 0.5)",
                           "max(score, kv_idx/10)",
                           "clamp(score, -1, 1)",
                           "clamp(score, h - 2, 1.5)",
                           "score ** 2",
                           "abs(score) ** 1.5",
                           "2.0 ** score",
                           "score % 0.75",
                           "score % -0.75",
                           "score // 0.75",
                           "score / (1 + kv_idx)",
                           "where(score > 0.25, score, 0.5*score)",
                           "where(isnan(log(score)), 1.0, 2.0)",
                           "float(isinf(1 / (kv_idx % 3)))",
                           "int(score * 2.3) * 0.5",
                           "where(bool(score), 1.0, 0.0)"}) {
    problem.check_all(text);
  }
}

TEST(MathBackend, Integers) {
  Problem problem({});
  for (const char* text : {"score + (q_idx - 9) // 4",
                           "score + (q_idx - 9) // -4",
                           "score + (9 - kv_idx) % 5",
                           "score + (9 - kv_idx) % -5",
                           "score + q_idx // (kv_idx - 5)",
                           "score + q_idx % (kv_idx - 5)",
                           "score + (kv_idx & 3)",
                           "score + (kv_idx | 4) * 0.1",
                           "score + ~h",
                           "score - (q_idx - 20) ** 2 * 0.01",
                           "score + min(q_idx, kv_idx)",
                           "score + max(q_idx, 2*kv_idx, b) / 4",
                           "score + abs(q_idx - kv_idx) * -0.5",
                           "score + clamp(kv_idx, 3, q_idx)",
                           "score + sign(q_idx - kv_idx)",
                           "score + relu(q_idx - kv_idx)",
                           "score + bool(q_idx % 3) * 2",
                           "score + (-9223372036854775807 - 1) // (h - 1) * 1e-20",
                           "score + (-9223372036854775807 - 1) % (h - 1)",
                           "score + floor(q_idx) + round(kv_idx) / 8",
                           "score + int(1e30 * (h - 1)) * 1e-19",
                           "score + int(log(0.0 - 1.0) * q_idx)"}) {
    problem.check_all(text);
  }
}

TEST(MathBackend, SharedValues) {
  Problem problem({});
  for (const char* text :
       {"let d = q_idx - kv_idx; where(d >= 0, score - d*0.1, score + d*0.3)", "let t = tanh(score); t * t + t",
        "let a = score + 1; let c = a * a; c / (1 + c) + a", "score * score - score"}) {
    problem.check_all(text);
  }
}

TEST(MathBackend, Masks) {
  Problem problem({});
  for (const char* text :
       {"where(q_idx >= kv_idx, score, -inf)", "where(q_idx < kv_idx, -inf, score)",
        "score + where(abs(q_idx - kv_idx) < 4, 0, -inf)", "where(kv_idx < 5 and (h == 1 or q_idx > 3), score, -inf)",
        "where(kv_idx < 5, where(q_idx > 3, score, -inf), score + 1)", "min(score, where(kv_idx % 3 == 1, 5.0, -inf))",
        "where(q_idx >= kv_idx, score, -inf) - 3", "2 * where(q_idx >= kv_idx, score, -inf)",
        "where(score > 0, score, -inf)", "where(q_idx > 100, score, -inf)", "-inf", "where(h == 2, -inf, score)",
        "where(not (q_idx >= kv_idx), -inf, score) + where(kv_idx > 1, -inf, 0) + h",
        "tanh(where(b == 0, score, -inf))",
        "where(q_idx >= kv_idx, where(b == 1, -inf, 1.0), where(h > 1, score, -inf)) + score"}) {
    problem.check_all(text);
  }
  problem.check_all("score", "q_idx >= kv_idx");
  problem.check_all("score + h", "(kv_idx + q_idx) % 2 == 0 and not (h == 3)");
  problem.check_all("score + where(kv_idx < 7, 0, -inf)", "q_idx >= kv_idx");
  problem.check_all("score", "b == 1");
  problem.check_all("score", "true");
}

TEST(MathBackend, CapturedReads) {
  const Shape shape;
  Problem problem(shape);
  problem.capture("slope", DType::kF32, {4}, {-0.5, -0.25, -0.125, -0.0625});
  problem.capture("bias", DType::kBF16, {2, 4, 19, 37}, random_values(2 * 4 * 19 * 37, -128, 128, 1.0 / 128));
  problem.capture("half", DType::kF16, {19, 37}, random_values(19 * 37, -128, 128, 1.0 / 64));
  problem.capture("document", DType::kInt32, {37}, random_values(37, 0, 2, 1));
  problem.capture("table", DType::kF32, {11}, random_values(11, -16, 16, 0.25));
  problem.capture("skip", DType::kBool, {2, 37}, random_values(2 * 37, 0, 1, 1));
  problem.capture("bytes", DType::kInt8, {37}, random_values(37, -100, 100, 1));
  problem.capture("ubytes", DType::kUInt8, {37}, random_values(37, 0, 255, 1));
  problem.capture("shorts", DType::kInt16, {19}, random_values(19, -1000, 1000, 1));
  problem.capture("longs", DType::kInt64, {2}, {5, 30});
  problem.capture("factor", DType::kF32, {}, {0.75});
  problem.capture("window", DType::kInt32, {}, {6});
  for (const char* text :
       {"score + slope[h] * (q_idx - kv_idx)", "score + bias[b, h, q_idx, kv_idx]", "score + half[q_idx, kv_idx]",
        "where(document[q_idx] == document[kv_idx], score, -inf)", "score + table[q_idx - kv_idx + 5]",
        "score * factor", "where(abs(q_idx - kv_idx) <= window, score, -inf)", "where(skip[b, kv_idx], -inf, score)",
        "score + bytes[kv_idx] * 0.01 + ubytes[kv_idx] * 0.01 + shorts[q_idx] * 0.001",
        "where(kv_idx < longs[b], score, -inf)", "score + bias[b, h % 2, kv_idx, q_idx]",
        "score + table[int(score * 3)]", "score + half[document[kv_idx] + q_idx, kv_idx * q_idx]",
        "score + table[document[q_idx] * 5]"}) {
    problem.check_all(text);
  }
  problem.check_all("score + slope[h] * kv_idx", "document[q_idx] == document[kv_idx] and kv_idx < longs[b]");
}

TEST(MathBackend, ReadsStayInsideTheirTensor) {
  Problem problem({});
  problem.capture("table", DType::kF32, {5}, {1, 2, 3, 4, 5});
  problem.capture("grid", DType::kF32, {3, 3}, {1, 2, 3, 4, 5, 6, 7, 8, 9});
  for (const char* text :
       {"score + table[kv_idx * 1000000007]", "score + table[-1 - kv_idx]", "score + table[q_idx - 9]",
        "score + grid[kv_idx - 20, q_idx - 9]", "score + table[9223372036854775807]"}) {
    problem.check_all(text);
  }
}

TEST(MathBackend, Shapes) {
  for (const Shape& shape : std::vector<Shape>{
           {.batch = 1, .heads = 1, .heads_kv = 1, .seqlen_q = 1, .seqlen_kv = 1, .head_dim = 1, .head_dim_v = 1},
           {.seqlen_q = 1, .seqlen_kv = 300},
           {.seqlen_q = 70, .seqlen_kv = 1},
           {.batch = 1, .heads = 6, .heads_kv = 1, .seqlen_q = 33, .seqlen_kv = 65, .head_dim = 24, .head_dim_v = 40},
           {.batch = 3, .heads = 2, .heads_kv = 2, .seqlen_q = 64, .seqlen_kv = 128, .head_dim = 64, .head_dim_v = 64},
           {.batch = 1, .heads = 1, .heads_kv = 1, .seqlen_q = 260, .seqlen_kv = 530, .head_dim = 7, .head_dim_v = 3},
           {.layout = Shape::kHeadsInside},
           {.layout = Shape::kPadded},
           {.layout = Shape::kOverlapping},
           {.dtype = DType::kBF16},
           {.dtype = DType::kF16},
           {.dtype = DType::kBF16, .layout = Shape::kPadded},
           {.dtype = DType::kF16, .layout = Shape::kHeadsInside},
           {.scale = 0.25f},
           {.scale = -1.5f},
           {.scale = 0.0f}}) {
    Problem problem(shape);
    for (const char* text : {"score", "score + h - 0.25*abs(q_idx - kv_idx)", "where(q_idx >= kv_idx, score, -inf)"}) {
      problem.check_all(text);
    }
  }
}

TEST(MathBackend, NonFiniteInputs) {
  for (DType dtype : {DType::kF32, DType::kBF16}) {
    Problem problem({.batch = 1, .heads = 2, .heads_kv = 1, .seqlen_q = 20, .seqlen_kv = 40, .dtype = dtype});
    problem.k.set(0, 0, 12, 3, kNaN);
    problem.k.set(0, 0, 15, 0, kInf);
    problem.q.set(0, 1, 5, 2, kNaN);
    // Rows before 12 keep nothing of the poisoned keys.
    problem.check_all("where(q_idx >= kv_idx, score, -inf)");
    problem.check_all("score + where(q_idx >= kv_idx, 0, -inf)");
    problem.check_all("2*score + where(kv_idx < 12, 0, -inf) + h");
    problem.check_all("score", "kv_idx < 12");
    problem.check_all("score");
    problem.check_all("tanh(score)");
    problem.check_all("where(isnan(score), -inf, score)");
    problem.check_all("max(score, 0)");
  }
  Problem unscaled({.scale = 0.0f});
  unscaled.k.set(1, 1, 3, 0, kInf);
  unscaled.check_all("score");
}

TEST(MathBackend, HugeValuesAtDroppedKeys) {
  Problem problem({});
  for (std::int64_t h = 0; h < 2; ++h) problem.v.set(0, h, 30, 1, 3e38);
  // What is left of a dropped element must be nothing, not the smallest number.
  problem.check_all("where(kv_idx < 30, score, -inf)");
  problem.check_all("where(kv_idx < 30, score, -500.0)");
}

TEST(MathBackend, NonFiniteMods) {
  Problem problem({});
  problem.capture("bias", DType::kF32, {37}, [] {
    std::vector<double> values(37, 0.5);
    values[3] = -kInf;
    return values;
  }());
  problem.capture("up", DType::kF32, {2}, {0.0, kInf});
  for (const char* text : {"score + bias[kv_idx]",
                           "score + up[b]",
                           "where(kv_idx < 9, score, -inf) + up[kv_idx]",
                           "score / (kv_idx - 3)",
                           "log(score)",
                           "log(float(kv_idx))",
                           "log2(float(kv_idx - 1))",
                           "log1p(float(kv_idx - 1))",
                           "sqrt(score)",
                           "exp(100 * score)",
                           "exp(-100.0 * kv_idx)",
                           "exp2(300 * score)",
                           "tanh(1 / float(kv_idx - 3))",
                           "nan * h",
                           "sigmoid(1000 * score)",
                           "silu(-1000.0 * kv_idx)",
                           "sin(1 / float(q_idx))",
                           "rsqrt(float(kv_idx - 2))",
                           "min(score, log(score))",
                           "clamp(log(score), 0, 1)",
                           "sign(log(score))",
                           "(score - score) / 0",
                           "-inf + inf * h",
                           "1e-300 * where(kv_idx < 9, score, -inf)",
                           "where(kv_idx < 9, score, -inf) * 1e-300 + up[b]",
                           "where(score > 0, -inf, 0) + where(h > 0, inf, 0)"}) {
    problem.check_all(text);
  }
}

TEST(MathBackend, PassesRunAtBroadcastShapes) {
  Problem problem({});
  problem.capture("slope", DType::kF32, {4}, {1, 2, 3, 4});
  ASSERT_EQ(problem.check("score + slope[h] * (q_idx - kv_idx)"), "");
  EXPECT_NE(problem.description.find("subtract: int (19, 37)"), std::string::npos) << problem.description;
  EXPECT_NE(problem.description.find("index: float (4)"), std::string::npos) << problem.description;
  EXPECT_NE(problem.description.find("multiply: float (4, 19, 37)"), std::string::npos) << problem.description;
  EXPECT_NE(problem.description.find("add: float (2, 4, 19, 37)"), std::string::npos) << problem.description;
  // Elements that are -inf by themselves need no further pass; others do.
  ASSERT_EQ(problem.check("where(q_idx >= kv_idx, score, -inf) + h"), "");
  EXPECT_EQ(problem.description.find("kept"), std::string::npos) << problem.description;
  ASSERT_EQ(problem.check("score + where(q_idx >= kv_idx, 0, -inf)"), "");
  EXPECT_NE(problem.description.find("softmax of the kept elements"), std::string::npos) << problem.description;
}

TEST(MathBackend, WorksInPlace) {
  // A chain of operations overwrites the scores.
  ForwardCall call;
  call.q.shape[0] = call.k.shape[0] = call.v.shape[0] = 2;
  call.q.shape[1] = call.k.shape[1] = call.v.shape[1] = 4;
  call.q.shape[2] = call.k.shape[2] = call.v.shape[2] = 64;
  call.q.shape[3] = call.k.shape[3] = call.v.shape[3] = 16;
  const auto size = [&](const char* text) {
    auto expr = dsl::bind(*dsl::parse(text), {}, dsl::ModKind::kScoreMod);
    return MathPlan(call, *expr, nullptr).workspace_size();
  };
  const std::size_t scores = std::size_t{2} * 4 * 64 * 64 * 4;
  EXPECT_EQ(size("score"), 4 * std::size_t{2 * 4 * 64 * 16 * 4} + scores);
  EXPECT_EQ(size("20 * tanh(score / 20) + 1"), size("score"));
  EXPECT_EQ(size("score * score - score"), size("score") + scores);
  call.q.shape[2] = call.k.shape[2] = call.v.shape[2] = std::int64_t{1} << 40;
  EXPECT_EQ(size("score"), std::numeric_limits<std::size_t>::max());
}

TEST(MathBackend, ResultsDoNotDependOnThreads) {
  Problem problem({.batch = 1, .heads = 3, .heads_kv = 1, .seqlen_q = 150, .seqlen_kv = 301});
  for (int threads : {1, 2, 3}) {
    EXPECT_EQ(problem.check("where(q_idx >= kv_idx, 5*tanh(score/5), -inf)", "", {}, threads), "") << threads;
  }
}

TEST(MathBackend, JudgeRejectsWrongResults) {
  Problem problem({});
  const auto half_percent = [](Tensor& o, std::vector<float>&) { o.set(1, 2, 3, 4, o.get(1, 2, 3, 4) * 1.005); };
  const auto lse_off = [](Tensor&, std::vector<float>& lse) { lse[20] += 1e-3f; };
  const auto zero = [](Tensor& o, std::vector<float>&) { o.set(0, 0, 18, 7, 0.0); };
  const auto not_a_number = [](Tensor& o, std::vector<float>&) { o.set(0, 0, 0, 0, kNaN); };
  EXPECT_NE(problem.check("score", "", {}, 1, half_percent), "");
  EXPECT_NE(problem.check("score", "", {}, 1, lse_off), "");
  EXPECT_NE(problem.check("score", "", {}, 1, zero), "");
  EXPECT_NE(problem.check("score", "", {}, 1, not_a_number), "");
}

// The vector functions against libm in double precision, over their whole range and at the edges.
TEST(MathBackend, VectorFunctions) {
  using F = dsl::Function;
  struct Row {
    F function;
    double (*exact)(double);
    double low, high;
    double ulp;  // of the larger of the result and the smallest normal number
  };
  const Row rows[] = {
      {F::kExp, [](double x) { return std::exp(x); }, -87.3, 88.7, 4},
      {F::kExp2, [](double x) { return std::exp2(x); }, -126, 127.9, 4},
      {F::kLog, [](double x) { return std::log(x); }, 1e-30, 1e30, 4},
      {F::kLog2, [](double x) { return std::log2(x); }, 1e-30, 10, 4},
      {F::kLog1p, [](double x) { return std::log1p(x); }, -0.999, 100, 4},
      {F::kTanh, [](double x) { return std::tanh(x); }, -15, 15, 4},
      {F::kErf, [](double x) { return std::erf(x); }, -5, 5, 4},
      {F::kSin, [](double x) { return std::sin(x); }, -30, 30, 8},
      {F::kCos, [](double x) { return std::cos(x); }, -30, 30, 8},
      {F::kSigmoid, [](double x) { return 1 / (1 + std::exp(-x)); }, -80, 80, 8},
  };
  for (const MathOptions& options : Problem::all_options()) {
    if (options.blas != nullptr) continue;
    for (const Row& row : rows) {
      std::vector<float> x = {0.0f, -0.0f, 1.0f, -1.0f, float(kInf), float(-kInf), float(kNaN), 1e30f, -1e30f, 1e-30f};
      std::mt19937 random(3);
      std::uniform_real_distribution<float> value(static_cast<float>(row.low), static_cast<float>(row.high));
      for (int i = 0; i < 20001; ++i) x.push_back(value(random));
      std::vector<float> y(x.size());
      const auto pass = options.passes->elementwise(dsl::Op::kCall, row.function, dsl::Type::kFloat);
      pass({.out = y.data(), .in = {x.data()}, .step = {1}, .n = static_cast<std::int64_t>(x.size())});
      for (std::size_t i = 0; i < x.size(); ++i) {
        const double exact = row.exact(x[i]);
        const bool overflow = std::fabs(exact) > std::numeric_limits<float>::max();
        if (std::isnan(exact)) {
          ASSERT_TRUE(std::isnan(y[i])) << static_cast<int>(row.function) << " of " << x[i];
        } else if (overflow) {
          ASSERT_EQ(y[i], exact > 0 ? kInf : -kInf) << static_cast<int>(row.function) << " of " << x[i];
        } else {
          // sin and cos lose relative precision at their zeros.
          const double size = row.function == F::kSin || row.function == F::kCos ? 1.0 : std::fabs(exact);
          ASSERT_NEAR(y[i], exact, row.ulp * 0x1p-23 * std::max(size, 0x1p-126))
              << static_cast<int>(row.function) << " of " << x[i] << " " << options.passes->isa;
        }
      }
    }
  }
}

TEST(MathBackend, HalfPrecisionRoundTrip) {
  for (const MathOptions& options : Problem::all_options()) {
    for (DType dtype : {DType::kF16, DType::kBF16}) {
      std::vector<std::uint16_t> all(65536), back(65536);
      for (std::size_t i = 0; i < all.size(); ++i) all[i] = static_cast<std::uint16_t>(i);
      std::vector<float> wide(65536);
      options.passes->widen(dtype, all.data(), wide.data(), 65536);
      options.passes->narrow(dtype, wide.data(), back.data(), 65536);
      for (std::size_t i = 0; i < all.size(); ++i) {
        const double exact = dsl::read_as_double(all.data(), dtype, static_cast<std::int64_t>(i));
        if (std::isnan(exact)) {
          ASSERT_TRUE(std::isnan(wide[i]) &&
                      std::isnan(dsl::read_as_double(back.data(), dtype, static_cast<std::int64_t>(i))));
        } else {
          ASSERT_EQ(wide[i], exact) << i;
          ASSERT_EQ(back[i], all[i]) << i;
        }
        // Halfway to the next value rounds to the even one, a little further rounds up.
        const double next =
            i + 1 < all.size() ? dsl::read_as_double(all.data(), dtype, static_cast<std::int64_t>(i) + 1) : kNaN;
        if (!std::isfinite(exact) || !std::isfinite(next) || (i & 0x7fff) == 0x7fff) continue;
        const float middle = static_cast<float>((exact + next) / 2);
        if (static_cast<double>(middle) != (exact + next) / 2) continue;  // subnormal in f32
        const float beyond = std::nextafter(middle, static_cast<float>(next));
        const float inputs[2] = {middle, beyond};
        std::uint16_t rounded[2];
        options.passes->narrow(dtype, inputs, rounded, 2);
        ASSERT_EQ(rounded[0], i % 2 == 0 ? i : i + 1) << i;
        ASSERT_EQ(rounded[1], i + 1) << i;
      }
    }
  }
}

}  // namespace
}  // namespace attnjit::runtime
