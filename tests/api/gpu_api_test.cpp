// The C interface on a real GPU: what the fake driver cannot show. Captures, replays, what happens to work in flight.
// Skipped where there is no GPU.
#include <gmock/gmock.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include "bench/cuda.h"
#include "test_problem.h"

namespace attnjit::test {
namespace {

using testing::HasSubstr;
using tool::Gpu;
using tool::GpuBuffer;
using tool::GpuGraph;
using tool::GpuStream;

// The tensors of a Problem or GradientProblem, copied to the GPU; outputs come back by download().
template <typename P>
class OnGpu {
 public:
  explicit OnGpu(int shift_bytes = 0) : shift_(static_cast<std::size_t>(shift_bytes)) {
    place(p.q, p.q_data);
    place(p.k, p.k_data);
    place(p.v, p.v_data);
    place(p.o, p.o_data, true);
    place(p.lse, p.lse_data, true);
    place(p.row_max, p.row_max_data, true);
    if constexpr (std::is_same_v<P, GradientProblem>) {
      place(p.grad_out, p.grad_out_data);
      place(p.grad_lse, p.grad_lse_data);
      place(p.dq, p.dq_data, true);
      place(p.dk, p.dk_data, true);
      place(p.dv, p.dv_data, true);
    }
  }
  // A captured tensor from the host's memory.
  void capture(const char* name, std::vector<float>& values, std::vector<std::int64_t> shape) {
    place(p.capture(name, nullptr, std::move(shape)), values);
  }
  // Its gradient, which comes back to `values`.
  void gradient(const char* name, std::vector<float>& values, std::vector<std::int64_t> shape) {
    place(p.gradient(name, nullptr, std::move(shape)), values, true);
  }
  // Again what the host has.
  void upload() const {
    for (const Copy& copy : copies_) copy.buffer.upload(shift_, copy.host->data(), bytes(copy));
  }
  void download() const {
    for (const Copy& copy : copies_) {
      if (copy.is_output) copy.buffer.download(shift_, copy.host->data(), bytes(copy));
    }
  }

  P p;

 private:
  struct Copy {
    std::vector<float>* host;
    GpuBuffer buffer;
    bool is_output;
  };
  static std::size_t bytes(const Copy& copy) { return copy.host->size() * sizeof(float); }
  void place(Tensor& tensor, std::vector<float>& host, bool is_output = false) {
    copies_.push_back({&host, GpuBuffer(host.size() * sizeof(float) + shift_), is_output});
    copies_.back().buffer.upload(shift_, host.data(), bytes(copies_.back()));
    tensor.dl.data = copies_.back().buffer.data();
    tensor.dl.byte_offset = shift_;
    tensor.dl.device = {kDLCUDA, 0};
  }

  std::size_t shift_;
  std::vector<Copy> copies_;
};
using GpuProblem = OnGpu<Problem>;

class GpuApi : public testing::Test {
 protected:
  void SetUp() override {
    if (!Gpu::unavailable().empty()) GTEST_SKIP() << Gpu::unavailable();
    context_ = make_context();
  }

  // The same call on the CPU, with `slope` where the expression reads it.
  Problem& on_cpu(const char* score_mod, const char* mask_mod = nullptr, float slope = NAN) {
    cpu_ = std::make_unique<Problem>();
    cpu_slope_ = slope;
    cpu_->attention.score_mod = score_mod;
    cpu_->attention.mask_mod = mask_mod;
    if (!std::isnan(slope)) cpu_->capture("slope", &cpu_slope_, {});
    EXPECT_TRUE(forward(context_, cpu_->attention));
    return *cpu_;
  }
  static void expect_same(const Problem& gpu, const Problem& cpu) {
    const auto compare = [](const std::vector<float>& x, const std::vector<float>& y, const char* what) {
      ASSERT_EQ(x.size(), y.size());
      int wrong = 0;
      for (std::size_t i = 0; i < x.size() && wrong < 3; ++i) {
        if (x[i] != y[i] && !(std::abs(x[i] - y[i]) <= 3e-5f)) {
          ++wrong, ADD_FAILURE() << what << "[" << i << "] is " << x[i] << " on the GPU and " << y[i] << " on the CPU";
        }
      }
    };
    compare(gpu.o_data, cpu.o_data, "o");
    compare(gpu.lse_data, cpu.lse_data, "lse");
    compare(gpu.row_max_data, cpu.row_max_data, "row_max");
  }
  attnjit_status run(const PlanPtr& plan, const GpuProblem& gpu, const GpuStream& stream) {
    const std::size_t size = attnjit_plan_workspace_size(plan.get());
    if (workspace_.size() < size) workspace_ = GpuBuffer(size);
    return attnjit_run(plan.get(), &gpu.p.attention, workspace_.data(), size, stream.handle());
  }

  ContextPtr context_;
  std::unique_ptr<Problem> cpu_;
  float cpu_slope_ = 0;
  GpuBuffer workspace_;
};

TEST_F(GpuApi, AgreesWithTheCpu) {
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH}) {
    GpuProblem gpu;
    gpu.p.attention.backend = backend;
    gpu.p.attention.score_mod = "softcap(20) - 0.1 * h";
    gpu.p.attention.mask_mod = "q_idx + 5 >= kv_idx and kv_idx > 2";
    const PlanPtr plan = prepare(context_, gpu.p.attention);
    ASSERT_TRUE(plan);
    EXPECT_EQ(attnjit_plan_backend(plan.get()), backend);
    const GpuStream stream;
    ASSERT_EQ(run(plan, gpu, stream), ATTNJIT_OK) << attnjit_last_error();
    stream.synchronize();
    gpu.download();
    expect_same(gpu.p, on_cpu(gpu.p.attention.score_mod, gpu.p.attention.mask_mod));
  }
}

// Whatever wins, the result is the same; it is found again without timing.
TEST_F(GpuApi, Autotune) {
  const std::filesystem::path cache =
      std::filesystem::temp_directory_path() / ("attnjit-autotune-test-" + std::to_string(getpid()));
  const auto cached_context = [&] {
    setenv("ATTNJIT_CACHE_DIR", cache.c_str(), 1);
    ContextPtr context = make_context();
    unsetenv("ATTNJIT_CACHE_DIR");
    return context;
  };
  const auto autotune_of = [](const PlanPtr& plan) {
    return nlohmann::json::parse(attnjit_plan_description(plan.get()))["kernels"][0]["autotune"];
  };
  GpuProblem gpu;
  gpu.p.attention.backend = ATTNJIT_BACKEND_SM80;
  gpu.p.attention.score_mod = "score + table[h] * (kv_idx - q_idx)";
  gpu.p.attention.max_autotune = 1;
  std::vector<float> table = {0.5f, -0.25f, 0.125f, 0.0f};
  gpu.capture("table", table, {4});
  context_ = cached_context();
  const PlanPtr plan = prepare(context_, gpu.p.attention);
  ASSERT_TRUE(plan);
  const nlohmann::json tuned = autotune_of(plan);
  EXPECT_THAT(tuned["why"].get<std::string>(), HasSubstr("the fastest of ")) << tuned;
  int timed = 0;
  for (const nlohmann::json& candidate : tuned["candidates"]) {
    if (!candidate.contains("ms")) continue;
    ++timed;
    EXPECT_GT(candidate["ms"], 1e-4) << tuned;
    EXPECT_LT(candidate["ms"], 1e3) << tuned;
  }
  EXPECT_GE(timed, 2) << tuned;
  const GpuStream stream;
  ASSERT_EQ(run(plan, gpu, stream), ATTNJIT_OK) << attnjit_last_error();
  stream.synchronize();
  gpu.download();
  cpu_ = std::make_unique<Problem>();
  cpu_->attention.score_mod = gpu.p.attention.score_mod;
  cpu_->capture("table", table.data(), {4});
  ASSERT_TRUE(forward(context_, cpu_->attention));
  expect_same(gpu.p, *cpu_);

  context_ = cached_context();
  const PlanPtr stored = prepare(context_, gpu.p.attention);
  ASSERT_TRUE(stored);
  EXPECT_EQ(autotune_of(stored)["why"], "the fastest, as stored");
  EXPECT_EQ(autotune_of(stored)["config"], tuned["config"]);
  std::filesystem::remove_all(cache);
}

// Rows at 4 bytes: an address of its own for every tensor.
TEST_F(GpuApi, UnalignedRows) {
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH}) {
    GpuProblem gpu(4);
    gpu.p.attention.backend = backend;
    gpu.p.attention.score_mod = "causal";
    const PlanPtr plan = prepare(context_, gpu.p.attention);
    ASSERT_TRUE(plan);
    const GpuStream stream;
    ASSERT_EQ(run(plan, gpu, stream), ATTNJIT_OK) << attnjit_last_error();
    stream.synchronize();
    gpu.download();
    expect_same(gpu.p, on_cpu("causal"));
  }
}

// A graph reads a scalar of the device at each replay, and keeps the one that was on the CPU.
TEST_F(GpuApi, GraphReplaysWithNewScalars) {
  constexpr const char* kMod = "score - slope * kv_idx";
  // Taken before: a program's own allocations are not for a capture.
  workspace_ = GpuBuffer(std::size_t{64} << 20);
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH}) {
    std::vector<float> slope = {0.25f};
    const GpuStream stream;
    GpuProblem by_pointer;
    by_pointer.p.attention.backend = backend;
    by_pointer.p.attention.score_mod = kMod;
    by_pointer.capture("slope", slope, {});
    const PlanPtr plan = prepare(context_, by_pointer.p.attention);
    ASSERT_TRUE(plan);
    attnjit_status status = ATTNJIT_INTERNAL;
    const GpuGraph graph(stream, [&] { status = run(plan, by_pointer, stream); });
    ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
    for (const float next : {0.5f, -0.125f}) {
      slope[0] = next;
      by_pointer.upload();
      graph.launch(stream);
      stream.synchronize();
      by_pointer.download();
      expect_same(by_pointer.p, on_cpu(kMod, nullptr, next));
    }

    GpuProblem by_value;
    float value = 0.5f;
    by_value.p.attention.backend = backend;
    by_value.p.attention.score_mod = kMod;
    by_value.p.capture("slope", &value, {});
    const GpuGraph kept(stream, [&] { status = run(plan, by_value, stream); });
    ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
    value = 100.0f;
    kept.launch(stream);
    stream.synchronize();
    by_value.download();
    expect_same(by_value.p, on_cpu(kMod, nullptr, 0.5f));
  }
}

// A problem that nobody has prepared, prepared in the thread that captures: compiled, loaded, and the capture is whole.
TEST_F(GpuApi, PrepareDuringACapture) {
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH}) {
    const GpuStream stream;
    GpuProblem gpu;
    gpu.p.attention.backend = backend;
    gpu.p.attention.score_mod = backend == ATTNJIT_BACKEND_SM80 ? "score * 0.875" : "score * 0.75";
    // Its workspace is taken before: a program's own allocations are not for a capture.
    workspace_ = GpuBuffer(std::size_t{64} << 20);
    PlanPtr plan;
    attnjit_status status = ATTNJIT_INTERNAL;
    const GpuGraph graph(stream, [&] {
      plan = prepare(context_, gpu.p.attention);
      if (plan) status = run(plan, gpu, stream);
    });
    ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
    graph.launch(stream);
    stream.synchronize();
    gpu.download();
    expect_same(gpu.p, on_cpu(gpu.p.attention.score_mod));
  }
}

TEST_F(GpuApi, ForwardRefusesToCompileDuringACapture) {
  const GpuStream stream;
  GpuProblem known, unknown;
  known.p.attention.backend = unknown.p.attention.backend = ATTNJIT_BACKEND_SM80;
  unknown.p.attention.score_mod = "score + 0.0625 * q_idx";
  ASSERT_EQ(attnjit_forward(context_.get(), &known.p.attention, nullptr, 0, stream.handle()), ATTNJIT_OK)
      << attnjit_last_error();
  stream.synchronize();
  known.upload();  // NaN in the outputs again
  attnjit_status refused = ATTNJIT_OK, status = ATTNJIT_INTERNAL;
  const GpuGraph graph(stream, [&] {
    refused = attnjit_forward(context_.get(), &unknown.p.attention, nullptr, 0, stream.handle());
    EXPECT_THAT(attnjit_last_error(), HasSubstr("its stream is being captured"));
    status = attnjit_forward(context_.get(), &known.p.attention, nullptr, 0, stream.handle());
  });
  EXPECT_EQ(refused, ATTNJIT_NOT_PREPARED);
  ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
  graph.launch(stream);
  stream.synchronize();
  known.download();
  expect_same(known.p, on_cpu(nullptr));
}

// The plan, its context and with them the loaded kernel go while the call is queued behind a long one.
TEST_F(GpuApi, WorkInFlightOutlivesItsPlan) {
  const GpuStream stream;
  GpuProblem gpu;
  gpu.p.attention.backend = ATTNJIT_BACKEND_SM80;
  gpu.p.attention.score_mod = "score - 0.03125 * kv_idx";
  {
    ContextPtr context = make_context();
    PlanPtr plan = prepare(context, gpu.p.attention);
    ASSERT_TRUE(plan);
    for (int i = 0; i < 200; ++i) ASSERT_EQ(run(plan, gpu, stream), ATTNJIT_OK) << attnjit_last_error();
  }
  stream.synchronize();
  gpu.download();
  expect_same(gpu.p, on_cpu(gpu.p.attention.score_mod));
}

TEST_F(GpuApi, ThreadsWithStreamsOfTheirOwn) {
  constexpr int kThreads = 4;
  GpuProblem first;
  first.p.attention.mask_mod = "causal";
  const PlanPtr plan = prepare(context_, first.p.attention);
  ASSERT_TRUE(plan);
  std::vector<std::unique_ptr<GpuProblem>> problems;
  for (int i = 0; i < kThreads; ++i) {
    problems.push_back(std::make_unique<GpuProblem>());
    problems.back()->p.attention.mask_mod = "causal";
  }
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const GpuStream stream;
      for (int round = 0; round < 50; ++round) {
        EXPECT_EQ(
            attnjit_run(plan.get(), &problems[static_cast<std::size_t>(i)]->p.attention, nullptr, 0, stream.handle()),
            ATTNJIT_OK);
      }
      stream.synchronize();
    });
  }
  for (std::thread& thread : threads) thread.join();
  const Problem& cpu = on_cpu(nullptr, "causal");
  for (const auto& problem : problems) {
    problem->download();
    expect_same(problem->p, cpu);
    EXPECT_EQ(problem->p.o_data, problems[0]->p.o_data) << "not the same bits";
  }
}

// Without keys the kernel writes what an empty row holds, also where rows lie apart.
TEST_F(GpuApi, NoKeysIntoStridedOutputs) {
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH}) {
    GpuProblem gpu;
    gpu.p.attention.backend = backend;
    gpu.p.k.shape[2] = gpu.p.v.shape[2] = 0;
    // Every other head of o and every other row of lse.
    gpu.p.q.shape[1] = gpu.p.o.shape[1] = gpu.p.lse.shape[1] = gpu.p.row_max.shape[1] = 2;
    gpu.p.o.strides = {4 * 40 * 24, 2 * 40 * 24, 24, 1};
    gpu.p.lse.strides = {160, 80, 2};
    gpu.p.o.sync();
    gpu.p.lse.sync();
    const PlanPtr plan = prepare(context_, gpu.p.attention);
    ASSERT_TRUE(plan);
    const GpuStream stream;
    ASSERT_EQ(run(plan, gpu, stream), ATTNJIT_OK) << attnjit_last_error();
    stream.synchronize();
    gpu.download();
    int wrong = 0;
    for (std::size_t i = 0; i < gpu.p.o_data.size(); ++i) {
      const bool ours = i / (40 * 24) % 2 == 0;
      wrong += ours ? gpu.p.o_data[i] != 0.0f : !std::isnan(gpu.p.o_data[i]);
    }
    for (std::size_t i = 0; i < gpu.p.lse_data.size(); ++i) {
      wrong += i % 2 == 0 ? gpu.p.lse_data[i] != -INFINITY : !std::isnan(gpu.p.lse_data[i]);
    }
    EXPECT_EQ(wrong, 0) << attnjit_backend_name(backend);
  }
}

// 70,000 pairs of batch and head are beyond the second dimension of a grid. Of one key, o is v.
TEST_F(GpuApi, ManyHeads) {
  constexpr std::int64_t kBatch = 700, kHeads = 100, kDim = 16;
  const std::vector<float> values = Problem::pattern(kBatch * kHeads * kDim, 7);
  const std::size_t bytes = values.size() * sizeof(float);
  const GpuBuffer in(bytes), out(bytes);
  in.upload(0, values.data(), bytes);
  out.fill(0xff);
  Tensor q(in.data(), {kBatch, kHeads, 1, kDim}), o(out.data(), {kBatch, kHeads, 1, kDim});
  q.dl.device = o.dl.device = {kDLCUDA, 0};
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.q = attention.k = attention.v = &q.dl;
  attention.o = &o.dl;
  attention.backend = ATTNJIT_BACKEND_SM80;
  const GpuStream stream;
  ASSERT_EQ(attnjit_forward(context_.get(), &attention, nullptr, 0, stream.handle()), ATTNJIT_OK)
      << attnjit_last_error();
  stream.synchronize();
  std::vector<float> result(values.size());
  out.download(0, result.data(), bytes);
  EXPECT_EQ(result, values);
}

// A problem with gradients of captured tensors of three levels, one of which shifts whole rows.
struct Captured {
  static constexpr const char* kScoreMod = "score * slope[h] + table[q_idx - kv_idx + 49] + shift[q_idx]";
  static constexpr const char* kMaskMod = "q_idx + 5 >= kv_idx";
  std::vector<float> slope = Problem::pattern(4, 8), table = Problem::pattern(89, 9), shift = Problem::pattern(40, 10);
  std::vector<float> of_slope = std::vector<float>(4, NAN), of_table = std::vector<float>(89, NAN),
                     of_shift = std::vector<float>(40, NAN);

  template <typename Add>
  void each(Add&& add) {
    add("slope", slope, of_slope, 4);
    add("table", table, of_table, 89);
    add("shift", shift, of_shift, 40);
  }
};

void expect_close(const std::vector<float>& gpu, const std::vector<float>& cpu, const char* what) {
  ASSERT_EQ(gpu.size(), cpu.size()) << what;
  for (std::size_t i = 0; i < gpu.size(); ++i) {
    ASSERT_TRUE(std::abs(gpu[i] - cpu[i]) <= 2e-4f * (1.0f + std::abs(cpu[i])))
        << what << "[" << i << "] is " << gpu[i] << " on the GPU and " << cpu[i] << " on the CPU";
  }
}

// Of both plans that are made at once, on a stream, and again from a graph with another grad_out.
TEST_F(GpuApi, GradientsAgreeWithTheCpu) {
  workspace_ = GpuBuffer(std::size_t{64} << 20);
  for (const attnjit_backend backend : {ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH}) {
    for (const int flags : {0, 1, 2}) {
      SCOPED_TRACE(std::string(attnjit_backend_name(backend)) + (flags == 1   ? " deterministic"
                                                                 : flags == 2 ? " partial_keys"
                                                                              : ""));
      Captured on_gpu, on_cpu;
      OnGpu<GradientProblem> gpu;
      GradientProblem cpu;
      on_gpu.each([&](const char* name, auto& values, auto& gradient, std::int64_t size) {
        gpu.capture(name, values, {size});
        gpu.gradient(name, gradient, {size});
      });
      on_cpu.each([&](const char* name, auto& values, auto& gradient, std::int64_t size) {
        cpu.capture(name, values.data(), {size});
        cpu.gradient(name, gradient.data(), {size});
      });
      for (GradientProblem* const p : {&gpu.p, &cpu}) {
        p->attention.score_mod = Captured::kScoreMod;
        p->attention.mask_mod = Captured::kMaskMod;
        p->gradients.deterministic = flags == 1 ? 1 : 0;
        p->gradients.partial_keys = flags == 2 ? 1 : 0;
      }
      gpu.p.attention.backend = backend;
      attnjit_plan *forward_plan = nullptr, *backward_plan = nullptr;
      ASSERT_EQ(
          attnjit_prepare_backward(context_.get(), &gpu.p.attention, &gpu.p.gradients, &forward_plan, &backward_plan),
          ATTNJIT_OK)
          << attnjit_last_error();
      const PlanPtr first(forward_plan), second(backward_plan);
      ASSERT_LE(attnjit_plan_workspace_size(forward_plan), std::size_t{64} << 20);
      ASSERT_LE(attnjit_plan_workspace_size(backward_plan), std::size_t{64} << 20);
      const GpuStream stream;
      const auto run_both = [&] {
        const attnjit_status status = attnjit_run(forward_plan, &gpu.p.attention, workspace_.data(),
                                                  attnjit_plan_workspace_size(forward_plan), stream.handle());
        if (status != ATTNJIT_OK) return status;
        return attnjit_run_backward(backward_plan, &gpu.p.attention, &gpu.p.gradients, workspace_.data(),
                                    attnjit_plan_workspace_size(backward_plan), stream.handle());
      };
      const auto compare = [&] {
        ASSERT_TRUE(forward(context_, cpu.attention));
        const PlanPtr plan = prepare_backward(context_, cpu);
        ASSERT_TRUE(plan);
        const Scratch scratch(plan.get());
        ASSERT_EQ(attnjit_run_backward(plan.get(), &cpu.attention, &cpu.gradients, scratch.data, scratch.size, nullptr),
                  ATTNJIT_OK)
            << attnjit_last_error();
        stream.synchronize();
        gpu.download();
        expect_close(gpu.p.dq_data, cpu.dq_data, "dq");
        expect_close(gpu.p.dk_data, cpu.dk_data, "dk");
        expect_close(gpu.p.dv_data, cpu.dv_data, "dv");
        expect_close(on_gpu.of_slope, on_cpu.of_slope, "the gradient of slope");
        expect_close(on_gpu.of_table, on_cpu.of_table, "the gradient of table");
        expect_close(on_gpu.of_shift, on_cpu.of_shift, "the gradient of shift");
      };
      ASSERT_EQ(run_both(), ATTNJIT_OK) << attnjit_last_error();
      compare();
      attnjit_status status = ATTNJIT_INTERNAL;
      const GpuGraph graph(stream, [&] { status = run_both(); });
      ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
      for (GradientProblem* const p : {&gpu.p, &cpu}) {
        std::ranges::copy(Problem::pattern(static_cast<std::int64_t>(p->grad_out_data.size()), 11),
                          p->grad_out_data.begin());
        std::fill(p->dq_data.begin(), p->dq_data.end(), NAN);
      }
      gpu.upload();
      graph.launch(stream);
      compare();
    }
  }
}

// What shifts whole rows has the gradient of lse alone, and nothing else is computed.
TEST_F(GpuApi, RowShiftsAlone) {
  OnGpu<GradientProblem> gpu;
  std::vector<float> shift = Problem::pattern(40, 10), of_shift(40, NAN);
  gpu.p.attention.backend = ATTNJIT_BACKEND_SM80;
  gpu.p.attention.score_mod = "score + shift[q_idx]";
  gpu.capture("shift", shift, {40});
  gpu.gradient("shift", of_shift, {40});
  gpu.p.gradients.dq = gpu.p.gradients.dk = gpu.p.gradients.dv = nullptr;
  const GpuStream stream;
  const PlanPtr plan = prepare(context_, gpu.p.attention);
  ASSERT_TRUE(plan);
  ASSERT_EQ(attnjit_run(plan.get(), &gpu.p.attention, nullptr, 0, stream.handle()), ATTNJIT_OK) << attnjit_last_error();
  const PlanPtr backward = prepare_backward(context_, gpu.p);
  ASSERT_TRUE(backward);
  workspace_ = GpuBuffer(attnjit_plan_workspace_size(backward.get()));
  ASSERT_EQ(attnjit_run_backward(backward.get(), &gpu.p.attention, &gpu.p.gradients, workspace_.data(),
                                 attnjit_plan_workspace_size(backward.get()), stream.handle()),
            ATTNJIT_OK)
      << attnjit_last_error();
  stream.synchronize();
  gpu.download();
  std::vector<float> expected(40);
  for (std::size_t i = 0; i < gpu.p.grad_lse_data.size(); ++i) expected[i % 40] += gpu.p.grad_lse_data[i];
  expect_close(of_shift, expected, "the gradient of shift");
}

TEST_F(GpuApi, TheLegacyDefaultStream) {
  GpuProblem gpu;
  gpu.p.attention.mask_mod = "causal";
  const PlanPtr plan = prepare(context_, gpu.p.attention);
  ASSERT_TRUE(plan);
  ASSERT_EQ(attnjit_run(plan.get(), &gpu.p.attention, nullptr, 0, nullptr), ATTNJIT_OK) << attnjit_last_error();
  Gpu::get().synchronize();
  gpu.download();
  expect_same(gpu.p, on_cpu(nullptr, "causal"));
}

}  // namespace
}  // namespace attnjit::test
