struct Mod : ModDefaults {
  static constexpr bool kHasMask = true;
  static constexpr bool kReadsCaptured = true;
  static constexpr bool kKnowsTiles = true;
  static constexpr bool kKnowsRanges = true;

  struct Block {
    bool c1;
    int w_value;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.c1 = h >= 4, .w_value = load<int>(captured[0], h)};
  }

  struct Row {
    int i1;
  };
  static __device__ __forceinline__ Row row(const CapturedView* captured, const Block& block, int q_idx) {
    return {.i1 = q_idx >> 6};
  }

  struct Column {
    int i2;
  };
  static __device__ __forceinline__ Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    return {.i2 = kv_idx >> 6};
  }

  struct Diagonal {
    bool c2;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.c2 = block.w_value > q_minus_kv};
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return block.c1 ? diagonal.c2 : row.i1 == column.i2;
  }

  static __device__ __forceinline__ TileKind tile_kind(const CapturedView* captured, const Tile& tile) {
    const bool c1 = tile.h_first >= 4;
    const int i1 = max(min(load<int>(captured[0], tile.h_first), 1024), -1024);
    const bool c2 = tile.h_first == tile.h_last;
    const bool c3 = (tile.q_first >= tile.kv_last + i1) & c2;
    const bool c4 = tile.h_last < 4;
    const int i2 = tile.q_first >> 6;
    const int i3 = tile.kv_last >> 6;
    const int i4 = tile.q_last >> 6;
    const int i5 = tile.kv_first >> 6;
    const bool c5 = (i2 > i3) | (i4 < i5);
    const bool c6 = (tile.q_last < tile.kv_first + i1) & c2;
    const bool c7 = (i2 >= i3) & (i4 <= i5);
    if ((c1 & c3) | (c4 & c5) | (c3 & c5)) return TileKind::kSkip;
    return ((c1 & c6) | (c4 & c7) | (c6 & c7)) ? TileKind::kFull : TileKind::kPartial;
  }

  static __device__ __forceinline__ IndexRange kv_range(const CapturedView* captured, const Tile& tile) {
    const bool c1 = tile.h_last < 4;
    const int i1 = tile.kv_last + 1;
    const int i2 = tile.q_first + 1 - max(min(load<int>(captured[0], tile.h_first), 1024), -1024);
    const int i3 = max(c1 ? i1 : tile.kv_first, tile.h_first == tile.h_last ? i2 : tile.kv_first);
    const bool c2 = tile.h_first >= 4;
    const int i4 = max(tile.kv_first, min(i3, max(c2 ? i1 : tile.kv_first, (tile.q_first >> 6) * 64)));
    const int i5 = tile.kv_first - 1;
    const int i6 = max(c1 ? i5 : tile.kv_last, min(c2 ? i5 : tile.kv_last, (tile.q_last >> 6) * 64 + 63));
    return {i4, min(tile.kv_last, i6)};
  }

  static __device__ __forceinline__ IndexRange q_range(const CapturedView* captured, const Tile& tile) {
    const bool c1 = tile.h_last < 4;
    const int i1 = tile.q_last + 1;
    const bool c2 = tile.h_first >= 4;
    const int i2 = min(c1 ? i1 : tile.q_first, max(c2 ? i1 : tile.q_first, (tile.kv_first >> 6) * 64));
    const int i3 = tile.q_first - 1;
    const int i4 = tile.kv_last + max(min(load<int>(captured[0], tile.h_first), 1024), -1024);
    const int i5 = i4 - 1;
    const int i6 = min(c1 ? i3 : tile.q_last, tile.h_first == tile.h_last ? i5 : tile.q_last);
    const int i7 = min(tile.q_last, max(i6, min(c2 ? i3 : tile.q_last, (tile.kv_last >> 6) * 64 + 63)));
    return {max(tile.q_first, i2), i7};
  }
};
