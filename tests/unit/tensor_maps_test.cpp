// Tensor maps that later calls take from the first one, against a fake libcuda.
#include "runtime/tensor_maps.h"

#include <gmock/gmock.h>

#include <thread>
#include <vector>

#include "support/fake_cuda/fake_cuda.h"

namespace attnjit::runtime {
namespace {

using test::FakeCuda;
using testing::ElementsAre;

constexpr const char* kLibrary = ATTNJIT_FAKE_CUDA;

class TensorMaps : public testing::Test {
 protected:
  void SetUp() override {
    fake_ = test::fake_cuda(kLibrary);
    ASSERT_NE(fake_, nullptr);
    fake_->reset();
    Result<std::shared_ptr<CudaDevice>> found = CudaDevice::get(0, kLibrary);
    ASSERT_TRUE(found) << found.failure().message;
    device_ = *found;
  }
  // What is written for `tensor` was encoded, or moved, of.
  FakeCuda::TensorMap written(TensorMapWriter& writer, const TensorView& tensor) {
    sm90::TensorMap map = {};
    const Check failure = writer.write(*device_, tensor, &map);
    EXPECT_EQ(failure.value_or(Failure{}).message, "");
    return failure ? FakeCuda::TensorMap() : at(map);
  }
  FakeCuda::TensorMap at(const sm90::TensorMap& map) {
    const std::lock_guard lock(fake_->mutex);
    return fake_->maps.at(map.opaque[0]);
  }

  FakeCuda* fake_ = nullptr;
  std::shared_ptr<CudaDevice> device_;
  alignas(64) unsigned char memory_[64] = {};  // nothing looks at a tensor's elements
  const TensorView tensor_{
      .data = memory_, .dtype = dsl::DType::kBF16, .shape = {2, 4, 40, 24}, .stride = {3840, 960, 24, 1}};
};

TEST_F(TensorMaps, TheFirstServesAllOfItsStrides) {
  TensorMapWriter writer(48);
  const FakeCuda::TensorMap first = written(writer, tensor_);
  EXPECT_EQ(first.data, memory_);
  EXPECT_EQ(first.type, 9);
  EXPECT_THAT(first.extents, ElementsAre(24, 40, 4, 2));
  EXPECT_THAT(first.strides, ElementsAre(48, 1920, 7680));
  EXPECT_THAT(first.box, ElementsAre(64, 48, 1, 1));
  EXPECT_EQ(written(writer, tensor_).data, memory_);
  EXPECT_EQ(fake_->maps.size(), 1u) << "the driver is asked again";

  TensorView other = tensor_;
  other.data = memory_ + 32;
  const FakeCuda::TensorMap moved = written(writer, other);
  EXPECT_TRUE(moved.moved);
  EXPECT_EQ(moved.data, other.data);
  EXPECT_EQ(moved.strides, first.strides);

  other.stride[2] = 4 * 24;
  other.stride[1] = 24;
  for (int i = 0; i < 2; ++i) {
    const FakeCuda::TensorMap encoded = written(writer, other);
    EXPECT_FALSE(encoded.moved);
    EXPECT_EQ(encoded.data, other.data);
    EXPECT_THAT(encoded.strides, ElementsAre(192, 48, 7680));
  }
  EXPECT_EQ(fake_->maps.size(), 4u);
  EXPECT_EQ(written(writer, tensor_).strides, first.strides);
  EXPECT_EQ(fake_->maps.size(), 4u);
}

// What the driver refuses is not kept.
TEST_F(TensorMaps, Failures) {
  TensorMapWriter writer(64);
  sm90::TensorMap map = {};
  fake_->failing = {{"cuTensorMapEncodeTiled", 1}};
  EXPECT_EQ(writer.write(*device_, tensor_, &map).value_or(Failure{}).status, ATTNJIT_ENVIRONMENT);
  fake_->failing.clear();
  EXPECT_FALSE(written(writer, tensor_).moved);
  TensorView other = tensor_;
  other.data = memory_ + 32;
  fake_->failing = {{"cuTensorMapReplaceAddress", 1}};
  EXPECT_EQ(writer.write(*device_, other, &map).value_or(Failure{}).status, ATTNJIT_ENVIRONMENT);
  fake_->failing.clear();
  EXPECT_EQ(written(writer, other).data, other.data);
}

// Each of several threads gets what it asks for, whoever of them is first.
TEST_F(TensorMaps, Threads) {
  constexpr int kThreads = 4;
  for (int round = 0; round < 20; ++round) {
    TensorMapWriter writer(64);
    std::vector<std::thread> threads;
    threads.reserve(kThreads);
    for (int i = 0; i < kThreads; ++i) {
      threads.emplace_back([&, i] {
        TensorView tensor = tensor_;
        tensor.data = memory_ + i / 2 * 16;
        if (i % 2 != 0) tensor.stride[0] = 7680;
        for (int k = 0; k < 50; ++k) {
          const FakeCuda::TensorMap map = written(writer, tensor);
          EXPECT_EQ(map.data, tensor.data);
          EXPECT_THAT(map.strides, ElementsAre(48, 1920, 2 * tensor.stride[0]));
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
}

}  // namespace
}  // namespace attnjit::runtime
