// Loops of independent multiply-adds in registers.
#include "bench/fma_peak.h"

#include <immintrin.h>

namespace attnjit::tool {

namespace {

float volatile sink;

// Chains by name and not in an array, which g++ keeps in memory: enough of them to cover two units of up to six cycles'
// latency, few enough for the registers of every instruction set.
constexpr int kChains = 12;
#define ATTNJIT_CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

// The empty statement makes each accumulator opaque, so that no iteration is folded into another.
#define ATTNJIT_OPAQUE(i) __asm__ volatile("" : "+v"(x##i));
#define ATTNJIT_OPAQUE_SSE(i) __asm__ volatile("" : "+x"(x##i));

__attribute__((target("avx512f"), noinline)) void run_avx512(long iterations) {
#define ATTNJIT_DECLARE(i) __m512 x##i = _mm512_set1_ps(i);
#define ATTNJIT_STEP(i) x##i = _mm512_fmadd_ps(x##i, a, b);
#define ATTNJIT_ADD(i) sum = _mm512_add_ps(sum, x##i);
  const __m512 a = _mm512_set1_ps(0.999f), b = _mm512_set1_ps(1e-3f);
  ATTNJIT_CHAINS(ATTNJIT_DECLARE)
  for (long n = 0; n < iterations; ++n) {
    ATTNJIT_CHAINS(ATTNJIT_STEP)
    ATTNJIT_CHAINS(ATTNJIT_OPAQUE)
  }
  __m512 sum = _mm512_setzero_ps();
  ATTNJIT_CHAINS(ATTNJIT_ADD)
  sink = _mm512_cvtss_f32(sum);
#undef ATTNJIT_DECLARE
#undef ATTNJIT_STEP
#undef ATTNJIT_ADD
}

__attribute__((target("avx2,fma"), noinline)) void run_avx2(long iterations) {
#define ATTNJIT_DECLARE(i) __m256 x##i = _mm256_set1_ps(i);
#define ATTNJIT_STEP(i) x##i = _mm256_fmadd_ps(x##i, a, b);
#define ATTNJIT_ADD(i) sum = _mm256_add_ps(sum, x##i);
  const __m256 a = _mm256_set1_ps(0.999f), b = _mm256_set1_ps(1e-3f);
  ATTNJIT_CHAINS(ATTNJIT_DECLARE)
  for (long n = 0; n < iterations; ++n) {
    ATTNJIT_CHAINS(ATTNJIT_STEP)
    ATTNJIT_CHAINS(ATTNJIT_OPAQUE_SSE)
  }
  __m256 sum = _mm256_setzero_ps();
  ATTNJIT_CHAINS(ATTNJIT_ADD)
  sink = _mm256_cvtss_f32(sum);
#undef ATTNJIT_DECLARE
#undef ATTNJIT_STEP
#undef ATTNJIT_ADD
}

// SSE2 has no fused multiply-add: a product and a sum.
__attribute__((noinline)) void run_sse2(long iterations) {
#define ATTNJIT_DECLARE(i) __m128 x##i = _mm_set1_ps(i);
#define ATTNJIT_STEP(i) x##i = _mm_add_ps(_mm_mul_ps(x##i, a), b);
#define ATTNJIT_ADD(i) sum = _mm_add_ps(sum, x##i);
  const __m128 a = _mm_set1_ps(0.999f), b = _mm_set1_ps(1e-3f);
  ATTNJIT_CHAINS(ATTNJIT_DECLARE)
  for (long n = 0; n < iterations; ++n) {
    ATTNJIT_CHAINS(ATTNJIT_STEP)
    ATTNJIT_CHAINS(ATTNJIT_OPAQUE_SSE)
  }
  __m128 sum = _mm_setzero_ps();
  ATTNJIT_CHAINS(ATTNJIT_ADD)
  sink = _mm_cvtss_f32(sum);
#undef ATTNJIT_DECLARE
#undef ATTNJIT_STEP
#undef ATTNJIT_ADD
}

}  // namespace

FmaLoop fma_loop(const std::string& isa) {
  if (isa.starts_with("avx512") && __builtin_cpu_supports("avx512f")) return {run_avx512, 2.0 * 16 * kChains};
  if (isa == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    return {run_avx2, 2.0 * 8 * kChains};
  }
  if (isa == "sse2") return {run_sse2, 2.0 * 4 * kChains};
  return {};
}

}  // namespace attnjit::tool
