// The eager path on a GPU: scores materialised in float32, both products by cuBLAS, the mod compiled as a pass of its
// own. What "eager" means in GPU reports, and a check on the fused kernels that shares only the mod's code with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "compiler/compiler.h"
#include "runtime/backends.h"
#include "runtime/cublas.h"
#include "runtime/cuda_binaries.h"
#include "runtime/cuda_driver.h"
#include "runtime/cuda_products.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

// Immutable; may run in several threads at once, each run with its own workspace. A run queues its work and returns; it
// allocates nothing, does not synchronise, and may be captured into a graph, which the plan then has to outlive.
class CudaMathPlan {
 public:
  // What a plan computes with.
  struct Parts {
    std::shared_ptr<const CudaKernel> mod, softmax, zero_rows, copy;  // `softmax`: the entry that softmax_entry() names
    std::shared_ptr<const Cublas> cublas;
    int arch = 0;                  // of the device
    double score_factor = 1.0;     // as compiler::CudaSource's
    bool mod_is_identity = false;  // Mod::kIdentity, and no mask
  };

  // For a problem that refuse() has nothing against: its shapes and dtypes are used. Every extent is positive but that
  // of the keys, which may be 0.
  CudaMathPlan(const ForwardCall& problem, Parts parts);

  // Why no call of these shapes can be served, on any device; empty where it can.
  static std::string refuse(const ForwardCall& problem);
  // The softmax kernel for rows of so many keys.
  static const char* softmax_entry(std::int64_t seqlen_kv);

  // Bytes, aligned to Cublas::kWorkspaceAlignment.
  std::size_t workspace_size() const { return workspace_size_; }
  // One line per pass.
  std::string describe() const;
  // `call` has the shapes and dtypes of the problem; its data is in the device's memory.
  Check run(const ForwardCall& call, void* workspace, CudaStream stream) const;

 private:
  Check run_mod(const ForwardCall& call, float factor, char* workspace, CudaStream stream) const;
  Check run_softmax(const ForwardCall& call, char* workspace, CudaStream stream) const;
  Check run_zero_rows(const ForwardCall& call, char* workspace, CudaStream stream) const;

  Parts parts_;
  CudaProducts products_;
  // Offsets in the workspace, which starts with the scores. Copies of q and k, and later of v and o, share their room.
  std::size_t empty_ = 0, q_ = 0, k_ = 0, v_ = 0, o_ = 0, cublas_ = 0;
  std::size_t workspace_size_ = 0;
};

// The kernels of a call as compiled for an architecture.
struct CudaMathBinaries {
  compiler::ModFacts facts;
  double score_factor = 1.0;
  FoundBinary mod, kernels;
  compiler::PhaseTimes phases;  // of all it took
};
// ATTNJIT_UNSUPPORTED, with the reason alone, where the call cannot be served. `collect` receives every text in between
// of the mod's compile, beside the files; with it the mod is always compiled.
Result<CudaMathBinaries> build_cuda_math(const Request& request, compiler::CudaArch arch, const CollectText& collect);

// Its rows of a description: the kernels that a call runs, with their resources.
Json kernels_json(const CudaMathBinaries& binaries, std::int64_t seqlen_kv);

// Compiles or finds the kernels, loads them on the call's device and makes the cuBLAS handle there.
// ATTNJIT_ENVIRONMENT without NVRTC or cuBLAS.
Result<ReadyBackend> prepare_cuda_math(const Request& request);

}  // namespace attnjit::runtime
