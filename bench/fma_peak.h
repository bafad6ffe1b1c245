// The most fused multiply-adds that one core does: the measure that kernels are compared with.
#pragma once

#include <string>

namespace attnjit::tool {

// Floating-point operations of one call of `run`, in float32.
struct FmaLoop {
  void (*run)(long iterations) = nullptr;
  double flops_per_iteration = 0.0;
};

// For an instruction set as the library names it ("sse2", "avx2", "avx512", "avx512bf16"): the widest vectors it has.
// `run` is null where the processor cannot.
FmaLoop fma_loop(const std::string& isa);

}  // namespace attnjit::tool
