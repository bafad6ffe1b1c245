// The eager backward for GPUs without one, as cuda_math_backend_test.cpp has the forward.
#include "runtime/cuda_math_backward.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/math/config.h"
#include "support/cuda_emulation.h"
#include "support/fake_cublas/fake_cublas.h"
#include "support/fake_cuda/fake_cuda.h"
#include "support/float16.h"
#include "tests/unit/cuda_math_testing.h"

// ---- The kernels, once for each mod and each element type, each time in a namespace of its own

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
namespace attnjit::cuda {
using namespace emulation;
}
#include "kernels_templates/cuda/gradients.cuh"
#include "kernels_templates/cuda/mod_defaults.cuh"

namespace attnjit::cuda {

struct Noop : ModDefaults {};

// Sinks of every level, all captures f32, kept where q_idx >= kv_idx - 3:
//   score * head[h] + table[q_idx - kv_idx + 1600] + keys[kv_idx] + shift[q_idx] + score * rows[q_idx] + bias[b, h, q,
//   kv]
//     + spread[q_idx * kv_idx % 5] + offset[h]
struct Levels : ModDefaults {
  enum Capture { kHead, kTable, kKeys, kShift, kRows, kBias, kSpread, kOffset };
  static constexpr bool kIdentity = false, kHasMask = true, kUnitDerivative = false;
  static constexpr int kOrigin = 1600;
  struct Block {
    int b, h;
    float head, offset;
  };
  struct Row {
    int q;
    float shift, rows;
  };
  struct Column {
    int kv;
    float key;
  };
  struct Diagonal {
    int difference;
    float table;
  };
  // What the compiler proves of an index holds for positions that there are.
  static float at(const CapturedView& view, int d, int index) {
    if (index < 0 || index >= view.extent[d]) throw std::logic_error("a captured tensor read out of bounds");
    return static_cast<const float*>(view.data)[index * view.stride[d]];
  }
  static Block block(const CapturedView* captured, int b, int h) {
    return {b, h, at(captured[kHead], 0, h), at(captured[kOffset], 0, h)};
  }
  static Row row(const CapturedView* captured, const Block& block, int q_idx) {
    return {q_idx, at(captured[kShift], 0, q_idx), at(captured[kRows], 0, q_idx)};
  }
  static Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    return {kv_idx, at(captured[kKeys], 0, kv_idx)};
  }
  static Diagonal diagonal(const CapturedView* captured, const Block& block, int q_minus_kv, float q_minus_kv_float) {
    EXPECT_EQ(q_minus_kv_float, static_cast<float>(q_minus_kv));
    return {q_minus_kv, at(captured[kTable], 0, q_minus_kv + kOrigin)};
  }
  static long long place(const CapturedView& bias, const Block& block, const Row& row, const Column& column,
                         const long long* stride) {
    return block.b * stride[0] + block.h * stride[1] + row.q * stride[2] + column.kv * stride[3];
  }
  static float score(const CapturedView* captured, float s, const Block& block, const Row& row, const Column& column,
                     const Diagonal& diagonal) {
    const float bias = static_cast<const float*>(
        captured[kBias].data)[place(captured[kBias], block, row, column, captured[kBias].stride)];
    return s * block.head + diagonal.table + column.key + row.shift + s * row.rows + bias +
           at(captured[kSpread], 0, row.q * column.kv % 5) + block.offset;
  }
  static bool keep(const CapturedView* captured, float s, const Block& block, const Row& row, const Column& column,
                   const Diagonal& diagonal) {
    return diagonal.difference >= -3;
  }
  static float dscore(const CapturedView* captured, float s, float grad, const Block& block, const Row& row,
                      const Column& column, const Diagonal& diagonal) {
    return grad == 0.0f ? 0.0f : grad * (block.head + row.rows);
  }

  template <int capture, SinkLevel level, bool row_shift = false, bool injective = false>
  struct Sink {
    static constexpr int kCapture = capture;
    static constexpr SinkLevel kLevel = level;
    static constexpr bool kRowShift = row_shift, kInjective = injective;
    static float value(const CapturedView* captured, float s, float grad, const Block& block, const Row& row,
                       const Column& column, const Diagonal& diagonal) {
      if (grad == 0.0f) return 0.0f;
      return capture == kHead || capture == kRows ? grad * s : grad;
    }
    static long long offset(const CapturedView* captured, const GradientView* gradients, float s, const Block& block,
                            const Row& row, const Column& column, const Diagonal& diagonal) {
      if (capture == kHead || capture == kOffset) return block.h;
      if (capture == kTable) return diagonal.difference + kOrigin;
      if (capture == kKeys) return column.kv;
      if (capture == kShift || capture == kRows) return row.q;
      if (capture == kSpread) return row.q * column.kv % 5;
      return place(captured[kBias], block, row, column, gradients[kBias].stride);
    }
  };
  using Sinks = SinkList<Sink<kHead, SinkLevel::kBlock>, Sink<kTable, SinkLevel::kDiagonal>,
                         Sink<kKeys, SinkLevel::kColumn>, Sink<kShift, SinkLevel::kRow, true>,
                         Sink<kRows, SinkLevel::kRow>, Sink<kBias, SinkLevel::kElement, false, true>,
                         Sink<kSpread, SinkLevel::kElement>, Sink<kOffset, SinkLevel::kBlock, true>>;
};

}  // namespace attnjit::cuda

namespace attnjit::backward_noop {
using namespace math;
using namespace emulation;
constexpr bool kDeterministic = false;
}  // namespace attnjit::backward_noop
namespace attnjit::backward_levels {
using namespace math;
using namespace emulation;
constexpr bool kDeterministic = false;
}  // namespace attnjit::backward_levels
namespace attnjit::backward_deterministic {
using namespace math;
using namespace emulation;
constexpr bool kDeterministic = true;
}  // namespace attnjit::backward_deterministic
namespace attnjit::backward_f32 {
using namespace math;
using namespace emulation;
constexpr Config kConfig{.element = Element::kF32};
[[maybe_unused]] float widen(unsigned short) { return 0; }
}  // namespace attnjit::backward_f32
namespace attnjit::backward_f16 {
using namespace math;
using namespace emulation;
constexpr Config kConfig{.element = Element::kF16};
float widen(unsigned short bits) { return test::from_f16(bits); }
}  // namespace attnjit::backward_f16
namespace attnjit::backward_bf16 {
using namespace math;
using namespace emulation;
constexpr Config kConfig{.element = Element::kBF16};
float widen(unsigned short bits) { return test::from_bf16(bits); }
}  // namespace attnjit::backward_bf16

#define math backward_noop
#define Mod Noop
#define attnjit_math_mod_backward attnjit_math_mod_backward_noop
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod_backward.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod_backward

#define math backward_levels
#define Mod Levels
#define attnjit_math_mod_backward attnjit_math_mod_backward_levels
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod_backward.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod_backward

#define math backward_deterministic
#define Mod Levels
#define attnjit_math_mod_backward attnjit_math_mod_backward_deterministic
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod_backward.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod_backward

#define math backward_f32
#define ATTNJIT_SUFFIX backward_f32
#include "tests/unit/cuda_math_kernels.inc"
#define math backward_f16
#define ATTNJIT_SUFFIX backward_f16
#include "tests/unit/cuda_math_kernels.inc"
#define math backward_bf16
#define ATTNJIT_SUFFIX backward_bf16
#include "tests/unit/cuda_math_kernels.inc"

#pragma GCC diagnostic pop

namespace attnjit::runtime {
namespace {

using namespace cuda_testing;

using testing::HasSubstr;
using Levels = cuda::Levels;

// What attnjit_finish_gradient does.
void finish_gradient(cuda::FinishParams p) {
  if (emulation::threadIdx.x != 0 || emulation::blockIdx.x != 0) return;
  for (long long i = 0; i < p.elements; ++i) {
    const float value =
        p.accumulators ? cuda::accumulated(static_cast<const unsigned long long*>(p.sums) + i * cuda::kAccumulatorWords)
                       : static_cast<const float*>(p.sums)[i];
    long long offset = 0;
    for (long long d = cuda::kMaxCaptureRank - 1, rest = i; d >= 0; rest /= p.extent[d], --d) {
      offset += rest % p.extent[d] * p.stride[d];
    }
    ASSERT_EQ(p.type, cuda::GradientType::kF32);
    static_cast<float*>(p.to)[offset] = value;
  }
}

struct Problem {
  std::int64_t batch = 2, heads = 4, heads_kv = 2, seqlen_q = 7, seqlen_kv = 21, head_dim = 16, head_dim_v = 8;
  DType dtype = DType::kF32;
  Layout q_layout = Layout::kPacked, k_layout = Layout::kPacked, v_layout = Layout::kPacked;
  Layout grad_out_layout = Layout::kPacked, out_layout = Layout::kPacked;
  float scale = 0.5f;
  bool levels = false, deterministic = false, grad_lse = true;
  WantedGradients wanted{.dq = true, .dk = true, .dv = true, .captures = 0xff};
};

constexpr int kCaptures = 8;

// Tensors of one call; a test may change them before it runs.
struct Call {
  Problem problem;
  Tensor q, k, v, o, lse, grad_out, grad_lse, dq, dk, dv;
  std::vector<float> captured[kCaptures], captured_gradient[kCaptures];
  dsl::CaptureView views[kCaptures];
  bool empty = false;

  explicit Call(const Problem& p)
      : problem(p),
        q(p.batch, p.heads, p.seqlen_q, p.head_dim, p.dtype, p.q_layout),
        k(p.batch, p.heads_kv, p.seqlen_kv, p.head_dim, p.dtype, p.k_layout),
        v(p.batch, p.heads_kv, p.seqlen_kv, p.head_dim_v, p.dtype, p.v_layout),
        o(p.batch, p.heads, p.seqlen_q, p.head_dim_v, p.dtype, p.out_layout),
        lse(p.batch, p.seqlen_q, p.heads, 1, DType::kF32, Layout::kPadded),
        grad_out(p.batch, p.heads, p.seqlen_q, p.head_dim_v, p.dtype, p.grad_out_layout),
        grad_lse(p.batch, p.heads, p.seqlen_q, 1, DType::kF32, Layout::kPadded),
        dq(p.batch, p.heads, p.seqlen_q, p.head_dim, p.dtype, p.out_layout),
        dk(p.batch, p.heads_kv, p.seqlen_kv, p.head_dim, p.dtype, p.out_layout),
        dv(p.batch, p.heads_kv, p.seqlen_kv, p.head_dim_v, p.dtype, p.out_layout) {
    std::mt19937 random(7);
    for (Tensor* tensor : {&q, &k, &v, &grad_out, &grad_lse}) tensor->fill(random);
    const std::int64_t extents[kCaptures][4] = {
        {p.heads, 1, 1, 1},     {p.seqlen_q + p.seqlen_kv + Levels::kOrigin, 1, 1, 1},
        {p.seqlen_kv, 1, 1, 1}, {p.seqlen_q, 1, 1, 1},
        {p.seqlen_q, 1, 1, 1},  {p.batch, p.heads, p.seqlen_q, p.seqlen_kv},
        {5, 1, 1, 1},           {p.heads, 1, 1, 1}};
    std::uniform_real_distribution<float> values(-1.0f, 1.0f);
    for (int n = 0; n < kCaptures; ++n) {
      dsl::CaptureView& view = views[n];
      view = {.data = nullptr, .dtype = DType::kF32, .rank = n == Levels::kBias ? 4 : 1};
      std::int64_t size = 1;
      for (int d = view.rank - 1; d >= 0; --d) {
        view.extent[d] = std::max<std::int64_t>(extents[n][d], 1);
        view.stride[d] = size;
        size *= view.extent[d];
      }
      captured[n].resize(static_cast<std::size_t>(size));
      for (float& x : captured[n]) x = values(random);
      view.data = captured[n].data();
      captured_gradient[n].assign(static_cast<std::size_t>(2 * size), kNaN);  // every other element
    }
  }

  double captured_at(int n, std::int64_t i) const {
    return static_cast<double>(captured[n][static_cast<std::size_t>(i)]);
  }
  // The modified score, and the derivative by the score.
  double modified(double s, std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j, double* factor) const {
    *factor = 1.0;
    if (!problem.levels) return s;
    if (i - j < -3) return -kInf;
    *factor = captured_at(Levels::kHead, h) + captured_at(Levels::kRows, i);
    return s * *factor + captured_at(Levels::kTable, i - j + Levels::kOrigin) + captured_at(Levels::kKeys, j) +
           captured_at(Levels::kShift, i) + captured_at(Levels::kBias, element(b, h, i, j)) +
           captured_at(Levels::kSpread, i * j % 5) + captured_at(Levels::kOffset, h);
  }
  std::int64_t element(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    return ((b * problem.heads + h) * problem.seqlen_q + i) * problem.seqlen_kv + j;
  }
  double score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    const std::int64_t h_kv = h / (problem.heads / problem.heads_kv);
    double dot = 0.0;
    for (std::int64_t d = 0; d < problem.head_dim; ++d) {
      dot += static_cast<double>(q.get(b, h, i, d)) * static_cast<double>(k.get(b, h_kv, j, d));
    }
    return static_cast<double>(problem.scale) * dot;
  }

  // o and lse as a forward leaves them.
  void run_forward() {
    const Problem& p = problem;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        for (std::int64_t i = 0; i < p.seqlen_q; ++i) {
          std::vector<double> m;
          m.reserve(static_cast<std::size_t>(p.seqlen_kv));
          double factor, maximum = -kInf, sum = 0.0;
          for (std::int64_t j = 0; j < p.seqlen_kv; ++j) m.push_back(modified(score(b, h, i, j), b, h, i, j, &factor));
          for (double x : m) maximum = std::max(maximum, x);
          const bool none = maximum == -kInf;
          for (double& x : m) sum += x = none ? 0.0 : std::exp(x - maximum);
          lse.set(b, i, h, 0, static_cast<float>(none ? -kInf : maximum + std::log(sum)));
          for (std::int64_t d = 0; d < p.head_dim_v; ++d) {
            double value = 0.0;
            for (std::int64_t j = 0; j < p.seqlen_kv && !none; ++j) {
              value += m[static_cast<std::size_t>(j)] / sum *
                       static_cast<double>(v.get(b, h / (p.heads / p.heads_kv), j, d));
            }
            o.set(b, h, i, d, static_cast<float>(value));
          }
        }
      }
    }
  }

  static RowView rows(const Tensor& t, int head, int row) {
    return {.data = static_cast<float*>(t.view().data),
            .stride = {t.view().stride[0], t.view().stride[head], t.view().stride[row]}};
  }
  ForwardCall forward() const {
    return {.q = q.view(),
            .k = k.view(),
            .v = v.view(),
            .o = o.view(),
            .lse = rows(lse, 2, 1),
            .scale = problem.scale,
            .captures = views,
            .num_captures = problem.levels ? kCaptures : 0u};
  }
  std::uint32_t captures_wanted() const { return problem.levels ? problem.wanted.captures : 0u; }
  Gradients gradients() {
    Gradients all{.grad_out = grad_out.view()};
    if (problem.grad_lse) all.grad_lse = rows(grad_lse, 1, 2);
    if (problem.wanted.dq) all.dq = dq.view();
    if (problem.wanted.dk) all.dk = dk.view();
    if (problem.wanted.dv) all.dv = dv.view();
    for (int n = 0; n < kCaptures; ++n) {
      if ((captures_wanted() >> n & 1) == 0) continue;
      all.captures[n].data = captured_gradient[n].data();
      for (int d = 0; d < views[n].rank; ++d) all.captures[n].stride[d] = 2 * views[n].stride[d];
    }
    return all;
  }
};

class CudaMathBackward : public testing::Test {
 protected:
  const CudaStream kStream = fake_pointer(0x5700);

  void SetUp() override {
    cuda_ = test::fake_cuda(ATTNJIT_FAKE_CUDA);
    fake_ = test::fake_cublas(ATTNJIT_FAKE_CUBLAS);
    ASSERT_NE(cuda_, nullptr);
    ASSERT_NE(fake_, nullptr);
    cuda_->reset();
    fake_->products = 0;
    auto device = CudaDevice::get(0, ATTNJIT_FAKE_CUDA);
    ASSERT_TRUE(device);
    device_ = *device;
    auto cublas = Cublas::get(device_, ATTNJIT_FAKE_CUBLAS);
    ASSERT_TRUE(cublas) << cublas.failure().message;
    cublas_ = *cublas;
  }
  void TearDown() override {
    cublas_ = nullptr;
    device_ = nullptr;
    EXPECT_EQ(fake_->handles, 0);
  }

  CudaMathBackwardPlan plan_of(const Call& call, int* copies = nullptr) {
    const Problem& p = call.problem;
    const auto pick = [&](auto f32, auto f16, auto bf16) {
      return host_kernel(p.dtype == DType::kF32 ? f32 : p.dtype == DType::kF16 ? f16 : bf16);
    };
    copy_ = pick(backward_f32::attnjit_math_copy_backward_f32, backward_f16::attnjit_math_copy_backward_f16,
                 backward_bf16::attnjit_math_copy_backward_bf16);
    WantedGradients wanted = p.wanted;
    wanted.captures = call.captures_wanted();
    // Of these only what decides where sums are exact.
    const std::vector<compiler::SinkFacts> sinks = {{.capture = Levels::kBias, .injective = true}};
    CudaGradientSums sums(call.forward(), wanted.captures, sinks, p.deterministic);
    sums.use(device_, host_kernel(finish_gradient));
    return CudaMathBackwardPlan(
        call.forward(), wanted,
        {.device = device_,
         .mod = host_kernel(!p.levels         ? backward_noop::attnjit_math_mod_backward_noop
                            : p.deterministic ? backward_deterministic::attnjit_math_mod_backward_deterministic
                                              : backward_levels::attnjit_math_mod_backward_levels),
         .delta = pick(backward_f32::attnjit_math_delta_backward_f32, backward_f16::attnjit_math_delta_backward_f16,
                       backward_bf16::attnjit_math_delta_backward_bf16),
         .copy = copy_,
         .cublas = cublas_,
         .arch = 80,
         .sums = std::move(sums)});
  }

  // Runs on a workspace of NaN.
  void run(Call& call) {
    EXPECT_EQ(CudaProducts::refuse(call.forward()), "");
    const CudaMathBackwardPlan plan = plan_of(call);
    constexpr std::size_t kAlignment = Cublas::kWorkspaceAlignment;
    std::vector<char> memory(plan.workspace_size() + 2 * kAlignment, '\xff');
    char* const workspace = memory.data() + (kAlignment - reinterpret_cast<std::uintptr_t>(memory.data()) % kAlignment);
    const Check failure = plan.run(call.forward(), call.gradients(), workspace, kStream);
    EXPECT_EQ(message_of(failure), "");
    EXPECT_TRUE(std::all_of(workspace + plan.workspace_size(), memory.data() + memory.size(),
                            [](char byte) { return byte == '\xff'; }));
    description_ = plan.describe();
  }

  struct Sum {
    double value = 0.0, mass = 0.0;
    void add(double x, double size) {
      value += x;
      mass += std::fabs(size);
    }
  };

  // Against double precision. The complaint, empty when all is well.
  std::string judge(const Call& call) {
    const Problem& p = call.problem;
    std::vector<Sum> dq(static_cast<std::size_t>(p.batch * p.heads * p.seqlen_q * p.head_dim));
    std::vector<Sum> dk(static_cast<std::size_t>(p.batch * p.heads_kv * p.seqlen_kv * p.head_dim));
    std::vector<Sum> dv(static_cast<std::size_t>(p.batch * p.heads_kv * p.seqlen_kv * p.head_dim_v));
    std::vector<Sum> captured[kCaptures];
    for (int n = 0; n < kCaptures; ++n) captured[n].resize(call.captured[n].size());
    const double scale = static_cast<double>(p.scale);
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        const std::int64_t h_kv = h / (p.heads / p.heads_kv);
        for (std::int64_t i = 0; i < p.seqlen_q; ++i) {
          const double lse = static_cast<double>(call.lse.get(b, i, h, 0));
          if (lse == -kInf) continue;
          const double grad_lse = p.grad_lse ? static_cast<double>(call.grad_lse.get(b, h, i, 0)) : 0.0;
          Sum delta;
          delta.add(-grad_lse, grad_lse);
          for (std::int64_t d = 0; d < p.head_dim_v; ++d) {
            const double x =
                static_cast<double>(call.o.get(b, h, i, d)) * static_cast<double>(call.grad_out.get(b, h, i, d));
            delta.add(x, x);
          }
          // Softmax does not see what moves a row.
          const auto add = [&](int n, std::int64_t at, double x, double size) {
            captured[n][static_cast<std::size_t>(at)].add(x, size);
          };
          add(Levels::kShift, i, grad_lse, grad_lse);
          add(Levels::kOffset, h, grad_lse, grad_lse);
          for (std::int64_t j = 0; j < p.seqlen_kv; ++j) {
            double factor = 1.0;
            const double s = call.score(b, h, i, j);
            const double m = call.modified(s, b, h, i, j, &factor);
            if (m == -kInf) continue;
            const double probability = std::exp(m - lse);
            Sum dp;
            for (std::int64_t d = 0; d < p.head_dim_v; ++d) {
              const double go = static_cast<double>(call.grad_out.get(b, h, i, d));
              const double x = go * static_cast<double>(call.v.get(b, h_kv, j, d));
              dp.add(x, x);
              const auto at = ((b * p.heads_kv + h_kv) * p.seqlen_kv + j) * p.head_dim_v + d;
              dv[static_cast<std::size_t>(at)].add(probability * go, probability * go);
            }
            const double dm = probability * (dp.value - delta.value);
            const double size = probability * (dp.mass + delta.mass) * (1.0 + std::fabs(m));
            for (std::int64_t d = 0; d < p.head_dim; ++d) {
              const double x = scale * static_cast<double>(call.q.get(b, h, i, d));
              const double y = scale * static_cast<double>(call.k.get(b, h_kv, j, d));
              const auto at_q = ((b * p.heads + h) * p.seqlen_q + i) * p.head_dim + d;
              const auto at_k = ((b * p.heads_kv + h_kv) * p.seqlen_kv + j) * p.head_dim + d;
              dq[static_cast<std::size_t>(at_q)].add(dm * factor * y, size * factor * y);
              dk[static_cast<std::size_t>(at_k)].add(dm * factor * x, size * factor * x);
            }
            if (!p.levels) continue;
            add(Levels::kHead, h, dm * s, size * s);
            add(Levels::kTable, i - j + Levels::kOrigin, dm, size);
            add(Levels::kKeys, j, dm, size);
            add(Levels::kRows, i, dm * s, size * s);
            add(Levels::kBias, call.element(b, h, i, j), dm, size);
            add(Levels::kSpread, i * j % 5, dm, size);
          }
        }
      }
    }
    const double unit = p.dtype == DType::kF32 ? 0x1p-24 : p.dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
    std::string complaint;
    const auto expect = [&](const char* what, std::size_t at, bool wanted, double got, const Sum& gold, double units) {
      const double allowed = (2 * units + 64 * 0x1p-24) * gold.mass + (units > 0x1p-24 ? 0x1p-14 : 0x1p-100);
      const bool right = wanted ? std::fabs(got - gold.value) <= allowed : std::isnan(got);
      if (!right && complaint.empty()) {
        complaint = std::string(what) + " " + std::to_string(at) + " is " + std::to_string(got) + ", expected " +
                    std::to_string(gold.value) + " +- " + std::to_string(allowed);
      }
    };
    const auto expect_all = [&](const char* what, bool wanted, const Tensor& got, const std::vector<Sum>& gold) {
      std::size_t at = 0;
      got.each([&](auto... index) {
        expect(what, at, wanted, static_cast<double>(got.get(index...)), gold[at], unit);
        ++at;
      });
      if (!got.untouched_between()) complaint = std::string("wrote between the rows of ") + what;
    };
    expect_all("dq", p.wanted.dq, call.dq, dq);
    expect_all("dk", p.wanted.dk, call.dk, dk);
    expect_all("dv", p.wanted.dv, call.dv, dv);
    for (int n = 0; n < kCaptures; ++n) {
      const bool wanted = (call.captures_wanted() >> n & 1) != 0;
      for (std::size_t i = 0; i < captured[n].size(); ++i) {
        const std::string what = "gradient of capture " + std::to_string(n);
        expect(what.c_str(), i, wanted, static_cast<double>(call.captured_gradient[n][2 * i]), captured[n][i], 0x1p-24);
        expect(what.c_str(), i, false, static_cast<double>(call.captured_gradient[n][2 * i + 1]), {}, 0.0);
      }
    }
    return complaint;
  }

  void check(const Problem& problem) {
    for (const bool backwards : {false, true}) {
      emulation::Machine::get().backwards = backwards;
      Call call(problem);
      call.run_forward();
      run(call);
      EXPECT_EQ(judge(call), "") << description_;
    }
    emulation::Machine::get().backwards = false;
  }

  test::FakeCuda* cuda_ = nullptr;
  test::FakeCublas* fake_ = nullptr;
  std::shared_ptr<CudaDevice> device_;
  std::shared_ptr<const Cublas> cublas_;
  std::shared_ptr<const HostKernel> copy_;
  std::string description_;
};

TEST_F(CudaMathBackward, ModsAndTypes) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const bool levels : {false, true}) {
      for (const bool deterministic : {false, true}) {
        SCOPED_TRACE(std::string(dsl::dtype_name(dtype)) + (levels ? " levels" : " noop"));
        check({.dtype = dtype, .levels = levels, .deterministic = deterministic});
        EXPECT_EQ(copy_->launches, 0);
      }
    }
  }
}

// Rows within a warp, of several warps, longer than a block is wide; tails of every length.
TEST_F(CudaMathBackward, Lengths) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    for (const std::int64_t seqlen_kv : {1, 2, 3, 4, 31, 127, 130, 260, 1030, 1500}) {
      for (const std::int64_t seqlen_q : {1, 5, 9, 70}) {
        if (seqlen_q * seqlen_kv > 10000) continue;
        SCOPED_TRACE(std::to_string(seqlen_q) + " " + std::to_string(seqlen_kv));
        check({.batch = 1, .heads = 2, .seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv, .dtype = dtype, .levels = true});
      }
    }
  }
}

TEST_F(CudaMathBackward, Layouts) {
  for (const std::int64_t heads_kv : {1, 2, 4}) {
    for (const std::int64_t seqlen_q : {1, 5}) {
      const Problem problem{.heads_kv = heads_kv, .seqlen_q = seqlen_q, .dtype = DType::kBF16};
      for (const Layout layout : kInputLayouts) {
        SCOPED_TRACE("layout " + std::to_string(static_cast<int>(layout)) + " kv heads " + std::to_string(heads_kv) +
                     " q " + std::to_string(seqlen_q));
        Problem p = problem;
        p.q_layout = layout;
        check(p);
        p = problem;
        p.grad_out_layout = layout;
        check(p);
        p = problem;
        p.q_layout = p.k_layout = p.v_layout = p.grad_out_layout = layout;
        check(p);
      }
      for (const Layout layout : kOutputLayouts) {
        SCOPED_TRACE("output layout " + std::to_string(static_cast<int>(layout)));
        Problem p = problem;
        p.out_layout = layout;
        check(p);
      }
    }
  }
}

// The heads of a group are one product, so that no sum is rounded to 16 bits on the way.
TEST_F(CudaMathBackward, GroupsAreOneProduct) {
  Problem problem{.batch = 1, .heads = 8, .heads_kv = 1, .dtype = DType::kBF16};
  fake_->products = 0;
  check(problem);
  EXPECT_EQ(fake_->products, 2 * 5);
  problem.q_layout = problem.grad_out_layout = Layout::kHeadsInside;
  fake_->products = 0;
  check(problem);
  EXPECT_EQ(copy_->launches, 2);
}

TEST_F(CudaMathBackward, EachGradientIsOptional) {
  for (const WantedGradients& wanted : std::vector<WantedGradients>{{.dq = true},
                                                                    {.dk = true},
                                                                    {.dv = true},
                                                                    {.captures = 1},
                                                                    {.captures = 0xff},
                                                                    {.dq = true, .dv = true, .captures = 6}}) {
    Problem problem{.levels = true, .wanted = wanted};
    if (wanted.captures != 0xff) problem.levels = false;
    check(problem);
  }
  Call call({.wanted = {.dv = true}});
  EXPECT_THAT(plan_of(call).describe(), testing::Not(HasSubstr("grad_out v^T")));
}

TEST_F(CudaMathBackward, WithoutAGradientOfLse) {
  Problem problem{.levels = true, .grad_lse = false};
  check(problem);
  Call call(problem);
  call.run_forward();
  run(call);
  for (const int n : {Levels::kShift, Levels::kOffset}) {
    for (std::size_t i = 0; i < call.captured[n].size(); ++i) EXPECT_EQ(call.captured_gradient[n][2 * i], 0.0f);
  }
}

TEST_F(CudaMathBackward, Scales) {
  for (const float scale : {0.25f, -1.5f, 0.0f}) check({.scale = scale, .levels = true});
}

// Rows 12 and on of a batch's keys are masked for the first rows; some have none left.
TEST_F(CudaMathBackward, RowsWithoutAKeptElement) {
  // kept where q_idx >= kv_idx - 3, so that every row has its first keys: those are taken away by -inf in lse.
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    Call call({.dtype = dtype, .levels = true});
    call.run_forward();
    call.lse.set(1, 4, 2, 0, static_cast<float>(-kInf));
    for (std::int64_t d = 0; d < 8; ++d) call.o.set(1, 2, 4, d, kNaN);
    call.grad_lse.set(1, 2, 4, 0, kNaN);
    run(call);
    EXPECT_EQ(judge(call), "");
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(call.dq.get(1, 2, 4, d), 0.0f);
  }
}

TEST_F(CudaMathBackward, NothingToAttend) {
  for (const auto& [batch, seqlen_q, seqlen_kv] :
       std::vector<std::array<std::int64_t, 3>>{{2, 7, 0}, {2, 0, 21}, {0, 7, 21}}) {
    for (const Layout layout : kOutputLayouts) {
      check({.batch = batch, .seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv, .dtype = DType::kF16, .out_layout = layout});
      check({.batch = batch, .seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv, .levels = true, .deterministic = true});
    }
  }
}

// Whatever order blocks and threads come in.
TEST_F(CudaMathBackward, DeterministicSums) {
  const auto gradients = [&](bool backwards) {
    emulation::Machine::get().backwards = backwards;
    Call call({.seqlen_q = 33, .seqlen_kv = 150, .levels = true, .deterministic = true});
    call.run_forward();
    run(call);
    emulation::Machine::get().backwards = false;
    std::vector<float> all;
    for (const std::vector<float>& gradient : call.captured_gradient) {
      for (std::size_t i = 0; i < gradient.size(); i += 2) all.push_back(gradient[i]);
    }
    return all;
  };
  EXPECT_EQ(gradients(false), gradients(true));
}

TEST_F(CudaMathBackward, JudgeRejectsWrongResults) {
  const auto spoiled = [&](auto spoil) {
    Call call({.levels = true});
    call.run_forward();
    run(call);
    EXPECT_EQ(judge(call), "");
    spoil(call);
    return judge(call);
  };
  EXPECT_NE(spoiled([](Call& c) { c.dq.set(1, 2, 3, 4, c.dq.get(1, 2, 3, 4) * 1.005f); }), "");
  EXPECT_NE(spoiled([](Call& c) { c.dk.set(1, 1, 3, 4, c.dk.get(1, 1, 3, 4) * 0.995f); }), "");
  EXPECT_NE(spoiled([](Call& c) { c.dv.set(0, 0, 9, 7, 0.0f); }), "");
  EXPECT_NE(spoiled([](Call& c) { c.captured_gradient[Levels::kTable][2 * Levels::kOrigin] *= 1.005f; }), "");
  EXPECT_NE(spoiled([](Call& c) { c.captured_gradient[Levels::kShift][4] = 0.0f; }), "");
}

TEST_F(CudaMathBackward, FailuresAreTheCalls) {
  Call call({});
  call.run_forward();
  const CudaMathBackwardPlan plan = plan_of(call);
  std::vector<char> memory(plan.workspace_size() + 256);
  char* const workspace = memory.data() + (256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256);
  fake_->gemm_status = 13;
  const Check failed = plan.run(call.forward(), call.gradients(), workspace, kStream);
  fake_->gemm_status = 0;
  EXPECT_EQ(failed.value_or(Failure{}).status, ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(message_of(failed), HasSubstr("cublasGemmStridedBatchedEx"));
}

}  // namespace
}  // namespace attnjit::runtime
