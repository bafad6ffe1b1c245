// Problem to configuration, kernel and launch of the sm80 family.
#include "runtime/sm80_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <memory>
#include <span>
#include <utility>

#include "runtime/cuda_call.h"

namespace attnjit::runtime {
namespace {

using compiler::ModDemand;

// A way to cut the work, for problems whose padded head dims are at most `head_dim` and mods that demand at most
// `demand`: of others it would spill registers.
struct Tiling {
  int head_dim;
  ModDemand demand;
  int tile_m, tile_n, warps, stages;
  bool q_in_registers = false;
};

// By rising head_dim, and of one head_dim the best first: the first that fits is taken. Measured on an H200, bf16
// (bench/notes.md, "The sm80 family's forward kernel"): 32 rows to a warp as long as O leaves room for it.
constexpr Tiling k16Bit[] = {
    {.head_dim = 64,
     .demand = ModDemand::kBusy,
     .tile_m = 128,
     .tile_n = 64,
     .warps = 4,
     .stages = 2,
     .q_in_registers = true},
    {.head_dim = 64, .demand = ModDemand::kDense, .tile_m = 128, .tile_n = 32, .warps = 4, .stages = 2},
    {.head_dim = 64,
     .demand = ModDemand::kDense,
     .tile_m = 64,
     .tile_n = 64,
     .warps = 4,
     .stages = 1,
     .q_in_registers = true},
    {.head_dim = 96, .demand = ModDemand::kDense, .tile_m = 128, .tile_n = 48, .warps = 4, .stages = 2},
    {.head_dim = 96, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 48, .warps = 4, .stages = 1},
    // O and the scores are 192 registers of 255.
    {.head_dim = 128, .demand = ModDemand::kNone, .tile_m = 128, .tile_n = 64, .warps = 4, .stages = 1},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 128, .tile_n = 32, .warps = 4, .stages = 2},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 64, .warps = 4, .stages = 1},
    {.head_dim = 192, .demand = ModDemand::kNone, .tile_m = 64, .tile_n = 48, .warps = 4, .stages = 1},
    {.head_dim = 192, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 32, .warps = 4, .stages = 1},
    // Fills the 99 KiB of sm_86, sm_89 and sm_120 to the byte.
    {.head_dim = 256, .demand = ModDemand::kNone, .tile_m = 64, .tile_n = 64, .warps = 4, .stages = 1},
    {.head_dim = 256, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 48, .warps = 4, .stages = 1},
};
// Probabilities pass through shared memory, and rows are twice as wide.
constexpr Tiling kF32[] = {
    {.head_dim = 64, .demand = ModDemand::kDense, .tile_m = 128, .tile_n = 64, .warps = 4, .stages = 1},
    {.head_dim = 64, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 64, .warps = 4, .stages = 1},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 128, .tile_n = 16, .warps = 4, .stages = 1},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 32, .warps = 4, .stages = 1},
    {.head_dim = 256, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 16, .warps = 4, .stages = 1},
    {.head_dim = 256, .demand = ModDemand::kDense, .tile_m = 32, .tile_n = 16, .warps = 2, .stages = 1},
};

// Blocks of a launch: the tiles of a head side by side, then heads, then batches.
std::int64_t blocks_of(const Signature& s, const sm80::ForwardConfig& config) {
  return query_tiles(s.batch * s.num_heads, s.seqlen_q, config.tile_m);
}

bool fits(const sm80::ForwardConfig& config, const Sm80Problem& problem) {
  return static_cast<std::size_t>(sm80::forward_shared_memory(config)) <= problem.max_shared_memory;
}

// The configurations of the table that serve a problem, the best first.
std::vector<sm80::ForwardConfig> serving_configs(const Sm80Problem& problem) {
  const bool f32 = problem.element == sm80::Element::kF32;
  const int head_dim = std::max(sm80::padded(problem.head_dim), sm80::padded(problem.head_dim_v));
  std::vector<sm80::ForwardConfig> serving;
  int bracket = 0;  // the smallest one that holds the head dim
  for (const Tiling& row : f32 ? std::span<const Tiling>(kF32) : std::span<const Tiling>(k16Bit)) {
    if (row.head_dim < head_dim || (bracket != 0 && row.head_dim != bracket)) continue;
    if (row.demand < problem.demand) continue;
    const sm80::ForwardConfig config{.element = problem.element,
                                     .head_dim = problem.head_dim,
                                     .head_dim_v = problem.head_dim_v,
                                     .tile_m = row.tile_m,
                                     .tile_n = row.tile_n,
                                     .warps = row.warps,
                                     .stages = row.stages,
                                     .q_in_registers = row.q_in_registers,
                                     .load_bytes = problem.load_bytes,
                                     .store_bytes = problem.store_bytes};
    if (!fits(config, problem)) continue;
    bracket = row.head_dim;
    serving.push_back(config);
  }
  return serving;
}

compiler::CompileResult<compiler::EmittedCuda> emit(const Request& request, const sm80::ForwardConfig& config,
                                                    const compiler::CompileOptions& options) {
  return emit_summarised(
      tiled_problem(request, config.tile_m, config.tile_n),
      [&](const compiler::ModProblem& problem) { return compiler::emit_sm80_forward(problem, config, options); });
}

Result<FusedLaunch> load(const std::shared_ptr<CudaDevice>& device, const KernelCode& code, const Signature& signature,
                         const sm80::ForwardConfig& config) {
  Result<std::shared_ptr<const CudaKernel>> kernel =
      CudaKernel::load(device, code.cubin, code.entry, static_cast<std::size_t>(sm80::forward_shared_memory(config)));
  if (!kernel) return kernel.failure();
  const CudaKernel::Grid grid{.x = static_cast<unsigned>(blocks_of(signature, config))};
  return FusedLaunch([kernel = std::move(*kernel), grid, threads = 32u * static_cast<unsigned>(config.warps),
                      score_factor = code.score_factor, summaries = code.summaries](
                         const ForwardCall& call, void* workspace, CudaStream stream) -> Check {
    cuda::ForwardParams params = forward_params(call, score_factor);
    if (summaries) {
      summaries->fill_views(call, workspace, params.captured);
      if (Check failure = summaries->fill(call, workspace, stream)) return failure;
    }
    return kernel->launch(grid, threads, &params, stream);
  });
}

Json describe(const sm80::ForwardConfig& c) {
  return {{"shared_bytes", sm80::forward_shared_memory(c)},
          {"tile", fmt::format("{} x {}", c.tile_m, c.tile_n)},
          {"warps", c.warps},
          {"stages", c.stages},
          {"load_bytes", c.load_bytes},
          {"store_bytes", c.store_bytes}};
}

FusedKernel kernel_of(const Request& request, const sm80::ForwardConfig& config) {
  return {config_name(config),
          describe(config),
          config.tile_m,
          config.tile_n,
          [&request, config](const compiler::CompileOptions& options) { return emit(request, config, options); },
          [&request, config](const std::shared_ptr<CudaDevice>& device, const KernelCode& code) {
            return load(device, code, request.call.signature, config);
          }};
}

}  // namespace

sm80::Element sm80_element(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kF16:
      return sm80::Element::kF16;
    case dsl::DType::kBF16:
      return sm80::Element::kBF16;
    default:
      return sm80::Element::kF32;
  }
}

std::optional<sm80::ForwardConfig> choose_config(const Sm80Problem& problem) {
  std::optional<sm80::ForwardConfig> found;
  for (const sm80::ForwardConfig& config : serving_configs(problem)) {
    // A smaller tile where it holds all queries: most of a larger one would be padding.
    if (!found || (found->tile_m > config.tile_m && problem.seqlen_q <= config.tile_m)) found = config;
  }
  return found;
}

std::string config_name(const sm80::ForwardConfig& config) {
  return fmt::format("{} x {}, {} warps, {} stage{}{}", config.tile_m, config.tile_n, config.warps, config.stages,
                     config.stages == 1 ? "" : "s", config.q_in_registers ? ", Q in registers" : "");
}

std::vector<sm80::ForwardConfig> candidate_configs(const Sm80Problem& problem) {
  constexpr std::size_t kMost = 6;
  constexpr std::array kTileN = {16, 32, 48, 64, 96, 128};
  const std::optional<sm80::ForwardConfig> chosen = choose_config(problem);
  if (!chosen) return {};
  std::vector<sm80::ForwardConfig> candidates = {*chosen};
  const auto add = [&](const sm80::ForwardConfig& config) {
    const auto same = [&](const sm80::ForwardConfig& other) { return config_name(other) == config_name(config); };
    if (candidates.size() < kMost && fits(config, problem) && std::ranges::none_of(candidates, same)) {
      candidates.push_back(config);
    }
  };
  const auto neighbour = [&](int stages, int tile_n) {
    sm80::ForwardConfig config = *chosen;
    config.stages = stages;
    config.tile_n = tile_n;
    add(config);
  };
  for (const sm80::ForwardConfig& config : serving_configs(problem)) add(config);
  neighbour(3 - chosen->stages, chosen->tile_n);
  const auto at = std::ranges::lower_bound(kTileN, chosen->tile_n);
  if (at != kTileN.begin()) neighbour(chosen->stages, at[-1]);
  if (at != kTileN.end() && at + 1 != kTileN.end()) neighbour(chosen->stages, at[1]);
  return candidates;
}

Result<FusedBinary> build_sm80(const Request& request, const FusedTarget& target, const CollectText& collect) {
  const Signature& s = request.call.signature;
  if (Check failure = check_cuda_arch(target.arch)) return *failure;
  Sm80Problem by = {.element = sm80_element(static_cast<dsl::DType>(s.dtype)),
                    .head_dim = static_cast<int>(s.head_dim),
                    .head_dim_v = static_cast<int>(s.head_dim_v),
                    .seqlen_q = s.seqlen_q,
                    .seqlen_kv = s.seqlen_kv,
                    .arch = target.arch.number,
                    .max_shared_memory = target.max_shared_memory,
                    .load_bytes = s.load_bytes,
                    .store_bytes = s.store_bytes,
                    .demand = request.mods.mask_mod ? ModDemand::kBusy : ModDemand::kNone};
  std::optional<sm80::ForwardConfig> config = choose_config(by);
  if (!config) return no_configuration(target);
  if (Check failure = check_lengths(s)) return *failure;
  const auto too_many = [&](const sm80::ForwardConfig& of) { return blocks_of(s, of) > kMaxGrid; };
  if (too_many(*config)) {
    return unsupported(
        fmt::format("a launch of {} blocks is beyond the {} of a grid", blocks_of(s, *config), kMaxGrid));
  }

  auto emitted = emit(request, *config, {});
  if (!emitted.error && emitted.value.demand > by.demand) {
    // Only the compiler sees what the mod demands.
    by.demand = emitted.value.demand;
    const std::optional<sm80::ForwardConfig> other = choose_config(by);
    if (other && (other->tile_m != config->tile_m || other->tile_n != config->tile_n)) {
      config = other;
      emitted = emit(request, *config, {});
    }
  }
  if (emitted.error) return compile_failure(s, emitted.error->message);
  std::vector<sm80::ForwardConfig> candidates = {*config};
  if (s.autotune != static_cast<std::uint8_t>(AutotuneMode::kOff)) candidates = candidate_configs(by);
  candidates.erase(std::remove_if(candidates.begin() + 1, candidates.end(), too_many), candidates.end());
  std::vector<FusedKernel> kernels;
  kernels.reserve(candidates.size());
  for (const sm80::ForwardConfig& candidate : candidates) kernels.push_back(kernel_of(request, candidate));
  return build_fused(request, target, "sm80", std::move(kernels), std::move(emitted.value), collect);
}

Result<ReadyBackend> prepare_sm80(const Request& request) { return prepare_fused(request, build_sm80); }

}  // namespace attnjit::runtime
