// The compiler's passes and the pipeline made of them.
#pragma once

#include <memory>

#include "compiler/dialect/dialect.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/Pass/Pass.h"
#include "mlir/Pass/PassManager.h"

namespace attnjit::compiler {

#define GEN_PASS_DECL
#include "AttnjitPasses.h.inc"
#define GEN_PASS_REGISTRATION
#include "AttnjitPasses.h.inc"

// From what the builder made to the canonical form: `(f32) -> (f32, i1)`, whose text is hashed.
void build_canonical_pipeline(mlir::OpPassManager& passes);
// From the canonical form to facts and 32-bit integers.
void build_fact_pipeline(mlir::OpPassManager& passes);
// The same for CUDA, whose addresses are sums of 32-bit offsets and whose conversions are dear.
void build_cuda_fact_pipeline(mlir::OpPassManager& passes);

// The captured reads that attnjit-stage-reads numbered, in the order of their numbers.
llvm::SmallVector<ReadOp> staged_reads(mlir::func::FuncOp function);

// The block of `function`, which is no declaration. Where it has several: nullptr, and an error is emitted.
mlir::Block* only_block(mlir::func::FuncOp function);

// Erases every operation whose result nobody uses. All of them are pure.
void erase_dead(mlir::Block& block);

// On an operation: attnjit-dropped-elements does not look through it (and takes the mark away).
inline constexpr llvm::StringLiteral kOpaqueAttr = "attnjit.opaque";

// Facts, as attributes of the function.
// attnjit-score-in-log2: "identity", "affine" or "nonlinear".
inline constexpr llvm::StringLiteral kScoreClassAttr = "attnjit.score_class";
// attnjit-score-in-log2: present where the incoming score is multiplied by a number, and which, an f64.
inline constexpr llvm::StringLiteral kScoreFactorAttr = "attnjit.score_factor";
// attnjit-score-in-log2: present where the condition to keep an element reads the score.
inline constexpr llvm::StringLiteral kMaskReadsScoreAttr = "attnjit.mask_reads_score";
// attnjit-narrow-integers: present where every integer fits in 32 bits.
inline constexpr llvm::StringLiteral kFits32Attr = "attnjit.fits_32";

}  // namespace attnjit::compiler
