// From the mod's LLVM IR to an object file of the tile for one instruction set.
#pragma once

#include <memory>
#include <string>

#include "compiler/compiler.h"
#include "llvm/IR/Module.h"
#include "llvm/Support/MemoryBuffer.h"

namespace attnjit::compiler {

// Code around a mod: bitcode that calls it and the one function of it that is kept.
struct CpuTemplate {
  llvm::StringRef bitcode;  // empty: there is nothing around it
  llvm::StringRef entry;
  bool stages_reads = false;  // gives the mod what TileParams::staged says
  bool backward = false;
};
// What an object has beside the template's entry: a cpu::RowsFn where the mod stages reads, and of a backward a
// cpu::SinkOffsetsFn where it has sinks and a cpu::RowShiftsFn where one is a row shift. What is known of tiles is
// there, too.
inline constexpr llvm::StringLiteral kRowsEntry = "attnjit_rows";
inline constexpr llvm::StringLiteral kSinkOffsetsEntry = "attnjit_sink_offsets";
inline constexpr llvm::StringLiteral kRowShiftsEntry = "attnjit_row_shifts";
inline constexpr llvm::StringLiteral kTileKindEntry = "attnjit_tile_kind";
inline constexpr llvm::StringLiteral kKvRangeEntry = "attnjit_kv_range";
inline constexpr llvm::StringLiteral kQRangeEntry = "attnjit_q_range";

// The softmax tile; its entry is a cpu::TileFn.
CpuTemplate tile_template(CpuIsa isa);
// The backward's tile; its entry is a cpu::GradientTileFn.
CpuTemplate gradient_tile_template(CpuIsa isa);
// Nothing but what is known of tiles; its entry is a cpu::TileKindFn.
CpuTemplate tile_facts_template();

struct CodegenResult {
  std::unique_ptr<llvm::MemoryBuffer> object;
  std::string error;  // set where object is null
};

// Links `mod` into the template, inlines, vectorises and compiles. Appends its phases to `phases`.
CodegenResult compile_object(std::unique_ptr<llvm::Module> mod, const CpuTemplate& around,
                             const CompileOptions& options, PhaseTimes& phases);

}  // namespace attnjit::compiler
