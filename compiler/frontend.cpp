// The steps that every target shares, in order.
#include "compiler/frontend.h"

#include <chrono>
#include <limits>

#include "compiler/builder.h"
#include "compiler/dialect/dialect.h"
#include "compiler/gradient_facts.h"
#include "compiler/passes/passes.h"
#include "compiler/score_bounds.h"
#include "compiler/tile_facts.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

std::int64_t now_ns() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

std::string printed(mlir::ModuleOp module) {
  std::string text;
  llvm::raw_string_ostream stream(text);
  module.print(stream);
  return text;
}

// The canonical text without the extents of this problem: a hash names an expression on its dtypes and strides.
std::string shapeless(mlir::ModuleOp module) {
  mlir::OwningOpRef<mlir::ModuleOp> copy = module.clone();
  copy->walk([](mlir::Operation* op) {
    if (auto index = llvm::dyn_cast<IndexOp>(op)) index.removeExtentAttr();
    if (auto read = llvm::dyn_cast<ReadOp>(op)) read.setExtents(std::vector<std::int64_t>(read.getExtents().size(), 1));
    if (auto sink = llvm::dyn_cast<SinkOp>(op)) sink.setExtents(std::vector<std::int64_t>(sink.getExtents().size(), 1));
  });
  return printed(*copy);
}

// Why a problem cannot be compiled as it stands, or nothing. The caller has checked all of it: this is for our faults.
std::string problem_error(const ModProblem& problem) {
  const auto check = [&](const dsl::Expr& expr, dsl::Type root, const char* what) -> std::string {
    if (expr.root < 0 || static_cast<std::size_t>(expr.root) >= expr.nodes.size() || expr[expr.root].type != root)
      return std::string(what) + " is not bound";
    for (const dsl::Node& node : expr.nodes) {
      if (node.op != dsl::Op::kRead) continue;
      if (node.capture < 0 || static_cast<std::size_t>(node.capture) >= problem.captures.size())
        return std::string(what) + " reads a capture that has no CaptureInfo";
      const CaptureInfo& info = problem.captures[static_cast<std::size_t>(node.capture)];
      if (info.extent.size() != node.args.size() || info.stride_class.size() != node.args.size())
        return std::string(what) + " reads a capture with the wrong number of indices";
    }
    return {};
  };
  std::string error = check(problem.score_mod, dsl::Type::kFloat, "score_mod");
  if (error.empty() && problem.mask_mod) error = check(*problem.mask_mod, dsl::Type::kBool, "mask_mod");
  for (std::size_t i = 0; error.empty() && i < std::numeric_limits<std::uint32_t>::digits; ++i) {
    if (((problem.gradients >> i) & 1) == 0) continue;
    if (i >= problem.captures.size() || dsl::value_type(problem.captures[i].dtype) != dsl::Type::kFloat)
      error = "the gradient of capture " + std::to_string(i) + " is wanted, which is no floating tensor";
  }
  return error;
}

}  // namespace

bool Frontend::run(const ModProblem& problem, const CompileOptions& options, Target target) {
  return run(problem, options, target, false);
}

bool Frontend::run_backward(const ModProblem& problem, const CompileOptions& options, Target target) {
  return run(problem, options, target, true);
}

bool Frontend::run(const ModProblem& problem, const CompileOptions& options, Target target, bool backward) {
  if (!build(problem)) return false;
  {
    const PhaseTimer timer(phases_, backward ? "differentiate" : "canonicalize");
    const bool done = backward ? session_->differentiate(*module_, problem.gradients, problem.partial_keys)
                               : session_->canonicalize(*module_);
    if (!done) return failed(backward ? "differentiation" : "canonical form");
    facts_.canonical_mlir = printed(*module_);
    const std::string text = shapeless(*module_);
    const llvm::XXH128_hash_t hash =
        llvm::xxh3_128bits({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
    facts_.hash_low = hash.low64;
    facts_.hash_high = hash.high64;
  }
  if (options.dump) options.dump("mlir", facts_.canonical_mlir);
  const PhaseTimer timer(phases_, "facts");
  facts_.score_bounds = score_bounds(function());
  if (!find_tile_facts(problem, target)) return failed("facts");
  const bool found =
      backward ? session_->find_gradient_facts(*module_, target) : session_->find_facts(*module_, target);
  if (!found) return failed("facts");
  collect_facts();
  if (backward) {
    facts_.gradient_need = gradient_need(function());
    facts_.sinks = sink_facts(function(), problem);
  }
  return true;
}

bool Frontend::run_tile_facts(const ModProblem& problem) {
  if (!build(problem)) return false;
  {
    const PhaseTimer timer(phases_, "canonicalize");
    if (!session_->canonicalize(*module_)) return failed("canonical form");
  }
  const PhaseTimer timer(phases_, "facts");
  return find_tile_facts(problem, Target::kCpu) || failed("facts");
}

bool Frontend::build(const ModProblem& problem) {
  error_ = problem_error(problem);
  if (!error_.empty()) return false;
  {
    const PhaseTimer timer(phases_, "context");
    session_ = std::make_unique<MlirSession>();
  }
  const PhaseTimer timer(phases_, "build");
  module_ = build_module(session_->context(), problem);
  return true;
}

std::unique_ptr<llvm::Module> Frontend::lower(const ModProblem& problem, bool stage_reads, llvm::LLVMContext& context) {
  const PhaseTimer timer(phases_, "lower");
  if (stage_reads) {
    if (!session_->stage_reads(*module_)) {
      failed("lowering");
      return nullptr;
    }
    for (ReadOp read : staged_reads(function())) staged_.push_back(problem.captures[read.getCapture()].dtype);
  }
  find_places();
  if (mlir::func::FuncOp facts = tile_facts()) {
    facts->remove();
    module_->push_back(facts);
    tile_facts_ = {};
  }
  std::unique_ptr<llvm::Module> module = session_->to_llvm(*module_, context);
  if (!module) failed("lowering");
  return module;
}

std::unique_ptr<llvm::Module> Frontend::lower_tile_facts(llvm::LLVMContext& context) {
  const PhaseTimer timer(phases_, "lower");
  std::unique_ptr<llvm::Module> module = session_->to_llvm(*tile_facts_, context);
  if (!module) failed("lowering");
  tile_facts_ = {};
  return module;
}

// From the canonical form: what later passes make of it is nearer to code and further from the text.
bool Frontend::find_tile_facts(const ModProblem& problem, Target target) {
  tile_facts_ = derive_tile_facts(function(), problem, facts_.summaries);
  if (!tile_facts_) return true;
  if (!session_->finish_tile_facts(*tile_facts_, target)) return false;
  facts_.knows_tiles = knows_tiles(tile_facts());
  facts_.knows_rows = facts_.knows_tiles && knows_rows(tile_facts());
  facts_.knows_kv_range = knows_kv_range(tile_facts());
  facts_.knows_q_range = knows_q_range(tile_facts());
  tile_facts().walk([&](ReadOp) { facts_.tiles_read_captured = true; });
  if (!facts_.knows_tiles && !facts_.knows_kv_range && !facts_.knows_q_range) {
    tile_facts_ = {};
    facts_.summaries.clear();
  }
  return true;
}

// Decides how the runtime learns where each sink goes, and tells the lowering.
void Frontend::find_places() {
  mlir::Operation* const ret = function().front().getTerminator();
  for (const auto& [i, facts] : llvm::enumerate(facts_.sinks)) {
    mlir::Operation* const sink = ret->getOperand(static_cast<unsigned>(3 + i)).getDefiningOp();
    const bool element = facts.level == SinkLevel::kElement;
    places_.push_back(!element                        ? CpuPlaces::kOffsets
                      : sink->hasAttr(kAlongKeysAttr) ? CpuPlaces::kAlongKeys
                                                      : CpuPlaces::kTile);
    if (places_.back() == CpuPlaces::kTile) sink->setAttr(kPlacedAttr, mlir::UnitAttr::get(sink->getContext()));
  }
}

mlir::func::FuncOp Frontend::function() { return *module_->getOps<mlir::func::FuncOp>().begin(); }

mlir::func::FuncOp Frontend::tile_facts() {
  return tile_facts_ ? *tile_facts_->getOps<mlir::func::FuncOp>().begin() : mlir::func::FuncOp();
}

bool Frontend::failed(const char* step) {
  error_ = std::string(step) + " failed: " + session_->errors();
  return false;
}

void Frontend::collect_facts() {
  mlir::func::FuncOp made = function();
  const llvm::StringRef name = made->getAttrOfType<mlir::StringAttr>(kScoreClassAttr).getValue();
  facts_.score_class = name == "identity" ? ScoreClass::kIdentity
                       : name == "affine" ? ScoreClass::kAffine
                                          : ScoreClass::kNonlinear;
  if (const auto factor = made->getAttrOfType<mlir::FloatAttr>(kScoreFactorAttr))
    score_factor_ = factor.getValueAsDouble();
  facts_.mask_reads_score = made->hasAttr(kMaskReadsScoreAttr);
  facts_.indices_fit_32 = made->hasAttr(kFits32Attr);
  facts_.has_mask = !mlir::matchPattern(made.front().getTerminator()->getOperand(1), mlir::m_One());
  made.walk([&](ReadOp read) {
    const bool proven = llvm::all_of(*read.getInBounds(), [](bool in_bounds) { return in_bounds; });
    ++(proven ? facts_.reads_proven : facts_.reads_clamped);
  });
}

PhaseTimer::PhaseTimer(PhaseTimes& phases, std::string name)
    : phases_(phases), name_(std::move(name)), start_ns_(now_ns()) {}
PhaseTimer::~PhaseTimer() { phases_.emplace_back(name_, static_cast<double>(now_ns() - start_ns_) * 1e-6); }

}  // namespace attnjit::compiler
