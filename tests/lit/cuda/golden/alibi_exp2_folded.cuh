struct Mod : ModDefaults {
  static constexpr bool kIdentity = false;
  static constexpr bool kAdditive = true;
  static constexpr bool kLinear = true;

  struct Block {
    float x1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.x1 = -in_log2(exp2f(-(static_cast<float>(h + 1) * 8.0f * 0.125f)))};
  }

  struct Diagonal {
    float x2;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.x2 = __fmul_rn(q_minus_kv_float, block.x1)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.x2;
  }

  static __device__ __forceinline__ float term(const CapturedView* captured, const Block& block, const Row& row,
                                               const Column& column, const Diagonal& diagonal) {
    return diagonal.x2;
  }

  static __device__ __forceinline__ float slope(const CapturedView* captured, const Block& block) {
    return block.x1;
  }
};
