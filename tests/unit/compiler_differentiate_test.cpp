// The compiler's derivative: its function evaluated in double precision against the oracle's, and what it says of
// sinks.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "compiler/dialect/dialect.h"
#include "compiler/frontend.h"
#include "dsl/derivative.h"
#include "llvm/ADT/DenseMap.h"
#include "llvm/ADT/TypeSwitch.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Math/IR/Math.h"
#include "tests/support/random_inputs.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

namespace arith = mlir::arith;
namespace math = mlir::math;
using dsl::DType;
using dsl::Point;
using ::testing::HasSubstr;

// Gradients of captured elements, by the capture's number and the element's place in a packed tensor.
using Places = std::map<std::pair<int, std::int64_t>, double>;

struct Gradients {
  double value = 0, dscore = 0;
  bool keep = false;
  Places captured;
  Places row_shifts;  // of `captured`, what sinks that are row shifts add
};

// A function of the backward, operation by operation. Floats are doubles.
class Evaluator {
 public:
  Evaluator(mlir::func::FuncOp function, std::span<const dsl::CaptureView> views)
      : function_(function), views_(views) {}

  Gradients at(const Point& point, double grad) {
    point_ = point;
    floats_[function_.getArgument(0)] = point.score;
    floats_[function_.getArgument(1)] = grad;
    Gradients result;
    for (mlir::Operation& op : function_.front().without_terminator()) {
      const mlir::Value value = op.getResult(0);
      if (value.getType().isF32()) {
        floats_[value] = real(op);
      } else {
        ints_[value] = integer(op);
      }
    }
    mlir::Operation* const ret = function_.front().getTerminator();
    result.value = f(ret->getOperand(0));
    result.keep = i(ret->getOperand(1)) != 0;
    result.dscore = f(ret->getOperand(2));
    for (const mlir::Value value : ret->getOperands().drop_front(3)) {
      auto sink = value.getDefiningOp<SinkOp>();
      const std::pair<int, std::int64_t> at{static_cast<int>(sink.getCapture()), place(sink, true)};
      result.captured[at] += f(sink.getValue());
      if (sink.getRowShift()) result.row_shifts[at] += f(sink.getValue());
    }
    return result;
  }

 private:
  double f(mlir::Value v) { return floats_.lookup(v); }
  std::int64_t i(mlir::Value v) { return ints_.lookup(v); }

  // Of the element that is read (in the tensor's strides) or added to (packed).
  template <typename T>
  std::int64_t place(T op, bool packed) {
    const dsl::CaptureView& view = views_[op.getCapture()];
    const auto in_bounds = op.getInBounds();
    std::int64_t offset = 0;
    for (unsigned d = 0; d < op.getIndices().size(); ++d) {
      const std::int64_t index = std::clamp<std::int64_t>(i(op.getIndices()[d]), 0, view.extent[d] - 1);
      if (in_bounds && (*in_bounds)[d]) EXPECT_EQ(index, i(op.getIndices()[d]));
      offset = packed ? offset * view.extent[d] + index : offset + index * view.stride[d];
    }
    return offset;
  }

  double real(mlir::Operation& op) {
    const auto x = [&](unsigned n = 0) { return f(op.getOperand(n)); };
    return llvm::TypeSwitch<mlir::Operation*, double>(&op)
        .Case<arith::ConstantOp>(
            [](arith::ConstantOp o) { return llvm::cast<mlir::FloatAttr>(o.getValue()).getValueAsDouble(); })
        .Case<ReadOp>([&](ReadOp o) {
          const dsl::CaptureView& view = views_[o.getCapture()];
          return dsl::read_as_double(view.data, view.dtype, place(o, false));
        })
        .Case<SinkOp>([&](auto) { return x(); })
        .Case<arith::SelectOp>([&](auto) { return i(op.getOperand(0)) ? x(1) : x(2); })
        .Case<arith::SIToFPOp, arith::UIToFPOp>([&](auto) { return static_cast<double>(i(op.getOperand(0))); })
        .Case<arith::AddFOp>([&](auto) { return x() + x(1); })
        .Case<arith::SubFOp>([&](auto) { return x() - x(1); })
        .Case<arith::MulFOp>([&](auto) { return x() * x(1); })
        .Case<arith::DivFOp>([&](auto) { return x() / x(1); })
        .Case<arith::RemFOp>([&](auto) { return std::fmod(x(), x(1)); })
        .Case<arith::NegFOp>([&](auto) { return -x(); })
        .Case<arith::MaximumFOp>([&](auto) { return std::isnan(x()) || x() > x(1) ? x() : x(1); })
        .Case<arith::MinimumFOp>([&](auto) { return std::isnan(x()) || x() < x(1) ? x() : x(1); })
        .Case<math::AbsFOp>([&](auto) { return std::abs(x()); })
        .Case<math::ExpOp>([&](auto) { return std::exp(x()); })
        .Case<math::Exp2Op>([&](auto) { return std::exp2(x()); })
        .Case<math::LogOp>([&](auto) { return std::log(x()); })
        .Case<math::Log2Op>([&](auto) { return std::log2(x()); })
        .Case<math::Log1pOp>([&](auto) { return std::log1p(x()); })
        .Case<math::SqrtOp>([&](auto) { return std::sqrt(x()); })
        .Case<math::RsqrtOp>([&](auto) { return 1 / std::sqrt(x()); })
        .Case<math::TanhOp>([&](auto) { return std::tanh(x()); })
        .Case<math::ErfOp>([&](auto) { return std::erf(x()); })
        .Case<GeluOp>([&](auto) { return 0.5 * x() * std::erfc(-x() / std::sqrt(2.0)); })
        .Case<math::SinOp>([&](auto) { return std::sin(x()); })
        .Case<math::CosOp>([&](auto) { return std::cos(x()); })
        .Case<math::PowFOp>([&](auto) { return std::pow(x(), x(1)); })
        .Case<math::FloorOp>([&](auto) { return std::floor(x()); })
        .Case<math::CeilOp>([&](auto) { return std::ceil(x()); })
        .Case<math::RoundEvenOp>([&](auto) { return std::nearbyint(x()); })
        .Default([](mlir::Operation* o) {
          ADD_FAILURE() << "the test does not know " << o->getName().getStringRef().str();
          return 0.0;
        });
  }

  static std::int64_t wrapped(std::uint64_t x) { return static_cast<std::int64_t>(x); }
  static std::int64_t floor_div(std::int64_t a, std::int64_t b) {
    if (b == 0) return 0;
    if (b == -1) return wrapped(0 - static_cast<std::uint64_t>(a));
    return a / b - (a % b != 0 && (a % b < 0) != (b < 0));
  }

  std::int64_t integer(mlir::Operation& op) {
    const auto x = [&](unsigned n = 0) { return i(op.getOperand(n)); };
    const auto u = [&](unsigned n = 0) { return static_cast<std::uint64_t>(i(op.getOperand(n))); };
    return llvm::TypeSwitch<mlir::Operation*, std::int64_t>(&op)
        .Case<arith::ConstantOp>([](arith::ConstantOp o) {
          const llvm::APInt value = llvm::cast<mlir::IntegerAttr>(o.getValue()).getValue();
          return value.getBitWidth() == 1 ? wrapped(value.getZExtValue()) : value.getSExtValue();
        })
        .Case<IndexOp>([&](IndexOp o) {
          const std::int64_t indices[] = {point_.b, point_.h, point_.q_idx, point_.kv_idx};
          return indices[static_cast<int>(o.getRole())];
        })
        .Case<ReadOp>([&](ReadOp o) {
          const dsl::CaptureView& view = views_[o.getCapture()];
          return dsl::read_as_int(view.data, view.dtype, place(o, false));
        })
        .Case<arith::SelectOp>([&](auto) { return x() ? x(1) : x(2); })
        .Case<arith::CmpIOp>([&](arith::CmpIOp o) {
          return std::int64_t{arith::applyCmpPredicate(o.getPredicate(), llvm::APInt(64, u()), llvm::APInt(64, u(1)))};
        })
        .Case<arith::CmpFOp>([&](arith::CmpFOp o) {
          return std::int64_t{
              arith::applyCmpPredicate(o.getPredicate(), llvm::APFloat(f(o.getLhs())), llvm::APFloat(f(o.getRhs())))};
        })
        .Case<arith::AddIOp>([&](auto) { return wrapped(u() + u(1)); })
        .Case<arith::SubIOp>([&](auto) { return wrapped(u() - u(1)); })
        .Case<arith::MulIOp>([&](auto) { return wrapped(u() * u(1)); })
        .Case<math::IPowIOp>([&](auto) {
          std::uint64_t result = 1, square = u();
          for (std::uint64_t rest = u(1); rest != 0; rest >>= 1, square *= square)
            if (rest & 1) result *= square;
          return wrapped(result);
        })
        .Case<arith::MaxSIOp>([&](auto) { return std::max(x(), x(1)); })
        .Case<arith::MinSIOp>([&](auto) { return std::min(x(), x(1)); })
        .Case<arith::AndIOp>([&](auto) { return x() & x(1); })
        .Case<arith::OrIOp>([&](auto) { return x() | x(1); })
        .Case<arith::XOrIOp>([&](auto) { return x() ^ x(1); })
        .Case<FloorDivOp>([&](auto) { return floor_div(x(), x(1)); })
        .Case<FloorModOp>([&](auto) {
          return x(1) == 0 ? 0 : wrapped(u() - static_cast<std::uint64_t>(floor_div(x(), x(1))) * u(1));
        })
        .Case<arith::ExtUIOp, arith::ExtSIOp>([&](auto) { return x(); })
        .Case<arith::TruncIOp>([&](auto) {
          EXPECT_EQ(x(), static_cast<std::int32_t>(x()));
          return x();
        })
        .Case<ToIntOp>([&](auto) {
          const double value = f(op.getOperand(0));
          if (std::isnan(value)) return std::int64_t{0};
          if (value >= 0x1p63) return std::numeric_limits<std::int64_t>::max();
          if (value < -0x1p63) return std::numeric_limits<std::int64_t>::min();
          return static_cast<std::int64_t>(value);
        })
        .Default([](mlir::Operation* o) {
          ADD_FAILURE() << "the test does not know " << o->getName().getStringRef().str();
          return std::int64_t{0};
        });
  }

  mlir::func::FuncOp function_;
  std::span<const dsl::CaptureView> views_;
  Point point_;
  llvm::DenseMap<mlir::Value, double> floats_;
  llvm::DenseMap<mlir::Value, std::int64_t> ints_;
};

std::string text_of(mlir::func::FuncOp function) {
  std::string text;
  llvm::raw_string_ostream stream(text);
  function->print(stream);
  return text;
}

// One expression, compiled for both targets, with all gradients.
struct Case {
  explicit Case(const std::string& expression, const test::Captures& captures = {}) : text(expression) {
    const auto bound = test::bound(expression, captures);
    if (!bound) {
      ADD_FAILURE() << dsl::format_error(bound.error(), expression);
      return;
    }
    expr = *bound;
    // As the compiler has them.
    for (dsl::Node& node : expr.nodes)
      if (node.op == dsl::Op::kFloat) node.float_value = dsl::float32_literal(node.float_value);
    views = test::views(expr, captures);
    problem.score_mod = expr;
    problem.batch = 3;
    problem.num_heads = 5;
    problem.seqlen_q = problem.seqlen_kv = 20;
    for (const dsl::CaptureView& view : views) {
      CaptureInfo info{.dtype = view.dtype};
      for (int d = 0; d < view.rank; ++d) {
        info.extent.push_back(view.extent[d]);
        info.stride_class.push_back(StrideClass::kAny);
      }
      if (dsl::value_type(view.dtype) == dsl::Type::kFloat) problem.gradients |= 1u << problem.captures.size();
      problem.captures.push_back(info);
    }
    PhaseTimes phases;
    for (const Target target : {Target::kCpu, Target::kCuda}) {
      auto made = std::make_unique<Frontend>(phases);
      EXPECT_TRUE(made->run_backward(problem, {}, target)) << text << "\n" << made->error();
      frontends.push_back(std::move(made));
    }
  }

  std::string text;
  dsl::Expr expr;
  std::vector<dsl::CaptureView> views;
  ModProblem problem;
  std::vector<std::unique_ptr<Frontend>> frontends;
};

struct Counts {
  int compared = 0, unspecified = 0, row_shifts = 0;
};

// What is called a row shift is the same everywhere along the row, and a multiple of the gradient.
void expect_right_row_shifts(const Case& made, const Point& point, Counts* counts) {
  Point elsewhere = point;
  elsewhere.score = 0.375 - point.score;
  elsewhere.kv_idx = 19 - point.kv_idx;
  for (const std::unique_ptr<Frontend>& frontend : made.frontends) {
    Evaluator evaluator(frontend->function(), made.views);
    const Places here = evaluator.at(point, 0.75).row_shifts, there = evaluator.at(elsewhere, 1.5).row_shifts;
    ASSERT_EQ(here.size(), there.size()) << made.text;
    for (const auto& [place, value] : here) {
      const auto found = there.find(place);
      ASSERT_NE(found, there.end()) << made.text;
      ++counts->row_shifts;
      if (std::isfinite(value))
        EXPECT_EQ(2 * value, found->second) << made.text << "\n" << text_of(frontend->function());
    }
  }
}

// Whether both functions give the oracle's gradients at `point`. What the oracle has no finite number for may be
// anything, and so may all that comes from a modified score that is not finite: its row is poisoned, or its `grad` is
// 0.
void expect_right(const Case& made, const Point& point, Counts* counts) {
  dsl::Derivative derivative(made.expr, made.views);
  const dsl::Element element = dsl::Interpreter(made.expr, made.views).score_mod(point);
  const bool kept = element.keep;
  for (const double grad : {0.0, 0.75, -3.0}) {
    const dsl::ElementGradient gold = derivative.at(point, grad);
    Places expected;
    for (const dsl::Contribution& each : gold.contributions) {
      std::int64_t offset = 0;
      const dsl::CaptureView& view = made.views[static_cast<std::size_t>(each.capture)];
      for (int d = 0; d < view.rank; ++d) offset = offset * view.extent[d] + each.index[d];
      expected[{each.capture, offset}] += each.value;
    }
    for (const std::unique_ptr<Frontend>& frontend : made.frontends) {
      Gradients found = Evaluator(frontend->function(), made.views).at(point, kept ? grad : 0.0);
      EXPECT_EQ(found.keep, kept) << made.text;
      const auto compare = [&](double ours, double gold_value, const std::string& what) {
        if (!std::isfinite(gold_value) || (kept && grad != 0.0 && !std::isfinite(element.value))) {
          ++counts->unspecified;
          return;
        }
        ++counts->compared;
        // Literals that the derivative makes are rounded to float32. Nothing is exactly nothing.
        const double tolerance = grad == 0.0 || !kept ? 0.0 : 1e-5 * std::abs(gold_value) + 1e-6;
        if (std::abs(ours - gold_value) <= tolerance) return;
        ADD_FAILURE() << made.text << "\n  d " << what << " for " << grad << " at score " << point.score << " q_idx "
                      << point.q_idx << " kv_idx " << point.kv_idx << " b " << point.b << " h " << point.h << ": "
                      << ours << ", expected " << gold_value << "\n"
                      << text_of(frontend->function());
      };
      compare(found.dscore, gold.dscore, "score");
      for (const auto& [place, value] : found.captured) expected.try_emplace(place, 0.0);
      for (const auto& [place, value] : expected)
        compare(found.captured[place], value, made.expr.captures[static_cast<std::size_t>(place.first)].name);
    }
  }
}

std::vector<Point> edge_points() {
  std::vector<Point> points;
  for (const double score : {0.0, 0.5, -0.5, 1.0, -1.0, 2.0, 3.75, -3.25, 30.0, -30.0, 100.0, -100.0, 0x1p-10, 1e10,
                             std::numeric_limits<double>::infinity(), -std::numeric_limits<double>::infinity(),
                             std::numeric_limits<double>::quiet_NaN()})
    for (const std::int64_t q : {2, 7}) points.push_back({.score = score, .b = 1, .h = 2, .q_idx = q, .kv_idx = 5});
  return points;
}

TEST(CompilerDifferentiate, AgreesWithTheOracle) {
  const test::Captures captures{
      {"g", test::captured<float>(DType::kF32, {}, {1.5f})},
      {"lo", test::captured<float>(DType::kF32, {}, {-1.0f})},
      {"hi", test::captured<float>(DType::kF32, {}, {2.0f})},
      {"t", test::captured<float>(DType::kF32, {4}, {0.5f, -1.0f, 2.0f, 0.0f})},
      {"u", test::captured<float>(DType::kF32, {5, 20}, std::vector<float>(100, 0.25f))},
      {"ids", test::captured<std::int32_t>(DType::kInt32, {20},
                                           {3, 1, 2, 0, 7, 1, 1, -4, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10})}};
  const std::vector<std::string> texts{
      "score",
      "-score + 2 * score - score / 3 + h",
      "score * score * 0.25 + score ** 3",
      "4 / score + score / (h + 1) + (q_idx - kv_idx) / score",
      "score // 0.3 + score % 0.7 + score % -2.5 + 7.5 % score + (score - 3) % g + g % (score + 0.25)",
      "score ** 0 + score ** 1 + score ** 0.5 + score ** 4 + score ** -1 + score ** 2.5 + score ** 5",
      "2 ** score + g ** score + score ** g + (score - 0.5) ** (h - 2) + 0.0 ** score + score ** t[3]",
      "exp(score) + exp2(score) + log(score) + log2(score) + log1p(score) + sqrt(score) + rsqrt(score)",
      "exp(-score) * exp(score) + exp2(g * score)",
      "log1p(abs(score)) + sqrt(abs(score) + g) + rsqrt(score * score + 1)",
      "30 * tanh(score / 30) + tanh(score) + tanh(1 / score) + tanh(t[h] * score)",
      "sigmoid(score) + silu(score) + sigmoid(20 * score) + silu(-20 * score) + score * sigmoid(t[h])",
      "1 / (1 + exp(-score)) + g / (exp(-score) + 1) + (score + 1) / (1 + exp(-(score * g)))",
      "gelu(score) + gelu(-score * 3) + erf(score) + sin(score) + cos(score * g) + gelu(1e-20 * score)",
      "floor(score) + ceil(score) + round(score) + sign(score) + float(int(score)) + float(score > 0)",
      "min(score, 2) + max(score, -1) + min(score, score) + max(2, 2 * score, score) + min(score, g, hi)",
      "clamp(score, -1, 3) + clamp(score, lo, hi) + clamp(score, hi, lo) + clamp(0, score, hi) + clamp(4, 1, score)",
      "clamp(lo, score, hi) + clamp(score, lo, hi) * clamp(hi, score, lo)",
      "abs(score) + relu(score) + relu(-score) + abs(score - g) + relu(g - score)",
      "where(score > 0, log(score), score) + where(score > 1, sqrt(score - 1), 0)",
      "where(q_idx >= kv_idx, where(score < 1, 1 / score, score), where(score < 1, score, exp(score)))",
      "where(h == 2, score, nan * score) + min(score, 1 / (score - 1) ** 2)",
      "relu(sqrt(score)) + clamp(1 / score, -1, 1) + max(score, -1 / score) + relu(-exp(-log(score)))",
      "sqrt(score * score) + sqrt(score) * sqrt(score)",
      "let x = score * score; let y = where(score > 0, x, 2 * x); y + x * y",
      "let x = 1 / score; where(score > 0, x, 0) + where(score < -1, x * x, 0)",
      "where(q_idx >= kv_idx, score, -inf) + t[h] + where(score > 0, score * t[h - 1], -inf)",
      "tanh(where(q_idx >= kv_idx, score, -inf)) + 2 * where(score > 0, log(score), -inf)",
      "score + u[h, q_idx] + u[h, kv_idx] + u[h, q_idx - kv_idx + 7] * 0.5 - t[-3] + g",
      "score * u[h, q_idx] + u[h, q_idx] * t[b] + g * g - u[h, q_idx]",
      "score + t[ids[q_idx]] + t[ids[kv_idx]] * ids[h] + t[int(score)] * score",
      "let x = t[h]; x * x + x * score + where(q_idx > 3, x, t[b]) * where(kv_idx > 3, 2, x)",
      "where(t[h] > 1, t[h] * g, t[b] / g) + max(t[b], g) + clamp(g, t[h], hi) + score",
      "inf * score + where(score > 0, score * inf, score)",
      "score * 1e30 * 1e-30 + score / 1e-40 * 1e-40 + score / 1e20 / 1e20",
  };
  Counts counts;
  for (const std::string& text : texts) {
    const Case made(text, captures);
    for (const Point& point : edge_points()) expect_right(made, point, &counts);
  }
  EXPECT_GT(counts.compared, 6 * counts.unspecified);
}

TEST(CompilerDifferentiate, RandomExpressionsAgreeWithTheOracle) {
  std::mt19937_64 random(44);
  Counts counts;
  for (int i = 0; i < 400; ++i) {
    const test::RandomExpression expression =
        test::random_expression(random, {.size = 2 + i % 20, .moderate = i % 3 != 0});
    const test::Captures captures = test::random_captures(random, expression);
    const Case made(expression.text, captures);
    for (int p = 0; p < 20; ++p) {
      const Point point = test::random_point(random);
      expect_right(made, point, &counts);
      expect_right_row_shifts(made, point, &counts);
    }
  }
  EXPECT_GT(counts.compared, 3 * counts.unspecified);
  EXPECT_GT(counts.row_shifts, 1000);
}

// ---- Facts

// Of what was refused.
template <typename T>
std::string message_of(const CompileResult<T>& result) {
  return result.error ? result.error->message : "no error";
}

ModFacts facts_of(const std::string& expression,
                  Shape shape = {.batch = 2, .num_heads = 4, .seqlen_q = 64, .seqlen_kv = 96}) {
  const auto zeros = [](std::int64_t n) { return std::vector<float>(static_cast<std::size_t>(n)); };
  Mod mod(expression,
          {Tensor::of<float>("g", DType::kF32, {}, {1.0f}), Tensor::of<float>("t", DType::kF32, {4}, zeros(4)),
           Tensor::of<float>("row", DType::kF32, {64}, zeros(64)),
           Tensor::of<float>("column", DType::kF32, {96}, zeros(96)),
           Tensor::of<float>("table", DType::kF32, {4, 159}, zeros(4 * 159)),
           Tensor::of<float>("plane", DType::kF32, {64, 96}, zeros(64 * 96)),
           Tensor::of<float>("heads", DType::kF32, {4, 64, 96}, zeros(4 * 64 * 96)),
           Tensor::of<float>("full", DType::kF32, {2, 4, 64, 96}, zeros(8 * 64 * 96)),
           Tensor::of<std::int32_t>("ids", DType::kInt32, {64}, std::vector<std::int32_t>(64))},
          shape);
  for (std::size_t i = 0; i < mod.problem.captures.size(); ++i)
    if (mod.problem.captures[i].dtype == DType::kF32) mod.problem.gradients |= 1u << i;
  const CompileResult<ModFacts> result = analyze_gradients(mod.problem);
  EXPECT_FALSE(result.error) << message_of(result);
  return result.value;
}

SinkFacts sink_of(const std::string& expression,
                  Shape shape = {.batch = 2, .num_heads = 4, .seqlen_q = 64, .seqlen_kv = 96}) {
  const ModFacts facts = facts_of(expression, shape);
  EXPECT_EQ(facts.sinks.size(), 1u) << expression << "\n" << facts.canonical_mlir;
  return facts.sinks.empty() ? SinkFacts{} : facts.sinks.front();
}

TEST(CompilerDifferentiate, SaysWhatAnElementNeeds) {
  EXPECT_EQ(facts_of("score").gradient_need, GradientNeed::kNothing);
  EXPECT_EQ(facts_of("where(q_idx >= kv_idx, score + heads[h, q_idx, kv_idx], -inf)").gradient_need,
            GradientNeed::kNothing);
  EXPECT_EQ(facts_of("score * 2").gradient_need, GradientNeed::kFactor);
  EXPECT_EQ(facts_of("where(q_idx > kv_idx, score, 2 * score)").gradient_need, GradientNeed::kFactor);
  EXPECT_EQ(facts_of("score * h + g").gradient_need, GradientNeed::kFactor);
  EXPECT_EQ(facts_of("score * t[h]").gradient_need, GradientNeed::kScore);
  EXPECT_EQ(facts_of("tanh(score)").gradient_need, GradientNeed::kScore);
  EXPECT_EQ(facts_of("relu(score)").gradient_need, GradientNeed::kScore);
  const ModFacts facts = facts_of("where(score > 0, score + g, -inf)");
  EXPECT_EQ(facts.score_class, ScoreClass::kAffine);
  EXPECT_TRUE(facts.has_mask);
  EXPECT_TRUE(facts.mask_reads_score);
}

TEST(CompilerDifferentiate, SaysWhatAPlaceDependsOn) {
  EXPECT_EQ(sink_of("score * t[h]").level, SinkLevel::kBlock);
  EXPECT_EQ(sink_of("score * g").level, SinkLevel::kBlock);
  EXPECT_EQ(sink_of("score * row[q_idx]").level, SinkLevel::kRow);
  EXPECT_EQ(sink_of("score + column[kv_idx]").level, SinkLevel::kColumn);
  EXPECT_EQ(sink_of("score + table[h, q_idx - kv_idx + 95]").level, SinkLevel::kDiagonal);
  EXPECT_EQ(sink_of("score + table[h, abs(kv_idx - q_idx)]").level, SinkLevel::kDiagonal);
  EXPECT_EQ(sink_of("score + t[clamp(q_idx - kv_idx + 2, 0, 3)]").level, SinkLevel::kDiagonal);
  EXPECT_EQ(sink_of("score + plane[q_idx, kv_idx]").level, SinkLevel::kElement);
  EXPECT_EQ(sink_of("score + table[h, q_idx + kv_idx]").level, SinkLevel::kElement);
  EXPECT_EQ(sink_of("score + table[0, q_idx - kv_idx + q_idx]").level, SinkLevel::kElement);
  const SinkFacts by_data = sink_of("score * t[ids[q_idx]]");
  EXPECT_EQ(by_data.level, SinkLevel::kRow);
  EXPECT_TRUE(by_data.data_dependent);
  EXPECT_TRUE(sink_of("score + t[int(score)]").data_dependent);
  EXPECT_EQ(sink_of("score + t[int(score)]").level, SinkLevel::kElement);
  EXPECT_FALSE(sink_of("score + column[kv_idx]").data_dependent);
}

TEST(CompilerDifferentiate, FindsRowShifts) {
  for (const char* text : {"score + row[q_idx]", "score + g", "score - 2 * t[h]", "score + t[ids[q_idx]] / (h + 1)",
                           "where(q_idx > kv_idx, score, -inf) + where(q_idx > 3, row[q_idx], 0)",
                           "let x = score + row[q_idx]; where(q_idx > kv_idx, x, x + 1)"})
    EXPECT_TRUE(sink_of(text).row_shift) << text;
  for (const char* text : {"score * row[q_idx]", "score + row[kv_idx]", "score + row[q_idx] * kv_idx",
                           "score + where(q_idx > kv_idx, row[q_idx], 0)", "max(score, row[q_idx])",
                           "let x = score + row[q_idx]; where(q_idx > kv_idx, x, 2 * x)"})
    EXPECT_FALSE(sink_of(text).row_shift) << text;
  // One read in both ways.
  const ModFacts both = facts_of("score * row[q_idx] + row[q_idx]");
  ASSERT_EQ(both.sinks.size(), 2u);
  EXPECT_TRUE(both.sinks[0].row_shift);
  EXPECT_FALSE(both.sinks[1].row_shift);
}

TEST(CompilerDifferentiate, ProvesThatPlacesAreNotShared) {
  EXPECT_TRUE(sink_of("score + full[b, h, q_idx, kv_idx]").injective);
  EXPECT_FALSE(sink_of("score + heads[h, q_idx, kv_idx]").injective);  // shared by the batch
  EXPECT_TRUE(sink_of("score + heads[h, q_idx, kv_idx]", {.batch = 1, .num_heads = 4, .seqlen_q = 64, .seqlen_kv = 96})
                  .injective);
  const Shape one{.batch = 1, .num_heads = 1, .seqlen_q = 64, .seqlen_kv = 96};
  EXPECT_TRUE(sink_of("score + plane[q_idx, kv_idx]", one).injective);
  EXPECT_TRUE(sink_of("score + plane[63 - q_idx, kv_idx]", one).injective);
  EXPECT_TRUE(sink_of("score + heads[0, q_idx, (kv_idx + q_idx) - q_idx]", one).injective);
  EXPECT_FALSE(sink_of("score + plane[q_idx, q_idx]", one).injective);
  EXPECT_FALSE(sink_of("score + plane[q_idx // 2, kv_idx]", one).injective);
  EXPECT_FALSE(sink_of("score + plane[q_idx, kv_idx + 1]", one).injective);  // clamped
  EXPECT_FALSE(sink_of("score + plane[ids[q_idx], kv_idx]", one).injective);
  EXPECT_FALSE(sink_of("score + table[0, q_idx - kv_idx + 95]", one).injective);
  for (const SinkFacts& sink : facts_of("score + plane[q_idx, kv_idx] * plane[q_idx, 0]", one).sinks)
    EXPECT_FALSE(sink.injective);
}

TEST(CompilerDifferentiate, AnExpressionHasOneHash) {
  const ModFacts a = facts_of("score + t[h] * 2"), b = facts_of("2 * t[h] + score"), c = facts_of("score + t[h]");
  EXPECT_EQ(a.hash_low, b.hash_low);
  EXPECT_EQ(a.canonical_mlir, b.canonical_mlir);
  EXPECT_NE(a.hash_low, c.hash_low);
}

TEST(CompilerDifferentiate, RefusesGradientsOfWhatHasNone) {
  Mod mod("score + t[h] * ids[h]", {Tensor::of<float>("t", DType::kF32, {4}, std::vector<float>(4)),
                                    Tensor::of<std::int32_t>("ids", DType::kInt32, {4}, {0, 1, 2, 3})});
  mod.problem.gradients = 2;
  const CompileResult<ModFacts> ints = analyze_gradients(mod.problem);
  EXPECT_THAT(message_of(ints), HasSubstr("the gradient of capture 1 is wanted, which is no floating tensor"));
  mod.problem.gradients = 4;
  const CompileResult<ModFacts> unknown = analyze_gradients(mod.problem);
  EXPECT_THAT(message_of(unknown), HasSubstr("capture 2"));
}

}  // namespace
}  // namespace attnjit::compiler::testing
