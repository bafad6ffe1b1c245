// What the run-time compiled softmax tile and the code around it agree on. Includes nothing: it is also compiled
// freestanding to bitcode. The compiler's lowering of captured reads relies on the layout of CapturedView.
#pragma once

namespace attnjit::cpu {

// Query rows side by side in one panel: the lanes of the score tile S^T[kv][q].
inline constexpr int kPanelLanes = 32;
// Most key rows one tile call handles.
inline constexpr int kTileRows = 128;
inline constexpr int kMaxCaptureRank = 5;
// Most captured reads of one mod that are staged; see TileParams::staged.
inline constexpr int kMaxStagedReads = 2;

// A captured tensor. Strides in elements; a scalar has rank 0 and only data.
struct CapturedView {
  const void* data;
  long long stride[kMaxCaptureRank];
  long long extent[kMaxCaptureRank];
};

// One panel of kPanelLanes query rows against `rows` key rows (1 to kTileRows).
struct TileParams {
  float* scores;     // [rows][kPanelLanes], 64-byte aligned; in: scaled scores S^T, out: unnormalised probabilities P^T
  float* row_max;    // [kPanelLanes] running maximum of the modified scores, in log2 units; in and out
  float* row_sum;    // [kPanelLanes] running sum of exponentials; in and out
  float* rescale;    // [kPanelLanes] out: the factor exp2(old maximum - new maximum) that O accumulated so far needs
  long long b, h;    // batch and query head
  long long q_idx;   // logical query position of lane 0
  long long kv_idx;  // logical key position of row 0
  long long rows;
  const CapturedView* captured;
  // [staged reads][kTileRows][kPanelLanes] words, 64-byte aligned: the elements that such a read gives for every row
  // and lane, floats as f32 and the others as signed 32-bit integers. Untouched where the mod has none.
  const void* staged = nullptr;
};

// The same panel in the backward. Everything is in natural units.
struct GradientTileParams {
  float* scores;     // [rows][kPanelLanes], 64-byte aligned; in: scaled scores S^T, out: probabilities P^T
  float* gradients;  // likewise; in: dP^T = V dO^T, out: dS^T, the gradient of the scaled scores
  const float* lse;  // [kPanelLanes]; +inf where a lane's row has no kept element or does not exist: its P and dS are 0
  const float* delta;  // [kPanelLanes] sum of dO * O along the row, less the gradient of lse; finite where lse is +inf
  long long b, h;
  long long q_idx;
  long long kv_idx;
  long long rows;
  const CapturedView* captured;
  const void* staged = nullptr;  // as in TileParams
  // [sinks][kTileRows][kPanelLanes], 64-byte aligned; out: what each element adds to each captured gradient, exactly 0
  // where the element is dropped. Row shifts are left out (their part is undefined). Untouched where there are no
  // sinks.
  float* contributions = nullptr;
  // [sinks][kTileRows][kPanelLanes], likewise; out: the places of those contributions, for the sinks of which
  // CpuGradientTile::places() says that the tile gives them, as SinkOffsetsFn gives the others'.
  long long* places = nullptr;
};

using TileFn = void (*)(const TileParams*);
using GradientTileFn = void (*)(const GradientTileParams*);
// Writes to offsets[sink], for every sink whose places the tile does not give, the place in a packed gradient tensor of
// the captured tensor's extents that the element (b, h, q_idx, kv_idx) contributes to. Of what a sink's level leaves
// open any value may be given. (`table[int(score)]` is a place that depends on the score: the tile gives it.)
using SinkOffsetsFn = void (*)(long long b, long long h, long long q_idx, long long kv_idx,
                               const CapturedView* captured, long long* offsets);
// Writes to values[sink], for the sinks that are row shifts, what the row (b, h, q_idx) contributes, given the gradient
// of its lse.
using RowShiftsFn = void (*)(long long b, long long h, long long q_idx, const CapturedView* captured, float grad_lse,
                             float* values);
// Writes to addresses[read][lane], of kPanelLanes each, where the lane's element of row 0 of each staged read lies;
// those of the other rows follow it. Reads only the indices and `captured`.
using RowsFn = void (*)(const TileParams*, const void** addresses);

// Logical positions, and query heads, of one batch; both ends included, at least one of each. All lie below the
// extents that the mod was compiled for.
struct Tile {
  long long b, h_first, h_last, q_first, q_last, kv_first, kv_last;
};
// What the mask is over a tile: false; anything; true.
enum class TileKind : int { kSkip, kPartial, kFull };
// Both ends included; empty where first > last.
struct IndexRange {
  long long first, last;
};
// Sound, not exact: kPartial and a tile's own range are always right.
using TileKindFn = TileKind (*)(const Tile*, const CapturedView*);
// Of a tile the keys outside of which all are dropped for every query, or likewise the queries. Within the tile's own
// where not empty.
using TileRangeFn = void (*)(const Tile*, const CapturedView*, IndexRange*);
// What a mod knows of tiles; null for nothing.
struct TileFacts {
  TileKindFn kind = nullptr;
  TileRangeFn kv_range = nullptr;
  TileRangeFn q_range = nullptr;
};

}  // namespace attnjit::cpu
