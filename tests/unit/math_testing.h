// What the tests of the eager forward and backward on the CPU share: tensors in many layouts, captured tensors, bound
// expressions, and every way of computing.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dsl/bind.h"
#include "dsl/interpreter.h"
#include "dsl/parser.h"
#include "runtime/math_program.h"

namespace attnjit::runtime::cpu_testing {

using dsl::DType;

inline constexpr double kInf = std::numeric_limits<double>::infinity();
inline constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

inline std::uint16_t to_bf16(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, 4);
  return static_cast<std::uint16_t>((u + 0x7fff + ((u >> 16) & 1)) >> 16);
}

// A value of a test tensor; f16 inputs are kept to multiples of 2^-8, which need no rounding.
inline void write_element(void* data, DType dtype, std::int64_t offset, double value) {
  char* at = static_cast<char*>(data) + offset * dsl::dtype_size(dtype);
  const auto put = [&](auto x) { std::memcpy(at, &x, sizeof x); };
  switch (dtype) {
    case DType::kF32:
      return put(static_cast<float>(value));
    case DType::kBF16:
      return put(to_bf16(static_cast<float>(value)));
    case DType::kF16: {
      const double magnitude = std::fabs(value);
      std::uint16_t bits = std::signbit(value) ? 0x8000 : 0;
      if (magnitude != 0) {
        const int exponent = std::ilogb(magnitude);
        bits |= static_cast<std::uint16_t>((exponent + 15) << 10);
        bits |= static_cast<std::uint16_t>(std::lround(std::ldexp(magnitude, 10 - exponent)) - 1024);
      }
      return put(bits);
    }
    case DType::kBool:
      return put(static_cast<std::uint8_t>(value != 0));
    case DType::kInt8:
      return put(static_cast<std::int8_t>(value));
    case DType::kUInt8:
      return put(static_cast<std::uint8_t>(value));
    case DType::kInt16:
      return put(static_cast<std::int16_t>(value));
    case DType::kInt32:
      return put(static_cast<std::int32_t>(value));
    case DType::kInt64:
      return put(static_cast<std::int64_t>(value));
  }
}

struct Shape {
  std::int64_t batch = 2, heads = 4, heads_kv = 2, seqlen_q = 19, seqlen_kv = 37, head_dim = 16, head_dim_v = 8;
  DType dtype = DType::kF32;
  enum Layout { kPacked, kHeadsInside, kPadded, kOverlapping } layout = kPacked;
  float scale = 1.0f;
};

// A 4-D tensor in a buffer of its own with bytes of 0xff (NaN) around and between its elements.
class Tensor {
 public:
  Tensor(std::int64_t batch, std::int64_t heads, std::int64_t rows, std::int64_t columns, DType dtype,
         Shape::Layout layout) {
    view_.dtype = dtype;
    const std::int64_t shape[4] = {batch, heads, rows, columns};
    std::copy_n(shape, 4, view_.shape);
    std::int64_t stride[4] = {heads * rows * columns, rows * columns, columns, 1};
    if (layout == Shape::kHeadsInside) {
      stride[0] = rows * heads * columns;
      stride[1] = columns;
      stride[2] = heads * columns;
    } else if (layout == Shape::kPadded) {
      stride[2] = columns + 3;
      stride[1] = rows * stride[2] + 5;
      stride[0] = heads * stride[1];
    } else if (layout == Shape::kOverlapping) {
      stride[0] = 0;  // one batch for all, rows that overlap their neighbours
      stride[2] = 3;
    }
    std::copy_n(stride, 4, view_.stride);
    std::int64_t elements = 2 * kGuard + 1;
    for (int d = 0; d < 4; ++d) elements += std::max<std::int64_t>(shape[d] - 1, 0) * stride[d];
    bytes_.assign(static_cast<std::size_t>(elements * dsl::dtype_size(dtype)), static_cast<char>(0xff));
    view_.data = bytes_.data() + kGuard * dsl::dtype_size(dtype);
  }

  template <typename Value>
  void fill(Value&& value) {
    each([&](std::int64_t offset) { write_element(view_.data, view_.dtype, offset, value()); });
  }
  void set(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d, double value) {
    write_element(view_.data, view_.dtype, offset(b, h, s, d), value);
  }
  double get(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    return dsl::read_as_double(view_.data, view_.dtype, offset(b, h, s, d));
  }
  // Bytes that belong to no element still are what they were.
  bool untouched_between() const {
    std::vector<bool> inside(bytes_.size());
    const auto size = dsl::dtype_size(view_.dtype);
    each([&](std::int64_t offset) {
      for (std::int64_t i = 0; i < size; ++i) inside[static_cast<std::size_t>((offset + kGuard) * size + i)] = true;
    });
    for (std::size_t i = 0; i < bytes_.size(); ++i) {
      if (!inside[i] && bytes_[i] != static_cast<char>(0xff)) return false;
    }
    return true;
  }
  const TensorView& view() const { return view_; }

 private:
  static constexpr std::int64_t kGuard = 64;
  std::int64_t offset(std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) const {
    return b * view_.stride[0] + h * view_.stride[1] + s * view_.stride[2] + d * view_.stride[3];
  }
  template <typename Visit>
  void each(Visit&& visit) const {
    for (std::int64_t b = 0; b < view_.shape[0]; ++b)
      for (std::int64_t h = 0; h < view_.shape[1]; ++h)
        for (std::int64_t s = 0; s < view_.shape[2]; ++s)
          for (std::int64_t d = 0; d < view_.shape[3]; ++d) visit(offset(b, h, s, d));
  }
  TensorView view_;
  std::vector<char> bytes_;
};

struct Captured {
  DType dtype;
  std::vector<std::int64_t> extent;
  std::vector<double> values;  // row-major
};

// A problem with random inputs.
class MathProblem {
 public:
  explicit MathProblem(const Shape& shape)
      : shape_(shape),
        q(shape.batch, shape.heads, shape.seqlen_q, shape.head_dim, shape.dtype, shape.layout),
        k(shape.batch, shape.heads_kv, shape.seqlen_kv, shape.head_dim, shape.dtype, shape.layout),
        v(shape.batch, shape.heads_kv, shape.seqlen_kv, shape.head_dim_v, shape.dtype, shape.layout) {
    std::uniform_int_distribution<int> value(-256, 256);
    for (Tensor* tensor : {&q, &k, &v}) tensor->fill([&] { return value(random_) / 256.0; });
  }

  void capture(const std::string& name, DType dtype, std::vector<std::int64_t> extent, std::vector<double> values) {
    captured_[name] = {dtype, std::move(extent), std::move(values)};
  }

  static std::vector<MathOptions> all_options() {
    std::vector<MathOptions> options;
    for (const Blas* blas : {Blas::get(), static_cast<const Blas*>(nullptr)}) {
      options.push_back({.passes = &sse2_passes(), .blas = blas});
      if (host_passes().isa != std::string("sse2")) options.push_back({.passes = &avx2_passes(), .blas = blas});
      if (host_passes().isa == std::string("avx512")) options.push_back({.passes = &avx512_passes(), .blas = blas});
    }
    return options;
  }

 protected:
  const Shape shape_;
  std::mt19937 random_{20261120};

 public:
  Tensor q, k, v;

 protected:
  // The error, empty when there is none.
  std::string bind(const std::string& score_mod, const std::string& mask_mod) {
    auto score = dsl::parse(score_mod, dsl::ModKind::kScoreMod);
    if (!score) return dsl::format_error(score.error(), score_mod);
    std::optional<dsl::Expr> mask;
    if (!mask_mod.empty()) {
      auto parsed = dsl::parse(mask_mod, dsl::ModKind::kMaskMod);
      if (!parsed) return dsl::format_error(parsed.error(), mask_mod);
      mask = *parsed;
      // One table of captures: the mask's names follow those of the score_mod.
      std::vector<std::int32_t> number;
      for (const dsl::Capture& capture : mask->captures) {
        std::size_t i = 0;
        while (i < score->captures.size() && score->captures[i].name != capture.name) ++i;
        if (i == score->captures.size()) score->captures.push_back(capture);
        number.push_back(static_cast<std::int32_t>(i));
      }
      for (dsl::Node& node : mask->nodes) {
        if (node.op == dsl::Op::kRead) node.capture = number[static_cast<std::size_t>(node.capture)];
      }
      mask->captures = score->captures;
    }
    std::vector<dsl::CaptureBinding> bindings;
    views_.clear();
    data_.clear();
    for (const dsl::Capture& capture : score->captures) {
      const Captured& captured = captured_.at(capture.name);
      bindings.push_back({captured.dtype, capture.rank});
      dsl::CaptureView view{.dtype = captured.dtype, .rank = capture.rank};
      std::int64_t stride = 2;  // every other element, NaN between
      for (int d = capture.rank - 1; d >= 0; --d) {
        view.extent[d] = captured.extent[static_cast<std::size_t>(d)];
        view.stride[d] = stride;
        stride *= view.extent[d];
      }
      auto data = std::make_unique<std::vector<char>>(static_cast<std::size_t>(stride * 8), static_cast<char>(0xff));
      for (std::size_t i = 0; i < captured.values.size(); ++i) {
        write_element(data->data(), captured.dtype, static_cast<std::int64_t>(2 * i), captured.values[i]);
      }
      view.data = data->data();
      data_.push_back(std::move(data));
      views_.push_back(view);
    }
    auto bound = dsl::bind(*score, bindings, dsl::ModKind::kScoreMod);
    if (!bound) return dsl::format_error(bound.error(), score_mod);
    score_ = *bound;
    mask_.reset();
    if (mask) {
      auto bound_mask = dsl::bind(*mask, bindings, dsl::ModKind::kMaskMod);
      if (!bound_mask) return dsl::format_error(bound_mask.error(), mask_mod);
      mask_ = *bound_mask;
    }
    call_.captures = views_.data();
    call_.num_captures = views_.size();
    return "";
  }

  static bool near(double got, double expected, double tolerance) {
    if (std::isnan(expected)) return std::isnan(got);
    if (std::isinf(expected)) return got == expected;
    return std::fabs(got - expected) <= tolerance;  // false for NaN
  }

  std::map<std::string, Captured> captured_;
  std::vector<dsl::CaptureView> views_;
  std::vector<std::unique_ptr<std::vector<char>>> data_;
  dsl::Expr score_;
  std::optional<dsl::Expr> mask_;
  ForwardCall call_;
};

// A workspace between guard bytes.
class GuardedWorkspace {
 public:
  explicit GuardedWorkspace(std::size_t size) : size_(size), buffer_(size + 2 * kGuard + 64, static_cast<char>(0xff)) {
    workspace_ = buffer_.data() + kGuard;
    workspace_ += 64 - reinterpret_cast<std::uintptr_t>(workspace_) % 64;
  }
  void* data() { return workspace_; }
  bool intact() const {
    for (std::size_t i = 0; i < buffer_.size(); ++i) {
      const char* byte = buffer_.data() + i;
      const bool outside = byte < workspace_ || byte >= workspace_ + size_;
      if (outside && *byte != static_cast<char>(0xff)) return false;
    }
    return true;
  }

 private:
  static constexpr std::size_t kGuard = 256;
  std::size_t size_;
  std::vector<char> buffer_;
  char* workspace_;
};

inline std::vector<double> random_values(std::int64_t n, int low, int high, double unit) {
  std::mt19937 random(7);
  std::uniform_int_distribution<int> value(low, high);
  std::vector<double> values(static_cast<std::size_t>(n));
  for (double& x : values) x = value(random) * unit;
  return values;
}

}  // namespace attnjit::runtime::cpu_testing
