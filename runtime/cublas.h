// cuBLAS, opened at run time: batched products on a stream, with the caller's workspace. The only file that knows its
// functions is cublas.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>

#include "dsl/expr.h"
#include "runtime/cuda_driver.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// A handle in a device's primary context. Safe to use from several threads at once: a product is queued under a lock
// that nothing slow holds.
class Cublas {
 public:
  // `library` is a path or a name for the dynamic loader; empty: a libcublas.so.13 or .12 that the process has open
  // (PyTorch's, say), else the loader finds one. One handle per device and library; it is made here, which allocates
  // and may synchronise with the device, and lives as long as somebody holds it. ATTNJIT_ENVIRONMENT with the reason on
  // failure.
  static Result<std::shared_ptr<const Cublas>> get(std::shared_ptr<CudaDevice> device, std::string_view library);
  ~Cublas();
  Cublas(const Cublas&) = delete;
  Cublas& operator=(const Cublas&) = delete;

  // "cuBLAS 13.1.0".
  const std::string& description() const { return description_; }

  // Bytes of workspace that NVIDIA recommends for a device, aligned to kWorkspaceAlignment; less makes for slower
  // products.
  static std::size_t workspace_size(int arch);
  static constexpr std::size_t kWorkspaceAlignment = 256;

  // In device memory, row-major: `stride` elements from row to row, at least the row's length, `batch_stride` from
  // matrix to matrix (0: the same one). Both fit what cuBLAS takes: a stride 32 bits.
  struct Matrix {
    void* data = nullptr;
    dsl::DType dtype = dsl::DType::kF32;
    std::int64_t stride = 0;
    std::int64_t batch_stride = 0;
  };

  // C (m, n) = alpha * A (m, k) * B (k, n), `batch` times; a transposed operand lies there as (k, m) or (n, k).
  // Products of 16-bit elements are summed in float32, those of float32 are computed in it: no TF32, no sums in 16
  // bits. C may hold anything before. All extents fit 32 bits and are positive; alpha is not 0 (A and B would not be
  // read).
  struct Product {
    bool transpose_a = false, transpose_b = false;
    std::int64_t m = 0, n = 0, k = 0, batch = 1;
    float alpha = 1.0f;
    Matrix a, b, c;
  };
  // Batches above it are cut: they are blocks along a grid's short axis in some of cuBLAS's kernels.
  static constexpr std::int64_t kMaxBatch = 65535;

  // Products to queue one after the other.
  class Queue {
   public:
    // The handle is this thread's while the object lives.
    Queue(const Cublas& cublas, void* workspace, std::size_t size, CudaStream stream);
    Check add(const Product& product);

   private:
    const Cublas& cublas_;
    std::lock_guard<std::mutex> lock_;
    CudaScope scope_;
    Check failure_;
  };

 private:
  struct Library;
  Cublas(std::shared_ptr<CudaDevice> device, const Library& library) : device_(std::move(device)), library_(library) {}
  static const Library& library_of(std::string_view name);
  Check create();
  Failure failure(int status, std::string_view what) const;

  const std::shared_ptr<CudaDevice> device_;
  const Library& library_;
  void* handle_ = nullptr;
  mutable std::mutex mutex_;
  std::string description_;
};

}  // namespace attnjit::runtime
