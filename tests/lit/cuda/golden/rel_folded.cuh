struct Mod : ModDefaults {
  static constexpr bool kIdentity = false;
  static constexpr bool kAdditive = true;
  static constexpr bool kLinear = true;

  struct Diagonal {
    float x1;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.x1 = __fmul_rn(q_minus_kv_float, 1.442695f)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.x1;
  }

  static __device__ __forceinline__ float term(const CapturedView* captured, const Block& block, const Row& row,
                                               const Column& column, const Diagonal& diagonal) {
    return diagonal.x1;
  }

  static __device__ __forceinline__ float slope(const CapturedView* captured, const Block& block) {
    return 1.442695f;
  }
};
