// The gradients of every expression, over the shapes, types and layouts of the forward, on every backend.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "tests/numerics/check.h"
#include "tests/numerics/expressions.h"
#include "tests/numerics/random_case.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

void expect_accepted(const std::string& line) {
  const Check check = check_case(parse(line), nullptr, true);
  EXPECT_TRUE(check.accepted) << check.message;
  EXPECT_EQ(check.undecided(), 0) << check.message;
}

// A shape on which a gradient shows what it is: some tiles, some heads, both a part of a tile at the end.
Case shape_of(std::size_t number) {
  Case spec = random_case(1000 + number);
  spec.batch = 2;
  spec.num_heads = 2;
  spec.num_heads_kv = 1;
  spec.seqlen_q = number % 2 == 0 ? 70 : 45;
  spec.seqlen_kv = number % 3 == 0 ? 140 : 75;
  spec.head_dim = 32;
  spec.head_dim_v = 24;
  spec.dtype = kDTypes[number % 3];
  spec.inputs = Inputs::kNormal;
  spec.scale.reset();
  spec.threads = 2;
  return spec;
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
    for (const auto table : {registry_expressions(), learnable_expressions(), other_expressions()}) {
      for (const Expression& expression : table) rows.push_back({&expression, number++, backend});
    }
  }
  return rows;
}

class NumericsBackwardExpression : public testing::TestWithParam<Row> {};

TEST_P(NumericsBackwardExpression, MeetsTheRules) {
  const auto& [expression, number, backend] = GetParam();
  Case spec = with_all_gradients(with_expression(shape_of(number), expression->fields));
  spec.backward.grad_lse = number % 2 == 0;
  spec.backward.deterministic = number % 5 == 0;
  spec.backend = backend;
  const Check check = check_case(spec, nullptr, true);
  ASSERT_TRUE(check.accepted) << check.message;
  EXPECT_TRUE(expression->allows(check.undecided(), check.judged()))
      << check.message << "\n  --case '" << to_line(spec) << "'";
}

INSTANTIATE_TEST_SUITE_P(All, NumericsBackwardExpression, testing::ValuesIn(every_expression()), [](const auto& info) {
  return std::string(info.param.expression->name) + "_" + info.param.backend;
});

class NumericsBackwardRandom : public testing::TestWithParam<int> {};

TEST_P(NumericsBackwardRandom, ShapesMeetTheRules) {
  const auto registry = registry_expressions(), learnable = learnable_expressions(), others = other_expressions();
  for (int i = 0; i < 10; ++i) {
    const auto seed = 10 * static_cast<std::uint64_t>(GetParam()) + static_cast<std::uint64_t>(i);
    Random random(seed ^ 0x65787072);
    const std::int64_t table = random.between(0, 3);
    const Expression& expression = table == 0   ? random.pick(registry)
                                   : table == 1 ? random.pick(others)
                                                : random.pick(learnable);
    Case spec = with_random_gradients(with_expression(random_case_of(40000, seed), expression.fields), seed);
    spec.backend = target().pick(random.between(0, 3) == 0);
    const Check check = check_case(spec);
    EXPECT_TRUE(check.accepted) << check.message;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, NumericsBackwardRandom, testing::Range(0, 16));
INSTANTIATE_TEST_SUITE_P(Slow, NumericsBackwardRandom, testing::Range(100, 160));

class NumericsBackwardGenerated : public testing::TestWithParam<int> {};

TEST_P(NumericsBackwardGenerated, ExpressionsMeetTheRules) {
  for (int i = 0; i < 20; ++i) {
    const auto seed = 20 * static_cast<std::uint64_t>(GetParam()) + static_cast<std::uint64_t>(i);
    Case spec = random_case_of(8000, seed ^ 0x67656e);
    spec.head_dim = std::min<std::int64_t>(spec.head_dim, 48);
    spec.head_dim_v = std::min<std::int64_t>(spec.head_dim_v, 48);
    const int style = static_cast<int>(seed % 3);
    spec = with_random_gradients(with_generated_expression(spec, seed, style), seed);
    spec.backend = target().pick(seed % 4 == 0);
    const Check check = check_case(spec);
    EXPECT_TRUE(check.accepted) << check.message;
    // Moderate values without jumps: nothing may be left out.
    if (style == 0) {
      EXPECT_EQ(check.undecided(), 0) << check.message;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, NumericsBackwardGenerated, testing::Range(0, 15));
INSTANTIATE_TEST_SUITE_P(Slow, NumericsBackwardGenerated, testing::Range(100, 200));

// Every instruction set that the machine has.
TEST(NumericsBackwardIsa, EveryInstructionSetMeetsTheRules) {
  if (target().on_gpu()) GTEST_SKIP() << "of the CPU";
  for (const std::string& isa : host_isas()) {
    attnjit_context* const context = shared_context(2, isa);
    ASSERT_NE(context, nullptr) << isa << ": " << attnjit_last_error();
    for (
        const char* const fields :
        {R"_(score_mod="noop")_", R"_(score_mod="softcap(3)" mask_mod="causal")_",
         R"_(score_mod="score + gelu(score) - log(abs(score) + 1) + sin(score)")_",
         R"_(score_mod="where(kv_idx // 5 % 2 == 0, score + bias[h, q_idx - kv_idx], -inf)" capture=bias:float16:Hx65:packed:normal)_",
         R"_(score_mod="score * t[kv_idx] + u[off[q_idx, kv_idx]]" capture=t:bfloat16:K:packed:normal capture=u:float32:9:packed:normal capture=off:int32:QxK:packed:index)_"}) {
      for (const dsl::DType dtype : kDTypes) {
        for (const std::int64_t length : {33, 64}) {
          const Case spec = with_all_gradients(with_expression({.batch = 1,
                                                                .num_heads = 2,
                                                                .num_heads_kv = 1,
                                                                .seqlen_q = length,
                                                                .seqlen_kv = 64 + length,
                                                                .head_dim = length == 33 ? 72 : 64,
                                                                .head_dim_v = length == 33 ? 40 : 64,
                                                                .dtype = dtype,
                                                                .seed = 5},
                                                               fields));
          const Check check = check_case(spec, context);
          EXPECT_TRUE(check.accepted) << "ATTNJIT_CPU_ISA=" << isa << ": " << check.message;
        }
      }
    }
  }
}

// The lengths and head dims on either side of what kernels are made for.
TEST(NumericsBackwardShape, LengthsAndHeadDims) {
  constexpr std::int64_t kLengths[] = {1, 37, 256, 277};
  constexpr std::int64_t kHeadDims[] = {16, 64, 80, 128, 192, 256};
  std::size_t number = 0;
  for (const std::string& backend : target().backends) {
    for (const std::int64_t length : kLengths) {
      for (const std::int64_t head_dim : kHeadDims) {
        ++number;
        const bool grouped = length < 256;
        Case spec = with_all_gradients(with_expression(
            {.batch = 1,
             .num_heads = grouped ? 2 : 1,
             .num_heads_kv = 1,
             .seqlen_q = length,
             .seqlen_kv = number % 3 == 0 ? 300 - length : length,
             .head_dim = head_dim,
             .head_dim_v = number % 4 == 0 ? 64 : head_dim,
             .dtype = kDTypes[number % 3],
             .backend = backend},
            R"_(score_mod="score + t[h, q_idx - kv_idx + 63]" mask_mod="causal" capture=t:float32:Hx128:packed:normal)_"));
        spec.backward.grad_lse = number % 2 == 0;
        const Check check = check_case(spec);
        EXPECT_TRUE(check.accepted) << check.message;
      }
    }
  }
}

// Masks that leave whole tiles out and keep whole tiles, below a captured gradient of each level: what is not looked at
// adds nothing, and what is carried from tile to tile ends with the last that is.
TEST(NumericsBackwardShape, MasksThatLeaveTilesOut) {
  constexpr struct {
    const char* mask;
    const char* captured = "";
  } kMasks[] = {{"causal"},
                {"q_idx + 100 >= kv_idx"},
                {"q_idx - 90 >= kv_idx"},
                {"kv_idx - q_idx >= 70"},
                {"sliding_window(40)"},
                {"prefix_lm(130)"},
                {"q_idx // 64 == kv_idx // 64"},
                {"(q_idx // 64 + kv_idx // 64) % 2 == 0"},
                {"q_idx < 70 or q_idx >= 260"},
                {"kv_idx < 70 or kv_idx >= 260"},
                {"h == 0 and q_idx >= kv_idx"},
                {"kv_idx < lengths[b]", " capture=lengths:int32:1:packed:index"},
                {"ids[b, q_idx] == ids[b, kv_idx] and q_idx >= kv_idx", " capture=ids:int32:1x330:packed:blocks"}};
  constexpr const char* kAllLevels =
      " capture=slope:float32:2:packed:normal capture=row:float32:1x330:packed:normal "
      "capture=column:float32:330:packed:normal capture=distance:float32:2x660:packed:normal "
      "capture=dense:bfloat16:2x330x330:packed:normal grads=slope,row,column,distance,dense grad_lse=1 "
      "score_mod=\"score * row[b, q_idx] + slope[h] * column[kv_idx] + distance[h, q_idx - kv_idx + 330] + "
      "dense[h, q_idx, kv_idx]\"";
  std::size_t number = 0;
  for (const std::string& backend : target().backends) {
    // More tiles of keys than parts of dQ: a block adds onto its own.
    for (const char* const fields : {"\"causal\"", "\"sliding_window(40)\"", "\"prefix_lm(130)\"",
                                     "\"ids[q_idx] == ids[kv_idx]\" capture=ids:int32:2600:packed:blocks"}) {
      expect_accepted("b=1 hq=2 hkv=1 sq=330 skv=2600 d=32 dtype=bfloat16 deterministic=1 inputs=poisoned backend=" +
                      backend + " backward=dq,dk,dv mask_mod=" + fields);
    }
    for (const auto& [mask, captured] : kMasks) {
      for (const char* const rest : {" inputs=poisoned", kAllLevels}) {
        ++number;
        expect_accepted(std::string("b=1 hq=2 hkv=1 d=") + (number % 3 == 0 ? "80" : "32") +
                        (number % 4 < 2 ? " sq=330 skv=300" : " sq=280 skv=330") + " dtype=" +
                        (number % 5 < 3 ? "bfloat16" : "float32") + " deterministic=" + (number % 3 == 1 ? "1" : "0") +
                        " mask_mod=\"" + mask + "\"" + captured + " backward=dq,dk,dv backend=" + backend + rest);
      }
    }
  }
}

// Odd head dims: none is padded wrongly.
TEST(NumericsBackwardShape, OddHeadDims) {
  for (const std::string& backend : target().backends) {
    for (std::int64_t head_dim = 1; head_dim <= 256; head_dim += head_dim < 20 ? 1 : 23) {
      expect_accepted("b=1 hq=2 hkv=1 sq=19 skv=35 d=" + std::to_string(head_dim) + " dv=" +
                      std::to_string(257 - head_dim) + " dtype=" + (head_dim % 2 == 0 ? "bfloat16" : "float32") +
                      " q=padded k=bshd v=padded grad_out=padded grad_q=padded grad_k=bshd grad_v=padded "
                      "backward=dq,dk,dv backend=" +
                      backend);
    }
  }
}

std::vector<std::string> subsets() {
  return {"backward=dq",    "backward=dk", "backward=dv",         "backward=dq,dk",        "backward=dq,dv",
          "backward=dk,dv", "grads=t",     "backward=dv grads=t", "backward=dq grads=t,s", "grads=s"};
}

TEST(NumericsBackwardShape, AnyPartOfTheGradients) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      for (const std::string& wanted : subsets()) {
        std::string line =
            "b=2 hq=4 hkv=2 sq=37 skv=70 d=32 dv=40 score_mod=\"score * s + t[h, kv_idx]\" "
            "capture=t:float32:4x70:packed:normal capture=s:float32::packed:normal ";
        line.append(wanted).append(" dtype=").append(dtype).append(" backend=").append(backend);
        expect_accepted(line);
      }
    }
  }
}

// A row's gradient where nothing is kept, and a column's, are zero; so are all where there are no keys.
TEST(NumericsBackwardEdge, NothingKeptGivesZero) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16"}) {
      const std::string rest = std::string(" dtype=") + dtype + " grad_lse=1 backend=" + backend;
      for (const char* const mod : {"where(kv_idx < 0, score, -inf)", "where(kv_idx < 0, score + t[kv_idx], -inf)"}) {
        const bool captures = std::string(mod).find("t[") != std::string::npos;
        Problem problem = make(std::string("b=2 hq=2 hkv=1 sq=35 skv=40 d=16 dv=9 backward=dq,dk,dv score_mod=\"") +
                               mod + "\"" + (captures ? " capture=t:float32:40:packed:normal grads=t" : "") + rest);
        const GoldGradients gold = compute_gold_gradients(problem);
        const BackwardResult result = run_backward(problem, gold.o, gold.lse);
        ASSERT_EQ(result.error, "") << to_line(problem.spec);
        for (const std::vector<double>* const values : in_order(gold, result.gradients)) {
          EXPECT_TRUE(std::ranges::all_of(*values, [](double x) { return x == 0.0; })) << to_line(problem.spec);
        }
      }
      expect_accepted(
          "b=1 hq=2 sq=40 skv=50 d=16 score_mod=\"where(q_idx % 3 != 0 and kv_idx % 4 != 1, score * t[kv_idx], -inf)\" "
          "capture=t:float32:50:packed:normal backward=dq,dk,dv grads=t" +
          rest);
    }
  }
}

TEST(NumericsBackwardEdge, NoKeysOrNoQueries) {
  for (const std::string& backend : target().backends) {
    for (const char* const sizes : {"b=2 hq=2 sq=33 skv=0", "b=2 hq=2 sq=0 skv=33", "b=0 hq=2 sq=8 skv=8",
                                    "b=2 hq=0 hkv=0 sq=8 skv=8", "b=0 hq=0 hkv=0 sq=0 skv=0"}) {
      Problem problem = make(std::string(sizes) +
                             " d=16 dv=8 score_mod=\"score * s + t[h]\" capture=t:float32:2:padded:normal "
                             "capture=s:bfloat16::packed:normal backward=dq,dk,dv grads=t:padded,s backend=" +
                             backend);
      const GoldGradients gold = compute_gold_gradients(problem);
      const BackwardResult result = run_backward(problem, gold.o, gold.lse);
      ASSERT_EQ(result.error, "") << to_line(problem.spec);
      const BackwardVerdict verdict = judge(gold, result.gradients);
      EXPECT_TRUE(verdict.accepted) << summary(verdict) << "\n" << to_line(problem.spec);
      EXPECT_EQ(result.gradients.captures[0], std::vector<double>({0.0, 0.0})) << to_line(problem.spec);
      EXPECT_EQ(result.gradients.captures[1], std::vector<double>({0.0})) << to_line(problem.spec);
    }
  }
}

TEST(NumericsBackwardEdge, OneOfEverything) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
      for (const char* const sizes :
           {"b=1 hq=1 sq=1 skv=1 d=1", "b=1 hq=1 sq=1 skv=1 d=256", "b=1 hq=1 sq=1 skv=257 d=1",
            "b=1 hq=1 sq=257 skv=1 d=3 dv=1", "b=1 hq=2 sq=2 skv=2 d=2 dv=256"}) {
        expect_accepted(std::string(sizes) + " score_mod=\"causal\" backward=dq,dk,dv dtype=" + dtype +
                        " backend=" + backend);
      }
    }
  }
}

// Of a dimension of one element that is read, whatever its index is computed from.
TEST(NumericsBackwardEdge, IndicesIntoOneElement) {
  for (const std::string& backend : target().backends) {
    for (const char* const fields :
         {R"_(score_mod="score + u[int(score)]*1.0" capture=u:float32:1:packed:normal)_",
          R"_(score_mod="score + u[int(score), kv_idx]" capture=u:float32:1x50:packed:normal)_",
          R"_(score_mod="score + u[q_idx, int(score), kv_idx]" capture=u:bfloat16:40x1x50:packed:normal)_"}) {
      expect_accepted(std::string(fields) + " b=1 hq=2 sq=40 skv=50 d=16 backward=dq,dk,dv grads=u backend=" + backend);
    }
  }
}

// What a choice made nothing of, along a row, stays that beside a NaN.
TEST(NumericsBackwardEdge, UnchosenFactorsOfRows) {
  for (const std::string& backend : target().backends) {
    expect_accepted(
        "b=1 hq=2 sq=40 skv=50 d=16 score_mod=\"score + g[kv_idx] * where(q_idx > 7, 1.0, 0.0) + where(q_idx > 3, 0.0, "
        "t[q_idx]) * kv_idx\" capture=g:float32:50:packed:normal capture=t:float32:40:packed:poison backward=dv "
        "grads=g "
        "backend=" +
        backend);
    expect_accepted(
        "b=1 hq=1 sq=40 skv=50 d=16 score_mod=\"score + kv_idx * (x[kv_idx] % 0.1) + t[kv_idx] % y\" "
        "capture=x:float32:50:packed:normal capture=t:float32:50:packed:normal capture=y:float32::packed:normal "
        "backward=dq,dk grads=x,t,y backend=" +
        backend);
  }
}

// A captured tensor that the mask_mod alone reads, or no expression's result, has a gradient of zero.
TEST(NumericsBackwardEdge, WhatIsOnlyAskedAboutHasNoGradient) {
  for (const std::string& backend : target().backends) {
    expect_accepted(
        "b=1 hq=2 sq=40 skv=50 d=16 score_mod=\"where(u[kv_idx] > 1, -inf, score)\" mask_mod=\"t[kv_idx] < 1\" "
        "capture=t:float32:50:packed:normal capture=u:float16:50:padded:normal backward=dq grads=t:padded,u backend=" +
        backend);
  }
}

// Without a gradient that flows into lse, not one bit of a row shift's is set; with one it is the reduction of that.
TEST(NumericsBackwardEdge, RowShiftsAreExact) {
  struct {
    const char* fields;
    std::vector<std::int64_t> kept;  // dimensions of (b, h, q_idx) that stay
  } const shifts[] = {
      {"score_mod=\"score + t[q_idx]\" capture=t:float32:53:packed:normal", {2}},
      {"score_mod=\"score + t[h]\" capture=t:float32:4:packed:normal", {1}},
      {"score_mod=\"score + t[b, q_idx]\" capture=t:float32:2x53:packed:normal", {0, 2}},
      {"score_mod=\"score + t[b, h, q_idx]\" mask_mod=\"causal\" capture=t:float32:2x4x53:padded:normal", {0, 1, 2}},
      {"score_mod=\"softcap(2) + t\" capture=t:float32::packed:normal", {}},
      {"score_mod=\"score * score + t[q_idx]\" mask_mod=\"kv_idx <= q_idx\" capture=t:float32:53:packed:normal", {2}},
  };
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      for (const auto& shift : shifts) {
        const std::string line = std::string("b=2 hq=4 hkv=2 sq=53 skv=70 d=16 ") + shift.fields +
                                 " backward=dq,dk,dv grads=t row_shifts=t dtype=" + dtype + " backend=" + backend;
        Problem without = make(line), with = make(line + " grad_lse=1");
        const GoldGradients gold = compute_gold_gradients(without);
        const BackwardResult none = run_backward(without, gold.o, gold.lse);
        ASSERT_EQ(none.error, "") << line;
        EXPECT_TRUE(std::ranges::all_of(none.gradients.captures[0], [](double x) { return x == 0.0; })) << line;

        const BackwardResult some = run_backward(with, gold.o, gold.lse);
        ASSERT_EQ(some.error, "") << line;
        const Tensor& tensor = with.captures[0].tensor;
        std::vector<double> expected(static_cast<std::size_t>(tensor.size()), 0.0);
        for_each_index(with.grad_lse.shape(), [&](std::span<const std::int64_t> index) {
          std::vector<std::int64_t> place;
          place.reserve(shift.kept.size());
          for (const std::int64_t dimension : shift.kept) place.push_back(index[static_cast<std::size_t>(dimension)]);
          expected[packed_offset(tensor, place)] += with.grad_lse.at(index);
        });
        for (std::size_t at = 0; at < expected.size(); ++at) {
          ASSERT_NEAR(some.gradients.captures[0][at], expected[at], 1e-4) << line << " grad_lse=1, element " << at;
        }
      }
    }
  }
}

// Where keys may be a part of the row's, a row shift is summed over them as anything else is.
TEST(NumericsBackwardEdge, ShiftsOfPartialKeys) {
  std::size_t number = 0;
  for (const std::string& backend : target().backends) {
    for (const Expression& expression : learnable_expressions()) {
      Case spec = with_all_gradients(with_expression(shape_of(number), expression.fields));
      if (spec.backward.row_shifts.empty()) continue;
      spec.backward.grad_lse = ++number % 2 == 0;
      spec.backward.partial_keys = true;
      spec.backend = backend;
      const Check check = check_case(spec);
      EXPECT_TRUE(check.accepted) << check.message;
    }
  }
  EXPECT_GE(number, 10u);
}

// What lies behind a mask, or in a branch that is not taken, never reaches a gradient.
TEST(NumericsBackwardEdge, PoisonBehindMasks) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod : {"where(kv_idx < 40, score, -inf)", "score * score + where(kv_idx < 40, 0, -inf)",
                                  "causal", "sliding_window(5)", "softcap(2) + where(kv_idx % 2 == 0, 0, -inf)"}) {
      expect_accepted(std::string("b=1 hq=2 hkv=1 sq=40 skv=100 d=24 inputs=poisoned score_mod=\"") + mod +
                      "\" backward=dq,dk,dv backend=" + backend);
      expect_accepted(
          std::string("b=1 hq=2 hkv=1 sq=40 skv=100 d=24 dtype=bfloat16 inputs=poisoned score_mod=\"score\" "
                      "mask_mod=\"kv_idx < 33 or kv_idx == 64\" backward=dk,dv backend=") +
          backend);
    }
    for (const char* const mod :
         {R"_(score_mod="where(isnan(t[kv_idx]) or isinf(t[kv_idx]), -inf, score + t[kv_idx])")_",
          R"_(score_mod="score * t[kv_idx]" mask_mod="not (isnan(t[kv_idx]) or isinf(t[kv_idx]))")_",
          R"_(score_mod="where(isnan(t[kv_idx]) or isinf(t[kv_idx]), score, score * t[kv_idx])")_",
          R"_(score_mod="where(t[kv_idx] > 0 and not isinf(t[kv_idx]), score + log(t[kv_idx]), score)")_"}) {
      for (const char* const dtype : {"float32", "bfloat16"}) {
        expect_accepted(std::string("b=1 hq=2 sq=40 skv=60 d=24 ") + mod +
                        " capture=t:float32:60:packed:poison backward=dq,dk,dv grads=t dtype=" + dtype +
                        " backend=" + backend);
      }
    }
  }
}

// Scores of exactly zero: the kinks of docs/backward.md, and the pole of a branch that is not taken.
TEST(NumericsBackwardEdge, KinksAtZero) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod :
         {"where(score > 0, log(score), score)", "abs(score) + score", "relu(score) + 2 * score",
          "max(score, 0) + score", "min(score, 0) - score", "max(score, 0.5 * score)", "clamp(score, 0, 1) + score",
          "clamp(score, -1, 0) + score", "where(score < 0, sqrt(score), 2 * score)",
          "where(score != 0, 1 / score, 3 * score)", "score ** 2 + score", "score ** 1 + score ** 0",
          "max(t[kv_idx], t[kv_idx] + score) + score", "floor(score) + sign(score) + score"}) {
      const bool captured = std::string(mod).find("t[") != std::string::npos;
      expect_accepted(std::string("b=1 hq=2 hkv=1 sq=35 skv=40 d=16 inputs=zero score_mod=\"") + mod + "\"" +
                      (captured ? " capture=t:float32:40:packed:normal grads=t" : "") +
                      " backward=dq,dk,dv backend=" + backend);
    }
  }
}

// A NaN key that is kept reaches the gradients of the rows that keep it, and no other.
TEST(NumericsBackwardEdge, KeptNanReachesItsRows) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod : {"causal", "softcap(3)", "where(q_idx >= kv_idx, abs(score) ** 2, -inf)"}) {
      Problem problem = make(std::string("b=1 hq=2 sq=40 skv=70 d=16 score_mod=\"") + mod +
                             "\" backward=dq,dk,dv backend=" + backend);
      problem.k.set({0, 0, 20, 3}, std::numeric_limits<double>::quiet_NaN());
      const Check check = check_problem(problem);
      EXPECT_TRUE(check.accepted) << check.message << " (with k[0, 0, 20, 3] NaN)";
    }
  }
}

// A value at a key that every row drops may make the forward's o NaN, which a grad_out of 0 does not undo.
TEST(NumericsBackwardEdge, ADroppedValueMayReachAForwardsOwnO) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "float16", "bfloat16"}) {
      for (const char* const mod :
           {R"_(score_mod="where(kv_idx == 20, -inf, score)")_", R"_(mask_mod="kv_idx != 20")_"}) {
        Problem problem = make(std::string("b=1 hq=4 hkv=2 sq=40 skv=70 d=32 ") + mod +
                               " forward=own backward=dq,dk,dv dtype=" + dtype + " backend=" + backend);
        problem.v.set({0, 0, 20, 3}, std::numeric_limits<double>::quiet_NaN());
        for (std::int64_t h = 0; h < 2; ++h) {
          for (std::int64_t i = 0; i < 40; ++i) problem.grad_out.set({0, h, i, 3}, 0.0);
        }
        const Check check = check_problem(problem, nullptr, true);
        EXPECT_TRUE(check.accepted) << check.message << " (with v[0, 0, 20, 3] NaN, and grad_out 0 there)";
      }
    }
  }
}

// As the forward's: rows of NaN, and rows that keep nothing but -infinity.
TEST(NumericsBackwardEdge, InfiniteSlopes) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kSlopes[] = {kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN(), 0.25};
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      for (const char* const mod : {R"_(score_mod="alibi")_", R"_(score_mod="alibi" mask_mod="q_idx > kv_idx")_"}) {
        Problem problem =
            make(std::string("b=1 hq=4 hkv=4 sq=100 skv=70 d=32 ") + mod +
                 " capture=alibi_slopes:float32:4:packed:normal backward=dq,dk,dv grads=alibi_slopes dtype=" + dtype +
                 " backend=" + backend);
        for (std::int64_t h = 0; h < 4; ++h) problem.captures[0].tensor.set({h}, kSlopes[h]);
        const Check check = check_problem(problem, nullptr, true);
        EXPECT_TRUE(check.accepted) << check.message << " (with slopes of infinity, -infinity, NaN and 1/4)";
      }
    }
  }
}

TEST(NumericsBackwardEdge, MoreHeadsThanSixteenBits) {
  for (const std::string& backend : target().backends) {
    expect_accepted(std::string("b=3 hq=22000 hkv=11000 sq=1 skv=2 d=2 dtype=bfloat16 score_mod=\"score + 0.001 * h\" "
                                "backward=dq,dk,dv backend=") +
                    backend);
  }
}

TEST(NumericsBackwardEdge, LongSequences) {
  for (const char* const mod :
       {"causal", "sliding_window(100)", "where(q_idx // 700 == kv_idx // 700, 5 * tanh(score / 5), -inf)"}) {
    expect_accepted(std::string("b=1 hq=1 sq=130 skv=2100 d=32 dtype=bfloat16 backward=dq,dk,dv score_mod=\"") + mod +
                    "\"");
    expect_accepted(std::string("b=1 hq=1 sq=2049 skv=70 d=16 dtype=float32 backward=dq,dk,dv score_mod=\"") + mod +
                    "\"");
  }
}

// Batches more than 2^31 elements apart.
TEST(NumericsBackwardEdge, OffsetsBeyond32Bits) {
  for (const std::string& backend : target().backends) {
    for (const char* const layout : {"q", "k", "v", "o", "grad_out", "grad_q", "grad_k", "grad_v"}) {
      expect_accepted(std::string("b=2 hq=2 hkv=1 sq=33 skv=40 d=16 dtype=bfloat16 score_mod=\"causal\" "
                                  "backward=dq,dk,dv backend=") +
                      backend + " " + layout + "=huge");
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
