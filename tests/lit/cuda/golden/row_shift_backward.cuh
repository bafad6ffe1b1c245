struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int h;
    float bias_value;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.h = h, .bias_value = load<BFloat16>(captured[0], h)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + block.bias_value;
  }

  struct Sink0 {
    static constexpr int kCapture = 0;
    static constexpr SinkLevel kLevel = SinkLevel::kBlock;
    static constexpr bool kRowShift = true;
    static constexpr bool kInjective = false;

    static __device__ __forceinline__ float value(const CapturedView* captured, float s, float grad, const Block& block,
                                                  const Row& row, const Column& column, const Diagonal& diagonal) {
      return grad;
    }

    static __device__ __forceinline__ int offset(const CapturedView* captured, const GradientView* gradients,
                                                 float s, const Block& block, const Row& row,
                                                 const Column& column, const Diagonal& diagonal) {
      return block.h;
    }
  };

  using Sinks = SinkList<Sink0>;
};
