// The fused forward pass on CUDA devices of compute capability 8.0 and later.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/backends.h"
#include "runtime/cuda_binaries.h"

namespace attnjit::runtime {

sm80::Element sm80_element(dsl::DType dtype);  // of q, k, v and o

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
// What autotuning tries: that one first, then others of its head dims and its neighbours; at most 6. Those beyond the
// table may spill registers.
std::vector<sm80::ForwardConfig> candidate_configs(const Sm80Problem& problem);
// "128 x 64, 4 warps, 2 stages, Q in registers".
std::string config_name(const sm80::ForwardConfig& config);

// What a kernel is built for.
struct Sm80Target {
  compiler::CudaArch arch;
  std::size_t max_shared_memory = 0;
  std::shared_ptr<CudaDevice> device = nullptr;  // whose winners are taken where the call asks for autotuning
  bool may_time = false;                         // there
};

// The kernel of a call as compiled for an architecture.
struct Sm80Binary {
  sm80::ForwardConfig config;
  compiler::ModFacts facts;
  double score_factor = 1.0;
  std::string entry;
  FoundBinary found;
  compiler::PhaseTimes phases;  // of all it took
  Json autotune;                // how `config` was found, where that was asked for
};
// ATTNJIT_UNSUPPORTED, with the reason alone, where the family does not serve the call. `collect` receives every text
// in between, beside the files; with it the kernel is always compiled.
Result<Sm80Binary> build_sm80(const Request& request, const Sm80Target& target, const CollectText& collect);

// Its row of a description: resources, configuration, where it was found.
Json kernel_json(const Sm80Binary& binary);

// Compiles, or finds, and loads the kernel on the call's device.
Result<ReadyBackend> prepare_sm80(const Request& request);

}  // namespace attnjit::runtime
