// What a mod's condition to keep elements is over whole tiles, as a function of the tiles' ends.
#pragma once

#include "compiler/compiler.h"
#include "mlir/Dialect/Func/IR/FuncOps.h"
#include "mlir/IR/BuiltinOps.h"
#include "mlir/IR/OwningOpRef.h"

namespace attnjit::compiler {

// The results of the function below, in order.
enum class TileResult : std::uint8_t {
  kNever,   // i1: no element of the tile is kept
  kAlways,  // i1: every element is
  // i32, both ends included, within the tile's own: keys outside are dropped for every query of the tile, and queries
  // outside for every key.
  kKvFirst,
  kKvLast,
  kQFirst,
  kQLast,
  // i1: of each query of each head all keys of the tile are kept, or none. Not looked for in masks that read nothing of
  // the key but its position, as causal ones: all that would be found are the edges of conditions on queries alone.
  kByRow,
};

// A module with `@tile_facts() -> (i1, i1, i32, i32, i32, i32, i1)`, of attnjit.tile_end, captured reads and
// arithmetic, from the canonical form of a forward or a backward. Null where nothing can be known: there is no mask, it
// reads the score, or it is too long. Sound, not exact: an i1 may be false of any tile, and ranges the whole.
// `summaries`: what it reads beside captures.
mlir::OwningOpRef<mlir::ModuleOp> derive_tile_facts(mlir::func::FuncOp function, const ModProblem& problem,
                                                    std::vector<TileSummary>& summaries);

// Of that function after MlirSession::finish_tile_facts: whether its results say anything.
bool knows_tiles(mlir::func::FuncOp tile_facts);
bool knows_kv_range(mlir::func::FuncOp tile_facts);
bool knows_q_range(mlir::func::FuncOp tile_facts);
bool knows_rows(mlir::func::FuncOp tile_facts);

}  // namespace attnjit::compiler
