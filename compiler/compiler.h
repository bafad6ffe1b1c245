// The compiler's only face to the runtime: a bound expression in, native code and facts out.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "compiler/cuda.h"
#include "dsl/expr.h"
#include "kernels_templates/cpu/tile_abi.h"

namespace attnjit::compiler {

// How far apart neighbours along one dimension of a captured tensor are; part of the code.
enum class StrideClass : std::uint8_t { kZero, kUnit, kAny };

// What the code may assume of one captured tensor. Extents may be used to prove reads in bounds.
struct CaptureInfo {
  dsl::DType dtype = dsl::DType::kF32;
  std::vector<std::int64_t> extent;       // rank entries
  std::vector<StrideClass> stride_class;  // rank entries
  bool offsets_fit_32 = false;            // the offset in elements of every element fits a signed 32-bit integer
};

// A score_mod (and mask_mod) with everything its code may depend on. Indices run over [0, extent).
struct ModProblem {
  dsl::Expr score_mod;                // bound, root a float
  std::optional<dsl::Expr> mask_mod;  // bound, root a bool; the same captures table as score_mod
  std::vector<CaptureInfo> captures;  // by capture number, joint for both expressions
  std::int64_t batch = 1;
  std::int64_t num_heads = 1;
  std::int64_t seqlen_q = 1;  // rounded up by the caller to what its padded lanes reach
  std::int64_t seqlen_kv = 1;
  // Lengths that exist, where the caller's code stores nothing for an element beyond them; 0: as above. Only the facts
  // about sinks look at them.
  std::int64_t stored_seqlen_q = 0;
  std::int64_t stored_seqlen_kv = 0;
  // For the backward: captures whose gradient is wanted, a bit by number. Floating types only.
  std::uint32_t gradients = 0;
  bool partial_keys = false;  // likewise: the LSE is of more keys than these
  // The caller gives the code that asks of tiles what ModFacts::summaries names.
  bool summaries = false;
};

// The least and the largest values of a captured tensor of ints or bools along one dimension, for any stretch of it.
// The code finds them as a captured tensor of its own: the views of ModFacts::summaries follow those of the captures,
// in order. Of int64 values that is a tensor of int64, of all others one of int32 (bools: 0 and 1), of fewer than 2^31
// elements, any strides but a contiguous last dimension, and the extents that summary_extents() gives: those of the
// captured tensor without the dimension, then [4, levels, blocks]. With N blocks of kSummaryBlock values, of which the
// last may be shorter, level l has, at block i,
//   0, 2: the least and the largest value in blocks i to min(i + 2^l, N) - 1,
//   1, 3: in blocks max(i - 2^l + 1, 0) to i.
struct TileSummary {
  int capture = 0;
  int dimension = 0;
};
inline constexpr std::int64_t kSummaryBlock = 32;
std::vector<std::int64_t> summary_extents(const CaptureInfo& capture, int dimension);

// How the modified score depends on `score`.
enum class ScoreClass : std::uint8_t { kIdentity, kAffine, kNonlinear };

// Milliseconds of one phase of a compile, in order.
using PhaseTimes = std::vector<std::pair<std::string, double>>;

// Instruction sets the CPU code is built for. kAvx512Bf16 implies kAvx512.
enum class CpuIsa : std::uint8_t { kSse2, kAvx2, kAvx512, kAvx512Bf16 };
std::string_view cpu_isa_name(CpuIsa isa);
// The best of this machine, or lower where the caller restricts it.
CpuIsa host_cpu_isa();

// What the backward needs to know of an element beside the gradient of its modified score.
enum class GradientNeed : std::uint8_t {
  kNothing,  // the score is only added to: its gradient is the modified score's
  kFactor,   // a factor that indices and captured tensors give
  kScore,    // the score itself, which the backward recomputes anyway
};

// What decides which element of a captured tensor a gradient goes to: its place is the same for all elements that share
// this. Data-dependent places (`bias[offset[q_idx]]`) have the level of what their data is read by.
enum class SinkLevel : std::uint8_t { kBlock, kRow, kColumn, kDiagonal, kElement };

// Where one captured read's gradient goes.
struct SinkFacts {
  int capture = 0;
  SinkLevel level = SinkLevel::kElement;
  // The read is a term that softmax cannot see, the same along the row: its gradient is the reduction of dLSE over the
  // rows, exactly zero where nothing flows into LSE. Level is kBlock or kRow. Never where keys are partial.
  bool row_shift = false;
  bool data_dependent = false;  // the place depends on captured values
  // No two elements (b, h, q_idx, kv_idx) of the problem share a place, and no other sink writes to the tensor: a store
  // in the place of an addition will do. Positions of padding may share one.
  bool injective = false;
};

struct CompileOptions {
  CpuIsa isa = host_cpu_isa();
  // Receives each intermediate text when set: kind is "mlir" (canonical), "llvm" (optimised IR), "asm", "cuda" (the
  // translation unit), "ptx" or "cubin" (bytes).
  std::function<void(std::string_view kind, std::string_view text)> dump;
};

// Constants that a modified score lies between, in natural units; both finite.
struct ScoreBounds {
  float low = 0, high = 0;
};

// How the folded form of a forward's mod (kernels_templates/cuda/mod_defaults.cuh) computes the modified score.
struct FoldedFacts {
  bool has_shift = false;  // terms that softmax cannot see are left out of the loop
  bool additive = false;   // what is left is the score and a term
  bool linear = false;     // that term is a multiple of the positions' difference
  bool drifts = false;     // it moves with the key's position otherwise
};

// What is issued of a GPU's instructions, by the unit that does the work: ALU (integers, comparisons, choices), FMA
// (products and sums), MUFU (functions and conversions, a quarter or less of the others' rate), loads.
struct Slots {
  int alu = 0, fma = 0, mufu = 0, load = 0;
  Slots& operator+=(const Slots& other) {
    alu += other.alu, fma += other.fma, mufu += other.mufu, load += other.load;
    return *this;
  }
  bool operator==(const Slots&) const = default;
};

// What a mod's CUDA costs, counted on what is emitted and as it is hoisted there: per score, and apart what is computed
// once for all elements of a diagonal, a column or a row. What is the same for a head is not counted, nor is the
// scaling of scores. An estimate: ptxas may find a shorter way.
struct ModCost {
  Slots score;     // of the modified score
  Slots mask;      // besides, where elements may be dropped
  Slots gradient;  // besides, of the backward: the score's derivative, and what captured gradients are given
  Slots diagonal, column, row;
};

// What was found out about an expression; the same for every backend but for `folded`, of those that ask for that form,
// and `cost`.
struct ModFacts {
  ScoreClass score_class = ScoreClass::kIdentity;
  bool has_mask = false;  // some element may be dropped
  bool mask_reads_score = false;
  // Where literals say so, whatever the score is: of `softcap(30)` -30 and 30. A NaN stays one.
  std::optional<ScoreBounds> score_bounds;
  // What the mask is over a tile, and which keys or queries of it count, is known for some tiles: code for it is there.
  bool knows_tiles = false, knows_kv_range = false, knows_q_range = false;
  bool knows_rows = false;             // and that a query keeps all keys of a tile or none, for sm90
  bool tiles_read_captured = false;    // and it depends on captured values
  std::vector<TileSummary> summaries;  // that this code reads, where the problem has `summaries`
  int reads_proven = 0;                // captured reads proven in bounds
  int reads_clamped = 0;
  bool indices_fit_32 = true;                 // every integer was narrowed to 32 bits
  std::uint64_t hash_low = 0, hash_high = 0;  // of the canonical form: two spellings of one thing share it
  std::string canonical_mlir;
  std::optional<FoldedFacts> folded;
  std::optional<ModCost> cost;  // of CUDA
  // Of a problem compiled for the backward, in the order of the code's sinks.
  GradientNeed gradient_need = GradientNeed::kNothing;
  std::vector<SinkFacts> sinks;
};

// Native code of the softmax tile with one mod in it. Immutable; callable from any thread while alive.
class CpuTile {
 public:
  virtual ~CpuTile() = default;
  virtual cpu::TileFn function() const = 0;
  // What the tile expects scaled scores to be multiplied by: log2(e) for identity and affine mods, a literal that the
  // expression applies to the score first, or 1.
  virtual double score_factor() const = 0;
  // Element types of the captured reads that have to be in TileParams::staged before a call of function(), at most
  // cpu::kMaxStagedReads; rows() says where to take them from, and is null where there are none.
  virtual std::span<const dsl::DType> staged() const = 0;
  virtual cpu::RowsFn rows() const = 0;
  // What the mask is over tiles; each null where facts() say that nothing is known. As is the gradient tile's.
  virtual cpu::TileFacts tile_facts() const = 0;
  virtual const ModFacts& facts() const = 0;
  virtual const PhaseTimes& phases() const = 0;  // empty of compile phases when shared with an earlier problem
};

// How the CPU learns where the contributions of a tile go to.
enum class CpuPlaces : std::uint8_t {
  kOffsets,    // sink_offsets(), at every place that the sink's level distinguishes
  kAlongKeys,  // of an element-level sink: sink_offsets() at the tile's first row; for one query the others follow it
  kTile,       // of an element-level sink: the tile gives them
};

// Native code of the backward's tile, likewise. Scores come natural: score_factor() has no place here.
class CpuGradientTile {
 public:
  virtual ~CpuGradientTile() = default;
  virtual cpu::GradientTileFn function() const = 0;
  virtual std::span<const CpuPlaces> places() const = 0;  // one per sink
  virtual cpu::SinkOffsetsFn sink_offsets() const = 0;    // null where facts().sinks is empty
  virtual cpu::RowShiftsFn row_shifts() const = 0;        // null where no sink is a row shift
  virtual std::span<const dsl::DType> staged() const = 0;
  virtual cpu::RowsFn rows() const = 0;  // takes TileParams of which only indices and captured are set
  virtual cpu::TileFacts tile_facts() const = 0;
  virtual const ModFacts& facts() const = 0;
  virtual const PhaseTimes& phases() const = 0;
};

// A failure that is not the user's: the compiler refused something it should accept, or the machine did.
struct CompileError {
  std::string message;
};

template <typename T>
struct CompileResult {
  T value{};
  std::optional<CompileError> error;
};

// Runs the passes only.
CompileResult<ModFacts> analyze(const ModProblem& problem, const CompileOptions& options = {});

// Compiles the tile for the CPU. Deterministic; safe to call from several threads at once.
CompileResult<std::shared_ptr<const CpuTile>> compile_cpu_tile(const ModProblem& problem,
                                                               const CompileOptions& options = {});

// The same facts about tiles as a CpuTile's, without the code that computes one; null where nothing is known of any
// tile, or only with captured values. The functions live as long as the result.
CompileResult<std::shared_ptr<const cpu::TileFacts>> compile_cpu_tile_facts(const ModProblem& problem,
                                                                            const CompileOptions& options = {});

// The passes of the backward only: facts with gradient_need and sinks.
CompileResult<ModFacts> analyze_gradients(const ModProblem& problem, const CompileOptions& options = {});
CompileResult<std::shared_ptr<const CpuGradientTile>> compile_cpu_gradient_tile(const ModProblem& problem,
                                                                                const CompileOptions& options = {});

// What a mod wants of a kernel's registers, beside its arithmetic.
enum class ModDemand : std::uint8_t {
  kNone,
  kBusy,   // it has a mask, reads captured tensors or, in the backward, has a derivative or sums gradients of those
  kDense,  // it reads an element of its own for each score, or adds to one
};

// The mod as CUDA around a template, formatted, headed by the expression, the problem and the config. `problem`'s
// sequence lengths are rounded up to what the kernel's tiles reach, as for the CPU. Deterministic; safe to call from
// several threads at once.
struct EmittedCuda {
  CudaSource source;
  ModDemand demand = ModDemand::kNone;
  ModFacts facts;
  PhaseTimes phases;
};
// The fused forward kernel; entry `attnjit_forward(cuda::ForwardParams)`.
CompileResult<EmittedCuda> emit_sm80_forward(const ModProblem& problem, const sm80::ForwardConfig& config,
                                             const CompileOptions& options = {});
// The fused forward kernel of Hopper, with the mod in its folded form; entry `attnjit_forward(sm90::ForwardParams)`.
// For sm_90a.
CompileResult<EmittedCuda> emit_sm90_forward(const ModProblem& problem, const sm90::ForwardConfig& config,
                                             const CompileOptions& options = {});
// The fused backward kernels; the entries are kernels_templates/sm80/backward.cuh's.
CompileResult<EmittedCuda> emit_sm80_backward(const ModProblem& problem, const sm80::BackwardConfig& config,
                                              const CompileOptions& options = {});
// The eager backward's mod over materialised scores, kernels_templates/math/mod_backward.cuh. `deterministic`: how
// captured gradients are added up.
CompileResult<EmittedCuda> emit_cuda_math_backward(const ModProblem& problem, bool deterministic,
                                                   const CompileOptions& options = {});
// The eager path's mod over materialised scores, kernels_templates/math/mod.cuh; entry
// `attnjit_math_mod(math::ModParams)`. One binary for all element types.
CompileResult<EmittedCuda> emit_cuda_math(const ModProblem& problem, const CompileOptions& options = {});
// The rest of the eager path, kernels_templates/math/kernels.cuh behind a definition of math::kConfig: softmax and what
// the products need around it. `dtype`: of q, k, v and o. The expression is not in it: one binary per type.
CudaSource cuda_math_kernels(dsl::DType dtype);
// Gradients of captured tensors from sums to their types, kernels_templates/cuda/finish_gradients.cuh; entry
// `attnjit_finish_gradient(cuda::FinishParams)`. One binary for all.
CudaSource cuda_finish_gradients();
// The tables of captured values' extremes, kernels_templates/cuda/summaries.cuh; entry
// `attnjit_summarize(cuda::SummaryParams)`. One binary for all.
CudaSource cuda_summaries();
// Runs NVRTC. Nothing is cached here. Appends its phases to `phases` where given.
CompileResult<CudaBinary> compile_cuda(const Nvrtc& nvrtc, const CudaSource& source, CudaArch arch,
                                       const CompileOptions& options = {}, PhaseTimes* phases = nullptr);

}  // namespace attnjit::compiler
