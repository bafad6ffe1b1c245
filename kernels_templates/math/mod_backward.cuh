// The eager backward's pass: probabilities and gradients of the scores over materialised scores and gradients of
// probabilities, both in place, and what is added to the gradients of captured tensors.
//
// A block owns kModRows * height whole rows and walks along them, so that sums that do not depend on the key stay in
// registers to the end, and that 16-bit results may lie over what it has read. A thread owns a vector of keys and
// kModRows queries of each step.
namespace attnjit::math {

constexpr float kLog2e = 1.44269504088896340736f;
constexpr int kDiagonals = kModRows + kVector - 1;  // of one thread in one step

// Of one (batch, head) and the rows of one thread.
struct Place {
  typename cuda::Mod::Block block;
  typename cuda::Mod::Row row[kModRows];
};
// Of one step, too. Element (r, i) lies on diagonal r - i + kVector - 1.
struct Step {
  typename cuda::Mod::Column column[kVector];
  typename cuda::Mod::Diagonal diagonal[kDiagonals];
  float score[kModRows][kVector];
  float grad[kModRows][kVector];  // of the modified scores; 0 for what does not exist
};

// Sum over `width` threads in a row, a power of two, for the first of them. `memory`: one float per warp.
__device__ __forceinline__ float sum_over(float x, int width, float* memory) {
#pragma unroll
  for (int mask = 1; mask < 32; mask *= 2) {
    const float other = exchange(x, mask);
    if (mask < width) x += other;
  }
  if (width <= 32) return x;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  if (threadIdx.x % 32 == 0) memory[warp] = x;
  __syncthreads();
  float sum = 0.0f;
  if (threadIdx.x % static_cast<unsigned>(width) == 0) {
    for (int w = 0; w < width / 32; ++w) sum += memory[warp + w];
  }
  __syncthreads();
  return sum;
}

// What a thread has of one sink. Sums of a block or a row are kept to the end of the rows, others are given away at
// once.
template <typename Sink>
struct SinkSums {
  static constexpr bool kPerRow = Sink::kLevel == cuda::SinkLevel::kRow;
  static constexpr bool kKept = kPerRow || Sink::kLevel == cuda::SinkLevel::kBlock;
  float kept[kPerRow ? kModRows : 1];

  __device__ __forceinline__ void start() {
    for (float& sum : kept) sum = 0.0f;
  }

  static __device__ __forceinline__ float value(const ModBackwardParams& p, const Place& at, const Step& step, int r,
                                                int i) {
    return Sink::value(p.captured, step.score[r][i], step.grad[r][i], at.block, at.row[r], step.column[i],
                       step.diagonal[r - i + kVector - 1]);
  }
  static __device__ __forceinline__ void give(const ModBackwardParams& p, const Place& at, const Step& step, int r,
                                              int i, float sum) {
    const auto offset = Sink::offset(p.captured, p.sums, step.score[r][i], at.block, at.row[r], step.column[i],
                                     step.diagonal[r - i + kVector - 1]);
    if constexpr (Sink::kInjective) {
      cuda::store_gradient(p.sums[Sink::kCapture], offset, sum);
    } else {
      cuda::add_gradient<kDeterministic>(p.sums[Sink::kCapture], offset, sum);
    }
  }

  __device__ __forceinline__ void add(const ModBackwardParams& p, const Place& at, const Step& step) {
    if constexpr (Sink::kRowShift) {
      return;
    } else if constexpr (kKept) {
#pragma unroll
      for (int r = 0; r < kModRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) kept[kPerRow ? r : 0] += value(p, at, step, r, i);
      }
    } else if constexpr (Sink::kLevel == cuda::SinkLevel::kColumn) {
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kModRows; ++r) sum += value(p, at, step, r, i);
        give(p, at, step, 0, i, sum);
      }
    } else if constexpr (Sink::kLevel == cuda::SinkLevel::kDiagonal) {
#pragma unroll
      for (int d = 0; d < kDiagonals; ++d) {
        const int first = d < kVector ? 0 : d - (kVector - 1);  // row
        float sum = 0.0f;
#pragma unroll
        for (int r = 0; r < kModRows; ++r) {
          const int i = r - d + kVector - 1;
          if (i >= 0 && i < kVector) sum += value(p, at, step, r, i);
        }
        give(p, at, step, first, first - d + kVector - 1, sum);
      }
    } else {
#pragma unroll
      for (int r = 0; r < kModRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) give(p, at, step, r, i, value(p, at, step, r, i));
      }
    }
  }

  // `grad_lse`: of the thread's rows. `first_of_rows`: of the threads that share them, by width.
  __device__ __forceinline__ void finish(const ModBackwardParams& p, const Place& at, const float (&grad_lse)[kModRows],
                                         int width, bool first_of_rows, float* memory) {
    if constexpr (kKept) {
      Step none{};
      if constexpr (Sink::kRowShift) {
        if (p.grad_lse == nullptr) return;
#pragma unroll
        for (int r = 0; r < kModRows; ++r) {
          none.grad[r][0] = first_of_rows ? grad_lse[r] : 0.0f;
          kept[kPerRow ? r : 0] += value(p, at, none, r, 0);
        }
      }
      if constexpr (kPerRow) {
#pragma unroll
        for (int r = 0; r < kModRows; ++r) {
          const float sum = sum_over(kept[r], width, memory);
          if (first_of_rows) give(p, at, none, r, 0, sum);
        }
      } else {
        const float sum = sum_over(kept[0], static_cast<int>(blockDim.x), memory);
        if (threadIdx.x == 0) give(p, at, none, 0, 0, sum);
      }
    }
  }
};

template <typename List>
struct AllSums;
template <>
struct AllSums<cuda::SinkList<>> {
  template <typename Visit>
  __device__ __forceinline__ void each(Visit&& visit) {}
};
template <typename First, typename... Rest>
struct AllSums<cuda::SinkList<First, Rest...>> {
  SinkSums<First> first;
  AllSums<cuda::SinkList<Rest...>> rest;
  template <typename Visit>
  __device__ __forceinline__ void each(Visit&& visit) {
    visit(first);
    rest.each(visit);
  }
};

// One block at least: without that, registers are spilled for more of them at once.
extern "C" __global__ void __launch_bounds__(kModThreads, 1)
    attnjit_math_mod_backward(const __grid_constant__ ModBackwardParams p) {
  using cuda::Mod;
  __shared__ float memory[kModThreads / 32];
  const int width = 1 << p.log2_vectors;
  const int height = static_cast<int>(blockDim.x) >> p.log2_vectors;
  const int x = static_cast<int>(threadIdx.x) & (width - 1);
  const int y = static_cast<int>(threadIdx.x) >> p.log2_vectors;
  const int vectors = (p.seqlen_kv + kVector - 1) / kVector;
  const long long first_q = (static_cast<long long>(blockIdx.x) * height + y) * kModRows;
  const float probability_factor = probability_scale(p.element);

  for (unsigned head = blockIdx.y; head < p.heads; head += gridDim.y) {
    const int b = static_cast<int>(head / static_cast<unsigned>(p.num_heads));
    const int h = static_cast<int>(head) - b * p.num_heads;
    Place at;
    at.block = Mod::block(p.captured, b, h);
    // Rows that do not exist, as those without a kept element, have a probability of 0 throughout. Nothing is read of
    // captured tensors but at positions that there are: their reads are in bounds for those only.
    float lse[kModRows], delta[kModRows], grad_lse[kModRows];
    const long long first_row = static_cast<long long>(head) * p.seqlen_q + first_q;
#pragma unroll
    for (int r = 0; r < kModRows; ++r) {
      const bool exists = first_q + r < p.seqlen_q;
      const int q = exists ? static_cast<int>(first_q) + r : p.seqlen_q - 1;
      at.row[r] = Mod::row(p.captured, at.block, p.q_idx_origin + q);
      lse[r] = exists ? p.row_lse[first_row + r] : kInfinity;
      delta[r] = exists ? p.row_delta[first_row + r] : 0.0f;
      grad_lse[r] = lse[r] != kInfinity && p.grad_lse != nullptr
                        ? p.grad_lse[b * p.grad_lse_stride[0] + h * p.grad_lse_stride[1] + q * p.grad_lse_stride[2]]
                        : 0.0f;
    }
    AllSums<typename Mod::Sinks> sums;
    sums.each([](auto& sink) { sink.start(); });

    for (int index = x; index - x < vectors; index += width) {
      const bool inside = index < vectors;
      Vector s[kModRows], dp[kModRows];
#pragma unroll
      for (int r = 0; r < kModRows; ++r) {
        s[r] = dp[r] = {};
        if (!inside || first_q + r >= p.seqlen_q) continue;
        s[r] = reinterpret_cast<const Vector*>(p.scores + (first_row + r) * p.pitch)[index];
        if (p.gradients != nullptr) {
          dp[r] = reinterpret_cast<const Vector*>(p.gradients + (first_row + r) * p.pitch)[index];
        }
      }
      // 16-bit results of this step lie over scores of this step or earlier ones, which other threads read.
      __syncthreads();

      Step step;
      const int last_q = p.seqlen_q - 1, last_kv = p.seqlen_kv - 1;
      const int difference = p.q_idx_origin - p.kv_idx_origin + static_cast<int>(first_q) - index * kVector;
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const int kv = index * kVector + i < last_kv ? index * kVector + i : last_kv;
        step.column[i] = Mod::column(p.captured, at.block, p.kv_idx_origin + kv);
      }
#pragma unroll
      for (int d = 0; d < kDiagonals; ++d) {
        const int least = p.q_idx_origin - p.kv_idx_origin - last_kv, most = p.q_idx_origin - p.kv_idx_origin + last_q;
        int q_minus_kv = difference + d - (kVector - 1);
        q_minus_kv = q_minus_kv < least ? least : (q_minus_kv > most ? most : q_minus_kv);
        step.diagonal[d] = Mod::diagonal(p.captured, at.block, q_minus_kv, static_cast<float>(q_minus_kv));
      }
      Vector ds[kModRows];
#pragma unroll
      for (int r = 0; r < kModRows; ++r) {
#pragma unroll
        for (int i = 0; i < kVector; ++i) {
          const auto& diagonal = step.diagonal[r - i + kVector - 1];
          const float score = s[r].x[i] * p.factor;
          const float value = Mod::score(p.captured, score, at.block, at.row[r], step.column[i], diagonal);
          bool kept = lse[r] != kInfinity && index * kVector + i < p.seqlen_kv;
          if constexpr (Mod::kHasMask) {
            kept = kept && Mod::keep(p.captured, score, at.block, at.row[r], step.column[i], diagonal);
          }
          const float probability = kept ? exp2_fast((value - lse[r]) * kLog2e) : 0.0f;
          const float grad = probability == 0.0f ? 0.0f : probability * (dp[r].x[i] - delta[r]);
          step.score[r][i] = score;
          step.grad[r][i] = grad;
          s[r].x[i] = probability * probability_factor;
          ds[r].x[i] = p.factor * Mod::dscore(p.captured, score, grad, at.block, at.row[r], step.column[i], diagonal);
        }
        if (!inside || first_q + r >= p.seqlen_q) continue;
        store_vector(p.element, p.scores + (first_row + r) * p.pitch, index, s[r]);
        if (p.gradients != nullptr) store_vector(p.element, p.gradients + (first_row + r) * p.pitch, index, ds[r]);
      }
      sums.each([&](auto& sink) { sink.add(p, at, step); });
    }
    sums.each([&](auto& sink) { sink.finish(p, at, grad_lse, width, x == 0, memory); });
  }
}

}  // namespace attnjit::math
