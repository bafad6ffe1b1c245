// From the mod's LLVM IR to an object file of the tile for one instruction set.
#pragma once

#include <memory>
#include <string>

#include "compiler/compiler.h"
#include "llvm/IR/Module.h"
#include "llvm/Support/MemoryBuffer.h"

namespace attnjit::compiler {

// Code around attnjit_mod: bitcode that calls it and the one function of it that is kept.
struct CpuTemplate {
  llvm::StringRef bitcode;
  llvm::StringRef entry;
  bool stages_reads = false;  // gives the mod what TileParams::staged says
};
// A cpu::RowsFn, in the object of a mod that stages reads.
inline constexpr llvm::StringLiteral kRowsEntry = "attnjit_rows";

// The softmax tile; its entry is a cpu::TileFn.
CpuTemplate tile_template(CpuIsa isa);

struct CodegenResult {
  std::unique_ptr<llvm::MemoryBuffer> object;
  std::string error;  // set where object is null
};

// Links `mod` into the template, inlines, vectorises and compiles. Appends its phases to `phases`.
CodegenResult compile_object(std::unique_ptr<llvm::Module> mod, const CpuTemplate& around,
                             const CompileOptions& options, PhaseTimes& phases);

}  // namespace attnjit::compiler
