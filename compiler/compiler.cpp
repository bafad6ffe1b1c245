// Expression to facts and native code: the steps in order, and the cache of code that problems share.
#include "compiler/compiler.h"

#include <map>
#include <mutex>
#include <tuple>

#include "compiler/builder.h"
#include "compiler/cpu_compile.h"
#include "compiler/dialect/dialect.h"
#include "compiler/mlir_context.h"
#include "compiler/passes/passes.h"
#include "llvm/Support/raw_ostream.h"
#include "llvm/Support/xxhash.h"
#include "mlir/Dialect/Arith/IR/Arith.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/Matchers.h"

namespace attnjit::compiler {
namespace {

llvm::XXH128_hash_t hash_text(llvm::StringRef text) {
  return llvm::xxh3_128bits({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
}

std::string printed(mlir::ModuleOp module) {
  std::string text;
  llvm::raw_string_ostream stream(text);
  module.print(stream);
  return text;
}

std::string printed(const llvm::Module& module) {
  std::string text;
  llvm::raw_string_ostream stream(text);
  module.print(stream, nullptr);
  return text;
}

// The canonical text without the extents of this problem: a hash names an expression on its dtypes and strides.
std::string shapeless(mlir::ModuleOp module) {
  mlir::OwningOpRef<mlir::ModuleOp> copy = module.clone();
  copy->walk([](mlir::Operation* op) {
    if (auto index = llvm::dyn_cast<IndexOp>(op)) index.removeExtentAttr();
    if (auto read = llvm::dyn_cast<ReadOp>(op)) read.setExtents(std::vector<std::int64_t>(read.getExtents().size(), 1));
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
  return error;
}

// Everything before code generation.
class Frontend {
 public:
  explicit Frontend(PhaseTimes& phases) : phases_(phases) {}

  // False with `error` set.
  bool run(const ModProblem& problem, const CompileOptions& options) {
    error = problem_error(problem);
    if (!error.empty()) return false;
    {
      const PhaseTimer timer(phases_, "context");
      session_ = std::make_unique<MlirSession>();
    }
    {
      const PhaseTimer timer(phases_, "build");
      module_ = build_module(session_->context(), problem);
    }
    {
      const PhaseTimer timer(phases_, "canonicalize");
      if (!session_->canonicalize(*module_)) return failed("canonical form");
      facts.canonical_mlir = printed(*module_);
      const llvm::XXH128_hash_t hash = hash_text(shapeless(*module_));
      facts.hash_low = hash.low64;
      facts.hash_high = hash.high64;
    }
    if (options.dump) options.dump("mlir", facts.canonical_mlir);
    const PhaseTimer timer(phases_, "facts");
    if (!session_->find_facts(*module_)) return failed("facts");
    collect_facts();
    return true;
  }

  std::unique_ptr<llvm::Module> lower(const ModProblem& problem, bool stage_reads, llvm::LLVMContext& context) {
    const PhaseTimer timer(phases_, "lower");
    if (stage_reads) {
      if (!session_->stage_reads(*module_)) {
        failed("lowering");
        return nullptr;
      }
      for (ReadOp read : staged_reads(*module_->getOps<mlir::func::FuncOp>().begin()))
        staged.push_back(problem.captures[read.getCapture()].dtype);
    }
    std::unique_ptr<llvm::Module> module = session_->to_llvm(*module_, context);
    if (!module) failed("lowering");
    return module;
  }

  ModFacts facts;
  double score_factor = 1.0;
  std::vector<dsl::DType> staged;
  std::string error;

 private:
  bool failed(const char* step) {
    error = std::string(step) + " failed: " + session_->errors();
    return false;
  }

  void collect_facts() {
    auto function = *module_->getOps<mlir::func::FuncOp>().begin();
    const llvm::StringRef name = function->getAttrOfType<mlir::StringAttr>(kScoreClassAttr).getValue();
    facts.score_class = name == "identity" ? ScoreClass::kIdentity
                        : name == "affine" ? ScoreClass::kAffine
                                           : ScoreClass::kNonlinear;
    if (const auto factor = function->getAttrOfType<mlir::FloatAttr>(kScoreFactorAttr))
      score_factor = factor.getValueAsDouble();
    facts.mask_reads_score = function->hasAttr(kMaskReadsScoreAttr);
    facts.indices_fit_32 = function->hasAttr(kFits32Attr);
    const mlir::Value keep = function.front().getTerminator()->getOperand(1);
    facts.has_mask = !mlir::matchPattern(keep, mlir::m_One());
    function.walk([&](ReadOp read) {
      const bool proven = llvm::all_of(*read.getInBounds(), [](bool in_bounds) { return in_bounds; });
      ++(proven ? facts.reads_proven : facts.reads_clamped);
    });
  }

  PhaseTimes& phases_;
  std::unique_ptr<MlirSession> session_;
  mlir::OwningOpRef<mlir::ModuleOp> module_;
};

// Code by the exact text it is made from, as long as somebody uses it.
class CodeCache {
 public:
  using Key = std::tuple<std::uint64_t, std::uint64_t, int, std::string>;

  std::shared_ptr<const NativeCode> find(const Key& key) {
    const std::lock_guard lock(mutex_);
    const auto found = codes_.find(key);
    return found == codes_.end() ? nullptr : found->second.lock();
  }

  // What is to be used: `code`, or what another thread was first with.
  std::shared_ptr<const NativeCode> insert(const Key& key, std::shared_ptr<const NativeCode> code) {
    const std::lock_guard lock(mutex_);
    std::erase_if(codes_, [](const auto& entry) { return entry.second.expired(); });
    std::weak_ptr<const NativeCode>& slot = codes_[key];
    if (auto first = slot.lock()) return first;
    slot = code;
    return code;
  }

  static CodeCache& shared() {
    static CodeCache* const cache = new CodeCache;
    return *cache;
  }

 private:
  std::mutex mutex_;
  std::map<Key, std::weak_ptr<const NativeCode>> codes_;
};

class CompiledTile : public CpuTile {
 public:
  explicit CompiledTile(CompiledMod compiled) : compiled_(std::move(compiled)) {}
  cpu::TileFn function() const override { return reinterpret_cast<cpu::TileFn>(compiled_.code->entry()); }
  double score_factor() const override { return compiled_.score_factor; }
  std::span<const dsl::DType> staged() const override { return compiled_.staged; }
  cpu::RowsFn rows() const override { return reinterpret_cast<cpu::RowsFn>(compiled_.code->rows_entry()); }
  const ModFacts& facts() const override { return compiled_.facts; }
  const PhaseTimes& phases() const override { return compiled_.phases; }

 private:
  CompiledMod compiled_;
};

}  // namespace

CompileResult<CompiledMod> compile_mod(const ModProblem& problem, const CompileOptions& options,
                                       const CpuTemplate& around) {
  CompileResult<CompiledMod> result;
  CompiledMod& compiled = result.value;
  const auto fail = [&](std::string message) {
    result.error = CompileError{std::move(message)};
    return std::move(result);
  };
  if (options.isa > host_cpu_isa())
    return fail("this machine cannot run " + std::string(cpu_isa_name(options.isa)) + " code, its best is " +
                std::string(cpu_isa_name(host_cpu_isa())));
  Frontend frontend(compiled.phases);
  if (!frontend.run(problem, options)) return fail(frontend.error);
  llvm::LLVMContext context;
  std::unique_ptr<llvm::Module> mod = frontend.lower(problem, around.stages_reads, context);
  if (!mod) return fail(frontend.error);
  compiled.facts = std::move(frontend.facts);
  compiled.score_factor = frontend.score_factor;
  compiled.staged = std::move(frontend.staged);

  const llvm::XXH128_hash_t hash = hash_text(printed(*mod));
  const CodeCache::Key key{hash.low64, hash.high64, static_cast<int>(options.isa), around.entry.str()};
  // A dump shows the compile, so there has to be one.
  if (!options.dump) compiled.code = CodeCache::shared().find(key);
  if (compiled.code) return result;
  CodegenResult object = compile_object(std::move(mod), around, options, compiled.phases);
  if (!object.object) return fail(object.error);
  LoadResult loaded;
  {
    const PhaseTimer timer(compiled.phases, "load");
    loaded =
        load_object(std::move(object.object), around.entry, compiled.staged.empty() ? "" : llvm::StringRef(kRowsEntry));
  }
  if (!loaded.code) return fail("the code does not load: " + loaded.error);
  compiled.code = CodeCache::shared().insert(key, std::move(loaded.code));
  return result;
}

CompileResult<ModFacts> analyze(const ModProblem& problem, const CompileOptions& options) {
  PhaseTimes phases;
  Frontend frontend(phases);
  CompileResult<ModFacts> result;
  if (frontend.run(problem, options)) {
    result.value = std::move(frontend.facts);
  } else {
    result.error = CompileError{frontend.error};
  }
  return result;
}

CompileResult<std::shared_ptr<const CpuTile>> compile_cpu_tile(const ModProblem& problem,
                                                               const CompileOptions& options) {
  CompileResult<CompiledMod> compiled = compile_mod(problem, options, tile_template(options.isa));
  CompileResult<std::shared_ptr<const CpuTile>> result;
  if (compiled.error) {
    result.error = std::move(compiled.error);
  } else {
    result.value = std::make_shared<CompiledTile>(std::move(compiled.value));
  }
  return result;
}

}  // namespace attnjit::compiler
