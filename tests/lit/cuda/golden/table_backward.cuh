struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int h;
    int i1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.h = h, .i1 = h * stride32(captured[0], 0)};
  }

  struct Diagonal {
    int i2;
    float table_value;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    const int i2 = q_minus_kv + 127;
    return {.i2 = i2, .table_value = load<BFloat16>(captured[0], block.i1 + i2)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.table_value;
  }

  struct Sink0 {
    static constexpr int kCapture = 0;
    static constexpr SinkLevel kLevel = SinkLevel::kDiagonal;
    static constexpr bool kRowShift = false;
    static constexpr bool kInjective = false;

    static __device__ __forceinline__ float value(const CapturedView* captured, float s, float grad, const Block& block,
                                                  const Row& row, const Column& column, const Diagonal& diagonal) {
      return grad;
    }

    static __device__ __forceinline__ int offset(const CapturedView* captured, const GradientView* gradients,
                                                 float s, const Block& block, const Row& row,
                                                 const Column& column, const Diagonal& diagonal) {
      return block.h * stride32(gradients[0], 0) + diagonal.i2;
    }
  };

  using Sinks = SinkList<Sink0>;
};
