// The eager path's elementwise pass: the mod over materialised scores, in place.
//
// A thread owns one vector of keys and kModRows queries: what the expression knows of a key is computed once for all of
// them, and as many loads are under way. The pass moves 8 bytes per score; the arithmetic of a plain mod hides behind.
namespace attnjit::math {

extern "C" __global__ void __launch_bounds__(kModThreads) attnjit_math_mod(const __grid_constant__ ModParams p) {
  using cuda::Mod;
  const int width = 1 << p.log2_vectors;
  const int height = static_cast<int>(blockDim.x) >> p.log2_vectors;
  const int x = static_cast<int>(threadIdx.x) & (width - 1);
  const int y = static_cast<int>(threadIdx.x) >> p.log2_vectors;
  const unsigned q_tile = blockIdx.x / p.kv_tiles;
  const long long first_kv = (static_cast<long long>(blockIdx.x - q_tile * p.kv_tiles) * width + x) * kVector;
  if (first_kv >= p.seqlen_kv) return;
  const long long first_q = static_cast<long long>(q_tile) * (kModRows * height) + y;

  for (unsigned head = blockIdx.y; head < p.heads; head += gridDim.y) {
    const unsigned b = head / static_cast<unsigned>(p.num_heads);
    const unsigned h = head - b * static_cast<unsigned>(p.num_heads);
    const auto block = Mod::block(p.captured, static_cast<int>(b), static_cast<int>(h));
    int kv_idx[kVector];
    typename Mod::Column column[kVector];
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      // Beyond the last key there is nothing to read from captured tensors: their reads are in bounds for keys only.
      kv_idx[i] = p.kv_idx_origin + min(static_cast<int>(first_kv) + i, p.seqlen_kv - 1);
      column[i] = Mod::column(p.captured, block, kv_idx[i]);
    }
    float* const scores = p.scores + static_cast<long long>(head) * p.seqlen_q * p.pitch + first_kv;
    Vector s[kModRows];
#pragma unroll
    for (int r = 0; r < kModRows; ++r) {
      const long long q = first_q + r * height;
      if (q < p.seqlen_q) s[r] = *reinterpret_cast<const Vector*>(scores + q * p.pitch);
    }
#pragma unroll
    for (int r = 0; r < kModRows; ++r) {
      const long long q = first_q + r * height;
      if (q >= p.seqlen_q) break;
      const int q_idx = p.q_idx_origin + static_cast<int>(q);
      const auto row = Mod::row(p.captured, block, q_idx);
#pragma unroll
      for (int i = 0; i < kVector; ++i) {
        const auto diagonal =
            Mod::diagonal(p.captured, block, q_idx - kv_idx[i], static_cast<float>(q_idx - kv_idx[i]));
        const float score = s[r].x[i] * p.factor;
        float value = Mod::score(p.captured, score, block, row, column[i], diagonal);
        if constexpr (Mod::kHasMask) {
          if (!Mod::keep(p.captured, score, block, row, column[i], diagonal)) value = -kInfinity;
        }
        s[r].x[i] = value;
      }
      *reinterpret_cast<Vector*>(scores + q * p.pitch) = s[r];
    }
  }
}

}  // namespace attnjit::math
