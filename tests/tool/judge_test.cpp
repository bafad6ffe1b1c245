// The judge of sampled rows accepts a right result and rejects wrong ones.
#include "bench/judge.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>
#include <vector>

#include "bench/api.h"

namespace attnjit::tool {
namespace {

using ::testing::HasSubstr;

constexpr int kKeys = 200, kDim = 24;

// One row of attention in double precision: q, k, v of the given type, a mod of the score and the key's place. The
// bounds are numerics.md's to first order, without what a sum over the row may round.
struct Row {
  std::vector<double> o, o_bound;
  double lse = 0.0, lse_bound = 0.0;
  RowTruth truth() const { return {o, o_bound, lse, lse_bound, true}; }
};

struct Inputs {
  ElementType type;
  std::vector<double> q, k, v;

  explicit Inputs(ElementType element_type) : type(element_type) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    Tensor one(type, {});
    const auto value = [&] {
      one.set(0, normal(random));
      return one.get(0);
    };
    for (int i = 0; i < kDim; ++i) q.push_back(value());
    for (int i = 0; i < kKeys * kDim; ++i) k.push_back(value());
    for (int i = 0; i < kKeys * kDim; ++i) v.push_back(value());
  }
};

using Mod = std::function<double(double, int)>;

// `keys`: how many are attended to; `slope`: |dm/ds| of the mod, for the bound.
Row attend(const Inputs& in, double scale, const Mod& mod, int keys = kKeys, double slope = 1.0) {
  std::vector<double> m(keys), weight(keys);
  double max = -INFINITY, sum = 0.0;
  for (int j = 0; j < keys; ++j) {
    double dot = 0.0, mass = 0.0;
    for (int d = 0; d < kDim; ++d) {
      dot += in.q[d] * in.k[j * kDim + d];
      mass += std::fabs(in.q[d] * in.k[j * kDim + d]);
    }
    m[j] = mod(dot * scale, j);
    weight[j] = 1 + std::fabs(m[j]) + slope * scale * mass;
    max = std::max(max, m[j]);
  }
  Row row;
  row.o.assign(kDim, 0.0);
  row.o_bound.assign(kDim, 0.0);
  if (max == -INFINITY) {
    row.lse = -INFINITY;
    return row;
  }
  std::vector<double> p(keys);
  for (int j = 0; j < keys; ++j) sum += p[j] = std::exp(m[j] - max);
  row.lse = max + std::log(sum);
  row.lse_bound = 1e-4 + 1e-5 * std::fabs(row.lse);
  for (int j = 0; j < keys; ++j) {
    if (p[j] > 0) row.lse_bound += p[j] / sum * 8 * 0x1p-24 * weight[j];
  }
  const double unit = unit_roundoff(in.type);
  for (int d = 0; d < kDim; ++d) {
    for (int j = 0; j < keys; ++j) {
      row.o[d] += p[j] / sum * in.v[j * kDim + d];
      row.o_bound[d] += 4 * unit * p[j] / sum * std::fabs(in.v[j * kDim + d]);
    }
    for (int j = 0; j < keys; ++j) {
      const double distance = std::fabs(in.v[j * kDim + d] - row.o[d]);
      if (p[j] > 0) row.o_bound[d] += 8 * 0x1p-24 * p[j] / sum * distance * weight[j];
    }
  }
  return row;
}

std::vector<double> rounded(const std::vector<double>& values, ElementType type) {
  Tensor one(type, {});
  std::vector<double> result;
  for (double value : values) {
    one.set(0, value);
    result.push_back(one.get(0));
  }
  return result;
}

Verdict judge(const Row& result, const Row& gold, ElementType type) {
  return judge_row(rounded(result.o, type), static_cast<float>(result.lse), gold.truth(), type, "row");
}

class JudgeTypes : public ::testing::TestWithParam<ElementType> {};

TEST_P(JudgeTypes, AcceptsTheRoundedTruthAndRejectsWrongKernels) {
  const Inputs in(GetParam());
  const double scale = 1 / std::sqrt(kDim);
  const Mod mod = [](double s, int j) { return s - 0.01 * j; };
  const Row gold = attend(in, scale, mod);
  const Verdict right = judge(gold, gold, in.type);
  EXPECT_TRUE(right.ok) << right.why;
  EXPECT_LT(right.o_of_bound, 0.5);

  const struct {
    const char* name;
    Row row;
  } wrong[] = {
      {"scale dropped", attend(in, 1.0, mod)},
      {"mod left out", attend(in, scale, [](double s, int) { return s; })},
      {"index off by one", attend(in, scale, [](double s, int j) { return s - 0.01 * (j == 0 ? 1 : j * 1.05); })},
      {"last block of keys skipped", attend(in, scale, mod, kKeys - 8)},
      {"one key masked", attend(in, scale, [&](double s, int j) { return j == 5 ? -INFINITY : mod(s, j); })},
  };
  for (const auto& [name, row] : wrong) {
    const Verdict verdict = judge(row, gold, in.type);
    EXPECT_FALSE(verdict.ok) << name;
    EXPECT_THAT(verdict.why, HasSubstr("row: "));
  }
}

INSTANTIATE_TEST_SUITE_P(Types, JudgeTypes,
                         ::testing::Values(ElementType::kFloat32, ElementType::kFloat16, ElementType::kBFloat16));

TEST(Judge, RejectsHalfAPercentAndOneWrongElement) {
  const Inputs in(ElementType::kFloat32);
  const Row gold = attend(in, 0.2, [](double s, int) { return s; });
  Row wrong = gold;
  for (double& value : wrong.o) value *= 1.005;
  EXPECT_FALSE(judge(wrong, gold, in.type).ok);
  wrong = gold;
  wrong.o[7] += 1e-4;
  const Verdict verdict = judge(wrong, gold, in.type);
  EXPECT_FALSE(verdict.ok);
  EXPECT_THAT(verdict.why, HasSubstr("o[7]"));
  EXPECT_NEAR(verdict.max_error, 1e-4, 1e-6);
}

TEST(Judge, RejectsAWrongLse) {
  const Inputs in(ElementType::kBFloat16);
  const Row gold = attend(in, 0.2, [](double s, int) { return s; });
  Row wrong = gold;
  wrong.lse += 1e-3;
  const Verdict verdict = judge(wrong, gold, in.type);
  EXPECT_FALSE(verdict.ok);
  EXPECT_THAT(verdict.why, HasSubstr("lse"));
  wrong.lse = gold.lse / std::log(2.0);  // in log2 units
  EXPECT_FALSE(judge(wrong, gold, in.type).ok);
}

TEST(Judge, HoldsTheNonFinitePattern) {
  const double nan = NAN, inf = INFINITY;
  const auto verdict = [&](double value, double gold, double lse, double gold_lse,
                           ElementType type = ElementType::kFloat32) {
    const bool masked = gold_lse == -inf;
    const std::vector<double> o{value}, g{gold}, bound{masked ? 0.0 : 4 * unit_roundoff(type)};
    return judge_row(o, lse, {g, bound, gold_lse, masked ? 0.0 : 1e-4, true}, type, "row").ok;
  };
  EXPECT_TRUE(verdict(nan, nan, nan, nan));
  EXPECT_TRUE(verdict(nan, nan, inf, nan)) << "exp of infinity taken at its word";
  EXPECT_FALSE(verdict(nan, nan, -inf, nan));
  EXPECT_FALSE(verdict(nan, nan, 1, nan));
  EXPECT_TRUE(verdict(inf, inf, 1, 1));
  EXPECT_TRUE(verdict(0, 0, -inf, -inf));
  EXPECT_FALSE(verdict(nan, 0.5, 1, 1));
  EXPECT_FALSE(verdict(0.5, nan, 1, 1));
  EXPECT_FALSE(verdict(-inf, inf, 1, 1));
  EXPECT_FALSE(verdict(0.5, inf, 1, 1));
  EXPECT_FALSE(verdict(0.5, 0.5, nan, 1));
  EXPECT_FALSE(verdict(0.5, 0.5, 1, -inf));
  EXPECT_FALSE(verdict(1e-30, 0, -inf, -inf)) << "a fully masked row is exactly zero";
  EXPECT_FALSE(verdict(0, 0, -1e30, -inf));
  EXPECT_TRUE(verdict(inf, 65520, 1, 1, ElementType::kFloat16)) << "beyond the output type";
  EXPECT_FALSE(verdict(inf, 60000, 1, 1, ElementType::kFloat16));
}

TEST(Judge, CountsWhatItCannotJudge) {
  const std::vector<double> o{0.5, 7.0}, gold{0.5, 0.25}, bound{1e-6, INFINITY}, nothing{INFINITY, INFINITY};
  const ElementType type = ElementType::kFloat32;
  Verdict verdict = judge_row(o, 1.0, {gold, bound, 1.0, 1e-4, true}, type, "row");
  EXPECT_TRUE(verdict.ok);
  EXPECT_EQ(verdict.unbounded, 1u);
  EXPECT_EQ(verdict.left_out, 0u);
  verdict.merge(judge_row(o, 5.0, {gold, nothing, 1.0, INFINITY, false}, type, "row"));
  EXPECT_TRUE(verdict.ok);
  EXPECT_EQ(verdict.rows, 2u);
  EXPECT_EQ(verdict.left_out, 1u);
  EXPECT_EQ(verdict.unbounded, 1u);
  EXPECT_EQ(allowed_left_out(16), 1u);
  EXPECT_EQ(allowed_left_out(199), 1u);
  EXPECT_EQ(allowed_left_out(1000), 10u);
}

TEST(Judge, MergeKeepsTheFirstReasonAndTheWorstNumbers) {
  Verdict all;
  all.merge({.ok = true, .max_error = 0.25, .o_of_bound = 0.5});
  all.merge({.ok = false, .max_error = 0.125, .o_of_bound = 3.0, .why = "first"});
  all.merge({.ok = false, .lse_of_bound = 2.0, .why = "second"});
  EXPECT_FALSE(all.ok);
  EXPECT_EQ(all.why, "first");
  EXPECT_EQ(all.max_error, 0.25);
  EXPECT_EQ(all.o_of_bound, 3.0);
  EXPECT_EQ(all.lse_of_bound, 2.0);
}

// The library's bounds are the rule's, computed here once more to first order.
TEST(Judge, BoundsOfTheLibraryAreTheRules) {
  for (const ElementType type : {ElementType::kFloat32, ElementType::kBFloat16}) {
    const Inputs in(type);
    Tensor q(in.type, {1, 1, 1, kDim}), k(in.type, {1, 1, kKeys, kDim}), v(in.type, {1, 1, kKeys, kDim});
    for (int i = 0; i < kDim; ++i) q.set(i, in.q[i]);
    for (int i = 0; i < kKeys * kDim; ++i) k.set(i, in.k[i]), v.set(i, in.v[i]);
    const DLTensor q_dl = q.dl(), k_dl = k.dl(), v_dl = v.dl();
    const float scale = 0.25f;
    attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
    attention.score_mod = "where(kv_idx < 150, 3 * score - 0.01 * kv_idx, -inf)";
    attention.q = &q_dl;
    attention.k = &k_dl;
    attention.v = &v_dl;
    attention.scale = &scale;
    const Row gold = attend(in, scale, [](double s, int j) { return 3 * s - 0.01 * j; }, 150, 3.0);

    const ContextPtr context = make_context(1);
    const attnjit_row row{0, 0, 0};
    std::vector<double> o(kDim), bound(kDim);
    double lse_bound = 0.0;
    unsigned char decided = 0;
    check(attnjit_reference(context.get(), &attention, &row, 1, o.data(), nullptr, nullptr));
    check(attnjit_reference_bounds(context.get(), &attention, &row, 1, bound.data(), &lse_bound, &decided));
    EXPECT_EQ(decided, 1);
    EXPECT_GE(lse_bound, gold.lse_bound * 0.999);
    EXPECT_LE(lse_bound, gold.lse_bound * 1.1);
    for (int d = 0; d < kDim; ++d) {
      EXPECT_NEAR(o[d], gold.o[d], 1e-12);
      EXPECT_GE(bound[d], gold.o_bound[d] * 0.999);
      EXPECT_LE(bound[d], gold.o_bound[d] * (type == ElementType::kFloat32 ? 3.0 : 1.1));
    }

    // What a fully masked row gives is certain.
    attention.mask_mod = "kv_idx < 0";
    check(attnjit_reference_bounds(context.get(), &attention, &row, 1, bound.data(), &lse_bound, &decided));
    EXPECT_EQ(bound, std::vector<double>(kDim, 0.0));
    EXPECT_EQ(lse_bound, 0.0);
    EXPECT_EQ(decided, 1);
    attention.mask_mod = nullptr;

    // Every score lies within its rounding error of a jump that is this steep; nothing can be said of the row.
    attention.score_mod = "floor(score * 1e9) % 2";
    check(attnjit_reference_bounds(context.get(), &attention, &row, 1, bound.data(), &lse_bound, &decided));
    EXPECT_EQ(bound, std::vector<double>(kDim, INFINITY));
    EXPECT_EQ(lse_bound, INFINITY);
    EXPECT_EQ(decided, 0);
    attention.score_mod = "score";

    // An infinite value at a dropped key makes its feature unspecified, and no other.
    attention.mask_mod = "kv_idx != 7";
    v.set(7 * kDim + 3, INFINITY);
    check(attnjit_reference_bounds(context.get(), &attention, &row, 1, bound.data(), &lse_bound, &decided));
    EXPECT_EQ(decided, 1);
    for (int d = 0; d < kDim; ++d) EXPECT_EQ(std::isinf(bound[d]), d == 3);

    const attnjit_row outside{0, 0, 1};
    EXPECT_EQ(attnjit_reference_bounds(context.get(), &attention, &outside, 1, bound.data(), nullptr, nullptr),
              ATTNJIT_INVALID_ARGUMENT);
    EXPECT_THAT(attnjit_last_error(), HasSubstr("rows[0]"));
  }
}

}  // namespace
}  // namespace attnjit::tool
