// The mod as CUDA text.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"

namespace attnjit::compiler {

// How exact functions of the score have to be. What is free of the score is always computed in full: once per row or
// column it costs little.
enum class CudaAccuracy : std::uint8_t {
  kFull,
  kFloat16,   // approximations of a few units of float32's last place
  kBFloat16,  // besides, tanh within 2^-10.98
};

// Which hooks a forward's mod has for the score: see kernels_templates/cuda/mod_defaults.cuh.
enum class ModForm : std::uint8_t {
  kPlain,
  kFolded,
};

struct CudaMod {
  std::string text;  // `struct Mod : ModDefaults` of kernels_templates/cuda/mod_defaults.cuh, in its namespace
  ModDemand demand = ModDemand::kNone;
  std::vector<SinkLevel> sink_levels;  // what the text's sinks say
  std::optional<FoldedFacts> folded;   // of ModForm::kFolded
  ModCost cost;
  std::string error;  // set where an operation has no spelling; `text` is then empty
};

// `function` as Target::kCuda's passes leave it, for the forward or the backward; `sinks` are its facts. A backward has
// the plain form only. Same text for the same function and names. `tile_facts`: Frontend's, or null.
CudaMod emit_cuda_mod(mlir::func::FuncOp function, const ModProblem& problem, CudaAccuracy accuracy,
                      std::span<const SinkFacts> sinks = {}, mlir::func::FuncOp tile_facts = {},
                      ModForm form = ModForm::kPlain);

}  // namespace attnjit::compiler
