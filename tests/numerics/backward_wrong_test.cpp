// The library made to compute other gradients than it was asked for, and the judge, which has to notice.
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

// Runs `wrong`, made of the same seed as `right` and hence of the same values, given right o and lse, and judges it as
// `right`. What is captured is zero: where it is only added, the scores of both are the same.
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
    {"LastKeysSkipped", "sq=70 skv=257 d=32", R"_(sq=70 skv=257 d=32 mask_mod="kv_idx < 256")_"},
    {"OneKeySkipped", "sq=70 skv=257 d=32", R"_(sq=70 skv=257 d=32 mask_mod="kv_idx != 127")_"},
    {"LastQuerySkipped", "sq=70 skv=90 d=32", R"_(sq=70 skv=90 d=32 mask_mod="q_idx < 69")_"},
    {"StalePlan", R"_(sq=70 skv=90 d=32 score_mod="softcap(20)")_", R"_(sq=70 skv=90 d=32 score_mod="softcap(5)")_"},
    {"DerivativeLeftOut", R"_(sq=70 skv=90 d=32 score_mod="softcap(2)")_",
     R"_(sq=70 skv=90 d=32 score_mod="2 * tanh(score / 2) * 0 + score")_"},
    {"GradLseIgnored", "sq=70 skv=90 d=32 grad_lse=1", "sq=70 skv=90 d=32"},
    {"IndicesExchanged", R"_(sq=70 skv=70 d=32 score_mod="causal")_",
     R"_(sq=70 skv=70 d=32 score_mod="where(kv_idx >= q_idx, score, -inf)")_"},
    {"CaptureAtAnotherPlace",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[q_idx - kv_idx + 20]" capture=t:float32:41:packed:normal grads=t)_",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[q_idx - kv_idx + 21]" capture=t:float32:41:packed:normal grads=t)_"},
    {"OneReadOfTwo",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[kv_idx] + t[q_idx - kv_idx]" capture=t:float32:90:packed:normal grads=t)_",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[kv_idx]" capture=t:float32:90:packed:normal grads=t)_"},
    {"ClampLeftOut", R"_(sq=70 skv=90 d=32 score_mod="score + t[kv_idx]" capture=t:float32:80:packed:normal grads=t)_",
     R"_(sq=70 skv=90 d=32 score_mod="where(kv_idx < 80, score + t[kv_idx], score)" capture=t:float32:80:packed:normal grads=t)_"},
    {"FactorLeftOut",
     R"_(sq=70 skv=90 d=32 score_mod="score + 2 * t[kv_idx]" capture=t:float32:90:packed:normal grads=t)_",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[kv_idx]" capture=t:float32:90:packed:normal grads=t)_"},
    {"ShiftForColumn",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[kv_idx]" capture=t:float32:90:packed:normal grads=t)_",
     R"_(sq=70 skv=90 d=32 score_mod="score + t[q_idx]" capture=t:float32:90:packed:normal grads=t)_"},
};

class NumericsBackwardWrong : public testing::TestWithParam<Swap> {};

TEST_P(NumericsBackwardWrong, IsRejected) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
      const std::string rest = std::string(" b=1 hq=2 hkv=1 backward=dq,dk,dv dtype=") + dtype + " backend=" + backend;
      Problem right = make(GetParam().right + rest), wrong = make(GetParam().wrong + rest);
      for (Problem* const problem : {&right, &wrong}) {
        for (NamedTensor& capture : problem->captures) {
          for_each_index(capture.tensor.shape(), [&](auto index) { capture.tensor.set(index, 0.0); });
        }
      }
      const GoldGradients gold = compute_gold_gradients(right);
      const BackwardResult good = run_backward(right, gold.o, gold.lse), bad = run_backward(wrong, gold.o, gold.lse);
      ASSERT_EQ(good.error, "");
      ASSERT_EQ(bad.error, "");
      EXPECT_TRUE(judge(gold, good.gradients).accepted) << summary(judge(gold, good.gradients)) << "\n"
                                                        << to_line(right.spec);
      const BackwardVerdict verdict = judge(gold, bad.gradients);
      EXPECT_FALSE(verdict.accepted) << to_line(wrong.spec) << "\n" << summary(verdict);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, NumericsBackwardWrong, testing::ValuesIn(kSwaps),
                         [](const auto& info) { return std::string(info.param.name); });

// Faults of gradients that are right elsewhere.
TEST(NumericsBackwardWrongGradient, IsRejected) {
  struct Fault {
    const char* name;
    std::function<void(std::vector<double>*)> apply;
  };
  const Fault faults[] = {
      {"half a percent too large",
       [](std::vector<double>* values) {
         for (double& value : *values) value *= 1.005;
       }},
      {"the first element NaN", [](std::vector<double>* values) { values->front() = NAN; }},
      {"the last element NaN", [](std::vector<double>* values) { values->back() = NAN; }},
      {"the largest element zero",
       [](std::vector<double>* values) {
         *std::ranges::max_element(*values, {}, [](double x) { return std::fabs(x); }) = 0.0;
       }},
      {"shifted by one",
       [](std::vector<double>* values) { std::rotate(values->begin(), values->begin() + 1, values->end()); }},
  };
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
      Problem problem = make(
          std::string("b=2 hq=2 hkv=1 sq=70 skv=90 d=64 score_mod=\"score + t[h, q_idx, kv_idx]\" "
                      "mask_mod=\"causal\" capture=t:float32:2x70x90:packed:normal backward=dq,dk,dv grads=t dtype=") +
          dtype + " backend=" + backend);
      const GoldGradients gold = compute_gold_gradients(problem);
      const BackwardResult result = run_backward(problem, gold.o, gold.lse);
      ASSERT_EQ(result.error, "");
      ASSERT_TRUE(judge(gold, result.gradients).accepted) << summary(judge(gold, result.gradients));
      for (const Fault& fault : faults) {
        for (const int number : {0, 1, 2, 3}) {
          Gradients gradients = result.gradients;
          std::vector<double>* const all[] = {&gradients.dq, &gradients.dk, &gradients.dv, &gradients.captures[0]};
          fault.apply(all[number]);
          const BackwardVerdict verdict = judge(gold, gradients);
          EXPECT_FALSE(verdict.accepted) << fault.name << ", gradient " << number << ", " << dtype << ": "
                                         << summary(verdict);
        }
      }
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
