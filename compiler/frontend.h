// The steps that every target shares: from a bound expression to its MLIR function after all passes, and its facts.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "compiler/mlir_context.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/OwningOpRef.h"

namespace attnjit::compiler {

// One compile up to code generation. Not to be run twice.
class Frontend {
 public:
  explicit Frontend(PhaseTimes& phases) : phases_(phases) {}

  // False with error() set.
  bool run(const ModProblem& problem, const CompileOptions& options, Target target);
  // The same for the backward; facts() have gradient_need and sinks, and are of the function with the gradients in it.
  bool run_backward(const ModProblem& problem, const CompileOptions& options, Target target);
  // Of a forward no more than facts()' part about tiles, and tile_facts(); for the CPU.
  bool run_tile_facts(const ModProblem& problem);
  // For the CPU; null with error() set.
  std::unique_ptr<llvm::Module> lower(const ModProblem& problem, bool stage_reads, llvm::LLVMContext& context);
  // Of tile_facts() alone, which is there.
  std::unique_ptr<llvm::Module> lower_tile_facts(llvm::LLVMContext& context);

  const ModFacts& facts() const { return facts_; }
  double score_factor() const { return score_factor_; }  // see CpuTile
  const std::vector<dsl::DType>& staged() const { return staged_; }
  const std::vector<CpuPlaces>& places() const { return places_; }  // see CpuGradientTile; of lower()
  const std::string& error() const { return error_; }
  // The `(f32) -> (f32, i1)` after the passes; for the backward `(f32, f32) -> (f32, i1, f32, f32...)`.
  mlir::func::FuncOp function();
  // What compiler/tile_facts.h derived, after its passes; null where it says nothing. Gone once it is lowered.
  mlir::func::FuncOp tile_facts();

 private:
  bool run(const ModProblem& problem, const CompileOptions& options, Target target, bool backward);
  bool build(const ModProblem& problem);
  bool failed(const char* step);
  bool find_tile_facts(const ModProblem& problem, Target target);
  void collect_facts();
  void find_places();

  PhaseTimes& phases_;
  std::unique_ptr<MlirSession> session_;
  mlir::OwningOpRef<mlir::ModuleOp> module_;
  mlir::OwningOpRef<mlir::ModuleOp> tile_facts_;
  ModFacts facts_;
  double score_factor_ = 1.0;
  std::vector<dsl::DType> staged_;
  std::vector<CpuPlaces> places_;
  std::string error_;
};

// Appends the time from construction to destruction to `phases`.
class PhaseTimer {
 public:
  PhaseTimer(PhaseTimes& phases, std::string name);
  ~PhaseTimer();
  PhaseTimer(const PhaseTimer&) = delete;
  PhaseTimer& operator=(const PhaseTimer&) = delete;

 private:
  PhaseTimes& phases_;
  std::string name_;
  std::int64_t start_ns_;
};

}  // namespace attnjit::compiler
