struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return tanh_approx(s) * 43.28085f;
  }
};
