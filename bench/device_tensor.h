// A tensor where a call wants it: in the program's memory, or copied to the GPU.
#pragma once

#include <dlpack/dlpack.h>

#include <utility>

#include "bench/cuda.h"
#include "bench/tensor.h"

namespace attnjit::tool {

// Refers to a host tensor, which must outlive it and stay where it is. On the CPU it is that tensor; on the GPU it has
// memory of its own, of the same layout.
class DeviceTensor {
 public:
  // Without contents on the GPU: upload(), or let a call write it.
  DeviceTensor(Tensor& host, bool on_gpu);

  DLTensor dl() const;
  void upload() const;    // from the host tensor
  void download() const;  // into the host tensor; waits for the device
  void fill_nan() const;  // every byte 0xff, which in each floating type is a NaN

 private:
  Tensor* host_;
  bool on_gpu_;
  GpuBuffer memory_;
};

// A host tensor and its place for a call.
struct Placed {
  Placed(Tensor tensor, bool on_gpu) : host(std::move(tensor)), device(host, on_gpu) {}
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;

  Tensor host;
  DeviceTensor device;
};

// Bytes for a workspace, aligned as any backend wants it.
class Workspace {
 public:
  Workspace() = default;
  Workspace(std::size_t bytes, bool on_gpu);
  void* data() const;

 private:
  Tensor host_;
  GpuBuffer memory_;
};

}  // namespace attnjit::tool
