struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kHasMask = true;
  static constexpr bool kKnowsTiles = true;
  static constexpr bool kKnowsRanges = true;

  struct Diagonal {
    bool c1;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.c1 = q_minus_kv >= 0};
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return diagonal.c1;
  }

  static __device__ __forceinline__ TileKind tile_kind(const CapturedView* captured, const Tile& tile) {
    if (tile.kv_first > tile.q_last) return TileKind::kSkip;
    return tile.kv_last <= tile.q_first ? TileKind::kFull : TileKind::kPartial;
  }

  static __device__ __forceinline__ IndexRange kv_range(const CapturedView* captured, const Tile& tile) {
    return {tile.kv_first, min(tile.kv_last, tile.q_last)};
  }

  static __device__ __forceinline__ IndexRange q_range(const CapturedView* captured, const Tile& tile) {
    return {max(tile.q_first, tile.kv_first), tile.q_last};
  }
};
