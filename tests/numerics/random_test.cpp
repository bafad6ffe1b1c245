// Every expression over random shapes, types and layouts, on every backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <string>

#include "tests/numerics/check.h"
#include "tests/numerics/expressions.h"
#include "tests/numerics/random_case.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

// A shape on which an expression shows what it is: some tiles, some heads, both a part of a tile at the end.
Case shape_of(std::size_t number) {
  Case spec = random_case(1000 + number);
  spec.batch = 2;
  spec.num_heads = 4;
  spec.num_heads_kv = 2;
  spec.seqlen_q = number % 2 == 0 ? 70 : 45;
  spec.seqlen_kv = number % 3 == 0 ? 165 : 90;
  spec.head_dim = 32;
  spec.head_dim_v = 24;
  spec.dtype = kDTypes[number % 3];
  spec.inputs = Inputs::kNormal;
  spec.scale.reset();
  spec.threads = 2;
  spec.rows = 192;
  return served_case(spec);
}

struct Row {
  const Expression* expression;
  std::size_t number;
  std::string backend;
};

std::vector<Row> every_expression() {
  std::vector<Row> rows;
  for (const std::string& backend : target().backends) {
    std::size_t number = 0;
    for (const auto table : {registry_expressions(), other_expressions()}) {
      for (const Expression& expression : table) rows.push_back({&expression, number++, backend});
    }
  }
  return rows;
}

class NumericsExpression : public testing::TestWithParam<Row> {};

TEST_P(NumericsExpression, MeetsTheRules) {
  const auto& [expression, number, backend] = GetParam();
  Case spec = with_expression(shape_of(number), expression->fields);
  spec.backend = backend;
  const Check check = check_case(spec, nullptr, true);
  ASSERT_TRUE(check.accepted) << check.message;
  EXPECT_TRUE(expression->allows(check.verdict.undecided, check.verdict.judged))
      << check.message << "\n  --case '" << to_line(spec) << "'";
}

INSTANTIATE_TEST_SUITE_P(All, NumericsExpression, testing::ValuesIn(every_expression()), [](const auto& info) {
  return std::string(info.param.expression->name) + "_" + info.param.backend;
});

class NumericsRandom : public testing::TestWithParam<int> {};

TEST_P(NumericsRandom, ShapesMeetTheRules) {
  const auto registry = registry_expressions();
  const auto others = other_expressions();
  for (int i = 0; i < 20; ++i) {
    const auto seed = 20 * static_cast<std::uint64_t>(GetParam()) + static_cast<std::uint64_t>(i);
    Case spec = served_case(random_case(seed));
    Random random(seed ^ 0x65787072);
    const Expression& expression = random.between(0, 1) == 0 ? random.pick(registry) : random.pick(others);
    spec = with_expression(spec, expression.fields);
    spec.backend = target().pick(random.between(0, 3) == 0);
    const Check check = check_case(spec);
    EXPECT_TRUE(check.accepted) << check.message;
  }
}

// Each problem of a GPU costs half a second of compiling, where no cache has its binary; Hopper's kernels, two of each,
// cost four times as much.
int most_seeds(int of_cpu) { return target().is_partial() ? 4 : target().on_gpu() ? 12 : of_cpu; }

INSTANTIATE_TEST_SUITE_P(Seeds, NumericsRandom, testing::Range(0, most_seeds(24)));
INSTANTIATE_TEST_SUITE_P(Slow, NumericsRandom, testing::Range(100, 200));

class NumericsGenerated : public testing::TestWithParam<int> {};

TEST_P(NumericsGenerated, ExpressionsMeetTheRules) {
  for (int i = 0; i < 20; ++i) {
    const auto seed = 20 * static_cast<std::uint64_t>(GetParam()) + static_cast<std::uint64_t>(i);
    Case spec = served_case(random_case(seed ^ 0x67656e));
    spec.head_dim = std::min<std::int64_t>(spec.head_dim, 64);
    spec.head_dim_v = std::min<std::int64_t>(spec.head_dim_v, 64);
    spec.rows = 32;
    const int style = static_cast<int>(seed % 3);
    spec = with_generated_expression(spec, seed, style);
    spec.backend = target().pick(seed % 4 == 0);
    const Check check = check_case(spec);
    EXPECT_TRUE(check.accepted) << check.message;
    // Moderate values of moderate scores, without jumps: nothing may be left out. A position's square is not moderate.
    const bool is_moderate = spec.inputs != Inputs::kLarge && spec.score_mod.find("**") == std::string::npos;
    if (style == 0 && is_moderate) {
      EXPECT_EQ(check.verdict.undecided, 0) << check.message << "\n  --case '" << to_line(spec) << "'";
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, NumericsGenerated, testing::Range(0, most_seeds(30)));
INSTANTIATE_TEST_SUITE_P(Slow, NumericsGenerated, testing::Range(100, 300));

// Every instruction set the machine has gives a result within the rules, on the shapes that fill and do not fill tiles.
TEST(NumericsIsa, EveryInstructionSetMeetsTheRules) {
  if (target().on_gpu()) GTEST_SKIP() << "of the CPU";
  for (const std::string& isa : host_isas()) {
    attnjit_context* const context = shared_context(2, isa);
    ASSERT_NE(context, nullptr) << isa << ": " << attnjit_last_error();
    for (
        const char* const fields :
        {R"_(score_mod="noop")_", R"_(score_mod="causal")_", R"_(score_mod="softcap(3)")_",
         R"_(score_mod="score + gelu(score) - log(abs(score) + 1) + sin(score)")_",
         R"_(score_mod="where(kv_idx // 5 % 2 == 0, score + bias[h, q_idx - kv_idx], -inf)" capture=bias:float16:Hx65:packed:normal)_",
         R"_(score_mod="score * t[kv_idx, q_idx] % 2.5" capture=t:int8:KxQ:padded:poison)_"}) {
      for (const dsl::DType dtype : kDTypes) {
        for (const std::int64_t length : {33, 128}) {
          Case spec = with_expression({.batch = 2,
                                       .num_heads = 4,
                                       .num_heads_kv = 2,
                                       .seqlen_q = length,
                                       .seqlen_kv = 96 + length,
                                       .head_dim = length == 33 ? 72 : 64,
                                       .head_dim_v = length == 33 ? 40 : 64,
                                       .dtype = dtype,
                                       .rows = 32,
                                       .seed = 5},
                                      fields);
          const Check check = check_case(spec, context);
          EXPECT_TRUE(check.accepted) << "ATTNJIT_CPU_ISA=" << isa << ": " << check.message;
        }
      }
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
