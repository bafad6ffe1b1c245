// What the eager path's kernels share: vectors of scores, and the instructions around them.
namespace attnjit::math {

// ---- Instructions. A build that runs these kernels on the host brings its own.

#ifndef ATTNJIT_EMULATED
// Relative error below 2^-22; subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
// Two elements of a 16-bit type, the first one in the lower half.
__device__ __forceinline__ unsigned pack_f16(float first, float second) {
  unsigned y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
__device__ __forceinline__ unsigned pack_bf16(float first, float second) {
  unsigned y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(second), "f"(first));
  return y;
}
__device__ __forceinline__ float exchange(float x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
#endif

struct alignas(16) Vector {
  float x[kVector];
};
struct alignas(8) Packed {
  unsigned x[2];
};

// As vector `index` of the row that starts at `row`, in the inputs' type.
__device__ __forceinline__ void store_vector(Element element, float* row, int index, const Vector& v) {
  if (element == Element::kF32) {
    reinterpret_cast<Vector*>(row)[index] = v;
  } else {
    Packed out;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      out.x[i] =
          element == Element::kF16 ? pack_f16(v.x[2 * i], v.x[2 * i + 1]) : pack_bf16(v.x[2 * i], v.x[2 * i + 1]);
    }
    reinterpret_cast<Packed*>(row)[index] = out;
  }
}

}  // namespace attnjit::math
