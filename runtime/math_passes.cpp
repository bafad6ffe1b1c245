// Picks the vector loops for this machine.
#include "runtime/math_passes.h"

namespace attnjit::runtime {

const Passes& host_passes() {
  static const Passes& passes = []() -> const Passes& {
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      return avx512_passes();
    }
    return avx2 ? avx2_passes() : sse2_passes();
  }();
  return passes;
}

}  // namespace attnjit::runtime
