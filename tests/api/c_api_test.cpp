// The C interface: results against the oracle, layouts, plans, concurrency, and that a run allocates nothing.
#include <gmock/gmock.h>
#include <stdlib.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <latch>
#include <limits>
#include <nlohmann/json.hpp>
#include <thread>

#include "allocation_count.h"
#include "test_problem.h"

namespace attnjit::test {
namespace {

using testing::HasSubstr;
using Json = nlohmann::json;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// The oracle's rows of a whole problem.
struct Gold {
  std::vector<double> o, lse, row_max;

  Gold(const ContextPtr& context, const Problem& p) {
    std::vector<attnjit_row> rows;
    for (std::int64_t b = 0; b < p.q.shape[0]; ++b) {
      for (std::int64_t h = 0; h < p.q.shape[1]; ++h) {
        for (std::int64_t q = 0; q < p.q.shape[2]; ++q) rows.push_back({b, h, q});
      }
    }
    o.resize(rows.size() * static_cast<std::size_t>(p.v.shape[3]));
    lse.resize(rows.size());
    row_max.resize(rows.size());
    EXPECT_EQ(
        attnjit_reference(context.get(), &p.attention, rows.data(), rows.size(), o.data(), lse.data(), row_max.data()),
        ATTNJIT_OK)
        << attnjit_last_error();
  }
};

// Equal within `tolerance`; NaN only where the other is NaN, infinities equal.
void expect_close(const std::vector<float>& actual, const std::vector<double>& expected, double tolerance,
                  const char* what) {
  ASSERT_EQ(actual.size(), expected.size());
  int wrong = 0;
  for (std::size_t i = 0; i < actual.size() && wrong < 3; ++i) {
    const double a = actual[i], e = expected[i];
    const bool same = std::isnan(e) ? std::isnan(a) : std::isinf(e) ? a == e : std::abs(a - e) <= tolerance;
    if (!same) ++wrong, ADD_FAILURE() << what << "[" << i << "] is " << a << ", the oracle says " << e;
  }
}

void expect_oracle(const ContextPtr& context, Problem& p) {
  ASSERT_TRUE(forward(context, p.attention));
  const Gold gold(context, p);
  expect_close(p.o_data, gold.o, 2e-5, "o");
  expect_close(p.lse_data, gold.lse, 1e-4, "lse");
  expect_close(p.row_max_data, gold.row_max, 1e-4, "row_max");
}

// The oracle itself on a problem small enough to do by hand.
TEST(CApi, OracleByHand) {
  const ContextPtr context = make_context();
  float q_data[] = {1, 2};
  float k_data[] = {1, 0, 0, 1, NAN, 1};
  float v_data[] = {10, 20, INFINITY};
  float o_data[1];
  Tensor q(q_data, {1, 1, 1, 2}), k(k_data, {1, 1, 3, 2}), v(v_data, {1, 1, 3, 1}), o(o_data, {1, 1, 1, 1});
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  const float scale = 0.5f;
  attention.q = &q.dl;
  attention.k = &k.dl;
  attention.v = &v.dl;
  attention.scale = &scale;
  attention.score_mod = "score * 2 + kv_idx";
  attention.mask_mod = "kv_idx < 2";  // NaN in K and infinity in V lie behind it
  const attnjit_row row = {0, 0, 0};
  double out, lse, row_max;
  ASSERT_EQ(attnjit_reference(context.get(), &attention, &row, 1, &out, &lse, &row_max), ATTNJIT_OK)
      << attnjit_last_error();
  // Scores 0.5 and 1, modified 1 and 3.
  EXPECT_DOUBLE_EQ(row_max, 3.0);
  EXPECT_DOUBLE_EQ(lse, std::log(std::exp(1.0) + std::exp(3.0)));
  EXPECT_DOUBLE_EQ(out, (10 * std::exp(1.0) + 20 * std::exp(3.0)) / (std::exp(1.0) + std::exp(3.0)));
  // Nothing kept; -inf kept is the same.
  for (const char* mod : {"where(kv_idx > 5, score, -inf)", "score * 0 - 1e308 * 10"}) {
    attention.score_mod = mod;
    ASSERT_EQ(attnjit_reference(context.get(), &attention, &row, 1, &out, &lse, &row_max), ATTNJIT_OK);
    EXPECT_EQ(out, 0.0) << mod;
    EXPECT_EQ(lse, -kInfinity) << mod;
    EXPECT_EQ(row_max, -kInfinity) << mod;
  }
  // NaN kept.
  attention.mask_mod = nullptr;
  attention.score_mod = "score";
  ASSERT_EQ(attnjit_reference(context.get(), &attention, &row, 1, &out, &lse, &row_max), ATTNJIT_OK);
  EXPECT_TRUE(std::isnan(out));
  EXPECT_TRUE(std::isnan(lse));
}

class CApiMods : public testing::TestWithParam<const char*> {};

TEST_P(CApiMods, AgreesWithTheOracle) {
  const ContextPtr context = make_context();
  Problem p;
  p.attention.score_mod = GetParam();
  p.attention.mask_mod = "q_idx + 20 >= kv_idx";
  expect_oracle(context, p);
}

INSTANTIATE_TEST_SUITE_P(Registry, CApiMods,
                         testing::Values("noop", "causal", "rel", "head_bias", "softcap(20)", "sliding_window(8)",
                                         "where(kv_idx % 3 == 1, -inf, score * score)"));

TEST(CApi, CapturesAndGqaAndStrides) {
  const ContextPtr context = make_context();
  Problem p;
  std::vector<float> bias = Problem::pattern(4 * 40 * 2, 9);
  std::int32_t ids[50];
  for (int i = 0; i < 50; ++i) ids[i] = i / 13;
  float slope = 0.25f;
  p.attention.score_mod = "score + bias[h, q_idx] - slope * ids[kv_idx]";
  p.attention.mask_mod = "ids[kv_idx] != 1";
  p.capture("slope", &slope, {});
  p.capture("ids", ids, {50}, kI32);
  p.capture("bias", bias.data(), {4, 40}, kF32, {80, 2});
  expect_oracle(context, p);
}

TEST(CApi, LayoutsGiveTheSameBits) {
  const ContextPtr context = make_context();
  Problem packed;
  packed.attention.mask_mod = "causal";
  ASSERT_TRUE(forward(context, packed.attention));
  // k in (B, S, H, D) order with padding, read through strides and a byte offset.
  Problem strided;
  strided.attention.mask_mod = "causal";
  std::vector<float> buffer(static_cast<std::size_t>(2 * 50 * 2 * 20 + 3), NAN);
  for (std::size_t b = 0; b < 2; ++b) {
    for (std::size_t h = 0; h < 2; ++h) {
      for (std::size_t s = 0; s < 50; ++s) {
        for (std::size_t d = 0; d < 16; ++d) {
          buffer[3 + ((b * 50 + s) * 2 + h) * 20 + d] = packed.k_data[((b * 2 + h) * 50 + s) * 16 + d];
        }
      }
    }
  }
  strided.k.dl.data = buffer.data();
  strided.k.dl.byte_offset = 3 * sizeof(float);
  strided.k.strides = {2000, 20, 40, 1};
  strided.k.sync();
  ASSERT_TRUE(forward(context, strided.attention));
  EXPECT_EQ(0, std::memcmp(packed.o_data.data(), strided.o_data.data(), packed.o_data.size() * sizeof(float)));
  EXPECT_EQ(packed.lse_data, strided.lse_data);
}

TEST(CApi, BroadcastEqualsRepeated) {
  const ContextPtr context = make_context();
  Problem repeated, broadcast;
  const std::size_t half = repeated.k_data.size() / 2;
  std::copy_n(repeated.k_data.begin(), half, repeated.k_data.begin() + static_cast<std::ptrdiff_t>(half));
  broadcast.k.strides = {0, 800, 16, 1};
  broadcast.k.sync();
  ASSERT_TRUE(forward(context, repeated.attention));
  ASSERT_TRUE(forward(context, broadcast.attention));
  EXPECT_EQ(repeated.o_data, broadcast.o_data);
}

// q and o as slices of one buffer, (B, S, 2, H, D): their bytes interleave and never meet.
TEST(CApi, InterleavedOutputIsAllowed) {
  const ContextPtr context = make_context();
  Problem p, plain;
  plain.v.shape[3] = plain.o.shape[3] = p.v.shape[3] = p.o.shape[3] = 16;
  plain.o_data.assign(2 * 4 * 40 * 16, NAN);
  plain.o.dl.data = plain.o_data.data();
  ASSERT_TRUE(forward(context, plain.attention));
  std::vector<float> buffer(2 * 40 * 2 * 4 * 16, NAN);
  p.q.strides = p.o.strides = {40 * 128, 16, 128, 1};
  p.q.sync();
  p.o.sync();
  p.q.dl.data = buffer.data();
  p.o.dl.data = buffer.data() + 64;
  const auto at = [](std::size_t b, std::size_t h, std::size_t s, std::size_t d) {
    return ((b * 40 + s) * 8 + h) * 16 + d;
  };
  const auto each = [&](auto&& visit) {
    for (std::size_t b = 0; b < 2; ++b) {
      for (std::size_t h = 0; h < 4; ++h) {
        for (std::size_t s = 0; s < 40; ++s) {
          for (std::size_t d = 0; d < 16; ++d) visit(at(b, h, s, d), ((b * 4 + h) * 40 + s) * 16 + d);
        }
      }
    }
  };
  each([&](std::size_t here, std::size_t there) { buffer[here] = p.q_data[there]; });
  ASSERT_TRUE(forward(context, p.attention));
  int wrong = 0;
  each([&](std::size_t here, std::size_t there) { wrong += buffer[here + 64] != plain.o_data[there]; });
  EXPECT_EQ(wrong, 0);
  // One element further, they do meet.
  const PlanPtr plan = prepare(context, p.attention);
  const Scratch scratch(plan.get());
  p.o.dl.data = buffer.data() + 63;
  EXPECT_EQ(attnjit_run(plan.get(), &p.attention, scratch.data, scratch.size, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("o shares memory with q"));
}

TEST(CApi, MaskedRowsAndPoison) {
  const ContextPtr context = make_context();
  Problem p;
  p.attention.mask_mod = "kv_idx < q_idx and kv_idx < 30";  // row 0 keeps nothing
  for (std::size_t head = 0; head < 4; ++head) {
    for (std::size_t s = 30; s < 50; ++s) p.k_data[(head * 50 + s) * 16] = NAN;
  }
  expect_oracle(context, p);
  EXPECT_EQ(p.o_data[0], 0.0f);
  EXPECT_EQ(p.lse_data[0], -INFINITY);
  EXPECT_EQ(p.row_max_data[0], -INFINITY);
}

TEST(CApi, EmptyProblems) {
  const ContextPtr context = make_context();
  for (const int dimension : {0, 1, 2}) {
    Problem p;
    p.q.shape[static_cast<std::size_t>(dimension)] = 0;
    p.o.shape[static_cast<std::size_t>(dimension)] = 0;
    p.lse.shape[static_cast<std::size_t>(dimension)] = p.row_max.shape[static_cast<std::size_t>(dimension)] = 0;
    if (dimension == 0) p.k.shape[0] = p.v.shape[0] = 0;
    p.q.dl.data = p.o.dl.data = nullptr;
    ASSERT_TRUE(forward(context, p.attention)) << dimension;
    EXPECT_TRUE(std::isnan(p.lse_data[0])) << "wrote to an empty output";
  }
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_CPU, ATTNJIT_BACKEND_MATH}) {
    Problem p;
    p.attention.backend = backend;
    p.k.shape[2] = p.v.shape[2] = 0;
    p.k.dl.data = p.v.dl.data = nullptr;
    ASSERT_TRUE(forward(context, p.attention));
    EXPECT_EQ(p.o_data, std::vector<float>(p.o_data.size(), 0.0f));
    EXPECT_EQ(p.lse_data, std::vector<float>(p.lse_data.size(), -INFINITY));
    EXPECT_EQ(p.row_max_data, p.lse_data);
  }
}

TEST(CApi, ReportsClampedReads) {
  for (const int threads : {1, 2}) {
    const ContextPtr context = make_context(threads);
    Problem p;
    float table[9] = {}, other[2 * 50] = {};
    p.capture("table", table, {9});
    p.capture("mask", other, {2, 50});
    p.attention.score_mod = "where(q_idx >= kv_idx, score, -inf) + table[q_idx - kv_idx]";
    p.attention.mask_mod = "mask[h, kv_idx] == 0";
    const attnjit_row rows[] = {{0, 1, 7}, {1, 2, 12}, {1, 3, 9}};
    char* text = nullptr;
    ASSERT_EQ(attnjit_clamped_reads(context.get(), &p.attention, rows, 3, &text), ATTNJIT_OK) << attnjit_last_error();
    const Json json = Json::parse(text);
    attnjit_free(text);
    // table: where the distance is 9 and more; mask: every key of heads 2 and 3.
    EXPECT_EQ(json, Json::parse(R"([
      {"name": "mask", "dimension": 0, "extent": 2, "count": 100,
       "first": {"b": 1, "h": 2, "q_idx": 12, "kv_idx": 0, "index": 2}},
      {"name": "table", "dimension": 0, "extent": 9, "count": 5,
       "first": {"b": 1, "h": 2, "q_idx": 12, "kv_idx": 0, "index": 12}}])"))
        << json;
    ASSERT_EQ(attnjit_clamped_reads(context.get(), &p.attention, rows, 1, &text), ATTNJIT_OK) << attnjit_last_error();
    EXPECT_STREQ(text, "[]");
    attnjit_free(text);
  }
}

TEST(CApi, ScaleAndOptionalOutputs) {
  const ContextPtr context = make_context();
  for (const float scale : {0.0f, -1.5f, 1e-3f}) {
    Problem p;
    p.attention.scale = &scale;
    expect_oracle(context, p);
  }
  // Times log2(e) it is beyond float's range.
  Problem huge;
  const float scale = 3e38f;
  huge.attention.scale = &scale;
  std::fill(huge.q_data.begin(), huge.q_data.end(), 0.0f);
  expect_oracle(context, huge);
  Problem with, without;
  without.attention.lse = nullptr;
  without.attention.row_max = nullptr;
  ASSERT_TRUE(forward(context, with.attention));
  ASSERT_TRUE(forward(context, without.attention));
  EXPECT_EQ(with.o_data, without.o_data);
  EXPECT_TRUE(std::isnan(without.lse_data[0]));
}

TEST(CApi, ScaleAndCapturedValuesMayChangeBetweenRuns) {
  const ContextPtr context = make_context();
  Problem p;
  float slope = 0.5f, scale = 0.25f;
  p.attention.score_mod = "score + slope * kv_idx";
  p.attention.scale = &scale;
  p.capture("slope", &slope, {});
  const PlanPtr plan = prepare(context, p.attention);
  const Scratch scratch(plan.get());
  slope = -0.125f;
  scale = 0.75f;
  ASSERT_EQ(attnjit_run(plan.get(), &p.attention, scratch.data, scratch.size, nullptr), ATTNJIT_OK);
  const Gold gold(context, p);
  expect_close(p.o_data, gold.o, 2e-5, "o");
}

TEST(CApi, MathBackendAgrees) {
  const ContextPtr context = make_context();
  Problem p;
  p.attention.backend = ATTNJIT_BACKEND_MATH;
  p.attention.score_mod = "softcap(20)";
  p.attention.mask_mod = "causal";
  expect_oracle(context, p);
  const PlanPtr plan = prepare(context, p.attention);
  EXPECT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_MATH);
}

TEST(CApi, PlansAreCached) {
  const ContextPtr context = make_context();
  Problem p;
  const auto compiled = [&] {
    const PlanPtr plan = prepare(context, p.attention);
    return Json::parse(attnjit_plan_description(plan.get()))["compiled"].get<bool>();
  };
  EXPECT_TRUE(compiled());
  EXPECT_FALSE(compiled());
  float scale = 0.5f;
  p.attention.scale = &scale;
  EXPECT_FALSE(compiled());
  p.attention.score_mod = "score * 2";
  EXPECT_TRUE(compiled());
  p.attention.lse = nullptr;
  EXPECT_TRUE(compiled());
  p.k.shape[2] = p.v.shape[2] = 48;
  EXPECT_TRUE(compiled());
  EXPECT_FALSE(compiled());
  // Captures in another order: the same plan. Another name: another one.
  float x = 1, y = 2;
  p.attention.score_mod = "score + x - y";
  p.capture("x", &x, {});
  p.capture("y", &y, {});
  EXPECT_TRUE(compiled());
  std::swap(p.captures[0], p.captures[1]);
  EXPECT_FALSE(compiled());
}

// attnjit_forward finds the plan or makes it; pinned memory is CPU memory.
TEST(CApi, ForwardInOneCall) {
  const ContextPtr context = make_context();
  Problem p, again;
  const PlanPtr plan = prepare(context, p.attention);
  const Scratch scratch(plan.get());
  ASSERT_EQ(attnjit_run(plan.get(), &p.attention, scratch.data, scratch.size, nullptr), ATTNJIT_OK);
  again.q.dl.device = {kDLCUDAHost, 0};
  ASSERT_EQ(attnjit_forward(context.get(), &again.attention, scratch.data, scratch.size, nullptr), ATTNJIT_OK)
      << attnjit_last_error();
  EXPECT_EQ(again.o_data, p.o_data);
  p.attention.score_mod = "score * 0.5 + 1";
  ASSERT_EQ(attnjit_forward(context.get(), &p.attention, scratch.data, scratch.size, nullptr), ATTNJIT_OK)
      << attnjit_last_error();
  EXPECT_NE(again.o_data, p.o_data);
  const Gold gold(context, p);
  expect_close(p.o_data, gold.o, 2e-5, "o");
  EXPECT_EQ(attnjit_forward(context.get(), &p.attention, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("workspace_size is 0; the plan needs " + std::to_string(scratch.size)));
  EXPECT_EQ(attnjit_forward(nullptr, &p.attention, nullptr, 0, nullptr), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_STREQ(attnjit_last_error(), "context is NULL");
}

TEST(CApi, RegistrationChangesWhatATextMeans) {
  const ContextPtr context = make_context();
  Problem p;
  float later = 3.0f;
  p.attention.score_mod = "score * later";
  p.capture("later", &later, {});
  EXPECT_TRUE(prepare(context, p.attention));
  ASSERT_EQ(attnjit_register_mod(context.get(), "double_score", nullptr, 0, "score * 2", 0), ATTNJIT_OK);
  Problem named;
  named.attention.score_mod = "double_score";
  expect_oracle(context, named);
  Problem spelled;
  spelled.attention.score_mod = "score * 2";
  ASSERT_TRUE(forward(context, spelled.attention));
  EXPECT_EQ(named.o_data, spelled.o_data);
  ASSERT_EQ(attnjit_register_mod(context.get(), "evens", nullptr, 0, "kv_idx % 2 == 0", 1), ATTNJIT_OK);
  Problem masked;
  masked.attention.mask_mod = "evens and causal";
  expect_oracle(context, masked);
}

TEST(CApi, OneCompileForManyThreads) {
  constexpr int kThreads = 16;
  const ContextPtr context = make_context();
  std::atomic<int> compiles = 0, failures = 0;
  std::latch start(kThreads);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      Problem p;
      p.attention.score_mod = "softcap(17) + 0.5 * (q_idx - kv_idx)";
      start.arrive_and_wait();
      attnjit_plan* plan = nullptr;
      if (attnjit_prepare(context.get(), &p.attention, &plan) != ATTNJIT_OK) {
        ++failures;
        return;
      }
      compiles += Json::parse(attnjit_plan_description(plan))["compiled"].get<bool>();
      attnjit_plan_destroy(plan);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(failures, 0);
  EXPECT_EQ(compiles, 1);
}

TEST(CApi, ConcurrentRunsOfOnePlan) {
  constexpr int kThreads = 8;
  const ContextPtr context = make_context();
  Problem first;
  first.attention.mask_mod = "causal";
  const PlanPtr plan = prepare(context, first.attention);
  ASSERT_TRUE(plan);
  ASSERT_TRUE(forward(context, first.attention));
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      Problem p;
      p.attention.mask_mod = "causal";
      const Scratch scratch(plan.get());
      for (int round = 0; round < 10; ++round) {
        std::fill(p.o_data.begin(), p.o_data.end(), NAN);
        wrong += attnjit_run(plan.get(), &p.attention, scratch.data, scratch.size, nullptr) != ATTNJIT_OK;
        wrong += p.o_data != first.o_data || p.lse_data != first.lse_data;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
}

TEST(CApi, PlanOutlivesItsContext) {
  ContextPtr context = make_context();
  Problem p;
  const PlanPtr plan = prepare(context, p.attention);
  const Gold gold(context, p);
  context.reset();
  const Scratch scratch(plan.get());
  ASSERT_EQ(attnjit_run(plan.get(), &p.attention, scratch.data, scratch.size, nullptr), ATTNJIT_OK);
  expect_close(p.o_data, gold.o, 2e-5, "o");
}

// The child has one thread, whatever the pool held.
TEST(CApi, ForkedChildGoesOn) {
  ContextPtr context = make_context(4);
  Problem problem;
  PlanPtr plan = prepare(context, problem.attention);
  ASSERT_TRUE(plan);
  const Scratch scratch(plan.get());
  ASSERT_EQ(attnjit_run(plan.get(), &problem.attention, scratch.data, scratch.size, nullptr), ATTNJIT_OK);
  const std::vector<float> expected = problem.o_data;
  std::fill(problem.o_data.begin(), problem.o_data.end(), NAN);
  const pid_t child = fork();
  ASSERT_GE(child, 0);
  if (child == 0) {
    alarm(60);  // instead of waiting for ever
    bool ok = attnjit_run(plan.get(), &problem.attention, scratch.data, scratch.size, nullptr) == ATTNJIT_OK &&
              problem.o_data == expected;
    problem.attention.score_mod = "score - kv_idx";
    ok = ok && prepare(context, problem.attention) != nullptr;
    plan.reset();
    context.reset();
    _exit(ok ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(waitpid(child, &status, 0), child);
  EXPECT_EQ(status, 0);
}

TEST(CApi, RunAllocatesNothing) {
  if (!counts_allocations()) GTEST_SKIP() << "malloc belongs to a sanitizer";
  const ContextPtr context = make_context();
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_CPU, ATTNJIT_BACKEND_MATH}) {
    Problem p;
    float slope = 0.5f;
    p.attention.backend = backend;
    p.attention.score_mod = "score + slope * kv_idx";
    p.attention.mask_mod = "causal";
    p.capture("slope", &slope, {});
    const PlanPtr plan = prepare(context, p.attention);
    ASSERT_TRUE(plan);
    const Scratch scratch(plan.get());
    // The fewest of several runs: a library may set itself up at the first use of each thread, and on a loaded machine
    // a thread of the pool may come to its first task in any of them.
    long fewest = std::numeric_limits<long>::max();
    for (int run = 0; run < 10; ++run) {
      const long before = allocation_count();
      const attnjit_status status = attnjit_run(plan.get(), &p.attention, scratch.data, scratch.size, nullptr);
      fewest = std::min(fewest, allocation_count() - before);
      ASSERT_EQ(status, ATTNJIT_OK);
    }
    EXPECT_EQ(fewest, 0) << attnjit_backend_name(backend);
  }
  const long before = allocation_count();
  delete new std::string(100, 'x');
  EXPECT_GT(allocation_count(), before) << "the count does not count";
}

TEST(CApi, Explain) {
  const ContextPtr context = make_context();
  Problem p;
  std::int32_t ids[50] = {};
  p.attention.score_mod = "score + kv_idx * 2";
  p.attention.mask_mod = "ids[kv_idx] == 0";
  p.capture("ids", ids, {50}, kI32);
  p.q.dl.data = nullptr;
  p.attention.o = nullptr;
  char* text = nullptr;
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.dump = 1;
  ASSERT_EQ(attnjit_explain(context.get(), &p.attention, &options, &text), ATTNJIT_OK) << attnjit_last_error();
  const Json json = Json::parse(text);
  attnjit_free(text);
  EXPECT_EQ(json["captures"][0]["name"], "ids");
  EXPECT_EQ(json["captures"][0]["dtype"], "int32");
  EXPECT_EQ(json["facts"]["has_mask"], true);
  EXPECT_EQ(json["backend"], "cpu");
  EXPECT_EQ(json["hash"].get<std::string>().size(), 32u);
  EXPECT_THAT(json["mlir"].get<std::string>(), HasSubstr("func"));
  EXPECT_THAT(json["llvm"].get<std::string>(), HasSubstr("define"));
  EXPECT_FALSE(json["asm"].get<std::string>().empty());
  ASSERT_EQ(attnjit_explain(context.get(), &p.attention, nullptr, &text), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_FALSE(Json::parse(text).contains("mlir"));
  attnjit_free(text);
}

TEST(CApi, ListsModsAndCaptures) {
  const ContextPtr context = make_context();
  const char* parameters[] = {"x", "w"};
  ASSERT_EQ(attnjit_register_mod(context.get(), "mine", parameters, 2, "x * w", 0), ATTNJIT_OK);
  char* text = nullptr;
  ASSERT_EQ(attnjit_list_mods(context.get(), &text), ATTNJIT_OK);
  std::vector<std::string> names;
  for (const Json& mod : Json::parse(text)) {
    names.push_back(mod["name"]);
    if (mod["name"] == "mine") {
      EXPECT_EQ(mod["parameters"], Json({"x", "w"}));
    }
  }
  attnjit_free(text);
  EXPECT_THAT(names, testing::IsSupersetOf({"noop", "causal", "rel", "head_bias", "alibi", "softcap", "mine"}));

  ASSERT_EQ(attnjit_captures(context.get(), "score + bias[b, h] * s", "ids[kv_idx] > s", &text), ATTNJIT_OK);
  EXPECT_EQ(Json::parse(text), Json::parse(R"([{"name": "bias", "rank": 2}, {"name": "ids", "rank": 1},
                                              {"name": "s", "rank": 0}])"));
  attnjit_free(text);
  EXPECT_EQ(attnjit_captures(context.get(), "score +", nullptr, &text), ATTNJIT_INVALID_EXPRESSION);
  EXPECT_EQ(text, nullptr);

  // A comment in Latin-1 does not cost the list.
  ASSERT_EQ(attnjit_register_mod(context.get(), "latin", nullptr, 0, "score # caf\xe9", 0), ATTNJIT_OK);
  ASSERT_EQ(attnjit_list_mods(context.get(), &text), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_THAT(text, testing::HasSubstr("\"latin\""));
  attnjit_free(text);
}

TEST(CApi, LowerInstructionSetsAgree) {
  for (const char* isa : {"sse2", "avx2", "avx512"}) {
    setenv("ATTNJIT_CPU_ISA", isa, 1);
    attnjit_context* raw = nullptr;
    const attnjit_status status = attnjit_context_create(nullptr, &raw);
    unsetenv("ATTNJIT_CPU_ISA");
    if (status == ATTNJIT_ENVIRONMENT) {
      EXPECT_THAT(attnjit_last_error(), HasSubstr("this processor has at most"));
      continue;
    }
    ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
    const ContextPtr context(raw);
    Problem p;
    p.attention.score_mod = "softcap(20)";
    expect_oracle(context, p);
    const PlanPtr plan = prepare(context, p.attention);
    EXPECT_EQ(Json::parse(attnjit_plan_description(plan.get()))["host"]["isa"], isa);
  }
}

TEST(CApi, DumpsEachCompile) {
  const std::filesystem::path directory =
      std::filesystem::temp_directory_path() / ("attnjit-dump-test-" + std::to_string(getpid()));
  setenv("ATTNJIT_DUMP", "mlir,llvm", 1);
  setenv("ATTNJIT_DUMP_DIR", directory.c_str(), 1);
  const ContextPtr context = make_context();
  unsetenv("ATTNJIT_DUMP");
  unsetenv("ATTNJIT_DUMP_DIR");
  Problem p;
  p.attention.score_mod = "score * 1.25 - h";
  EXPECT_TRUE(prepare(context, p.attention));
  int files = 0;
  for (const auto& entry : std::filesystem::directory_iterator(directory)) {
    ++files;
    std::ifstream file(entry.path());
    std::string line;
    std::getline(file, line);
    EXPECT_THAT(line, HasSubstr("score_mod: score * 1.25 - h"));
    EXPECT_TRUE(entry.path().extension() == ".mlir" || entry.path().extension() == ".ll") << entry.path();
  }
  EXPECT_EQ(files, 2);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace attnjit::test
