// Copies to the GPU and back.
#include "tests/numerics/device.h"

#include <algorithm>

namespace attnjit::numerics {
namespace {

// Calls `copy(offset, bytes)` for each row of a tensor, in bytes of its buffer.
template <typename Copy>
void for_each_row(const Tensor& tensor, Copy&& copy) {
  std::vector<std::int64_t> outer = tensor.shape();
  if (tensor.size() == 0 || outer.empty()) return;
  const std::int64_t inner = outer.back();
  outer.back() = 1;
  const auto width = static_cast<std::size_t>(dsl::dtype_size(tensor.dtype()));
  const auto bytes = (static_cast<std::size_t>((inner - 1) * tensor.stride().back()) + 1) * width;
  for_each_index(outer, [&](auto index) { copy(static_cast<std::size_t>(tensor.offset(index)) * width, bytes); });
}

}  // namespace

Lender::Copy& Lender::copy_of(Buffer& buffer) {
  const auto known = std::ranges::find(copies_, &buffer, &Copy::host);
  if (known != copies_.end()) return *known;
  Copy& copy = copies_.emplace_back(Copy{&buffer, {}, {}});
  const std::size_t around = buffer.sparse() ? 0 : Buffer::kGuardBytes;
  copy.memory = tool::GpuBuffer(buffer.size() + 2 * around);
  if (!buffer.sparse()) copy.memory.upload(0, buffer.data() - around, copy.memory.size());
  return copy;
}

DLTensor* Lender::lend(Tensor& tensor) {
  DLTensor* const host = tensor.dl();
  if (place_ == Place::kHost) return host;
  DLTensor& lent = lent_.emplace_back(*host);
  lent.device = {kDLCUDA, 0};
  if (place_ == Place::kNowhere) return &lent;
  Buffer& buffer = tensor.buffer();
  Copy& copy = copy_of(buffer);
  if (buffer.sparse()) {
    copy.sparse.push_back(&tensor);
    for_each_row(tensor, [&](std::size_t at, std::size_t bytes) { copy.memory.upload(at, buffer.data() + at, bytes); });
    lent.data = copy.memory.data();
  } else {
    lent.data = copy.memory.data() + Buffer::kGuardBytes;
  }
  return &lent;
}

void* Lender::lend(Buffer& buffer) {
  return place_ == Place::kGpu ? copy_of(buffer).memory.data() + Buffer::kGuardBytes : buffer.data();
}

void Lender::fetch() {
  if (place_ != Place::kGpu) return;
  tool::Gpu::get().synchronize();
  for (const Copy& copy : copies_) {
    Buffer& buffer = *copy.host;
    if (!buffer.sparse()) copy.memory.download(0, buffer.data() - Buffer::kGuardBytes, copy.memory.size());
    for (const Tensor* const tensor : copy.sparse) {
      for_each_row(*tensor,
                   [&](std::size_t at, std::size_t bytes) { copy.memory.download(at, buffer.data() + at, bytes); });
    }
  }
}

}  // namespace attnjit::numerics
