// Loops of independent multiply-adds in registers.
#include "bench/fma_peak.h"

namespace attnjit::tool {

namespace {

float volatile sink;

// Chains by name and not in an array, which g++ keeps in memory: enough of them to cover two units of up to six cycles'
// latency, few enough for the registers of every instruction set.
constexpr int kChains = 12;
#define ATTNJIT_CHAINS(DO) DO(0) DO(1) DO(2) DO(3) DO(4) DO(5) DO(6) DO(7) DO(8) DO(9) DO(10) DO(11)

#define ATTNJIT_DECLARE(i) Vector x##i = Vector{} + float{i};
#define ATTNJIT_STEP(i) x##i = x##i * a + b;
// The empty statement makes each accumulator opaque, so that no iteration is folded into another.
#define ATTNJIT_OPAQUE(i) __asm__ volatile("" : "+v"(x##i));
#define ATTNJIT_ADD(i) sum += x##i;

// A macro, as a template cannot take the target. SSE2 has no fused multiply-add: a product and a sum there.
#define ATTNJIT_LOOP(name, width, isa)                                \
  __attribute__((noinline, target(isa))) void name(long iterations) { \
    typedef float Vector __attribute__((vector_size(4 * (width))));   \
    const Vector a = Vector{} + 0.999f, b = Vector{} + 1e-3f;         \
    ATTNJIT_CHAINS(ATTNJIT_DECLARE)                                   \
    for (long n = 0; n < iterations; ++n) {                           \
      ATTNJIT_CHAINS(ATTNJIT_STEP)                                    \
      ATTNJIT_CHAINS(ATTNJIT_OPAQUE)                                  \
    }                                                                 \
    Vector sum = {};                                                  \
    ATTNJIT_CHAINS(ATTNJIT_ADD)                                       \
    sink = sum[0];                                                    \
  }
ATTNJIT_LOOP(run_avx512, 16, "avx512f")
ATTNJIT_LOOP(run_avx2, 8, "avx2,fma")
ATTNJIT_LOOP(run_sse2, 4, "sse2")

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
