// A cuBLAS without a GPU: what tests see of it. It is a shared library with the functions of libcublas that attnjit
// uses; it computes products of host memory and is as strict about its arguments as the original.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <functional>
#include <mutex>

namespace attnjit::test {

struct FakeCublas {
  struct Product {
    int m, n, k, batch;  // as cuBLAS counts: m is the number of columns of a row-major result
    int a_type, c_type;  // cudaDataType
    void* stream;
    void* workspace;
    std::size_t workspace_size;
    int math_mode;
  };

  // ---- What it pretends.
  int create_status = 0, gemm_status = 0;          // returned where not 0
  std::function<void(const Product&)> on_product;  // at the start of each, under the lock

  // ---- What happened.
  int handles = 0;  // alive
  int products = 0;
  Product last{};
  std::mutex mutex;
};

// The state of the fake cuBLAS at `path`, which is loaded for good; null where it cannot be.
inline FakeCublas* fake_cublas(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* const get = library ? dlsym(library, "attnjit_fake_cublas") : nullptr;
  return get ? reinterpret_cast<FakeCublas* (*)()>(get)() : nullptr;
}

}  // namespace attnjit::test
