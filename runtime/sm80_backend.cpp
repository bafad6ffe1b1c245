// Problem to configuration, kernel and launch of the sm80 family.
#include "runtime/sm80_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <limits>
#include <memory>
#include <span>
#include <utility>

#include "runtime/autotune.h"
#include "runtime/cuda_call.h"

namespace attnjit::runtime {
namespace {

constexpr std::int64_t kMaxGrid = std::numeric_limits<std::int32_t>::max();
constexpr int kMaxTile = 256;  // of queries or keys

constexpr std::size_t kib(std::size_t n) { return n * 1024; }

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

std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// Blocks of a launch: the tiles of a head side by side, then heads, then batches.
std::int64_t blocks_of(const Signature& s, const sm80::ForwardConfig& config) {
  const std::int64_t tiles = round_up(s.seqlen_q, config.tile_m) / config.tile_m;
  std::int64_t blocks = 0;
  if (__builtin_mul_overflow(tiles, s.num_heads, &blocks) || __builtin_mul_overflow(blocks, s.batch, &blocks)) {
    return std::numeric_limits<std::int64_t>::max();
  }
  return blocks;
}

Failure unsupported(std::string reason) { return {ATTNJIT_UNSUPPORTED, std::move(reason)}; }

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
  const Signature& s = request.call.signature;
  return compiler::emit_sm80_forward(mod_problem(request.mods, request.call, round_up(s.seqlen_q, config.tile_m),
                                                 round_up(s.seqlen_kv, config.tile_n)),
                                     config, options);
}

// Loads the kernel `entry` of a configuration, ready to launch for calls of a signature.
Result<Contestant::Launch> load_kernel(const std::shared_ptr<CudaDevice>& device, const std::string& cubin,
                                       const std::string& entry, const Signature& signature,
                                       const sm80::ForwardConfig& config, double score_factor) {
  Result<std::shared_ptr<const CudaKernel>> kernel =
      CudaKernel::load(device, cubin, entry, static_cast<std::size_t>(sm80::forward_shared_memory(config)));
  if (!kernel) return kernel.failure();
  const CudaKernel::Grid grid{.x = static_cast<unsigned>(blocks_of(signature, config))};
  return Contestant::Launch([kernel = std::move(*kernel), grid, threads = 32u * static_cast<unsigned>(config.warps),
                             score_factor](const ForwardCall& call, CudaStream stream) {
    const cuda::ForwardParams params = forward_params(call, score_factor);
    return kernel->launch(grid, threads, &params, stream);
  });
}

// A candidate other than the usual configuration: one that spills is slower than its tile promises, and left out.
Result<Contestant::Launch> load_candidate(const Request& request, const Sm80Target& target,
                                          const sm80::ForwardConfig& config, bool usual) {
  const auto emitted = emit(request, config, {});
  if (emitted.error) return compile_failure(request.call.signature, emitted.error->message);
  Result<FoundBinary> found = find_cuda_binary(request.context, emitted.value.source, target.arch, {},
                                               usual ? LogLevel::kWarn : LogLevel::kDebug);
  if (!found) return found.failure();
  const std::string& entry = emitted.value.source.entries.front();
  for (const compiler::CudaResources& resources : found->binary->resources) {
    const int spilled = resources.spill_store_bytes + resources.spill_load_bytes;
    if (!usual && resources.entry == entry && spilled > 0) {
      return Failure{ATTNJIT_UNSUPPORTED, fmt::format("it spills {} bytes of registers", spilled)};
    }
  }
  return load_kernel(target.device, found->binary->cubin, entry, request.call.signature, config,
                     emitted.value.source.score_factor);
}

// `usual`: the text of the usual configuration, which tells mods, element types and alignments apart.
Tuned tune(const Request& request, const Sm80Target& target, std::span<const sm80::ForwardConfig> configs,
           const compiler::CudaSource& usual) {
  std::vector<Contestant> contestants;
  for (const sm80::ForwardConfig& config : configs) {
    const bool first = contestants.empty();
    contestants.push_back({config_name(config), [&request, &target, &config, first] {
                             return load_candidate(request, target, config, first);
                           }});
  }
  const Signature& s = request.call.signature;
  std::string_view why_not;
  if (!target.device) {
    why_not = "it is for another machine";
  } else if (no_keys(s)) {
    why_not = "there are no keys";
  } else if (s.autotune == static_cast<std::uint8_t>(AutotuneMode::kStored)) {
    why_not = "a stream is being captured";
  } else if (!target.may_time) {
    why_not = "nothing is stored; attnjit_prepare times candidates";
  }
  return autotune(request, target.device, fmt::format("sm80 {}\n{}", shape_text(s), usual.text), contestants, why_not);
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

std::size_t max_shared_memory(int arch) {
  switch (arch) {
    case 80:
    case 87:
      return kib(163);
    case 90:
    case 100:
    case 103:
    case 110:
      return kib(227);
    default:  // 86, 89, 120, 121, and what is not known
      return kib(99);
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

Result<Sm80Binary> build_sm80(const Request& request, const Sm80Target& target, const CollectText& collect) {
  const Signature& s = request.call.signature;
  const compiler::CudaArch arch = target.arch;
  if (Check failure = check_cuda_arch(arch)) return *failure;
  Sm80Problem by = {.element = sm80_element(static_cast<dsl::DType>(s.dtype)),
                    .head_dim = static_cast<int>(s.head_dim),
                    .head_dim_v = static_cast<int>(s.head_dim_v),
                    .seqlen_q = s.seqlen_q,
                    .seqlen_kv = s.seqlen_kv,
                    .arch = arch.number,
                    .max_shared_memory = target.max_shared_memory,
                    .load_bytes = s.load_bytes,
                    .store_bytes = s.store_bytes,
                    .demand = request.mods.mask_mod ? ModDemand::kBusy : ModDemand::kNone};
  std::optional<sm80::ForwardConfig> config = choose_config(by);
  if (!config) {
    return unsupported(fmt::format("no configuration fits the {} bytes of shared memory of {}",
                                   target.max_shared_memory, compiler::cuda_arch_name(arch)));
  }
  // Positions are 32-bit in the kernel, those behind the end of the last tile included.
  constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max() - kMaxTile;
  if (s.seqlen_q > kLongest || s.seqlen_kv > kLongest) {
    return unsupported(fmt::format("it takes sequences up to {}", kLongest));
  }
  if (const std::int64_t blocks = blocks_of(s, *config); blocks > kMaxGrid) {
    return unsupported(fmt::format("a launch of {} blocks is beyond the {} of a grid", blocks, kMaxGrid));
  }

  compiler::CompileOptions options{.dump = request.files.collector(collect)};
  const bool tunes = s.autotune != static_cast<std::uint8_t>(AutotuneMode::kOff);
  auto emitted = emit(request, *config, tunes ? compiler::CompileOptions() : options);
  if (!emitted.error && emitted.value.demand > by.demand) {
    // Only the compiler sees what the mod demands.
    by.demand = emitted.value.demand;
    const std::optional<sm80::ForwardConfig> other = choose_config(by);
    if (other && (other->tile_m != config->tile_m || other->tile_n != config->tile_n)) {
      config = other;
      emitted = emit(request, *config, tunes ? compiler::CompileOptions() : options);
    }
  }
  if (emitted.error) return compile_failure(s, emitted.error->message);
  std::optional<Tuned> tuned;
  if (tunes) {
    std::vector<sm80::ForwardConfig> candidates = candidate_configs(by);
    const auto too_many = [&](const auto& candidate) { return blocks_of(s, candidate) > kMaxGrid; };
    candidates.erase(std::remove_if(candidates.begin() + 1, candidates.end(), too_many), candidates.end());
    tuned = tune(request, target, candidates, emitted.value.source);
    config = candidates[tuned->winner];
    emitted = emit(request, *config, options);
    if (emitted.error) return compile_failure(s, emitted.error->message);
  }
  // Texts of the emission do not need a compile.
  if (!collect && !request.files.wants("ptx") && !request.files.wants("cubin")) options.dump = nullptr;
  Result<FoundBinary> found = find_cuda_binary(request.context, emitted.value.source, arch, options);
  if (!found) return found.failure();
  Sm80Binary binary{.config = *config,
                    .facts = std::move(emitted.value.facts),
                    .score_factor = emitted.value.source.score_factor,
                    .entry = emitted.value.source.entries.front(),
                    .found = std::move(*found),
                    .phases = std::move(emitted.value.phases),
                    .autotune = tuned ? std::move(tuned->description) : Json()};
  if (tuned && tuned->spent_ms > 0) binary.phases.emplace_back("autotune", tuned->spent_ms);
  binary.phases.insert(binary.phases.end(), binary.found.phases.begin(), binary.found.phases.end());
  return binary;
}

Json kernel_json(const Sm80Binary& binary) {
  const sm80::ForwardConfig& c = binary.config;
  Json json = binary_json(binary.found, binary.entry);
  json["shared_bytes"] = sm80::forward_shared_memory(c);
  json["tile"] = fmt::format("{} x {}", c.tile_m, c.tile_n);
  json["warps"] = c.warps;
  json["stages"] = c.stages;
  json["load_bytes"] = c.load_bytes;
  json["store_bytes"] = c.store_bytes;
  if (!binary.autotune.is_null()) json["autotune"] = binary.autotune;
  json["phases_ms"] = phases_json(binary.phases);
  return json;
}

Result<ReadyBackend> prepare_sm80(const Request& request) {
  Result<std::shared_ptr<CudaDevice>> found = request.context.cuda_device(request.call.signature.device);
  if (!found) return found.failure();
  const std::shared_ptr<CudaDevice>& device = *found;
  Result<Sm80Binary> binary =
      build_sm80(request,
                 {.arch = {.number = device->arch(), .specific = false},
                  .max_shared_memory = std::min(max_shared_memory(device->arch()), device->max_shared_memory()),
                  .device = device,
                  .may_time = true},
                 nullptr);
  if (!binary) return binary.failure();
  Result<Contestant::Launch> launch = load_kernel(device, binary->found.binary->cubin, binary->entry,
                                                  request.call.signature, binary->config, binary->score_factor);
  if (!launch) return launch.failure();

  ReadyBackend ready;
  ready.forward.run = [launch = std::move(*launch)](const ForwardCall& call, void*, CudaStream stream) {
    return launch(call, stream);
  };
  ready.description = {{"device", device->name()},
                       {"hash", hash_text(binary->facts)},
                       {"facts", facts_json(binary->facts)},
                       {"kernels", Json::array({kernel_json(*binary)})}};
  ready.phases = std::move(binary->phases);
  return ready;
}

}  // namespace attnjit::runtime
