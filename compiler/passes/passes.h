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
// The same three for the backward; `gradients` and `partial_keys` are attnjit-differentiate's options.
void build_gradient_pipeline(mlir::OpPassManager& passes, std::uint32_t gradients, bool partial_keys);
void build_gradient_fact_pipeline(mlir::OpPassManager& passes);
void build_cuda_gradient_fact_pipeline(mlir::OpPassManager& passes);

// What compiler/tile_facts.h made, to 32-bit integers and without what does not count.
void build_tile_facts_pipeline(mlir::OpPassManager& passes, bool cuda);

// The captured reads that attnjit-stage-reads numbered, in the order of their numbers.
llvm::SmallVector<ReadOp> staged_reads(mlir::func::FuncOp function);

// The block of `function`, which is no declaration. Where it has several: nullptr, and an error is emitted.
mlir::Block* only_block(mlir::func::FuncOp function);

// Erases every operation whose result nobody uses. All of them are pure.
void erase_dead(mlir::Block& block);

// On an operation: attnjit-dropped-elements does not look through it (and takes the mark away).
inline constexpr llvm::StringLiteral kOpaqueAttr = "attnjit.opaque";
// Kinks that are not those of the operation alone, for attnjit-differentiate, which takes the marks away; so does
// attnjit-dropped-elements where nothing is to be differentiated.
// On both halves of a clamp, minimum(maximum(x, lo), hi) with the operands in this order: the clamp's number. Clamps
// that differ in which operand is x stay apart.
inline constexpr llvm::StringLiteral kClampAttr = "attnjit.clamp";
// On maximum(x, 0): relu.
inline constexpr llvm::StringLiteral kReluAttr = "attnjit.relu";
// The derivative is 0.
inline constexpr llvm::StringLiteral kFlatAttr = "attnjit.flat";
void take_kink_marks(mlir::Operation& op);

// On a sink, of attnjit-stage-reads: along the keys its places are those of the first key and the following.
inline constexpr llvm::StringLiteral kAlongKeysAttr = "attnjit.along_keys";
// On a sink, for attnjit-lower-to-llvm: the CPU tile writes each element's place.
inline constexpr llvm::StringLiteral kPlacedAttr = "attnjit.placed";

// The function of compiler/tile_facts.h, for attnjit-lower-to-llvm.
inline constexpr llvm::StringLiteral kTileFactsName = "tile_facts";

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
