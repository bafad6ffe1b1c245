// The functions of libcublas over FakeCublas's state.
#include "support/fake_cublas/fake_cublas.h"

#include <cstdint>
#include <mutex>

#include "support/float16.h"

using attnjit::test::FakeCublas;

namespace {

struct Handle {
  void* stream = nullptr;
  void* workspace = nullptr;
  std::size_t workspace_size = 0;
  int math_mode = 0;
};

// Never destroyed: programs may give back handles on their way out.
union Lasting {
  Lasting() noexcept : value() {}
  ~Lasting() {}
  FakeCublas value;
} lasting;
FakeCublas& state = lasting.value;

constexpr int kInvalidValue = 7;
constexpr int kReal32F = 0, kReal16F = 2, kReal16BF = 14;

float read(const void* data, int type, long long i) {
  if (type == kReal32F) return static_cast<const float*>(data)[i];
  const std::uint16_t bits = static_cast<const std::uint16_t*>(data)[i];
  return type == kReal16F ? attnjit::test::from_f16(bits) : attnjit::test::from_bf16(bits);
}

void write(void* data, int type, long long i, float value) {
  if (type == kReal32F) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<std::uint16_t*>(data)[i] =
        type == kReal16F ? attnjit::test::to_f16(value) : attnjit::test::to_bf16(value);
  }
}

bool known_type(int type) { return type == kReal32F || type == kReal16F || type == kReal16BF; }

}  // namespace

// NOLINTBEGIN(readability-identifier-naming): the names of the original
#define FAKE extern "C" __attribute__((visibility("default")))

FAKE FakeCublas* attnjit_fake_cublas() { return &state; }

FAKE int cublasCreate_v2(void** handle) {
  const std::lock_guard lock(state.mutex);
  if (state.create_status != 0) return state.create_status;
  *handle = new Handle;
  ++state.handles;
  return 0;
}

FAKE int cublasDestroy_v2(void* handle) {
  const std::lock_guard lock(state.mutex);
  delete static_cast<Handle*>(handle);
  --state.handles;
  return 0;
}

FAKE int cublasGetVersion_v2(void*, int* version) {
  *version = 130100;
  return 0;
}

FAKE const char* cublasGetStatusString(int status) {
  return status == kInvalidValue ? "an invalid value" : "a failure";
}

FAKE int cublasSetStream_v2(void* handle, void* stream) {
  auto* const h = static_cast<Handle*>(handle);
  h->stream = stream;
  h->workspace = nullptr;  // as the original does
  return 0;
}

FAKE int cublasSetWorkspace_v2(void* handle, void* workspace, std::size_t size) {
  if (reinterpret_cast<std::uintptr_t>(workspace) % 256 != 0) return kInvalidValue;
  static_cast<Handle*>(handle)->workspace = workspace;
  static_cast<Handle*>(handle)->workspace_size = size;
  return 0;
}

FAKE int cublasSetMathMode(void* handle, int mode) {
  static_cast<Handle*>(handle)->math_mode = mode;
  return 0;
}

FAKE int cublasGemmStridedBatchedEx(void* handle, int transpose_a, int transpose_b, int m, int n, int k,
                                    const void* alpha, const void* a, int a_type, int lda, long long a_stride,
                                    const void* b, int b_type, int ldb, long long b_stride, const void* beta, void* c,
                                    int c_type, int ldc, long long c_stride, int batch, int compute_type,
                                    int algorithm) {
  const auto* const h = static_cast<const Handle*>(handle);
  if (m < 1 || n < 1 || k < 1 || batch < 1 || batch > 65535) return kInvalidValue;
  if (lda < (transpose_a ? k : m) || ldb < (transpose_b ? n : k) || ldc < m) return kInvalidValue;
  if (!known_type(a_type) || a_type != b_type || (c_type != a_type && c_type != 0)) return kInvalidValue;
  if (compute_type != 68 || algorithm != -1 || !h->workspace) return kInvalidValue;
  {
    const std::lock_guard lock(state.mutex);
    if (state.gemm_status != 0) return state.gemm_status;
    ++state.products;
    state.last = {m, n, k, batch, a_type, c_type, h->stream, h->workspace, h->workspace_size, h->math_mode};
    if (state.on_product) state.on_product(state.last);
  }
  // Column-major: element (row, column) of a matrix is at row + column * ld.
  for (int i = 0; i < batch; ++i) {
    for (int column = 0; column < n; ++column) {
      for (int row = 0; row < m; ++row) {
        double sum = 0.0;  // what long sums lose is not for this one to show
        for (int inner = 0; inner < k; ++inner) {
          const long long at_a = i * a_stride + (transpose_a ? inner + static_cast<long long>(row) * lda
                                                             : row + static_cast<long long>(inner) * lda);
          const long long at_b = i * b_stride + (transpose_b ? column + static_cast<long long>(inner) * ldb
                                                             : inner + static_cast<long long>(column) * ldb);
          sum += static_cast<double>(read(a, a_type, at_a)) * static_cast<double>(read(b, b_type, at_b));
        }
        const long long at_c = i * c_stride + row + static_cast<long long>(column) * ldc;
        const float scale = *static_cast<const float*>(beta);
        const float before = scale == 0.0f ? 0.0f : scale * read(c, c_type, at_c);
        write(c, c_type, at_c, *static_cast<const float*>(alpha) * static_cast<float>(sum) + before);
      }
    }
  }
  return 0;
}
// NOLINTEND(readability-identifier-naming)
