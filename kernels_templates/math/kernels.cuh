// The eager path's softmax over materialised scores, and what the products need around it.
//
// A row is read once where it fits the registers of a warp or a block, else twice: an online maximum and sum, then the
// probabilities. As on the CPU, the maximum passes over NaN and the sum finds it: a row with a NaN or +inf among its
// kept elements is NaN throughout, with +inf before NaN for its maximum; one with nothing but -inf is empty.
namespace attnjit::math {

// ---- Instructions. A build that runs these kernels on the host brings its own.

#ifndef ATTNJIT_EMULATED
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// The greater one; the number where the other is NaN.
__device__ __forceinline__ float max_number(float a, float b) {
  float y;
  asm("max.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}
__device__ __forceinline__ float widen(unsigned short bits) {
  float y;
  if constexpr (kConfig.element == Element::kF16) {
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(bits));
  } else {
    y = __uint_as_float(static_cast<unsigned>(bits) << 16);
  }
  return y;
}
__device__ __forceinline__ unsigned vote(bool x) { return __ballot_sync(0xffffffffu, x); }
#endif

constexpr float kLn2 = 0.693147180559945309417f;

// Offset of a row (b, h, q), counted through, of a tensor with these strides.
__device__ __forceinline__ long long offset_of(unsigned row, unsigned num_heads, unsigned seqlen,
                                               const long long (&stride)[3]) {
  const unsigned head = row / seqlen;
  const unsigned b = head / num_heads;
  return b * stride[0] + (head - b * num_heads) * stride[1] + (row - head * seqlen) * stride[2];
}

// ---- The threads that share a row

struct Warp {
  int rank;
  static constexpr int kSize = 32;
  __device__ __forceinline__ int size() const { return kSize; }
  __device__ __forceinline__ float max(float x) const {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x = max_number(x, exchange(x, mask));
    return x;
  }
  __device__ __forceinline__ float sum(float x) const {
#pragma unroll
    for (int mask = 16; mask > 0; mask /= 2) x += exchange(x, mask);
    return x;
  }
};

// Each reduction has memory of its own: between two uses of one lies the barrier of the other.
struct Block {
  int rank, threads;
  float* maxima;  // 32
  float* sums;    // 32
  __device__ __forceinline__ int size() const { return threads; }
  __device__ __forceinline__ float max(float x) const {
    const Warp warp{rank % 32};
    x = warp.max(x);
    if (warp.rank == 0) maxima[rank / 32] = x;
    __syncthreads();
    return warp.max(warp.rank < threads / 32 ? maxima[warp.rank] : -kInfinity);
  }
  __device__ __forceinline__ float sum(float x) const {
    const Warp warp{rank % 32};
    x = warp.sum(x);
    if (warp.rank == 0) sums[rank / 32] = x;
    __syncthreads();
    return warp.sum(warp.rank < threads / 32 ? sums[warp.rank] : 0.0f);
  }
};

// ---- Softmax

// What exponents are taken relative to: a row of -inf has no difference to its maximum.
__device__ __forceinline__ float reference_of(float maximum) { return maximum == -kInfinity ? 0.0f : maximum; }

// Stores what is told of a row, by one thread. The factor that makes exponentials probabilities: 0 for an empty row.
__device__ __forceinline__ float finish_row(const SoftmaxParams& p, unsigned row, float maximum, float sum,
                                            bool stores) {
  const bool empty = maximum == -kInfinity && sum == 0.0f;
  if (stores) {
    p.empty[row] = empty;
    if (p.lse != nullptr) {
      p.lse[offset_of(row, p.num_heads, p.seqlen_q, p.lse_stride)] =
          empty ? -kInfinity : (maximum + log2_fast(sum)) * kLn2;
    }
    if (p.row_max != nullptr) {
      p.row_max[offset_of(row, p.num_heads, p.seqlen_q, p.row_max_stride)] =
          sum != sum && maximum != kInfinity ? sum : maximum * kLn2;
    }
  }
  return empty ? 0.0f : probability_scale(kConfig.element) / sum;
}

// Scores of a row's vector `index`, -inf beyond the keys.
__device__ __forceinline__ Vector load_scores(const float* scores, int index, int seqlen_kv) {
  Vector s = reinterpret_cast<const Vector*>(scores)[index];
  const int left = seqlen_kv - index * kVector;
#pragma unroll
  for (int i = 1; i < kVector; ++i) s.x[i] = i < left ? s.x[i] : -kInfinity;
  return s;
}

// As store_vector, times `factor`.
__device__ __forceinline__ void store_probabilities(float* row, int index, const Vector& e, float factor) {
  Vector out;
#pragma unroll
  for (int i = 0; i < kVector; ++i) out.x[i] = e.x[i] * factor;
  store_vector(kConfig.element, row, index, out);
}

__device__ __forceinline__ int vectors_of(int seqlen_kv) { return (seqlen_kv + kVector - 1) / kVector; }

// A row that its team holds in registers: kCount vectors each. Nothing is stored before the sum is known, to which
// every thread's loads contributed: probabilities may overwrite other threads' scores.
template <int kCount, typename Team>
__device__ __forceinline__ void softmax_in_registers(const SoftmaxParams& p, unsigned row, const Team& team) {
  float* const scores = p.scores + row * p.pitch;
  const int vectors = vectors_of(p.seqlen_kv);
  Vector s[kCount];
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = team.rank + v * team.size();
    s[v] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
    if (index < vectors) s[v] = load_scores(scores, index, p.seqlen_kv);
  }
  float maximum = -kInfinity;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
#pragma unroll
    for (int i = 0; i < kVector; ++i) maximum = max_number(maximum, s[v].x[i]);
  }
  maximum = team.max(maximum);
  const float reference = reference_of(maximum);
  float sum = 0.0f;
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    if (v * team.size() >= vectors) continue;  // for all of the team
#pragma unroll
    for (int i = 0; i < kVector; ++i) sum += s[v].x[i] = exp2_fast(s[v].x[i] - reference);
  }
  sum = team.sum(sum);
  const float factor = finish_row(p, row, maximum, sum, team.rank == 0);
#pragma unroll
  for (int v = 0; v < kCount; ++v) {
    const int index = team.rank + v * team.size();
    if (index < vectors) store_probabilities(scores, index, s[v], factor);
  }
}

template <int kCount>
__device__ __forceinline__ void softmax_by_warps(const SoftmaxParams& p) {
  const unsigned row = blockIdx.x * (kWarpThreads / 32) + threadIdx.x / 32;
  if (row < p.rows) softmax_in_registers<kCount>(p, row, Warp{static_cast<int>(threadIdx.x) % 32});
}

extern "C" __global__ void __launch_bounds__(kWarpThreads, 6)
    attnjit_math_softmax_warp2(const __grid_constant__ SoftmaxParams p) {
  softmax_by_warps<2>(p);
}

extern "C" __global__ void __launch_bounds__(kWarpThreads, 4)
    attnjit_math_softmax_warp8(const __grid_constant__ SoftmaxParams p) {
  softmax_by_warps<8>(p);
}

extern "C" __global__ void __launch_bounds__(1024) attnjit_math_softmax_block(const __grid_constant__ SoftmaxParams p) {
  __shared__ float maxima[32];
  __shared__ float sums[32];
  softmax_in_registers<kBlockVectors>(p, blockIdx.x,
                                      Block{static_cast<int>(threadIdx.x), static_cast<int>(blockDim.x), maxima, sums});
}

extern "C" __global__ void __launch_bounds__(kLongThreads, 2)
    attnjit_math_softmax_long(const __grid_constant__ SoftmaxParams p) {
  constexpr int kCount = 4;
  constexpr int kStep = kCount * kLongThreads;
  __shared__ float maxima[32];
  __shared__ float sums[32];
  const Block block{static_cast<int>(threadIdx.x), kLongThreads, maxima, sums};
  const unsigned row = blockIdx.x;
  const int vectors = vectors_of(p.seqlen_kv);
  float* const scores = p.scores + row * p.pitch;
  float own_maximum = -kInfinity;
  float own_sum = 0.0f;
  for (int first = block.rank; first < vectors; first += kStep) {
    Vector s[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int index = first + v * kLongThreads;
      s[v] = {-kInfinity, -kInfinity, -kInfinity, -kInfinity};
      if (index < vectors) s[v] = load_scores(scores, index, p.seqlen_kv);
    }
    float maximum = own_maximum;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) maximum = max_number(maximum, s[v].x[i]);
    }
    const float reference = reference_of(maximum);
    own_sum *= exp2_fast(own_maximum - reference);
    own_maximum = maximum;
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) own_sum += exp2_fast(s[v].x[i] - reference);
    }
  }
  const float maximum = block.max(own_maximum);
  const float reference = reference_of(maximum);
  const float sum = block.sum(own_sum * exp2_fast(own_maximum - reference));
  const float factor = finish_row(p, row, maximum, sum, block.rank == 0);
  for (int first = 0; first < vectors; first += kStep) {
    Vector e[kCount];
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int index = first + block.rank + v * kLongThreads;
      if (index < vectors) {
        e[v] = load_scores(scores, index, p.seqlen_kv);
#pragma unroll
        for (int i = 0; i < kVector; ++i) e[v].x[i] = exp2_fast(e[v].x[i] - reference);
      }
    }
    // 16-bit probabilities of this step lie over scores of this step or earlier ones, which other threads read.
    __syncthreads();
#pragma unroll
    for (int v = 0; v < kCount; ++v) {
      const int index = first + block.rank + v * kLongThreads;
      if (index < vectors) store_probabilities(scores, index, e[v], factor);
    }
  }
}

// ---- Around the products

extern "C" __global__ void __launch_bounds__(kWarpThreads)
    attnjit_math_zero_rows(const __grid_constant__ ZeroParams p) {
  const unsigned own = blockIdx.x * kWarpThreads + threadIdx.x;
  const unsigned lane = threadIdx.x % 32;
  // Which of the warp's 32 rows are empty; it zeroes them one after the other.
  for (unsigned rows = vote(own < p.rows && p.empty[own] != 0); rows != 0; rows &= rows - 1) {
    const unsigned row = own - lane + 31 - __clz(static_cast<int>(rows & (0u - rows)));
    const long long offset = offset_of(row, p.num_heads, p.seqlen_q, p.o_stride);
    for (int d = static_cast<int>(lane); d < p.head_dim_v; d += 32) {
      if constexpr (kConfig.element == Element::kF32) {
        static_cast<unsigned*>(p.o)[offset + d] = 0;
      } else {
        static_cast<unsigned short*>(p.o)[offset + d] = 0;
      }
    }
  }
}

// ---- Of the backward

__device__ __forceinline__ float element_at(const void* data, long long i) {
  if constexpr (kConfig.element == Element::kF32) {
    return static_cast<const float*>(data)[i];
  } else {
    return widen(static_cast<const unsigned short*>(data)[i]);
  }
}

extern "C" __global__ void __launch_bounds__(kWarpThreads) attnjit_math_delta(const __grid_constant__ DeltaParams p) {
  const unsigned row = blockIdx.x * (kWarpThreads / 32) + threadIdx.x / 32;
  if (row >= p.rows) return;
  const Warp warp{static_cast<int>(threadIdx.x) % 32};
  const long long o = offset_of(row, p.num_heads, p.seqlen_q, p.o_stride);
  const long long grad_out = offset_of(row, p.num_heads, p.seqlen_q, p.grad_out_stride);
  float sum = 0.0f;
  for (int d = warp.rank; d < p.head_dim_v; d += 32)
    sum += element_at(p.o, o + d) * element_at(p.grad_out, grad_out + d);
  sum = warp.sum(sum);
  if (warp.rank != 0) return;
  const float lse = p.lse[offset_of(row, p.num_heads, p.seqlen_q, p.lse_stride)];
  const bool empty = lse == -kInfinity;
  const float grad_lse =
      p.grad_lse != nullptr ? p.grad_lse[offset_of(row, p.num_heads, p.seqlen_q, p.grad_lse_stride)] : 0.0f;
  p.row_lse[row] = empty ? kInfinity : lse;
  p.row_delta[row] = empty ? 0.0f : sum - grad_lse;
}

// ---- Copies

template <typename Piece>
__device__ __forceinline__ void copy_pieces(const CopyParams& p, const char* from, char* to, int first, int width) {
  for (int i = first; i < p.pieces; i += width)
    reinterpret_cast<Piece*>(to)[i] = reinterpret_cast<const Piece*>(from)[i];
}

extern "C" __global__ void __launch_bounds__(kCopyThreads) attnjit_math_copy(const __grid_constant__ CopyParams p) {
  const int width = 1 << p.log2_width;
  const unsigned row = blockIdx.x * (kCopyThreads >> p.log2_width) + (threadIdx.x >> p.log2_width);
  if (row >= p.rows) return;
  const int x = static_cast<int>(threadIdx.x) & (width - 1);
  const char* const from = static_cast<const char*>(p.from) + offset_of(row, p.num_heads, p.seqlen, p.from_stride);
  char* const to = static_cast<char*>(p.to) + offset_of(row, p.num_heads, p.seqlen, p.to_stride);
  switch (p.piece_bytes) {
    case 16:
      return copy_pieces<Vector>(p, from, to, x, width);
    case 8:
      return copy_pieces<Packed>(p, from, to, x, width);
    case 4:
      return copy_pieces<unsigned>(p, from, to, x, width);
    default:
      return copy_pieces<unsigned short>(p, from, to, x, width);
  }
}

}  // namespace attnjit::math
