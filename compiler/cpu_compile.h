// One compile for the CPU, whatever template the mod goes into: what the tiles and the tests share.
#pragma once

#include <memory>

#include "compiler/compiler.h"
#include "compiler/cpu_codegen.h"
#include "compiler/cpu_jit.h"

namespace attnjit::compiler {

struct CompiledMod {
  ModFacts facts;
  double score_factor = 1.0;       // see CpuTile
  std::vector<dsl::DType> staged;  // see CpuTile
  std::vector<CpuPlaces> places;   // see CpuGradientTile
  PhaseTimes phases;
  std::shared_ptr<const NativeCode> code;  // entry: the template's
};

// Code that is equal, for the same instruction set and template, is shared between problems while one of them lives.
CompileResult<CompiledMod> compile_mod(const ModProblem& problem, const CompileOptions& options,
                                       const CpuTemplate& around);

// What code of compile_mod knows of tiles.
cpu::TileFacts tile_facts_of(const NativeCode& code);

}  // namespace attnjit::compiler
