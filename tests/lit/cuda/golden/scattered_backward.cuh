struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int h;
    int i1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.h = h, .i1 = h * stride32(captured[1], 0)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    const int i2 = clamped(load<int>(captured[0], clamped(to_int(s), captured[0].extent[0])), captured[1].extent[1]);
    return s + load<float>(captured[1], block.i1 + i2);
  }

  struct Sink0 {
    static constexpr int kCapture = 1;
    static constexpr SinkLevel kLevel = SinkLevel::kElement;
    static constexpr bool kRowShift = false;
    static constexpr bool kInjective = false;

    static __device__ __forceinline__ float value(const CapturedView* captured, float s, float grad, const Block& block,
                                                  const Row& row, const Column& column, const Diagonal& diagonal) {
      return grad;
    }

    static __device__ __forceinline__ int offset(const CapturedView* captured, const GradientView* gradients,
                                                 float s, const Block& block, const Row& row,
                                                 const Column& column, const Diagonal& diagonal) {
      const int i2 = clamped(load<int>(captured[0], clamped(to_int(s), captured[0].extent[0])), captured[1].extent[1]);
      return block.h * stride32(gradients[1], 0) + i2;
    }
  };

  using Sinks = SinkList<Sink0>;
};
