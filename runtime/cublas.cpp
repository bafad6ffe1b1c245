// cuBLAS's functions by dlopen, and handles over them.
#include "runtime/cublas.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <type_traits>
#include <utility>

namespace attnjit::runtime {
namespace {

// What is used of cublas_api.h and library_types.h, by value.
constexpr int kSuccess = 0;
constexpr int kAllocationFailed = 3;
constexpr int kNoTranspose = 0;
constexpr int kTranspose = 1;
constexpr int kCompute32F = 68;
constexpr int kAlgorithmDefault = -1;
// The default mode computes float32 in float32 and lets 16-bit products sum partial results in 16 bits; this forbids
// it.
constexpr int kDisallowReducedPrecisionReduction = 16;

int data_type(dsl::DType dtype) {
  constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;
  return dtype == dsl::DType::kF16 ? kReal16F : dtype == dsl::DType::kBF16 ? kReal16BF : kReal32F;
}

}  // namespace

// An opened library; or why there is none.
struct Cublas::Library {
  int (*create)(void**) = nullptr;
  int (*destroy)(void*) = nullptr;
  int (*get_version)(void*, int*) = nullptr;
  int (*set_stream)(void*, void*) = nullptr;
  int (*set_workspace)(void*, void*, std::size_t) = nullptr;
  int (*set_math_mode)(void*, int) = nullptr;
  const char* (*status_string)(int) = nullptr;
  int (*gemm_strided_batched)(void*, int transpose_a, int transpose_b, int m, int n, int k, const void* alpha,
                              const void* a, int a_type, int lda, long long a_stride, const void* b, int b_type,
                              int ldb, long long b_stride, const void* beta, void* c, int c_type, int ldc,
                              long long c_stride, int batch, int compute_type, int algorithm) = nullptr;
  std::string error;

  void open(const std::string& name) {
    void* handle = nullptr;
    if (name.empty()) {
      constexpr const char* kNames[] = {"libcublas.so.13", "libcublas.so.12"};
      for (int flags : {RTLD_NOW | RTLD_NOLOAD, RTLD_NOW | RTLD_LOCAL}) {
        for (const char* candidate : kNames) {
          if (!handle) handle = dlopen(candidate, flags);
        }
      }
      if (!handle) {
        error =
            "no cuBLAS: the dynamic loader finds neither libcublas.so.13 nor libcublas.so.12; ATTNJIT_CUBLAS may "
            "name one";
        return;
      }
    } else if (handle = dlopen(name.c_str(), RTLD_NOW | RTLD_LOCAL); !handle) {
      const char* const why = dlerror();
      error = fmt::format("no cuBLAS: {}", why ? why : name);
      return;
    }
    const char* missing = nullptr;
    const auto need = [&](auto* function, const char* symbol) {
      *function = reinterpret_cast<std::remove_reference_t<decltype(*function)>>(dlsym(handle, symbol));
      if (!*function && !missing) missing = symbol;
    };
    need(&create, "cublasCreate_v2");
    need(&destroy, "cublasDestroy_v2");
    need(&get_version, "cublasGetVersion_v2");
    need(&set_stream, "cublasSetStream_v2");
    need(&set_workspace, "cublasSetWorkspace_v2");
    need(&set_math_mode, "cublasSetMathMode");
    need(&status_string, "cublasGetStatusString");
    need(&gemm_strided_batched, "cublasGemmStridedBatchedEx");
    if (missing) error = fmt::format("no usable cuBLAS: {} has no {}", name.empty() ? "libcublas" : name, missing);
  }
};

// Opened by the first who asks, and never closed: a handle of static storage may outlive what would close it.
const Cublas::Library& Cublas::library_of(std::string_view name) {
  static std::mutex mutex;
  static auto& libraries = *new std::map<std::string, Library, std::less<>>;
  std::lock_guard lock(mutex);
  const auto [it, added] = libraries.try_emplace(std::string(name));
  if (added) it->second.open(it->first);
  return it->second;
}

Failure Cublas::failure(int status, std::string_view what) const {
  const char* const text = library_.status_string(status);
  return {status == kAllocationFailed ? ATTNJIT_OUT_OF_MEMORY : ATTNJIT_ENVIRONMENT,
          fmt::format("{} failed on device {}: {}", what, device_->ordinal(), text ? text : "unknown status")};
}

Check Cublas::create() {
  const CudaScope scope(*device_, CudaScope::Use::kSetup);
  if (scope.failure()) return scope.failure();
  if (const int status = library_.create(&handle_); status != kSuccess) {
    handle_ = nullptr;
    return failure(status, "cublasCreate");
  }
  if (const int status = library_.set_math_mode(handle_, kDisallowReducedPrecisionReduction); status != kSuccess) {
    return failure(status, "cublasSetMathMode");
  }
  int version = 0;
  if (const int status = library_.get_version(handle_, &version); status != kSuccess) {
    return failure(status, "cublasGetVersion");
  }
  description_ = fmt::format("cuBLAS {}.{}.{}", version / 10000, version / 100 % 100, version % 100);
  return {};
}

Result<std::shared_ptr<const Cublas>> Cublas::get(std::shared_ptr<CudaDevice> device, std::string_view library) {
  const Library& opened = library_of(library);
  if (!opened.error.empty()) return Failure{ATTNJIT_ENVIRONMENT, opened.error};
  static std::mutex mutex;
  static auto& known = *new std::map<std::pair<const CudaDevice*, const Library*>, std::weak_ptr<const Cublas>>;
  std::lock_guard lock(mutex);
  std::weak_ptr<const Cublas>& slot = known[{device.get(), &opened}];
  // A device that is alive here is the one its handle holds: no address is used twice in between.
  if (std::shared_ptr<const Cublas> cublas = slot.lock()) return cublas;
  std::shared_ptr<Cublas> cublas(new Cublas(std::move(device), opened));
  if (Check failure = cublas->create()) return *failure;
  slot = cublas;
  return std::shared_ptr<const Cublas>(std::move(cublas));
}

Cublas::~Cublas() {
  if (!handle_) return;
  const CudaScope scope(*device_, CudaScope::Use::kSetup);
  if (!scope.failure()) library_.destroy(handle_);
}

std::size_t Cublas::workspace_size(int arch) { return std::size_t{arch >= 90 ? 32u : 4u} << 20; }

Cublas::Queue::Queue(const Cublas& cublas, void* workspace, std::size_t size, CudaStream stream)
    : cublas_(cublas), lock_(cublas.mutex_), scope_(*cublas.device_), failure_(scope_.failure()) {
  if (failure_) return;
  // In this order: a new stream takes the workspace away.
  if (const int status = cublas.library_.set_stream(cublas.handle_, stream); status != kSuccess) {
    failure_ = cublas.failure(status, "cublasSetStream");
  } else if (const int set = cublas.library_.set_workspace(cublas.handle_, workspace, size); set != kSuccess) {
    failure_ = cublas.failure(set, "cublasSetWorkspace");
  }
}

// cuBLAS counts columns first: what it is told to compute is the transpose, C^T (n, m) = B^T A^T, where every row-major
// matrix is its own transpose.
Check Cublas::Queue::add(const Product& product) {
  if (failure_) return failure_;
  const float beta = 0.0f;
  const auto from = [](const Matrix& matrix, std::int64_t batch) {
    return static_cast<char*>(matrix.data) + batch * matrix.batch_stride * dsl::dtype_size(matrix.dtype);
  };
  for (std::int64_t first = 0; first < product.batch; first += kMaxBatch) {
    const int status = cublas_.library_.gemm_strided_batched(
        cublas_.handle_, product.transpose_b ? kTranspose : kNoTranspose,
        product.transpose_a ? kTranspose : kNoTranspose, static_cast<int>(product.n), static_cast<int>(product.m),
        static_cast<int>(product.k), &product.alpha, from(product.b, first), data_type(product.b.dtype),
        static_cast<int>(product.b.stride), product.b.batch_stride, from(product.a, first), data_type(product.a.dtype),
        static_cast<int>(product.a.stride), product.a.batch_stride, &beta, from(product.c, first),
        data_type(product.c.dtype), static_cast<int>(product.c.stride), product.c.batch_stride,
        static_cast<int>(std::min(kMaxBatch, product.batch - first)), kCompute32F, kAlgorithmDefault);
    if (status != kSuccess) {
      return cublas_.failure(status, fmt::format("cublasGemmStridedBatchedEx of ({}, {}, {}) times {}", product.m,
                                                 product.n, product.k, product.batch));
    }
  }
  return {};
}

}  // namespace attnjit::runtime
