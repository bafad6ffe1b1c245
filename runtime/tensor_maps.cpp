// Tensors in the driver's words, and the map of the first call.
#include "runtime/tensor_maps.h"

#include <algorithm>

namespace attnjit::runtime {
namespace {

constexpr std::uint32_t kBoxFeatures = 64;

Check encode(const CudaDevice& device, const TensorView& tensor, int rows, sm90::TensorMap* map) {
  const std::int64_t size = dsl::dtype_size(tensor.dtype);
  TensorMapLayout layout{.data = tensor.data,
                         .bfloat16 = tensor.dtype == dsl::DType::kBF16,
                         .box = {kBoxFeatures, static_cast<std::uint32_t>(rows), 1, 1}};
  // A tensor's dimensions go from the batch to the features, a map's the other way.
  for (int d = 0; d < 4; ++d) layout.extent[d] = static_cast<std::uint64_t>(tensor.shape[3 - d]);
  for (int d = 0; d < 3; ++d) {
    // Where there is one of a dimension, nothing is a stride away; but the driver looks at the number.
    const std::int64_t stride = tensor.shape[2 - d] == 1 ? tensor.shape[3] : tensor.stride[2 - d];
    layout.stride[d] = static_cast<std::uint64_t>(stride * size);
  }
  return device.encode_tensor_map(layout, map);
}

}  // namespace

Check TensorMapWriter::write(const CudaDevice& device, const TensorView& tensor, sm90::TensorMap* map) {
  State state = state_.load(std::memory_order_acquire);
  if (state == State::kReady && std::ranges::equal(tensor.stride, stride_)) {
    *map = map_;
    return tensor.data == data_ ? Check() : device.move_tensor_map(tensor.data, map);
  }
  if (Check failure = encode(device, tensor, rows_, map)) return failure;
  if (state != State::kEmpty || !state_.compare_exchange_strong(state, State::kTaken)) return {};
  std::ranges::copy(tensor.stride, stride_);
  data_ = tensor.data;
  map_ = *map;
  state_.store(State::kReady, std::memory_order_release);
  return {};
}

}  // namespace attnjit::runtime
