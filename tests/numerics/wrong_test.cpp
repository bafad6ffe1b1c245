// The library made to compute something else than it was asked, and the judge, which has to notice.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <string>

#include "tests/numerics/check.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

// Runs `wrong`, made of the same seed as `right` and hence of the same values, and judges it as `right`.
struct Swap {
  const char* name;
  const char* right;
  const char* wrong;
};

constexpr Swap kSwaps[] = {
    {"ScaleDropped", "sq=70 skv=90 d=64", "sq=70 skv=90 d=64 scale=1"},
    {"ScaleOffByOnePercent", "sq=70 skv=90 d=64", "sq=70 skv=90 d=64 scale=0.12625"},
    {"MaskOffByOne", R"_(sq=70 skv=90 d=32 score_mod="causal")_",
     R"_(sq=70 skv=90 d=32 score_mod="where(q_idx > kv_idx, score, -inf)")_"},
    {"WindowOffByOne", R"_(sq=70 skv=90 d=32 score_mod="sliding_window(40)")_",
     R"_(sq=70 skv=90 d=32 score_mod="sliding_window(41)")_"},
    {"WrongHead", R"_(hq=4 hkv=4 sq=70 skv=90 d=32 score_mod="alibi_exp2(4)")_",
     R"_(hq=4 hkv=4 sq=70 skv=90 d=32 score_mod="score + exp2(-2.0 * (h + 2)) * (kv_idx - q_idx)")_"},
    {"LastKeysSkipped", "sq=70 skv=257 d=32", R"_(sq=70 skv=257 d=32 mask_mod="kv_idx < 256")_"},
    {"LastTileSkipped", "sq=70 skv=257 d=32", R"_(sq=70 skv=257 d=32 mask_mod="kv_idx < 128")_"},
    {"OneKeySkipped", "sq=70 skv=257 d=32", R"_(sq=70 skv=257 d=32 mask_mod="kv_idx != 127")_"},
    {"StalePlan", R"_(sq=70 skv=90 d=32 score_mod="softcap(20)")_", R"_(sq=70 skv=90 d=32 score_mod="softcap(5)")_"},
    {"ConstantForgotten", R"_(sq=70 skv=90 d=32 score_mod="score + 0.25 * (kv_idx % 2)")_", "sq=70 skv=90 d=32"},
    {"ShiftForgottenInLse", R"_(sq=70 skv=90 d=32 score_mod="score + 0.01 * q_idx")_", "sq=70 skv=90 d=32"},
    {"NanSwallowed", R"_(sq=70 skv=90 d=32 score_mod="log(score)")_",
     R"_(sq=70 skv=90 d=32 score_mod="where(score > 0, log(score), -inf)")_"},
    {"MaskedRowsNan", R"_(sq=70 skv=90 d=32 score_mod="where(q_idx > 2, score, -inf)")_",
     R"_(sq=70 skv=90 d=32 score_mod="where(q_idx > 2, score, nan)")_"},
    {"MaskedRowsUnmasked", R"_(sq=70 skv=90 d=32 score_mod="where(q_idx > 2, score, -inf)")_", "sq=70 skv=90 d=32"},
    {"IndicesExchanged", R"_(sq=70 skv=70 d=32 score_mod="causal")_",
     R"_(sq=70 skv=70 d=32 score_mod="where(kv_idx >= q_idx, score, -inf)")_"},
    {"NegativeDistance", R"_(sq=70 skv=90 d=32 score_mod="score + 0.01 * (q_idx - kv_idx)")_",
     R"_(sq=70 skv=90 d=32 score_mod="score + 0.01 * (kv_idx - q_idx)")_"},
    {"TruncatedDivision", R"_(sq=70 skv=90 d=32 score_mod="score + (q_idx - kv_idx) // 4")_",
     R"_(sq=70 skv=90 d=32 score_mod="score + int((q_idx - kv_idx) / 4)")_"},
    {"GeluOfTanhForm", R"_(sq=70 skv=90 d=32 score_mod="4 * gelu(score)")_",
     R"_(sq=70 skv=90 d=32 score_mod="2 * score * (1 + tanh(0.7978845608 * (score + 0.044715 * score ** 3)))")_"},
};

class NumericsWrong : public testing::TestWithParam<Swap> {};

TEST_P(NumericsWrong, IsRejected) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
      // Half-precision inputs hide what is smaller than their own rounding.
      const bool fine = std::string(GetParam().name) == "GeluOfTanhForm";
      if (fine && std::string(dtype) != "float32") continue;
      const std::string rest = std::string(" b=1 rows=400 dtype=") + dtype + " backend=" + backend;
      const std::string heads = std::string(GetParam().right).starts_with("hq") ? "" : "hq=2 hkv=1 ";
      Problem right = make(fmt::format("{}{}{}", heads, GetParam().right, rest)),
              wrong = make(fmt::format("{}{}{}", heads, GetParam().wrong, rest));
      const Gold gold = compute_gold(right, sample_rows(right.spec));
      const RunResult good = run(right), bad = run(wrong);
      ASSERT_EQ(good.error, "");
      ASSERT_EQ(bad.error, "");
      EXPECT_TRUE(judge(right, gold, good.outcome).accepted) << to_line(right.spec);
      const Verdict verdict = judge(right, gold, bad.outcome);
      EXPECT_FALSE(verdict.accepted) << to_line(wrong.spec) << "\n" << summary(verdict);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, NumericsWrong, testing::ValuesIn(kSwaps),
                         [](const auto& info) { return std::string(info.param.name); });

// Faults of an output that is right elsewhere.
TEST(NumericsWrongOutput, IsRejected) {
  struct Fault {
    const char* name;
    std::function<void(Outcome*)> apply;
  };
  const Fault faults[] = {
      {"half a percent too large",
       [](Outcome* out) {
         for (double& value : out->o) value *= 1.005;
       }},
      {"one element 10% off", [](Outcome* out) { out->o[out->o.size() / 2] *= 1.1; }},
      {"one element NaN", [](Outcome* out) { out->o[out->o.size() - 1] = NAN; }},
      {"one element never written", [](Outcome* out) { out->o[0] = 0.0; }},
      {"lse in log2",
       [](Outcome* out) {
         for (double& value : out->lse) value *= 1.4426950408889634;
       }},
      {"one lse off", [](Outcome* out) { out->lse[out->lse.size() / 3] += 2e-3; }},
      {"row_max off", [](Outcome* out) { out->row_max[1] += 1e-3; }},
      {"rows exchanged",
       [](Outcome* out) { std::swap_ranges(out->o.begin(), out->o.begin() + 64, out->o.begin() + 64); }},
  };
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
      Problem problem = make(std::string("b=2 hq=2 sq=70 skv=90 d=64 rows=400 score_mod=\"causal\" dtype=") + dtype +
                             " backend=" + backend);
      const Gold gold = compute_gold(problem, sample_rows(problem.spec));
      const RunResult result = run(problem);
      ASSERT_EQ(result.error, "");
      ASSERT_TRUE(judge(problem, gold, result.outcome).accepted);
      for (const Fault& fault : faults) {
        Outcome outcome = result.outcome;
        fault.apply(&outcome);
        const Verdict verdict = judge(problem, gold, outcome);
        EXPECT_FALSE(verdict.accepted) << fault.name << ", " << dtype << ": " << summary(verdict);
      }
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
