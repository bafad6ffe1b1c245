// Poisoned, guarded, strided tensors.
#include "tests/numerics/tensor.h"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace attnjit::numerics {
namespace {

constexpr std::size_t kAlignment = 64;
constexpr std::byte kGuard{0xa5};
constexpr std::byte kPoison{0xff};

struct Format {
  int precision, min_exponent;
  double max;
};

Format format_of(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kF16:
      return {11, -14, 65504.0};
    case dsl::DType::kBF16:
      return {8, -126, 0x1.fep127};
    default:
      return {24, -126, static_cast<double>(std::numeric_limits<float>::max())};
  }
}

// The bits of a value that is representable.
std::uint16_t encode_f16(double x) {
  const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
  const double magnitude = std::fabs(x);
  if (std::isnan(x)) return 0x7e00;
  if (std::isinf(x)) return sign | 0x7c00;
  if (magnitude == 0.0) return sign;
  const int exponent = std::ilogb(magnitude);
  if (exponent < -14) return sign | static_cast<std::uint16_t>(std::ldexp(magnitude, 24));
  const auto mantissa = static_cast<std::uint16_t>(std::ldexp(magnitude, 10 - exponent) - 1024.0);
  return static_cast<std::uint16_t>(sign | ((exponent + 15) << 10) | mantissa);
}

std::uint16_t encode_bf16(double x) {
  const float narrow = static_cast<float>(x);
  std::uint32_t bits;
  std::memcpy(&bits, &narrow, sizeof bits);
  return static_cast<std::uint16_t>(bits >> 16);
}

std::vector<std::int64_t> strides_of(const std::vector<std::int64_t>& shape, Layout layout) {
  const std::size_t rank = shape.size();
  std::vector<std::int64_t> stride(rank, 1);
  std::vector<std::size_t> order(rank);  // from the fastest dimension to the slowest
  for (std::size_t i = 0; i < rank; ++i) order[i] = rank - 1 - i;
  if (rank == 4 && layout == Layout::kBshd) order = {3, 1, 2, 0};
  if (rank != 4 && layout == Layout::kBshd) std::reverse(order.begin(), order.end());
  std::int64_t next = 1;
  for (const std::size_t dimension : order) {
    // A gap after the innermost dimension, and a larger one after each further one. A capture's may have a gap
    // between elements, too.
    if (layout == Layout::kPadded && rank != 4) next += dimension == rank - 1 ? 1 : 3;
    stride[dimension] = next;
    next *= std::max<std::int64_t>(shape[dimension], 1);
    if (layout == Layout::kPadded && rank == 4) next += dimension == 3 ? 5 : 16;
    if (layout == Layout::kAligned) next += 8 + (8 - next % 8) % 8;
  }
  if (layout == Layout::kBroadcastBatch && rank > 0) stride[0] = 0;
  if (layout == Layout::kBroadcastHead && rank == 4) stride[1] = 0;
  if (layout == Layout::kBroadcastSeq && rank == 4) stride[2] = 0;
  if (layout == Layout::kHuge) stride[0] = (std::int64_t{1} << 31) + 64;
  return stride;
}

}  // namespace

double round_to(dsl::DType dtype, double x) {
  if (!std::isfinite(x) || x == 0.0) return x;
  const Format format = format_of(dtype);
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), format.min_exponent) - (format.precision - 1));
  const double rounded = std::nearbyint(x / ulp) * ulp;
  return std::fabs(rounded) > format.max ? std::copysign(std::numeric_limits<double>::infinity(), x) : rounded;
}

Buffer::Buffer(std::size_t bytes, bool sparse) : size_(bytes), sparse_(sparse) {
  if (sparse) {
    void* const memory = mmap(nullptr, std::max<std::size_t>(bytes, 1), PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::runtime_error("no address space for a sparse tensor");
    data_ = static_cast<std::byte*>(memory);
    return;
  }
  storage_.assign(bytes + 2 * kGuardBytes + kAlignment, kGuard);
  const auto address = reinterpret_cast<std::uintptr_t>(storage_.data()) + kGuardBytes;
  data_ = storage_.data() + kGuardBytes + (kAlignment - address % kAlignment) % kAlignment;
  std::fill_n(data_, bytes, kPoison);
}

Buffer::~Buffer() {
  if (sparse_) munmap(data_, std::max<std::size_t>(size_, 1));
}

bool Buffer::guards_intact() const {
  if (sparse_) return true;
  const std::byte* const begin = storage_.data();
  const auto is_guard = [](std::byte value) { return value == kGuard; };
  return std::all_of(begin, static_cast<const std::byte*>(data_), is_guard) &&
         std::all_of(static_cast<const std::byte*>(data_) + size_, begin + storage_.size(), is_guard);
}

Tensor::Tensor(dsl::DType dtype, std::vector<std::int64_t> shape, Layout layout, std::int64_t shift)
    : dtype_(dtype), shape_(std::move(shape)), stride_(strides_of(shape_, layout)), first_(shift) {
  std::int64_t last = 0;
  for (std::size_t i = 0; i < shape_.size(); ++i) last += std::max<std::int64_t>(shape_[i] - 1, 0) * stride_[i];
  const std::int64_t elements = size() == 0 ? 0 : last + 1 + shift;
  buffer_ =
      std::make_shared<Buffer>(static_cast<std::size_t>(elements * dsl::dtype_size(dtype_)), layout == Layout::kHuge);
}

Tensor Tensor::view(std::vector<std::int64_t> shape, std::vector<std::int64_t> stride, std::int64_t offset) const {
  Tensor other = *this;
  other.shape_ = std::move(shape);
  other.stride_ = std::move(stride);
  other.first_ += offset;
  return other;
}

std::int64_t Tensor::size() const {
  return std::accumulate(shape_.begin(), shape_.end(), std::int64_t{1}, std::multiplies<>());
}

std::int64_t Tensor::offset(std::span<const std::int64_t> index) const {
  std::int64_t result = first_;
  for (std::size_t i = 0; i < index.size(); ++i) result += index[i] * stride_[i];
  return result;
}

double Tensor::at(std::span<const std::int64_t> index) const {
  const void* const data = buffer_->data();
  const std::int64_t position = offset(index);
  if (dsl::value_type(dtype_) == dsl::Type::kFloat) return dsl::read_as_double(data, dtype_, position);
  return static_cast<double>(dsl::read_as_int(data, dtype_, position));
}

void Tensor::set(std::span<const std::int64_t> index, double value) {
  std::byte* const target = buffer_->data() + offset(index) * dsl::dtype_size(dtype_);
  const double rounded = dsl::value_type(dtype_) == dsl::Type::kFloat ? round_to(dtype_, value) : value;
  const auto put = [&](auto bits) { std::memcpy(target, &bits, sizeof bits); };
  switch (dtype_) {
    case dsl::DType::kF16:
      return put(encode_f16(rounded));
    case dsl::DType::kBF16:
      return put(encode_bf16(rounded));
    case dsl::DType::kF32:
      return put(static_cast<float>(rounded));
    default:
      return set_int(index, static_cast<std::int64_t>(value));
  }
}

void Tensor::set_int(std::span<const std::int64_t> index, std::int64_t value) {
  std::byte* const target = buffer_->data() + offset(index) * dsl::dtype_size(dtype_);
  const auto put = [&](auto bits) { std::memcpy(target, &bits, sizeof bits); };
  switch (dtype_) {
    case dsl::DType::kBool:
      return put(static_cast<std::uint8_t>(value != 0));
    case dsl::DType::kInt8:
      return put(static_cast<std::int8_t>(value));
    case dsl::DType::kUInt8:
      return put(static_cast<std::uint8_t>(value));
    case dsl::DType::kInt16:
      return put(static_cast<std::int16_t>(value));
    case dsl::DType::kInt32:
      return put(static_cast<std::int32_t>(value));
    case dsl::DType::kInt64:
      return put(value);
    default:
      return set(index, static_cast<double>(value));
  }
}

void Tensor::poison() {
  const auto width = static_cast<std::size_t>(dsl::dtype_size(dtype_));
  for_each_index(shape_, [&](auto index) {
    std::fill_n(buffer_->data() + static_cast<std::size_t>(offset(index)) * width, width, kPoison);
  });
}

bool Tensor::surroundings_intact() const {
  if (!buffer_->guards_intact()) return false;
  if (buffer_->sparse()) return true;
  const std::size_t width = static_cast<std::size_t>(dsl::dtype_size(dtype_));
  std::vector<bool> inside(buffer_->size() / width, false);
  for_each_index(shape_, [&](auto index) { inside[static_cast<std::size_t>(offset(index))] = true; });
  for (std::size_t i = 0; i < buffer_->size(); ++i) {
    if (!inside[i / width] && buffer_->data()[i] != kPoison) return false;
  }
  return true;
}

std::vector<std::byte> Tensor::snapshot() const {
  if (buffer_->sparse()) return {};
  return {buffer_->data(), buffer_->data() + buffer_->size()};
}

DLTensor* Tensor::dl() {
  // DLPack 0.6 has no code for bool; later versions and the library use 6.
  constexpr std::uint8_t kBoolCode = 6;
  std::uint8_t code = kDLInt;
  switch (dtype_) {
    case dsl::DType::kBool:
      code = kBoolCode;
      break;
    case dsl::DType::kUInt8:
      code = kDLUInt;
      break;
    case dsl::DType::kBF16:
      code = kDLBfloat;
      break;
    case dsl::DType::kF16:
    case dsl::DType::kF32:
      code = kDLFloat;
      break;
    default:
      break;
  }
  dl_.data = buffer_->data();
  dl_.device = {kDLCPU, 0};
  dl_.ndim = static_cast<int>(shape_.size());
  dl_.dtype = {code, static_cast<std::uint8_t>(8 * dsl::dtype_size(dtype_)), 1};
  dl_.shape = shape_.data();
  dl_.strides = stride_.data();
  dl_.byte_offset = static_cast<std::uint64_t>(first_ * dsl::dtype_size(dtype_));
  return &dl_;
}

std::size_t packed_offset(const Tensor& tensor, std::span<const std::int64_t> index) {
  std::int64_t offset = 0;
  for (std::size_t i = 0; i < index.size(); ++i) offset = offset * tensor.shape()[i] + index[i];
  return static_cast<std::size_t>(offset);
}

dsl::CaptureView Tensor::capture_view() const {
  dsl::CaptureView view;
  view.data = buffer_->data() + first_ * dsl::dtype_size(dtype_);
  view.dtype = dtype_;
  view.rank = static_cast<int>(shape_.size());
  for (std::size_t i = 0; i < shape_.size(); ++i) {
    view.extent[i] = shape_[i];
    view.stride[i] = stride_[i];
  }
  return view;
}

}  // namespace attnjit::numerics
