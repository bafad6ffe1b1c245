// The oracles against attention written by hand: the registered mods as C++ functions in double precision.
#include "tests/numerics/oracle.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <string>

#include "tests/numerics/check.h"
#include "tests/numerics/expressions.h"

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct At {
  double score;
  std::int64_t b, h, q, kv;
  const Tensor* capture;  // of the mods that have one
};

struct HandWritten {
  const char* name;
  const char* fields;
  double (*mod)(const At&);
};

double kept(bool condition, double value) { return condition ? value : -kInfinity; }

constexpr HandWritten kMods[] = {
    {"Noop", R"_(score_mod="noop")_", [](const At& at) { return at.score; }},
    {"Causal", R"_(score_mod="causal")_", [](const At& at) { return kept(at.q >= at.kv, at.score); }},
    {"Rel", R"_(score_mod="rel")_", [](const At& at) { return at.score + static_cast<double>(at.q - at.kv); }},
    {"HeadBias", R"_(score_mod="head_bias")_", [](const At& at) { return at.score + 2.0 * static_cast<double>(at.h); }},
    {"Alibi", R"_(score_mod="alibi" capture=alibi_slopes:float32:H:packed:normal)_",
     [](const At& at) { return at.score + at.capture->at({at.h}) * static_cast<double>(at.kv - at.q); }},
    {"AlibiExp2", R"_(score_mod="alibi_exp2(4)")_",
     [](const At& at) {
       return at.score + std::exp2(-8.0 * static_cast<double>(at.h + 1) / 4.0) * static_cast<double>(at.kv - at.q);
     }},
    {"Softcap", R"_(score_mod="softcap(1.5)")_", [](const At& at) { return 1.5 * std::tanh(at.score / 1.5); }},
    {"SlidingWindow", R"_(score_mod="sliding_window(7)")_",
     [](const At& at) { return kept(at.kv <= at.q && at.q <= at.kv + 7, at.score); }},
    {"PrefixLm", R"_(score_mod="prefix_lm(11)")_",
     [](const At& at) { return kept(at.kv < 11 || at.q >= at.kv, at.score); }},
    {"Document", R"_(score_mod="document(ids)" capture=ids:int32:K:packed:documents)_",
     [](const At& at) { return kept(at.capture->at({at.q}) == at.capture->at({at.kv}), at.score); }},
    {"MaskMod", R"_(score_mod="rel" mask_mod="causal")_",
     [](const At& at) { return kept(at.q >= at.kv, at.score + static_cast<double>(at.q - at.kv)); }},
};

class NumericsOracle : public testing::TestWithParam<HandWritten> {};

TEST_P(NumericsOracle, AgreesWithAttentionByHand) {
  for (const dsl::DType dtype : {dsl::DType::kF32, dsl::DType::kBF16, dsl::DType::kF16}) {
    const Case spec = with_expression({.batch = 2,
                                       .num_heads = 4,
                                       .num_heads_kv = 2,
                                       .seqlen_q = 23,
                                       .seqlen_kv = 29,
                                       .head_dim = 12,
                                       .head_dim_v = 7,
                                       .dtype = dtype,
                                       .layout_k = Layout::kBshd,
                                       .layout_v = Layout::kPadded,
                                       .scale = 0.4f,
                                       .rows = 400},
                                      GetParam().fields);
    Problem problem;
    std::string error;
    ASSERT_TRUE(make_problem(spec, &problem, &error)) << error;
    const Gold gold = compute_gold(problem, sample_rows(spec));
    ASSERT_EQ(gold.row.size(), 2u * 4u * 23u);
    const RunResult reference = run_reference(problem, gold.rows());
    ASSERT_EQ(reference.error, "");
    std::size_t number = 0;
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t h = 0; h < 4; ++h) {
        for (std::int64_t i = 0; i < 23; ++i, ++number) {
          double sum = 0.0, largest = -kInfinity;
          std::vector<double> m, o(7, 0.0);
          for (std::int64_t j = 0; j < 29; ++j) {
            double score = 0.0;
            for (std::int64_t d = 0; d < 12; ++d) {
              score += problem.q.at({b, h, i, d}) * problem.k.at({b, h / 2, j, d});
            }
            const Tensor* const capture = problem.captures.empty() ? nullptr : &problem.captures[0].tensor;
            m.push_back(GetParam().mod({score * static_cast<double>(0.4f), b, h, i, j, capture}));
            largest = std::max(largest, m.back());
          }
          for (std::int64_t j = 0; j < 29; ++j) {
            const double p = std::exp(m[static_cast<std::size_t>(j)] - largest);
            sum += p;
            for (std::int64_t d = 0; d < 7; ++d) {
              o[static_cast<std::size_t>(d)] += p * problem.v.at({b, h / 2, j, d});
            }
          }
          const GoldRow& row = gold.row[number];
          ASSERT_EQ(row.at.q_idx, i);
          ASSERT_FALSE(row.undecided);
          ASSERT_NEAR(row.lse, largest + std::log(sum), 1e-12);
          ASSERT_NEAR(row.row_max, largest, 1e-12);
          ASSERT_NEAR(reference.outcome.lse[number], largest + std::log(sum), 1e-12);
          ASSERT_NEAR(reference.outcome.row_max[number], largest, 1e-12);
          for (std::size_t d = 0; d < 7; ++d) {
            ASSERT_NEAR(row.o[d], o[d] / sum, 1e-12) << "b=" << b << " h=" << h << " q_idx=" << i;
            ASSERT_NEAR(reference.outcome.o[number * 7 + d], o[d] / sum, 1e-12) << "b=" << b << " h=" << h << " " << i;
          }
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Registry, NumericsOracle, testing::ValuesIn(kMods),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace attnjit::numerics
