// The judge accepts a right backward and rejects every deliberately wrong one.
#include <gtest/gtest.h>

#include <string>

#include "tests/numerics/expressions.h"
#include "tests/numerics/judge.h"
#include "tests/numerics/simulated_backward.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

struct FlawCase {
  BackwardFlaw flaw;
  const char* line;  // a problem on which this flaw changes something
};

BackwardVerdict judge_simulated(const std::string& line, BackwardFlaw flaw) {
  const Problem problem = make(line);
  const GoldGradients gold = compute_gold_gradients(problem);
  return judge(gold, simulate_backward(problem, gold, flaw));
}

constexpr const char* kCausalBf16 =
    "b=2 hq=4 hkv=2 sq=48 skv=70 d=64 dtype=bfloat16 score_mod=\"causal\" backward=dq,dk,dv";
constexpr const char* kPlainF32 = "b=2 hq=4 hkv=2 sq=40 skv=75 d=48 dv=40 dtype=float32 backward=dq,dk,dv";
constexpr const char* kGradLse = "b=1 hq=2 sq=40 skv=40 d=32 dtype=bfloat16 backward=dq,dk,dv grad_lse=1";
constexpr const char* kSoftcap =
    "b=1 hq=2 sq=40 skv=40 d=32 dtype=float16 score_mod=\"softcap(1.5)\" backward=dq,dk,dv";
constexpr const char* kChoice =
    "b=1 hq=2 sq=40 skv=40 d=32 dtype=float32 score_mod=\"where(score > 0, 2 * score, 0.5 * score)\" "
    "backward=dq,dk,dv";
constexpr const char* kBias =
    "b=2 hq=4 hkv=2 sq=33 skv=65 d=32 dtype=bfloat16 score_mod=\"score + bias[h, q_idx - kv_idx + 20]\" "
    "capture=bias:float32:4x60:packed:normal backward=dq,dk,dv grads=bias";
constexpr const char* kTwoReads =
    "b=1 hq=2 sq=33 skv=33 d=32 dtype=float16 score_mod=\"score + t[kv_idx] - 0.5 * t[q_idx - kv_idx]\" "
    "capture=t:float32:33:packed:normal backward=dq grads=t";
constexpr const char* kHalfBias =
    "b=2 hq=2 sq=64 skv=96 d=16 dtype=bfloat16 score_mod=\"score + bias[kv_idx % 8]\" "
    "capture=bias:bfloat16:8:packed:normal backward=dv grads=bias";
constexpr const char* kFactor =
    "b=1 hq=2 sq=40 skv=50 d=16 dtype=float32 score_mod=\"score * 3 + t[kv_idx]\" "
    "capture=t:float32:50:packed:normal backward=dq,dk grads=t";
constexpr const char* kRowShift =
    "b=2 hq=2 sq=33 skv=40 d=16 dtype=bfloat16 score_mod=\"score + t[b, q_idx] + u[h]\" "
    "capture=t:float32:2x33:packed:normal capture=u:float32:2:packed:normal backward=dq grads=t,u row_shifts=t,u";
constexpr const char* kRowShiftF32 =
    "b=2 hq=2 sq=33 skv=40 d=16 dtype=float32 score_mod=\"score + t[q_idx]\" "
    "capture=t:float32:33:packed:normal backward=dq grads=t row_shifts=t";
constexpr const char* kMaskMod =
    "b=2 hq=2 sq=40 skv=64 d=32 dtype=bfloat16 score_mod=\"score\" mask_mod=\"(q_idx + kv_idx) % 3 != 0\" "
    "backward=dq,dk,dv";
constexpr const char* kMaskedRows =
    "b=1 hq=2 sq=40 skv=64 d=16 dtype=float32 score_mod=\"where(q_idx % 4 != 0, score, -inf)\" backward=dq,dk,dv";
constexpr const char* kPoisonedKeys =
    "b=1 hq=2 sq=40 skv=64 d=16 dtype=float32 inputs=poisoned score_mod=\"where(kv_idx < 50, score, -inf)\" "
    "backward=dk,dv";

class NumericsBackwardJudgeFlaw : public testing::TestWithParam<FlawCase> {};

TEST_P(NumericsBackwardJudgeFlaw, IsRejected) {
  const BackwardVerdict verdict = judge_simulated(GetParam().line, GetParam().flaw);
  EXPECT_FALSE(verdict.accepted) << summary(verdict);
  EXPECT_FALSE(verdict.why.empty());
}

TEST_P(NumericsBackwardJudgeFlaw, WithoutItIsAccepted) {
  const BackwardVerdict verdict = judge_simulated(GetParam().line, BackwardFlaw::kNone);
  EXPECT_TRUE(verdict.accepted) << summary(verdict);
  EXPECT_EQ(verdict.undecided, 0);
}

using enum BackwardFlaw;

constexpr FlawCase kFlaws[] = {
    {kNoScaleInDq, kCausalBf16},
    {kNoScaleInDq, kPlainF32},
    {kNoScaleInDk, kCausalBf16},
    {kNoScaleInDk, kPlainF32},
    {kScoresWithoutScale, kCausalBf16},
    {kNoDelta, kCausalBf16},
    {kNoDelta, kPlainF32},
    {kNoDelta, kBias},
    {kDeltaOfOtherRow, kCausalBf16},
    {kDeltaOfOtherRow, kBias},
    {kGradLseIgnored, kGradLse},
    {kGradLseAdded, kGradLse},
    {kLseOfOtherRow, kCausalBf16},
    {kLseOfOtherRow, kPlainF32},
    {kLseInLog2, kPlainF32},
    {kUnnormalisedDv, kCausalBf16},
    {kMaskOffByOne, kCausalBf16},
    {kMaskOffByOne, kMaskMod},
    {kMaskOffByOne, kBias},
    {kWrongHead, kBias},
    {kMaskIgnored, kMaskMod},
    {kNoDerivative, kSoftcap},
    {kNoDerivative, kFactor},
    {kDerivativeTwice, kSoftcap},
    {kDerivativeTwice, kChoice},
    {kDerivativeOfOther, kChoice},
    {kDerivativeOfModified, kSoftcap},
    {kSwappedKvHead, kPlainF32},
    {kSwappedKvHead, kCausalBf16},
    {kOneHeadOfGroup, kCausalBf16},
    {kOneHeadOfGroup, kPlainF32},
    {kQueriesOfOtherHead, kCausalBf16},
    {kLastKvTileSkipped, kPlainF32},
    {kLastKvTileSkipped, kBias},
    {kLastQTileSkipped, kPlainF32},
    {kLastQTileSkipped, kTwoReads},
    {kPaddingCounted, kPlainF32},
    {kPaddingCounted, kBias},
    {kPaddingCounted, kTwoReads},
    {kHeadDimCut, kPlainF32},
    {kHeadDimCut, kCausalBf16},
    {kScoresRounded, kPlainF32},
    {kCaptureShifted, kBias},
    {kCaptureShifted, kTwoReads},
    {kOneReadOfTwo, kTwoReads},
    {kClampedLeftOut, kBias},
    {kClampedLeftOut, kTwoReads},
    {kCaptureInType, kHalfBias},
    {kCaptureOfDs, kFactor},
    {kRowShiftSummed, kRowShift},
    {kRowShiftSummed, kRowShiftF32},
    {kDroppedNan, kPoisonedKeys},
    {kMaskedRowsCount, kMaskedRows},
    {kErrorHalfPercent, kCausalBf16},
    {kErrorHalfPercent, kPlainF32},
    {kErrorHalfPercent, kBias},
    {kErrorHalfPercent, kMaskMod},
    {kOneElement, kCausalBf16},
    {kOneElement, kPlainF32},
    {kOneElement, kTwoReads},
    {kDqRowNotWritten, kCausalBf16},
    {kDkRowNotWritten, kCausalBf16},
    {kDvRowNotWritten, kCausalBf16},
    {kCaptureNotWritten, kBias},
    {kNothingWritten, kCausalBf16},
    {kNothingWritten, kTwoReads},
    {kRowsExchanged, kCausalBf16},
    {kRowsExchanged, kPlainF32},
};

INSTANTIATE_TEST_SUITE_P(All, NumericsBackwardJudgeFlaw, testing::ValuesIn(kFlaws), [](const auto& info) {
  return std::string(flaw_name(info.param.flaw)) + std::to_string(info.index);
});

// Where something flows into lse, a row shift's gradient is the reduction of that.
TEST(NumericsBackwardJudge, RowShiftsAreTheReductionOfGradLse) {
  const std::string with = std::string(kRowShift) + " grad_lse=1";
  EXPECT_TRUE(judge_simulated(with, kNone).accepted) << summary(judge_simulated(with, kNone));
  EXPECT_FALSE(judge_simulated(with, kNothingWritten).accepted);
  EXPECT_FALSE(judge_simulated(with, kErrorHalfPercent).accepted);
  EXPECT_FALSE(judge_simulated(with, kCaptureShifted).accepted);
}

class NumericsBackwardJudgeExpression : public testing::TestWithParam<Expression> {};

// Every expression of the suite is one whose gradients the judge can decide, and accepts from a right kernel.
TEST_P(NumericsBackwardJudgeExpression, RightResultIsAccepted) {
  Case spec = with_all_gradients(with_expression(
      {.batch = 2, .num_heads = 4, .num_heads_kv = 2, .seqlen_q = 24, .seqlen_kv = 40, .dtype = dsl::DType::kF16},
      GetParam().fields));
  for (const bool grad_lse : {false, true}) {
    spec.backward.grad_lse = grad_lse;
    const BackwardVerdict verdict = judge_simulated(to_line(spec), kNone);
    EXPECT_TRUE(verdict.accepted) << summary(verdict) << "\n" << to_line(spec);
    EXPECT_TRUE(GetParam().allows(verdict.undecided, verdict.judged)) << summary(verdict) << ": " << to_line(spec);
  }
}

std::string name_of(const testing::TestParamInfo<Expression>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Registry, NumericsBackwardJudgeExpression, testing::ValuesIn(registry_expressions()), name_of);
INSTANTIATE_TEST_SUITE_P(Other, NumericsBackwardJudgeExpression, testing::ValuesIn(other_expressions()), name_of);
INSTANTIATE_TEST_SUITE_P(Learnable, NumericsBackwardJudgeExpression, testing::ValuesIn(learnable_expressions()),
                         name_of);

TEST(NumericsBackwardJudge, GeneratedExpressionsAreDecided) {
  std::int64_t rows = 0, undecided = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const int style = static_cast<int>(seed % 3);
    Case spec = with_all_gradients(with_generated_expression(
        {.batch = 2, .num_heads = 2, .num_heads_kv = 1, .seqlen_q = 9, .seqlen_kv = 21, .seed = seed}, seed, style));
    spec.backward.grad_lse = seed % 2 == 0;
    const BackwardVerdict verdict = judge_simulated(to_line(spec), kNone);
    EXPECT_TRUE(verdict.accepted) << summary(verdict) << "\n" << to_line(spec);
    if (style == 0) {
      rows += verdict.judged + verdict.undecided;
      undecided += verdict.undecided;
    }
  }
  EXPECT_LE(undecided, rows / 50) << "of " << rows;
}

// The gradients of one expression are wrong ones of another: what a stale cache entry would hand out.
TEST(NumericsBackwardJudge, GradientsOfAnotherExpressionAreRejected) {
  constexpr const char* kOthers[] = {"score * 1.01", "score + 0.02 * (q_idx - kv_idx)", "softcap(20)",
                                     "where(q_idx >= kv_idx, score, -inf)", "score + 0.01 * (kv_idx % 2)"};
  for (const char* const dtype : {"float32", "float16"}) {
    const std::string line = std::string("b=1 hq=2 sq=64 skv=64 d=64 backward=dq,dk,dv dtype=") + dtype;
    const Problem problem = make(line);
    const GoldGradients gold = compute_gold_gradients(problem);
    for (const char* const other : kOthers) {
      const Problem stale = make(line + " score_mod=\"" + other + "\"");
      const GoldGradients given = compute_gold_gradients(stale);
      const BackwardVerdict verdict = judge(gold, simulate_backward(stale, given, kNone));
      EXPECT_FALSE(verdict.accepted) << dtype << ", " << other << ": " << summary(verdict);
    }
  }
}

TEST(NumericsBackwardJudge, GradientsOfWrongSizeAreRejected) {
  const Problem problem = make(kPlainF32);
  EXPECT_FALSE(judge(compute_gold_gradients(problem), Gradients{}).accepted);
}

TEST(NumericsBackwardJudgeCase, LineReadsBack) {
  const char* const line =
      "b=2 hq=4 hkv=2 sq=33 skv=129 d=64 dv=40 dtype=bfloat16 q=bshd k=padded v=broadcast_h o=packed inputs=large "
      "score_mod=\"score + t[h] * s\" capture=t:float32:4:padded:normal capture=s:float32::packed:normal "
      "backward=dq,dv grads=t:padded,s:packed row_shifts=t,s grad_lse=1 deterministic=1 partial_keys=1 forward=own "
      "grad_out=broadcast_s grad_q=bshd grad_k=padded grad_v=padded device=cuda backend=math threads=1 rows=7 seed=99";
  Case spec;
  std::string error;
  ASSERT_TRUE(parse_case(line, &spec, &error)) << error;
  EXPECT_EQ(to_line(spec), line);
  EXPECT_FALSE(spec.backward.dk);
  for (const char* const wrong : {"backward=dq,dx", "backward=", "grads=:packed", "grads=t:sideways", "grad_lse=2",
                                  "deterministic=yes", "forward=theirs", "grad_out=sideways", "grad_q="}) {
    EXPECT_FALSE(parse_case(wrong, &spec, &error)) << wrong;
  }
  Problem problem;
  ASSERT_TRUE(parse_case("backward=dq grads=t", &spec, &error)) << error;
  EXPECT_FALSE(make_problem(spec, &problem, &error));
}

}  // namespace
}  // namespace attnjit::numerics
