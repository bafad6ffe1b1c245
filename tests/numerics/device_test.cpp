// The copies on a GPU, with a fake one whose memory is the host's: what comes back is seen, wherever it was written.
#include "tests/numerics/device.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "tests/numerics/check.h"
#include "tests/numerics/target.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

class NumericsDevice : public testing::Test {
 protected:
  void SetUp() override {
    if (!tool::Gpu::unavailable().empty() || tool::Gpu::get().name() != "Fake GPU") {
      GTEST_SKIP() << "needs the fake driver: ATTNJIT_CUDA_DRIVER";
    }
  }
};

Tensor filled(dsl::DType dtype, std::vector<std::int64_t> shape, Layout layout, std::int64_t shift = 0) {
  Tensor tensor(dtype, std::move(shape), layout, shift);
  double value = 0.0;
  for_each_index(tensor.shape(), [&](auto index) { tensor.set(index, value += 1.0); });
  return tensor;
}

std::byte* element(const DLTensor& lent) { return static_cast<std::byte*>(lent.data) + lent.byte_offset; }

TEST_F(NumericsDevice, ElementsTravelBothWays) {
  for (const Layout layout : {Layout::kPacked, Layout::kBshd, Layout::kPadded, Layout::kBroadcastHead, Layout::kHuge}) {
    Tensor tensor = filled(dsl::DType::kF32, {2, 3, 4, 5}, layout, layout == Layout::kPadded ? 1 : 0);
    Lender lender(Lender::Place::kGpu);
    const DLTensor* const lent = lender.lend(tensor);
    EXPECT_EQ(lent->device.device_type, kDLCUDA);
    EXPECT_NE(lent->data, tensor.dl()->data);
    // The same alignment as on the host: kernels are chosen by it.
    EXPECT_EQ(reinterpret_cast<std::uintptr_t>(lent->data) % 64,
              reinterpret_cast<std::uintptr_t>(tensor.dl()->data) % 64);
    const std::int64_t at =
        tensor.offset(std::array<std::int64_t, 4>{1, 2, 3, 4}) - tensor.offset(std::array<std::int64_t, 4>{0, 0, 0, 0});
    float value;
    std::memcpy(&value, element(*lent) + 4 * at, sizeof value);
    EXPECT_EQ(value, static_cast<float>(tensor.at({1, 2, 3, 4})));
    value = -7.0f;
    std::memcpy(element(*lent) + 4 * at, &value, sizeof value);
    EXPECT_NE(tensor.at({1, 2, 3, 4}), -7.0);
    lender.fetch();
    EXPECT_EQ(tensor.at({1, 2, 3, 4}), -7.0);
    EXPECT_TRUE(tensor.surroundings_intact());
  }
}

// One byte in front, one behind, one in a gap.
TEST_F(NumericsDevice, WritesBesideATensorAreSeen) {
  const auto intact_after = [](std::ptrdiff_t at) {
    Tensor tensor = filled(dsl::DType::kBF16, {1, 2, 3, 7}, Layout::kPadded, 1);
    Lender lender(Lender::Place::kGpu);
    element(*lender.lend(tensor))[at] = std::byte{0x3c};
    lender.fetch();
    return tensor.surroundings_intact();
  };
  const Tensor tensor(dsl::DType::kBF16, {1, 2, 3, 7}, Layout::kPadded, 1);
  const auto bytes = static_cast<std::ptrdiff_t>(tensor.snapshot().size());
  EXPECT_TRUE(intact_after(0));
  EXPECT_TRUE(intact_after(2 * 7 - 1));
  EXPECT_FALSE(intact_after(-1));        // the shift in front
  EXPECT_FALSE(intact_after(-3));        // the guard
  EXPECT_FALSE(intact_after(-2 - 256));  // its first byte
  EXPECT_FALSE(intact_after(2 * 7));     // the gap behind a row
  EXPECT_FALSE(intact_after(bytes - 2));
  EXPECT_FALSE(intact_after(bytes - 2 + 255));
}

TEST_F(NumericsDevice, TensorsOfOneBufferShareTheCopy) {
  Tensor whole = filled(dsl::DType::kF32, {1, 1, 8, 4}, Layout::kPacked);
  Tensor half = whole.view({1, 1, 4, 4}, whole.stride(), 16);
  Lender lender(Lender::Place::kGpu);
  const DLTensor *const first = lender.lend(whole), *const second = lender.lend(half);
  EXPECT_EQ(first->data, second->data);
  EXPECT_EQ(second->byte_offset - first->byte_offset, 64u);
}

// The fake launches nothing: the outputs come back as they were poisoned, and no case may be accepted.
TEST_F(NumericsDevice, AKernelThatDoesNothingIsRejected) {
  const Check check = check_case(
      parse("b=1 hq=2 sq=40 skv=70 d=32 dtype=bfloat16 score_mod=\"causal\" device=cuda backend=sm80 seed=2"));
  if (check.message.find("NVRTC") != std::string::npos) GTEST_SKIP() << check.message;
  EXPECT_FALSE(check.accepted);
  EXPECT_NE(check.message.find("nan"), std::string::npos) << check.message;
}

// A problem that a partial backend does not serve is another's, and counted; one that it serves stays its own.
TEST_F(NumericsDevice, WhatSm90LeavesToOthersIsCounted) {
  const std::string line = "b=1 hq=2 sq=8 skv=8 device=cuda backend=sm90";
  const std::pair<const char*, const char*> others[] = {
      {" d=16 dtype=float32", "float32"},
      {" d=12 dtype=bfloat16", "head dims that are no multiples of 8"},
      {" d=16 dtype=bfloat16 k=broadcast_h", "broadcast tensors"},
      {" d=16 dtype=float16 o=padded", "rows that are not aligned"}};
  const auto ran = [&](const std::string& fields) {
    Problem problem = make(line + fields);
    const RunResult result = run(problem);
    EXPECT_TRUE(result.error.empty() || result.error.find("NVRTC") != std::string::npos) << result.error;
    return problem.spec.backend;
  };
  ServedCounts& counts = served_counts();
  for (const auto& [fields, reason] : others) {
    const std::int64_t before = counts.elsewhere[reason];
    EXPECT_EQ(ran(fields), "auto") << fields;
    EXPECT_EQ(counts.elsewhere[reason], before + 1);
  }
  const std::int64_t before = counts.served;
  EXPECT_EQ(ran(" d=16 dtype=bfloat16 k=aligned v=bshd o=aligned"), "sm90");
  EXPECT_EQ(counts.served, before + 1);
}

}  // namespace
}  // namespace attnjit::numerics
