// The fused forward pass on CUDA devices of compute capability 8.0 and later.
#pragma once

#include <cstddef>
#include <optional>

#include "compiler/compiler.h"
#include "runtime/backends.h"
#include "runtime/cuda_binaries.h"

namespace attnjit::runtime {

// Dynamic shared memory that one block may have on an architecture, in bytes.
std::size_t max_shared_memory(int arch);

// What a configuration is chosen by.
struct Sm80Problem {
  sm80::Element element = sm80::Element::kBF16;
  int head_dim = 64, head_dim_v = 64;
  std::int64_t seqlen_q = 0, seqlen_kv = 0;
  int arch = 80;
  std::size_t max_shared_memory = 0;
  int load_bytes = kWidestAccess, store_bytes = kWidestAccess;
  compiler::ModDemand demand = compiler::ModDemand::kNone;
};
// Nothing where no configuration fits the shared memory.
std::optional<sm80::ForwardConfig> choose_config(const Sm80Problem& problem);

// The kernel of a call as compiled for an architecture.
struct Sm80Binary {
  sm80::ForwardConfig config;
  compiler::ModFacts facts;
  double score_factor = 1.0;
  std::string entry;
  FoundBinary found;
  compiler::PhaseTimes phases;  // of all it took
};
// ATTNJIT_UNSUPPORTED, with the reason alone, where the family does not serve the call. `collect` receives every text
// in between, beside the files; with it the kernel is always compiled.
Result<Sm80Binary> build_sm80(const Request& request, compiler::CudaArch arch, std::size_t max_shared_memory,
                              const CollectText& collect);

// Its row of a description: resources, configuration, where it was found.
Json kernel_json(const Sm80Binary& binary);

// Compiles, or finds, and loads the kernel on the call's device.
Result<ReadyBackend> prepare_sm80(const Request& request);

}  // namespace attnjit::runtime
