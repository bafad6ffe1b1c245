// The driver's wrapper against a fake libcuda: loading, contexts, captures, launches and every failure.
#include "runtime/cuda_driver.h"

#include <gmock/gmock.h>

#include <array>
#include <cstring>
#include <thread>
#include <vector>

#include "support/fake_cuda/fake_cuda.h"

namespace attnjit::runtime {
namespace {

using test::FakeCuda;
using testing::AllOf;
using testing::HasSubstr;

constexpr const char* kLibrary = ATTNJIT_FAKE_CUDA;

class CudaDriver : public testing::Test {
 protected:
  void SetUp() override {
    fake_ = test::fake_cuda(kLibrary);
    ASSERT_NE(fake_, nullptr);
    fake_->reset();
  }
  std::shared_ptr<CudaDevice> device(int ordinal = 0) {
    Result<std::shared_ptr<CudaDevice>> found = CudaDevice::get(ordinal, kLibrary);
    EXPECT_TRUE(found) << found.failure().message;
    return found ? *found : nullptr;
  }
  std::shared_ptr<const CudaKernel> kernel(const std::shared_ptr<CudaDevice>& device, std::size_t shared = 0) {
    auto loaded = CudaKernel::load(device, "image", "entry", shared);
    EXPECT_TRUE(loaded) << loaded.failure().message;
    return loaded ? *loaded : nullptr;
  }
  void expect_no_kernel(const char* fragment, std::size_t shared = 0) {
    const auto loaded = CudaKernel::load(device(), "image", "entry", shared);
    ASSERT_FALSE(loaded);
    EXPECT_EQ(loaded.failure().status, ATTNJIT_ENVIRONMENT);
    EXPECT_THAT(loaded.failure().message,
                AllOf(HasSubstr("kernel entry does not load on device 0 (sm_90): "), HasSubstr(fragment)));
    EXPECT_EQ(fake_->modules_loaded, fake_->modules_unloaded);
    EXPECT_EQ(test::fake_cuda_current(kLibrary), 0);
  }

  FakeCuda* fake_ = nullptr;
};

TEST_F(CudaDriver, FewerMultiprocessors) {
  const int all = device()->num_sms();
  ASSERT_GT(all, 5);
  const auto few = CudaDevice::get(0, kLibrary, 5), more = CudaDevice::get(0, kLibrary, all + 1);
  ASSERT_TRUE(few && more);
  EXPECT_EQ((*few)->num_sms(), 5);
  EXPECT_EQ((*more)->num_sms(), all);
  EXPECT_EQ(device()->num_sms(), all);
}

TEST_F(CudaDriver, Workbench) {
  fake_->kernel_ms = [](unsigned block, unsigned) { return 0.5f * static_cast<float>(block); };
  const auto gpu = device();
  EXPECT_EQ(gpu->driver_version(), 13000);
  const auto loaded = kernel(gpu);
  {
    auto bench = CudaWorkbench::create(gpu);
    ASSERT_TRUE(bench) << bench.failure().message;
    auto memory = (*bench)->allocate(1000);
    ASSERT_TRUE(memory);
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(*memory) % 256, 0u);
    // The pattern repeats to the last byte.
    const char pattern[] = {1, 2, 3, 4, 5, 6, 7};
    ASSERT_FALSE((*bench)->fill(*memory, 1000, pattern, sizeof(pattern)));
    for (int i = 0; i < 1000; ++i) ASSERT_EQ(static_cast<const char*>(*memory)[i], pattern[i % 7]) << i;
    ASSERT_FALSE((*bench)->fill(*memory, 3, "xyzw", 4));
    EXPECT_EQ(static_cast<const char*>(*memory)[2], 'z');
    EXPECT_EQ(static_cast<const char*>(*memory)[3], 4);

    const int params = 0;
    const auto launch = [&](CudaStream stream) {
      EXPECT_NE(stream, nullptr);
      return loaded->launch({}, 8, &params, stream);
    };
    auto took = (*bench)->milliseconds(launch);
    ASSERT_TRUE(took) << took.failure().message;
    EXPECT_EQ(*took, 4.0);
    took = (*bench)->milliseconds([](CudaStream) { return Failure{ATTNJIT_INTERNAL, "no"}; });
    ASSERT_FALSE(took);
    EXPECT_EQ(took.failure().message, "no");

    // A capture elsewhere goes on.
    int stream = 0;
    fake_->capturing = true, fake_->captured_stream = &stream;
    EXPECT_TRUE((*bench)->allocate(1));
    EXPECT_TRUE((*bench)->milliseconds(launch));
    fake_->failing["cuMemAlloc"] = 2;
    EXPECT_EQ((*bench)->allocate(1).failure().status, ATTNJIT_OUT_OF_MEMORY);
    EXPECT_EQ(fake_->memory_freed, 0);
  }
  EXPECT_FALSE(fake_->capture_broken);
  EXPECT_EQ(fake_->memory_allocated, 2);
  EXPECT_EQ(fake_->memory_freed, 2);
  EXPECT_EQ(test::fake_cuda_current(kLibrary), 0);
  fake_->capturing = false;
  for (const char* function : {"cuStreamCreate", "cuEventCreate", "cuCtxPushCurrent"}) {
    fake_->failing = {{function, 1}};
    EXPECT_FALSE(CudaWorkbench::create(gpu)) << function;
  }
}

TEST_F(CudaDriver, NoLibrary) {
  const auto missing = CudaDevice::get(0, "libno_such_cuda.so.1");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.failure().status, ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(missing.failure().message, AllOf(HasSubstr("no CUDA driver"), HasSubstr("libno_such_cuda.so.1")));
  EXPECT_EQ(CudaDevice::count("libno_such_cuda.so.1"), 0);
  // A library, but no driver.
  const auto wrong = CudaDevice::get(0, "libm.so.6");
  ASSERT_FALSE(wrong);
  EXPECT_EQ(wrong.failure().message, "no usable CUDA driver: libm.so.6 has no cuInit");
}

TEST_F(CudaDriver, Device) {
  const auto gpu = device();
  ASSERT_TRUE(gpu);
  EXPECT_EQ(gpu->ordinal(), 0);
  EXPECT_EQ(gpu->name(), "Fake GPU");
  EXPECT_EQ(gpu->arch(), 90);
  EXPECT_EQ(gpu->num_sms(), 132);
  EXPECT_EQ(gpu->max_shared_memory(), 232448u);
  EXPECT_EQ(CudaDevice::count(kLibrary), 1);
  EXPECT_EQ(test::fake_cuda_current(kLibrary), 0) << "a context was left current";
}

TEST_F(CudaDriver, OneObjectPerDevice) {
  fake_->devices = 2;
  auto first = device();
  EXPECT_EQ(first, device());
  EXPECT_NE(first, device(1));
  EXPECT_EQ(fake_->contexts_retained, 2);
  EXPECT_EQ(fake_->contexts_released, 1);
  first.reset();
  EXPECT_EQ(fake_->contexts_released, 2);
  first = device();
  EXPECT_EQ(fake_->contexts_retained, 3);
}

TEST_F(CudaDriver, DeviceFailures) {
  for (const int ordinal : {-1, 1}) {
    const auto none = CudaDevice::get(ordinal, kLibrary);
    ASSERT_FALSE(none);
    EXPECT_EQ(none.failure().status, ATTNJIT_ENVIRONMENT);
    EXPECT_EQ(none.failure().message, "there is no CUDA device " + std::to_string(ordinal) + "; the driver shows 1");
  }
  for (const char* function : {"cuDeviceGet", "cuDeviceGetName", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain"}) {
    fake_->failing = {{function, 400}};
    const auto failed = CudaDevice::get(0, kLibrary);
    ASSERT_FALSE(failed) << function;
    EXPECT_EQ(failed.failure().message, std::string("CUDA device 0 cannot be used: ") + function +
                                            " failed: CUDA_ERROR_INVALID_HANDLE: invalid resource handle");
  }
  fake_->failing.clear();
  EXPECT_EQ(fake_->contexts_retained, 0);
  EXPECT_TRUE(device()) << "a failure was kept";
}

TEST_F(CudaDriver, KernelFailures) {
  fake_->failing = {{"cuModuleLoadDataEx", 2}};
  const auto failed = CudaKernel::load(device(), "image", "entry", 0);
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.failure().status, ATTNJIT_OUT_OF_MEMORY);
  fake_->failing = {{"cuModuleLoadDataEx", 99999}};
  expect_no_kernel("cuModuleLoadDataEx failed: CUDA error 99999");
  for (const char* function : {"cuModuleGetFunction", "cuFuncLoad", "cuFuncGetAttribute"}) {
    fake_->failing = {{function, 400}};
    expect_no_kernel(function);
  }
  fake_->failing.clear();
  expect_no_kernel("asking for 300000 bytes of shared memory failed: CUDA_ERROR_INVALID_VALUE", 300000);
  const auto bad = CudaKernel::load(device(), "bad image", "entry", 0);
  ASSERT_FALSE(bad);
  EXPECT_THAT(bad.failure().message, HasSubstr("CUDA_ERROR_INVALID_IMAGE (device kernel image is bad)"));
  const auto none = CudaKernel::load(device(), "image", "no_such_entry", 0);
  ASSERT_FALSE(none);
  EXPECT_THAT(none.failure().message, HasSubstr("cuModuleGetFunction failed: CUDA_ERROR_NOT_FOUND"));
  fake_->failing = {{"cuCtxPushCurrent", 400}};
  const auto nowhere = CudaKernel::load(device(), "image", "entry", 0);
  ASSERT_FALSE(nowhere);
  EXPECT_THAT(nowhere.failure().message, HasSubstr("cuCtxPushCurrent failed"));
  EXPECT_EQ(fake_->unbalanced_pops, 0);
}

TEST_F(CudaDriver, Launch) {
  const auto gpu = device();
  const auto loaded = kernel(gpu, 100000);
  ASSERT_TRUE(loaded);
  std::array<int, 3> params = {1, 2, 3};
  fake_->parameter_bytes = sizeof(params);
  int stream = 0;
  ASSERT_FALSE(loaded->launch({.x = 7, .y = 5}, 128, params.data(), &stream));
  ASSERT_EQ(fake_->launches.size(), 1u);
  const FakeCuda::Launch& launch = fake_->launches[0];
  EXPECT_EQ(launch.entry, "entry");
  EXPECT_EQ(launch.image, "image");
  EXPECT_EQ(launch.grid[0], 7u);
  EXPECT_EQ(launch.grid[1], 5u);
  EXPECT_EQ(launch.grid[2], 1u);
  EXPECT_EQ(launch.block, 128u);
  EXPECT_EQ(launch.shared, 100000u);
  EXPECT_EQ(launch.stream, &stream);
  EXPECT_EQ(0, std::memcmp(launch.parameters.data(), params.data(), sizeof(params)));
  EXPECT_EQ(test::fake_cuda_current(kLibrary), 0);

  fake_->failing = {{"cuLaunchKernel", 400}};
  const Failure failure = loaded->launch({}, 32, params.data(), &stream).value_or(Failure{});
  EXPECT_EQ(failure.status, ATTNJIT_ENVIRONMENT);
  EXPECT_EQ(failure.message,
            "cuLaunchKernel failed: CUDA_ERROR_INVALID_HANDLE: invalid resource handle; is `stream` one of device 0's "
            "primary context?");
}

TEST_F(CudaDriver, TensorMaps) {
  const auto gpu = device();
  ASSERT_TRUE(gpu->has_tensor_maps());
  alignas(64) unsigned char memory[128] = {};
  TensorMapLayout layout{.data = memory, .extent = {24, 40, 4, 2}, .stride = {48, 1920, 7680}, .box = {64, 128, 1, 1}};
  alignas(64) unsigned char map[128] = {};
  ASSERT_FALSE(gpu->encode_tensor_map(layout, map));
  layout.bfloat16 = false;
  ASSERT_FALSE(gpu->encode_tensor_map(layout, map));
  ASSERT_EQ(fake_->maps.size(), 2u);
  // By the driver's own numbers: bfloat16 and float16, no interleaving, 128 bytes swizzled, 256 brought to the L2
  // cache, zeros beyond the tensor.
  EXPECT_EQ(fake_->maps[0].type, 9);
  EXPECT_EQ(fake_->maps[1].type, 6);
  const FakeCuda::TensorMap& encoded = fake_->maps[0];
  EXPECT_EQ(encoded.interleave, 0);
  EXPECT_EQ(encoded.swizzle, 3);
  EXPECT_EQ(encoded.promotion, 3);
  EXPECT_EQ(encoded.fill, 0);
  EXPECT_EQ(encoded.data, memory);
  EXPECT_THAT(encoded.extents, testing::ElementsAre(24, 40, 4, 2));
  EXPECT_THAT(encoded.strides, testing::ElementsAre(48, 1920, 7680));
  EXPECT_THAT(encoded.box, testing::ElementsAre(64, 128, 1, 1));
  EXPECT_THAT(encoded.element_strides, testing::ElementsAre(1, 1, 1, 1));

  ASSERT_FALSE(gpu->move_tensor_map(memory + 64, map));
  ASSERT_EQ(fake_->maps.size(), 3u);
  EXPECT_EQ(fake_->maps[2].data, memory + 64);
  EXPECT_EQ(fake_->maps[2].type, 6);
  EXPECT_EQ(fake_->maps[2].strides, fake_->maps[0].strides);

  layout.stride[1] = 1928;
  Failure failure = gpu->encode_tensor_map(layout, map).value_or(Failure{});
  EXPECT_EQ(failure.status, ATTNJIT_ENVIRONMENT);
  EXPECT_EQ(failure.message, "cuTensorMapEncodeTiled failed: CUDA_ERROR_INVALID_VALUE");
  failure = gpu->move_tensor_map(memory + 8, map).value_or(Failure{});
  EXPECT_EQ(failure.status, ATTNJIT_ENVIRONMENT);
  EXPECT_EQ(failure.message, "cuTensorMapReplaceAddress failed: CUDA_ERROR_INVALID_VALUE");
  EXPECT_EQ(test::fake_cuda_current(kLibrary), 0) << "a context was left current";

  // A driver that lacks the function serves all else.
  const auto old = CudaDevice::get(0, ATTNJIT_FAKE_CUDA_11);
  ASSERT_TRUE(old) << old.failure().message;
  EXPECT_FALSE((*old)->has_tensor_maps());
}

TEST_F(CudaDriver, UnloadsWithTheLastOwner) {
  {
    auto loaded = kernel(device());
    EXPECT_EQ(fake_->contexts_released, 0) << "the kernel keeps its device";
    EXPECT_EQ(fake_->modules_unloaded, 0);
  }
  EXPECT_EQ(fake_->modules_unloaded, 1);
  EXPECT_EQ(fake_->contexts_released, 1);
  EXPECT_EQ(fake_->unbalanced_pops, 0);
}

// Loading, unloading and launching leave a capture whole; and the fake would notice if they did not.
TEST_F(CudaDriver, Capture) {
  const auto gpu = device();
  int stream = 0, other = 0;
  fake_->capturing = true;
  fake_->captured_stream = &stream;
  EXPECT_TRUE(gpu->is_capturing(&stream));
  EXPECT_FALSE(gpu->is_capturing(&other));
  {
    const auto loaded = kernel(gpu);
    ASSERT_TRUE(loaded);
    ASSERT_FALSE(loaded->launch({}, 32, &other, &stream));
    EXPECT_TRUE(fake_->launches.at(0).captured);
  }
  EXPECT_EQ(fake_->modules_unloaded, 1);
  EXPECT_FALSE(fake_->capture_broken);

  fake_->failing = {{"cuStreamIsCapturing", 906}};  // a legacy stream beside a capture
  EXPECT_TRUE(gpu->is_capturing(nullptr));
  fake_->failing = {{"cuStreamIsCapturing", 400}};
  EXPECT_FALSE(gpu->is_capturing(nullptr));

  fake_->failing.clear();
  const CudaScope scope(*gpu);  // not for setting up
  void* module = nullptr;
  void* const library = dlopen(kLibrary, RTLD_NOW);
  const auto load =
      reinterpret_cast<int (*)(void**, const void*, unsigned, int*, void**)>(dlsym(library, "cuModuleLoadDataEx"));
  EXPECT_EQ(load(&module, "image", 0, nullptr, nullptr), 900);
  EXPECT_TRUE(fake_->capture_broken);
}

TEST_F(CudaDriver, ScopesNestAndPutBack) {
  fake_->devices = 2;
  const auto first = device(0), second = device(1);
  const auto current = [] { return test::fake_cuda_current(kLibrary); };
  {
    const CudaScope outer(*first);
    EXPECT_EQ(current(), 1);
    {
      const CudaScope inner(*second);
      EXPECT_EQ(current(), 2);
      const CudaScope same(*second, CudaScope::Use::kSetup);
      EXPECT_EQ(current(), 2);
    }
    EXPECT_EQ(current(), 1);
    std::thread([&] { EXPECT_EQ(current(), 0); }).join();
  }
  EXPECT_EQ(current(), 0);
  EXPECT_EQ(fake_->unbalanced_pops, 0);
}

TEST_F(CudaDriver, Fill) {
  const auto gpu = device();
  std::vector<std::uint32_t> memory(5, 1);
  ASSERT_FALSE(gpu->fill(memory.data(), 7, 4 * sizeof(std::uint32_t), nullptr));
  EXPECT_EQ(memory, (std::vector<std::uint32_t>{7, 7, 7, 7, 1}));
  fake_->failing = {{"cuMemsetD32Async", 400}};
  EXPECT_FALSE(gpu->fill(memory.data(), 7, 0, nullptr));
  const Failure failure = gpu->fill(memory.data(), 7, 4, nullptr).value_or(Failure{});
  EXPECT_THAT(failure.message, HasSubstr("cuMemsetD32Async failed"));
}

}  // namespace
}  // namespace attnjit::runtime
