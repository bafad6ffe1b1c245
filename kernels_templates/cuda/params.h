// What a CUDA kernel is launched with: plain data that host and device agree on. NVRTC compiles it in front of every
// kernel, so it includes nothing. Its text is part of every binary's key: a changed struct never meets an old binary.
#pragma once

namespace attnjit::cuda {

inline constexpr int kMaxCaptureRank = 5;
inline constexpr int kMaxCaptures = 16;

// A captured tensor. Strides in elements.
struct CapturedView {
  const void* data;          // device memory; null for a scalar that is passed by value
  unsigned long long value;  // that scalar's element in its lowest bytes
  long long stride[kMaxCaptureRank];
  int extent[kMaxCaptureRank];
};

// One forward call. Pointers are to device memory; strides in elements, of batch, head and sequence; the innermost
// stride of q, k, v and o is 1.
struct ForwardParams {
  const void* q;   // (B, Hq, Sq, D)
  const void* k;   // (B, Hkv, Skv, D)
  const void* v;   // (B, Hkv, Skv, Dv)
  void* o;         // (B, Hq, Sq, Dv)
  float* lse;      // (B, Hq, Sq), natural logarithm; null where not wanted
  float* row_max;  // (B, Hq, Sq), natural units; null where not wanted
  long long q_stride[3], k_stride[3], v_stride[3], o_stride[3], lse_stride[3], row_max_stride[3];
  int batch, num_heads, num_heads_kv;
  int seqlen_q, seqlen_kv;
  int q_idx_origin, kv_idx_origin;  // logical positions of the first query and key
  // On q . k, together: the scale, times what the compiler says that score() expects. score_scale is positive;
  // score_prescale is 1 unless the sign, a scale of 0 or the range of floats asks for another.
  float score_prescale, score_scale;
  CapturedView captured[kMaxCaptures];
};

// Where a captured tensor's gradient is added up: packed, in the extents of the tensor. Floats, or, in deterministic
// runs, accumulators (cuda/gradients.cuh), but for a tensor whose sink is injective: that is stored to, as floats. Zero
// before the kernels run.
struct GradientView {
  void* data;                         // null where it is not wanted
  long long stride[kMaxCaptureRank];  // in elements
};

// 64-bit words of an accumulator.
inline constexpr int kAccumulatorWords = 10;

// Of a captured gradient's final type.
enum class GradientType : int { kF32, kF16, kBF16 };

// Converts sums to a tensor's type and strides.
struct FinishParams {
  const void* sums;  // packed; floats or accumulators
  void* to;
  long long elements;
  long long stride[kMaxCaptureRank];  // of `to`, in elements
  int extent[kMaxCaptureRank];
  GradientType type;
  bool accumulators;
};

// One backward call. What ForwardParams has too means the same; there o and lse are inputs.
struct BackwardParams {
  const void* q;
  const void* k;
  const void* v;
  const void* o;
  const void* grad_out;   // (B, Hq, Sq, Dv)
  const float* lse;       // (B, Hq, Sq), natural logarithm
  const float* grad_lse;  // (B, Hq, Sq); null: zero
  void* dq;               // outputs; null where not wanted
  void* dk;
  void* dv;
  float* row_lse;  // workspace, (B, Hq, padded Sq) packed: lse, +inf where a row has no kept element or does not exist
  float* row_delta;  // workspace, likewise: sum of grad_out * o along the row, less grad_lse; 0 where row_lse is +inf
  float* dq_sum;     // workspace: dq before its conversion, (splits, B, Hq, padded Sq, padded D)
  long long q_stride[3], k_stride[3], v_stride[3], o_stride[3], grad_out_stride[3];
  long long lse_stride[3], grad_lse_stride[3], dq_stride[3], dk_stride[3], dv_stride[3];
  int batch, num_heads, num_heads_kv;
  int seqlen_q, seqlen_kv;
  int q_idx_origin, kv_idx_origin;
  float scale;  // on q . k
  int splits;   // buffers of dq_sum
  CapturedView captured[kMaxCaptures];
  GradientView gradients[kMaxCaptures];
};

}  // namespace attnjit::cuda
