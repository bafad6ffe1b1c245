struct Mod : ModDefaults {
  static constexpr bool kHasMask = true;
  static constexpr bool kKnowsTiles = true;
  static constexpr bool kKnowsRanges = true;

  struct Diagonal {
    bool c1;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    const bool c1 = (q_minus_kv >= 0) & (q_minus_kv <= 512);
    return {.c1 = c1};
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return diagonal.c1;
  }

  static __device__ __forceinline__ TileKind tile_kind(const CapturedView* captured, const Tile& tile) {
    if ((tile.kv_first > tile.q_last) | (tile.q_first - tile.kv_last > 512)) return TileKind::kSkip;
    return ((tile.kv_last <= tile.q_first) & (tile.q_last - tile.kv_first <= 512)) ? TileKind::kFull :
        TileKind::kPartial;
  }

  static __device__ __forceinline__ IndexRange kv_range(const CapturedView* captured, const Tile& tile) {
    return {max(tile.kv_first, tile.q_first - 512), min(tile.kv_last, tile.q_last)};
  }

  static __device__ __forceinline__ IndexRange q_range(const CapturedView* captured, const Tile& tile) {
    return {max(tile.q_first, tile.kv_first), min(tile.q_last, tile.kv_last + 512)};
  }
};
