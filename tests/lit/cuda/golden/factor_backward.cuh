struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kReadsCaptured = true;
  static constexpr bool kUnitDerivative = false;

  struct Row {
    int q_idx;
    float factor_value;
  };
  static __device__ __forceinline__ Row row(const CapturedView* captured, const Block& block, int q_idx) {
    return {.q_idx = q_idx, .factor_value = load<float>(captured[0], q_idx)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s * row.factor_value;
  }

  static __device__ __forceinline__ float dscore(const CapturedView* captured, float s, float grad, const Block& block,
                                                 const Row& row, const Column& column, const Diagonal& diagonal) {
    return grad == 0.0f ? 0.0f : grad * row.factor_value;
  }

  struct Sink0 {
    static constexpr int kCapture = 0;
    static constexpr SinkLevel kLevel = SinkLevel::kRow;
    static constexpr bool kRowShift = false;
    static constexpr bool kInjective = false;

    static __device__ __forceinline__ float value(const CapturedView* captured, float s, float grad, const Block& block,
                                                  const Row& row, const Column& column, const Diagonal& diagonal) {
      return grad == 0.0f ? 0.0f : s * grad;
    }

    static __device__ __forceinline__ int offset(const CapturedView* captured, const GradientView* gradients,
                                                 float s, const Block& block, const Row& row,
                                                 const Column& column, const Diagonal& diagonal) {
      return row.q_idx;
    }
  };

  using Sinks = SinkList<Sink0>;
};
