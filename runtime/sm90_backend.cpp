// Problem to configuration, tensor maps, kernel and launch of the sm90 family.
#include "runtime/sm90_backend.h"

#include <fmt/format.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <numbers>
#include <optional>
#include <queue>
#include <tuple>
#include <utility>

#include "runtime/cuda_call.h"
#include "runtime/tensor_maps.h"

namespace attnjit::runtime {
namespace {

constexpr int kArch = 90;
constexpr int kFeatureStep = 8;  // 16 bytes of features
constexpr int kMaxTileN = 256;

// A way to cut the work, for problems whose padded head dims are at most `head_dim`.
struct Tiling {
  int head_dim;
  int warpgroups, tile_n, stages;
  int q_buffers;
  bool busy_mask = true, dense_mask = true;  // whether such a mod finds registers: Sm90Problem
  bool hides_work = false;                   // only for arithmetic and summarised masks, where its tiles are filled
};

// By rising head_dim, and of one head_dim the best first: the first that fits and serves is taken, or a smaller tile of
// queries where its tiles would leave multiprocessors without work, or would be no more of them. Measured on an H200,
// bf16 (bench/notes.md, "The sm90 family's forward kernel").
constexpr Tiling kTilings[] = {
    {.head_dim = 64, .warpgroups = 4, .tile_n = 64, .stages = 4, .q_buffers = 2, .busy_mask = false},
    {.head_dim = 64, .warpgroups = 2, .tile_n = 64, .stages = 4, .q_buffers = 2},
    {.head_dim = 64, .warpgroups = 1, .tile_n = 64, .stages = 4, .q_buffers = 2},
    // Three warpgroups hide what two do not: a mod's arithmetic, and masks that are looked at element by element.
    {.head_dim = 128,
     .warpgroups = 3,
     .tile_n = 80,
     .stages = 3,
     .q_buffers = 2,
     .busy_mask = false,
     .dense_mask = false,
     .hides_work = true},
    {.head_dim = 128, .warpgroups = 2, .tile_n = 128, .stages = 2, .q_buffers = 2, .dense_mask = false},
    {.head_dim = 128, .warpgroups = 2, .tile_n = 112, .stages = 2, .q_buffers = 2},
    {.head_dim = 128, .warpgroups = 1, .tile_n = 64, .stages = 3, .q_buffers = 2},
    {.head_dim = 192, .warpgroups = 2, .tile_n = 96, .stages = 2, .q_buffers = 1},
    {.head_dim = 192, .warpgroups = 1, .tile_n = 96, .stages = 2, .q_buffers = 1},
    {.head_dim = 256, .warpgroups = 2, .tile_n = 64, .stages = 2, .q_buffers = 1},
    {.head_dim = 256, .warpgroups = 1, .tile_n = 64, .stages = 2, .q_buffers = 1},
};

bool fits(const sm90::ForwardConfig& config, const Sm90Problem& problem) {
  return static_cast<std::size_t>(sm90::forward_shared_memory(config)) <= problem.max_shared_memory;
}

// Registers of a thread that hold scores, probabilities and O.
int accumulators(const sm90::ForwardConfig& config) {
  return config.tile_n / 2 + config.tile_n / 4 + sm90::padded(config.head_dim_v) / 2;
}

// How many they may be for all else to find room in what setmaxnreg leaves a thread: 232, 160 or 112.
int max_accumulators(int warpgroups) { return warpgroups <= 2 ? 200 : warpgroups == 3 ? 128 : 88; }

// A reference that stays where it is does for scores that do not rise without bound along the keys, and gives no
// row_max. f16 holds probabilities up to 65504 beside it, and so does the check on their sum: of long rows it would
// fail always.
bool freezes(const Sm90Problem& problem) {
  constexpr std::int64_t kLongest = 16384;
  const bool fits = problem.element == sm90::Element::kBF16 || problem.seqlen_kv <= kLongest;
  return !problem.has_row_max && !problem.drifts && fits;
}

std::int64_t tiles_of(const Signature& s, const sm90::ForwardConfig& config) {
  return query_tiles(s.batch * s.num_heads, s.seqlen_q, sm90::tile_m(config));
}

std::int64_t tiles_of(const Sm90Problem& problem, int warpgroups) {
  return query_tiles(problem.heads, problem.seqlen_q, sm90::kRowsOfWarpgroup * warpgroups);
}

// Whether few rows of the tiles lie beyond the queries.
bool wastes_little(std::int64_t seqlen_q, int warpgroups) {
  const std::int64_t rows = round_up(seqlen_q, sm90::kRowsOfWarpgroup * warpgroups);
  return rows - seqlen_q <= seqlen_q / 16;
}

// The configurations of the table that serve a problem, the best first.
std::vector<sm90::ForwardConfig> serving_configs(const Sm90Problem& problem) {
  const int head_dim = std::max(sm90::padded(problem.head_dim), sm90::padded(problem.head_dim_v));
  std::vector<sm90::ForwardConfig> serving;
  int bracket = 0;  // the smallest one that holds the head dim
  for (const Tiling& row : kTilings) {
    if (row.head_dim < head_dim || (bracket != 0 && row.head_dim != bracket)) continue;
    const bool has_work = problem.arithmetic || problem.summarised;
    if (row.hides_work && !(has_work && wastes_little(problem.seqlen_q, row.warpgroups))) continue;
    if ((problem.has_busy_mask && !row.busy_mask) || (problem.has_dense_mask && !row.dense_mask)) continue;
    // Without a clamp they cost less.
    const int fma_exponentials = row.head_dim != 64 || !problem.nonlinear ? 0 : problem.bounded ? 3 : 2;
    const sm90::ForwardConfig config{.element = problem.element,
                                     .head_dim = problem.head_dim,
                                     .head_dim_v = problem.head_dim_v,
                                     .warpgroups = row.warpgroups,
                                     .tile_n = row.tile_n,
                                     .stages = row.stages,
                                     .q_buffers = row.q_buffers,
                                     // Of documents, whose tiles are of use to some warpgroups only, four waited
                                     // for their turns more than they gained.
                                     .ping_pong = row.warpgroups > 1 && !(row.warpgroups == 4 && problem.summarised),
                                     .frozen = freezes(problem),
                                     .fma_exponentials = fma_exponentials,
                                     .bounded = fma_exponentials > 0 && problem.bounded};
    if (!fits(config, problem)) continue;
    bracket = row.head_dim;
    serving.push_back(config);
  }
  return serving;
}

struct NamedTensor {
  const char* name;
  const TensorView& tensor;
};

// Why tensor maps cannot hold a call's tensors; empty where they can.
std::string refuse_tensors(const CheckedCall& call) {
  const Signature& s = call.signature;
  for (std::size_t i = 0; i < call.num_rows; ++i) {
    const CheckedCall::Rows& rows = call.rows[i];
    if (rows.bytes < kWidestAccess) {
      return fmt::format("it needs rows aligned to {} bytes, and {}'s are to {}", kWidestAccess, rows.name, rows.bytes);
    }
  }
  const NamedTensor tensors[] = {
      {"q", call.forward.q}, {"k", call.forward.k}, {"v", call.forward.v}, {"o", call.forward.o}};
  constexpr const char* kDimensions[] = {"batches", "heads", "sequence"};
  for (const auto& [name, tensor] : tensors) {
    for (int d = 0; d < 3; ++d) {
      if (tensor.shape[d] <= 1) continue;
      if (tensor.stride[d] == 0) return fmt::format("{} is broadcast over its {}", name, kDimensions[d]);
    }
  }
  if (!s.near_strides) return fmt::format("the strides of {} reach 2^40 bytes", call.far);
  return s.seqlen_kv == 0 ? "there are no keys" : "";
}

// Why the family does not serve a call; empty where it may.
std::string refuse(const CheckedCall& call, const FusedTarget& target) {
  const Signature& s = call.signature;
  if (target.arch.number != kArch) {
    return fmt::format("it needs compute capability 9.0, and not {}", compiler::cuda_arch_name(target.arch));
  }
  if (target.device && !target.device->has_tensor_maps()) return "it needs a driver of CUDA 12 or later";
  if (const auto dtype = static_cast<dsl::DType>(s.dtype); dtype != dsl::DType::kF16 && dtype != dsl::DType::kBF16) {
    return fmt::format("it takes float16 and bfloat16, and not {}", dsl::dtype_name(dtype));
  }
  if (s.head_dim % kFeatureStep != 0 || s.head_dim_v % kFeatureStep != 0) {
    return fmt::format("it takes head dims that are multiples of {}, and not {} and {}", kFeatureStep, s.head_dim,
                       s.head_dim_v);
  }
  return refuse_tensors(call);
}

compiler::CompileResult<compiler::EmittedCuda> emit(const Request& request, const sm90::ForwardConfig& config,
                                                    const compiler::CompileOptions& options) {
  return emit_summarised(
      tiled_problem(request, sm90::tile_m(config), config.tile_n),
      [&](const compiler::ModProblem& problem) { return compiler::emit_sm90_forward(problem, config, options); });
}

// ---- The launch

// Heads whose rows are walked together, longest first, where a mod has a mask: as many as the L2 cache has room for the
// keys and values of.
int section_of(const Signature& s) {
  constexpr std::int64_t kBytes = 32 << 20;
  const std::int64_t head =
      s.seqlen_kv * (s.head_dim + s.head_dim_v) * dsl::dtype_size(static_cast<dsl::DType>(s.dtype));
  const std::int64_t heads = s.batch * s.num_heads;
  std::int64_t section = 1;
  while (heads % (2 * section) == 0 && 2 * section * head <= kBytes) section *= 2;
  return static_cast<int>(section);
}

// What is the same in all launches for a signature.
sm90::ForwardParams launch_params(const Signature& s, const sm90::ForwardConfig& config) {
  sm90::ForwardParams params = {};
  params.tiles = static_cast<int>(tiles_of(s, config));
  params.m_tiles = static_cast<int>(query_tiles(1, s.seqlen_q, sm90::tile_m(config)));
  params.section = section_of(s);
  params.descriptors_high = sm90::kDescriptorsHigh;
  params.by_m_tiles = sm90::make_divisor(params.m_tiles);
  params.by_heads = sm90::make_divisor(static_cast<int>(s.num_heads));
  params.by_group = sm90::make_divisor(static_cast<int>(s.num_heads / s.num_heads_kv));
  params.by_section_tiles = sm90::make_divisor(params.section * params.m_tiles);
  params.by_section = sm90::make_divisor(params.section);
  return params;
}

// A job's time beside its steps, in steps.
constexpr int kJobCost = 1;

// What each tile of queries costs, by its number, as far as the mask tells without captured values; empty where it does
// not.
std::vector<int> tile_costs(const Request& request, const sm90::ForwardConfig& config,
                            const sm90::ForwardParams& params) {
  const Signature& s = request.call.signature;
  const std::optional<KnownTiles> known = KnownTiles::find(request, sm90::tile_m(config), config.tile_n);
  if (!known) return {};
  // Of many heads the first stands for all: a schedule is as good as its costs, and never wrong.
  constexpr std::int64_t kMostQuestions = 1 << 21;
  constexpr int kMostTiles = 1 << 22;
  // What is known of one head is asked for in any case, and a schedule that took long to make would not pay.
  if (known->n_tiles() * known->m_tiles() > kMostQuestions || params.tiles > kMostTiles) return {};
  const bool each_head = known->n_tiles() * params.tiles <= kMostQuestions;
  std::vector<int> of_first(each_head ? 0 : static_cast<std::size_t>(params.m_tiles), 0);
  const auto steps = [&](std::int64_t b, std::int64_t h, std::int64_t m) {
    const KnownTiles::Counts counts = known->count(b, h, m);
    return static_cast<int>(counts.full + counts.partial);
  };
  for (std::size_t m = 0; m < of_first.size(); ++m) of_first[m] = steps(0, 0, static_cast<std::int64_t>(m));
  std::vector<int> costs;
  costs.reserve(static_cast<std::size_t>(params.tiles));
  for (int number = 0; number < params.tiles; ++number) {
    const sm90::TilePlace place = sm90::masked_place(number, params);
    const int head = place.head;
    costs.push_back(kJobCost + (each_head ? steps(head / s.num_heads, head % s.num_heads, place.m)
                                          : of_first[static_cast<std::size_t>(place.m)]));
  }
  return costs;
}

// Puts the schedule of a masked mod into device memory, which the result owns; null where there is none to be had.
Result<std::shared_ptr<CudaWorkbench>> place_schedule(const Request& request, const std::shared_ptr<CudaDevice>& device,
                                                      const sm90::ForwardConfig& config, sm90::ForwardParams* params) {
  const int blocks = std::min(params->tiles, device->num_sms());
  if (params->tiles <= blocks) return std::shared_ptr<CudaWorkbench>();
  const std::vector<int> costs = tile_costs(request, config, *params);
  if (costs.empty()) return std::shared_ptr<CudaWorkbench>();
  const std::vector<int> schedule = make_schedule(costs, blocks);
  Result<std::unique_ptr<CudaWorkbench>> memory = CudaWorkbench::create(device);
  if (!memory) return memory.failure();
  const std::size_t size = schedule.size() * sizeof(int);
  Result<void*> address = (*memory)->allocate(size);
  if (!address) return address.failure();
  if (Check failure = (*memory)->fill(*address, size, schedule.data(), size)) return *failure;
  params->schedule = static_cast<const int*>(*address);
  params->rounds = static_cast<int>(schedule.size()) / blocks;
  return std::shared_ptr<CudaWorkbench>(std::move(*memory));
}

Result<FusedLaunch> load(const Request& request, const std::shared_ptr<CudaDevice>& device, const KernelCode& code,
                         const sm90::ForwardConfig& config, bool has_mask) {
  Result<std::shared_ptr<const CudaKernel>> kernel =
      CudaKernel::load(device, code.cubin, code.entry, static_cast<std::size_t>(sm90::forward_shared_memory(config)));
  if (!kernel) return kernel.failure();
  sm90::ForwardParams fixed = launch_params(request.call.signature, config);
  std::shared_ptr<CudaWorkbench> schedule;
  // What summarised values decide, the host does not know: blocks take their work as they go.
  if (has_mask && !code.summaries) {
    Result<std::shared_ptr<CudaWorkbench>> placed = place_schedule(request, device, config, &fixed);
    if (!placed) return placed.failure();
    schedule = std::move(*placed);
  }
  const CudaKernel::Grid grid{.x = static_cast<unsigned>(std::min(fixed.tiles, device->num_sms()))};
  struct Writers {
    explicit Writers(int tile_n) : k(tile_n), v(tile_n) {}
    TensorMapWriter q{sm90::kRowsOfWarpgroup}, k, v, o{sm90::kRowsOfWarpgroup};
  };
  return FusedLaunch([device, kernel = std::move(*kernel), grid, fixed, schedule = std::move(schedule),
                      threads = static_cast<unsigned>(sm90::threads(config)), score_factor = code.score_factor,
                      summaries = code.summaries, writers = std::make_shared<Writers>(config.tile_n)](
                         const ForwardCall& call, void* workspace, CudaStream stream) -> Check {
    sm90::ForwardParams params = fixed;
    const struct {
      TensorMapWriter& writer;
      const TensorView& tensor;
      sm90::TensorMap* map;
    } maps[] = {{writers->q, call.q, &params.q},
                {writers->k, call.k, &params.k},
                {writers->v, call.v, &params.v},
                {writers->o, call.o, &params.o}};
    for (const auto& [writer, tensor, map] : maps) {
      if (Check failure = writer.write(*device, tensor, map)) return failure;
    }
    params.call = forward_params(call, score_factor);
    if (summaries) {
      params.counter = summaries->counter(workspace);
      summaries->fill_views(call, workspace, params.call.captured);
      if (Check failure = summaries->fill(call, workspace, stream)) return failure;
    }
    return kernel->launch(grid, threads, &params, stream);
  });
}

Json describe(const sm90::ForwardConfig& c) {
  return {{"arch", compiler::cuda_arch_name({.number = kArch, .specific = true})},
          {"shared_bytes", sm90::forward_shared_memory(c)},
          {"tile", fmt::format("{} x {}", sm90::tile_m(c), c.tile_n)},
          {"warpgroups", c.warpgroups},
          {"stages", c.stages},
          {"q_buffers", c.q_buffers},
          {"ping_pong", c.ping_pong},
          {"frozen", c.frozen},
          {"fma_exponentials", c.fma_exponentials},
          {"bounded", c.bounded}};
}

FusedKernel kernel_of(const Request& request, const sm90::ForwardConfig& config, bool has_mask) {
  return {config_name(config),
          describe(config),
          sm90::tile_m(config),
          config.tile_n,
          [&request, config](const compiler::CompileOptions& options) { return emit(request, config, options); },
          [&request, config, has_mask](const std::shared_ptr<CudaDevice>& device, const KernelCode& code) {
            return load(request, device, code, config, has_mask);
          }};
}

}  // namespace

std::optional<sm90::ForwardConfig> choose_config(const Sm90Problem& problem) {
  std::optional<sm90::ForwardConfig> found;
  // Whether multiprocessors are without work that smaller tiles would give them. A mask's tiles are of different
  // lengths: one of each multiprocessor is too few to even that out. A warpgroup alone takes two thirds of the time of
  // two: that pays where each multiprocessor gets one tile at most.
  const auto idles = [&](const sm90::ForwardConfig& config) {
    if (config.warpgroups == 2) return tiles_of(problem, 1) <= problem.num_sms;
    const std::int64_t present = tiles_of(problem, config.warpgroups);
    return problem.has_mask ? present < problem.num_sms : 4 * present < 3 * problem.num_sms;
  };
  for (const sm90::ForwardConfig& config : serving_configs(problem)) {
    // Smaller tiles that are no more of them leave out rows without queries.
    const auto serves_better = [&] {
      return config.warpgroups < found->warpgroups &&
             (idles(*found) || tiles_of(problem, config.warpgroups) == tiles_of(problem, found->warpgroups));
    };
    if (!found || serves_better()) found = config;
  }
  return found;
}

void learn(const compiler::EmittedCuda& emitted, Sm90Problem* problem) {
  const compiler::ModFacts& facts = emitted.facts;
  problem->has_mask = facts.has_mask;
  problem->summarised = !facts.summaries.empty();
  const bool reads_nonlinearly =
      facts.score_class == compiler::ScoreClass::kNonlinear && facts.reads_proven + facts.reads_clamped > 0;
  // More than one comparison of 64 bits, or one of 32 and one of the positions, beside the tables' addresses.
  const bool compares_much = problem->summarised && facts.cost && facts.cost->mask.alu + facts.cost->diagonal.alu > 3;
  problem->has_busy_mask = facts.has_mask && (reads_nonlinearly || compares_much);
  problem->has_dense_mask = facts.has_mask && emitted.demand == compiler::ModDemand::kDense;
  problem->drifts = facts.folded && facts.folded->drifts;
  problem->nonlinear =
      facts.score_class == compiler::ScoreClass::kNonlinear && emitted.demand == compiler::ModDemand::kNone;
  // In log2 units; a float's exponents reach from -126 to 127, and functions are approximate.
  constexpr float kFurthest = 120.0f;
  problem->bounded = facts.score_bounds &&
                     (facts.score_bounds->high - facts.score_bounds->low) * std::numbers::log2e_v<float> <= kFurthest;
  problem->arithmetic = !facts.has_mask && (problem->nonlinear || (facts.folded && facts.folded->linear));
}

std::string config_name(const sm90::ForwardConfig& config) {
  std::string name = fmt::format("{} x {}, {} warpgroup{}, {} stages", sm90::tile_m(config), config.tile_n,
                                 config.warpgroups, config.warpgroups == 1 ? "" : "s", config.stages);
  if (config.q_buffers > 1) name += ", next Q meanwhile";
  if (config.ping_pong) name += ", ping-pong";
  if (!config.frozen) name += ", exact";
  if (config.fma_exponentials > 0) name += fmt::format(", {} of 8 exponentials by FMAs", config.fma_exponentials);
  return name;
}

std::vector<sm90::ForwardConfig> candidate_configs(const Sm90Problem& problem) {
  constexpr std::size_t kMost = 6;
  const std::optional<sm90::ForwardConfig> chosen = choose_config(problem);
  if (!chosen) return {};
  std::vector<sm90::ForwardConfig> candidates = {*chosen};
  const auto possible = [&](const sm90::ForwardConfig& config) {
    return fits(config, problem) && accumulators(config) <= max_accumulators(config.warpgroups);
  };
  const auto add = [&](const sm90::ForwardConfig& config) {
    const auto same = [&](const sm90::ForwardConfig& other) { return config_name(other) == config_name(config); };
    if (candidates.size() < kMost && possible(config) && std::ranges::none_of(candidates, same)) {
      candidates.push_back(config);
    }
  };
  // A warpgroup by itself is worth a trial where two leave multiprocessors without a tile.
  const int fewest = tiles_of(problem, 2) < problem.num_sms ? 1 : 2;
  for (const sm90::ForwardConfig& config : serving_configs(problem)) {
    if (config.warpgroups >= fewest) add(config);
  }
  sm90::ForwardConfig neighbour = *chosen;
  neighbour.ping_pong = !chosen->ping_pong && chosen->warpgroups > 1;
  add(neighbour);
  // Another number of warpgroups has the longest steps that they leave room for.
  for (const int warpgroups : {chosen->warpgroups + 1, chosen->warpgroups - 1}) {
    if (warpgroups < fewest || warpgroups > 4) continue;
    neighbour = *chosen;
    neighbour.warpgroups = warpgroups;
    neighbour.ping_pong = warpgroups > 1;
    while (neighbour.tile_n > 32 && !possible(neighbour)) neighbour.tile_n -= 16;
    add(neighbour);
  }
  for (const int step : {32, -32, 16, -16}) {
    neighbour = *chosen;
    neighbour.tile_n += step;
    if (neighbour.tile_n >= 32 && neighbour.tile_n <= kMaxTileN) add(neighbour);
  }
  return candidates;
}

std::vector<int> make_schedule(std::span<const int> costs, int blocks) {
  struct Block {
    std::int64_t free_from;
    int number;
    bool operator>(const Block& other) const {
      return std::tie(free_from, number) > std::tie(other.free_from, other.number);
    }
  };
  std::priority_queue<Block, std::vector<Block>, std::greater<>> next;
  for (int block = 0; block < blocks; ++block) next.push({0, block});
  std::vector<std::vector<int>> lists(static_cast<std::size_t>(blocks));
  std::size_t rounds = 0;
  for (std::size_t tile = 0; tile < costs.size(); ++tile) {
    Block block = next.top();
    next.pop();
    std::vector<int>& list = lists[static_cast<std::size_t>(block.number)];
    list.push_back(static_cast<int>(tile));
    rounds = std::max(rounds, list.size());
    block.free_from += costs[tile];
    next.push(block);
  }
  std::vector<int> schedule(rounds * lists.size(), -1);
  for (std::size_t block = 0; block < lists.size(); ++block) {
    for (std::size_t round = 0; round < lists[block].size(); ++round) {
      schedule[round * lists.size() + block] = lists[block][round];
    }
  }
  return schedule;
}

Result<FusedBinary> build_sm90(const Request& request, const FusedTarget& asked, const CollectText& collect) {
  const Signature& s = request.call.signature;
  if (std::string reason = refuse(request.call, asked); !reason.empty()) return unsupported(std::move(reason));
  if (Check failure = check_lengths(s)) return *failure;
  FusedTarget target = asked;
  target.arch.specific = true;  // wgmma and setmaxnreg are instructions of sm_90a alone
  const int max_sms = request.context.environment().cuda_max_sms;
  const int usual_sms = max_sms > 0 ? std::min(max_sms, kUsualSms) : kUsualSms;
  Sm90Problem by = {
      .element = static_cast<dsl::DType>(s.dtype) == dsl::DType::kF16 ? sm90::Element::kF16 : sm90::Element::kBF16,
      .head_dim = static_cast<int>(s.head_dim),
      .head_dim_v = static_cast<int>(s.head_dim_v),
      .heads = s.batch * s.num_heads,
      .seqlen_q = s.seqlen_q,
      .seqlen_kv = s.seqlen_kv,
      .num_sms = target.device ? target.device->num_sms() : usual_sms,
      .max_shared_memory = target.max_shared_memory,
      .has_row_max = s.has_row_max != 0,
      .has_mask = request.mods.mask_mod.has_value()};
  std::optional<sm90::ForwardConfig> config = choose_config(by);
  if (!config) return no_configuration(target);
  // Blocks go on to ask for tiles a few times after the last.
  const std::int64_t most = kMaxGrid - 8 * by.num_sms;
  const auto too_many = [&](const sm90::ForwardConfig& of) { return tiles_of(s, of) > most; };
  if (too_many(*config)) {
    return unsupported(fmt::format("{} tiles of queries are beyond {}", tiles_of(s, *config), most));
  }

  auto emitted = emit(request, *config, {});
  if (!emitted.error) {
    learn(emitted.value, &by);
    const std::optional<sm90::ForwardConfig> other = choose_config(by);
    if (!other) return no_configuration(target);
    if (config_name(*other) != config_name(*config)) {
      config = other;
      emitted = emit(request, *config, {});
    }
  }
  if (emitted.error) return compile_failure(s, emitted.error->message);
  std::vector<sm90::ForwardConfig> candidates = {*config};
  if (s.autotune != static_cast<std::uint8_t>(AutotuneMode::kOff)) candidates = candidate_configs(by);
  candidates.erase(std::remove_if(candidates.begin() + 1, candidates.end(), too_many), candidates.end());
  std::vector<FusedKernel> kernels;
  kernels.reserve(candidates.size());
  for (const sm90::ForwardConfig& candidate : candidates) {
    kernels.push_back(kernel_of(request, candidate, by.has_mask));
  }
  return build_fused(request, target, "sm90", std::move(kernels), std::move(emitted.value), collect);
}

Failure refuse_sm90_backward() { return unsupported("it computes forwards only"); }

Result<ReadyBackend> prepare_sm90(const Request& request) { return prepare_fused(request, build_sm90); }

}  // namespace attnjit::runtime
