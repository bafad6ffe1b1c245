// Builds and tunes kernels of any family.
#include "runtime/fused.h"

#include <fmt/format.h>

#include <algorithm>
#include <span>
#include <utility>
#include <vector>

#include "runtime/context.h"

namespace attnjit::runtime {
namespace {

constexpr int kMaxTile = 256;  // of queries or keys

constexpr std::size_t kib(std::size_t n) { return n * 1024; }

// Null where the mod asks for none.
Result<std::shared_ptr<const CudaSummaries>> load_summaries(const Request& request, const FusedTarget& target,
                                                            const compiler::ModFacts& facts) {
  compiler::PhaseTimes phases;
  const Result<std::optional<FoundBinary>> found = find_summary_kernel(request, facts, target.arch, &phases);
  if (!found) return found.failure();
  if (!*found) return std::shared_ptr<const CudaSummaries>();
  return CudaSummaries::load(target.device, **found, tiled_problem(request, 1, 1), facts.summaries);
}

// A candidate other than the usual configuration: one that spills is slower than its tile promises, and left out.
Result<Contestant::Launch> load_candidate(const Request& request, const FusedTarget& target, const FusedKernel& kernel,
                                          bool usual) {
  const auto emitted = kernel.emit({});
  if (emitted.error) return compile_failure(request.call.signature, emitted.error->message);
  const compiler::CudaSource& source = emitted.value.source;
  Result<FoundBinary> found =
      find_cuda_binary(request.context, source, target.arch, {}, usual ? LogLevel::kWarn : LogLevel::kDebug);
  if (!found) return found.failure();
  const std::string& entry = source.entries.front();
  for (const compiler::CudaResources& resources : found->binary->resources) {
    const int spilled = resources.spill_store_bytes + resources.spill_load_bytes;
    if (!usual && resources.entry == entry && spilled > 0) {
      return unsupported(fmt::format("it spills {} bytes of registers", spilled));
    }
  }
  Result<std::shared_ptr<const CudaSummaries>> summaries = load_summaries(request, target, emitted.value.facts);
  if (!summaries) return summaries.failure();
  std::shared_ptr<CudaWorkbench> bench;
  void* workspace = nullptr;
  if (*summaries) {
    Result<std::unique_ptr<CudaWorkbench>> created = CudaWorkbench::create(target.device);
    if (!created) return created.failure();
    bench = std::move(*created);
    Result<void*> memory = bench->allocate((*summaries)->size());
    if (!memory) return memory.failure();
    workspace = *memory;
  }
  Result<FusedLaunch> launch =
      kernel.load(target.device, {found->binary->cubin, entry, source.score_factor, std::move(*summaries)});
  if (!launch) return launch.failure();
  return Contestant::Launch(
      [bench = std::move(bench), workspace, launch = std::move(*launch)](const ForwardCall& call, CudaStream stream) {
        return launch(call, workspace, stream);
      });
}

// `usual`: the text of the usual configuration, which tells mods, element types and alignments apart.
Tuned tune(const Request& request, const FusedTarget& target, std::string_view family,
           std::span<const FusedKernel> kernels, const compiler::EmittedCuda& usual) {
  std::vector<Contestant> contestants;
  for (const FusedKernel& kernel : kernels) {
    const bool first = contestants.empty();
    contestants.push_back(
        {kernel.name, [&request, &target, &kernel, first] { return load_candidate(request, target, kernel, first); }});
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
  return autotune(request, target.device, fmt::format("{} {}\n{}", family, shape_text(s), usual.source.text),
                  contestants, why_not, usual.facts.summaries);
}

}  // namespace

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

FusedTarget make_target(compiler::CudaArch arch, std::shared_ptr<CudaDevice> device, bool may_time) {
  std::size_t shared_memory = max_shared_memory(arch.number);
  if (device) shared_memory = std::min(shared_memory, device->max_shared_memory());
  return {.arch = arch, .max_shared_memory = shared_memory, .device = std::move(device), .may_time = may_time};
}

Result<FusedTarget> device_target(const Request& request) {
  Result<std::shared_ptr<CudaDevice>> device = request.context.cuda_device(request.call.signature.device);
  if (!device) return device.failure();
  const int arch = (*device)->arch();
  return make_target({.number = arch, .specific = false}, std::move(*device), true);
}

Failure unsupported(std::string reason) { return {ATTNJIT_UNSUPPORTED, std::move(reason)}; }

Failure no_configuration(const FusedTarget& target) {
  return unsupported(fmt::format("no configuration fits the {} bytes of shared memory of {}", target.max_shared_memory,
                                 compiler::cuda_arch_name(target.arch)));
}

Check check_lengths(const Signature& s) {
  constexpr std::int64_t kLongest = std::numeric_limits<std::int32_t>::max() - kMaxTile;
  if (s.seqlen_q <= kLongest && s.seqlen_kv <= kLongest) return {};
  return unsupported(fmt::format("it takes sequences up to {}", kLongest));
}

std::int64_t query_tiles(std::int64_t heads, std::int64_t seqlen_q, int tile_m) {
  std::int64_t tiles = 0;
  if (__builtin_mul_overflow(round_up(seqlen_q, tile_m) / tile_m, heads, &tiles)) {
    return std::numeric_limits<std::int64_t>::max();
  }
  return tiles;
}

compiler::ModProblem tiled_problem(const Request& request, int tile_m, int tile_n) {
  const Signature& s = request.call.signature;
  return mod_problem(request.mods, request.call, round_up(s.seqlen_q, tile_m), round_up(s.seqlen_kv, tile_n));
}

std::optional<KnownTiles> KnownTiles::find(const Request& request, int tile_m, int tile_n) {
  auto compiled = compiler::compile_cpu_tile_facts(tiled_problem(request, tile_m, tile_n),
                                                   {.isa = request.context.cpu_isa(), .dump = nullptr});
  if (compiled.error || !compiled.value) return std::nullopt;
  KnownTiles tiles;
  tiles.facts_ = std::move(compiled.value);
  const Signature& s = request.call.signature;
  tiles.tile_m_ = tile_m;
  tiles.tile_n_ = tile_n;
  tiles.m_tiles_ = round_up(s.seqlen_q, tile_m) / tile_m;
  tiles.n_tiles_ = round_up(s.seqlen_kv, tile_n) / tile_n;
  tiles.seqlen_q_ = s.seqlen_q;
  tiles.seqlen_kv_ = s.seqlen_kv;
  return tiles;
}

void KnownTiles::Counts::add(cpu::TileKind kind) {
  full += kind == cpu::TileKind::kFull;
  partial += kind == cpu::TileKind::kPartial;
}

cpu::Tile KnownTiles::whole(std::int64_t b, std::int64_t h) const {
  return {.b = b,
          .h_first = h,
          .h_last = h,
          .q_first = 0,
          .q_last = seqlen_q_ - 1,
          .kv_first = 0,
          .kv_last = seqlen_kv_ - 1};
}

KnownTiles::Counts KnownTiles::count_along(const Axis& axis, cpu::Tile tile) const {
  cpu::IndexRange range = {tile.*axis.first, tile.*axis.last};
  if (axis.range) axis.range(&tile, nullptr, &range);
  const long long end = tile.*axis.last;
  Counts counts;
  for (long long i = range.first / axis.step; range.first <= range.last && i <= range.last / axis.step; ++i) {
    tile.*axis.first = i * axis.step;
    tile.*axis.last = std::min(tile.*axis.first + axis.step - 1, end);
    counts.add(facts_->kind(&tile, nullptr));
  }
  return counts;
}

KnownTiles::Counts KnownTiles::count(std::int64_t b, std::int64_t h, std::int64_t m) const {
  cpu::Tile tile = whole(b, h);
  tile.q_first = m * tile_m_;
  tile.q_last = std::min<long long>(tile.q_first + tile_m_, seqlen_q_) - 1;
  return count_along({&cpu::Tile::kv_first, &cpu::Tile::kv_last, tile_n_, facts_->kv_range}, tile);
}

KnownTiles::Counts KnownTiles::count_queries(std::int64_t b, std::int64_t h, std::int64_t n) const {
  cpu::Tile tile = whole(b, h);
  tile.kv_first = n * tile_n_;
  tile.kv_last = std::min<long long>(tile.kv_first + tile_n_, seqlen_kv_) - 1;
  return count_along({&cpu::Tile::q_first, &cpu::Tile::q_last, tile_m_, facts_->q_range}, tile);
}

Result<FusedBinary> build_fused(const Request& request, const FusedTarget& target, std::string_view family,
                                std::vector<FusedKernel> kernels, compiler::EmittedCuda usual,
                                const CollectText& collect) {
  Tuned tuned;
  if (request.call.signature.autotune != static_cast<std::uint8_t>(AutotuneMode::kOff)) {
    tuned = tune(request, target, family, kernels, usual);
  }
  FusedBinary binary{.kernel = std::move(kernels[tuned.winner]), .autotune = std::move(tuned.description)};
  compiler::CompileOptions options{.dump = request.files.collector(collect)};
  // What is dumped is what is compiled.
  if (tuned.winner != 0 || options.dump) {
    auto emitted = binary.kernel.emit(options);
    if (emitted.error) return compile_failure(request.call.signature, emitted.error->message);
    usual = std::move(emitted.value);
  }
  options.dump = binary_dumps(request, collect);
  Result<FoundBinary> found = find_cuda_binary(request.context, usual.source, target.arch, options);
  if (!found) return found.failure();
  binary.facts = std::move(usual.facts);
  binary.score_factor = usual.source.score_factor;
  binary.entry = usual.source.entries.front();
  binary.found = std::move(*found);
  binary.phases = std::move(usual.phases);
  if (tuned.spent_ms > 0) binary.phases.emplace_back("autotune", tuned.spent_ms);
  binary.phases.insert(binary.phases.end(), binary.found.phases.begin(), binary.found.phases.end());
  Result<std::optional<FoundBinary>> summaries =
      find_summary_kernel(request, binary.facts, target.arch, &binary.phases);
  if (!summaries) return summaries.failure();
  binary.summaries = std::move(*summaries);
  return binary;
}

Json kernels_json(const FusedBinary& binary) {
  Json json = binary_json(binary.found, binary.entry);
  json.update(binary.kernel.description);
  if (!binary.autotune.is_null()) json["autotune"] = binary.autotune;
  json["phases_ms"] = phases_json(binary.phases);
  Json kernels = Json::array({std::move(json)});
  if (binary.summaries) kernels.push_back(summary_kernel_json(*binary.summaries));
  return kernels;
}

Result<ReadyBackend> prepare_fused(const Request& request,
                                   Result<FusedBinary> (*build)(const Request&, const FusedTarget&,
                                                                const CollectText&)) {
  const Result<FusedTarget> target = device_target(request);
  if (!target) return target.failure();
  Result<FusedBinary> binary = build(request, *target, nullptr);
  if (!binary) return binary.failure();
  std::shared_ptr<const CudaSummaries> summaries;
  if (const std::optional<FoundBinary>& found = binary->summaries) {
    auto loaded = CudaSummaries::load(target->device, *found, tiled_problem(request, 1, 1), binary->facts.summaries);
    if (!loaded) return loaded.failure();
    summaries = std::move(*loaded);
  }
  Result<FusedLaunch> launch = binary->kernel.load(
      target->device, {binary->found.binary->cubin, binary->entry, binary->score_factor, summaries});
  if (!launch) return launch.failure();
  ReadyBackend ready;
  ready.forward.workspace_size = summaries ? summaries->size() : 0;
  ready.forward.run = std::move(*launch);
  ready.description = {{"device", target->device->name()},
                       {"hash", hash_text(binary->facts)},
                       {"facts", facts_json(binary->facts)},
                       {"kernels", kernels_json(*binary)}};
  ready.phases = std::move(binary->phases);
  return ready;
}

}  // namespace attnjit::runtime
