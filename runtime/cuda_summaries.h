// Tables of captured values' extremes on a GPU: their memory, and the kernel that fills them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "compiler/compiler.h"
#include "kernels_templates/cuda/params.h"
#include "runtime/backends.h"
#include "runtime/binary_cache.h"
#include "runtime/cuda_driver.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// Emits a mod that is given summaries, or none where their tables would be too large.
compiler::CompileResult<compiler::EmittedCuda> emit_summarised(
    compiler::ModProblem problem,
    const std::function<compiler::CompileResult<compiler::EmittedCuda>(const compiler::ModProblem&)>& emit);

// The kernel that fills the tables, where `facts` ask for any: compiles or finds it, and adds what that took to
// `phases`.
Result<std::optional<FoundBinary>> find_summary_kernel(const Request& request, const compiler::ModFacts& facts,
                                                       compiler::CudaArch arch, compiler::PhaseTimes* phases);
// Its row of a description.
Json summary_kernel_json(const FoundBinary& found);

// The tables of one compiled mod, for calls of a signature.
class CudaSummaries {
 public:
  static Result<std::shared_ptr<const CudaSummaries>> load(const std::shared_ptr<CudaDevice>& device,
                                                           const FoundBinary& found,
                                                           const compiler::ModProblem& problem,
                                                           const std::vector<compiler::TileSummary>& summaries);

  std::size_t size() const { return size_; }  // of the memory they need, in bytes, aligned to 256
  // Launches the kernel, which sets counter(memory) to 0, too. `memory` is aligned to 256 bytes.
  Check fill(const ForwardCall& call, void* memory, CudaStream stream) const;
  // The views behind those of the call's captures.
  void fill_views(const ForwardCall& call, void* memory, cuda::CapturedView* views) const;
  // For blocks of the kernel behind to take their work off.
  int* counter(void* memory) const { return reinterpret_cast<int*>(static_cast<char*>(memory) + counter_at_); }

 private:
  struct Table {
    compiler::TileSummary of;
    std::vector<std::int64_t> extents;
    std::size_t offset = 0;  // in the memory
  };

  std::vector<Table> tables_;
  std::size_t size_ = 0, counter_at_ = 0;
  std::shared_ptr<const CudaKernel> kernel_;
};

}  // namespace attnjit::runtime
