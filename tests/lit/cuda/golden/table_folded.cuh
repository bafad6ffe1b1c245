struct Mod : ModDefaults {
  static constexpr bool kIdentity = false;
  static constexpr bool kAdditive = true;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int i1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.i1 = h * stride32(captured[0], 0)};
  }

  struct Diagonal {
    float x1;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    const float table_value = load<BFloat16>(captured[0], block.i1 + (q_minus_kv + 127));
    const float x2 = max_nan(table_value, -2.3586574e+38f);
    return {.x1 = __fmul_rn(table_value == -kInfinity ? table_value : x2, 1.442695f)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.x1;
  }

  static __device__ __forceinline__ float term(const CapturedView* captured, const Block& block, const Row& row,
                                               const Column& column, const Diagonal& diagonal) {
    return diagonal.x1;
  }
};
