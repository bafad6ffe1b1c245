// Where gradients of captured tensors are added up on a GPU, and how they come from there into their tensors.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "kernels_templates/cuda/params.h"
#include "runtime/backends.h"
#include "runtime/backward.h"
#include "runtime/binary_cache.h"
#include "runtime/cuda_driver.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// The kernel that brings sums to their tensors, where captured gradients are wanted: compiles or finds it, and adds
// what that took to `phases`.
Result<std::optional<FoundBinary>> find_finish_kernel(const Request& request, compiler::CudaArch arch,
                                                      compiler::PhaseTimes* phases);
// Its row of a description, added to `kernels`.
void add_finish_kernel(const std::optional<FoundBinary>& finish, Json* kernels);

// The sums of one problem: in floats, or in a deterministic run in exact accumulators, which take 80 bytes for an
// element, but for tensors that are only stored to.
class CudaGradientSums {
 public:
  // `wanted`: captures, a bit by number. `sinks` of the compiled problem.
  CudaGradientSums(const ForwardCall& problem, std::uint32_t wanted, const std::vector<compiler::SinkFacts>& sinks,
                   bool deterministic);

  std::size_t size() const { return size_; }  // of the memory they need, in bytes, aligned to 256
  // A line for each.
  std::string describe() const;
  // Before the rest. `finish`: of find_finish_kernel, for this problem.
  Check load(std::shared_ptr<CudaDevice> device, const std::optional<FoundBinary>& finish);
  void use(std::shared_ptr<CudaDevice> device, std::shared_ptr<const CudaKernel> finish);

  // Stream-ordered, in this order around the kernels that add. `memory` is aligned to 256 bytes.
  Check clear(void* memory, CudaStream stream) const;
  void fill_views(void* memory, cuda::GradientView* views) const;
  Check finish(const ForwardCall& call, const Gradients& gradients, void* memory, CudaStream stream) const;

 private:
  struct Sum {
    std::size_t capture = 0;
    std::size_t offset = 0;  // in the memory
    std::int64_t elements = 1;
    bool accumulators = false;
    std::int64_t stride[dsl::kMaxRank] = {};
  };

  std::vector<Sum> sums_;
  std::size_t size_ = 0;
  std::shared_ptr<CudaDevice> device_;
  std::shared_ptr<const CudaKernel> kernel_;
};

}  // namespace attnjit::runtime
