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

void Blas::gemm(bool transpose_b, std::int64_t m, std::int64_t n, std::int64_t k, float alpha, const float* a,
                std::int64_t lda, const float* b, std::int64_t ldb, float* c, std::int64_t ldc) const {
  sgemm_(kRowMajor, kNoTranspose, transpose_b ? kTranspose : kNoTranspose, static_cast<int>(m), static_cast<int>(n),
         static_cast<int>(k), alpha, a, static_cast<int>(lda), b, static_cast<int>(ldb), 0.0f, c,
         static_cast<int>(ldc));
}

}  // namespace attnjit::runtime
