// The oracles of the backward against derivatives written by hand and against differences of the whole loss.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "tests/numerics/check.h"
#include "tests/numerics/expressions.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct At {
  double score;
  std::int64_t b, h, q, kv;
  const Tensor* capture;  // of the mods that have one
};

// A modified score, its derivatives to the score and to the one captured element that it reads, at `place`.
struct Value {
  double m, slope = 1.0, captured = 0.0;
  std::int64_t place = 0;
};

struct HandWritten {
  const char* name;
  const char* fields;
  Value (*mod)(const At&);
};

Value kept(bool condition, double value) { return {condition ? value : -kInfinity}; }
double distance(const At& at) { return static_cast<double>(at.q - at.kv); }

constexpr HandWritten kMods[] = {
    {"Noop", R"_(score_mod="noop")_", [](const At& at) { return Value{at.score}; }},
    {"Causal", R"_(score_mod="causal")_", [](const At& at) { return kept(at.q >= at.kv, at.score); }},
    {"Rel", R"_(score_mod="rel")_", [](const At& at) { return Value{at.score + distance(at)}; }},
    {"HeadBias", R"_(score_mod="head_bias")_",
     [](const At& at) { return Value{at.score + 2.0 * static_cast<double>(at.h)}; }},
    {"Alibi", R"_(score_mod="alibi" capture=alibi_slopes:float32:H:packed:normal)_",
     [](const At& at) { return Value{at.score - at.capture->at({at.h}) * distance(at), 1.0, -distance(at), at.h}; }},
    {"AlibiExp2", R"_(score_mod="alibi_exp2(4)")_",
     [](const At& at) {
       return Value{at.score - std::exp2(-8.0 * static_cast<double>(at.h + 1) / 4.0) * distance(at)};
     }},
    {"Softcap", R"_(score_mod="softcap(1.5)")_",
     [](const At& at) {
       const double t = std::tanh(at.score / 1.5);
       return Value{1.5 * t, 1.0 - t * t};
     }},
    {"SlidingWindow", R"_(score_mod="sliding_window(7)")_",
     [](const At& at) { return kept(at.kv <= at.q && at.q <= at.kv + 7, at.score); }},
    {"PrefixLm", R"_(score_mod="prefix_lm(11)")_",
     [](const At& at) { return kept(at.kv < 11 || at.q >= at.kv, at.score); }},
    {"Document", R"_(score_mod="document(ids)" capture=ids:float32:K:packed:documents)_",
     [](const At& at) { return kept(at.capture->at({at.q}) == at.capture->at({at.kv}), at.score); }},
    {"MaskMod", R"_(score_mod="2 * score" mask_mod="causal")_",
     [](const At& at) { return Value{kept(at.q >= at.kv, 2.0 * at.score).m, 2.0}; }},
    {"Table", R"_(score_mod="score * t[clamp(q_idx - kv_idx, 0, 9)]" capture=t:float32:10:packed:normal)_",
     [](const At& at) {
       const std::int64_t place = std::clamp<std::int64_t>(at.q - at.kv, 0, 9);
       return Value{at.score * at.capture->at({place}), at.capture->at({place}), at.score, place};
     }},
    {"Shift", R"_(score_mod="score + t[q_idx]" capture=t:float32:Q:packed:normal row_shifts=t)_",
     [](const At& at) { return Value{at.score + at.capture->at({at.q}), 1.0, 1.0, at.q}; }},
};

class NumericsBackwardOracle : public testing::TestWithParam<HandWritten> {};

void expect_near(const std::vector<double>& theirs, const std::vector<double>& expected, const std::string& what) {
  ASSERT_EQ(theirs.size(), expected.size()) << what;
  for (std::size_t i = 0; i < theirs.size(); ++i) {
    ASSERT_NEAR(theirs[i], expected[i], 1e-11 * (1.0 + std::fabs(expected[i]))) << what << ", element " << i;
  }
}

TEST_P(NumericsBackwardOracle, AgreesWithDerivativesByHand) {
  for (const dsl::DType dtype : {dsl::DType::kF32, dsl::DType::kBF16}) {
    Case spec = with_all_gradients(with_expression({.batch = 2,
                                                    .num_heads = 4,
                                                    .num_heads_kv = 2,
                                                    .seqlen_q = 17,
                                                    .seqlen_kv = 21,
                                                    .head_dim = 12,
                                                    .head_dim_v = 7,
                                                    .dtype = dtype,
                                                    .layout_k = Layout::kBshd,
                                                    .layout_v = Layout::kPadded,
                                                    .scale = 0.4f},
                                                   GetParam().fields));
    spec.backward.grad_lse = true;
    spec.backward.layout_grad_out = Layout::kPadded;
    Problem problem = make(to_line(spec));
    const double scale = static_cast<double>(0.4f);
    const Tensor* const capture = problem.captures.empty() ? nullptr : &problem.captures[0].tensor;
    std::vector<double> dq(2 * 4 * 17 * 12), dk(2 * 2 * 21 * 12), dv(2 * 2 * 21 * 7);
    std::vector<double> captured(capture == nullptr ? 0 : static_cast<std::size_t>(capture->size()));
    const auto place = [](std::int64_t a, std::int64_t b, std::int64_t extent_b, std::int64_t c, std::int64_t extent_c,
                          std::int64_t d, std::int64_t extent_d) {
      return static_cast<std::size_t>(((a * extent_b + b) * extent_c + c) * extent_d + d);
    };
    for (std::int64_t b = 0; b < 2; ++b) {
      for (std::int64_t h = 0; h < 4; ++h) {
        for (std::int64_t i = 0; i < 17; ++i) {
          std::vector<Value> m;
          std::vector<double> o(7, 0.0);
          double sum = 0.0;
          for (std::int64_t j = 0; j < 21; ++j) {
            double score = 0.0;
            for (std::int64_t d = 0; d < 12; ++d) {
              score += problem.q.at({b, h, i, d}) * problem.k.at({b, h / 2, j, d});
            }
            m.push_back(GetParam().mod({score * scale, b, h, i, j, capture}));
            sum += std::exp(m.back().m);
          }
          double through_o = 0.0;
          for (std::int64_t j = 0; j < 21; ++j) {
            for (std::int64_t d = 0; d < 7; ++d) {
              through_o += std::exp(m[static_cast<std::size_t>(j)].m) / sum * problem.v.at({b, h / 2, j, d}) *
                           problem.grad_out.at({b, h, i, d});
            }
          }
          for (std::int64_t j = 0; j < 21; ++j) {
            const Value& value = m[static_cast<std::size_t>(j)];
            const double p = std::exp(value.m) / sum;
            double dp = 0.0;
            for (std::int64_t d = 0; d < 7; ++d) {
              dp += problem.grad_out.at({b, h, i, d}) * problem.v.at({b, h / 2, j, d});
              dv[place(b, h / 2, 2, j, 21, d, 7)] += p * problem.grad_out.at({b, h, i, d});
            }
            const double dm = p * (dp - through_o + problem.grad_lse.at({b, h, i}));
            for (std::int64_t d = 0; d < 12; ++d) {
              dq[place(b, h, 4, i, 17, d, 12)] += scale * dm * value.slope * problem.k.at({b, h / 2, j, d});
              dk[place(b, h / 2, 2, j, 21, d, 12)] += scale * dm * value.slope * problem.q.at({b, h, i, d});
            }
            if (capture != nullptr) captured[static_cast<std::size_t>(value.place)] += dm * value.captured;
          }
        }
      }
    }
    const GoldGradients gold = compute_gold_gradients(problem);
    expect_near(gold.wanted[0].value, dq, "dq");
    expect_near(gold.wanted[1].value, dk, "dk");
    expect_near(gold.wanted[2].value, dv, "dv");
    if (capture != nullptr) expect_near(gold.wanted[3].value, captured, gold.wanted[3].name);

    const ReferenceGradients reference = run_reference_backward(problem);
    ASSERT_EQ(reference.error, "");
    expect_near(reference.gradients.dq, dq, "attnjit_reference_backward: dq");
    expect_near(reference.gradients.dk, dk, "attnjit_reference_backward: dk");
    expect_near(reference.gradients.dv, dv, "attnjit_reference_backward: dv");
    if (capture != nullptr) expect_near(reference.gradients.captures[0], captured, "attnjit_reference_backward");
  }
}

INSTANTIATE_TEST_SUITE_P(Registry, NumericsBackwardOracle, testing::ValuesIn(kMods),
                         [](const auto& info) { return std::string(info.param.name); });

// Every element of every input is moved a little either way, and the loss with it.
void expect_differences(const Case& spec) {
  Problem problem = make(to_line(spec));
  const GoldGradients gold = compute_gold_gradients(problem);
  std::vector<Tensor*> inputs = {&problem.q, &problem.k, &problem.v};
  for (const GradientSpec& wanted : spec.backward.captures) {
    const auto found = std::ranges::find(problem.captures, wanted.name, &NamedTensor::name);
    inputs.push_back(&found->tensor);
  }
  ASSERT_EQ(inputs.size(), gold.wanted.size());
  for (std::size_t number = 0; number < inputs.size(); ++number) {
    Tensor& input = *inputs[number];
    std::size_t at = 0;
    for_each_index(input.shape(), [&](auto index) {
      const double expected = gold.wanted[number].value[at++];
      const double before = input.at(index), step = 0x1p-12 * std::max(1.0, std::fabs(before));
      double loss[2], value[2];
      for (const int side : {0, 1}) {
        input.set(index, side == 0 ? before - step : before + step);
        value[side] = input.at(index);
        loss[side] = compute_loss(problem);
      }
      input.set(index, before);
      const double difference = (loss[1] - loss[0]) / (value[1] - value[0]);
      // A row that is NaN.
      if (std::isnan(difference) && std::isnan(expected)) return;
      EXPECT_NEAR(difference, expected, 1e-5 * (1.0 + std::fabs(expected)))
          << gold.wanted[number].name << ", element " << at - 1 << " of " << to_line(spec);
    });
  }
}

class NumericsBackwardOracleDifferences : public testing::TestWithParam<Expression> {};

TEST_P(NumericsBackwardOracleDifferences, AreTheGradients) {
  Case spec = with_expression({.batch = 1,
                               .num_heads = 2,
                               .num_heads_kv = 1,
                               .seqlen_q = 4,
                               .seqlen_kv = 5,
                               .head_dim = 3,
                               .head_dim_v = 2,
                               .seed = 3},
                              GetParam().fields);
  // A step must be one in the captured type, too; and what is not finite has no differences.
  for (CaptureSpec& capture : spec.captures) {
    if (dsl::value_type(capture.dtype) == dsl::Type::kFloat) capture.dtype = dsl::DType::kF32;
    if (capture.layout == Layout::kBroadcastBatch) capture.layout = Layout::kPacked;
    if (capture.fill == Fill::kPoison) capture.fill = Fill::kNormal;
  }
  spec = with_all_gradients(spec);
  spec.backward.grad_lse = true;
  expect_differences(spec);
}

std::string name_of(const testing::TestParamInfo<Expression>& info) { return info.param.name; }
INSTANTIATE_TEST_SUITE_P(Registry, NumericsBackwardOracleDifferences, testing::ValuesIn(registry_expressions()),
                         name_of);
INSTANTIATE_TEST_SUITE_P(Learnable, NumericsBackwardOracleDifferences, testing::ValuesIn(learnable_expressions()),
                         name_of);

std::vector<Expression> smooth_expressions() {
  std::vector<Expression> result;
  for (const Expression& expression : other_expressions()) {
    // Rows that are NaN or infinite have no loss.
    const bool finite = std::string(expression.fields).find("log(") == std::string::npos &&
                        !std::string(expression.name).starts_with("Nan") &&
                        !std::string(expression.name).starts_with("Inf");
    if (expression.undecided == Expression::kNone && finite) result.push_back(expression);
  }
  return result;
}
INSTANTIATE_TEST_SUITE_P(Other, NumericsBackwardOracleDifferences, testing::ValuesIn(smooth_expressions()), name_of);

}  // namespace
}  // namespace attnjit::numerics
