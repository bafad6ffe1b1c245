struct Mod : ModDefaults {
  static constexpr bool kIdentity = false;
  static constexpr bool kHasShift = true;
  static constexpr bool kAdditive = true;
  static constexpr bool kLinear = true;
  static constexpr bool kReadsCaptured = true;

  struct Row {
    float x1;
  };
  static __device__ __forceinline__ Row row(const CapturedView* captured, const Block& block, int q_idx) {
    const float row_value = load<BFloat16>(captured[0], q_idx);
    const float x2 = max_nan(row_value, -2.3586574e+38f);
    return {.x1 = (row_value == -kInfinity ? row_value : x2) * 1.442695f + 1.442695f};
  }

  struct Diagonal {
    float x3;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.x3 = __fmul_rn(q_minus_kv_float, -0.7213475f)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.x3;
  }

  static __device__ __forceinline__ float shift(const CapturedView* captured, const Block& block, const Row& row) {
    return row.x1;
  }

  static __device__ __forceinline__ float term(const CapturedView* captured, const Block& block, const Row& row,
                                               const Column& column, const Diagonal& diagonal) {
    return diagonal.x3;
  }

  static __device__ __forceinline__ float slope(const CapturedView* captured, const Block& block) {
    return -0.7213475f;
  }
};
