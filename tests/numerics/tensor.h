// Tensors of the numerics tests: poisoned, guarded memory with any strides, and rounding to the element types.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "dsl/expr.h"
#include "dsl/interpreter.h"
#include "tests/numerics/case.h"

namespace attnjit::numerics {

// `x` rounded to nearest even in the element type's format; overflow gives infinity. Floats only.
double round_to(dsl::DType dtype, double x);

// Bytes between two guards, all 0xff at first: a NaN in every float type, so that whatever is read unwritten shows.
class Buffer {
 public:
  static constexpr std::size_t kGuardBytes = 256;  // in front of the bytes and behind them, at least
  // `sparse`: address space without guards, whose pages exist once touched; zero at first.
  explicit Buffer(std::size_t bytes, bool sparse = false);
  ~Buffer();
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  std::byte* data() { return data_; }
  const std::byte* data() const { return data_; }
  std::size_t size() const { return size_; }
  bool sparse() const { return sparse_; }
  bool guards_intact() const;

 private:
  std::vector<std::byte> storage_;
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
  bool sparse_ = false;
};

// A strided tensor of rank 0 to 5. Copies share the memory.
class Tensor {
 public:
  Tensor() = default;
  // `shift`: elements between an address aligned to 64 bytes and the first element.
  Tensor(dsl::DType dtype, std::vector<std::int64_t> shape, Layout layout, std::int64_t shift = 0);
  // The same memory seen with other extents and strides (in elements), starting `offset` elements further.
  Tensor view(std::vector<std::int64_t> shape, std::vector<std::int64_t> stride, std::int64_t offset = 0) const;

  dsl::DType dtype() const { return dtype_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  const std::vector<std::int64_t>& stride() const { return stride_; }
  std::int64_t size() const;  // logical elements

  std::int64_t offset(std::span<const std::int64_t> index) const;
  double at(std::span<const std::int64_t> index) const;
  double at(std::initializer_list<std::int64_t> index) const { return at(std::span(index.begin(), index.size())); }
  // Rounds a float to the element type; converts to an integer otherwise.
  void set(std::span<const std::int64_t> index, double value);
  void set(std::initializer_list<std::int64_t> index, double value) {
    set(std::span(index.begin(), index.size()), value);
  }
  void set_int(std::span<const std::int64_t> index, std::int64_t value);

  // Every element back to poison. Sparse memory, which is zero at first, gets it by this only.
  void poison();
  bool guards_intact() const { return buffer_->guards_intact(); }
  // False where a guard, or a gap between elements, was written to.
  bool surroundings_intact() const;
  Buffer& buffer() const { return *buffer_; }
  // A copy of all bytes, gaps included, to see whether an input was changed.
  std::vector<std::byte> snapshot() const;

  // Valid while this tensor is alive and not changed.
  DLTensor* dl();
  dsl::CaptureView capture_view() const;

 private:
  dsl::DType dtype_ = dsl::DType::kF32;
  std::vector<std::int64_t> shape_, stride_;
  std::int64_t first_ = 0;  // element offset from the buffer's start
  std::shared_ptr<Buffer> buffer_;
  DLTensor dl_ = {nullptr, {kDLCPU, 0}, 0, {kDLFloat, 32, 1}, nullptr, nullptr, 0};
};

// Where the element lies in a packed tensor of `tensor`'s shape.
std::size_t packed_offset(const Tensor& tensor, std::span<const std::int64_t> index);

// Calls `body` with every index of `shape`, the last dimension fastest.
template <typename Body>
void for_each_index(std::span<const std::int64_t> shape, Body&& body) {
  std::vector<std::int64_t> index(shape.size(), 0);
  for (const std::int64_t extent : shape) {
    if (extent == 0) return;
  }
  for (;;) {
    body(std::span<const std::int64_t>(index));
    std::size_t dimension = shape.size();
    while (dimension > 0 && ++index[dimension - 1] == shape[dimension - 1]) index[--dimension] = 0;
    if (dimension == 0) return;
  }
}

}  // namespace attnjit::numerics
