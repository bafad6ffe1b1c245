// What the tests of the CPU kernels and of the CPU backend share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "kernels_templates/cpu/products.h"
#include "kernels_templates/cpu/tile_abi.h"

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

// ---- A mask of which all is known over a tile: each query sees itself and some keys before it

constexpr long long kWindow = 70;
inline bool in_window(long long q, long long kv) { return q >= kv && q - kv < kWindow; }

inline cpu::TileFacts window_facts() {
  return {.kind =
              [](const cpu::Tile* t, const cpu::CapturedView*) {
                if (t->q_last < t->kv_first || t->q_first - t->kv_last >= kWindow) return cpu::TileKind::kSkip;
                const bool all = in_window(t->q_first, t->kv_last) && in_window(t->q_last, t->kv_first);
                return all ? cpu::TileKind::kFull : cpu::TileKind::kPartial;
              },
          .kv_range =
              [](const cpu::Tile* t, const cpu::CapturedView*, cpu::IndexRange* out) {
                *out = {std::max(t->kv_first, t->q_first - kWindow + 1), std::min(t->kv_last, t->q_last)};
              },
          .q_range =
              [](const cpu::Tile* t, const cpu::CapturedView*, cpu::IndexRange* out) {
                *out = {std::max(t->q_first, t->kv_first), std::min(t->q_last, t->kv_last + kWindow - 1)};
              }};
}

// Keys that all panels of one head take together: groups of 16 of which some query of the panel sees one.
inline std::int64_t window_rows(std::int64_t seqlen_q, std::int64_t seqlen_kv) {
  std::int64_t rows = 0;
  for (std::int64_t q = 0; q < seqlen_q; q += cpu::kPanelLanes) {
    for (std::int64_t group = 0; group < seqlen_kv; group += 16) {
      const std::int64_t end = std::min<std::int64_t>(group + 16, seqlen_kv);
      bool seen = false;
      for (std::int64_t i = q; i < std::min<std::int64_t>(q + cpu::kPanelLanes, seqlen_q); ++i)
        for (std::int64_t j = group; j < end; ++j) seen = seen || in_window(i, j);
      if (seen) rows += end - group;
    }
  }
  return rows;
}

}  // namespace attnjit::test
