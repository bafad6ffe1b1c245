// A tensor where a call wants it.
#include "bench/device_tensor.h"

#include <cstring>

namespace attnjit::tool {

DeviceTensor::DeviceTensor(Tensor& host, bool on_gpu) : host_(&host), on_gpu_(on_gpu) {
  if (on_gpu) memory_ = GpuBuffer(host.bytes());
}

DLTensor DeviceTensor::dl() const {
  DLTensor dl = host_->dl();
  if (!on_gpu_) return dl;
  dl.device = {kDLCUDA, 0};
  dl.data = memory_.data();
  return dl;
}

void DeviceTensor::upload() const {
  if (on_gpu_) memory_.upload(0, host_->data(), host_->bytes());
}

void DeviceTensor::download() const {
  if (!on_gpu_) return;
  Gpu::get().synchronize();
  memory_.download(0, host_->data(), host_->bytes());
}

void DeviceTensor::fill_nan() const {
  if (on_gpu_) return memory_.fill(0xff);
  std::memset(host_->data(), 0xff, host_->bytes());
}

Workspace::Workspace(std::size_t bytes, bool on_gpu) {
  if (on_gpu) {
    memory_ = GpuBuffer(bytes);
  } else {
    host_ = Tensor(ElementType::kUInt8, {static_cast<std::int64_t>(bytes)});
  }
}

void* Workspace::data() const { return memory_.data() != nullptr ? memory_.data() : host_.dl().data; }

}  // namespace attnjit::tool
