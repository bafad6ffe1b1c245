// The C interface of gradients: results against the oracle, plans, concurrent compiles, and that a run allocates
// nothing.
#include <gmock/gmock.h>

#include <algorithm>
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

}  // namespace
}  // namespace attnjit::test
