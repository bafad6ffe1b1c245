// The eager path on a GPU: scores materialised in float32, both products by cuBLAS, the mod compiled as a pass of its
// own. What "eager" means in GPU reports, and a check on the fused kernels that shares only the mod's code with them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/cublas.h"
#include "runtime/cuda_binaries.h"
#include "runtime/cuda_driver.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

class Context;

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

  // Compiles or finds the kernels, loads them and makes the cuBLAS handle. Of `problem`, shapes and dtypes are used;
  // every extent is positive. The captures of `mod` are those of the calls. ATTNJIT_UNSUPPORTED, with the bare reason,
  // where no call of these shapes can be served; ATTNJIT_ENVIRONMENT without NVRTC or cuBLAS. Appends to `phases` what
  // it spent.
  static Result<std::shared_ptr<const CudaMathPlan>> create(Context& context, std::shared_ptr<CudaDevice> device,
                                                            const ForwardCall& problem, const compiler::ModProblem& mod,
                                                            const compiler::CompileOptions& options,
                                                            compiler::PhaseTimes* phases);
  // From parts that are there, for a problem that refuse() has nothing against.
  CudaMathPlan(const ForwardCall& problem, Parts parts);

  // Why no call of these shapes can be served, on any device; empty where it can.
  static std::string refuse(const ForwardCall& problem);
  // The softmax kernel for rows of so many keys.
  static const char* softmax_entry(std::int64_t seqlen_kv);

  // Bytes, aligned to Cublas::kWorkspaceAlignment.
  std::size_t workspace_size() const { return workspace_size_; }
  // One line per pass.
  std::string describe() const;
  // What the compiler found out about the expression; empty for a plan from parts.
  const compiler::ModFacts& facts() const { return facts_; }
  // The mod's, then that of the other kernels; empty for a plan from parts.
  const std::vector<FoundBinary>& binaries() const { return binaries_; }

  // `call` has the shapes and dtypes of the problem; its data is in the device's memory.
  Check run(const ForwardCall& call, void* workspace, CudaStream stream) const;

 private:
  Check run_scores(const ForwardCall& call, float alpha, char* workspace, CudaStream stream) const;
  Check run_mod(const ForwardCall& call, float factor, char* workspace, CudaStream stream) const;
  Check run_softmax(const ForwardCall& call, char* workspace, CudaStream stream) const;
  Check run_output(const ForwardCall& call, char* workspace, CudaStream stream) const;
  Check run_copy(const TensorView& from, const TensorView& to, CudaStream stream) const;

  Parts parts_;
  dsl::DType dtype_;
  std::int64_t batch_, heads_, heads_kv_, seqlen_q_, seqlen_kv_, head_dim_, head_dim_v_;
  std::int64_t pitch_;  // scores from row to row
  // Offsets in the workspace, which starts with the scores. Copies of q and k, and later of v and o, share their room.
  std::size_t empty_ = 0, q_ = 0, k_ = 0, v_ = 0, o_ = 0, cublas_ = 0;
  std::size_t cublas_size_ = 0, workspace_size_ = 0;
  compiler::ModFacts facts_;
  std::vector<FoundBinary> binaries_;
};

}  // namespace attnjit::runtime
