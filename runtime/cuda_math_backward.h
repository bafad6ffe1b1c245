// The eager backward on a GPU: scores and gradients of probabilities materialised in float32, products by cuBLAS, the
// mod's derivative compiled as a pass of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>

#include "runtime/backends.h"
#include "runtime/backward.h"
#include "runtime/cuda_binaries.h"
#include "runtime/cuda_driver.h"
#include "runtime/cuda_gradients.h"
#include "runtime/cuda_products.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// As CudaMathPlan.
class CudaMathBackwardPlan {
 public:
  // What a plan computes with.
  struct Parts {
    std::shared_ptr<CudaDevice> device;
    std::shared_ptr<const CudaKernel> mod, delta, copy;
    std::shared_ptr<const Cublas> cublas;
    int arch = 0;           // of the device
    CudaGradientSums sums;  // loaded
  };

  // For a problem that CudaProducts::refuse() has nothing against: its shapes and dtypes are used.
  CudaMathBackwardPlan(const ForwardCall& problem, const WantedGradients& wanted, Parts parts);

  // Bytes, aligned to Cublas::kWorkspaceAlignment.
  std::size_t workspace_size() const { return workspace_size_; }
  // One line per pass.
  std::string describe() const;
  // `call` and `gradients` have the shapes and dtypes of the problem, and those gradients are given that were wanted;
  // data is in the device's memory.
  Check run(const ForwardCall& call, const Gradients& gradients, void* workspace, CudaStream stream) const;

 private:
  Check run_scores(const ForwardCall& call, const Gradients& gradients, char* workspace, CudaStream stream) const;
  Check run_delta(const ForwardCall& call, const Gradients& gradients, char* workspace, CudaStream stream) const;
  Check run_mod(const ForwardCall& call, const Gradients& gradients, float factor, char* workspace,
                CudaStream stream) const;
  Check run_zeros(const TensorView& tensor, char* room, CudaStream stream) const;

  Parts parts_;
  CudaProducts products_;
  WantedGradients wanted_;
  bool is_empty_, needs_gradients_;
  // Offsets in the workspace, which starts with the scores.
  std::size_t gradients_ = 0, row_lse_ = 0, row_delta_ = 0, q_ = 0, k_ = 0, v_ = 0, grad_out_ = 0, dq_ = 0, dk_ = 0,
              dv_ = 0, sums_ = 0, cublas_ = 0;
  std::size_t workspace_size_ = 0;
};

// The kernels of a call as compiled for an architecture.
struct CudaMathBackwardBinaries {
  compiler::ModFacts facts;
  FoundBinary mod, kernels;
  std::optional<FoundBinary> finish;  // of captured gradients
  compiler::PhaseTimes phases;        // of all it took
};
// As build_cuda_math, for a request of a backward.
Result<CudaMathBackwardBinaries> build_cuda_math_backward(const Request& request, compiler::CudaArch arch,
                                                          const CollectText& collect);

// Its rows of a description: the kernels that a call runs, with their resources.
Json kernels_json(const CudaMathBackwardBinaries& binaries);

// As prepare_cuda_math, for a request of a backward.
Result<ReadyBackend> prepare_cuda_math_backward(const Request& request);

}  // namespace attnjit::runtime
