// The compiler's passes, in the order in which the pipeline runs them.
#ifndef ATTNJIT_PASSES
#define ATTNJIT_PASSES

include "mlir/Pass/PassBase.td"

def DroppedElements : Pass<"attnjit-dropped-elements", "::mlir::func::FuncOp"> {
  let summary = "Split a score_mod into a value and the condition to keep the element";
  let description = [{
    Rewrites `(f32) -> f32` to `(f32) -> (f32, i1)` by the rule of docs/language.md, "Dropped elements". The value holds
    where the condition does; elsewhere it means nothing. Runs on what the builder made, before anything is folded:
    the rule speaks of the expression as it was written.
  }];
  let options = [Option<"kinks", "kinks", "bool", /*default=*/"false", "Keep the marks of attnjit-differentiate">];
  let dependentDialects = ["::mlir::arith::ArithDialect"];
}

def Differentiate : Pass<"attnjit-differentiate", "::mlir::func::FuncOp"> {
  let summary = "Add the gradients of the score and of captured tensors";
  let description = [{
    Rewrites what attnjit-dropped-elements leaves to
    `(f32 score, f32 grad) -> (f32 value, i1 keep, f32 dscore, f32 sinks...)` as docs/backward.md says, in reverse mode.
    What a choice did not choose and what has a `grad` of 0 adds exactly 0: a gradient is followed as a chain of products
    beside the choices that lead to it, and one select at its end keeps out the rest. Gradients that are the same along
    a row are kept apart from others and end in sinks of their own, marked `row_shift`: over all keys of the row they
    sum to the gradient of its LSE. Over a part of the keys they do not, and are summed as any other.
  }];
  let options = [Option<"gradients", "gradients", "uint32_t", /*default=*/"0",
                        "The captured tensors whose gradient is wanted, a bit by number">,
                 Option<"partialKeys", "partial-keys", "bool", /*default=*/"false",
                        "The LSE is of more keys than these: no sink is a row shift">];
  let dependentDialects = ["::mlir::arith::ArithDialect", "::mlir::math::MathDialect"];
}

def CanonicalOrder : Pass<"attnjit-canonical-order", "::mlir::func::FuncOp"> {
  let summary = "Order commutative operands, normalise comparison and select polarity, order operations";
  let description = [{
    Upstream canonicalize and CSE order nothing. Operands are ordered by structure alone (constants last), comparisons
    and selects get one polarity, neutral literals of float operators (`x + 0`, `x * 1`) go, and operations follow the
    order in which the result needs them: two spellings of one thing print as the same text. Floats are never
    reassociated.
  }];
  let dependentDialects = ["::mlir::arith::ArithDialect"];
}

def ScoreInLog2 : Pass<"attnjit-score-in-log2", "::mlir::func::FuncOp"> {
  let summary = "Find how the value depends on the score and turn it to log2 units";
  let description = [{
    Sets `attnjit.score_class`. Where the value is the score or `a * score + c` with a and c free of it, the incoming
    score is taken to be multiplied by log2(e) already, and only c is scaled. Otherwise the value is multiplied, and the
    score comes plain, or times a literal: where only tanh sees `score / c` or `score * c`, the literal goes into the
    scale. `attnjit.score_factor` says what the score is multiplied by.
  }];
  let options = [Option<"natural", "natural", "bool", /*default=*/"false",
                        "Set the class and leave all units, as the backward has them">];
  let dependentDialects = ["::mlir::arith::ArithDialect"];
}

def ProveBounds : Pass<"attnjit-prove-bounds", "::mlir::func::FuncOp"> {
  let summary = "Mark indices of captured reads that provably stay within their extents";
}

def NarrowIntegers : Pass<"attnjit-narrow-integers", "::mlir::func::FuncOp"> {
  let summary = "Compute in 32 bits what provably fits";
  let description = [{
    Demand-driven: comparisons, conversions to float and divisions pull 32-bit versions of their operands; what feeds
    an address stays 64 bits wide, so that consecutive lanes still read consecutive elements. What is not proven stays
    64 bits. (Upstream's arith-int-range-narrowing narrows signed operations by unsigned ranges: maxsi(4000000000, 1)
    changes its value.)
  }];
  let options = [Option<"addresses", "addresses", "bool", /*default=*/"false", "Narrow what feeds an address, too">];
  let dependentDialects = ["::mlir::arith::ArithDialect"];
}

def SplitConversions : Pass<"attnjit-split-conversions", "::mlir::func::FuncOp"> {
  let summary = "Convert integers to float where they vary in one way only";
  let description = [{
    `float(q_idx + kv_idx)` is a conversion per element, at a quarter of an addition's rate or less on GPUs.
    `float(q_idx) + float(kv_idx)` is one per row, one per column and an addition, and the same number wherever operands
    and result stay below 2^24. Through sums, differences, products, minima, maxima and choices. What varies with the
    two positions' difference alone is left: it has a place of its own.
  }];
  let dependentDialects = ["::mlir::arith::ArithDialect"];
}

def StageReads : Pass<"attnjit-stage-reads", "::mlir::func::FuncOp"> {
  let summary = "Number the captured reads whose rows lie along the keys, to be transposed before the CPU tile";
  let description = [{
    The lanes of the CPU tile run along the queries, so `bias[h, q_idx, kv_idx]` is a gather. Such a read is staged: its
    rows are transposed by native code before the tile, which then reads neighbours. What it takes: one dimension of
    stride 1 whose index is kv_idx plus what is free of the score, q_idx and kv_idx, proven in bounds; other indices free
    of the score and kv_idx, one of them of run-time stride and varying with q_idx; elements of at most 32 bits. The
    first kMaxStagedReads are taken.

    A sink whose innermost index is of that kind, and no other index varies with kv_idx or the score, gets
    `attnjit.along_keys`: of a lane, the place of the tile's first row says all.
  }];
}

def LowerToLlvm : Pass<"attnjit-lower-to-llvm", "::mlir::ModuleOp"> {
  let summary = "Lower the function to attnjit_mod of the CPU tile, in the LLVM dialect";
  let description = [{
    `float attnjit_mod(float score, i64 b, i64 h, i64 q_idx, i64 kv_idx, ptr captured, ptr staged, i64 element)`:
    straight-line code without traps, branches or undefined results, whose loads are all speculatable and invariant.
    Where reads are staged, also
    `void attnjit_lane_rows(i64 b, i64 h, i64 q_idx, i64 kv_idx, ptr captured, ptr addresses)`.

    What attnjit-differentiate made becomes, in the place of attnjit_mod, `attnjit_mod_value` of the same arguments and
    `float attnjit_mod_gradient(float score, float grad, i64 b, i64 h, i64 q_idx, i64 kv_idx, ptr captured, ptr staged,
    i64 element, ptr contributions, ptr places)`, which returns the gradient of the score and stores those of its sinks
    that are no row shifts; the places of those marked `attnjit.placed`, too. Where there are sinks also
    `attnjit_sink_offsets` (a cpu::SinkOffsetsFn), where there are row shifts `attnjit_row_shifts` (a cpu::RowShiftsFn).

    A second function, or the only one, `@tile_facts` (compiler/tile_facts.h) becomes, as far as it says anything, `attnjit_tile_kind` (a
    cpu::TileKindFn), `attnjit_kv_range` and `attnjit_q_range` (each a cpu::TileRangeFn).
  }];
  let dependentDialects = ["::mlir::LLVM::LLVMDialect", "::mlir::arith::ArithDialect"];
}

#endif
