// The C++ wrapper: the same library through values, lambdas and Results.
#include <gmock/gmock.h>
#include <unistd.h>

#include <attnjit/attnjit.hpp>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "allocation_count.h"
#include "test_problem.h"
#include "tests/support/temporary_directory.h"

namespace attnjit::test {
namespace {

using testing::HasSubstr;

// float32 buffers of (1, 2, 33, 16).
struct Buffers {
  static constexpr std::int64_t kHeads = 2, kLength = 33, kHeadDim = 16;
  std::vector<float> q = Problem::pattern(kHeads * kLength * kHeadDim, 1);
  std::vector<float> k = Problem::pattern(kHeads * kLength * kHeadDim, 2);
  std::vector<float> v = Problem::pattern(kHeads * kLength * kHeadDim, 3);
  std::vector<float> o = std::vector<float>(q.size(), NAN);

  attnjit::Attention attention() {
    return {.q = {q.data(), {1, kHeads, kLength, kHeadDim}},
            .k = {k.data(), {1, kHeads, kLength, kHeadDim}},
            .v = {v.data(), {1, kHeads, kLength, kHeadDim}},
            .o = {o.data(), {1, kHeads, kLength, kHeadDim}}};
  }
};

double largest_error(const attnjit::Context& context, const attnjit::Attention& attention, const Buffers& buffers) {
  std::vector<Row> rows;
  for (std::int64_t h = 0; h < Buffers::kHeads; ++h) {
    for (std::int64_t q = 0; q < Buffers::kLength; ++q) rows.push_back({0, h, q});
  }
  std::vector<double> gold(buffers.o.size());
  const Status status = context.reference(attention, rows, gold);
  EXPECT_TRUE(status) << status.message();
  double error = 0;
  for (std::size_t i = 0; i < gold.size(); ++i) {
    const double difference = std::abs(gold[i] - static_cast<double>(buffers.o[i]));
    error = difference <= error ? error : difference;  // NaN stays
  }
  return error;
}

TEST(CppApi, LambdaForward) {
  Result<Context> context = Context::create({.num_threads = 2});
  ASSERT_TRUE(context) << context.status().message();
  Status status = context->register_mod(
      "soft", [](auto score, auto b, auto h, auto q_idx, auto kv_idx) { return 3 * tanh(score / 3) - h; });
  ASSERT_TRUE(status) << status.message();
  status = context->register_mask("past", [](auto b, auto h, auto q_idx, auto kv_idx) { return q_idx >= kv_idx; });
  ASSERT_TRUE(status) << status.message();

  Buffers buffers;
  Attention attention = buffers.attention();
  attention.score_mod = "soft";
  attention.mask_mod = "past";
  status = context->forward(attention);
  ASSERT_TRUE(status) << status.message();
  EXPECT_LT(largest_error(*context, attention, buffers), 1e-5);

  // Spelled as text, it is the same computation.
  Buffers again;
  Attention text = again.attention();
  text.score_mod = "3 * tanh(score / 3) - h";
  text.mask_mod = "causal";
  status = context->forward(text);
  ASSERT_TRUE(status) << status.message();
  EXPECT_EQ(again.o, buffers.o);
}

TEST(CppApi, RegisteredParameters) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  ASSERT_TRUE(context->register_mod("times", "score * x", {"x"}));
  Buffers buffers;
  Attention attention = buffers.attention();
  attention.score_mod = "times(0.5)";
  ASSERT_TRUE(context->forward(attention));
  EXPECT_LT(largest_error(*context, attention, buffers), 1e-5);
}

TEST(CppApi, CapturesScaleAndBFloat16) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  // bfloat16 by truncation: the oracle sees the same rounded inputs.
  const auto narrow = [](const std::vector<float>& in) {
    std::vector<std::uint16_t> out;
    for (const float value : in) {
      std::uint32_t bits;
      std::memcpy(&bits, &value, sizeof(bits));
      out.push_back(static_cast<std::uint16_t>(bits >> 16));
    }
    return out;
  };
  const std::vector<std::uint16_t> q = narrow(buffers.q), k = narrow(buffers.k), v = narrow(buffers.v);
  std::vector<std::uint16_t> o(q.size());
  const std::vector<float> bias = Problem::pattern(33 * 33, 5);
  const std::int64_t offset = 3;
  const std::initializer_list<std::int64_t> shape = {1, 2, 33, 16};
  const Attention attention = {
      .q = {q.data(), DType::kBFloat16, shape},
      .k = {k.data(), DType::kBFloat16, shape},
      .v = {v.data(), DType::kBFloat16, shape},
      .o = {o.data(), DType::kBFloat16, shape},
      .score_mod = "score + bias[q_idx, kv_idx]",
      .mask_mod = "kv_idx <= q_idx + offset",
      .captures = {{"bias", {bias.data(), {33, 33}}}, {"offset", {&offset, {}}}},
      .scale = 0.5f,
  };
  const Status status = context->forward(attention);
  ASSERT_TRUE(status) << status.message();
  for (std::size_t i = 0; i < o.size(); ++i) {
    const std::uint32_t bits = static_cast<std::uint32_t>(o[i]) << 16;
    std::memcpy(&buffers.o[i], &bits, sizeof(bits));
  }
  EXPECT_LT(largest_error(*context, attention, buffers), 1e-2);
}

TEST(CppApi, PlanRunsAgain) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  Attention attention = buffers.attention();
  attention.mask_mod = static_cast<const char*>(nullptr);  // none, as in C
  Result<Plan> plan = context->prepare(attention);
  ASSERT_TRUE(plan) << plan.status().message();
  EXPECT_EQ(plan->backend(), Backend::kCpu);
  EXPECT_THAT(plan->description(), HasSubstr("\"backend\": \"cpu\""));
  const Workspace workspace(plan->workspace_size());
  ASSERT_TRUE(plan->run(attention, workspace));
  const std::vector<float> first = buffers.o;
  ASSERT_TRUE(plan->run(attention, workspace));
  EXPECT_EQ(buffers.o, first);
  const Status status = plan->run(attention, Workspace());
  EXPECT_EQ(status.code(), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(status.message(), HasSubstr("workspace_size is 0"));
}

TEST(CppApi, ErrorsAreValues) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  Attention attention = buffers.attention();
  attention.score_mod = "score + nobody";
  Status status = context->forward(attention);
  EXPECT_EQ(status.code(), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(status.message(), HasSubstr("captures lacks 'nobody'"));
  attention.score_mod = "score +";
  const Result<Plan> plan = context->prepare(attention);
  ASSERT_FALSE(plan);
  EXPECT_EQ(plan.status().code(), ATTNJIT_INVALID_EXPRESSION);

  attention = buffers.attention();
  attention.v = {};
  EXPECT_THAT(context->forward(attention).message(), HasSubstr("v is NULL"));
  attention = buffers.attention();
  attention.q = {buffers.q.data(), {1, 2, 33, 16}, {1, 1}};  // strides of another rank
  EXPECT_THAT(context->forward(attention).message(), HasSubstr("q has -1 dimensions"));
  attention.q = {buffers.q.data(), {1, 1, 1, 1, 2, 33, 16}};
  EXPECT_THAT(context->forward(attention).message(), HasSubstr("q has 7 dimensions"));
  attention = buffers.attention();
  attention.captures.resize(17);
  EXPECT_THAT(context->forward(attention).message(), HasSubstr("num_captures is 17"));

  std::vector<double> small(3);
  const Row row = {0, 0, 0};
  EXPECT_THAT(context->reference(buffers.attention(), {&row, 1}, small).message(),
              HasSubstr("o has 3 elements; it needs 16"));
  EXPECT_THAT(context->reference_bounds(buffers.attention(), {&row, 1}, small).message(),
              HasSubstr("o_bound has 3 elements; it needs 16"));
  EXPECT_THAT(context->reference_bounds(buffers.attention(), {&row, 1}, {}, small).message(),
              HasSubstr("lse_bound has 3 elements; it needs 1"));
}

TEST(CppApi, Backward) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  std::vector<float> lse(2 * 33), slope = {2.0f}, of_slope = {NAN}, dv(1, NAN), nothing;
  std::vector<float> dq(buffers.q.size(), NAN);
  Attention attention = buffers.attention();
  attention.k = attention.v = {nothing.data(), {1, 2, 0, 16}};
  attention.lse = {lse.data(), {1, 2, 33}};
  attention.score_mod = "score * slope";
  attention.captures = {{"slope", {slope.data(), {}}}};
  Gradients gradients = {.grad_out = {buffers.q.data(), {1, 2, 33, 16}, {0, 0, 0, 1}},
                         .dq = {dq.data(), {1, 2, 33, 16}},
                         .captures = {{"slope", {of_slope.data(), {}}}},
                         .deterministic = true,
                         .partial_keys = true};
  Result<TrainingPlans> plans = context->prepare_training(attention, gradients);
  ASSERT_TRUE(plans) << plans.status().message();
  ASSERT_TRUE(plans->forward.run(attention));
  EXPECT_THAT(lse, testing::Each(-INFINITY));
  Status status = plans->backward.run_backward(attention, gradients);
  ASSERT_TRUE(status) << status.message();
  EXPECT_THAT(dq, testing::Each(0.0f));
  EXPECT_EQ(of_slope[0], 0.0f);
  EXPECT_THAT(plans->backward.description(), HasSubstr("\"deterministic\": true"));
  EXPECT_THAT(plans->backward.description(), HasSubstr("\"partial_keys\": true"));
  EXPECT_FALSE(plans->backward.run(attention));

  // In one call, and with what the caller has.
  gradients.captures.clear();
  dq.assign(dq.size(), NAN);
  ASSERT_TRUE(context->backward(attention, gradients));
  EXPECT_THAT(dq, testing::Each(0.0f));
  gradients.dq = {};
  gradients.dv = {dv.data(), {1, 2, 0, 16}};
  ASSERT_TRUE(context->backward(attention, gradients, {}));
  EXPECT_TRUE(context->prepare_backward(attention, gradients));

  gradients.captures.resize(17);
  EXPECT_THAT(context->backward(attention, gradients).message(), HasSubstr("gradients.num_captures is 17"));
  gradients.captures = {{"nobody", {of_slope.data(), {}}}};
  EXPECT_THAT(context->prepare_backward(attention, gradients).status().message(),
              HasSubstr("gradients.captures has 'nobody'"));
  gradients.captures.clear();
  gradients.grad_out = {};
  EXPECT_THAT(context->backward(attention, gradients, {}).message(), HasSubstr("grad_out is NULL"));
  EXPECT_FALSE(context->prepare_training(attention, gradients));
}

TEST(CppApi, ReferenceBounds) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  Attention attention = buffers.attention();
  const Row row = {0, 1, 5};
  std::vector<double> o_bound(Buffers::kHeadDim), lse_bound(1);
  std::vector<unsigned char> decided(1);
  for (const auto& [mod, expected] : {std::pair("softcap(2)", 1), std::pair("floor(score * 1e9) % 2", 0)}) {
    attention.score_mod = mod;
    const Status status = context->reference_bounds(attention, {&row, 1}, o_bound, lse_bound, decided);
    ASSERT_TRUE(status) << status.message();
    EXPECT_EQ(decided[0], expected) << mod;
    EXPECT_EQ(std::isfinite(lse_bound[0]), expected == 1) << mod;
    for (const double bound : o_bound) EXPECT_EQ(bound > 0.0 && bound < 1e-3, expected == 1) << mod << " " << bound;
  }
}

TEST(CppApi, ReferenceBackward) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  std::vector<float> lse(2 * 33), slope = {1.5f, 0.5f}, of_slope(2), dq(2 * 33 * 16), dk(buffers.k.size());
  Attention attention = buffers.attention();
  attention.lse = {lse.data(), {1, 2, 33}};
  attention.score_mod = "score * slope[h]";
  attention.captures = {{"slope", {slope.data(), {2}}}};
  Gradients gradients = {.grad_out = {buffers.q.data(), {1, 2, 33, 16}},
                         .dq = {dq.data(), {1, 2, 33, 16}},
                         .dk = {dk.data(), attention.k.dtype(), attention.k.shape()},
                         .captures = {{"slope", {of_slope.data(), {2}}}}};
  ASSERT_TRUE(context->forward(attention));
  ASSERT_TRUE(context->backward(attention, gradients));
  const auto heads_kv = static_cast<std::size_t>(attention.k.shape()[1]);
  double sum[2] = {};
  for (std::size_t h = 0; h < heads_kv; ++h) {
    const Result<ReferenceGradients> gold =
        context->reference_backward(attention, gradients, 0, static_cast<std::int64_t>(h));
    ASSERT_TRUE(gold) << gold.status().message();
    const auto expect_within = [](const float* ours, const std::vector<double>& right,
                                  const std::vector<double>& bound) {
      ASSERT_EQ(right.size(), bound.size());
      for (std::size_t i = 0; i < right.size(); ++i) {
        ASSERT_NEAR(static_cast<double>(ours[i]), right[i], bound[i] + 1e-30) << i;
      }
    };
    ASSERT_EQ(gold->dq.size(), dq.size() / heads_kv);
    ASSERT_EQ(gold->dk.size(), dk.size() / heads_kv);
    ASSERT_EQ(gold->dv.size(), gold->dk.size());
    expect_within(&dq[h * gold->dq.size()], gold->dq, gold->dq_bound);
    expect_within(&dk[h * gold->dk.size()], gold->dk, gold->dk_bound);
    ASSERT_EQ(gold->captures.size(), 1u);
    ASSERT_EQ(gold->capture_bounds[0].size(), 2u);
    for (std::size_t i = 0; i < 2; ++i) sum[i] += gold->captures[0][i];
  }
  for (std::size_t i = 0; i < 2; ++i) EXPECT_NEAR(static_cast<double>(of_slope[i]), sum[i], 1e-4 * std::abs(sum[i]));
  EXPECT_THAT(context->reference_backward(attention, gradients, 1, 0).status().message(), HasSubstr("(b, h_kv)"));
  gradients.captures.push_back({"nobody", {}});
  EXPECT_THAT(context->reference_backward(attention, gradients, 0, 0).status().message(), HasSubstr("'nobody'"));
}

// The vectors that hold the gradients are the wrapper's.
TEST(CppApi, ReferenceBackwardOutOfMemory) {
  if (!test::counts_allocations()) GTEST_SKIP() << "a sanitizer ends the program where memory does";
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  Attention attention = buffers.attention();
  attention.q = {buffers.q.data(), {1, std::int64_t{1} << 21, std::int64_t{1} << 30, 16}, {0, 0, 0, 1}};
  const Gradients gradients = {.grad_out = attention.q};
  const Status status = context->reference_backward(attention, gradients, 0, 0).status();
  EXPECT_EQ(status.code(), ATTNJIT_OUT_OF_MEMORY);
  EXPECT_THAT(status.message(),
              HasSubstr("gradients of 1048576 query heads of 1073741824 rows and one key/value head of"));
}

TEST(CppApi, Json) {
  Result<Context> context = Context::create();
  ASSERT_TRUE(context);
  Buffers buffers;
  Attention attention = buffers.attention();
  attention.score_mod = "rel";
  const Result<std::string> explained = context->explain(attention, true);
  ASSERT_TRUE(explained) << explained.status().message();
  EXPECT_THAT(*explained, HasSubstr("\"mlir\""));
  const Result<std::string> mods = context->list_mods();
  ASSERT_TRUE(mods);
  EXPECT_THAT(*mods, HasSubstr("\"causal\""));
  const Result<std::string> captures = context->captures("score + table[h]");
  ASSERT_TRUE(captures);
  EXPECT_THAT(*captures, HasSubstr("\"table\""));
  EXPECT_FALSE(context->captures("score +"));
  EXPECT_STREQ(version(), attnjit_version());
}

TEST(CppApi, DiskCache) {
  const test::TemporaryDirectory temporary;
  const std::string directory = temporary.path().string();
  ::setenv("ATTNJIT_CACHE_DIR", directory.c_str(), 1);
  Result<Context> context = Context::create();
  ::unsetenv("ATTNJIT_CACHE_DIR");
  ASSERT_TRUE(context);
  std::ofstream(directory + "/ab.attnjit") << "damaged";
  const Result<std::string> listed = context->cache_list();
  ASSERT_TRUE(listed) << listed.status().message();
  EXPECT_THAT(*listed, HasSubstr("\"key\": \"ab\""));
  EXPECT_THAT(*listed, testing::Not(HasSubstr("valid")));
  EXPECT_EQ(*context->cache_clear(), 1u);
  EXPECT_EQ(*context->cache_clear(), 0u);
  std::ofstream(directory + "/cd.attnjit") << "damaged";
  EXPECT_THAT(*context->cache_list(true), HasSubstr("\"valid\": false"));
  EXPECT_EQ(*context->cache_clear(), 0u) << "verifying removes it";
  EXPECT_TRUE(std::filesystem::is_empty(directory));

  ::setenv("ATTNJIT_DISABLE_CACHE", "1", 1);
  Result<Context> without = Context::create();
  ::unsetenv("ATTNJIT_DISABLE_CACHE");
  ASSERT_TRUE(without);
  EXPECT_EQ(without->cache_list().status().code(), ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(without->cache_clear().status().message(), HasSubstr("ATTNJIT_DISABLE_CACHE"));
}

}  // namespace
}  // namespace attnjit::test
