// Element types: roundings and names.
#include "bench/tensor.h"

#include <gtest/gtest.h>

#include <bit>
#include <cmath>
#include <limits>

namespace attnjit::tool {
namespace {

TEST(Tensor, SixteenBitFloatsSurviveARoundTrip) {
  for (unsigned bits = 0; bits < 65536; ++bits) {
    const auto half = static_cast<std::uint16_t>(bits);
    const float f16 = float16_to_float(half), bf16 = bfloat16_to_float(half);
    if (std::isnan(f16)) {
      EXPECT_TRUE(std::isnan(float16_to_float(float_to_float16(f16))));
    } else {
      EXPECT_EQ(std::bit_cast<std::uint32_t>(float16_to_float(float_to_float16(f16))),
                std::bit_cast<std::uint32_t>(f16));
      EXPECT_EQ(f16, static_cast<float>(std::bit_cast<_Float16>(half)));
    }
    if (std::isnan(bf16)) {
      EXPECT_TRUE(std::isnan(bfloat16_to_float(float_to_bfloat16(bf16))));
    } else {
      EXPECT_EQ(float_to_bfloat16(bf16), half);
    }
  }
}

TEST(Tensor, RoundsToNearestEven) {
  EXPECT_EQ(float_to_bfloat16(1.0f + 0x1p-8f), float_to_bfloat16(1.0f));
  EXPECT_EQ(bfloat16_to_float(float_to_bfloat16(1.0f + 0x1.8p-7f)), 1.0f + 0x1p-6f);
  EXPECT_EQ(bfloat16_to_float(float_to_bfloat16(std::numeric_limits<float>::max())), INFINITY);
  // The compiler's own conversion is the judge.
  std::uint32_t bits = 1;
  for (int i = 0; i < 200'000; ++i) {
    bits = bits * 1664525 + 1013904223;
    const float value = std::bit_cast<float>(bits);
    if (std::isnan(value)) continue;
    EXPECT_EQ(float_to_float16(value), std::bit_cast<std::uint16_t>(static_cast<_Float16>(value))) << value;
  }
}

TEST(Tensor, SequenceMajorStridesAreThoseOfAProjection) {
  const Tensor tensor = Tensor::sequence_major(ElementType::kFloat32, 2, 3, 5, 7);
  EXPECT_EQ(tensor.shape(), (std::vector<std::int64_t>{2, 3, 5, 7}));
  EXPECT_EQ(tensor.strides(), (std::vector<std::int64_t>{5 * 3 * 7, 7, 3 * 7, 1}));
}

TEST(Tensor, HoldsWhatSetStores) {
  for (const ElementTypeInfo& row : element_types()) {
    Tensor one(row.type, {});
    for (const double value : {0.0, 1.0, 2.0, -1.0, 127.0, 128.0, -128.0, -129.0, 255.0, 256.0, 32767.0, 32768.0,
                               0x1p31 - 1, 0x1p31, -0x1p31, 0x1p53, 0x1p54, 1.5}) {
      if (unit_roundoff(row.type) > 0.0 || !holds(row.type, value)) continue;
      one.set(0, value);
      EXPECT_EQ(one.get(0), value) << row.name;
    }
  }
  EXPECT_TRUE(holds(ElementType::kInt8, -128));
  EXPECT_FALSE(holds(ElementType::kInt8, 128));
  EXPECT_FALSE(holds(ElementType::kUInt8, -1));
  EXPECT_TRUE(holds(ElementType::kInt32, 0x1p31 - 1));
  EXPECT_FALSE(holds(ElementType::kInt64, 0x1p60));
  EXPECT_FALSE(holds(ElementType::kInt32, NAN));
  EXPECT_FALSE(holds(ElementType::kBool, 2));
  EXPECT_TRUE(holds(ElementType::kFloat16, INFINITY));
}

TEST(Tensor, TypesAreFoundByEveryName) {
  for (const ElementTypeInfo& row : element_types()) EXPECT_EQ(element_type_named(row.name), row.type);
  EXPECT_EQ(element_type_named("bf16"), ElementType::kBFloat16);
  EXPECT_EQ(element_type_named("float64"), std::nullopt);
}

}  // namespace
}  // namespace attnjit::tool
