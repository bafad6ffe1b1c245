// What the families of fused CUDA kernels share: what a kernel is built for, its compile, its autotuning.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/autotune.h"
#include "runtime/backends.h"
#include "runtime/cuda_binaries.h"
#include "runtime/cuda_driver.h"
#include "runtime/cuda_summaries.h"

namespace attnjit::runtime {

inline constexpr std::int64_t kMaxGrid = std::numeric_limits<std::int32_t>::max();  // blocks of a launch

constexpr std::int64_t round_up(std::int64_t value, std::int64_t step) { return (value + step - 1) / step * step; }

// Dynamic shared memory that one block may have on an architecture, in bytes.
std::size_t max_shared_memory(int arch);

// What a kernel is built for.
struct FusedTarget {
  compiler::CudaArch arch;
  std::size_t max_shared_memory = 0;
  std::shared_ptr<CudaDevice> device = nullptr;  // whose winners are taken where the call asks for autotuning
  bool may_time = false;                         // there
};
// `device` may be null.
FusedTarget make_target(compiler::CudaArch arch, std::shared_ptr<CudaDevice> device, bool may_time);
// The call's device.
Result<FusedTarget> device_target(const Request& request);

// ---- Why a family does not serve a call
Failure unsupported(std::string reason);
Failure no_configuration(const FusedTarget& target);
// Positions are 32-bit in the kernels, those behind the end of the last tile included.
Check check_lengths(const Signature& signature);

// Tiles of `tile_m` queries in `heads` heads of all batches; the largest number where there are more.
std::int64_t query_tiles(std::int64_t heads, std::int64_t seqlen_q, int tile_m);
// The request's problem as far as tiles reach.
compiler::ModProblem tiled_problem(const Request& request, int tile_m, int tile_n);

// What a call's mask is over tiles of queries and keys: the native form of what its kernels ask.
class KnownTiles {
 public:
  // Nothing where the mask does not tell, or only with captured values.
  static std::optional<KnownTiles> find(const Request& request, int tile_m, int tile_n);

  std::int64_t m_tiles() const { return m_tiles_; }
  std::int64_t n_tiles() const { return n_tiles_; }
  struct Counts {
    std::int64_t full = 0, partial = 0;
    void add(cpu::TileKind kind);
  };
  // Of the tiles of keys that tile number `m` of a head's queries meets; the others are skipped.
  Counts count(std::int64_t b, std::int64_t h, std::int64_t m) const;
  // Transposed, as a backward goes: of the tiles of queries that tile number `n` of a head's keys meets.
  Counts count_queries(std::int64_t b, std::int64_t h, std::int64_t n) const;

 private:
  // What tiles follow one another along: its ends in a tile, a tile's length, and what of it is worth looking at.
  struct Axis {
    long long cpu::Tile::* first;
    long long cpu::Tile::* last;
    long long step;
    cpu::TileRangeFn range;
  };

  KnownTiles() = default;
  cpu::Tile whole(std::int64_t b, std::int64_t h) const;
  // Of the tiles that `tile` is cut into along an axis.
  Counts count_along(const Axis& axis, cpu::Tile tile) const;

  std::shared_ptr<const cpu::TileFacts> facts_;
  std::int64_t tile_m_ = 0, tile_n_ = 0, m_tiles_ = 0, n_tiles_ = 0;
  std::int64_t seqlen_q_ = 0, seqlen_kv_ = 0;
};

// What a kernel is loaded from.
struct KernelCode {
  const std::string& cubin;
  const std::string& entry;
  double score_factor;
  std::shared_ptr<const CudaSummaries> summaries;  // what the mod reads beside captures; null: nothing
};

// One call. `workspace`: what the code's summaries need.
using FusedLaunch = std::function<Check(const ForwardCall&, void* workspace, CudaStream)>;

// One way to compute a forward: a configuration of a family. The functions may refer to the request.
struct FusedKernel {
  std::string name;  // its own among those of a call
  Json description;  // of the configuration: the resources it asks for, and how it cuts the work
  int tile_m = 0, tile_n = 0;
  std::function<compiler::CompileResult<compiler::EmittedCuda>(const compiler::CompileOptions&)> emit;
  // Ready to launch for calls of the request's signature.
  std::function<Result<FusedLaunch>(const std::shared_ptr<CudaDevice>&, const KernelCode&)> load;
};

// The kernel of a call as compiled for an architecture.
struct FusedBinary {
  FusedKernel kernel;
  compiler::ModFacts facts;
  double score_factor = 1.0;
  std::string entry;
  FoundBinary found;
  std::optional<FoundBinary> summaries;  // the kernel that runs before
  compiler::PhaseTimes phases;           // of all it took
  Json autotune;                         // how it was chosen, where that was asked for
};

// Compiles, or finds, the best of `kernels`: the first one, emitted as `usual` without dumps, unless the call asks for
// autotuning. `family` and the text of `usual` tell problems of different kernels apart.
// `collect` receives every text in between, beside the files; with it the kernel is always compiled.
Result<FusedBinary> build_fused(const Request& request, const FusedTarget& target, std::string_view family,
                                std::vector<FusedKernel> kernels, compiler::EmittedCuda usual,
                                const CollectText& collect);

// The rows of a description: resources, configuration, where it was found; then the kernel of its summaries.
Json kernels_json(const FusedBinary& binary);

// Builds for the call's device and loads the kernel there.
Result<ReadyBackend> prepare_fused(const Request& request,
                                   Result<FusedBinary> (*build)(const Request&, const FusedTarget&,
                                                                const CollectText&));

}  // namespace attnjit::runtime
