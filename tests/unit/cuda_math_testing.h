// What the tests of the eager path for GPUs share: tensors in many layouts, and kernels that run on the host.
#pragma once

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dsl/interpreter.h"
#include "runtime/cuda_driver.h"
#include "runtime/forward.h"
#include "support/cuda_emulation.h"
#include "support/float16.h"

namespace attnjit::runtime::cuda_testing {

using dsl::DType;

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline std::string message_of(const Check& failure) { return failure ? failure->message : std::string(); }

// NOLINTNEXTLINE(performance-no-int-to-ptr): what only has to be told from others
inline void* fake_pointer(std::uintptr_t value) { return reinterpret_cast<void*>(value); }

// ---- Tensors

enum class Layout { kPacked, kHeadsInside, kPadded, kRowsOverlap, kBroadcastBatch, kBroadcastHeads, kBroadcastRows };
inline constexpr Layout kInputLayouts[] = {Layout::kPacked,       Layout::kHeadsInside,    Layout::kPadded,
                                           Layout::kRowsOverlap,  Layout::kBroadcastBatch, Layout::kBroadcastHeads,
                                           Layout::kBroadcastRows};
inline constexpr Layout kOutputLayouts[] = {Layout::kPacked, Layout::kHeadsInside, Layout::kPadded};

// (batch, heads, rows, columns) in a buffer of its own, with bytes of 0xff, which is NaN, around and between.
class Tensor {
 public:
  Tensor(std::int64_t batch, std::int64_t heads, std::int64_t rows, std::int64_t columns, DType dtype, Layout layout) {
    view_ = {.data = nullptr,
             .dtype = dtype,
             .shape = {batch, heads, rows, columns},
             .stride = {heads * rows * columns, rows * columns, columns, 1}};
    std::int64_t* stride = view_.stride;
    if (layout == Layout::kHeadsInside) {
      stride[1] = columns;
      stride[2] = heads * columns;
    } else if (layout == Layout::kPadded) {
      stride[2] = columns + 3;
      stride[1] = rows * stride[2] + 5;
      stride[0] = heads * stride[1];
    } else if (layout == Layout::kRowsOverlap) {
      stride[2] = 3;
    } else if (layout == Layout::kBroadcastBatch) {
      stride[0] = 0;
    } else if (layout == Layout::kBroadcastHeads) {
      stride[1] = 0;
    } else if (layout == Layout::kBroadcastRows) {
      stride[2] = 0;
    }
    std::int64_t elements = 2 * kGuard + 1;
    for (int d = 0; d < 4; ++d) elements += std::max<std::int64_t>(view_.shape[d] - 1, 0) * stride[d];
    bytes_.assign(static_cast<std::size_t>(elements * size()), '\xff');
    view_.data = bytes_.data() + kGuard * size();
  }

  const TensorView& view() const { return view_; }
  float get(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    return static_cast<float>(dsl::read_as_double(view_.data, view_.dtype, offset(b, h, s, d)));
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d, float value) {
    char* const to = static_cast<char*>(view_.data) + offset(b, h, s, d) * size();
    const std::uint16_t half = view_.dtype == DType::kF16 ? test::to_f16(value) : test::to_bf16(value);
    std::memcpy(to, view_.dtype == DType::kF32 ? static_cast<const void*>(&value) : &half,
                static_cast<std::size_t>(size()));
  }
  template <typename Visit>
  void each(Visit&& visit) const {
    const std::int64_t* shape = view_.shape;
    for (std::int64_t b = 0; b < shape[0]; ++b) {
      for (std::int64_t h = 0; h < shape[1]; ++h) {
        for (std::int64_t s = 0; s < shape[2]; ++s) {
          for (std::int64_t d = 0; d < shape[3]; ++d) visit(b, h, s, d);
        }
      }
    }
  }
  void fill(std::mt19937& random, float spread = 1.0f) {
    std::uniform_real_distribution<float> values(-spread, spread);
    each([&](auto... index) { set(index..., values(random)); });
  }
  // Bytes that belong to no element are what they were.
  bool untouched_between() const {
    std::vector<char> rest = bytes_;
    each([&](auto... index) { std::fill_n(rest.begin() + (offset(index...) + kGuard) * size(), size(), '\xff'); });
    return std::all_of(rest.begin(), rest.end(), [](char byte) { return byte == '\xff'; });
  }

 private:
  static constexpr std::int64_t kGuard = 8;
  std::int64_t size() const { return dsl::dtype_size(view_.dtype); }
  std::int64_t offset(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    return b * view_.stride[0] + h * view_.stride[1] + s * view_.stride[2] + d;
  }
  TensorView view_;
  std::vector<char> bytes_;
};

// ---- Kernels

class HostKernel final : public CudaKernel {
 public:
  explicit HostKernel(std::function<void(const void*)> run) : run_(std::move(run)) {}
  Check launch(Grid grid, unsigned threads, const void* params, CudaStream) const override {
    emulation::Machine::get().run({grid.x, grid.y, grid.z}, threads, [&] { run_(params); });
    ++launches;
    return {};
  }
  mutable int launches = 0;

 private:
  std::function<void(const void*)> run_;
};

template <typename Params>
std::shared_ptr<const HostKernel> host_kernel(void (*kernel)(Params)) {
  return std::make_shared<HostKernel>([kernel](const void* params) { kernel(*static_cast<const Params*>(params)); });
}

template <typename Params>
using Entry = void (*)(Params);

}  // namespace attnjit::runtime::cuda_testing
