struct Mod : ModDefaults {
  static constexpr bool kIdentity = false;
  static constexpr bool kHasMask = true;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int i1;
    int i2;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.i1 = h * stride32(captured[0], 0), .i2 = b * stride32(captured[1], 0)};
  }

  struct Row {
    int i3;
    int ids_value;
  };
  static __device__ __forceinline__ Row row(const CapturedView* captured, const Block& block, int q_idx) {
    return {.i3 = block.i1 + q_idx * stride32(captured[0], 1), .ids_value = load<int>(captured[1], block.i2 + q_idx)};
  }

  struct Column {
    int kv_idx;
    int ids_value2;
  };
  static __device__ __forceinline__ Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    return {.kv_idx = kv_idx, .ids_value2 = load<int>(captured[1], block.i2 + kv_idx)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    const float bias_value = load<float>(captured[0], row.i3 + column.kv_idx);
    const float x1 = max_nan(bias_value, -2.3586574e+38f);
    return s + (bias_value == -kInfinity ? bias_value : x1) * 1.442695f;
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return column.ids_value2 == row.ids_value;
  }
};
