// The C interface of gradients: results against the oracle, plans, concurrent compiles, and that a run allocates
// nothing.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "test_problem.h"

namespace attnjit::test {
namespace {

using testing::Each;
using testing::HasSubstr;
using Json = nlohmann::json;

Json description(const PlanPtr& plan) { return Json::parse(attnjit_plan_description(plan.get())); }

TEST(BackwardApi, WithoutKeysOrQueriesGradientsAreZero) {
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_AUTO, ATTNJIT_BACKEND_CPU}) {
    for (const bool keys : {false, true}) {
      GradientProblem p;
      p.attention.backend = backend;
      std::vector<float> table(4 * 3, 1.0f), gradient(4 * 3, NAN), of_slope(1, NAN);
      float slope = 2;
      p.attention.score_mod = "score * slope + table[h, 0]";
      p.capture("table", table.data(), {4, 3});
      p.capture("slope", &slope, {});
      p.gradient("table", gradient.data(), {4, 2}, kF32, {3, 1});
      p.captured[0]->shape[1] = 2;
      p.captured[0]->strides = {3, 1};
      p.captured[0]->sync();
      p.gradient("slope", of_slope.data(), {});
      if (keys) {
        for (Tensor* tensor : {&p.q, &p.o, &p.lse, &p.grad_out, &p.grad_lse, &p.dq}) tensor->shape[2] = 0;
      } else {
        p.remove_keys();
        // Rows of 16 in a buffer of 24: what lies between stays.
        p.dq_data.assign(static_cast<std::size_t>(2 * 4 * 40 * 24), NAN);
        p.dq.dl.data = p.dq_data.data();
        p.dq.strides = {4 * 40 * 24, 40 * 24, 24, 1};
        p.dq.sync();
      }
      ASSERT_EQ(attnjit_backward(context.get(), &p.attention, &p.gradients, nullptr, 0, nullptr), ATTNJIT_OK)
          << attnjit_last_error();
      if (keys) {
        EXPECT_THAT(p.dk_data, Each(0.0f));
        EXPECT_THAT(p.dv_data, Each(0.0f));
        EXPECT_TRUE(std::isnan(p.dq_data[0])) << "wrote to an empty output";
      } else {
        for (std::size_t i = 0; i < p.dq_data.size(); ++i) {
          ASSERT_TRUE(i % 24 < 16 ? p.dq_data[i] == 0.0f : std::isnan(p.dq_data[i])) << i;
        }
        EXPECT_TRUE(std::isnan(p.dk_data[0])) << "wrote to an empty output";
      }
      EXPECT_EQ(of_slope[0], 0.0f);
      for (std::size_t i = 0; i < gradient.size(); ++i) {
        EXPECT_TRUE(i % 3 < 2 ? gradient[i] == 0.0f : std::isnan(gradient[i])) << i;
      }
    }
  }
}

TEST(BackwardApi, PlansAreCached) {
  const ContextPtr context = make_context();
  GradientProblem p;
  p.remove_keys();
  float slope = 1, other = 2, of_slope = 0, of_other = 0;
  p.attention.score_mod = "score * slope + other * kv_idx";
  p.capture("slope", &slope, {});
  p.capture("other", &other, {});
  const auto compiled = [&] { return description(prepare_backward(context, p))["compiled"].get<bool>(); };
  EXPECT_TRUE(compiled());
  EXPECT_FALSE(compiled());
  // A forward is another plan, and does not look at gradients.
  EXPECT_TRUE(description(prepare(context, p.attention))["compiled"].get<bool>());
  EXPECT_FALSE(description(prepare(context, p.attention))["compiled"].get<bool>());
  EXPECT_FALSE(compiled());
  // Each of what a backward depends on.
  p.gradients.grad_lse = nullptr;
  EXPECT_TRUE(compiled());
  p.gradients.deterministic = 1;
  EXPECT_TRUE(compiled());
  p.gradients.dq = nullptr;
  EXPECT_TRUE(compiled());
  p.gradients.dk = nullptr;
  EXPECT_TRUE(compiled());
  p.gradient("slope", &of_slope, {});
  EXPECT_TRUE(compiled());
  p.gradients.dv = nullptr;
  EXPECT_TRUE(compiled());
  p.gradient("other", &of_other, {});
  EXPECT_TRUE(compiled());
  // And none of what it does not: the order of captures, the scale, what a forward would be asked for.
  std::swap(p.wanted[0], p.wanted[1]);
  std::swap(p.captures[0], p.captures[1]);
  const float scale = 0.5f;
  p.attention.scale = &scale;
  p.attention.row_max = nullptr;
  p.attention.max_autotune = 1;
  p.grad_out.strides = {0, 0, 0, 1};
  p.grad_out.sync();
  EXPECT_FALSE(compiled());
}

TEST(BackwardApi, Description) {
  const ContextPtr context = make_context();
  GradientProblem p;
  p.remove_keys();
  float slope = 1, of_slope = 0;
  p.attention.score_mod = "score * slope";
  p.capture("slope", &slope, {});
  p.gradient("slope", &of_slope, {});
  p.gradients.dk = nullptr;
  p.gradients.deterministic = 1;
  const Json json = description(prepare_backward(context, p));
  EXPECT_EQ(json["gradients"], Json::parse(R"({"wanted": ["dq", "dv"], "captures": ["slope"], "grad_lse": true,
                                               "deterministic": true})"))
      << json;
  EXPECT_EQ(json["problem"], "B=2 Hq=4 Hkv=2 Sq=40 Skv=0 D=16 Dv=24 float32 backward");
  EXPECT_FALSE(description(prepare(context, p.attention)).contains("gradients"));
}

TEST(BackwardApi, PreparesBothPlans) {
  const ContextPtr context = make_context();
  GradientProblem p;
  p.remove_keys();
  attnjit_plan *forward = nullptr, *backward = nullptr;
  ASSERT_EQ(attnjit_prepare_backward(context.get(), &p.attention, &p.gradients, &forward, &backward), ATTNJIT_OK)
      << attnjit_last_error();
  const PlanPtr first(forward), second(backward);
  // The forward is attnjit_prepare's, with its lse.
  EXPECT_FALSE(description(prepare(context, p.attention))["compiled"].get<bool>());
  ASSERT_EQ(attnjit_run(forward, &p.attention, nullptr, 0, nullptr), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_THAT(p.lse_data, Each(-INFINITY));
  ASSERT_EQ(attnjit_run_backward(backward, &p.attention, &p.gradients, nullptr, 0, nullptr), ATTNJIT_OK)
      << attnjit_last_error();
  EXPECT_THAT(p.dq_data, Each(0.0f));
  // A forward that is refused leaves no plan: o may be an input of a backward with strides that a forward cannot write.
  p.o.strides = {0, 0, 24, 1};
  p.o.sync();
  EXPECT_EQ(attnjit_prepare_backward(context.get(), &p.attention, &p.gradients, &forward, &backward),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("o has shape"));
  EXPECT_EQ(forward, nullptr);
  EXPECT_EQ(backward, nullptr);
  EXPECT_TRUE(prepare_backward(context, p));
}

// Of the query heads 2 and 3 of batch 1, by the reference of the forward: what attnjit_gradients is the gradient of.
double loss(const ContextPtr& context, const GradientProblem& p) {
  std::vector<attnjit_row> rows;
  for (const std::int64_t h : {2, 3}) {
    for (std::int64_t i = 0; i < Problem::kSq; ++i) rows.push_back({1, h, i});
  }
  const auto features = static_cast<std::size_t>(Problem::kDv);
  std::vector<double> o(rows.size() * features), lse(rows.size());
  EXPECT_EQ(attnjit_reference(context.get(), &p.attention, rows.data(), rows.size(), o.data(), lse.data(), nullptr),
            ATTNJIT_OK)
      << attnjit_last_error();
  double sum = 0.0;
  for (std::size_t row = 0; row < rows.size(); ++row) {
    const auto at =
        static_cast<std::size_t>((rows[row].b * Problem::kHq + rows[row].h) * Problem::kSq + rows[row].q_idx);
    for (std::size_t d = 0; d < features; ++d) {
      sum += static_cast<double>(p.grad_out_data[at * features + d]) * o[row * features + d];
    }
    sum += static_cast<double>(p.grad_lse_data[at]) * lse[row];
  }
  return sum;
}

TEST(BackwardApi, TheReferenceIsTheGradientOfTheForwards) {
  const ContextPtr context = make_context();
  GradientProblem p;
  std::vector<float> table = Problem::pattern(4 * 60, 8), gain = Problem::pattern(4, 9), unused(4 * 60), unused_gain(4);
  p.attention.score_mod = "score * gain[h] + tanh(table[h, q_idx - kv_idx + 20])";
  p.attention.mask_mod = "q_idx + 20 >= kv_idx";
  // The table's places lie apart, and the gradients come in another order than the captures.
  p.capture("table", table.data(), {4, 30}, kF32, {60, 2});
  p.capture("gain", gain.data(), {4});
  p.gradient("gain", unused_gain.data(), {4});
  p.gradient("table", unused.data(), {4, 30}, kF32, {60, 2});
  std::vector<double> dq(2 * 40 * 16), dk(50 * 16), dv(50 * 24), d_gain(4), d_table(4 * 30);
  std::vector<double> bounds[] = {dq, dk, dv, d_gain, d_table};
  double* const captures[] = {d_gain.data(), d_table.data()};
  double* const capture_bounds[] = {bounds[3].data(), bounds[4].data()};
  attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
  out.dq = dq.data();
  out.dk = dk.data();
  out.dv = dv.data();
  out.captures = captures;
  out.dq_bound = bounds[0].data();
  out.dk_bound = bounds[1].data();
  out.dv_bound = bounds[2].data();
  out.capture_bounds = capture_bounds;
  ASSERT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, 1, 1, &out), ATTNJIT_OK)
      << attnjit_last_error();
  for (const std::vector<double>& each : bounds) {
    for (const double bound : each) ASSERT_TRUE(bound >= 0.0 && bound < 1.0) << bound;
  }

  // By Richardson's extrapolation of central differences: what is left of their error is of the fourth order.
  const auto expect_derivative = [&](float& x, double gradient, const std::string& what) {
    const float original = x;
    double by_step[2];
    for (const int wide : {0, 1}) {
      const float step = wide ? 0x1p-5f : 0x1p-6f;
      x = original + step;
      const double above = loss(context, p), top = x;
      x = original - step;
      const double below = loss(context, p);
      by_step[wide] = (above - below) / (top - static_cast<double>(x));
    }
    x = original;
    EXPECT_NEAR(gradient, (4.0 * by_step[0] - by_step[1]) / 3.0, 1e-5) << what;
  };
  const auto head = [](std::int64_t b, std::int64_t h, std::int64_t heads, std::int64_t size) {
    return static_cast<std::size_t>((b * heads + h) * size);
  };
  for (std::size_t i = 3; i < dq.size(); i += 251) {
    expect_derivative(p.q_data[head(1, 2, 4, 40 * 16) + i], dq[i], "dq " + std::to_string(i));
  }
  for (std::size_t i = 5; i < dk.size(); i += 157) {
    expect_derivative(p.k_data[head(1, 1, 2, 50 * 16) + i], dk[i], "dk " + std::to_string(i));
  }
  for (std::size_t i = 7; i < dv.size(); i += 239) {
    expect_derivative(p.v_data[head(1, 1, 2, 50 * 24) + i], dv[i], "dv " + std::to_string(i));
  }
  for (std::size_t h = 0; h < 4; ++h) {
    expect_derivative(gain[h], d_gain[h], "gain " + std::to_string(h));
    for (const std::size_t place : {0u, 1u, 20u, 29u}) {
      expect_derivative(table[h * 60 + place * 2], d_table[h * 30 + place],
                        "table " + std::to_string(h) + ", " + std::to_string(place));
    }
  }
  EXPECT_EQ(d_gain[1], 0.0) << "of another key/value head";
  EXPECT_NE(d_gain[2], 0.0);

  // Everything is optional, and only what is inside the problem is allowed.
  out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
  EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, 1, 1, &out), ATTNJIT_OK);
  EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, 1, 2, &out),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "(b, h_kv) is (1, 2); allowed: below (2, 2)");
  EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, -1, 0, &out),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, 0, 0, nullptr),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "out is NULL");
}

}  // namespace
}  // namespace attnjit::test
