// The fused forward pass on CUDA devices of compute capability 8.0 and later.
#pragma once

#include <cstddef>
#include <optional>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/backends.h"
#include "runtime/fused.h"

namespace attnjit::runtime {

sm80::Element sm80_element(dsl::DType dtype);  // of q, k, v and o

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

// As build_fused; ATTNJIT_UNSUPPORTED, with the reason alone, where the family does not serve the call.
Result<FusedBinary> build_sm80(const Request& request, const FusedTarget& target, const CollectText& collect);

// Compiles, or finds, and loads the kernel on the call's device.
Result<ReadyBackend> prepare_sm80(const Request& request);

}  // namespace attnjit::runtime
