// What the sm80 family's blocks walk over and in which order, by what the mod knows of whole tiles. Compiled behind
// mod_defaults.cuh and the emitted Mod.
namespace attnjit::sm80 {

using cuda::Mod;

#ifndef ATTNJIT_EMULATED
__device__ __forceinline__ unsigned vote(bool x) { return __ballot_sync(0xffffffffu, x); }
#endif

// ---- What the mask leaves

using cuda::IndexRange;
using cuda::Tile;
using cuda::TileKind;

constexpr bool kLeavesOut = Mod::kKnowsTiles || Mod::kKnowsRanges;

// A tile of a walk.
struct Step {
  int tile;
  bool full;  // the mask is known to drop nothing of it
};

// Of the tiles of keys, or of queries, those that the block's own tile sees something of, in order. Warps walk as one.
// Registers are short beside accumulators: `Whole` gives that tile by all that there is to walk over when it is asked,
// each lane knows one tile of 32, and that shares a word with the walk's end.
template <bool kOverKeys, int kTileRows, typename Whole>
class Walk {
 public:
  // Over `length` positions.
  __device__ __forceinline__ Walk(const cuda::CapturedView* captured, int length, const Whole& whole)
      : captured_(captured), whole_(whole) {
    int end = (length + kTileRows - 1) / kTileRows;
    if constexpr (Mod::kKnowsRanges) {
      // Where there is nothing to walk over, nothing is there to be asked about.
      if (length > 0) {
        const Tile all = whole();
        const int origin = kOverKeys ? all.kv_first : all.q_first;
        const IndexRange range = kOverKeys ? Mod::kv_range(captured, all) : Mod::q_range(captured, all);
        const bool some = range.first <= range.last;
        begin_ = some ? (range.first - origin) / kTileRows : 0;
        end = some ? (range.last - origin) / kTileRows + 1 : 0;
      }
    }
    end_and_kind_ = end << kKindBits;
  }

  __device__ __forceinline__ bool has(const Step& step) const { return step.tile < end(); }

  // Where there is no such step, what has() is false of. Asked for in order.
  __device__ __forceinline__ Step first() {
    if constexpr (Mod::kKnowsTiles) {
      if (begin_ < end()) look(begin_ / 32 * 32);
    }
    return from(begin_);
  }
  __device__ __forceinline__ Step after(const Step& step) {
    const int tile = step.tile + 1;
    if constexpr (Mod::kKnowsTiles) {
      if (tile % 32 == 0 && tile < end()) look(tile);
    }
    return from(tile);
  }
  // What follows the last tile that is not known to be left out.
  __device__ __forceinline__ int end() const { return end_and_kind_ >> kKindBits; }

 private:
  static constexpr int kKindBits = Mod::kKnowsTiles ? 2 : 0;

  __device__ __forceinline__ unsigned are(TileKind kind) const {
    return vote((end_and_kind_ & 3) == static_cast<int>(kind));
  }

  // The first from `tile` on, whose group of 32 has been looked at.
  __device__ __forceinline__ Step from(int tile) {
    if constexpr (Mod::kKnowsTiles) {
      while (tile < end()) {
        const unsigned some = ~are(TileKind::kSkip) >> tile % 32;
        if (some != 0) {
          tile += __ffs(static_cast<int>(some)) - 1;
          return {tile, (are(TileKind::kFull) >> tile % 32 & 1) != 0};
        }
        tile = (tile / 32 + 1) * 32;
        if (tile < end()) look(tile);
      }
    }
    return {tile, false};
  }

  // Asks of 32 tiles from `tile` on, one to a lane.
  __device__ __forceinline__ void look(int tile) {
    const int own = tile + static_cast<int>(threadIdx.x % 32);
    // Also of lanes beyond the last tile: what is asked about exists.
    const int first = min(own, end() - 1) * kTileRows;
    const Tile all = whole_();
    Tile asked = all;
    if constexpr (kOverKeys) {
      asked.kv_first += first;
      asked.kv_last = min(asked.kv_first + kTileRows - 1, all.kv_last);
    } else {
      asked.q_first += first;
      asked.q_last = min(asked.q_first + kTileRows - 1, all.q_last);
    }
    TileKind kind = Mod::tile_kind(captured_, asked);
    if (own >= end()) kind = TileKind::kSkip;
    end_and_kind_ = (end() << kKindBits) + static_cast<int>(kind);
  }

  const cuda::CapturedView* captured_;
  const Whole whole_;
  int begin_ = 0;
  int end_and_kind_;
};

// ---- The order of blocks

struct HeadTile {
  int head, tile;  // the head counted over the batches
};

// Bytes of the L2 cache that heads whose blocks run side by side may fill.
#if __CUDA_ARCH__ == 860 || __CUDA_ARCH__ == 870
constexpr int kSectionBytes = 4 << 20;
#else
constexpr int kSectionBytes = 32 << 20;
#endif

// Which of `tiles` tiles of `heads` heads block number `index` has. Tiles of one head are neighbours: they share what
// they walk over in the L2 cache. Where the mask leaves tiles out, blocks have different amounts of work: the same tile
// of the heads of a section are neighbours, for the section to end with what is least work. `head_bytes`: what each
// group of `group` heads walks over.
__device__ __forceinline__ HeadTile place_in_order(int index, int heads, int tiles, long long head_bytes, int group) {
  if constexpr (kLeavesOut) {
    const int fitting = kSectionBytes / static_cast<int>(head_bytes < kSectionBytes ? head_bytes : kSectionBytes);
    const int section = min(fitting, heads / group) * group;
    const int first = index / (section * tiles) * section;
    const int rest = index - first * tiles;
    const int side_by_side = min(section, heads - first);
    const int tile = rest / side_by_side;
    return {first + rest - tile * side_by_side, tile};
  } else {
    const int head = index / tiles;
    return {head, index - head * tiles};
  }
}

// Of a block that takes one tile of each round of `blocks`, as number `block`: its next one. Where the mask leaves
// tiles out, from alternate ends of the rounds, so that no block gets the longest of each.
__device__ __forceinline__ int tile_after(int tile, int block, int blocks) {
  if constexpr (!kLeavesOut) return tile + blocks;
  return tile + (tile / blocks % 2 == 0 ? 2 * (blocks - 1 - block) : 2 * block) + 1;
}

}  // namespace attnjit::sm80
