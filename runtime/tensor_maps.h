// The tensor maps that kernels copy by, from call to call.
#pragma once

#include <atomic>
#include <cstdint>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/sm90/config.h"
#include "runtime/cuda_driver.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// Writes one of a kernel's maps, call by call. The map of the first call stays: a later one whose tensor has the same
// strides copies it, and the driver has at most the address to change.
class TensorMapWriter {
 public:
  // Boxes of 64 features and `rows` positions, of one head.
  explicit TensorMapWriter(int rows) : rows_(rows) {}

  // From several threads at once. All tensors are of one shape and type, on one device.
  Check write(const CudaDevice& device, const TensorView& tensor, sm90::TensorMap* map);

 private:
  enum class State : std::uint8_t { kEmpty, kTaken, kReady };

  int rows_;
  std::atomic<State> state_ = State::kEmpty;
  // Written once, by whoever takes the writer; read where it is ready.
  std::int64_t stride_[4] = {};
  const void* data_ = nullptr;
  sm90::TensorMap map_ = {};
};

}  // namespace attnjit::runtime
