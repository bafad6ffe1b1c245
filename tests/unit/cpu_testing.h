// What the tests of the CPU kernels and of the CPU backend share.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "kernels_templates/cpu/products.h"

namespace attnjit::test {

// Numbers of the instruction sets that this machine can run; compiler::CpuIsa's order.
inline std::vector<int> host_isas() {
  std::vector<int> isas = {0};
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    isas.push_back(1);
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
      isas.push_back(2);
      if (__builtin_cpu_supports("avx512bf16")) isas.push_back(3);
    }
  }
  return isas;
}

// What 16 bits mean, from the definition of the formats.
inline double value_of(std::uint16_t bits, cpu::Storage storage) {
  const auto decode = [storage](int bits) {
    const int mantissa_bits = storage == cpu::Storage::kF16 ? 10 : 7;
    const int exponent_bits = 15 - mantissa_bits;
    const int bias = (1 << (exponent_bits - 1)) - 1;
    const int exponent = (bits & 0x7fff) >> mantissa_bits;
    const int mantissa = bits & ((1 << mantissa_bits) - 1);
    double value = 0.0;
    if (exponent == (1 << exponent_bits) - 1) {
      value = mantissa ? std::numeric_limits<double>::quiet_NaN() : std::numeric_limits<double>::infinity();
    } else if (exponent == 0) {
      value = std::ldexp(mantissa, 1 - bias - mantissa_bits);
    } else {
      value = std::ldexp((1 << mantissa_bits) + mantissa, exponent - bias - mantissa_bits);
    }
    return bits & 0x8000 ? -value : value;
  };
  const auto table = [&decode] {
    std::vector<double> values(65536);
    for (int i = 0; i < 65536; ++i) values[static_cast<std::size_t>(i)] = decode(i);
    return values;
  };
  if (storage == cpu::Storage::kF16) {
    static const std::vector<double> values = table();
    return values[bits];
  }
  static const std::vector<double> values = table();
  return values[bits];
}

// The first address from `p` on that is a multiple of 64.
inline void* align_64(void* p) {
  std::size_t space = 128;
  return std::align(64, 64, p, space);
}

// rows x kPanelLanes floats, 64-byte aligned, NaN at first, with a guard behind them.
class PanelBuffer {
 public:
  explicit PanelBuffer(std::int64_t rows) : count_(rows * cpu::kPanelLanes), storage_(count_ + 16 + 16) {
    for (std::int64_t i = 0; i < count_; ++i) data()[i] = std::numeric_limits<float>::quiet_NaN();
    for (std::int64_t i = count_; i < count_ + 16; ++i) data()[i] = kGuard;
  }
  PanelBuffer(const PanelBuffer& other) : PanelBuffer(other.count_ / cpu::kPanelLanes) {
    std::memcpy(data(), other.data(), static_cast<std::size_t>(count_) * sizeof(float));
  }
  PanelBuffer& operator=(const PanelBuffer&) = delete;

  float* data() { return static_cast<float*>(align_64(storage_.data())); }
  const float* data() const { return const_cast<PanelBuffer*>(this)->data(); }
  float& operator[](std::int64_t i) { return data()[i]; }
  float operator[](std::int64_t i) const { return data()[i]; }
  bool guard_intact() const {
    for (std::int64_t i = count_; i < count_ + 16; ++i) {
      if (data()[i] != kGuard) return false;
    }
    return true;
  }

 private:
  static constexpr float kGuard = -12345.0f;
  std::int64_t count_;
  std::vector<float> storage_;
};

}  // namespace attnjit::test
