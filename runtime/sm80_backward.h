// The fused backward pass on CUDA devices of compute capability 8.0 and later.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/backends.h"
#include "runtime/fused.h"
#include "runtime/sm80_backend.h"

namespace attnjit::runtime {

// What a configuration is chosen by.
struct Sm80BackwardProblem {
  sm80::Element element = sm80::Element::kBF16;
  int head_dim = 64, head_dim_v = 64;
  std::size_t max_shared_memory = 0;
  int load_bytes = kWidestAccess, store_bytes = kWidestAccess;
  bool wants_dq = true, wants_dk = true, wants_dv = true;
  bool deterministic = false;
  compiler::ModDemand demand = compiler::ModDemand::kNone;
  std::vector<compiler::SinkFacts> sinks;
};
// Nothing where no configuration fits the shared memory.
std::optional<sm80::BackwardConfig> choose_backward_config(const Sm80BackwardProblem& problem);
// "64 x 128, 8 warps, 64 queries at once, 2 stages, 1 slice".
std::string config_name(const sm80::BackwardConfig& config);
// Adds what only the compiler sees of a mod: what it demands, and what is summed.
void learn(const compiler::EmittedCuda& emitted, Sm80BackwardProblem* problem);
// Of the main kernel, dynamic, in bytes.
std::size_t backward_shared_memory(const sm80::BackwardConfig& config, const std::vector<compiler::SinkFacts>& sinks);

// What a launch needs beside the tensors; sizes and offsets in bytes.
struct Sm80BackwardWorkspace {
  int splits = 1;                                   // sums of dq
  std::size_t row_delta = 0, dq_sum = 0, sums = 0;  // row_lse comes first, the sums of captured gradients last
  std::size_t size = 0;
};
// `sums`: bytes for captured gradients. Where the call is deterministic, `num_sms` decides how often dq is split.
Sm80BackwardWorkspace backward_workspace(const Signature& signature, const sm80::BackwardConfig& config, int num_sms,
                                         std::size_t sums);

// The kernels of a call as compiled for an architecture.
struct Sm80BackwardBinary {
  sm80::BackwardConfig config;
  compiler::ModFacts facts;
  FoundBinary found;
  std::optional<FoundBinary> finish;     // of captured gradients
  std::optional<FoundBinary> summaries;  // the kernel that runs before
  compiler::PhaseTimes phases;           // of all it took
};
// As build_sm80.
Result<Sm80BackwardBinary> build_sm80_backward(const Request& request, const FusedTarget& target,
                                               const CollectText& collect);

// Their rows of a description.
Json kernels_json(const Sm80BackwardBinary& binary);

// Compiles, or finds, and loads the kernels on the call's device.
Result<ReadyBackend> prepare_sm80_backward(const Request& request);

}  // namespace attnjit::runtime
