// Opens OpenBLAS and finds the one function that is used of it.
#include "runtime/blas.h"

#include <dlfcn.h>

#include <string_view>

namespace attnjit::runtime {
namespace {

// Values of the CBLAS interface.
constexpr int kRowMajor = 101;
constexpr int kNoTranspose = 111;
constexpr int kTranspose = 112;

template <typename Function>
Function find(void* library, const char* name) {
  return reinterpret_cast<Function>(dlsym(library, name));
}

}  // namespace

const Blas* Blas::get() {
  static const Blas* const blas = []() -> const Blas* {
    // Never closed: its threads may outlive any user of it.
    void* library = dlopen("libopenblas.so.0", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return nullptr;
    static Blas opened;
    opened.sgemm_ = find<Sgemm>(library, "cblas_sgemm");
    const auto set_num_threads = find<void (*)(int)>(library, "openblas_set_num_threads");
    if (opened.sgemm_ == nullptr || set_num_threads == nullptr) return nullptr;
    set_num_threads(1);

    opened.description_ = "OpenBLAS";
    if (const auto config = find<const char* (*)()>(library, "openblas_get_config")) {
      // "OpenBLAS 0.3.21 NO_LAPACKE DYNAMIC_ARCH ..."
      const std::string_view text = config();
      const std::size_t name = text.find(' ');
      if (name != std::string_view::npos) opened.description_ = text.substr(0, text.find(' ', name + 1));
    }
    if (const auto core = find<const char* (*)()>(library, "openblas_get_corename")) {
      opened.description_ += std::string(", ") + core();
    }
    return &opened;
  }();
  return blas;
}

void Blas::gemm(const GemmArgs& g) const {
  sgemm_(kRowMajor, g.transpose_a ? kTranspose : kNoTranspose, g.transpose_b ? kTranspose : kNoTranspose,
         static_cast<int>(g.m), static_cast<int>(g.n), static_cast<int>(g.k), g.alpha, g.a, static_cast<int>(g.lda),
         g.b, static_cast<int>(g.ldb), g.accumulate ? 1.0f : 0.0f, g.c, static_cast<int>(g.ldc));
}

}  // namespace attnjit::runtime
