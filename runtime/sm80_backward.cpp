// Problem to configuration, kernels and launches of the sm80 family's backward.
#include "runtime/sm80_backward.h"

#include <fmt/format.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <memory>
#include <span>
#include <utility>

#include "runtime/cuda_call.h"
#include "runtime/cuda_gradients.h"
#include "runtime/cuda_summaries.h"

namespace attnjit::runtime {
namespace {

using compiler::ModDemand;
using compiler::SinkLevel;

constexpr std::size_t kAlignment = 256;
constexpr int kMaxSplits = 16;
constexpr const char* kRowsEntry = "attnjit_backward_rows";
constexpr const char* kMainEntry = "attnjit_backward";
constexpr const char* kDqEntry = "attnjit_backward_dq";

// As the forward's.
struct Tiling {
  int head_dim;
  ModDemand demand;
  int tile_m, tile_n, warps, step_m, stages, slices = 1;
};

// By rising head_dim, and of one head_dim the best first: the first that fits is taken. Measured on an H200, bf16
// (bench/notes.md, "The sm80 family's backward"): 32 keys to a warp at 64; above, where dK and dV take more registers,
// 16. What a mod or a sum of gradients keeps takes registers that are then not there for scores.
constexpr Tiling k16Bit[] = {
    {.head_dim = 64, .demand = ModDemand::kNone, .tile_m = 64, .tile_n = 128, .warps = 4, .step_m = 32, .stages = 1},
    {.head_dim = 64, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 128, .warps = 4, .step_m = 16, .stages = 1},
    {.head_dim = 96, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 128, .warps = 8, .step_m = 32, .stages = 2},
    {.head_dim = 96, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 64, .warps = 4, .step_m = 16, .stages = 1},
    {.head_dim = 128, .demand = ModDemand::kBusy, .tile_m = 64, .tile_n = 128, .warps = 8, .step_m = 64, .stages = 1},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 32, .tile_n = 128, .warps = 8, .step_m = 16, .stages = 2},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 32, .tile_n = 128, .warps = 8, .step_m = 16, .stages = 1},
    {.head_dim = 128, .demand = ModDemand::kDense, .tile_m = 64, .tile_n = 64, .warps = 4, .step_m = 16, .stages = 1},
    {.head_dim = 256,
     .demand = ModDemand::kBusy,
     .tile_m = 64,
     .tile_n = 128,
     .warps = 8,
     .step_m = 64,
     .stages = 1,
     .slices = 2},
    {.head_dim = 256,
     .demand = ModDemand::kDense,
     .tile_m = 32,
     .tile_n = 128,
     .warps = 8,
     .step_m = 16,
     .stages = 1,
     .slices = 2},
    {.head_dim = 256,
     .demand = ModDemand::kDense,
     .tile_m = 32,
     .tile_n = 64,
     .warps = 4,
     .step_m = 16,
     .stages = 1,
     .slices = 2},
    {.head_dim = 256,
     .demand = ModDemand::kDense,
     .tile_m = 16,
     .tile_n = 64,
     .warps = 4,
     .step_m = 16,
     .stages = 1,
     .slices = 2},
};
// P and dS pass through shared memory, and rows are twice as wide.
constexpr Tiling kF32[] = {
    {.head_dim = 64, .demand = ModDemand::kDense, .tile_m = 32, .tile_n = 64, .warps = 4, .step_m = 32, .stages = 1},
    {.head_dim = 128,
     .demand = ModDemand::kDense,
     .tile_m = 32,
     .tile_n = 64,
     .warps = 4,
     .step_m = 32,
     .stages = 1,
     .slices = 2},
    {.head_dim = 128,
     .demand = ModDemand::kDense,
     .tile_m = 16,
     .tile_n = 32,
     .warps = 2,
     .step_m = 16,
     .stages = 1,
     .slices = 2},
    {.head_dim = 256,
     .demand = ModDemand::kDense,
     .tile_m = 16,
     .tile_n = 32,
     .warps = 2,
     .step_m = 16,
     .stages = 1,
     .slices = 4},
    {.head_dim = 256,
     .demand = ModDemand::kDense,
     .tile_m = 16,
     .tile_n = 16,
     .warps = 1,
     .step_m = 16,
     .stages = 1,
     .slices = 4},
};

std::size_t aligned(std::size_t size) { return (size + kAlignment - 1) / kAlignment * kAlignment; }

bool is_summed(const compiler::SinkFacts& sink) { return !sink.row_shift; }

// Sinks of a level that the main kernel sums.
int count(const std::vector<compiler::SinkFacts>& sinks, SinkLevel level) {
  return static_cast<int>(std::ranges::count_if(
      sinks, [&](const compiler::SinkFacts& sink) { return sink.level == level && is_summed(sink); }));
}

// The largest number where it would be larger.
std::int64_t product(std::initializer_list<std::int64_t> factors) {
  std::int64_t result = 1;
  for (const std::int64_t factor : factors) {
    if (__builtin_mul_overflow(result, factor, &result)) return std::numeric_limits<std::int64_t>::max();
  }
  return result;
}

// Whether the main kernel has something to compute. Row shifts are the kernel's before it.
bool runs_main(const sm80::BackwardConfig& config, const std::vector<compiler::SinkFacts>& sinks) {
  return config.wants_dq || config.wants_dk || config.wants_dv || std::ranges::any_of(sinks, is_summed);
}

// Blocks of each launch; 0: there is none.
struct Grids {
  std::int64_t rows = 0, main = 0, dq = 0;
};
Grids grids_of(const Signature& s, const sm80::BackwardConfig& config, const std::vector<compiler::SinkFacts>& sinks,
               int splits) {
  const std::int64_t padded = round_up(s.seqlen_q, config.tile_m);
  const std::int64_t key_tiles = round_up(s.seqlen_kv, config.tile_n) / config.tile_n;
  const std::int64_t blocks = sm80::splits_dq(config) ? std::min<std::int64_t>(splits, key_tiles) : key_tiles;
  return {.rows = product({s.batch, s.num_heads,
                           round_up(padded, std::int64_t{sm80::kRowsOfBlock}) / std::int64_t{sm80::kRowsOfBlock}}),
          .main = runs_main(config, sinks) ? product({s.batch, s.num_heads_kv, config.slices, blocks}) : 0,
          .dq = config.wants_dq ? product({s.batch, s.num_heads, config.slices, padded / config.tile_m}) : 0};
}

compiler::CompileResult<compiler::EmittedCuda> emit(const Request& request, const sm80::BackwardConfig& config,
                                                    const compiler::CompileOptions& options) {
  const Signature& s = request.call.signature;
  compiler::ModProblem problem = tiled_problem(request, config.tile_m, config.tile_n);
  // Beyond them every gradient is 0, which is not stored.
  problem.stored_seqlen_q = s.seqlen_q;
  problem.stored_seqlen_kv = s.seqlen_kv;
  return emit_summarised(
      problem, [&](const compiler::ModProblem& given) { return compiler::emit_sm80_backward(given, config, options); });
}

// The whole call, but for what lies in the workspace.
cuda::BackwardParams backward_params(const ForwardCall& call, const Gradients& gradients) {
  cuda::BackwardParams params = {};
  // As of a forward: kernels form the addresses of whole tiles.
  const auto take = [](const TensorView& tensor, auto** data, long long (&stride)[3]) {
    *data = tensor.data;
    for (int d = 0; d < 3; ++d) stride[d] = tensor.shape[d] > 1 ? tensor.stride[d] : 0;
  };
  take(call.q, &params.q, params.q_stride);
  take(call.k, &params.k, params.k_stride);
  take(call.v, &params.v, params.v_stride);
  take(call.o, &params.o, params.o_stride);
  take(gradients.grad_out, &params.grad_out, params.grad_out_stride);
  take(gradients.dq, &params.dq, params.dq_stride);
  take(gradients.dk, &params.dk, params.dk_stride);
  take(gradients.dv, &params.dv, params.dv_stride);
  params.lse = call.lse.data;
  params.grad_lse = gradients.grad_lse.data;
  for (int d = 0; d < 3; ++d) {
    params.lse_stride[d] = call.lse.stride[d];
    params.grad_lse_stride[d] = gradients.grad_lse.stride[d];
  }
  params.batch = static_cast<int>(call.q.shape[0]);
  params.num_heads = static_cast<int>(call.q.shape[1]);
  params.num_heads_kv = static_cast<int>(call.k.shape[1]);
  params.seqlen_q = static_cast<int>(call.q.shape[2]);
  params.seqlen_kv = static_cast<int>(call.k.shape[2]);
  params.scale = call.scale;
  fill_captured(call, params.captured);
  return params;
}

// What a plan runs. Of kernels those that are launched.
struct Launches {
  std::shared_ptr<const CudaKernel> rows, main, dq;
  Grids grids;
  unsigned threads = 0;
  Sm80BackwardWorkspace workspace;
  CudaGradientSums sums;
  std::shared_ptr<const CudaSummaries> summaries;  // behind the sums; null: the main kernel reads none

  Check run(const ForwardCall& call, const Gradients& gradients, char* memory, CudaStream stream) const {
    cuda::BackwardParams params = backward_params(call, gradients);
    params.row_lse = reinterpret_cast<float*>(memory);
    params.row_delta = reinterpret_cast<float*>(memory + workspace.row_delta);
    params.dq_sum = reinterpret_cast<float*>(memory + workspace.dq_sum);
    params.splits = workspace.splits;
    char* const captured = memory + workspace.sums;
    if (Check failure = sums.clear(captured, stream)) return failure;
    sums.fill_views(captured, params.gradients);
    if (summaries && main) {
      char* const tables = captured + sums.size();
      summaries->fill_views(call, tables, params.captured);
      if (Check failure = summaries->fill(call, tables, stream)) return failure;
    }
    const struct {
      const CudaKernel* kernel;
      std::int64_t blocks;
      unsigned threads;
    } launches[] = {{rows.get(), grids.rows, unsigned{sm80::kRowsThreads}},
                    {main.get(), grids.main, threads},
                    {dq.get(), grids.dq, threads}};
    for (const auto& launch : launches) {
      if (!launch.kernel) continue;
      if (Check failure =
              launch.kernel->launch({.x = static_cast<unsigned>(launch.blocks)}, launch.threads, &params, stream)) {
        return failure;
      }
    }
    return sums.finish(call, gradients, captured, stream);
  }
};

}  // namespace

std::size_t backward_shared_memory(const sm80::BackwardConfig& config, const std::vector<compiler::SinkFacts>& sinks) {
  return static_cast<std::size_t>(
      sm80::backward_shared_memory(config, count(sinks, SinkLevel::kRow), count(sinks, SinkLevel::kDiagonal)));
}

std::optional<sm80::BackwardConfig> choose_backward_config(const Sm80BackwardProblem& problem) {
  const bool f32 = problem.element == sm80::Element::kF32;
  const int head_dim = std::max(sm80::padded(problem.head_dim), sm80::padded(problem.head_dim_v));
  for (const Tiling& row : f32 ? std::span<const Tiling>(kF32) : std::span<const Tiling>(k16Bit)) {
    if (row.head_dim < head_dim || row.demand < problem.demand) continue;
    const sm80::BackwardConfig config{.element = problem.element,
                                      .head_dim = problem.head_dim,
                                      .head_dim_v = problem.head_dim_v,
                                      .tile_m = row.tile_m,
                                      .tile_n = row.tile_n,
                                      .warps = row.warps,
                                      .step_m = row.step_m,
                                      .stages = row.stages,
                                      .slices = row.slices,
                                      .load_bytes = problem.load_bytes,
                                      .store_bytes = problem.store_bytes,
                                      .wants_dq = problem.wants_dq,
                                      .wants_dk = problem.wants_dk,
                                      .wants_dv = problem.wants_dv,
                                      .deterministic = problem.deterministic};
    if (backward_shared_memory(config, problem.sinks) <= problem.max_shared_memory) return config;
  }
  return std::nullopt;
}

void learn(const compiler::EmittedCuda& emitted, Sm80BackwardProblem* problem) {
  problem->demand = std::max(problem->demand, emitted.demand);
  problem->sinks = emitted.facts.sinks;
  // Sums are registers, too.
  if (std::ranges::any_of(problem->sinks, is_summed)) problem->demand = ModDemand::kDense;
}

Sm80BackwardWorkspace backward_workspace(const Signature& s, const sm80::BackwardConfig& config, int num_sms,
                                         std::size_t sums) {
  Sm80BackwardWorkspace workspace;
  const auto rows = static_cast<std::size_t>(s.batch * s.num_heads * round_up(s.seqlen_q, config.tile_m));
  if (sm80::splits_dq(config)) {
    // Enough blocks for two rounds over the device.
    const std::int64_t heads = std::max<std::int64_t>(s.batch * s.num_heads_kv * config.slices, 1);
    const std::int64_t key_tiles = std::max<std::int64_t>(round_up(s.seqlen_kv, config.tile_n) / config.tile_n, 1);
    const std::int64_t wanted = (2 * std::int64_t{num_sms} + heads - 1) / heads;
    workspace.splits =
        static_cast<int>(std::min({std::max<std::int64_t>(wanted, 1), key_tiles, std::int64_t{kMaxSplits}}));
  }
  workspace.row_delta = aligned(rows * sizeof(float));
  workspace.dq_sum = 2 * workspace.row_delta;
  const std::size_t features = config.wants_dq ? static_cast<std::size_t>(sm80::sliced(config, config.head_dim)) : 0;
  workspace.sums =
      workspace.dq_sum + aligned(static_cast<std::size_t>(workspace.splits) * rows * features * sizeof(float));
  workspace.size = workspace.sums + sums;
  return workspace;
}

Result<Sm80BackwardBinary> build_sm80_backward(const Request& request, const FusedTarget& target,
                                               const CollectText& collect) {
  const Signature& s = request.call.signature;
  if (Check failure = check_cuda_arch(target.arch)) return *failure;
  if (Check failure = check_lengths(s)) return *failure;
  Sm80BackwardProblem by = {.element = sm80_element(static_cast<dsl::DType>(s.dtype)),
                            .head_dim = static_cast<int>(s.head_dim),
                            .head_dim_v = static_cast<int>(s.head_dim_v),
                            .max_shared_memory = target.max_shared_memory,
                            .load_bytes = s.load_bytes,
                            .store_bytes = s.store_bytes,
                            .wants_dq = s.wants_dq != 0,
                            .wants_dk = s.wants_dk != 0,
                            .wants_dv = s.wants_dv != 0,
                            .deterministic = s.deterministic != 0,
                            .demand = request.mods.mask_mod ? ModDemand::kBusy : ModDemand::kNone,
                            .sinks = {}};
  compiler::CompileOptions options{.dump = request.files.collector(collect)};
  std::optional<sm80::BackwardConfig> config = choose_backward_config(by);
  if (!config) return no_configuration(target);
  // Only the compiler sees what the mod demands; what is dumped is what is compiled.
  auto emitted = emit(request, *config, {});
  if (!emitted.error) {
    learn(emitted.value, &by);
    const std::optional<sm80::BackwardConfig> other = choose_backward_config(by);
    if (!other) return no_configuration(target);
    const bool changes = config_name(*other) != config_name(*config);
    config = other;
    if (changes || options.dump) emitted = emit(request, *config, options);
  }
  if (emitted.error) return compile_failure(s, emitted.error->message);
  const Grids grids = grids_of(s, *config, emitted.value.facts.sinks, kMaxSplits);
  if (const std::int64_t blocks = std::max({grids.rows, grids.main, grids.dq}); blocks > kMaxGrid) {
    return unsupported(fmt::format("a launch of {} blocks is beyond the {} of a grid", blocks, kMaxGrid));
  }
  options.dump = binary_dumps(request, collect);
  Result<FoundBinary> found = find_cuda_binary(request.context, emitted.value.source, target.arch, options);
  if (!found) return found.failure();
  Sm80BackwardBinary binary{.config = *config,
                            .facts = std::move(emitted.value.facts),
                            .found = std::move(*found),
                            .finish = {},
                            .summaries = {},
                            .phases = std::move(emitted.value.phases)};
  binary.phases.insert(binary.phases.end(), binary.found.phases.begin(), binary.found.phases.end());
  auto finish = find_finish_kernel(request, target.arch, &binary.phases);
  if (!finish) return finish.failure();
  binary.finish = std::move(*finish);
  if (!runs_main(*config, binary.facts.sinks)) return binary;
  auto summaries = find_summary_kernel(request, binary.facts, target.arch, &binary.phases);
  if (!summaries) return summaries.failure();
  binary.summaries = std::move(*summaries);
  return binary;
}

std::string config_name(const sm80::BackwardConfig& config) {
  return fmt::format("{} x {}, {} warps, {} queries at once, {} stage{}, {} slice{}", config.tile_m, config.tile_n,
                     config.warps, config.step_m, config.stages, config.stages == 1 ? "" : "s", config.slices,
                     config.slices == 1 ? "" : "s");
}

Json kernels_json(const Sm80BackwardBinary& binary) {
  const sm80::BackwardConfig& c = binary.config;
  Json json = Json::array({binary_json(binary.found, kRowsEntry)});
  if (runs_main(c, binary.facts.sinks)) {
    Json main = binary_json(binary.found, kMainEntry);
    main["shared_bytes"] = backward_shared_memory(c, binary.facts.sinks);
    main["tile"] = config_name(c);
    main["load_bytes"] = c.load_bytes;
    main["store_bytes"] = c.store_bytes;
    main["deterministic"] = c.deterministic;
    json.push_back(std::move(main));
  }
  // Of all of them, in the row of the main one; without it in the first.
  json.back()["phases_ms"] = phases_json(binary.phases);
  if (c.wants_dq) json.push_back(binary_json(binary.found, kDqEntry));
  add_finish_kernel(binary.finish, &json);
  if (binary.summaries) json.push_back(summary_kernel_json(*binary.summaries));
  return json;
}

Result<ReadyBackend> prepare_sm80_backward(const Request& request) {
  const Signature& s = request.call.signature;
  const Result<FusedTarget> target = device_target(request);
  if (!target) return target.failure();
  const std::shared_ptr<CudaDevice>& device = target->device;
  Result<Sm80BackwardBinary> binary = build_sm80_backward(request, *target, nullptr);
  if (!binary) return binary.failure();

  const sm80::BackwardConfig& config = binary->config;
  auto launches = std::make_shared<Launches>(Launches{
      .sums = CudaGradientSums(request.call.forward, s.capture_gradients, binary->facts.sinks, config.deterministic),
      .summaries = {}});
  if (Check failure = launches->sums.load(device, binary->finish)) return *failure;
  std::size_t size = launches->sums.size();
  if (binary->summaries) {
    auto loaded =
        CudaSummaries::load(device, *binary->summaries, tiled_problem(request, 1, 1), binary->facts.summaries);
    if (!loaded) return loaded.failure();
    launches->summaries = std::move(*loaded);
    size += launches->summaries->size();
  }
  launches->workspace = backward_workspace(s, config, device->num_sms(), size);
  launches->grids = grids_of(s, config, binary->facts.sinks, launches->workspace.splits);
  launches->threads = 32u * static_cast<unsigned>(config.warps);
  const struct {
    std::shared_ptr<const CudaKernel>* kernel;
    std::int64_t blocks;
    const char* entry;
    std::size_t shared_memory;
  } wanted[] = {
      {&launches->rows, launches->grids.rows, kRowsEntry, 0},
      {&launches->main, launches->grids.main, kMainEntry, backward_shared_memory(config, binary->facts.sinks)},
      {&launches->dq, launches->grids.dq, kDqEntry, static_cast<std::size_t>(sm80::backward_dq_shared_memory(config))}};
  for (const auto& [kernel, blocks, entry, shared_memory] : wanted) {
    if (blocks == 0) continue;
    auto loaded = CudaKernel::load(device, binary->found.binary->cubin, entry, shared_memory);
    if (!loaded) return loaded.failure();
    *kernel = std::move(*loaded);
  }

  ReadyBackend ready;
  ready.backward.workspace_size = launches->workspace.size;
  ready.backward.run = [launches = std::shared_ptr<const Launches>(std::move(launches))](
                           const ForwardCall& call, const Gradients& gradients, void* workspace, CudaStream stream) {
    return launches->run(call, gradients, static_cast<char*>(workspace), stream);
  };
  ready.description = {{"device", device->name()},
                       {"hash", hash_text(binary->facts)},
                       {"facts", gradient_facts_json(binary->facts, request.call)},
                       {"kernels", kernels_json(*binary)}};
  ready.phases = std::move(binary->phases);
  return ready;
}

}  // namespace attnjit::runtime
