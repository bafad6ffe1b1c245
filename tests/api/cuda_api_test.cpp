// The C interface on a CUDA device, with a fake driver: what is launched and with what, captures, alignment, refusals.
// Kernels are compiled for real, and not run: gpu tests do that.
#include <gmock/gmock.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <limits>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

#include "allocation_count.h"
#include "kernels_templates/cuda/params.h"
#include "kernels_templates/cuda/summaries.h"
#include "kernels_templates/sm90/config.h"
#include "support/fake_cublas/fake_cublas.h"
#include "support/fake_cuda/fake_cuda.h"
#include "test_problem.h"

namespace attnjit::test {
namespace {

using cuda::ForwardParams;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;
using Json = nlohmann::json;

constexpr const char* kDriver = ATTNJIT_FAKE_CUDA;

class CudaApi : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    cache = std::filesystem::temp_directory_path() / ("attnjit-cuda-api-test-" + std::to_string(getpid()));
  }
  static void TearDownTestSuite() { std::filesystem::remove_all(cache); }

  void SetUp() override {
    fake_ = fake_cuda(kDriver);
    if (!fake_) GTEST_SKIP() << kDriver << " is not here";  // away from the build
    fake_->reset();
    fake_->parameter_bytes = sizeof(ForwardParams);
    context_ = create();
    for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o, &p_.lse, &p_.row_max}) tensor->dl.device = {kDLCUDA, 0};
  }

  ContextPtr create(const char* driver = kDriver, const attnjit_context_options* options = nullptr,
                    const char* cublas = ATTNJIT_FAKE_CUBLAS) {
    setenv("ATTNJIT_CUDA_DRIVER", driver, 1);
    setenv("ATTNJIT_CUBLAS", cublas, 1);
    setenv("ATTNJIT_CACHE_DIR", cache.c_str(), 1);
    attnjit_context* context = nullptr;
    EXPECT_EQ(attnjit_context_create(options, &context), ATTNJIT_OK) << attnjit_last_error();
    unsetenv("ATTNJIT_CUDA_DRIVER");
    unsetenv("ATTNJIT_CUBLAS");
    unsetenv("ATTNJIT_CACHE_DIR");
    return ContextPtr(context);
  }

  // Skips, visibly, where there is no NVRTC.
  PlanPtr prepared() {
    attnjit_plan* plan = nullptr;
    const attnjit_status status = attnjit_prepare(context_.get(), &p_.attention, &plan);
    no_compiler_ =
        status == ATTNJIT_ENVIRONMENT && std::string(attnjit_last_error()).find("NVRTC") != std::string::npos;
    if (!no_compiler_) EXPECT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
    return PlanPtr(plan);
  }
  attnjit_status run(const PlanPtr& plan, void* stream = nullptr) {
    return attnjit_run(plan.get(), &p_.attention, nullptr, 0, stream);
  }
  ForwardParams last_params() {
    ForwardParams params = {};
    if (!fake_->launches.empty()) std::memcpy(&params, fake_->launches.back().parameters.data(), sizeof(params));
    return params;
  }
  // A scalar "slope" of the expression, on the CPU or on the device.
  Tensor& slope(float* value, DLDeviceType type) {
    p_.attention.score_mod = "score - slope * kv_idx";
    Tensor& tensor = p_.capture("slope", value, {});
    tensor.dl.device = {type, 0};
    return tensor;
  }

  static std::filesystem::path cache;
  FakeCuda* fake_ = nullptr;
  bool no_compiler_ = false;
  Problem p_;
  ContextPtr context_;
};
std::filesystem::path CudaApi::cache;

#define PREPARE_OR_SKIP(plan)                             \
  const PlanPtr plan = prepared();                        \
  if (no_compiler_) GTEST_SKIP() << attnjit_last_error(); \
  ASSERT_TRUE(plan)

TEST_F(CudaApi, Launch) {
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_SM80);
  EXPECT_EQ(attnjit_plan_workspace_size(plan.get()), 0u);
  EXPECT_EQ(fake_->launched, 0) << "prepare launched something";
  int stream = 0;
  ASSERT_EQ(run(plan, &stream), ATTNJIT_OK) << attnjit_last_error();
  ASSERT_EQ(fake_->launches.size(), 1u);
  const FakeCuda::Launch& launch = fake_->launches[0];
  EXPECT_EQ(launch.entry, "attnjit_forward");
  EXPECT_EQ(launch.stream, &stream);
  const Json kernel = Json::parse(attnjit_plan_description(plan.get()))["kernels"][0];
  EXPECT_EQ(launch.shared, kernel["shared_bytes"].get<unsigned>());
  EXPECT_EQ(launch.block, 32 * kernel["warps"].get<unsigned>());
  // 40 queries in one tile, of 4 heads and 2 batches.
  EXPECT_EQ(launch.grid[0], 8u);
  EXPECT_EQ(launch.grid[1], 1u);
  const ForwardParams params = last_params();
  EXPECT_EQ(params.q, p_.q_data.data());
  EXPECT_EQ(params.o, p_.o_data.data());
  EXPECT_EQ(params.lse, p_.lse_data.data());
  EXPECT_EQ(params.seqlen_q, 40);
  EXPECT_EQ(params.seqlen_kv, 50);
  EXPECT_EQ(params.num_heads_kv, 2);
  EXPECT_EQ(params.v_stride[2], 24);
  EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
}

TEST_F(CudaApi, ByteOffsetAndManagedMemory) {
  PREPARE_OR_SKIP(plan);
  p_.q.dl.device.device_type = kDLCUDAManaged;
  p_.q.dl.byte_offset = 32;
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(last_params().q, p_.q_data.data() + 8);
}

TEST_F(CudaApi, Scalars) {
  float value = 0.5f;
  Tensor& scalar = slope(&value, kDLCPU);
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  const auto by_value = [&] {
    const cuda::CapturedView view = last_params().captured[0];
    EXPECT_EQ(view.data, nullptr);
    float found;
    std::memcpy(&found, &view.value, sizeof(found));
    return found;
  };
  EXPECT_EQ(by_value(), 0.5f);
  value = -2.0f;
  ASSERT_EQ(run(plan), ATTNJIT_OK);
  EXPECT_EQ(by_value(), -2.0f);
  // The same plan takes it from the device.
  scalar.dl.device = {kDLCUDA, 0};
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(last_params().captured[0].data, &value);
  scalar.dl.device = {kDLCUDAHost, 0};
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(by_value(), -2.0f);
}

TEST_F(CudaApi, RunAllocatesNothing) {
  if (!counts_allocations()) GTEST_SKIP() << "malloc belongs to a sanitizer";
  float value = 0.5f;
  slope(&value, kDLCPU);
  PREPARE_OR_SKIP(plan);
  fake_->record = false;
  ASSERT_EQ(run(plan), ATTNJIT_OK);
  const long before = allocation_count();
  for (int i = 0; i < 10; ++i) ASSERT_EQ(run(plan), ATTNJIT_OK);
  EXPECT_EQ(allocation_count(), before);
  EXPECT_EQ(fake_->launched, 11);
}

// What is prepared during a capture leaves it whole, and a run becomes part of it.
TEST_F(CudaApi, PrepareAndRunDuringACapture) {
  int stream = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(fake_->modules_loaded, 1);
  ASSERT_EQ(run(plan, &stream), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_TRUE(fake_->launches.at(0).captured);
  context_.reset();
  EXPECT_FALSE(fake_->capture_broken);
}

TEST_F(CudaApi, ForwardRefusesToCompileDuringACapture) {
  int stream = 0, other = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  p_.attention.score_mod = "score * 0.75";
  ASSERT_EQ(attnjit_forward(context_.get(), &p_.attention, nullptr, 0, &stream), ATTNJIT_NOT_PREPARED);
  EXPECT_THAT(attnjit_last_error(), AllOf(HasSubstr("B=2 Hq=4"), HasSubstr("its stream is being captured"),
                                          HasSubstr("call attnjit_prepare")));
  EXPECT_EQ(fake_->modules_loaded, 0);
  EXPECT_EQ(fake_->launched, 0);
  // Another stream may compile meanwhile.
  const attnjit_status status = attnjit_forward(context_.get(), &p_.attention, nullptr, 0, &other);
  if (status == ATTNJIT_ENVIRONMENT) GTEST_SKIP() << attnjit_last_error();
  ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->modules_loaded, 1);
  // Now there is a plan.
  ASSERT_EQ(attnjit_forward(context_.get(), &p_.attention, nullptr, 0, &stream), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_TRUE(fake_->launches.back().captured);
  EXPECT_FALSE(fake_->capture_broken);
  EXPECT_EQ(fake_->modules_loaded, 1);
}

TEST_F(CudaApi, Alignment) {
  // Rows of 20 floats: 16 bytes by their strides.
  p_.k.strides = {2000, 1000, 20, 1};
  p_.k.sync();
  PREPARE_OR_SKIP(plan);
  const auto kernel = [](const PlanPtr& of) { return Json::parse(attnjit_plan_description(of.get()))["kernels"][0]; };
  EXPECT_EQ(kernel(plan)["load_bytes"], 16);
  EXPECT_EQ(kernel(plan)["store_bytes"], 16);
  // A batch stride of 8 bytes, in the same class.
  p_.k.strides[0] = 2002;
  EXPECT_EQ(run(plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("k has rows aligned to 8 bytes, by its address and strides; the plan was "
                                              "prepared for 16"));
  p_.k.strides[0] = 2004;
  EXPECT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  p_.v.dl.byte_offset = 4;
  EXPECT_EQ(run(plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("v has rows aligned to 4 bytes"));
  p_.v.dl.byte_offset = 0;
  p_.o.dl.byte_offset = 8;
  EXPECT_EQ(run(plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("o has rows aligned to 8 bytes"));
  EXPECT_EQ(fake_->launched, 1);

  // Prepared with these pointers, the plan is another one, and takes whatever is aligned further.
  p_.q.dl.byte_offset = 4;
  PREPARE_OR_SKIP(unaligned);
  EXPECT_EQ(kernel(unaligned)["load_bytes"], 4);
  EXPECT_EQ(kernel(unaligned)["store_bytes"], 8);
  EXPECT_EQ(run(unaligned), ATTNJIT_OK) << attnjit_last_error();
  p_.q.dl.byte_offset = p_.o.dl.byte_offset = 0;
  EXPECT_EQ(run(unaligned), ATTNJIT_OK) << attnjit_last_error();
  // NULL counts as aligned.
  p_.q.dl.data = nullptr;
  PREPARE_OR_SKIP(null);
  EXPECT_EQ(kernel(null)["load_bytes"], 16);
}

TEST_F(CudaApi, Devices) {
  fake_->devices = 2;
  PREPARE_OR_SKIP(first);
  for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o, &p_.lse, &p_.row_max}) tensor->dl.device.device_id = 1;
  EXPECT_EQ(run(first), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("q's device was CUDA device 0 when the plan was prepared and is CUDA "
                                              "device 1 now"));
  PREPARE_OR_SKIP(second);
  ASSERT_EQ(run(second), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->launches.back().device, 1);
  p_.q.dl.device.device_id = p_.k.dl.device.device_id = p_.v.dl.device.device_id = 2;
  p_.o.dl.device.device_id = p_.lse.dl.device.device_id = p_.row_max.dl.device.device_id = 2;
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_ENVIRONMENT);
  EXPECT_STREQ(attnjit_last_error(), "there is no CUDA device 2; the driver shows 2");
}

TEST_F(CudaApi, NoDriver) {
  context_ = create("libno_such_driver.so.1");
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(attnjit_last_error(), AllOf(HasSubstr("no CUDA driver"), HasSubstr("libno_such_driver.so.1")));
}

TEST_F(CudaApi, NobodyServes) {
  fake_->major = 7;
  fake_->minor = 5;
  attnjit_plan* plan = nullptr;
  p_.attention.backend = ATTNJIT_BACKEND_SM80;
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_UNSUPPORTED);
  EXPECT_STREQ(attnjit_last_error(),
               "no permitted backend serves B=2 Hq=4 Hkv=2 Sq=40 Skv=50 D=16 Dv=24 float32 on CUDA device 0; sm90: not "
               "asked for; sm80: it needs compute capability 8.0 or later, and not sm_75; cpu: not asked for; math: "
               "not asked for");
  // The eager path's kernels use the same instructions.
  p_.attention.backend = ATTNJIT_BACKEND_AUTO;
  p_.attention.score_mod = "max(score, 0.0)";
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("math: it needs compute capability 8.0 or later, and not sm_75"));
  p_.attention.score_mod = nullptr;
  p_.attention.backend = ATTNJIT_BACKEND_CPU;
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("cpu: the tensors are on CUDA device 0"));
  attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
  options.backends = 1u << ATTNJIT_BACKEND_CPU;
  context_ = create(kDriver, &options);
  p_.attention.backend = ATTNJIT_BACKEND_AUTO;
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(),
              AllOf(HasSubstr("sm80: not permitted"), HasSubstr("math: not permitted"), HasSubstr("cpu: the tensors")));
  Problem on_cpu;
  on_cpu.attention.backend = ATTNJIT_BACKEND_SM80;
  context_ = create();
  EXPECT_EQ(attnjit_prepare(context_.get(), &on_cpu.attention, &plan), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("sm80: the tensors are on the CPU"));
}

TEST_F(CudaApi, LaunchFailure) {
  PREPARE_OR_SKIP(plan);
  fake_->failing = {{"cuLaunchKernel", 400}};
  EXPECT_EQ(run(plan, this), ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("cuLaunchKernel failed: CUDA_ERROR_INVALID_HANDLE"));
}

TEST_F(CudaApi, EmptyProblems) {
  p_.q.shape[2] = p_.o.shape[2] = p_.lse.shape[2] = p_.row_max.shape[2] = 0;
  {
    PREPARE_OR_SKIP(plan);
    ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
    EXPECT_EQ(fake_->launched, 0);
    EXPECT_EQ(fake_->modules_loaded, 0);
  }
  // Without keys, the kernel writes what an empty row holds.
  p_.q.shape[2] = p_.o.shape[2] = p_.lse.shape[2] = p_.row_max.shape[2] = 40;
  p_.k.shape[2] = p_.v.shape[2] = 0;
  p_.k.dl.data = p_.v.dl.data = nullptr;
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  ASSERT_EQ(fake_->launched, 1);
  EXPECT_EQ(last_params().seqlen_kv, 0);
}

// The eager path: what it queues, on which stream, in a capture, without an allocation.
TEST_F(CudaApi, Eager) {
  FakeCublas* const cublas = fake_cublas(ATTNJIT_FAKE_CUBLAS);
  ASSERT_NE(cublas, nullptr);
  cublas->products = 0;
  fake_->parameter_bytes = 0;
  int stream = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  p_.attention.backend = ATTNJIT_BACKEND_MATH;
  p_.attention.score_mod = "where(q_idx >= kv_idx, score, -inf)";
  {
    PREPARE_OR_SKIP(plan);
    EXPECT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_MATH);
    EXPECT_EQ(cublas->handles, 1);
    EXPECT_THAT(attnjit_plan_description(plan.get()),
                AllOf(HasSubstr("attnjit_math_softmax_warp2"), HasSubstr("cuBLAS 13.1.0")));
    const std::size_t size = attnjit_plan_workspace_size(plan.get());
    std::vector<char> memory(size + 256);
    char* const workspace = memory.data() + (256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256);
    const auto run_eager = [&](char* at) { return attnjit_run(plan.get(), &p_.attention, at, size, &stream); };
    ASSERT_EQ(run_eager(workspace), ATTNJIT_OK) << attnjit_last_error();
    std::vector<std::string> entries;
    for (const FakeCuda::Launch& launch : fake_->launches) {
      entries.push_back(launch.entry);
      EXPECT_EQ(launch.stream, &stream);
      EXPECT_TRUE(launch.captured);
    }
    EXPECT_THAT(entries, ElementsAre("attnjit_math_mod", "attnjit_math_softmax_warp2", "attnjit_math_zero_rows"));
    EXPECT_EQ(cublas->products, 2);
    EXPECT_EQ(cublas->last.stream, &stream);
    EXPECT_FALSE(fake_->capture_broken);
    EXPECT_EQ(run_eager(workspace + 64), ATTNJIT_INVALID_ARGUMENT) << "cuBLAS asks for 256 bytes";

    fake_->record = false;
    ASSERT_EQ(run_eager(workspace), ATTNJIT_OK);
    const long before = allocation_count();
    for (int i = 0; i < 3; ++i) ASSERT_EQ(run_eager(workspace), ATTNJIT_OK);
    EXPECT_EQ(allocation_count(), before);
    EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
  }
  context_.reset();
  EXPECT_EQ(cublas->handles, 0);
}

TEST_F(CudaApi, EagerWithoutCublas) {
  context_ = create(kDriver, nullptr, "libno_such_cublas.so.1");
  p_.attention.backend = ATTNJIT_BACKEND_MATH;
  attnjit_plan* plan = nullptr;
  ASSERT_EQ(attnjit_prepare(context_.get(), &p_.attention, &plan), ATTNJIT_ENVIRONMENT);
  if (std::string(attnjit_last_error()).find("NVRTC") != std::string::npos) GTEST_SKIP() << attnjit_last_error();
  EXPECT_THAT(attnjit_last_error(), HasSubstr("libno_such_cublas.so.1"));
}

// 70,000 pairs of batch and head are beyond a grid's second dimension; more blocks than its first has are refused.
TEST_F(CudaApi, ManyHeads) {
  const auto shape = [&](std::int64_t batch, std::int64_t heads) {
    for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o}) tensor->shape = {batch, heads, 1, 16};
    p_.lse.shape = p_.row_max.shape = {batch, heads, 1};
  };
  shape(700, 100);
  p_.attention.lse = p_.attention.row_max = nullptr;
  PREPARE_OR_SKIP(plan);
  const std::vector<float> memory(4 * 700 * 100 * 16);
  float* place = const_cast<float*>(memory.data());
  for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o}) tensor->dl.data = place, place += 700 * 100 * 16;
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->launches.at(0).grid[0], 70000u);
  shape(1 << 20, 1 << 12);
  attnjit_plan* refused = nullptr;
  p_.attention.backend = ATTNJIT_BACKEND_SM80;
  EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &refused), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(),
              HasSubstr("sm80: a launch of 4294967296 blocks is beyond the 2147483647 of a grid"));
}

// What a plan says of how its configuration was found.
Json autotune_of(const PlanPtr& plan) {
  return Json::parse(attnjit_plan_description(plan.get()))["kernels"][0].value("autotune", Json());
}
// The less shared memory, the faster: not the usual configuration.
float by_shared_memory(unsigned, unsigned shared) { return 1e-6f * static_cast<float>(shared); }

TEST_F(CudaApi, AutotuneKeepsTheFastest) {
  p_.attention.score_mod = "score * 0.25";
  p_.attention.max_autotune = 1;
  fake_->kernel_ms = by_shared_memory;
  // Pointers may be NULL, and what is given is not written to.
  p_.k.dl.data = nullptr;
  const std::vector<float> o = p_.o_data;
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(0, std::memcmp(o.data(), p_.o_data.data(), o.size() * sizeof(float)));
  const Json tuned = autotune_of(plan);
  const Json& candidates = tuned["candidates"];
  ASSERT_GE(candidates.size(), 3u) << tuned;
  EXPECT_LE(candidates.size(), 6u);
  EXPECT_NE(tuned["config"], candidates[0]["config"]) << tuned;
  EXPECT_THAT(tuned["why"].get<std::string>(), HasSubstr("the fastest of "));
  double fastest = 1e9;
  for (const Json& candidate : candidates) fastest = std::min(fastest, candidate.value("ms", 1e9));
  for (const Json& candidate : candidates) {
    if (candidate["config"] == tuned["config"]) EXPECT_EQ(candidate["ms"], fastest);
  }
  const Json kernel = Json::parse(attnjit_plan_description(plan.get()))["kernels"][0];
  EXPECT_NEAR(fastest, 1e-6 * kernel["shared_bytes"].get<double>(), 1e-6) << "the plan's kernel is not the fastest";
  EXPECT_EQ(fake_->memory_allocated, 6) << "q, k, v, o, lse and row_max";
  EXPECT_EQ(fake_->memory_freed, fake_->memory_allocated);
  EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
  for (const FakeCuda::Launch& launch : fake_->launches) {
    ForwardParams params = {};
    std::memcpy(&params, launch.parameters.data(), sizeof(params));
    EXPECT_NE(params.o, p_.o_data.data());
    ASSERT_NE(params.k, nullptr);
  }
  // A run takes the winner, with or without the wish.
  p_.k.dl.data = p_.k_data.data();
  p_.attention.max_autotune = 0;
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->launches.back().shared, kernel["shared_bytes"].get<unsigned>());
  // Without the wish, the usual one is prepared.
  const PlanPtr usual = prepared();
  EXPECT_TRUE(autotune_of(usual).is_null());
  EXPECT_NE(Json::parse(attnjit_plan_description(usual.get()))["kernels"][0]["shared_bytes"], kernel["shared_bytes"]);

  // The next process finds it, and times nothing.
  p_.attention.max_autotune = 1;
  context_ = create();
  fake_->events_recorded = 0;
  const PlanPtr stored = prepared();
  EXPECT_EQ(fake_->events_recorded, 0);
  EXPECT_EQ(autotune_of(stored)["config"], tuned["config"]);
  EXPECT_EQ(autotune_of(stored)["why"], "the fastest, as stored");
  EXPECT_FALSE(Json::parse(attnjit_plan_description(stored.get()))["phases_ms"].contains("autotune"));
  EXPECT_EQ(autotune_of(stored)["candidates"], candidates);
  // So does an explanation, and a prepare during a capture.
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  char* text = nullptr;
  ASSERT_EQ(attnjit_explain(context_.get(), &p_.attention, &options, &text), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(Json::parse(text)["kernels"][0]["autotune"], autotune_of(stored));
  attnjit_free(text);
  ASSERT_EQ(attnjit_cache_list(context_.get(), 1, &text), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_THAT(std::string(text), HasSubstr("autotuned B=2 Hq=4"));
  EXPECT_THAT(std::string(text), testing::Not(HasSubstr("\"valid\": false")));
  attnjit_free(text);

  // Damaged, it is timed again.
  int damaged = 0;
  for (const auto& file : std::filesystem::recursive_directory_iterator(cache)) {
    if (!file.is_regular_file()) continue;
    std::fstream stream(file.path(), std::ios::in | std::ios::out | std::ios::binary);
    std::string bytes((std::istreambuf_iterator<char>(stream)), {});
    const std::size_t at = bytes.find("attnjit autotune");
    if (at == std::string::npos) continue;
    stream.clear();
    stream.seekp(static_cast<std::streamoff>(at));
    stream.put('A');
    ++damaged;
  }
  ASSERT_GE(damaged, 1);
  context_ = create();
  const PlanPtr again = prepared();
  EXPECT_GT(fake_->events_recorded, 0);
  EXPECT_EQ(autotune_of(again)["config"], tuned["config"]);
}

TEST_F(CudaApi, AutotuneWithoutADiskCache) {
  p_.attention.score_mod = "score * 0.625";
  p_.attention.max_autotune = 1;
  fake_->kernel_ms = by_shared_memory;
  for (int process = 0; process < 2; ++process) {
    setenv("ATTNJIT_DISABLE_CACHE", "1", 1);
    context_ = create();
    unsetenv("ATTNJIT_DISABLE_CACHE");
    fake_->events_recorded = 0;
    PREPARE_OR_SKIP(plan);
    EXPECT_GT(fake_->events_recorded, 0);
    EXPECT_THAT(autotune_of(plan)["why"].get<std::string>(), HasSubstr("the fastest of "));
  }
}

// Whatever stands in the way of a timing costs speed only, and leaves nothing behind.
TEST_F(CudaApi, AutotuneThatFails) {
  p_.attention.score_mod = "score * 0.375";
  p_.attention.max_autotune = 1;
  for (const char* function : {"cuMemAlloc", "cuStreamCreate", "cuEventCreate", "cuEventRecord", "cuEventElapsedTime",
                               "cuMemcpyHtoDAsync", "cuLaunchKernel", "cuMemcpyDtoDAsync"}) {
    SCOPED_TRACE(function);
    context_ = create();
    fake_->failing[function] = 2;
    if (function == std::string_view("cuMemcpyDtoDAsync")) {  // tensors beyond a pattern
      p_.q.shape[0] = p_.k.shape[0] = p_.v.shape[0] = p_.o.shape[0] = p_.lse.shape[0] = p_.row_max.shape[0] = 200;
      for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o, &p_.lse, &p_.row_max}) tensor->sync();
    }
    PREPARE_OR_SKIP(plan);
    EXPECT_THAT(autotune_of(plan)["why"].get<std::string>(),
                AllOf(HasSubstr("not tuned: "), HasSubstr("CUDA_ERROR_OUT_OF_MEMORY")));
    EXPECT_EQ(fake_->memory_freed, fake_->memory_allocated);
    EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
    fake_->failing.clear();
    p_.attention.max_autotune = 0;
    const PlanPtr usual = prepared();
    p_.attention.max_autotune = 1;
    EXPECT_EQ(Json::parse(attnjit_plan_description(usual.get()))["kernels"][0]["shared_bytes"],
              Json::parse(attnjit_plan_description(plan.get()))["kernels"][0]["shared_bytes"]);
  }
}

TEST_F(CudaApi, AutotuneDuringACapture) {
  p_.attention.score_mod = "score * 0.125";
  p_.attention.max_autotune = 1;
  fake_->kernel_ms = by_shared_memory;
  int stream = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(fake_->events_recorded, 0);
  EXPECT_EQ(fake_->launched, 0);
  EXPECT_FALSE(fake_->capture_broken);
  EXPECT_EQ(autotune_of(plan)["why"], "not tuned: a stream is being captured");
  ASSERT_EQ(run(plan, &stream), ATTNJIT_OK) << attnjit_last_error();
  // After the capture it is made up for, and the next capture finds it.
  fake_->capturing = false;
  const PlanPtr tuned = prepared();
  EXPECT_THAT(autotune_of(tuned)["why"].get<std::string>(), HasSubstr("the fastest of "));
  fake_->capturing = true;
  fake_->events_recorded = 0;
  EXPECT_EQ(autotune_of(prepared())["config"], autotune_of(tuned)["config"]);
  EXPECT_EQ(fake_->events_recorded, 0);
  EXPECT_FALSE(fake_->capture_broken);
}

// The same driver with a call that the sm90 family serves: bfloat16, in the buffers of the float32 one.
class CudaSm90 : public CudaApi {
 protected:
  void SetUp() override {
    CudaApi::SetUp();
    if (IsSkipped()) return;
    fake_->parameter_bytes = sizeof(sm90::ForwardParams);
    for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o}) tensor->dl.dtype = {kDLBfloat, 16, 1};
    p_.attention.row_max = nullptr;
  }
  // The parameters of the last launch; alignment is the launch's own.
  sm90::ForwardParams last_sm90_params() {
    sm90::ForwardParams params = {};
    if (!fake_->launches.empty()) std::memcpy(&params, fake_->launches.back().parameters.data(), sizeof(params));
    return params;
  }
  // What the map was encoded from.
  const FakeCuda::TensorMap& encoded(const sm90::TensorMap& map) { return fake_->maps.at(map.opaque[0]); }
  Json kernel(const PlanPtr& plan) { return Json::parse(attnjit_plan_description(plan.get()))["kernels"][0]; }

  // The call is another backend's, and a wish for this one is refused with `reason`. No other may be left that serves.
  void expect_refused(const char* reason, attnjit_backend other = ATTNJIT_BACKEND_SM80) {
    SCOPED_TRACE(reason);
    const PlanPtr plan = prepared();
    if (no_compiler_) GTEST_SKIP() << attnjit_last_error();
    ASSERT_TRUE(plan);
    EXPECT_EQ(attnjit_plan_backend(plan.get()), other);
    p_.attention.backend = ATTNJIT_BACKEND_SM90;
    attnjit_plan* none = nullptr;
    EXPECT_EQ(attnjit_prepare(context_.get(), &p_.attention, &none), ATTNJIT_UNSUPPORTED);
    EXPECT_THAT(attnjit_last_error(), HasSubstr(std::string("sm90: ") + reason + "; sm80: not asked for"));
    p_.attention.backend = ATTNJIT_BACKEND_AUTO;
  }
};

TEST_F(CudaSm90, Launch) {
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_SM90);
  EXPECT_EQ(attnjit_plan_workspace_size(plan.get()), 0u);
  EXPECT_EQ(fake_->launched, 0) << "prepare launched something";
  EXPECT_TRUE(fake_->maps.empty());
  int stream = 0;
  ASSERT_EQ(run(plan, &stream), ATTNJIT_OK) << attnjit_last_error();
  ASSERT_EQ(fake_->launches.size(), 1u);
  const FakeCuda::Launch& launch = fake_->launches[0];
  EXPECT_EQ(launch.entry, "attnjit_forward");
  EXPECT_EQ(launch.stream, &stream);
  const Json description = kernel(plan);
  EXPECT_EQ(description["arch"], "sm_90a");
  EXPECT_EQ(description["tile"], "64 x 64");
  EXPECT_EQ(description["frozen"], true);
  EXPECT_EQ(launch.shared, description["shared_bytes"].get<unsigned>());
  // A warpgroup that computes and one that loads; fewer tiles than multiprocessors.
  EXPECT_EQ(launch.block, 256u);
  EXPECT_EQ(launch.grid[0], 8u);
  EXPECT_EQ(launch.grid[1], 1u);
  const sm90::ForwardParams params = last_sm90_params();
  EXPECT_EQ(params.m_tiles, 1);
  EXPECT_EQ(params.tiles, 8);
  EXPECT_EQ(params.descriptors_high, sm90::kDescriptorsHigh);
  EXPECT_EQ(params.call.q, p_.q_data.data());
  EXPECT_EQ(params.call.lse, p_.lse_data.data());
  EXPECT_EQ(params.call.row_max, nullptr);
  EXPECT_EQ(params.call.seqlen_kv, 50);
  EXPECT_EQ(params.call.num_heads_kv, 2);

  // Compact tensors: features, sequence, heads, batch; strides in bytes.
  ASSERT_EQ(fake_->maps.size(), 4u);
  const struct {
    const sm90::TensorMap& map;
    const void* data;
    std::uint64_t features, sequence, heads;
    std::uint32_t rows;
  } maps[] = {{params.q, p_.q_data.data(), 16, 40, 4, 64},
              {params.k, p_.k_data.data(), 16, 50, 2, 64},
              {params.v, p_.v_data.data(), 24, 50, 2, 64},
              {params.o, p_.o_data.data(), 24, 40, 4, 64}};
  for (const auto& [map, data, features, sequence, heads, rows] : maps) {
    const FakeCuda::TensorMap& of = encoded(map);
    EXPECT_EQ(of.data, data);
    EXPECT_EQ(of.type, 9);
    EXPECT_THAT(of.extents, ElementsAre(features, sequence, heads, 2));
    EXPECT_THAT(of.strides, ElementsAre(2 * features, 2 * features * sequence, 2 * features * sequence * heads));
    EXPECT_THAT(of.box, ElementsAre(64, rows, 1, 1));
  }
  EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
}

// The first call's maps serve all with its strides, and each call has its own addresses and strides.
TEST_F(CudaSm90, MapsOfLaterCalls) {
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  const sm90::ForwardParams first = last_sm90_params();
  ASSERT_EQ(fake_->maps.size(), 4u);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->maps.size(), 4u) << "the same call asks the driver for maps again";
  EXPECT_EQ(encoded(last_sm90_params().v).data, p_.v_data.data());

  p_.q.dl.byte_offset = 32;
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->maps.size(), 5u);
  const FakeCuda::TensorMap& moved = encoded(last_sm90_params().q);
  EXPECT_TRUE(moved.moved);
  EXPECT_EQ(moved.data, p_.q_data.data() + 8);
  EXPECT_EQ(moved.strides, encoded(first.q).strides);

  p_.q.dl.byte_offset = 0;
  p_.k.strides = {50 * 24 * 2, 50 * 24, 24, 1};
  p_.k.sync();
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
    EXPECT_EQ(fake_->maps.size(), 6u + static_cast<std::size_t>(i));
    EXPECT_EQ(encoded(last_sm90_params().q).data, p_.q_data.data());
    const FakeCuda::TensorMap& other = encoded(last_sm90_params().k);
    EXPECT_FALSE(other.moved);
    EXPECT_THAT(other.strides, testing::ElementsAre(48, 2400, 4800));
  }
  p_.k.strides.clear();
  p_.k.sync();
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->maps.size(), 7u);
  EXPECT_EQ(encoded(last_sm90_params().k).strides, encoded(first.k).strides);
}

// One block per multiprocessor where there are more tiles than those; no larger tiles where there are no more queries.
TEST_F(CudaSm90, MoreTilesThanMultiprocessors) {
  fake_->sms = 5;
  for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o}) tensor->dl.dtype = {kDLFloat, 16, 1};
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(kernel(plan)["tile"], "64 x 64");
  EXPECT_EQ(fake_->launches.at(0).block, 256u);
  EXPECT_EQ(fake_->launches.at(0).grid[0], 5u);
  EXPECT_EQ(last_sm90_params().tiles, 8);
  EXPECT_EQ(encoded(last_sm90_params().q).type, 6);
  EXPECT_EQ(encoded(last_sm90_params().k).box[1], 64u);
}

TEST_F(CudaSm90, NoMoreMultiprocessorsThanAskedFor) {
  setenv("ATTNJIT_CUDA_MAX_SMS", "3", 1);
  context_ = create();
  unsetenv("ATTNJIT_CUDA_MAX_SMS");
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->launches.at(0).grid[0], 3u);
  EXPECT_EQ(last_sm90_params().tiles, 8);
}

TEST_F(CudaSm90, Strides) {
  // (batch, sequence, heads, feature) with a gap behind each row of k; a v of one head, whose stride is any.
  p_.q.strides = {40 * 4 * 16, 16, 4 * 16, 1};
  p_.q.sync();
  p_.k.shape[1] = p_.v.shape[1] = 1;
  p_.k.strides = {50 * 24, 50 * 24, 24, 1};
  p_.v.strides = {50 * 24, 3, 24, 1};
  p_.k.sync();
  p_.v.sync();
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_SM90);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  const sm90::ForwardParams params = last_sm90_params();
  EXPECT_THAT(encoded(params.q).strides, ElementsAre(128, 32, 5120));
  EXPECT_EQ(encoded(params.k).strides[0], 48u);
  EXPECT_EQ(encoded(params.k).strides[2], 2400u);
  EXPECT_THAT(encoded(params.v).extents, ElementsAre(24, 50, 1, 2));
  EXPECT_EQ(encoded(params.v).strides[1] % 16, 0u);
  // Rows that come closer than 16 bytes are refused before anything is encoded.
  p_.k.strides[2] = 20;
  EXPECT_EQ(run(plan), ATTNJIT_INVALID_ARGUMENT);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("k has rows aligned to 8 bytes"));
}

TEST_F(CudaSm90, WhatItLeavesToOthers) {
  {
    fake_->major = 8;
    context_ = create();
    expect_refused("it needs compute capability 9.0, and not sm_80");
    fake_->major = 10;
    context_ = create();
    expect_refused("it needs compute capability 9.0, and not sm_100");
    fake_->major = 9;
    context_ = create();
  }
  for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o}) tensor->dl.dtype = kF32;
  expect_refused("it takes float16 and bfloat16, and not float32");
  for (Tensor* tensor : {&p_.q, &p_.k, &p_.v, &p_.o}) tensor->dl.dtype = {kDLBfloat, 16, 1};

  p_.v.shape[3] = p_.o.shape[3] = 20;
  expect_refused("it takes head dims that are multiples of 8, and not 16 and 20");
  p_.v.shape[3] = p_.o.shape[3] = 24;

  p_.v.strides = {2 * 50 * 28, 50 * 28, 28, 1};
  p_.v.sync();
  expect_refused("it needs rows aligned to 16 bytes, and v's are to 8");
  p_.v.strides.clear();
  p_.v.sync();
  p_.o.dl.byte_offset = 4;
  expect_refused("it needs rows aligned to 16 bytes, and o's are to 4");
  p_.o.dl.byte_offset = 0;

  p_.k.strides = {50 * 16, 0, 16, 1};
  p_.k.sync();
  expect_refused("k is broadcast over its heads");
  p_.k.strides = {std::int64_t{1} << 39, 50 * 16, 16, 1};
  expect_refused("the strides of k reach 2^40 bytes");
  p_.k.strides.clear();
  p_.k.sync();

  p_.k.shape[2] = p_.v.shape[2] = 0;
  expect_refused("there are no keys");
}

TEST_F(CudaSm90, NeedsTensorMapsOfTheDriver) {
  FakeCuda* const old = fake_cuda(ATTNJIT_FAKE_CUDA_11);
  ASSERT_NE(old, nullptr);
  old->reset();
  context_ = create(ATTNJIT_FAKE_CUDA_11);
  expect_refused("it needs a driver of CUDA 12 or later");
}

TEST_F(CudaSm90, RefusesABackward) {
  GradientProblem g;
  for (Tensor* tensor : {&g.q, &g.k, &g.v, &g.o, &g.grad_out, &g.dq, &g.dk, &g.dv}) {
    tensor->dl.dtype = {kDLBfloat, 16, 1};
    tensor->dl.device = {kDLCUDA, 0};
  }
  g.lse.dl.device = g.grad_lse.dl.device = {kDLCUDA, 0};
  g.attention.row_max = nullptr;
  attnjit_plan* plan = nullptr;
  g.attention.backend = ATTNJIT_BACKEND_SM90;
  EXPECT_EQ(attnjit_prepare_backward(context_.get(), &g.attention, &g.gradients, nullptr, &plan), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("sm90: it computes forwards only; sm80: not asked for"));
  g.attention.backend = ATTNJIT_BACKEND_AUTO;
  const attnjit_status status = attnjit_prepare_backward(context_.get(), &g.attention, &g.gradients, nullptr, &plan);
  if (status == ATTNJIT_ENVIRONMENT) GTEST_SKIP() << attnjit_last_error();
  ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(attnjit_plan_backend(PlanPtr(plan).get()), ATTNJIT_BACKEND_SM80);
}

TEST_F(CudaSm90, RunAllocatesNothingAndIsCaptured) {
  int stream = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(run(plan, &stream), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_TRUE(fake_->launches.at(0).captured);
  EXPECT_FALSE(fake_->capture_broken);
  fake_->record = false;
  const long before = allocation_count();
  for (int i = 0; i < 10; ++i) ASSERT_EQ(run(plan, &stream), ATTNJIT_OK);
  if (counts_allocations()) EXPECT_EQ(allocation_count(), before);
  EXPECT_EQ(fake_->launched, 11);
}

TEST_F(CudaSm90, AutotuneWithSummaries) {
  std::vector<std::int32_t> ids(50);
  p_.capture("ids", ids.data(), {50}, {kDLInt, 32, 1}).dl.device = p_.q.dl.device;
  p_.attention.score_mod = "document(ids)";
  p_.attention.max_autotune = 1;
  fake_->parameter_bytes = 0;
  PREPARE_OR_SKIP(plan);
  EXPECT_THAT(kernel(plan)["autotune"]["why"].get<std::string>(), HasSubstr("the fastest of "));
  ASSERT_GE(fake_->launches.size(), 2u);
  for (std::size_t i = 0; i < fake_->launches.size(); ++i) {
    ASSERT_EQ(fake_->launches[i].entry, i % 2 == 0 ? "attnjit_summarize" : "attnjit_forward");
  }
}

TEST_F(CudaApi, Summaries) {
  std::vector<std::int32_t> ids(100);
  p_.capture("ids", ids.data(), {2, 50}, {kDLInt, 32, 1}).dl.device = p_.q.dl.device;
  p_.attention.mask_mod = "ids[b, q_idx] == ids[b, kv_idx]";
  p_.attention.backend = ATTNJIT_BACKEND_SM80;
  fake_->parameter_bytes_of["attnjit_summarize"] = sizeof(cuda::SummaryParams);
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_SM80);
  ASSERT_EQ(attnjit_plan_workspace_size(plan.get()), 512u);
  alignas(256) char workspace[512];
  ASSERT_EQ(attnjit_run(plan.get(), &p_.attention, workspace, sizeof workspace, nullptr), ATTNJIT_OK)
      << attnjit_last_error();
  ASSERT_EQ(fake_->launches.size(), 2u);
  EXPECT_EQ(fake_->launches[0].entry, "attnjit_summarize");
  EXPECT_EQ(fake_->launches[1].entry, "attnjit_forward");
  const ForwardParams params = last_params();
  EXPECT_EQ(params.captured[0].data, ids.data());
  EXPECT_EQ(params.captured[1].data, workspace);
  EXPECT_EQ(params.captured[1].extent[1], 4);
}

// A kernel of its own fills tables in the workspace before the forward, which finds them behind its captures.
TEST_F(CudaSm90, Summaries) {
  constexpr DLDataType kInt32 = {kDLInt, 32, 1};
  std::vector<std::int32_t> ids(100);
  p_.capture("ids", ids.data(), {2, 50}, kInt32).dl.device = p_.q.dl.device;
  p_.attention.mask_mod = "ids[b, q_idx] == ids[b, kv_idx]";
  fake_->parameter_bytes_of["attnjit_summarize"] = sizeof(cuda::SummaryParams);
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_SM90);
  const Json kernels = Json::parse(attnjit_plan_description(plan.get()))["kernels"];
  ASSERT_EQ(kernels.size(), 2u);
  EXPECT_EQ(kernels[1]["entry"], "attnjit_summarize");
  // (2, 4, 2 levels, 2 blocks) of int32, and a counter.
  ASSERT_EQ(attnjit_plan_workspace_size(plan.get()), 512u);
  alignas(256) char workspace[512];
  int stream = 0;
  EXPECT_EQ(run(plan, &stream), ATTNJIT_INVALID_ARGUMENT);
  ASSERT_EQ(attnjit_run(plan.get(), &p_.attention, workspace, sizeof workspace, &stream), ATTNJIT_OK)
      << attnjit_last_error();
  ASSERT_EQ(fake_->launches.size(), 2u);
  const FakeCuda::Launch& launch = fake_->launches[0];
  EXPECT_EQ(launch.entry, "attnjit_summarize");
  EXPECT_EQ(launch.stream, &stream);
  EXPECT_EQ(launch.grid[0], 2u);
  EXPECT_EQ(launch.block, static_cast<unsigned>(cuda::kSummaryThreads));
  cuda::SummaryParams tables;
  std::memcpy(&tables, launch.parameters.data(), sizeof tables);
  ASSERT_EQ(tables.count, 1);
  EXPECT_EQ(tables.counter, reinterpret_cast<int*>(workspace + 256));
  const cuda::SummaryTable& table = tables.tables[0];
  EXPECT_EQ(table.data, ids.data());
  EXPECT_EQ(table.table, workspace);
  EXPECT_EQ(table.type, cuda::SummaryType::kInt32);
  EXPECT_EQ(table.stride, 1);
  EXPECT_EQ(table.row_stride[1], 50);
  EXPECT_EQ(table.inner, 2);
  EXPECT_EQ(table.extent, 50);
  EXPECT_EQ(table.blocks, 2);
  EXPECT_EQ(table.levels, 2);
  EXPECT_EQ(fake_->launches[1].entry, "attnjit_forward");
  EXPECT_EQ(fake_->launches[1].stream, &stream);
  const sm90::ForwardParams params = last_sm90_params();
  EXPECT_EQ(params.schedule, nullptr);
  EXPECT_EQ(params.counter, tables.counter);
  EXPECT_EQ(params.call.captured[0].data, ids.data());
  const cuda::CapturedView& view = params.call.captured[1];
  EXPECT_EQ(view.data, workspace);
  EXPECT_THAT(view.extent, ElementsAre(2, 4, 2, 2, 1));
  EXPECT_THAT(view.stride, ElementsAre(16, 4, 2, 1, 0));
}

TEST_F(CudaSm90, RunFailures) {
  PREPARE_OR_SKIP(plan);
  for (const char* function :
       {"cuTensorMapEncodeTiled", "cuLaunchKernel", "cuTensorMapReplaceAddress", "cuCtxPushCurrent"}) {
    p_.q.dl.byte_offset = function == std::string_view("cuTensorMapReplaceAddress") ? 32 : 0;
    fake_->failing = {{function, 1}};
    EXPECT_EQ(run(plan), ATTNJIT_ENVIRONMENT);
    EXPECT_THAT(attnjit_last_error(), HasSubstr(std::string(function) + " failed: CUDA_ERROR_INVALID_VALUE"));
    EXPECT_EQ(fake_->launched, 0);
    EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
  }
}

// A plan of smaller strides names the tensor; the call that prepares anew is another backend's.
TEST_F(CudaSm90, RunOfFarStrides) {
  PREPARE_OR_SKIP(plan);
  ASSERT_EQ(attnjit_plan_backend(plan.get()), ATTNJIT_BACKEND_SM90);
  const std::pair<const char*, Tensor*> tensors[] = {{"q", &p_.q}, {"k", &p_.k}, {"v", &p_.v}, {"o", &p_.o}};
  for (const auto& [name, tensor] : tensors) {
    const std::int64_t rows = tensor->shape[2], dim = tensor->shape[3];
    tensor->strides = {(std::int64_t{1} << 39) - 8, rows * dim, dim, 1};
    tensor->sync();
    EXPECT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
    tensor->strides[0] = std::int64_t{1} << 39;
    const int launched = fake_->launched;
    EXPECT_EQ(run(plan), ATTNJIT_INVALID_ARGUMENT);
    EXPECT_EQ(attnjit_last_error(), std::string("the strides of ") + name +
                                        " reach 2^40 bytes, and did not when the plan was prepared; prepare again");
    EXPECT_EQ(fake_->launched, launched);
    const PlanPtr other = prepared();
    ASSERT_TRUE(other) << attnjit_last_error();
    EXPECT_EQ(attnjit_plan_backend(other.get()), ATTNJIT_BACKEND_SM80);
    tensor->strides.clear();
    tensor->sync();
  }
  EXPECT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
}

// What sm80 serves it serves of any plan.
TEST_F(CudaApi, RunOfFarStrides) {
  p_.attention.backend = ATTNJIT_BACKEND_SM80;
  PREPARE_OR_SKIP(plan);
  const std::int64_t rows = p_.k.shape[2], dim = p_.k.shape[3];
  p_.k.strides = {std::int64_t{1} << 39, rows * dim, dim, 1};
  p_.k.sync();
  EXPECT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
}

TEST_F(CudaSm90, RowMaximum) {
  p_.attention.row_max = &p_.row_max.dl;
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(kernel(plan)["frozen"], false);
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(last_sm90_params().call.row_max, p_.row_max_data.data());
}

TEST_F(CudaSm90, Autotune) {
  p_.attention.max_autotune = 1;
  fake_->kernel_ms = by_shared_memory;
  PREPARE_OR_SKIP(plan);
  const Json tuned = kernel(plan)["autotune"];
  EXPECT_GE(tuned["candidates"].size(), 3u) << tuned;
  EXPECT_THAT(tuned["why"].get<std::string>(), HasSubstr("the fastest of "));
  double fastest = 1e9;
  for (const Json& candidate : tuned["candidates"]) fastest = std::min(fastest, candidate.value("ms", 1e9));
  EXPECT_NEAR(fastest, 1e-6 * kernel(plan)["shared_bytes"].get<double>(), 1e-5) << "the plan's kernel is another";
  ASSERT_EQ(run(plan), ATTNJIT_OK) << attnjit_last_error();
  EXPECT_EQ(fake_->launches.back().shared, kernel(plan)["shared_bytes"].get<unsigned>());
}

// Without a device it is compiled for sm_90a whichever of both is asked for.
TEST_F(CudaSm90, Explain) {
  context_ = create("libno_such_driver.so.1");
  GradientProblem g;  // on the CPU
  for (Tensor* tensor : {&g.q, &g.k, &g.v, &g.o, &g.grad_out, &g.dq, &g.dk, &g.dv}) {
    tensor->dl.dtype = {kDLBfloat, 16, 1};
  }
  g.attention.mask_mod = "causal";
  g.attention.o = nullptr;
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  const auto explain = [&](const char* arch) {
    options.arch = arch;
    char* text = nullptr;
    const attnjit_status status = attnjit_explain(context_.get(), &g.attention, &options, &text);
    Json json = status == ATTNJIT_OK ? Json::parse(text) : Json();
    attnjit_free(text);
    return json;
  };
  const Json json = explain("sm_90");
  if (json.is_null() && std::string(attnjit_last_error()).find("NVRTC") != std::string::npos) {
    GTEST_SKIP() << attnjit_last_error();
  }
  ASSERT_FALSE(json.is_null()) << attnjit_last_error();
  EXPECT_EQ(json["backend"], "sm90");
  EXPECT_FALSE(json.contains("unsupported"));
  ASSERT_GE(json["kernels"].size(), 2u);
  EXPECT_EQ(json["kernels"][0]["arch"], "sm_90a");
  EXPECT_EQ(json["kernels"][1]["backend"], "sm80");
  EXPECT_EQ(explain("sm_90a")["kernels"][0]["key"], json["kernels"][0]["key"]);
  const Json ampere = explain("sm_80");
  EXPECT_EQ(ampere["backend"], "sm80");
  EXPECT_EQ(ampere["unsupported"], Json::parse(R"([{"backend": "sm90",
      "reason": "it needs compute capability 9.0, and not sm_80"}])"));
  for (const Json& of : {json, ampere}) {
    const Json& tiles = of["tiles"];
    EXPECT_EQ(std::to_string(tiles["queries"].get<int>()) + " x " + std::to_string(tiles["keys"].get<int>()),
              of["kernels"][0]["tile"].get<std::string>());
  }

  // What the folded form makes of a mod, and what follows from it: of this family only.
  EXPECT_FALSE(ampere["facts"].contains("drifts"));
  g.attention.row_max = nullptr;
  g.attention.backend = ATTNJIT_BACKEND_SM90;
  const auto folded = [&](const char* score_mod) {
    g.attention.score_mod = score_mod;
    const Json of = explain("sm_90");
    Json facts;
    for (const char* const name : {"has_shift", "additive", "linear", "drifts"}) facts.push_back(of["facts"][name]);
    facts.push_back(of["kernels"][0]["frozen"]);
    return facts;
  };
  EXPECT_EQ(folded("score - 0.5 * (q_idx - kv_idx) + h"), Json({true, true, true, false, true}));
  EXPECT_EQ(folded("score - abs(q_idx - kv_idx)"), Json({false, true, false, true, false}));
  EXPECT_EQ(folded("softcap(30) + q_idx"), Json({true, false, false, false, true}));
  g.attention.backend = ATTNJIT_BACKEND_AUTO;

  options.gradients = &g.gradients;
  const Json backward = explain("sm_90");
  EXPECT_EQ(backward["backend"], "sm80");
  EXPECT_EQ(backward["unsupported"][0]["reason"], "it computes forwards only");
}

// The same driver with a backward of a call with a captured table, whose gradient is wanted.
class CudaBackward : public CudaApi {
 protected:
  void SetUp() override {
    CudaApi::SetUp();
    if (IsSkipped()) return;
    fake_->parameter_bytes = 0;
    g_.attention.score_mod = "score + table[h]";
    g_.capture("table", table_, {4});
    g_.gradient("table", of_table_, {4});
    for (Tensor* tensor : {&g_.q, &g_.k, &g_.v, &g_.o, &g_.lse, &g_.grad_out, &g_.grad_lse, &g_.dq, &g_.dk, &g_.dv,
                           g_.captured[0].get(), g_.capture_gradients[0].get()}) {
      tensor->dl.device = {kDLCUDA, 0};
    }
    g_.attention.row_max = nullptr;
  }
  // Skips, visibly, where there is no NVRTC.
  PlanPtr prepared_backward() {
    attnjit_plan* plan = nullptr;
    const attnjit_status status =
        attnjit_prepare_backward(context_.get(), &g_.attention, &g_.gradients, nullptr, &plan);
    no_compiler_ =
        status == ATTNJIT_ENVIRONMENT && std::string(attnjit_last_error()).find("NVRTC") != std::string::npos;
    if (!no_compiler_) EXPECT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
    return PlanPtr(plan);
  }
  attnjit_status run_backward(const PlanPtr& plan, void* stream = nullptr) {
    memory_.resize(attnjit_plan_workspace_size(plan.get()) + 256);
    void* const workspace = memory_.data() + (256 - reinterpret_cast<std::uintptr_t>(memory_.data()) % 256);
    return attnjit_run_backward(plan.get(), &g_.attention, &g_.gradients, workspace, memory_.size() - 256, stream);
  }

  float table_[4] = {}, of_table_[4] = {};
  std::vector<char> memory_;
  GradientProblem g_;
};

#define PREPARE_BACKWARD_OR_SKIP(plan)                    \
  const PlanPtr plan = prepared_backward();               \
  if (no_compiler_) GTEST_SKIP() << attnjit_last_error(); \
  ASSERT_TRUE(plan)

class CudaBackwardOf : public CudaBackward, public testing::WithParamInterface<attnjit_backend> {
 protected:
  void SetUp() override {
    CudaBackward::SetUp();
    g_.attention.backend = GetParam();
  }
};
INSTANTIATE_TEST_SUITE_P(Backends, CudaBackwardOf, testing::Values(ATTNJIT_BACKEND_MATH, ATTNJIT_BACKEND_SM80),
                         [](const auto& backend) { return attnjit_backend_name(backend.param); });

// Everything is queued on the stream, becomes part of its capture, and costs no allocation.
TEST_P(CudaBackwardOf, RunsAndIsCaptured) {
  int stream = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  {
    PREPARE_BACKWARD_OR_SKIP(plan);
    EXPECT_EQ(attnjit_plan_backend(plan.get()), GetParam());
    EXPECT_EQ(fake_->launched, 0) << "prepare launched something";
    ASSERT_EQ(run_backward(plan, &stream), ATTNJIT_OK) << attnjit_last_error();
    ASSERT_GE(fake_->launches.size(), 2u);
    for (const FakeCuda::Launch& launch : fake_->launches) {
      EXPECT_EQ(launch.stream, &stream) << launch.entry;
      EXPECT_TRUE(launch.captured) << launch.entry;
    }
    EXPECT_FALSE(fake_->capture_broken);
    EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
    const Json json = Json::parse(attnjit_plan_description(plan.get()));
    EXPECT_EQ(json["gradients"]["captures"], Json({"table"}));
    EXPECT_GE(json["kernels"].size(), 4u) << json;
    EXPECT_EQ(json["kernels"].back()["entry"], "attnjit_finish_gradient");

    fake_->record = false;
    ASSERT_EQ(run_backward(plan, &stream), ATTNJIT_OK);
    if (counts_allocations()) {
      const long before = allocation_count();
      for (int i = 0; i < 3; ++i) ASSERT_EQ(run_backward(plan, &stream), ATTNJIT_OK);
      EXPECT_EQ(allocation_count(), before);
    }
    fake_->failing = {{"cuLaunchKernel", 400}};
    EXPECT_EQ(run_backward(plan, &stream), ATTNJIT_ENVIRONMENT);
    EXPECT_THAT(attnjit_last_error(), HasSubstr("cuLaunchKernel failed: CUDA_ERROR_INVALID_HANDLE"));
    fake_->failing.clear();
    EXPECT_EQ(fake_cuda_current(kDriver), 0) << "a context was left current";
  }
  context_.reset();
  EXPECT_FALSE(fake_->capture_broken);
  EXPECT_EQ(fake_->unbalanced_pops, 0);
}

TEST_P(CudaBackwardOf, CompilesTogetherWithTheForward) {
  // Each load waits for the other's: both are under way at once.
  std::mutex mutex;
  std::condition_variable changed;
  std::set<std::thread::id> loading;
  bool met = false;
  fake_->before_load = [&] {
    std::unique_lock lock(mutex);
    loading.insert(std::this_thread::get_id());
    met = met || loading.size() == 2;
    changed.notify_all();
    changed.wait_for(lock, std::chrono::seconds(60), [&] { return met; });
    met = true;  // whoever waited in vain does so once
  };
  attnjit_plan *forward = nullptr, *backward = nullptr;
  const attnjit_status status =
      attnjit_prepare_backward(context_.get(), &g_.attention, &g_.gradients, &forward, &backward);
  fake_->before_load = nullptr;
  if (status == ATTNJIT_ENVIRONMENT) GTEST_SKIP() << attnjit_last_error();
  ASSERT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
  const PlanPtr first(forward), second(backward);
  EXPECT_EQ(loading.size(), 2u) << "one thread compiled both";
  EXPECT_EQ(attnjit_plan_backend(forward), GetParam());
  EXPECT_EQ(attnjit_plan_backend(backward), GetParam());
}

// Tables of captured values stand behind the sums of gradients, and are filled before the main kernel, where there is
// something to walk over.
TEST_F(CudaBackward, Summaries) {
  g_.attention.backend = ATTNJIT_BACKEND_SM80;
  const std::int64_t length = g_.q.shape[2];
  std::vector<std::int32_t> ids(static_cast<std::size_t>(length));
  g_.capture("ids", ids.data(), {length}, {kDLInt, 32, 1}).dl.device = g_.q.dl.device;
  g_.attention.mask_mod = "ids[q_idx] >= kv_idx";
  fake_->parameter_bytes_of["attnjit_summarize"] = sizeof(cuda::SummaryParams);
  fake_->parameter_bytes_of["attnjit_backward"] = sizeof(cuda::BackwardParams);
  PREPARE_BACKWARD_OR_SKIP(plan);
  EXPECT_EQ(Json::parse(attnjit_plan_description(plan.get()))["kernels"].back()["entry"], "attnjit_summarize");
  ASSERT_EQ(run_backward(plan), ATTNJIT_OK) << attnjit_last_error();
  std::vector<std::string> entries;
  cuda::SummaryParams tables = {};
  cuda::BackwardParams params = {};
  for (const FakeCuda::Launch& launch : fake_->launches) {
    entries.push_back(launch.entry);
    if (launch.entry == "attnjit_summarize") std::memcpy(&tables, launch.parameters.data(), sizeof tables);
    if (launch.entry == "attnjit_backward") std::memcpy(&params, launch.parameters.data(), sizeof params);
  }
  EXPECT_THAT(entries, ElementsAre("attnjit_summarize", "attnjit_backward_rows", "attnjit_backward",
                                   "attnjit_backward_dq", "attnjit_finish_gradient"));
  ASSERT_EQ(tables.count, 1);
  EXPECT_EQ(tables.tables[0].data, ids.data());
  EXPECT_EQ(params.captured[2].data, tables.tables[0].table);
  const char* const sums =
      static_cast<const char*>(params.gradients[0].data ? params.gradients[0].data : params.gradients[1].data);
  EXPECT_GE(static_cast<const char*>(tables.tables[0].table), sums + sizeof of_table_);
  EXPECT_LE(static_cast<const char*>(tables.tables[0].table), memory_.data() + memory_.size() - 256);

  fake_->launches.clear();
  for (Tensor* tensor : {&g_.k, &g_.v, &g_.dk, &g_.dv}) tensor->shape[2] = 0;
  PREPARE_BACKWARD_OR_SKIP(without_keys);
  ASSERT_EQ(run_backward(without_keys), ATTNJIT_OK) << attnjit_last_error();
  for (const FakeCuda::Launch& launch : fake_->launches) EXPECT_NE(launch.entry, "attnjit_summarize");
}

TEST_P(CudaBackwardOf, EmptyProblems) {
  for (const bool keys : {false, true}) {
    SCOPED_TRACE(keys ? "no queries" : "no keys");
    for (Tensor* tensor : {&g_.q, &g_.o, &g_.lse, &g_.grad_out, &g_.grad_lse, &g_.dq}) tensor->shape[2] = keys ? 0 : 40;
    for (Tensor* tensor : {&g_.k, &g_.v, &g_.dk, &g_.dv}) tensor->shape[2] = keys ? 50 : 0;
    PREPARE_BACKWARD_OR_SKIP(plan);
    ASSERT_EQ(run_backward(plan), ATTNJIT_OK) << attnjit_last_error();
    for (const FakeCuda::Launch& launch : fake_->launches) {
      EXPECT_GT(launch.grid[0] * launch.grid[1] * launch.grid[2], 0u) << launch.entry << ": a GPU refuses such a grid";
    }
  }
}

// The gradient of what shifts whole rows is summed by the kernel before the main one.
TEST_F(CudaBackward, RowShiftsAloneNeedNoTiles) {
  g_.attention.backend = ATTNJIT_BACKEND_SM80;
  g_.gradients.dq = g_.gradients.dk = g_.gradients.dv = nullptr;
  const auto launched = [&](const PlanPtr& plan) {
    fake_->launches.clear();
    EXPECT_EQ(run_backward(plan), ATTNJIT_OK) << attnjit_last_error();
    std::vector<std::string> entries;
    for (const FakeCuda::Launch& launch : fake_->launches) entries.push_back(launch.entry);
    std::vector<std::string> described;
    const Json json = Json::parse(attnjit_plan_description(plan.get()));
    for (const Json& kernel : json["kernels"]) described.push_back(kernel["entry"]);
    EXPECT_EQ(described, entries);
    return entries;
  };
  PREPARE_BACKWARD_OR_SKIP(plan);
  EXPECT_EQ(launched(plan), (std::vector<std::string>{"attnjit_backward_rows", "attnjit_finish_gradient"}));
  // Of a part of the keys it is a sum as any other.
  g_.gradients.partial_keys = 1;
  const PlanPtr partial = prepared_backward();
  ASSERT_TRUE(partial);
  EXPECT_EQ(launched(partial),
            (std::vector<std::string>{"attnjit_backward_rows", "attnjit_backward", "attnjit_finish_gradient"}));
}

TEST_F(CudaBackward, RefusesToCompileDuringACapture) {
  int stream = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  ASSERT_EQ(attnjit_backward(context_.get(), &g_.attention, &g_.gradients, nullptr, 0, &stream), ATTNJIT_NOT_PREPARED);
  EXPECT_THAT(attnjit_last_error(),
              AllOf(HasSubstr("float32 backward is not compiled yet"), HasSubstr("its stream is being captured"),
                    HasSubstr("call attnjit_prepare_backward, or attnjit_backward once")));
  EXPECT_EQ(fake_->modules_loaded, 0);
  EXPECT_FALSE(fake_->capture_broken);
  PREPARE_BACKWARD_OR_SKIP(plan);
  std::vector<char> memory(attnjit_plan_workspace_size(plan.get()) + 256);
  void* const workspace = memory.data() + (256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256);
  ASSERT_EQ(attnjit_backward(context_.get(), &g_.attention, &g_.gradients, workspace, memory.size() - 256, &stream),
            ATTNJIT_OK)
      << attnjit_last_error();
  EXPECT_TRUE(fake_->launches.back().captured);
  EXPECT_FALSE(fake_->capture_broken);
}

TEST_F(CudaBackward, Alignment) {
  PREPARE_BACKWARD_OR_SKIP(plan);
  const struct {
    Tensor& tensor;
    const char* name;
  } tensors[] = {{g_.q, "q"},   {g_.k, "k"},   {g_.v, "v"},  {g_.o, "o"}, {g_.grad_out, "grad_out"},
                 {g_.dq, "dq"}, {g_.dk, "dk"}, {g_.dv, "dv"}};
  // Within its buffer, and apart from the others: one row less.
  for (const auto& [tensor, name] : tensors) {
    tensor.dl.byte_offset = 4;
    EXPECT_EQ(run_backward(plan), ATTNJIT_INVALID_ARGUMENT) << name;
    EXPECT_THAT(attnjit_last_error(), HasSubstr(std::string(name) + " has rows aligned to 4 bytes, by its address and "
                                                                    "strides; the plan was prepared for 16"));
    // A plan that is prepared so takes it.
    const PlanPtr unaligned = prepared_backward();
    ASSERT_TRUE(unaligned);
    EXPECT_EQ(run_backward(unaligned), ATTNJIT_OK) << attnjit_last_error();
    tensor.dl.byte_offset = 0;
    EXPECT_EQ(run_backward(unaligned), ATTNJIT_OK) << attnjit_last_error();
  }
  // What is not wanted does not count; neither do lse, grad_lse and captured gradients, which are read by element.
  g_.gradients.dq = nullptr;
  const PlanPtr without = prepared_backward();
  ASSERT_TRUE(without);
  g_.grad_lse.dl.byte_offset = 4;
  EXPECT_EQ(run_backward(without), ATTNJIT_OK) << attnjit_last_error();
}

// Every kernel of a backward, so that all are on disk before a process with the GPU comes.
TEST_F(CudaApi, ExplainListsABackwardsKernels) {
  context_ = create("libno_such_driver.so.1");
  GradientProblem g;  // on the CPU
  float table[4] = {}, of_table[4] = {};
  g.attention.score_mod = "score + table[h]";
  g.capture("table", table, {4});
  g.gradient("table", of_table, {4});
  g.attention.backend = ATTNJIT_BACKEND_SM80;
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.arch = "sm_86";
  options.gradients = &g.gradients;
  char* text = nullptr;
  if (attnjit_explain(context_.get(), &g.attention, &options, &text) != ATTNJIT_OK) {
    ASSERT_THAT(attnjit_last_error(), HasSubstr("NVRTC"));
    GTEST_SKIP() << attnjit_last_error();
  }
  const Json json = Json::parse(text);
  attnjit_free(text);
  std::vector<std::string> entries;
  for (const Json& kernel : json["kernels"]) entries.push_back(kernel["entry"]);
  EXPECT_EQ(entries, (std::vector<std::string>{"attnjit_backward_rows", "attnjit_backward", "attnjit_backward_dq",
                                               "attnjit_finish_gradient"}));
}

TEST_F(CudaApi, ExplainNeedsNoDevice) {
  context_ = create("libno_such_driver.so.1");
  Problem p;  // on the CPU
  p.attention.score_mod = "softcap(20)";
  p.attention.mask_mod = "causal";
  p.attention.o = nullptr;
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.arch = "sm_86";
  char* text = nullptr;
  const auto explain = [&] {
    const attnjit_status status = attnjit_explain(context_.get(), &p.attention, &options, &text);
    Json json = status == ATTNJIT_OK ? Json::parse(text) : Json();
    attnjit_free(text);
    return json;
  };
  const Json json = explain();
  if (json.is_null() && std::string(attnjit_last_error()).find("NVRTC") != std::string::npos) {
    GTEST_SKIP() << attnjit_last_error();
  }
  ASSERT_FALSE(json.is_null()) << attnjit_last_error();
  EXPECT_EQ(json["arch"], "sm_86");
  EXPECT_EQ(json["backend"], "sm80");
  // Of the eager path too: whatever may be asked for is there.
  EXPECT_EQ(json["kernels"].size(), 5u);
  EXPECT_EQ(json["kernels"][1]["backend"], "math");
  EXPECT_EQ(json["facts"]["has_mask"], true);
  const Json& kernel = json["kernels"][0];
  EXPECT_EQ(kernel["entry"], "attnjit_forward");
  EXPECT_EQ(kernel["origin"], "compiled");
  EXPECT_EQ(kernel["spill_store_bytes"], 0);
  EXPECT_GT(kernel["registers"], 16);
  EXPECT_LE(kernel["shared_bytes"], 99 * 1024);
  EXPECT_FALSE(json.contains("cuda"));
  // It is on disk now, for whoever runs it.
  context_ = create();
  EXPECT_EQ(explain()["kernels"][0]["origin"], "disk");
  fake_->minor = 6;
  fake_->major = 8;
  p_.attention.score_mod = p.attention.score_mod;
  p_.attention.mask_mod = p.attention.mask_mod;
  PREPARE_OR_SKIP(plan);
  EXPECT_EQ(Json::parse(attnjit_plan_description(plan.get()))["kernels"][0]["key"], kernel["key"]);
  options.dump = 1;
  const Json dumped = explain();
  EXPECT_THAT(dumped["mlir"].get<std::string>(), HasSubstr("func"));
  EXPECT_THAT(dumped["cuda"].get<std::string>(), HasSubstr("attnjit_forward"));
  EXPECT_THAT(dumped["ptx"].get<std::string>(), HasSubstr(".target sm_86"));
  options.arch = "sm_75";
  p.attention.backend = ATTNJIT_BACKEND_SM80;
  EXPECT_EQ(attnjit_explain(context_.get(), &p.attention, &options, &text), ATTNJIT_UNSUPPORTED);
  EXPECT_THAT(attnjit_last_error(), HasSubstr("it needs compute capability 8.0 or later, and not sm_75"));
}

}  // namespace
}  // namespace attnjit::test
