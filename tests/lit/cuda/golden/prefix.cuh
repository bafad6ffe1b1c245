struct Mod : ModDefaults {
  static constexpr bool kHasMask = true;
  static constexpr bool kReadsCaptured = true;
  static constexpr bool kKnowsTiles = true;
  static constexpr bool kKnowsRanges = true;

  struct Block {
    long long length_value;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.length_value = load<long long>(captured[0], 0)};
  }

  struct Column {
    bool c1;
  };
  static __device__ __forceinline__ Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    return {.c1 = kv_idx < block.length_value};
  }

  struct Diagonal {
    bool c2;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.c2 = q_minus_kv >= 0};
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return column.c1 | diagonal.c2;
  }

  static __device__ __forceinline__ TileKind tile_kind(const CapturedView* captured, const Tile& tile) {
    const int i1 = static_cast<int>(max(min(load<long long>(captured[0], 0), 1024ll), -1ll));
    if ((tile.kv_first >= i1) & (tile.kv_first > tile.q_last)) return TileKind::kSkip;
    return ((tile.kv_last < i1) | (tile.kv_last <= tile.q_first)) ? TileKind::kFull : TileKind::kPartial;
  }

  static __device__ __forceinline__ IndexRange kv_range(const CapturedView* captured, const Tile& tile) {
    const int i1 = static_cast<int>(max(min(load<long long>(captured[0], 0), 1024ll), -1ll));
    return {tile.kv_first, min(tile.kv_last, max(i1 - 1, tile.q_last))};
  }

  static __device__ __forceinline__ IndexRange q_range(const CapturedView* captured, const Tile& tile) {
    const int i1 = static_cast<int>(max(min(load<long long>(captured[0], 0), 1024ll), -1ll));
    const int i2 = max(tile.q_first, min(tile.kv_first >= i1 ? tile.q_last + 1 : tile.q_first, tile.kv_first));
    return {i2, tile.q_last};
  }
};
