// The C interface of gradients: results against the oracle, plans, concurrent compiles, and that a run allocates
// nothing.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <vector>

#include "allocation_count.h"
#include "test_problem.h"

namespace attnjit::test {
namespace {

using testing::Each;
using testing::HasSubstr;
using Json = nlohmann::json;

Json description(const PlanPtr& plan) { return Json::parse(attnjit_plan_description(plan.get())); }

// The oracle's gradients of a whole problem.
struct Gold {
  std::vector<double> dq, dk, dv;
  std::vector<std::vector<double>> captures;  // as GradientProblem::wanted

  Gold(const ContextPtr& context, const GradientProblem& p) {
    const auto size = [](const Tensor& tensor) {
      std::size_t elements = 1;
      for (const std::int64_t extent : tensor.shape) elements *= static_cast<std::size_t>(extent);
      return elements;
    };
    dq.resize(size(p.q));
    dk.resize(size(p.k));
    dv.resize(size(p.v));
    for (const auto& tensor : p.capture_gradients) captures.emplace_back(size(*tensor));
    const std::size_t heads = static_cast<std::size_t>(p.k.shape[0] * p.k.shape[1]);
    std::vector<std::vector<double>> parts = captures;
    std::vector<double*> part_data;
    part_data.reserve(parts.size());
    for (std::vector<double>& part : parts) part_data.push_back(part.data());
    for (std::size_t head = 0; head < heads; ++head) {
      attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
      out.dq = dq.data() + head * (dq.size() / heads);
      out.dk = dk.data() + head * (dk.size() / heads);
      out.dv = dv.data() + head * (dv.size() / heads);
      out.captures = part_data.data();
      const auto index = static_cast<std::int64_t>(head);
      EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, index / p.k.shape[1],
                                           index % p.k.shape[1], &out),
                ATTNJIT_OK)
          << attnjit_last_error();
      for (std::size_t c = 0; c < captures.size(); ++c) {
        for (std::size_t i = 0; i < captures[c].size(); ++i) captures[c][i] += parts[c][i];
      }
    }
  }
};

void expect_close(const std::vector<float>& actual, const std::vector<double>& expected, double tolerance,
                  const char* what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  int wrong = 0;
  for (std::size_t i = 0; i < actual.size() && wrong < 3; ++i) {
    if (std::abs(static_cast<double>(actual[i]) - expected[i]) <= tolerance) continue;
    ++wrong;
    ADD_FAILURE() << what << "[" << i << "] is " << actual[i] << ", the oracle says " << expected[i];
  }
}

// Runs the forward, for o and lse, and the backward.
bool train(const ContextPtr& context, const GradientProblem& p) {
  if (!forward(context, p.attention)) return false;
  const PlanPtr plan = prepare_backward(context, p);
  if (!plan) return false;
  const Scratch scratch(plan.get());
  const attnjit_status status =
      attnjit_run_backward(plan.get(), &p.attention, &p.gradients, scratch.data, scratch.size, nullptr);
  EXPECT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
  return status == ATTNJIT_OK;
}

constexpr attnjit_backend kBackends[] = {ATTNJIT_BACKEND_CPU, ATTNJIT_BACKEND_MATH};

TEST(BackwardApi, AgreesWithTheOracle) {
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : kBackends) {
    SCOPED_TRACE(attnjit_backend_name(backend));
    GradientProblem p;
    p.attention.backend = backend;
    std::vector<float> table = Problem::pattern(4 * 89, 9), of_table(4 * 89, NAN);
    std::vector<float> shift = Problem::pattern(40, 10), of_shift(40, NAN);
    float slope = 0.75f, of_slope = NAN;
    std::int32_t ids[50];
    for (int i = 0; i < 50; ++i) ids[i] = i / 13;
    p.attention.score_mod = "score * slope + table[h, q_idx - kv_idx + 49] + shift[q_idx]";
    p.attention.mask_mod = "q_idx + 20 >= kv_idx and ids[kv_idx] != 1";
    p.capture("table", table.data(), {4, 89});
    p.capture("slope", &slope, {});
    p.capture("shift", shift.data(), {40});
    p.capture("ids", ids, {50}, kI32);
    // In another order than the captures.
    p.gradient("slope", &of_slope, {});
    p.gradient("table", of_table.data(), {4, 89});
    p.gradient("shift", of_shift.data(), {40});
    ASSERT_TRUE(train(context, p));
    const Gold gold(context, p);
    expect_close(p.dq_data, gold.dq, 2e-5, "dq");
    expect_close(p.dk_data, gold.dk, 5e-5, "dk");
    expect_close(p.dv_data, gold.dv, 5e-5, "dv");
    expect_close({of_slope}, gold.captures[0], 1e-3, "the gradient of slope");
    expect_close(of_table, gold.captures[1], 1e-4, "the gradient of table");
    expect_close(of_shift, gold.captures[2], 1e-4, "the gradient of shift");

    // What is left out changes nothing about the rest.
    std::vector<float> dk(p.dk_data.size(), NAN);
    p.dk.dl.data = dk.data();
    p.gradients.dq = p.gradients.dv = nullptr;
    p.gradients.num_captures = 1;
    p.dq_data[0] = NAN;
    of_table[0] = NAN;
    ASSERT_TRUE(train(context, p));
    EXPECT_TRUE(std::isnan(p.dq_data[0]) && std::isnan(of_table[0]));
    expect_close(dk, gold.dk, 5e-5, "dk alone");

    // Without a gradient flowing into lse, a row shift has none.
    p.gradients.grad_lse = nullptr;
    p.gradients.num_captures = 3;
    ASSERT_TRUE(train(context, p));
    EXPECT_THAT(of_shift, Each(0.0f));
    expect_close(of_table, Gold(context, p).captures[1], 1e-4, "the gradient of table without grad_lse");
  }
}

// Keys in two parts, each with the o and lse of both: what the parts and the parts' oracles give sums to the whole.
TEST(BackwardApi, PartialKeys) {
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : kBackends) {
    SCOPED_TRACE(attnjit_backend_name(backend));
    std::vector<float> shift = Problem::pattern(40, 10), of_shift(40, NAN), slope = {0.5f, 0.75f, 1.0f, 1.25f},
                       of_slope(4);
    const auto prepare = [&](GradientProblem* p) {
      p->attention.backend = backend;
      p->attention.score_mod = "score * slope[h] + shift[q_idx] + 2 * slope[h]";
      p->capture("shift", shift.data(), {40});
      p->capture("slope", slope.data(), {4});
      p->gradient("shift", of_shift.data(), {40});
      p->gradient("slope", of_slope.data(), {4});
    };
    GradientProblem whole;
    prepare(&whole);
    ASSERT_TRUE(train(context, whole));
    const Gold gold(context, whole);
    expect_close(of_shift, gold.captures[0], 1e-4, "the gradient of shift");

    std::vector<double> dq(gold.dq.size()), d_shift(40), d_slope(4), reference_dq(dq), reference_shift(40),
        reference_slope(4);
    const auto add = [](const auto& from, std::vector<double>* to) {
      for (std::size_t i = 0; i < to->size(); ++i) (*to)[i] += static_cast<double>(from[i]);
    };
    for (const std::int64_t first : {0, 30}) {
      const std::int64_t count = first == 0 ? 30 : 20;
      GradientProblem part;
      prepare(&part);
      part.o_data = whole.o_data;
      part.lse_data = whole.lse_data;
      part.gradients.partial_keys = 1;
      // The part's rows of k, v, dk and dv stay where they are.
      for (Tensor* const tensor : {&part.k, &part.v, &part.dk, &part.dv}) {
        tensor->strides = {tensor->dl.shape[1] * 50 * tensor->dl.shape[3], 50 * tensor->dl.shape[3],
                           tensor->dl.shape[3], 1};
        tensor->dl.data = static_cast<float*>(tensor->dl.data) + first * tensor->dl.shape[3];
        tensor->shape[2] = count;
        tensor->sync();
      }
      const PlanPtr plan = prepare_backward(context, part);
      ASSERT_TRUE(plan);
      const Scratch scratch(plan.get());
      ASSERT_EQ(attnjit_run_backward(plan.get(), &part.attention, &part.gradients, scratch.data, scratch.size, nullptr),
                ATTNJIT_OK)
          << attnjit_last_error();
      add(part.dq_data, &dq);
      add(of_shift, &d_shift);
      add(of_slope, &d_slope);
      const Gold reference(context, part);
      add(reference.dq, &reference_dq);
      add(reference.captures[0], &reference_shift);
      add(reference.captures[1], &reference_slope);
      for (std::size_t head = 0; head < 4; ++head) {
        for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
          const std::size_t of_whole = head * 50 + static_cast<std::size_t>(first) + i;
          const std::size_t of_part = head * static_cast<std::size_t>(count) + i;
          for (std::size_t d = 0; d < 16; ++d) {
            ASSERT_NEAR(part.dk_data[of_whole * 16 + d], gold.dk[of_whole * 16 + d], 5e-5);
            ASSERT_NEAR(reference.dk[of_part * 16 + d], gold.dk[of_whole * 16 + d], 1e-6);
          }
          for (std::size_t d = 0; d < 24; ++d) {
            ASSERT_NEAR(part.dv_data[of_whole * 24 + d], gold.dv[of_whole * 24 + d], 5e-5);
            ASSERT_NEAR(reference.dv[of_part * 24 + d], gold.dv[of_whole * 24 + d], 1e-6);
          }
        }
      }
    }
    const auto expect_sum = [](const std::vector<double>& parts, const std::vector<double>& all, double tolerance) {
      for (std::size_t i = 0; i < all.size(); ++i) ASSERT_NEAR(parts[i], all[i], tolerance * (1 + std::abs(all[i])));
    };
    expect_sum(dq, gold.dq, 2e-5);
    expect_sum(d_shift, gold.captures[0], 1e-4);
    expect_sum(d_slope, gold.captures[1], 1e-4);
    // The oracle takes o and lse as they are, rounded to float32.
    expect_sum(reference_dq, gold.dq, 1e-6);
    expect_sum(reference_shift, gold.captures[0], 1e-5);
    expect_sum(reference_slope, gold.captures[1], 1e-5);
  }
  GradientProblem p;
  p.gradients.partial_keys = 1;
  p.attention.lse = nullptr;
  attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
  EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, 0, 0, &out),
            ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "lse is NULL; a tensor is needed");
}

// More rows than there is memory for, by strides of 0.
TEST(BackwardApi, ReferenceOutOfMemory) {
  if (!test::counts_allocations()) GTEST_SKIP() << "a sanitizer ends the program where memory does";
  const ContextPtr context = make_context();
  GradientProblem p;
  for (Tensor* const tensor : {&p.q, &p.grad_out}) {
    tensor->shape[1] = std::int64_t{1} << 21;
    tensor->shape[2] = std::int64_t{1} << 30;
    tensor->strides = {0, 0, 0, 1};
    tensor->sync();
  }
  std::vector<double> dv(p.dv_data.size());
  p.gradients.dq = nullptr;
  p.gradients.grad_lse = nullptr;
  attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
  out.dv = dv.data();
  EXPECT_EQ(attnjit_reference_backward(context.get(), &p.attention, &p.gradients, 0, 0, &out), ATTNJIT_OUT_OF_MEMORY);
  EXPECT_STREQ(attnjit_last_error(),
               "out of memory for the double-precision gradients of 1048576 query heads of 1073741824 rows and one "
               "key/value head of 50, of 16 and 24 features");
}

// Inputs and outputs in (B, S, H, D) order, a broadcast grad_out, a captured tensor's gradient with strides of its own.
TEST(BackwardApi, Layouts) {
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : kBackends) {
    SCOPED_TRACE(attnjit_backend_name(backend));
    GradientProblem packed, strided;
    std::vector<float> table = Problem::pattern(4 * 50, 9), of_table(4 * 50, NAN), transposed(50 * 4 * 2, NAN);
    for (GradientProblem* p : {&packed, &strided}) {
      p->attention.backend = backend;
      p->attention.score_mod = "score + table[h, kv_idx]";
      p->capture("table", table.data(), {4, 50});
    }
    packed.gradient("table", of_table.data(), {4, 50});
    strided.gradient("table", transposed.data(), {4, 50}, kF32, {2, 8});
    std::fill(packed.grad_out_data.begin(), packed.grad_out_data.end(), 0.0f);
    for (std::size_t i = 0; i < packed.grad_out_data.size(); ++i) {
      packed.grad_out_data[i] = 0.25f * static_cast<float>(i % 24);
    }
    strided.grad_out.strides = {0, 0, 0, 1};
    strided.grad_out.dl.data = packed.grad_out_data.data();
    strided.grad_out.sync();
    std::vector<float> dk(2 * 50 * 2 * 20, NAN);
    strided.dk.dl.data = dk.data();
    strided.dk.strides = {2000, 20, 40, 1};
    strided.dk.sync();
    ASSERT_TRUE(train(context, packed));
    ASSERT_TRUE(train(context, strided));
    EXPECT_EQ(packed.dq_data, strided.dq_data);
    EXPECT_EQ(packed.dv_data, strided.dv_data);
    int wrong = 0;
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t h = 0; h < 2; ++h) {
        for (std::size_t s = 0; s < 50; ++s) {
          for (std::size_t d = 0; d < 20; ++d) {
            const float found = dk[((b * 50 + s) * 2 + h) * 20 + d];
            wrong += d < 16 ? found != packed.dk_data[((b * 2 + h) * 50 + s) * 16 + d] : !std::isnan(found);
          }
        }
      }
    }
    EXPECT_EQ(wrong, 0);
    for (std::size_t i = 0; i < transposed.size(); ++i) {
      const std::size_t kv = i / 8, h = i % 8 / 2;
      EXPECT_TRUE(i % 2 ? std::isnan(transposed[i]) : transposed[i] == of_table[h * 50 + kv]) << i;
    }
  }
}

// Whatever stands where an element is dropped, not chosen or in an empty row, gradients are finite and it has none.
TEST(BackwardApi, MaskedRowsAndPoison) {
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : kBackends) {
    SCOPED_TRACE(attnjit_backend_name(backend));
    GradientProblem p;
    std::vector<float> table(50, 0.5f), of_table(50, NAN);
    std::fill(table.begin() + 30, table.end(), NAN);
    p.attention.backend = backend;
    p.attention.score_mod = "where(score > 0, log(score), score * score) * table[kv_idx]";
    p.attention.mask_mod = "kv_idx < q_idx and kv_idx < 30";  // row 0 keeps nothing
    p.capture("table", table.data(), {50});
    p.gradient("table", of_table.data(), {50});
    ASSERT_TRUE(train(context, p));
    for (const std::vector<float>* gradient : {&p.dq_data, &p.dk_data, &p.dv_data, &of_table}) {
      EXPECT_TRUE(std::ranges::all_of(*gradient, [](float value) { return std::isfinite(value); }));
    }
    for (std::size_t d = 0; d < 16; ++d) EXPECT_EQ(p.dq_data[d], 0.0f) << "of a row without a kept element";
    for (std::size_t i = 30 * 24; i < 50 * 24; ++i) EXPECT_EQ(p.dv_data[i], 0.0f) << "of a dropped key";
    for (std::size_t i = 30; i < 50; ++i) EXPECT_EQ(of_table[i], 0.0f) << "of what dropped elements read";
    expect_close(p.dv_data, Gold(context, p).dv, 5e-5, "dv");
  }
}

TEST(BackwardApi, OneCallAndNewValues) {
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : kBackends) {
    SCOPED_TRACE(attnjit_backend_name(backend));
    GradientProblem p;
    float slope = 0.5f, of_slope = NAN, scale = 0.3f;
    p.attention.backend = backend;
    p.attention.score_mod = "softcap(20) * slope";
    p.capture("slope", &slope, {});
    p.gradient("slope", &of_slope, {});
    p.attention.scale = &scale;
    ASSERT_TRUE(train(context, p));
    // The same plan with other values.
    slope = -1.25f;
    scale = 0.1f;
    ASSERT_TRUE(forward(context, p.attention));
    const PlanPtr plan = prepare_backward(context, p);
    EXPECT_FALSE(description(plan)["compiled"].get<bool>());
    const Scratch scratch(plan.get());
    ASSERT_EQ(attnjit_backward(context.get(), &p.attention, &p.gradients, scratch.data, scratch.size, nullptr),
              ATTNJIT_OK)
        << attnjit_last_error();
    const Gold gold(context, p);
    expect_close(p.dq_data, gold.dq, 2e-5, "dq");
    expect_close({of_slope}, gold.captures[0], 1e-3, "the gradient of slope");
    // The workspace is checked like a forward's.
    const auto refused = [&](void* workspace, std::size_t size) {
      EXPECT_EQ(attnjit_run_backward(plan.get(), &p.attention, &p.gradients, workspace, size, nullptr),
                ATTNJIT_INVALID_ARGUMENT);
      return std::string(attnjit_last_error());
    };
    ASSERT_GT(scratch.size, 0u);
    EXPECT_THAT(refused(scratch.data, scratch.size - 1), HasSubstr("workspace_size is "));
    EXPECT_THAT(refused(nullptr, scratch.size), HasSubstr("workspace is NULL"));
    p.capture_gradients[0]->dl.data = scratch.data;
    EXPECT_THAT(refused(scratch.data, scratch.size), HasSubstr("workspace shares memory with the gradient of slope"));
  }
}

TEST(BackwardApi, RunAllocatesNothing) {
  if (!counts_allocations()) GTEST_SKIP() << "malloc belongs to a sanitizer";
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : kBackends) {
    SCOPED_TRACE(attnjit_backend_name(backend));
    GradientProblem p;
    float slope = 0.5f, of_slope = 0, table[50] = {}, of_table[50];
    p.attention.backend = backend;
    p.attention.score_mod = "score * slope + table[kv_idx]";
    p.capture("slope", &slope, {});
    p.capture("table", table, {50});
    p.gradient("slope", &of_slope, {});
    p.gradient("table", of_table, {50});
    ASSERT_TRUE(train(context, p));
    const PlanPtr plan = prepare_backward(context, p);
    const Scratch scratch(plan.get());
    // The fewest of several runs: see CApi.RunAllocatesNothing.
    long fewest = std::numeric_limits<long>::max();
    for (int run = 0; run < 10; ++run) {
      const long before = allocation_count();
      const attnjit_status status =
          attnjit_run_backward(plan.get(), &p.attention, &p.gradients, scratch.data, scratch.size, nullptr);
      fewest = std::min(fewest, allocation_count() - before);
      ASSERT_EQ(status, ATTNJIT_OK);
    }
    EXPECT_EQ(fewest, 0);
  }
}

TEST(BackwardApi, ConcurrentRunsOfOnePlan) {
  const ContextPtr context = make_context();
  GradientProblem first;
  first.attention.mask_mod = "causal";
  ASSERT_TRUE(train(context, first));
  const PlanPtr plan = prepare_backward(context, first);
  std::vector<std::thread> threads;
  std::vector<int> wrong(4);
  threads.reserve(wrong.size());
  for (int& count : wrong) {
    threads.emplace_back([&] {
      GradientProblem p;
      p.attention.mask_mod = "causal";
      p.o_data = first.o_data;
      p.lse_data = first.lse_data;
      p.o.dl.data = p.o_data.data();
      p.lse.dl.data = p.lse_data.data();
      const Scratch scratch(plan.get());
      for (int round = 0; round < 10; ++round) {
        std::fill(p.dk_data.begin(), p.dk_data.end(), NAN);
        count += attnjit_run_backward(plan.get(), &p.attention, &p.gradients, scratch.data, scratch.size, nullptr) !=
                 ATTNJIT_OK;
        for (std::size_t i = 0; i < p.dk_data.size(); ++i) {
          // Threads of the pool may come and go: a sum's order with them.
          count += !(std::abs(p.dk_data[i] - first.dk_data[i]) <= 1e-4f);
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_THAT(wrong, Each(0));
}

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
                                               "deterministic": true, "partial_keys": false})"))
      << json;
  EXPECT_EQ(json["problem"], "B=2 Hq=4 Hkv=2 Sq=40 Skv=0 D=16 Dv=24 float32 backward");
  EXPECT_FALSE(description(prepare(context, p.attention)).contains("gradients"));
}

TEST(BackwardApi, Explain) {
  const ContextPtr context = make_context();
  GradientProblem p;
  float table[50] = {}, of_table[50];
  p.attention.score_mod = "tanh(score) + table[kv_idx]";
  p.capture("table", table, {50});
  p.gradient("table", of_table, {50});
  p.attention.o = p.attention.lse = nullptr;
  p.gradients.grad_out = nullptr;
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.gradients = &p.gradients;
  options.dump = 1;
  char* text = nullptr;
  ASSERT_EQ(attnjit_explain(context.get(), &p.attention, &options, &text), ATTNJIT_OK) << attnjit_last_error();
  const Json json = Json::parse(text);
  attnjit_free(text);
  EXPECT_EQ(json["facts"]["gradient_need"], "score");
  EXPECT_EQ(json["facts"]["sinks"], Json::parse(R"([{"capture": "table", "level": "column", "row_shift": false,
                                                     "data_dependent": false, "injective": false}])"));
  EXPECT_EQ(json["gradients"]["captures"], Json({"table"}));
  EXPECT_THAT(json["mlir"].get<std::string>(), HasSubstr("attnjit.sink"));
  p.gradients.deterministic = 5;
  EXPECT_EQ(attnjit_explain(context.get(), &p.attention, &options, &text), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("gradients.deterministic is 5"));
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
    double by_step[2] = {};
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
