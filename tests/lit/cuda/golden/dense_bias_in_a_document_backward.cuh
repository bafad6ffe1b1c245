struct Mod : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  static constexpr bool kIdentity = false;
  static constexpr bool kHasMask = true;
  static constexpr bool kReadsCaptured = true;

  struct Block {
    int h;
    int i1;
  };
  static __device__ __forceinline__ Block block(const CapturedView* captured, int b, int h) {
    return {.h = h, .i1 = h * stride32(captured[0], 0)};
  }

  struct Row {
    int q_idx;
    int i2;
    int ids_value;
  };
  static __device__ __forceinline__ Row row(const CapturedView* captured, const Block& block, int q_idx) {
    return {
        .q_idx = q_idx,
        .i2 = block.i1 + q_idx * stride32(captured[0], 1),
        .ids_value = load<int>(captured[1], q_idx),
    };
  }

  struct Column {
    int kv_idx;
    int ids_value2;
  };
  static __device__ __forceinline__ Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    return {.kv_idx = kv_idx, .ids_value2 = load<int>(captured[1], kv_idx)};
  }

  static __device__ __forceinline__ float score(const CapturedView* captured, float s, const Block& block,
                                                const Row& row, const Column& column, const Diagonal& diagonal) {
    return s + load<float>(captured[0], row.i2 + column.kv_idx);
  }

  static __device__ __forceinline__ bool keep(const CapturedView* captured, float s, const Block& block,
                                              const Row& row, const Column& column, const Diagonal& diagonal) {
    return column.ids_value2 == row.ids_value;
  }

  struct Sink0 {
    static constexpr int kCapture = 0;
    static constexpr SinkLevel kLevel = SinkLevel::kElement;
    static constexpr bool kRowShift = false;
    static constexpr bool kInjective = true;

    static __device__ __forceinline__ float value(const CapturedView* captured, float s, float grad, const Block& block,
                                                  const Row& row, const Column& column, const Diagonal& diagonal) {
      return grad;
    }

    static __device__ __forceinline__ int offset(const CapturedView* captured, const GradientView* gradients,
                                                 float s, const Block& block, const Row& row,
                                                 const Column& column, const Diagonal& diagonal) {
      const int i3 = block.h * stride32(gradients[0], 0) + row.q_idx * stride32(gradients[0], 1);
      return i3 + column.kv_idx;
    }
  };

  using Sinks = SinkList<Sink0>;
};
