// The fused forward pass on CUDA devices of compute capability 9.0: copies by TMA, products by wgmma.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/backends.h"
#include "runtime/fused.h"

namespace attnjit::runtime {

inline constexpr int kUsualSms = 132;  // multiprocessors of an H100 or H200, as far as none is there to ask

// What a configuration is chosen by.
struct Sm90Problem {
  sm90::Element element = sm90::Element::kBF16;
  int head_dim = 64, head_dim_v = 64;
  std::int64_t heads = 1;  // of q, in all batches
  std::int64_t seqlen_q = 0, seqlen_kv = 0;
  int num_sms = kUsualSms;
  std::size_t max_shared_memory = 0;
  bool has_row_max = false;
  bool has_mask = false;  // some element may be dropped
  bool drifts = false;    // compiler::FoldedFacts::drifts
  // What takes registers beside a mask: captured reads in a nonlinear mod, or many comparisons by captured values; an
  // element of its own for each score.
  bool has_busy_mask = false, has_dense_mask = false;
  bool summarised = false;  // captured values decide which tiles the mask drops
  // The mod is more than a product and a sum of each score, as a soft cap: special functions, and nothing read.
  bool nonlinear = false;
  bool bounded = false;  // as ForwardConfig's
  // Nonlinear or linear along the keys, and no score is dropped: registers are not what the mod is short of.
  bool arithmetic = false;
};
// Nothing where no configuration fits the shared memory.
std::optional<sm90::ForwardConfig> choose_config(const Sm90Problem& problem);
// Adds what only the compiler sees of a mod.
void learn(const compiler::EmittedCuda& emitted, Sm90Problem* problem);
// What autotuning tries: that one first, then others of its head dims and its neighbours; at most 6. Those beyond the
// table may spill registers.
std::vector<sm90::ForwardConfig> candidate_configs(const Sm90Problem& problem);
// "256 x 64, 4 warpgroups, 4 stages, next Q meanwhile, ping-pong".
std::string config_name(const sm90::ForwardConfig& config);

// Which block computes which tiles of queries, in what order: as blocks would take them from a common list, in its
// order, if each took as long as `cost` says. (rounds, blocks), -1 where a block has no more.
std::vector<int> make_schedule(std::span<const int> costs, int blocks);

// As build_fused; ATTNJIT_UNSUPPORTED, with the reason alone, where the family does not serve the call.
Result<FusedBinary> build_sm90(const Request& request, const FusedTarget& target, const CollectText& collect);
// Why it serves no backward.
Failure refuse_sm90_backward();

// Compiles, or finds, and loads the kernel on the call's device.
Result<ReadyBackend> prepare_sm90(const Request& request);

}  // namespace attnjit::runtime
