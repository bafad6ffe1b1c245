// The C interface on a real GPU: streams, CUDA graphs and threads. Results are compared with the CPU backend's.
#include <attnjit/attnjit.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "bench/cuda.h"
#include "tests/support/handles.h"

namespace attnjit::test {
namespace {

using tool::GpuBuffer;
using tool::GpuGraph;
using tool::GpuStream;

constexpr std::int64_t kBatch = 2, kHeads = 4, kSeqlen = 200, kHeadDim = 64;
constexpr std::size_t kElements = kBatch * kHeads * kSeqlen * kHeadDim;

// float32 (B, H, S, D) on the host and on the GPU.
struct Input {
  explicit Input(unsigned seed) : host(kElements), memory(kElements * sizeof(float)) { fill(seed); }
  void fill(unsigned seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (float& value : host) value = normal(random);
    memory.upload(0, host.data(), host.size() * sizeof(float));
  }
  std::vector<float> host;
  GpuBuffer memory;
};

class GpuApi : public testing::TestWithParam<attnjit_backend> {
 protected:
  void SetUp() override {
    ASSERT_EQ(attnjit_context_create(nullptr, &made_), ATTNJIT_OK) << attnjit_last_error();
    context_.reset(made_);
  }

  // A call with a captured scalar `t` by `scalar`'s place, on the GPU or, for the right result, on the CPU.
  struct Call {
    Call(const std::string& text, attnjit_backend backend, DLDevice device, void* q, void* k, void* v, void* o,
         void* scalar, DLDevice scalar_device)
        : score_mod(text) {
      void* const data[] = {q, k, v, o};
      for (int i = 0; i < 4; ++i) {
        tensors[i] = {data[i], device, 4, {kDLFloat, 32, 1}, shape, nullptr, 0};
      }
      t = {scalar, scalar_device, 0, {kDLFloat, 32, 1}, shape, nullptr, 0};
      attention.score_mod = score_mod.c_str();
      attention.q = &tensors[0];
      attention.k = &tensors[1];
      attention.v = &tensors[2];
      attention.o = &tensors[3];
      attention.captures = &capture;
      attention.num_captures = score_mod.find(" t") == std::string::npos ? 0 : 1;
      attention.backend = backend;
    }
    Call(const Call&) = delete;
    Call& operator=(const Call&) = delete;

    std::string score_mod;
    std::int64_t shape[4] = {kBatch, kHeads, kSeqlen, kHeadDim};
    DLTensor tensors[4], t;
    attnjit_capture capture{"t", &t};
    attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  };

  static constexpr DLDevice kCpu{kDLCPU, 0}, kGpu{kDLCUDA, 0};

  Call gpu_call(const std::string& text, void* scalar = nullptr, DLDevice scalar_device = kGpu) {
    return Call(text, GetParam(), kGpu, q_.memory.data(), k_.memory.data(), v_.memory.data(), o_.data(), scalar,
                scalar_device);
  }

  PlanPtr prepare(const attnjit_attention& attention) {
    attnjit_plan* plan = nullptr;
    EXPECT_EQ(attnjit_prepare(context_.get(), &attention, &plan), ATTNJIT_OK) << attnjit_last_error();
    return PlanPtr(plan);
  }

  std::vector<float> downloaded(const GpuBuffer& memory) {
    std::vector<float> result(kElements);
    tool::Gpu::get().synchronize();
    memory.download(0, result.data(), kElements * sizeof(float));
    return result;
  }

  // What the GPU's result should be near to.
  void expect_right(const std::vector<float>& result, const std::string& text, float t, const std::string& what) {
    std::vector<float> right(kElements);
    Call call(text, ATTNJIT_BACKEND_CPU, kCpu, q_.host.data(), k_.host.data(), v_.host.data(), right.data(), &t, kCpu);
    const PlanPtr plan = prepare(call.attention);
    std::vector<std::byte> memory(attnjit_plan_workspace_size(plan.get()) + 64);
    auto* workspace = memory.data() + (64 - reinterpret_cast<std::uintptr_t>(memory.data()) % 64) % 64;
    ASSERT_EQ(attnjit_run(plan.get(), &call.attention, workspace, attnjit_plan_workspace_size(plan.get()), nullptr),
              ATTNJIT_OK)
        << attnjit_last_error();
    float difference = 0.0f;
    for (std::size_t i = 0; i < kElements; ++i) {
      const float each = std::fabs(result[i] - right[i]);
      difference = each <= difference ? difference : each;  // NaN stays
    }
    EXPECT_LE(difference, 1e-4f) << what;
  }

  attnjit_context* made_ = nullptr;
  ContextPtr context_;
  Input q_{1}, k_{2}, v_{3};
  GpuBuffer o_{kElements * sizeof(float)};
};

// New data, and new values of a scalar in device memory, without a new capture.
TEST_P(GpuApi, AGraphIsReplayedWithNewValues) {
  const std::string text = "score * t";
  GpuBuffer scalar(sizeof(float));
  Call call = gpu_call(text, scalar.data());
  const PlanPtr plan = prepare(call.attention);
  const GpuBuffer workspace(attnjit_plan_workspace_size(plan.get()));
  const GpuStream stream;
  o_.fill(0xff);
  const GpuGraph graph(stream, [&] {
    EXPECT_EQ(attnjit_run(plan.get(), &call.attention, workspace.data(), workspace.size(), stream.handle()), ATTNJIT_OK)
        << attnjit_last_error();
  });
  EXPECT_TRUE(std::isnan(downloaded(o_)[0])) << "a capture runs nothing";
  for (const float t : {1.0f, -0.5f, 2.0f}) {
    scalar.upload(0, &t, sizeof t);
    q_.fill(static_cast<unsigned>(10 * t + 20));
    o_.fill(0xff);
    graph.launch(stream);
    expect_right(downloaded(o_), text, t, "t = " + std::to_string(t));
  }
}

// A scalar on the host is read by the call: the graph keeps it.
TEST_P(GpuApi, AScalarByValueStaysInAGraph) {
  const std::string text = "score * t";
  float t = 0.75f;
  Call call = gpu_call(text, &t, kCpu);
  const PlanPtr plan = prepare(call.attention);
  const GpuBuffer workspace(attnjit_plan_workspace_size(plan.get()));
  const GpuStream stream;
  const auto run = [&] {
    EXPECT_EQ(attnjit_run(plan.get(), &call.attention, workspace.data(), workspace.size(), stream.handle()), ATTNJIT_OK)
        << attnjit_last_error();
  };
  const GpuGraph graph(stream, run);
  t = -2.0f;
  o_.fill(0xff);
  graph.launch(stream);
  expect_right(downloaded(o_), text, 0.75f, "replayed");
  run();
  expect_right(downloaded(o_), text, -2.0f, "called");
}

// A call that would compile is refused during a capture, which goes on; so does one during which another call is
// prepared.
TEST_P(GpuApi, NothingIsCompiledIntoACapture) {
  const std::string text = "score + 0.5 * (q_idx - kv_idx)";
  Call ready = gpu_call(text), unprepared = gpu_call("score * 0.3125 + h");
  const PlanPtr plan = prepare(ready.attention);
  const GpuBuffer workspace(attnjit_plan_workspace_size(plan.get()));
  const GpuStream stream;
  const GpuGraph graph(stream, [&] {
    EXPECT_EQ(
        attnjit_forward(context_.get(), &unprepared.attention, workspace.data(), workspace.size(), stream.handle()),
        ATTNJIT_NOT_PREPARED);
    EXPECT_NE(prepare(unprepared.attention), nullptr);
    EXPECT_EQ(attnjit_forward(context_.get(), &ready.attention, workspace.data(), workspace.size(), stream.handle()),
              ATTNJIT_OK)
        << attnjit_last_error();
  });
  o_.fill(0xff);
  graph.launch(stream);
  expect_right(downloaded(o_), text, 0.0f, "replayed");
}

TEST_P(GpuApi, ThreadsWithStreamsOfTheirOwnGetTheSameBits) {
  const std::string text = "softcap(3)";
  constexpr int kThreads = 4, kRuns = 20;
  Call call = gpu_call(text);
  const PlanPtr plan = prepare(call.attention);
  std::vector<std::vector<float>> results(kThreads);
  std::vector<std::string> faults(kThreads);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (std::size_t i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      const GpuBuffer o(kElements * sizeof(float)), workspace(attnjit_plan_workspace_size(plan.get()));
      const GpuStream stream;
      Call own(text, GetParam(), kGpu, q_.memory.data(), k_.memory.data(), v_.memory.data(), o.data(), nullptr, kGpu);
      for (int run = 0; run < kRuns; ++run) {
        const attnjit_status status =
            attnjit_run(plan.get(), &own.attention, workspace.data(), workspace.size(), stream.handle());
        if (status != ATTNJIT_OK) faults[i] = attnjit_last_error();
      }
      stream.synchronize();
      results[i] = downloaded(o);
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const std::string& fault : faults) EXPECT_EQ(fault, "");
  expect_right(results[0], text, 0.0f, "thread 0");
  for (const std::vector<float>& result : results) {
    EXPECT_EQ(std::memcmp(result.data(), results[0].data(), kElements * sizeof(float)), 0);
  }
}

INSTANTIATE_TEST_SUITE_P(Backends, GpuApi, testing::Values(ATTNJIT_BACKEND_SM80, ATTNJIT_BACKEND_MATH),
                         [](const auto& info) { return std::string(attnjit_backend_name(info.param)); });

}  // namespace
}  // namespace attnjit::test

// Exit status 77: there is no GPU.
int main(int argc, char** argv) {
  if (const std::string& why = attnjit::tool::Gpu::unavailable(); !why.empty()) {
    std::printf("skipped: %s\n", why.c_str());
    return 77;
  }
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
