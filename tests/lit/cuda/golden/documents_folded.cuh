struct Mod : ModDefaults {
  static constexpr bool kHasMask = true;
  static constexpr bool kReadsCaptured = true;
  static constexpr bool kKnowsTiles = true;
  static constexpr bool kKnowsRows = true;
  static constexpr bool kKnowsRanges = true;
  static constexpr bool kColumnLoads = true;

  struct Row {
    int ids_value;
  };
  static __device__ __forceinline__ Row row(const CapturedView* captured, const Block& block, int q_idx) {
    return {.ids_value = load<int>(captured[0], q_idx)};
  }

  struct Column {
    int ids_value2;
  };
  static __device__ __forceinline__ Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    return {.ids_value2 = load<int>(captured[0], kv_idx)};
  }

  struct Diagonal {
    bool c1;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.c1 = q_minus_kv >= 0};
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return (row.ids_value == column.ids_value2) & diagonal.c1;
  }

  static __device__ __forceinline__ TileKind tile_kind(const CapturedView* captured, const Tile& tile) {
    const int i1 = tile.q_last >> 5;
    const int i2 = tile.q_first >> 5;
    const int i3 = floor_log2(i1 - i2 + 1) * stride32(captured[1], 2);
    const int i4 = i3 + i2;
    const int i5 = i3 + i1;
    const int i6 = min(load<int>(captured[1], i4), load<int>(captured[1], 1 * stride32(captured[1], 1) + i5));
    const int i7 = tile.kv_last >> 5;
    const int i8 = tile.kv_first >> 5;
    const int i9 = floor_log2(i7 - i8 + 1) * stride32(captured[1], 2);
    const int i10 = i9 + i8;
    const int i11 = i9 + i7;
    const int i12 = max(load<int>(captured[1], 2 * stride32(captured[1], 1) + i10), load<int>(captured[1], 3 *
        stride32(captured[1], 1) + i11));
    const int i13 = max(load<int>(captured[1], 2 * stride32(captured[1], 1) + i4), load<int>(captured[1], 3 *
        stride32(captured[1], 1) + i5));
    const int i14 = min(load<int>(captured[1], i10), load<int>(captured[1], 1 * stride32(captured[1], 1) + i11));
    const bool c1 = (i6 > i12) | (i13 < i14);
    const bool c2 = tile.kv_first > tile.q_last;
    const bool c3 = (i6 >= i12) & (i13 <= i14);
    const bool c4 = tile.kv_last <= tile.q_first;
    if (c1 | c2) return TileKind::kSkip;
    if (c3 & c4) return TileKind::kFull;
    return (((i14 == i12) | (c1 | c3)) & (c2 | c4)) ? TileKind::kByRow : TileKind::kPartial;
  }

  static __device__ __forceinline__ IndexRange kv_range(const CapturedView* captured, const Tile& tile) {
    return {tile.kv_first, min(tile.kv_last, tile.q_last)};
  }

  static __device__ __forceinline__ IndexRange q_range(const CapturedView* captured, const Tile& tile) {
    return {max(tile.q_first, tile.kv_first), tile.q_last};
  }
};
