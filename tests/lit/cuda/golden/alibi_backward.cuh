struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int h;
    float slopes_value;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.h = h, .slopes_value = load<float>(captured[0], h)};
  }

  struct Diagonal {
    float x1;
    float x2;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    const float x1 = -q_minus_kv_float;
    return {.x1 = x1, .x2 = __fmul_rn(block.slopes_value, x1)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.x2;
  }

  struct Sink0 {
    static constexpr int kCapture = 0;
    static constexpr SinkLevel kLevel = SinkLevel::kBlock;
    static constexpr bool kRowShift = false;
    static constexpr bool kInjective = false;

    static __device__ __forceinline__ float value(const CapturedView* captured, float s, float grad, const Block& block,
                                                  const Row& row, const Column& column, const Diagonal& diagonal) {
      return grad * diagonal.x1;
    }

    static __device__ __forceinline__ int offset(const CapturedView* captured, const GradientView* gradients,
                                                 float s, const Block& block, const Row& row,
                                                 const Column& column, const Diagonal& diagonal) {
      return block.h;
    }
  };

  using Sinks = SinkList<Sink0>;
};
