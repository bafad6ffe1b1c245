struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kHasShift = true;

  struct Block {
    float x1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.x1 = __fmul_rn(static_cast<float>(h * 2), 1.442695f)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return tanh_approx(s) * 43.28085f;
  }

  static __device__ __forceinline__ float shift(const CapturedView* captured, const Block& block, const Row& row) {
    return block.x1;
  }
};
