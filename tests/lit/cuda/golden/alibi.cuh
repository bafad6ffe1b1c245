struct Mod : ModDefaults {
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    float x1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.x1 = in_log2(load<float>(captured[0], h))};
  }

  struct Diagonal {
    float x2;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    return {.x2 = __fmul_rn(block.x1, -q_minus_kv_float)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.x2;
  }
};
