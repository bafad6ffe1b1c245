// Option values, made-up inputs and captured tensors.
#include "bench/problem.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <set>
#include <vector>

#include "bench/failure.h"

namespace attnjit::tool {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

template <typename F>
std::string message_of(F&& f) {
  try {
    f();
  } catch (const Failure& failure) {
    EXPECT_EQ(failure.fault(), Fault::kUser);
    return failure.what();
  }
  return "no failure";
}

const Shape kShape{2, 8, 100, 4, 300, 64};

TEST(Problem, HeadsShapeDtype) {
  EXPECT_EQ(parse_heads("16,2"), std::pair(std::int64_t{16}, std::int64_t{2}));
  EXPECT_EQ(parse_heads("16"), std::pair(std::int64_t{16}, std::int64_t{16}));
  EXPECT_THAT(message_of([] { parse_heads("16,3"); }), HasSubstr("no multiple"));
  for (const char* text : {"", "0", "-1", "a", "4,2,1", "4,", "99999999999999999999"}) {
    EXPECT_THAT(message_of([&] { parse_heads(text); }), HasSubstr("Hq,Hkv")) << text;
  }
  EXPECT_EQ(parse_shape(kShape.text()).seqlen_kv, 300);
  EXPECT_EQ(parse_shape("1,2,3,4,5,6").head_dim, 6);
  EXPECT_THAT(message_of([] { parse_shape("1,2,3"); }), HasSubstr("six numbers"));
  EXPECT_EQ(parse_dtype("bf16"), ElementType::kBFloat16);
  EXPECT_THAT(message_of([] { parse_dtype("int8"); }), HasSubstr("float32, float16 and bfloat16"));
  EXPECT_THAT(message_of([] { parse_backend("gpu"); }), HasSubstr("auto, sm90, sm80, math and cpu"));
}

TEST(Problem, CaptureSpecs) {
  const CaptureSpec ids = parse_capture("ids:int32:B,Sq");
  EXPECT_EQ(ids.name, "ids");
  EXPECT_EQ(ids.type, ElementType::kInt32);
  EXPECT_THAT(ids.dims, ElementsAre("B", "Sq"));
  const CaptureSpec cap = parse_capture("cap:float32:=30");
  EXPECT_TRUE(cap.dims.empty());
  EXPECT_EQ(cap.value, 30.0);
  EXPECT_TRUE(parse_capture("cap:f32").dims.empty());
  EXPECT_THAT(message_of([] { parse_capture("cap"); }), HasSubstr("two or three parts"));
  EXPECT_THAT(message_of([] { parse_capture("1x:f32:4"); }), HasSubstr("is not a name"));
  EXPECT_THAT(message_of([] { parse_capture("x:float64:4"); }), HasSubstr("'float64' is not one of bool"));
  EXPECT_THAT(message_of([] { parse_capture("x:f32:4=a"); }), HasSubstr("is not a number"));
  EXPECT_THAT(message_of([] { parse_capture("x:int8:4=1.5"); }), HasSubstr("not a whole number"));
}

TEST(Problem, ExpandsRegisteredMods) {
  const std::vector<RegisteredMod> mods{{"causal", {}, "q_idx >= kv_idx"},
                                        {"document", {"ids"}, "ids[b, q_idx] == ids[b, kv_idx]"},
                                        {"softcap", {"c"}, "c * tanh(score / c)"}};
  EXPECT_EQ(expand_mods("causal() and document(doc)", mods), "(q_idx >= kv_idx) and (doc[b, q_idx] == doc[b, kv_idx])");
  EXPECT_EQ(expand_mods("softcap(10 + x)", mods), "((10 + x) * tanh(score / (10 + x)))");
  EXPECT_EQ(expand_mods("causality + 1causal", mods), "causality + 1causal");
  EXPECT_EQ(expand_mods("softcap(", mods), "(c * tanh(score / c))(");
  const std::vector<RegisteredMod> loop{{"a", {}, "a() + a()"}};
  EXPECT_GE(expand_mods("a()", loop).size(), 1u);  // ends
}

TEST(Problem, InfersExtentsFromTheIndices) {
  EXPECT_THAT(*infer_extents("score + slopes[h] * 2", "slopes", 1, kShape), ElementsAre(8));
  EXPECT_THAT(*infer_extents("bias[b, h, m, token_kv]", "bias", 4, kShape), ElementsAre(2, 8, 100, 300));
  EXPECT_THAT(*infer_extents("ids[b,q_idx] == ids [b, kv_idx]", "ids", 2, kShape), ElementsAre(2, 300));
  EXPECT_THAT(*infer_extents("t[h, q_idx - kv_idx + 300]", "t", 2, kShape), ElementsAre(8, 400));
  EXPECT_THAT(*infer_extents("t[u[b]]", "u", 1, kShape), ElementsAre(2));
  EXPECT_THAT(*infer_extents("t[3]", "t", 1, kShape), ElementsAre(300));
  EXPECT_EQ(infer_extents("t[b]", "t", 2, kShape), std::nullopt);
  EXPECT_EQ(infer_extents("st[b]", "t", 1, kShape), std::nullopt);
  EXPECT_EQ(infer_extents("t[b", "t", 1, kShape), std::nullopt);
}

TEST(Problem, NormalValuesRepeatAndAreNormal) {
  constexpr int kSize = 200'000;
  Tensor a(ElementType::kFloat32, {kSize}), b(ElementType::kFloat32, {kSize});
  fill_normal(a, 1);
  fill_normal(b, 1);
  std::vector<double> values;
  double neighbours = 0.0;
  for (int i = 0; i < kSize; ++i) {
    ASSERT_EQ(a.get(i), b.get(i));
    if (i > 0) neighbours += a.get(i) * values.back();
    values.push_back(a.get(i));
  }
  EXPECT_NEAR(neighbours / kSize, 0.0, 0.01);  // two values come from one random number
  EXPECT_GT(std::set<double>(values.begin(), values.end()).size(), kSize * 97 / 100);
  std::ranges::sort(values);
  double distance = 0.0;  // Kolmogorov and Smirnov's: beyond 0.0044 once in a thousand seeds
  for (int i = 0; i < kSize; ++i) {
    const double p = 0.5 * std::erfc(-values[static_cast<std::size_t>(i)] / std::sqrt(2.0));
    distance = std::max(distance, std::fabs(p - (i + 0.5) / kSize));
  }
  EXPECT_LT(distance, 0.0044);
  EXPECT_GT(values.back(), 4.0);
  EXPECT_LT(values.front(), -4.0);
  fill_normal(b, 2);
  EXPECT_NE(a.get(0), b.get(0));
}

TEST(Problem, SampledRowsAreDistinctAndInside) {
  for (const Shape& shape : {kShape, Shape{1, 1, 1, 1, 7, 8}, Shape{1, 1, 3, 1, 7, 8}, Shape{1, 2, 40, 2, 7, 8}}) {
    const std::vector<attnjit_row> rows = sample_rows(shape, 16, 5);
    EXPECT_EQ(rows.size(),
              static_cast<std::size_t>(std::min<std::int64_t>(16, shape.batch * shape.heads_q * shape.seqlen_q)));
    bool last = false;
    for (const attnjit_row& row : rows) {
      EXPECT_TRUE(row.b >= 0 && row.b < shape.batch && row.h >= 0 && row.h < shape.heads_q && row.q_idx >= 0 &&
                  row.q_idx < shape.seqlen_q);
      last = last || (row.b == shape.batch - 1 && row.h == shape.heads_q - 1 && row.q_idx == shape.seqlen_q - 1);
    }
    EXPECT_TRUE(last);
  }
}

TEST(Problem, PytorchSpellings) {
  const char* arguments[] = {"-mods", "noop", "-nh", "16,2", "-dtype=float32", "-b", "2", "--", "-mods"};
  EXPECT_THAT(normalize_arguments(arguments),
              ElementsAre("--mods", "noop", "--nh", "16,2", "--dtype=float32", "-b", "2", "--", "-mods"));
  EXPECT_EQ(shell_quoted("16,2"), "16,2");
  EXPECT_EQ(shell_quoted("score + 'x'"), "'score + '\\''x'\\'''");
  EXPECT_EQ(shell_quoted(""), "''");
}

}  // namespace
}  // namespace attnjit::tool
