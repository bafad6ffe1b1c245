// The identity mod: what a kernel sees of an expression where the compiler emitted nothing of its own.
//
// The compiler emits `struct Mod : ModDefaults` and overrides what the expression needs. Values are computed where what
// they depend on is known: of the batch and head (Block), of the query (Row), of the key (Column), of the two
// positions' difference alone (Diagonal), of the score. The templates call block(), then row(), column() and diagonal()
// with logical positions, then score() and keep() for each element. A tile has far fewer diagonals than elements: what
// a relative position gives (a bias, a table's element, a mask) is computed that many times less often.
// The difference comes as a float, too: from one diagonal to the next that is an addition, and no conversion. It is
// exact where all positions are below 2^24; the compiler uses it only there.
//
// In the backward everything is in natural units: score() takes the scaled score and returns the modified one. dscore()
// gives the gradient of the scaled score, given `grad`, that of the modified score, which is 0 where the element is
// dropped; it is 0 then. For each captured read whose gradient is wanted there is a sink: a struct with
//   kCapture, kLevel, kRowShift, kInjective
//   value(captured, s, grad, block, row, column, diagonal): what the element adds; of a row shift, what the row adds,
//       given the gradient of its lse as `grad` (s, column and diagonal are not looked at)
//   offset(captured, gradients, s, block, row, column, diagonal): where in GradientView::data, in elements, an int or a
//       long long; besides block only what kLevel names is looked at, and with kElement all of it
//
// Of whole tiles the mod knows what the mask is (tile_kind), and which keys or queries are worth looking at (kv_range,
// q_range). All three are sound, not exact: partial and the whole range are always right.
//
// A forward that asks for the folded form (compiler::ModForm) gets score() and its traits without the terms that
// softmax cannot see, those free of score and key: shift() gives them once per row, in log2 units, for LSE and maximum.
// Where what is left is the score and a sum of terms, kAdditive, term() gives them; where these are a multiple of the
// difference of the positions, kLinear, slope() gives the factor. The folded form is for kScoresInLog2 or kIdentity; of
// others shift() is there, and score() is as usual.
namespace attnjit::cuda {

// Logical positions, and query heads, of one batch; both ends included.
struct Tile {
  int b, h_first, h_last, q_first, q_last, kv_first, kv_last;
};
// What keep() is over a tile: false; anything; true; anything, but for each query of each head the same for all keys.
enum class TileKind : int { kSkip, kPartial, kFull, kByRow };
// Both ends included; empty where first > last.
struct IndexRange {
  int first, last;
};

// What decides a sink's offset: compiler::SinkLevel.
enum class SinkLevel : int { kBlock, kRow, kColumn, kDiagonal, kElement };

template <typename... T>
struct SinkList {
  static constexpr int kSize = sizeof...(T);
};

struct ModDefaults {
  // score() takes the scaled score times log2(e), not plain or times a literal. It returns log2 units in any case.
  static constexpr bool kScoresInLog2 = true;
  // score() returns its argument, and takes it times log2(e).
  static constexpr bool kIdentity = true;
  // keep() may be false. Where it is, score()'s value means nothing and the element counts as -inf.
  static constexpr bool kHasMask = false;
  // keep() depends on the score.
  static constexpr bool kMaskReadsScore = false;
  // tile_kind() may say more than kPartial. Never with kMaskReadsScore.
  static constexpr bool kKnowsTiles = false;
  // Folded form: tile_kind() may say kByRow.
  static constexpr bool kKnowsRows = false;
  // kv_range() and q_range() may be less than the whole.
  static constexpr bool kKnowsRanges = false;
  // Folded form: shift() may be other than 0; score() is s + term(); term() is slope() * q_minus_kv.
  static constexpr bool kHasShift = false;
  static constexpr bool kAdditive = false;
  static constexpr bool kLinear = false;
  // The modified score moves with the key's position by arithmetic, and is not kLinear: over many keys it may rise or
  // fall without bound, which captured values and the score itself are not expected to do.
  static constexpr bool kDrifts = false;
  // Some captured tensor is read.
  static constexpr bool kReadsCaptured = false;
  // column() reads captured tensors: worth asking for once per key.
  static constexpr bool kColumnLoads = false;

  // Backward: dscore() returns grad.
  static constexpr bool kUnitDerivative = true;
  using Sinks = SinkList<>;

  struct Block {};
  struct Row {};
  struct Column {};
  struct Diagonal {};

  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) { return {}; }
  template <typename B>
  static __device__ __forceinline__ Row row(const CapturedView* captured, const B& block, int q_idx) {
    return {};
  }
  template <typename B>
  static __device__ __forceinline__ Column column(const CapturedView* captured, const B& block, int kv_idx) {
    return {};
  }
  template <typename B>
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const B& block, int q_minus_kv,
                                                      float q_minus_kv_float) {
    return {};
  }
  template <typename B, typename R, typename C, typename D>
  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const B& block, const R& row,
                                                const C& column, const D& diagonal) {
    return s;
  }
  template <typename B, typename R, typename C, typename D>
  static __device__ __forceinline__ float dscore(const CapturedView* captured, float s, float grad, const B& block,
                                                 const R& row, const C& column, const D& diagonal) {
    return grad;
  }
  template <typename B, typename R>
  static __device__ __forceinline__ float shift(const CapturedView* captured, const B& block, const R& row) {
    return 0.0f;
  }
  template <typename B, typename R, typename C, typename D>
  static __device__ __forceinline__ float term(const CapturedView* captured, const B& block, const R& row,
                                               const C& column, const D& diagonal) {
    return 0.0f;
  }
  template <typename B>
  static __device__ __forceinline__ float slope(const CapturedView* captured, const B& block) {
    return 0.0f;
  }
  static __device__ __forceinline__ TileKind tile_kind(const CapturedView* captured, const Tile& tile) {
    return TileKind::kPartial;
  }
  // Keys outside are dropped for every query of `tile`; queries outside drop every key of it. Within the tile's own.
  static __device__ __forceinline__ IndexRange kv_range(const CapturedView* captured, const Tile& tile) {
    return {tile.kv_first, tile.kv_last};
  }
  static __device__ __forceinline__ IndexRange q_range(const CapturedView* captured, const Tile& tile) {
    return {tile.q_first, tile.q_last};
  }
  template <typename B, typename R, typename C, typename D>
  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const B& block, const R& row,
                                              const C& column, const D& diagonal) {
    return true;
  }
};

}  // namespace attnjit::cuda
