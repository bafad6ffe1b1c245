// Tensors of any type and strides for the tests of the CPU's forward and backward.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "runtime/forward.h"
#include "tests/unit/cpu_testing.h"

namespace attnjit::test {

inline std::uint16_t round_to(double x, cpu::Storage storage) {
  // Test data only: truncation gives a value of the type.
  std::uint32_t bits;
  const float f = static_cast<float>(x);
  std::memcpy(&bits, &f, 4);
  if (storage == cpu::Storage::kBF16) return static_cast<std::uint16_t>(bits >> 16);
  if ((bits >> 23 & 0xff) < 113) return 0;  // below the normal ones
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000) | (((bits >> 23 & 0xff) - 112) << 10) | (bits >> 13 & 0x3ff));
}

// A (b, h, s, d) tensor inside a larger buffer of NaN.
struct Tensor {
  std::vector<std::uint8_t> bytes;
  runtime::TensorView view;

  double get(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    const void* p = bytes.data() + offset(b, h, s, d);
    if (view.dtype == dsl::DType::kF32) {
      float f;
      std::memcpy(&f, p, 4);
      return f;
    }
    std::uint16_t half;
    std::memcpy(&half, p, 2);
    return value_of(half, view.dtype == dsl::DType::kF16 ? cpu::Storage::kF16 : cpu::Storage::kBF16);
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d, double x) {
    void* p = bytes.data() + offset(b, h, s, d);
    if (view.dtype == dsl::DType::kF32) {
      const float f = static_cast<float>(x);
      std::memcpy(p, &f, 4);
      return;
    }
    const std::uint16_t half =
        std::isnan(x) ? 0x7fff : round_to(x, view.dtype == dsl::DType::kF16 ? cpu::Storage::kF16 : cpu::Storage::kBF16);
    std::memcpy(p, &half, 2);
  }
  std::size_t offset(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    const std::int64_t element = b * view.stride[0] + h * view.stride[1] + s * view.stride[2] + d;
    return static_cast<std::size_t>((element + kMargin) * (view.dtype == dsl::DType::kF32 ? 4 : 2));
  }
  static constexpr std::int64_t kMargin = 8;
};

enum class Order { kHeadsOutside, kSequenceOutside };  // (B, H, S, D) or (B, S, H, D) in memory

// Rows are `padding` elements further apart than they are long. All elements NaN.
inline Tensor make_tensor(dsl::DType dtype, const std::int64_t (&shape)[4], Order order, std::int64_t padding) {
  Tensor t;
  t.view.dtype = dtype;
  for (int i = 0; i < 4; ++i) t.view.shape[i] = shape[i];
  const std::int64_t row = shape[3] + padding;
  t.view.stride[3] = 1;
  t.view.stride[2] = order == Order::kHeadsOutside ? row : row * shape[1];
  t.view.stride[1] = order == Order::kHeadsOutside ? row * shape[2] : row;
  t.view.stride[0] = row * shape[1] * shape[2];
  const std::int64_t elements = t.view.stride[0] * shape[0] + 2 * Tensor::kMargin;
  t.bytes.assign(static_cast<std::size_t>(elements * (dtype == dsl::DType::kF32 ? 4 : 2)), 0xff);
  t.view.data = t.bytes.data() + static_cast<std::size_t>(Tensor::kMargin * (dtype == dsl::DType::kF32 ? 4 : 2));
  return t;
}

}  // namespace attnjit::test
