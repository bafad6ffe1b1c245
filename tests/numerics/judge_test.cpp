// The judge accepts a right kernel and rejects every deliberately wrong one.
#include "tests/numerics/judge.h"

#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "tests/numerics/expressions.h"
#include "tests/numerics/simulated_kernel.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

struct FlawCase {
  Flaw flaw;
  const char* line;  // a problem on which this flaw changes something
};

Verdict judge_simulated(const char* line, Flaw flaw) {
  const Problem problem = make(line);
  return judge(problem, compute_gold(problem, sample_rows(problem.spec)), simulate(problem, flaw));
}

constexpr const char* kCausalBf16 = "b=2 hq=4 hkv=2 sq=48 skv=70 d=64 dtype=bfloat16 score_mod=\"causal\" rows=400";
constexpr const char* kPlainF32 = "b=2 hq=4 hkv=2 sq=40 skv=75 d=48 dv=40 dtype=float32 rows=400";
constexpr const char* kBiasF16 =
    "b=3 hq=4 hkv=1 sq=33 skv=65 d=32 dtype=float16 score_mod=\"score + bias[b, h, kv_idx]\" "
    "capture=bias:float32:3x4x66:packed:normal rows=400";
constexpr const char* kMaskModBf16 =
    "b=2 hq=2 sq=40 skv=64 d=64 dtype=bfloat16 score_mod=\"score\" mask_mod=\"(q_idx + kv_idx) % 3 != 0\" rows=400";
constexpr const char* kMaskedRows =
    "b=1 hq=2 sq=40 skv=64 d=16 dtype=float32 score_mod=\"where(q_idx % 4 != 0, score, -inf)\" rows=400";
constexpr const char* kPoisonedKeys =
    "b=1 hq=2 sq=40 skv=64 d=16 dtype=float32 inputs=poisoned score_mod=\"where(kv_idx < 50, score, -inf)\" rows=400";
constexpr const char* kLogScore = "b=1 hq=2 sq=40 skv=64 d=16 dtype=float32 score_mod=\"log(score + 2)\" rows=400";

// Scores that grow along the keys, whole tiles without a key, shifts that empty rows.
constexpr const char* kRisingF16 = "b=2 hq=2 sq=40 skv=200 d=64 dtype=float16 inputs=rising rows=400";
constexpr const char* kSteepBf16 = "b=2 hq=2 sq=40 skv=200 d=64 dtype=bfloat16 inputs=steep rows=400";
constexpr const char* kOutliersBf16 = "b=2 hq=2 sq=40 skv=200 d=64 dtype=bfloat16 inputs=outliers rows=400";
constexpr const char* kOutliersF16 = "b=2 hq=2 sq=40 skv=200 d=64 dtype=float16 inputs=outliers rows=400";
constexpr const char* kHugeBf16 = "b=2 hq=2 sq=40 skv=200 d=64 dtype=bfloat16 inputs=huge_values rows=400";
constexpr const char* kCausalOutliers =
    "b=2 hq=2 sq=100 skv=200 d=64 dtype=bfloat16 inputs=outliers score_mod=\"causal\" rows=400";
constexpr const char* kBlocks =
    "b=1 hq=2 sq=130 skv=130 d=32 dtype=bfloat16 score_mod=\"document(ids)\" capture=ids:int32:130:packed:blocks "
    "rows=400";
constexpr const char* kShiftedRows =
    "b=2 hq=2 sq=40 skv=64 d=16 dtype=bfloat16 score_mod=\"score + w[h, q_idx]\" "
    "capture=w:float32:2x40:packed:poison rows=400";

constexpr const char* kFewSampled = "b=2 hq=2 sq=70 skv=40 d=16 dtype=float32 score_mod=\"causal\" rows=12";
// Most rows are rightly NaN; the few that are not are found all the same.
constexpr const char* kFewSampledNan =
    "b=1 hq=2 sq=70 skv=40 d=16 dtype=float32 score_mod=\"where(q_idx > 2, log(score), score)\" rows=12";

class NumericsJudgeFlaw : public testing::TestWithParam<FlawCase> {};

TEST_P(NumericsJudgeFlaw, IsRejected) {
  const Verdict verdict = judge_simulated(GetParam().line, GetParam().flaw);
  EXPECT_FALSE(verdict.accepted) << summary(verdict);
  EXPECT_FALSE(verdict.why.empty());
}

TEST_P(NumericsJudgeFlaw, WithoutItIsAccepted) {
  const Verdict verdict = judge_simulated(GetParam().line, Flaw::kNone);
  EXPECT_TRUE(verdict.accepted) << summary(verdict);
  EXPECT_EQ(verdict.undecided, 0);
}

INSTANTIATE_TEST_SUITE_P(
    All, NumericsJudgeFlaw,
    testing::Values(FlawCase{Flaw::kScaleDropped, kCausalBf16}, FlawCase{Flaw::kScaleDropped, kPlainF32},
                    FlawCase{Flaw::kScaleTwice, kCausalBf16}, FlawCase{Flaw::kMaskOffByOne, kCausalBf16},
                    FlawCase{Flaw::kMaskOffByOne, kMaskModBf16}, FlawCase{Flaw::kQueryOffByOne, kCausalBf16},
                    FlawCase{Flaw::kWrongHead, kBiasF16}, FlawCase{Flaw::kWrongBatch, kBiasF16},
                    FlawCase{Flaw::kIndicesSwapped, kCausalBf16}, FlawCase{Flaw::kSwappedKvHead, kPlainF32},
                    FlawCase{Flaw::kSwappedKvHead, kCausalBf16}, FlawCase{Flaw::kLastTileSkipped, kPlainF32},
                    FlawCase{Flaw::kLastTileSkipped, kBiasF16}, FlawCase{Flaw::kPaddingScored, kPlainF32},
                    FlawCase{Flaw::kPaddingScored, kBiasF16}, FlawCase{Flaw::kErrorHalfPercent, kCausalBf16},
                    FlawCase{Flaw::kErrorHalfPercent, kMaskModBf16}, FlawCase{Flaw::kErrorHalfPercent, kBiasF16},
                    FlawCase{Flaw::kErrorHalfPercent, kPlainF32}, FlawCase{Flaw::kOneElement, kPlainF32},
                    FlawCase{Flaw::kOneElement, kBiasF16}, FlawCase{Flaw::kOneElement, kCausalBf16},
                    FlawCase{Flaw::kNoRescale, kCausalBf16}, FlawCase{Flaw::kNoSumRescale, kPlainF32},
                    FlawCase{Flaw::kRowsExchanged, kCausalBf16}, FlawCase{Flaw::kHeadDimCut, kPlainF32},
                    FlawCase{Flaw::kHeadDimCut, kCausalBf16}, FlawCase{Flaw::kScoresRounded, kPlainF32},
                    FlawCase{Flaw::kScoresRounded, kBiasF16}, FlawCase{Flaw::kLseInLog2, kCausalBf16},
                    FlawCase{Flaw::kLseWithoutMax, kPlainF32}, FlawCase{Flaw::kRowMaxOfScores, kBiasF16},
                    FlawCase{Flaw::kNanSwallowed, kLogScore}, FlawCase{Flaw::kDroppedNan, kPoisonedKeys},
                    FlawCase{Flaw::kMaskedRowNan, kMaskedRows}, FlawCase{Flaw::kMaskedLseZero, kMaskedRows},
                    FlawCase{Flaw::kMaskIgnored, kMaskModBf16}, FlawCase{Flaw::kRowNotWritten, kFewSampled},
                    FlawCase{Flaw::kLseNotWritten, kFewSampled}, FlawCase{Flaw::kRowNotWritten, kFewSampledNan},
                    FlawCase{Flaw::kReferenceFrozen, kRisingF16}, FlawCase{Flaw::kReferenceFrozen, kSteepBf16},
                    FlawCase{Flaw::kReferenceFrozen, kOutliersBf16}, FlawCase{Flaw::kReferenceFrozen, kHugeBf16},
                    FlawCase{Flaw::kFrozenSaturated, kRisingF16}, FlawCase{Flaw::kFrozenSaturated, kOutliersF16},
                    FlawCase{Flaw::kDroppedMaximum, kCausalOutliers}, FlawCase{Flaw::kMaskedTileNan, kBlocks},
                    FlawCase{Flaw::kMaskedTileNan, kShiftedRows}, FlawCase{Flaw::kNoRescale, kRisingF16},
                    FlawCase{Flaw::kNoSumRescale, kOutliersBf16}, FlawCase{Flaw::kMaskOffByOne, kBlocks},
                    FlawCase{Flaw::kMaskedRowNan, kShiftedRows}, FlawCase{Flaw::kErrorHalfPercent, kHugeBf16},
                    FlawCase{Flaw::kErrorHalfPercent, kSteepBf16}),
    [](const auto& info) { return std::string(flaw_name(info.param.flaw)) + std::to_string(info.index); });

class NumericsJudgeExpression : public testing::TestWithParam<Expression> {};

// Every expression of the suite is one that the judge can decide, and accepts from a right kernel.
TEST_P(NumericsJudgeExpression, RightResultIsAccepted) {
  const Case spec = with_expression({.batch = 2,
                                     .num_heads = 4,
                                     .num_heads_kv = 2,
                                     .seqlen_q = 40,
                                     .seqlen_kv = 50,
                                     .dtype = dsl::DType::kF16,
                                     .rows = 400},
                                    GetParam().fields);
  const Problem problem = make(to_line(spec).c_str());
  const Verdict verdict =
      judge(problem, compute_gold(problem, sample_rows(problem.spec)), simulate(problem, Flaw::kNone));
  EXPECT_TRUE(verdict.accepted) << summary(verdict) << "\n" << to_line(spec);
  EXPECT_TRUE(GetParam().allows(verdict.undecided, verdict.judged)) << summary(verdict) << ": " << to_line(spec);
}

INSTANTIATE_TEST_SUITE_P(Registry, NumericsJudgeExpression, testing::ValuesIn(registry_expressions()),
                         [](const auto& info) { return std::string(info.param.name); });
INSTANTIATE_TEST_SUITE_P(Other, NumericsJudgeExpression, testing::ValuesIn(other_expressions()),
                         [](const auto& info) { return std::string(info.param.name); });

// Hundreds of generated expressions: the interpreter and the test's own evaluation agree (compute_gold throws where
// they do not), and the right kernel is accepted.
TEST(NumericsJudge, GeneratedExpressionsAreDecided) {
  std::int64_t rows = 0, undecided = 0;
  for (std::uint64_t seed = 0; seed < 300; ++seed) {
    const int style = static_cast<int>(seed % 3);
    const Case spec = with_generated_expression(
        {.batch = 2, .num_heads = 2, .num_heads_kv = 1, .seqlen_q = 9, .seqlen_kv = 21, .rows = 20, .seed = seed}, seed,
        style);
    SCOPED_TRACE(to_line(spec));
    Problem problem;
    std::string error;
    ASSERT_TRUE(make_problem(spec, &problem, &error)) << error;
    const Verdict verdict =
        judge(problem, compute_gold(problem, sample_rows(problem.spec)), simulate(problem, Flaw::kNone));
    EXPECT_TRUE(verdict.accepted) << summary(verdict);
    if (style == 0) {
      rows += verdict.judged + verdict.undecided;
      undecided += verdict.undecided;
    }
  }
  EXPECT_LE(undecided, rows / 50) << "of " << rows;
}

// A right result of one expression is a wrong one of another: what a stale cache entry would hand out.
TEST(NumericsJudge, ResultOfAnotherExpressionIsRejected) {
  constexpr const char* kOthers[] = {"score * 1.01", "score + 0.02 * (q_idx - kv_idx)", "softcap(20)",
                                     "where(q_idx >= kv_idx, score, -inf)", "score + 0.01 * (kv_idx % 2)"};
  for (const char* const dtype : {"float32", "float16"}) {
    const std::string line = std::string("b=1 hq=2 sq=64 skv=64 d=64 rows=400 dtype=") + dtype;
    const Problem problem = make(line.c_str());
    const Gold gold = compute_gold(problem, sample_rows(problem.spec));
    for (const char* const other : kOthers) {
      const Problem stale = make((line + " score_mod=\"" + other + "\"").c_str());
      const Verdict verdict = judge(problem, gold, simulate(stale, Flaw::kNone));
      EXPECT_FALSE(verdict.accepted) << dtype << ", " << other << ": " << summary(verdict);
    }
  }
}

TEST(NumericsJudge, OutputOfWrongSizeIsRejected) {
  const Problem problem = make(kPlainF32);
  EXPECT_FALSE(judge(problem, compute_gold(problem, sample_rows(problem.spec)), Outcome{}).accepted);
}

// Rows within float32 error of a jump are left out, and few are.
TEST(NumericsJudge, RowsAtAJumpAreLeftOutAndFew) {
  const Problem problem =
      make("b=2 hq=4 sq=64 skv=64 d=32 rows=600 score_mod=\"where(score > 0.25, score, floor(score * 4))\"");
  const Gold gold = compute_gold(problem, sample_rows(problem.spec));
  const Verdict verdict = judge(problem, gold, simulate(problem, Flaw::kNone));
  EXPECT_TRUE(verdict.accepted) << summary(verdict);
  EXPECT_LE(verdict.undecided, 5) << summary(verdict);

  // With q = 0 every score is exactly at the jump of sign(), but exactly so: nothing is left out.
  const Problem exact = make("b=1 hq=1 sq=8 skv=8 d=8 inputs=zero score_mod=\"score + sign(score)\"");
  EXPECT_EQ(judge(exact, compute_gold(exact, sample_rows(exact.spec)), simulate(exact, Flaw::kNone)).undecided, 0);

  // A jump at a large multiple of the score is within reach of some element of every row.
  const Problem steep = make("b=1 hq=1 sq=32 skv=64 d=64 score_mod=\"floor(score * 1e6) % 2\"");
  EXPECT_EQ(judge(steep, compute_gold(steep, sample_rows(steep.spec)), simulate(steep, Flaw::kNone)).judged, 0);
}

// What overflows in float32 and not in double is no one's fault.
TEST(NumericsJudge, Float32OverflowIsLeftOut) {
  const Problem problem = make("b=1 hq=1 sq=8 skv=8 d=8 score_mod=\"log(exp(score + 100))\"");
  EXPECT_EQ(judge(problem, compute_gold(problem, sample_rows(problem.spec)), simulate(problem, Flaw::kNone)).judged, 0);
}

TEST(NumericsJudge, IllConditionedExpressionGetsItsFloat32Error) {
  // (score + 1e6) - 1e6 keeps four bits of the score's fraction: far from exact, and yet all float32 can do.
  const char* const line = "b=1 hq=1 sq=16 skv=16 d=16 score_mod=\"(score + 1e3) - 1e3\"";
  EXPECT_TRUE(judge_simulated(line, Flaw::kNone).accepted);
  const Problem problem = make("b=1 hq=1 sq=16 skv=16 d=16 score_mod=\"score\"");
  const Problem lossy = make("b=1 hq=1 sq=16 skv=16 d=16 score_mod=\"floor(score * 1024) / 1024\"");
  EXPECT_FALSE(judge(problem, compute_gold(problem, sample_rows(problem.spec)), simulate(lossy, Flaw::kNone)).accepted);
}

TEST(NumericsJudgeCase, LineReadsBack) {
  const char* const line =
      "b=2 hq=4 hkv=2 sq=33 skv=129 d=64 dv=40 dtype=bfloat16 q=bshd k=padded v=broadcast_h o=packed inputs=large "
      "scale=0.125 score_mod=\"score + bias[h, q_idx]\" mask_mod=\"q_idx >= kv_idx\" "
      "capture=bias:int8:4x33:padded:index capture=s:float32::packed:normal device=cuda backend=math threads=1 rows=7 "
      "seed=99";
  Case spec;
  std::string error;
  ASSERT_TRUE(parse_case(line, &spec, &error)) << error;
  EXPECT_EQ(to_line(spec), line);
  EXPECT_FALSE(parse_case("b=two", &spec, &error));
  EXPECT_FALSE(parse_case("size=2", &spec, &error));
  for (const auto backend : {ATTNJIT_BACKEND_AUTO, ATTNJIT_BACKEND_MATH, ATTNJIT_BACKEND_CPU}) {
    ASSERT_TRUE(parse_case(std::string("backend=") + attnjit_backend_name(backend), &spec, &error)) << error;
    EXPECT_EQ(backend_of(spec.backend), backend);
  }
  EXPECT_FALSE(parse_case("backend=tpu", &spec, &error));
  EXPECT_FALSE(parse_case("device=tpu", &spec, &error));
  EXPECT_FALSE(parse_case("score_mod=\"score", &spec, &error));
  EXPECT_FALSE(parse_case("capture=a:float64:2:packed:normal", &spec, &error));
}

TEST(NumericsJudgeTensor, RoundsToNearestEven) {
  EXPECT_EQ(round_to(dsl::DType::kBF16, 1.0 + 0x1p-8), 1.0);
  EXPECT_EQ(round_to(dsl::DType::kBF16, 1.0 + 3 * 0x1p-8), 1.0 + 0x1p-6);
  EXPECT_EQ(round_to(dsl::DType::kF16, 65519.0), 65504.0);
  EXPECT_TRUE(std::isinf(round_to(dsl::DType::kF16, 65520.0)));
  EXPECT_EQ(round_to(dsl::DType::kF16, 0x1.8p-24), 0x1p-23);
  EXPECT_EQ(round_to(dsl::DType::kF32, 1.0 + 0x1p-25), 1.0);
}

TEST(NumericsJudgeTensor, StoresWhatItReads) {
  for (const auto dtype : {dsl::DType::kF16, dsl::DType::kBF16, dsl::DType::kF32}) {
    Tensor tensor(dtype, {2, 3}, Layout::kPadded);
    for (const double value : {0.0, -1.5, 0x1p-14, 0x1p-20, 1000.0, -65504.0, 3.0e-7}) {
      tensor.set({1, 2}, value);
      EXPECT_EQ(tensor.at({1, 2}), round_to(dtype, value)) << dsl::dtype_name(dtype) << " " << value;
    }
    EXPECT_TRUE(std::isnan(tensor.at({0, 0})));
    EXPECT_TRUE(tensor.surroundings_intact());
  }
}

TEST(NumericsJudgeTensor, PoisonIsNan) {
  for (const Layout layout : {Layout::kPadded, Layout::kHuge}) {
    Tensor tensor(dsl::DType::kBF16, {2, 1, 3, 4}, layout);
    tensor.set({1, 0, 2, 3}, 1.0);
    tensor.poison();
    for_each_index(tensor.shape(), [&](auto index) { EXPECT_TRUE(std::isnan(tensor.at(index))); });
    EXPECT_TRUE(tensor.surroundings_intact());
  }
}

TEST(NumericsJudgeTensor, NoticesAWriteBesideAnElement) {
  Tensor tensor(dsl::DType::kF32, {1, 2, 3, 4}, Layout::kPadded);
  EXPECT_TRUE(tensor.surroundings_intact());
  Tensor gap = tensor.view({1}, {1}, 4);
  gap.set({0}, 1.0);
  EXPECT_FALSE(tensor.surroundings_intact());
  Tensor packed(dsl::DType::kF32, {4}, Layout::kPacked);
  packed.view({1}, {1}, 4).set({0}, 1.0);
  EXPECT_FALSE(packed.surroundings_intact());
}

}  // namespace
}  // namespace attnjit::numerics
