// OpenBLAS, opened at run time.
#pragma once

#include <string>

#include "runtime/math_passes.h"

namespace attnjit::runtime {

class Blas {
 public:
  // The process's OpenBLAS, opened on the first call, or null where there is none. It is set to one thread for the
  // whole process: the backend spreads its products over its own threads.
  static const Blas* get();

  // Dimensions and leading dimensions fit 32 bits; m, n and k are positive. alpha is finite and not 0 (BLAS would not
  // read A and B then).
  void gemm(const GemmArgs& args) const;

  // Version and the processor whose kernels are used: "OpenBLAS 0.3.21, SkylakeX".
  const std::string& description() const { return description_; }

 private:
  using Sgemm = void (*)(int order, int transpose_a, int transpose_b, int m, int n, int k, float alpha, const float* a,
                         int lda, const float* b, int ldb, float beta, float* c, int ldc);
  Sgemm sgemm_ = nullptr;
  std::string description_;
};

}  // namespace attnjit::runtime
