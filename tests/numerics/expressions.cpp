// The tables of expressions.
#include "tests/numerics/expressions.h"

#include <algorithm>
#include <random>
#include <stdexcept>

#include "dsl/parser.h"
#include "tests/support/random_expression.h"

namespace attnjit::numerics {
namespace {

constexpr Expression kRegistry[] = {
    {"Noop", R"_(score_mod="noop")_"},
    {"Causal", R"_(score_mod="causal")_"},
    {"Rel", R"_(score_mod="rel")_"},
    {"HeadBias", R"_(score_mod="head_bias")_"},
    {"Alibi", R"_(score_mod="alibi" capture=alibi_slopes:float32:H:packed:normal)_"},
    {"AlibiExp2", R"_(score_mod="alibi_exp2(8)")_"},
    {"Softcap", R"_(score_mod="softcap(3)")_"},
    {"SoftcapWide", R"_(score_mod="softcap(30)")_"},
    {"SlidingWindow", R"_(score_mod="sliding_window(17)")_"},
    {"SlidingWindowNarrow", R"_(score_mod="sliding_window(0)")_"},
    {"PrefixLm", R"_(score_mod="prefix_lm(9)")_"},
    {"Document", R"_(score_mod="document(ids)" capture=ids:int32:K:packed:documents)_"},
    {"CausalAndWindow", R"_(score_mod="causal() and sliding_window(40)")_"},
    {"CausalOrPrefix", R"_(score_mod="causal() or prefix_lm(20)")_"},
    {"DocumentAndCausal", R"_(score_mod="document(ids) and causal()" capture=ids:int64:K:packed:documents)_"},
    {"CausalMaskMod", R"_(score_mod="softcap(10)" mask_mod="causal")_"},
};

constexpr Expression kOther[] = {
    // Affine in the score, with constants and scalars.
    {"Scaled", R"_(score_mod="score * 2")_"},
    {"Negated", R"_(score_mod="-score")_"},
    {"NegatedScale", R"_(score_mod="3 - 2 * score")_"},
    {"Divided", R"_(score_mod="score / 3")_"},
    {"ScalarTemperature",
     R"_(score_mod="score * t + s" capture=t:float32::packed:normal capture=s:bfloat16::packed:normal)_"},
    {"ConstantScore", R"_(score_mod="0.5")_"},
    {"IntegerScore", R"_(score_mod="kv_idx % 3")_"},
    {"RowShift", R"_(score_mod="score + 100 * q_idx")_"},
    {"RowShiftNegative", R"_(score_mod="score - 100 * (q_idx + h)")_"},
    {"LargeShift", R"_(score_mod="score + 5000")_"},
    {"LetShared", R"_(score_mod="let d = q_idx - kv_idx; score - 0.125 * abs(d) + 0.01 * d")_"},
    {"HeadSlopes", R"_(score_mod="score - exp2(-(h + 1) * 0.5) * abs(q_idx - kv_idx)")_"},
    // Integer arithmetic.
    {"FloorDivMod", R"_(score_mod="score + (q_idx - kv_idx) // 4 * 0.1 + (q_idx - kv_idx) % 5 * 0.2")_"},
    {"DivisionByZero", R"_(score_mod="score + kv_idx // (q_idx - kv_idx) + kv_idx % (q_idx - 3)")_"},
    {"IntegerPower", R"_(score_mod="score - (q_idx - kv_idx) ** 2 * 0.001")_"},
    {"WrapAround", R"_(score_mod="score + (q_idx * 4611686018427387904 * (kv_idx + 2)) % 7 * 0.1")_"},
    {"BitsOfInts", R"_(score_mod="score + ((q_idx & 3) | (kv_idx & 5)) * 0.1 + (~kv_idx & 1)")_"},
    {"WideIndices", R"_(score_mod="score + (q_idx * 100003 * 100003 + kv_idx) % 11 * 0.1")_"},
    {"Dilated", R"_(score_mod="where((q_idx - kv_idx) % 3 == 0, score, -inf)")_"},
    {"BlockDiagonal", R"_(score_mod="where(q_idx // 16 == kv_idx // 16, score, -inf)")_"},
    // Functions.
    {"Tanh", R"_(score_mod="tanh(score)")_"},
    {"Sigmoid", R"_(score_mod="sigmoid(score) * 4")_"},
    {"Silu", R"_(score_mod="silu(score)")_"},
    {"Gelu", R"_(score_mod="gelu(score * 2)")_"},
    {"Relu", R"_(score_mod="relu(score) + 0.5 * relu(-score)")_"},
    {"Erf", R"_(score_mod="3 * erf(score)")_"},
    {"Exp", R"_(score_mod="exp(min(score, 3))")_"},
    {"Exp2", R"_(score_mod="exp2(clamp(score, -20, 4))")_"},
    {"LogAbs", R"_(score_mod="log(abs(score) + 1) + log2(abs(score) + 0.5) - log1p(score * score)")_"},
    {"Sqrt", R"_(score_mod="sqrt(abs(score) + 0.1) - rsqrt(score * score + 1)")_"},
    {"SinCos", R"_(score_mod="sin(score) + cos(0.1 * (q_idx - kv_idx))")_"},
    {"PowerOfScore", R"_(score_mod="score ** 2 - abs(score) ** 1.5")_"},
    {"MinMaxClamp", R"_(score_mod="clamp(score, -1, 1) + max(score, 0.5 * score) + min(score, h, 2)")_"},
    {"Rounding", R"_(score_mod="score + floor(0.5 * kv_idx) + ceil(q_idx / 3) + round(kv_idx / 2) * 0.1")_"},
    {"Jumps", R"_(score_mod="score + floor(score * 4) * 0.25")_", Expression::kFew},
    {"JumpThreshold", R"_(score_mod="where(score > 0.5, score, score - 2)")_", Expression::kFew},
    {"SignOfScore", R"_(score_mod="score + sign(score)")_", Expression::kFew},
    {"FloatModulus", R"_(score_mod="score % 0.75 + score // 1.5")_", Expression::kFew},
    {"KinkIsNoJump", R"_(score_mod="where(score > 0, score, 0.5 * score)")_"},
    // Masks.
    {"MaskReadsScore", R"_(score_mod="where(score > -0.5, score, -inf)")_", Expression::kFew},
    {"MaskedAfterBias", R"_(score_mod="where(q_idx >= kv_idx, score, -inf) + 2 * h")_"},
    {"AdditiveMask", R"_(score_mod="score + where(q_idx >= kv_idx, 0, -inf)")_"},
    {"SubtractFromMask", R"_(score_mod="where(q_idx >= kv_idx, score, -inf) - 0.1 * kv_idx")_"},
    {"ScaledMask", R"_(score_mod="0.5 * where(q_idx >= kv_idx, score, -inf)")_"},
    {"MinOfMasks", R"_(score_mod="min(where(q_idx >= kv_idx, score, -inf), where(kv_idx % 2 == 0, 1, -inf))")_"},
    {"TanhMasksNothing", R"_(score_mod="tanh(where(q_idx >= kv_idx, score, -inf))")_"},
    {"EveryOtherRowMasked", R"_(score_mod="where(q_idx % 2 == 0, score, -inf)")_"},
    {"AllMasked", R"_(score_mod="where(kv_idx < 0, score, -inf)")_"},
    {"OneKept", R"_(score_mod="where(kv_idx == q_idx * 7 % 31, score, -inf)")_"},
    {"LastKept", R"_(score_mod="where(kv_idx >= q_idx, score, -inf)")_"},
    {"MaskByHeadAndBatch", R"_(score_mod="where((b + h + q_idx + kv_idx) % 2 == 0, score, -inf)")_"},
    {"ConditionalChain",
     R"_(score_mod="score if kv_idx <= q_idx < kv_idx + 20 else (-inf if h == 0 else score - 4)")_"},
    {"CausalWithMaskMod", R"_(score_mod="causal" mask_mod="kv_idx % 4 != 1 or q_idx == kv_idx")_"},
    {"MaskModOfCapture", R"_(score_mod="score" mask_mod="not drop[b, kv_idx]" capture=drop:bool:BxK:packed:normal)_"},
    {"RaggedLengths", R"_(score_mod="score" mask_mod="kv_idx < lengths[b]" capture=lengths:int32:B:packed:index)_"},
    {"DocumentsOfBatch",
     R"_(score_mod="where(ids[b, q_idx] == ids[b, kv_idx], score, -inf)" capture=ids:int32:BxK:padded:documents)_"},
    {"DocumentsCausal",
     R"_(score_mod="score" mask_mod="ids[b, q_idx] == ids[b, kv_idx] and q_idx >= kv_idx" capture=ids:int64:BxK:bshd:documents)_"},
    {"DocumentsOfInt8", R"_(score_mod="document(ids)" capture=ids:int8:K:padded:documents)_"},
    {"DocumentsOfBools", R"_(score_mod="document(ids)" capture=ids:bool:K:packed:normal)_"},
    {"DocumentsUnsorted", R"_(score_mod="document(ids)" capture=ids:int16:K:packed:normal)_"},
    {"DocumentsOfExtremes", R"_(score_mod="document(ids)" capture=ids:int64:K:packed:poison)_"},
    {"RaggedEnds", R"_(score_mod="score" mask_mod="kv_idx < end[q_idx]" capture=end:int32:Q:packed:index)_"},
    {"RaggedEndsOfBatch",
     R"_(score_mod="score" mask_mod="kv_idx < end[b, q_idx]" capture=end:int64:BxQ:padded:index)_"},
    // Captured tensors of every type, rank and layout, clamped or not.
    {"Bias4d", R"_(score_mod="score + bias[b, h, q_idx, kv_idx]" capture=bias:float32:BxHxQxK:packed:normal)_"},
    {"Bias4dHalf", R"_(score_mod="score + bias[b, h, q_idx, kv_idx]" capture=bias:float16:BxHxQxK:padded:normal)_"},
    {"Bias4dBroadcast",
     R"_(score_mod="score + bias[b, h, q_idx, kv_idx]" capture=bias:bfloat16:BxHxQxK:broadcast_b:normal)_"},
    {"BiasTransposed", R"_(score_mod="score + bias[q_idx, kv_idx]" capture=bias:float32:QxK:bshd:normal)_"},
    {"BiasColumn", R"_(score_mod="score * w[kv_idx]" capture=w:float32:K:packed:normal)_"},
    {"BiasRow", R"_(score_mod="score + w[b, q_idx]" capture=w:float32:BxQ:packed:normal)_"},
    {"Rank5",
     R"_(score_mod="score + t[b, h, q_idx // 8, kv_idx // 8, kv_idx % 8]" capture=t:float16:BxHx3x4x8:padded:normal)_"},
    {"RelativeTable",
     R"_(score_mod="score + table[h, q_idx - kv_idx + 63]" capture=table:float32:Hx128:packed:normal)_"},
    {"ClampedLow", R"_(score_mod="score + table[q_idx - kv_idx]" capture=table:float32:9:packed:normal)_"},
    {"ClampedHuge",
     R"_(score_mod="score + table[kv_idx * 1000000007 * 998244353]" capture=table:float32:7:padded:normal)_"},
    {"IndexFromPoison", R"_(score_mod="score + table[int(score * 1e30)]" capture=table:float32:5:packed:normal)_",
     Expression::kFew},
    {"Gather",
     R"_(score_mod="score + value[index[kv_idx]]" capture=value:float32:33:packed:normal capture=index:int64:K:packed:index)_"},
    {"Int8", R"_(score_mod="score + t[kv_idx] * 0.1" capture=t:int8:K:packed:poison)_"},
    {"Int16", R"_(score_mod="score + t[kv_idx] * 0.0001" capture=t:int16:K:packed:poison)_"},
    {"Int32", R"_(score_mod="score + t[kv_idx] % 10" capture=t:int32:K:padded:poison)_"},
    {"Int64", R"_(score_mod="score + t[kv_idx] % 10" capture=t:int64:K:packed:poison)_"},
    {"UInt8", R"_(score_mod="score + t[kv_idx] / 64" capture=t:uint8:K:packed:index)_"},
    {"Bool", R"_(score_mod="score + t[q_idx, kv_idx] * 3" capture=t:bool:QxK:bshd:normal)_"},
    {"ScalarsOfInts",
     R"_(score_mod="where(q_idx - kv_idx + reach >= 0, score, -inf) * 1.5" capture=reach:int16::packed:normal)_"},
    {"SixteenCaptures",
     R"_(score_mod="score + c0 + c1 + c2 + c3 + c4 + c5 + c6 + c7 + c8 + c9 + ca[h] + cb[h] + cc[kv_idx] + cd[kv_idx] + ce[q_idx] + cf[b]" )_"
     "capture=c0:float32::packed:normal capture=c1:float32::packed:normal capture=c2:int8::packed:normal "
     "capture=c3:bool::packed:normal capture=c4:float16::packed:normal capture=c5:bfloat16::packed:normal "
     "capture=c6:int64::packed:normal capture=c7:uint8::packed:normal capture=c8:int32::packed:normal "
     "capture=c9:int16::packed:normal capture=ca:float32:H:packed:normal capture=cb:int8:H:packed:normal "
     "capture=cc:float32:K:packed:normal capture=cd:float16:K:packed:normal capture=ce:bfloat16:Q:packed:normal "
     "capture=cf:float32:B:packed:normal"},
    // Poison: NaN and infinity where they belong, and nowhere else.
    {"Reciprocal", R"_(score_mod="1 / (abs(score) + 0.25)")_"},
    {"ReciprocalOfZero", R"_(score_mod="1 / score")_", Expression::kAny},
    {"LogOfScore", R"_(score_mod="log(score + 1.5)")_", Expression::kFew},
    {"LogGuarded", R"_(score_mod="where(score > 0, log(score), score)")_", Expression::kFew},
    {"SqrtGuarded", R"_(score_mod="where(score > 0.25, sqrt(score), -inf)")_", Expression::kFew},
    {"NanBesideMask",
     R"_(score_mod="where(q_idx >= kv_idx, score, -inf) + t[kv_idx]" capture=t:float32:K:packed:poison)_"},
    {"NanBehindMask", R"_(score_mod="where(kv_idx % 2 == 0, score, -inf) + where(kv_idx % 2 == 0, 0, nan)")_"},
    {"NanLiteralKept", R"_(score_mod="where(q_idx == 3 and kv_idx == 2, nan, score)")_"},
    {"InfLiteralKept", R"_(score_mod="where(q_idx == 3 and kv_idx == 2, inf, score)")_"},
    {"IsNanRescued", R"_(score_mod="let x = log(score); where(isnan(x), -5.0, x)")_", Expression::kFew},
    {"IsInfRescued",
     R"_(score_mod="let x = t[kv_idx]; where(isinf(x) or isnan(x), score, score + x)" capture=t:float32:K:packed:poison)_"},
    {"MinPropagatesNan", R"_(score_mod="min(score, t[kv_idx])" capture=t:float32:8:packed:poison)_"},
    {"IntOfHuge", R"_(score_mod="score + int(score * 1e30) % 3")_", Expression::kFew},
    {"IntOfNan", R"_(score_mod="score + int(nan) + int(inf) % 2 + int(-inf) % 2")_"},
    {"ZeroTimesInf", R"_(score_mod="score + where(kv_idx < 5, inf, 0) * 0")_"},
    {"MinusInfinityKept", R"_(score_mod="score - where(kv_idx % 3 == 0, inf, 0)")_"},
    {"DivideByIndex", R"_(score_mod="where(q_idx == kv_idx, 0, score / (q_idx - kv_idx))")_"},
};

// What is learned: captured tensors whose gradient's place, type and layout differ, row shifts among them.
constexpr Expression kLearnable[] = {
    {"AbsDistance", R"_(score_mod="score + t[abs(q_idx - kv_idx)]" capture=t:float32:K:packed:normal)_"},
    {"Pair", R"_(score_mod="score + t[q_idx, kv_idx]" capture=t:float32:QxK:packed:normal)_"},
    {"HeadPair", R"_(score_mod="score + t[h, q_idx, kv_idx]" capture=t:bfloat16:HxQxK:packed:normal)_"},
    {"BatchHeadPair", R"_(score_mod="score + t[b, h, q_idx, kv_idx]" capture=t:float16:BxHxQxK:padded:normal)_"},
    {"BatchHeadPairBroadcast",
     R"_(score_mod="score + t[b, h, q_idx, kv_idx]" capture=t:float32:BxHxQxK:broadcast_b:normal)_"},
    {"PairTransposed", R"_(score_mod="score + t[kv_idx, q_idx]" capture=t:float32:KxQ:bshd:normal)_"},
    {"RowFactor", R"_(score_mod="score * t[q_idx]" capture=t:float32:Q:packed:normal)_"},
    {"Window", R"_(score_mod="score + t[clamp(q_idx - kv_idx + 8, 0, 16)]" capture=t:float32:17:packed:normal)_"},
    {"WindowClampedByRead", R"_(score_mod="score + t[h, q_idx - kv_idx + 8]" capture=t:bfloat16:Hx17:packed:normal)_"},
    {"Column", R"_(score_mod="score + t[kv_idx]" capture=t:float32:K:packed:normal)_"},
    {"ColumnOfHead", R"_(score_mod="score + t[h, kv_idx]" capture=t:float16:HxK:padded:normal)_"},
    {"RowGather",
     R"_(score_mod="score + t[off[q_idx]]" capture=t:float32:12:packed:normal capture=off:int32:Q:packed:index row_shifts=t)_"},
    {"ColumnGather",
     R"_(score_mod="score + t[off[kv_idx]]" capture=t:float32:99:packed:normal capture=off:int64:K:packed:index)_"},
    {"ElementGather",
     R"_(score_mod="score + t[off[q_idx, kv_idx]]" capture=t:float16:50:packed:normal capture=off:int16:QxK:padded:index)_"},
    {"HeadGate", R"_(score_mod="score * sigmoid(g[h])" capture=g:float32:H:packed:normal)_"},
    {"TwoVectors",
     R"_(score_mod="score + t[q_idx] + u[kv_idx]" capture=t:float32:Q:packed:normal capture=u:float32:K:packed:normal row_shifts=t)_"},
    {"ReadTwice", R"_(score_mod="score + t[q_idx] * t[kv_idx]" capture=t:float32:K:packed:normal)_"},
    {"ReadAtTwoPlaces",
     R"_(score_mod="score + t[kv_idx] - 0.5 * t[q_idx - kv_idx + 3]" capture=t:bfloat16:40:packed:normal)_"},
    {"Scalars",
     R"_(score_mod="score * t + s" capture=t:float32::packed:normal capture=s:float32::packed:normal row_shifts=s)_"},
    {"ScalarsOfHalf",
     R"_(score_mod="score * t + s * kv_idx / 64" capture=t:bfloat16::packed:normal capture=s:float16::packed:normal)_"},
    {"HeadShift", R"_(score_mod="score + g[h]" capture=g:float32:H:packed:normal row_shifts=g)_"},
    {"BatchRowShift", R"_(score_mod="score - w[b, q_idx]" capture=w:float32:BxQ:padded:normal row_shifts=w)_"},
    {"SumOfShifts",
     R"_(score_mod="score + 2 * g[h] - w[q_idx] / 3" capture=g:float16:H:packed:normal capture=w:bfloat16:Q:packed:normal row_shifts=g,w)_"},
    {"ProductOfShifts",
     R"_(score_mod="score + g[h] * w[q_idx]" capture=g:float32:H:packed:normal capture=w:float32:Q:packed:normal row_shifts=g,w)_"},
    {"MaskedShift",
     R"_(score_mod="where(q_idx >= kv_idx, score + w[q_idx], -inf)" capture=w:float32:Q:packed:normal row_shifts=w)_"},
    {"ShiftOfMasked",
     R"_(score_mod="where(q_idx >= kv_idx, score, -inf) + w[b, q_idx]" capture=w:float32:BxQ:packed:normal row_shifts=w)_"},
    {"ShiftWithMaskMod",
     R"_(score_mod="score + w[q_idx]" mask_mod="(q_idx + kv_idx) % 3 != 0" capture=w:float32:Q:packed:normal row_shifts=w)_"},
    {"ScaledByShift", R"_(score_mod="(score + w[q_idx]) * 0.5" capture=w:float32:Q:packed:normal row_shifts=w)_"},
    {"NoShiftInTanh", R"_(score_mod="3 * tanh(score + w[q_idx])" capture=w:float32:Q:packed:normal)_"},
    {"NoShiftTimesScore", R"_(score_mod="score * (1 + 0.1 * w[q_idx]) + w[q_idx]" capture=w:float32:Q:packed:normal)_"},
    {"LearnedSlopes",
     R"_(score_mod="score - log1p(exp(g[h])) * abs(q_idx - kv_idx) * 0.1" capture=g:float32:H:packed:normal)_"},
    {"SiluOfBias", R"_(score_mod="silu(score * w[h, kv_idx])" capture=w:float32:HxK:packed:normal)_"},
    {"TanhOfBias", R"_(score_mod="2 * tanh(score + w[kv_idx])" capture=w:bfloat16:K:packed:normal)_"},
    {"ChoiceOfReads",
     R"_(score_mod="where(kv_idx % 2 == 0, score + t[kv_idx], score * u[kv_idx])" capture=t:float32:K:packed:normal capture=u:float32:K:packed:normal)_"},
    {"ChoiceByScore",
     R"_(score_mod="where(score > 0, score * t[kv_idx], score * u[kv_idx])" capture=t:float32:K:packed:normal capture=u:float32:K:packed:normal)_"},
    {"MaxOfBias", R"_(score_mod="max(score, t[kv_idx])" capture=t:float32:K:packed:normal)_"},
    {"ClampByScalars", R"_(score_mod="clamp(score, lo, lo + 2)" capture=lo:float32::packed:normal)_"},
    {"TiedMaximum",
     R"_(score_mod="score + max(t[kv_idx], t[kv_idx]) + min(t[h], t[h], 0.5)" capture=t:float32:K:packed:normal)_"},
    {"LearnedPower", R"_(score_mod="(abs(score) + 0.5) ** (1 + 0.2 * sigmoid(p))" capture=p:float32::packed:normal)_"},
    {"Quotient", R"_(score_mod="score / (1 + abs(t[kv_idx])) - t[q_idx] / 4" capture=t:float32:K:packed:normal)_"},
    {"SelectSafeRead",
     R"_(score_mod="where(t[kv_idx] > 0, score + log(t[kv_idx]), score)" capture=t:float32:K:packed:normal)_"},
    {"PoisonDropped",
     R"_(score_mod="where(isnan(t[kv_idx]) or isinf(t[kv_idx]), -inf, score * t[kv_idx])" capture=t:float32:K:packed:poison)_"},
    {"PoisonNotChosen",
     R"_(score_mod="let x = t[kv_idx]; where(isinf(x) or isnan(x), score, score * x)" capture=t:float32:K:packed:poison)_"},
    {"MaskedProduct",
     R"_(score_mod="where(q_idx >= kv_idx, score * t[kv_idx], -inf)" mask_mod="causal" capture=t:float32:K:packed:normal)_"},
    {"SquareUnderMaskMod", R"_(score_mod="score * score" mask_mod="causal")_"},
};

}  // namespace

std::span<const Expression> learnable_expressions() { return kLearnable; }
std::span<const Expression> registry_expressions() { return kRegistry; }
std::span<const Expression> other_expressions() { return kOther; }

Case with_generated_expression(const Case& spec, std::uint64_t seed, int style) {
  std::mt19937_64 generator(seed);
  test::RandomExpressionOptions options;
  options.size = 4 + static_cast<int>(generator() % 14);
  options.moderate = style < 2;
  options.jumps = style > 0;
  const test::RandomExpression expression = test::ExpressionGenerator(generator, options).run();
  Case result = spec;
  Random random(seed);
  result.captures.clear();
  result.score_mod = expression.text;
  result.mask_mod.clear();
  if (seed % 5 == 0) {
    // Names of captures would be the score_mod's, for other types: a mask has none here.
    options.is_mask = true;
    options.max_captures = 0;
    result.mask_mod = test::ExpressionGenerator(generator, options).run().text;
  }
  std::replace(result.score_mod.begin(), result.score_mod.end(), '\n', ' ');
  std::replace(result.mask_mod.begin(), result.mask_mod.end(), '\n', ' ');
  const auto parsed = dsl::parse(result.score_mod);
  if (!parsed) throw std::logic_error(dsl::format_error(parsed.error(), result.score_mod));
  for (const test::RandomCapture& capture : expression.captures) {
    const bool used = std::any_of(parsed->captures.begin(), parsed->captures.end(),
                                  [&](const dsl::Capture& read) { return read.name == capture.name; });
    if (!used) continue;
    CaptureSpec added;
    added.name = capture.name;
    for (int i = 0; i <= static_cast<int>(dsl::DType::kF32); ++i) {
      if (dsl::dtype_name(static_cast<dsl::DType>(i)) == capture.dtype) added.dtype = static_cast<dsl::DType>(i);
    }
    for (int i = 0; i < capture.rank; ++i) {
      const std::int64_t extents[] = {1, 2, 4, 9, spec.seqlen_kv, spec.seqlen_q};
      added.extent.push_back(std::max<std::int64_t>(random.pick(extents), 1));
    }
    const Layout layouts[] = {Layout::kPacked, Layout::kPacked, Layout::kPadded, Layout::kBshd,
                              Layout::kBroadcastBatch};
    added.layout = random.pick(layouts);
    added.fill = style == 2 ? Fill::kPoison : Fill::kNormal;
    result.captures.push_back(added);
  }
  return result;
}

Case with_expression(const Case& spec, const std::string& fields) {
  std::string text;
  bool quoted = false, extents = false;
  int colons = 0;
  for (std::size_t i = 0; i < fields.size(); ++i) {
    const char c = fields[i];
    if (c == '"') quoted = !quoted;
    if (!quoted && c == ' ') colons = 0;
    if (!quoted && c == ':') ++colons;
    extents = !quoted && colons == 2;
    if (extents && c == 'B') {
      text += std::to_string(spec.batch);
    } else if (extents && c == 'H') {
      text += std::to_string(spec.num_heads);
    } else if (extents && c == 'Q') {
      text += std::to_string(spec.seqlen_q);
    } else if (extents && c == 'K') {
      text += std::to_string(spec.seqlen_kv);
    } else {
      text += c;
    }
  }
  Case parsed;
  std::string error;
  if (!parse_case(text, &parsed, &error)) throw std::logic_error("expression '" + fields + "': " + error);
  Case result = spec;
  result.score_mod = parsed.score_mod;
  result.mask_mod = parsed.mask_mod;
  result.captures = parsed.captures;
  result.backward.row_shifts = parsed.backward.row_shifts;
  return result;
}

Case with_all_gradients(const Case& spec) {
  Case result = spec;
  BackwardSpec& backward = result.backward;
  backward.dq = backward.dk = backward.dv = true;
  backward.captures.clear();
  for (const CaptureSpec& capture : result.captures) {
    if (dsl::value_type(capture.dtype) == dsl::Type::kFloat) backward.captures.push_back({capture.name});
  }
  return result;
}

}  // namespace attnjit::numerics
