struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;

  struct Diagonal {
    int i1;
    float bias_value;
  };
  static __device__ __forceinline__ Diagonal diagonal(const CapturedView* captured, const Block& block,
                                                      int q_minus_kv, float q_minus_kv_float) {
    const int i1 = min(max(q_minus_kv + 8, 0), 16);
    return {.i1 = i1, .bias_value = load<float>(captured[0], i1)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + diagonal.bias_value;
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
      return diagonal.i1;
    }
  };

  using Sinks = SinkList<Sink0>;
};
