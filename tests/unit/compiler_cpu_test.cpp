// Compiled mods against the interpreter, point by point.
#include <cmath>
#include <limits>
#include <random>

#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;
using dsl::Point;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLn2 = 0.69314718055994530942;

std::vector<Point> points(const Shape& shape, bool specials = false) {
  std::mt19937 random(1);
  std::normal_distribution<double> score(0.0, 3.0);
  std::vector<Point> result;
  const double special[] = {0.0, -0.0, kInfinity, -kInfinity, std::nan(""), 1e-30, -1e30, 2e38, 0.5, -1.5, 2.5};
  for (int i = 0; i < 533; ++i) {
    const double s = specials && i % 3 == 0 ? special[(i / 3) % 11] : score(random);
    result.push_back({.score = static_cast<float>(s),
                      .b = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.batch)),
                      .h = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.num_heads)),
                      .q_idx = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.seqlen_q)),
                      .kv_idx = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.seqlen_kv))});
  }
  return result;
}

std::vector<CpuIsa> isas() {
  std::vector<CpuIsa> result;
  for (const CpuIsa isa : {CpuIsa::kSse2, CpuIsa::kAvx2, CpuIsa::kAvx512})
    if (isa <= host_cpu_isa()) result.push_back(isa);
  return result;
}

// `tolerance` is relative to the largest of 1 and the value's magnitude.
void expect_equal(const std::string& text, std::vector<Tensor> tensors = {}, Shape shape = {}, bool specials = false,
                  double tolerance = 3e-6) {
  SCOPED_TRACE(text);
  const Mod mod(text, std::move(tensors), shape);
  if (::testing::Test::HasFatalFailure() || mod.problem.score_mod.root < 0) return;
  const std::vector<Point> where = points(shape, specials);
  dsl::Interpreter interpreter(mod.problem.score_mod, mod.views);
  for (const CpuIsa isa : isas()) {
    SCOPED_TRACE(std::string(cpu_isa_name(isa)));
    const Elementwise compiled(mod, isa);
    const std::vector<float> values = compiled.log2_values(where);
    int wrong = 0;
    for (std::size_t i = 0; i < where.size() && wrong < 3; ++i) {
      const dsl::Element expected = interpreter.score_mod(where[i]);
      const double actual = static_cast<double>(values[i]) * kLn2, value = static_cast<float>(expected.value);
      const bool equal = std::isnan(value)   ? std::isnan(actual)
                         : std::isinf(value) ? actual == value
                                             : std::abs(actual - value) <= tolerance * std::max(1.0, std::abs(value));
      if (equal) continue;
      ++wrong;
      ADD_FAILURE() << "score " << where[i].score << " b " << where[i].b << " h " << where[i].h << " q "
                    << where[i].q_idx << " kv " << where[i].kv_idx << ": " << actual << ", expected " << value;
    }
  }
}

TEST(CompilerCpu, BuiltinMods) {
  for (const char* text : {"noop", "causal", "rel", "head_bias", "softcap(20)", "sliding_window(7)", "prefix_lm(5)"})
    expect_equal(text, {}, {}, true);
  expect_equal("alibi", {Tensor::of<float>("alibi_slopes", DType::kF32, {4}, {0.5f, 0.25f, 0.125f, 0.0625f})}, {},
               true);
}

}  // namespace
}  // namespace attnjit::compiler::testing
