// Turns the sums of a captured tensor's gradient into its elements. Compiled behind params.h and gradients.cuh.
namespace attnjit::cuda {

__device__ __forceinline__ float sum_at(const FinishParams& params, long long index) {
  return params.accumulators
             ? accumulated(static_cast<const unsigned long long*>(params.sums) + index * kAccumulatorWords)
             : static_cast<const float*>(params.sums)[index];
}

}  // namespace attnjit::cuda

extern "C" __global__ void __launch_bounds__(256)
    attnjit_finish_gradient(const __grid_constant__ attnjit::cuda::FinishParams params) {
  using namespace attnjit::cuda;
  const long long step = static_cast<long long>(gridDim.x) * blockDim.x;
  for (long long i = static_cast<long long>(blockIdx.x) * blockDim.x + threadIdx.x; i < params.elements; i += step) {
    const float value = sum_at(params, i);
    long long rest = i, offset = 0;
#pragma unroll
    for (int d = kMaxCaptureRank - 1; d >= 0; --d) {
      if (params.extent[d] == 1) continue;
      const long long outer = rest / params.extent[d];
      offset += (rest - outer * params.extent[d]) * params.stride[d];
      rest = outer;
    }
    if (params.type == GradientType::kF32) {
      static_cast<float*>(params.to)[offset] = value;
    } else {
      unsigned short bits;
      if (params.type == GradientType::kF16) {
        asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
      } else {
        unsigned pair;  // the conversion of one value alone is younger than 8.0
        asm("cvt.rn.bf16x2.f32 %0, %1, %1;" : "=r"(pair) : "f"(value));
        bits = static_cast<unsigned short>(pair);
      }
      static_cast<unsigned short*>(params.to)[offset] = bits;
    }
  }
}
