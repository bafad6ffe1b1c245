// The eager path for GPUs without one: its kernels run on the host, thread by thread, and its products in a fake cuBLAS
// on host memory, so that results are compared with a plain loop in double precision.
#include "runtime/cuda_math_backend.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numbers>
#include <random>
#include <thread>
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
#include "kernels_templates/cuda/mod_defaults.cuh"

namespace attnjit::cuda {

struct Noop : ModDefaults {};

struct Causal : ModDefaults {
  static constexpr bool kHasMask = true;
  struct Row {
    int q;
  };
  struct Column {
    int kv;
  };
  template <typename B>
  static Row row(const CapturedView* captured, const B& block, int q_idx) {
    return {q_idx};
  }
  template <typename B>
  static Column column(const CapturedView* captured, const B& block, int kv_idx) {
    return {kv_idx};
  }
  template <typename B, typename D>
  static bool keep(const CapturedView* captured, float s, const B& block, const Row& row, const Column& column,
                   const D& diagonal) {
    return row.q >= column.kv;
  }
};

struct Rel : ModDefaults {
  struct Diagonal {
    float bias;
  };
  template <typename B>
  static Diagonal diagonal(const CapturedView* captured, const B& block, int q_minus_kv, float q_minus_kv_float) {
    return {1.44269504f * static_cast<float>(q_minus_kv)};
  }
  template <typename B, typename R, typename C>
  static float score(const CapturedView* captured, float s, const B& block, const R& row, const C& column,
                     const Diagonal& diagonal) {
    return s + diagonal.bias;
  }
};

// score + bias[b, h, kv_idx] + scalar, f32. It takes plain scaled scores.
struct Bias : ModDefaults {
  static constexpr bool kScoresInLog2 = false;
  struct Block {
    const float* bias;
    float scalar;
  };
  struct Column {
    float bias;
  };
  static Block block(const CapturedView* captured, int b, int h) {
    float scalar;
    EXPECT_EQ(captured[1].data, nullptr);
    std::memcpy(&scalar, &captured[1].value, sizeof scalar);
    return {static_cast<const float*>(captured[0].data) + b * captured[0].stride[0] + h * captured[0].stride[1],
            scalar};
  }
  static Column column(const CapturedView* captured, const Block& block, int kv_idx) {
    // What the compiler proves of an index holds for keys that there are.
    if (kv_idx < 0 || kv_idx >= captured[0].extent[2]) throw std::logic_error("a captured tensor read out of bounds");
    return {block.bias[kv_idx * captured[0].stride[2]]};
  }
  template <typename R, typename D>
  static float score(const CapturedView* captured, float s, const Block& block, const R& row, const Column& column,
                     const D& diagonal) {
    return 1.44269504f * (s + column.bias + block.scalar);
  }
};

}  // namespace attnjit::cuda

namespace attnjit::mod_noop {
using namespace math;
using namespace emulation;
}  // namespace attnjit::mod_noop
namespace attnjit::mod_causal {
using namespace math;
using namespace emulation;
}  // namespace attnjit::mod_causal
namespace attnjit::mod_rel {
using namespace math;
using namespace emulation;
}  // namespace attnjit::mod_rel
namespace attnjit::mod_bias {
using namespace math;
using namespace emulation;
}  // namespace attnjit::mod_bias
namespace attnjit::kernels_f32 {
using namespace math;
using namespace emulation;
constexpr Config kConfig{.element = Element::kF32};
[[maybe_unused]] float widen(unsigned short) { return 0; }
}  // namespace attnjit::kernels_f32
namespace attnjit::kernels_f16 {
using namespace math;
using namespace emulation;
constexpr Config kConfig{.element = Element::kF16};
float widen(unsigned short bits) { return test::from_f16(bits); }
}  // namespace attnjit::kernels_f16
namespace attnjit::kernels_bf16 {
using namespace math;
using namespace emulation;
constexpr Config kConfig{.element = Element::kBF16};
float widen(unsigned short bits) { return test::from_bf16(bits); }
}  // namespace attnjit::kernels_bf16

#define math mod_noop
#define Mod Noop
#define attnjit_math_mod attnjit_math_mod_noop
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod

#define math mod_causal
#define Mod Causal
#define attnjit_math_mod attnjit_math_mod_causal
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod

#define math mod_rel
#define Mod Rel
#define attnjit_math_mod attnjit_math_mod_rel
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod

#define math mod_bias
#define Mod Bias
#define attnjit_math_mod attnjit_math_mod_bias
#include "kernels_templates/math/common.cuh"
#include "kernels_templates/math/mod.cuh"
#undef math
#undef Mod
#undef attnjit_math_mod

#define math kernels_f32
#define ATTNJIT_SUFFIX f32
#include "tests/unit/cuda_math_kernels.inc"

#define math kernels_f16
#define ATTNJIT_SUFFIX f16
#include "tests/unit/cuda_math_kernels.inc"

#define math kernels_bf16
#define ATTNJIT_SUFFIX bf16
#include "tests/unit/cuda_math_kernels.inc"

#pragma GCC diagnostic pop

namespace attnjit::runtime {
namespace {

using namespace cuda_testing;

using testing::HasSubstr;

Entry<math::SoftmaxParams> softmax_kernel(DType dtype, std::int64_t seqlen_kv) {
  const std::string_view name = CudaMathPlan::softmax_entry(seqlen_kv);
  const auto pick = [&](auto f32, auto f16, auto bf16) {
    return dtype == DType::kF32 ? f32 : dtype == DType::kF16 ? f16 : bf16;
  };
  if (name == "attnjit_math_softmax_warp2") {
    return pick(kernels_f32::attnjit_math_softmax_warp2_f32, kernels_f16::attnjit_math_softmax_warp2_f16,
                kernels_bf16::attnjit_math_softmax_warp2_bf16);
  }
  if (name == "attnjit_math_softmax_warp8") {
    return pick(kernels_f32::attnjit_math_softmax_warp8_f32, kernels_f16::attnjit_math_softmax_warp8_f16,
                kernels_bf16::attnjit_math_softmax_warp8_bf16);
  }
  if (name == "attnjit_math_softmax_block") {
    return pick(kernels_f32::attnjit_math_softmax_block_f32, kernels_f16::attnjit_math_softmax_block_f16,
                kernels_bf16::attnjit_math_softmax_block_bf16);
  }
  EXPECT_EQ(name, "attnjit_math_softmax_long");
  return pick(kernels_f32::attnjit_math_softmax_long_f32, kernels_f16::attnjit_math_softmax_long_f16,
              kernels_bf16::attnjit_math_softmax_long_bf16);
}

// ---- Mods

struct Element {
  double score;
  std::int64_t b, h, q, kv;
};

struct HostMod {
  const char* name;
  Entry<math::ModParams> kernel;
  double score_factor;
  bool identity;
  std::function<double(const Element&)> value;  // -inf where dropped
};

struct Captures {
  std::vector<float> bias;  // (B, Hq, Skv)
  float scalar = 0.5f;
};

std::vector<HostMod> mods(const Captures& captures, std::int64_t heads, std::int64_t seqlen_kv) {
  return {
      {"noop", mod_noop::attnjit_math_mod_noop, std::numbers::log2e, true, [](const Element& e) { return e.score; }},
      {"causal", mod_causal::attnjit_math_mod_causal, std::numbers::log2e, false,
       [](const Element& e) { return e.q >= e.kv ? e.score : -kInf; }},
      {"rel", mod_rel::attnjit_math_mod_rel, std::numbers::log2e, false,
       [](const Element& e) { return e.score + static_cast<double>(e.q - e.kv); }},
      {"bias", mod_bias::attnjit_math_mod_bias, 1.0, false, [&captures, heads, seqlen_kv](const Element& e) {
         const auto at = static_cast<std::size_t>((e.b * heads + e.h) * seqlen_kv + e.kv);
         return e.score + captures.bias[at] + captures.scalar;
       }}};
}

// ---- One call

struct Problem {
  std::int64_t batch = 2, heads = 4, heads_kv = 2, seqlen_q = 7, seqlen_kv = 21, head_dim = 16, head_dim_v = 8;
  DType dtype = DType::kF32;
  Layout q_layout = Layout::kPacked, k_layout = Layout::kPacked, v_layout = Layout::kPacked, o_layout = Layout::kPacked;
  float scale = 0.5f;
  std::string mod = "noop";
};

class CudaMathBackend : public testing::Test {
 protected:
  const CudaStream kStream = fake_pointer(0x5700);

  void SetUp() override {
    cuda_ = test::fake_cuda(ATTNJIT_FAKE_CUDA);
    fake_ = test::fake_cublas(ATTNJIT_FAKE_CUBLAS);
    ASSERT_NE(cuda_, nullptr);
    ASSERT_NE(fake_, nullptr);
    cuda_->reset();
    ASSERT_EQ(fake_->handles, 0);
    fake_->products = 0;
    fake_->on_product = [this](const test::FakeCublas::Product& product) {
      EXPECT_EQ(product.stream, kStream);
      EXPECT_EQ(product.math_mode, 16);  // no sums in 16 bits
      EXPECT_EQ(test::fake_cuda_current(ATTNJIT_FAKE_CUDA), 1);
      EXPECT_GE(product.workspace, workspace_);
      EXPECT_LE(static_cast<char*>(product.workspace) + product.workspace_size, workspace_ + workspace_size_);
    };
    auto device = CudaDevice::get(0, ATTNJIT_FAKE_CUDA);
    ASSERT_TRUE(device);
    auto cublas = Cublas::get(*device, ATTNJIT_FAKE_CUBLAS);
    ASSERT_TRUE(cublas) << cublas.failure().message;
    cublas_ = *cublas;
  }
  void TearDown() override {
    cublas_ = nullptr;
    EXPECT_EQ(fake_->handles, 0);
    EXPECT_EQ(cuda_->contexts_retained, cuda_->contexts_released);
    fake_->on_product = nullptr;
  }

  // Tensors of one call; a test may change them before it runs.
  struct Call {
    Problem problem;
    Tensor q, k, v, o, lse, row_max;
    Captures captures;
    dsl::CaptureView views[2];

    explicit Call(const Problem& p)
        : problem(p),
          q(p.batch, p.heads, p.seqlen_q, p.head_dim, p.dtype, p.q_layout),
          k(p.batch, p.heads_kv, p.seqlen_kv, p.head_dim, p.dtype, p.k_layout),
          v(p.batch, p.heads_kv, p.seqlen_kv, p.head_dim_v, p.dtype, p.v_layout),
          o(p.batch, p.heads, p.seqlen_q, p.head_dim_v, p.dtype, p.o_layout),
          // Rows apart from each other, and heads inside of them.
          lse(p.batch, p.seqlen_q, p.heads, 1, DType::kF32, Layout::kPadded),
          row_max(p.batch, p.heads, p.seqlen_q, 1, DType::kF32, Layout::kPacked) {
      std::mt19937 random(7);
      q.fill(random);
      k.fill(random, 3.0f);
      v.fill(random);
      std::uniform_real_distribution<float> values(-2.0f, 2.0f);
      captures.bias.resize(static_cast<std::size_t>(p.batch * p.heads * p.seqlen_kv));
      for (float& x : captures.bias) x = values(random);
      views[0] = {.data = captures.bias.data(),
                  .dtype = DType::kF32,
                  .rank = 3,
                  .extent = {p.batch, p.heads, p.seqlen_kv},
                  .stride = {p.heads * p.seqlen_kv, p.seqlen_kv, 1}};
      views[1] = {.data = &captures.scalar, .dtype = DType::kF32, .rank = 0};
    }
    ForwardCall forward() const {
      const auto rows = [](const Tensor& t, int head, int row) {
        return RowView{.data = static_cast<float*>(t.view().data),
                       .stride = {t.view().stride[0], t.view().stride[head], t.view().stride[row]}};
      };
      return {.q = q.view(),
              .k = k.view(),
              .v = v.view(),
              .o = o.view(),
              .lse = rows(lse, 2, 1),
              .row_max = rows(row_max, 1, 2),
              .scale = problem.scale,
              .captures = views,
              .num_captures = problem.mod == "bias" ? 2u : 0u,
              .host_scalars = problem.mod == "bias" ? 2u : 0u};
    }
    HostMod mod() const {
      const auto all = mods(captures, problem.heads, problem.seqlen_kv);
      return *std::find_if(all.begin(), all.end(), [&](const HostMod& m) { return m.name == problem.mod; });
    }
  };

  struct Launches {
    int mod = 0, copy = 0;
  };

  // Runs on a workspace of NaN.
  Launches run(Call& call) {
    const HostMod mod = call.mod();
    const auto kernel = [&](auto f32, auto f16, auto bf16) {
      return host_kernel(call.problem.dtype == DType::kF32 ? f32 : call.problem.dtype == DType::kF16 ? f16 : bf16);
    };
    const auto mod_kernel = host_kernel(mod.kernel);
    const auto copy = kernel(kernels_f32::attnjit_math_copy_f32, kernels_f16::attnjit_math_copy_f16,
                             kernels_bf16::attnjit_math_copy_bf16);
    const ForwardCall forward = call.forward();
    EXPECT_EQ(CudaMathPlan::refuse(forward), "");
    const CudaMathPlan plan(
        forward, {.mod = mod_kernel,
                  .softmax = host_kernel(softmax_kernel(call.problem.dtype, call.problem.seqlen_kv)),
                  .zero_rows = kernel(kernels_f32::attnjit_math_zero_rows_f32, kernels_f16::attnjit_math_zero_rows_f16,
                                      kernels_bf16::attnjit_math_zero_rows_bf16),
                  .copy = copy,
                  .cublas = cublas_,
                  .arch = 80,
                  .score_factor = mod.score_factor,
                  .mod_is_identity = mod.identity});
    constexpr std::size_t kAlignment = Cublas::kWorkspaceAlignment;
    workspace_size_ = plan.workspace_size();
    std::vector<char> memory(workspace_size_ + 2 * kAlignment, '\xff');
    workspace_ = memory.data() + (kAlignment - reinterpret_cast<std::uintptr_t>(memory.data()) % kAlignment);
    const Check failure = plan.run(forward, workspace_, kStream);
    EXPECT_EQ(message_of(failure), "");
    EXPECT_TRUE(std::all_of(workspace_ + workspace_size_, memory.data() + memory.size(),
                            [](char byte) { return byte == '\xff'; }));
    return {.mod = mod_kernel->launches, .copy = copy->launches};
  }

  // Against double precision.
  void expect_right(const Call& call) {
    const Problem& p = call.problem;
    const HostMod mod = call.mod();
    const double unit = p.dtype == DType::kF32 ? 0x1p-24 : p.dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
    std::vector<double> m(static_cast<std::size_t>(p.seqlen_kv));
    double worst = 0.0;
    for (std::int64_t b = 0; b < p.batch; ++b) {
      for (std::int64_t h = 0; h < p.heads; ++h) {
        const std::int64_t hkv = h / (p.heads / p.heads_kv);
        for (std::int64_t q = 0; q < p.seqlen_q; ++q) {
          double maximum = -kInf, sum = 0.0;
          bool nan = false;
          for (std::int64_t kv = 0; kv < p.seqlen_kv; ++kv) {
            double dot = 0.0;
            for (std::int64_t d = 0; d < p.head_dim; ++d) {
              dot += static_cast<double>(call.q.get(b, h, q, d)) * static_cast<double>(call.k.get(b, hkv, kv, d));
            }
            const double value = mod.value({static_cast<double>(p.scale) * dot, b, h, q, kv});
            m[static_cast<std::size_t>(kv)] = value;
            nan = nan || value != value || value == kInf;
            maximum = std::fmax(maximum, value);
          }
          const bool empty = maximum == -kInf && !nan;
          for (const double value : m) sum += empty ? 0.0 : std::exp(value - maximum);
          const std::string where = "b=" + std::to_string(b) + " h=" + std::to_string(h) + " q=" + std::to_string(q);
          const auto expect = [&](double actual, double gold, double allowed) {
            if (std::isnan(gold) || std::isinf(gold)) {
              ASSERT_EQ(std::isnan(actual), std::isnan(gold)) << where << " " << actual;
              if (std::isinf(gold)) {
                ASSERT_EQ(actual, gold) << where;
              }
            } else {
              ASSERT_NEAR(actual, gold, allowed) << where;
            }
          };
          const double far = 1e-5 * (1.0 + std::fabs(maximum));
          expect(call.lse.get(b, q, h, 0), nan ? kNaN : empty ? -kInf : maximum + std::log(sum), far);
          expect(call.row_max.get(b, h, q, 0), nan && maximum != kInf ? kNaN : maximum, far);
          for (std::int64_t d = 0; d < p.head_dim_v; ++d) {
            double gold = 0.0, mass = 0.0;
            for (std::int64_t kv = 0; kv < p.seqlen_kv && !empty; ++kv) {
              const double weight = std::exp(m[static_cast<std::size_t>(kv)] - maximum) / sum;
              if (weight == 0.0) continue;
              gold += weight * static_cast<double>(call.v.get(b, hkv, kv, d));
              mass += std::fabs(weight * static_cast<double>(call.v.get(b, hkv, kv, d)));
            }
            const double allowed = (2 * unit + 64 * 0x1p-24) * (mass + 0x1p-14);
            expect(call.o.get(b, h, q, d), nan ? kNaN : gold, allowed);
            worst = std::max(worst, std::fabs(static_cast<double>(call.o.get(b, h, q, d)) - gold) / allowed);
          }
        }
      }
    }
    EXPECT_LT(worst, 1.0);
    EXPECT_TRUE(call.o.untouched_between());
    EXPECT_TRUE(call.lse.untouched_between());
    EXPECT_TRUE(call.row_max.untouched_between());
  }

  Launches check(const Problem& problem) {
    Call call(problem);
    const Launches launches = run(call);
    expect_right(call);
    return launches;
  }

  test::FakeCuda* cuda_ = nullptr;
  test::FakeCublas* fake_ = nullptr;
  std::shared_ptr<const Cublas> cublas_;
  char* workspace_ = nullptr;
  std::size_t workspace_size_ = 0;
};

TEST_F(CudaMathBackend, ModsAndTypes) {
  for (const DType dtype : {DType::kF32, DType::kF16, DType::kBF16}) {
    for (const char* mod : {"noop", "causal", "rel", "bias"}) {
      SCOPED_TRACE(std::string(mod) + " " + std::string(dsl::dtype_name(dtype)));
      const Launches launches = check({.dtype = dtype, .mod = mod});
      EXPECT_EQ(launches.mod, std::string_view(mod) == "noop" ? 0 : 1);
      EXPECT_EQ(launches.copy, 0);
    }
  }
}

// Whatever the strides, and whether the heads of a group share keys or not.
TEST_F(CudaMathBackend, Layouts) {
  const auto each = [&](std::int64_t heads_kv, std::int64_t seqlen_q) {
    for (const Layout layout : kInputLayouts) {
      SCOPED_TRACE("layout " + std::to_string(static_cast<int>(layout)) + " kv heads " + std::to_string(heads_kv) +
                   " q " + std::to_string(seqlen_q));
      const Problem problem{.heads_kv = heads_kv, .seqlen_q = seqlen_q, .dtype = DType::kBF16, .mod = "bias"};
      Problem p = problem;
      p.q_layout = layout;
      check(p);
      p = problem;
      p.k_layout = layout;
      check(p);
      p = problem;
      p.v_layout = layout;
      check(p);
      p = problem;
      p.q_layout = p.k_layout = p.v_layout = layout;
      check(p);
    }
    for (const Layout layout : kOutputLayouts) {
      SCOPED_TRACE("output layout " + std::to_string(static_cast<int>(layout)));
      check({.heads_kv = heads_kv, .seqlen_q = seqlen_q, .dtype = DType::kF16, .o_layout = layout, .mod = "causal"});
    }
  };
  for (const std::int64_t heads_kv : {1, 2, 4}) {
    for (const std::int64_t seqlen_q : {1, 5}) each(heads_kv, seqlen_q);
  }
}

TEST_F(CudaMathBackend, Shapes) {
  for (const std::int64_t seqlen_kv : {1, 2, 3, 4, 5, 255, 256, 257, 300}) {
    for (const std::int64_t seqlen_q : {1, 5}) {
      SCOPED_TRACE(std::to_string(seqlen_q) + " x " + std::to_string(seqlen_kv));
      check({.batch = 1,
             .seqlen_q = seqlen_q,
             .seqlen_kv = seqlen_kv,
             .head_dim = 3,
             .dtype = DType::kBF16,
             .mod = "bias"});
    }
  }
  check({.batch = 1,
         .heads = 1,
         .heads_kv = 1,
         .seqlen_q = 70,
         .seqlen_kv = 70,
         .head_dim = 1,
         .head_dim_v = 1,
         .mod = "causal"});
}

TEST_F(CudaMathBackend, NoKeys) {
  for (const DType dtype : {DType::kF32, DType::kBF16}) {
    check({.seqlen_kv = 0, .dtype = dtype, .o_layout = Layout::kPadded, .mod = "causal"});
    EXPECT_EQ(fake_->products, 0);
  }
}

// Each of the softmax kernels, at its edges.
TEST_F(CudaMathBackend, LongRows) {
  for (const std::int64_t seqlen_kv : {1024, 1025, 2049, 32768, 32769, 40001}) {
    for (const DType dtype : {DType::kF32, DType::kF16}) {
      SCOPED_TRACE(seqlen_kv);
      check({.batch = 1,
             .heads = 1,
             .heads_kv = 1,
             .seqlen_q = 2,
             .seqlen_kv = seqlen_kv,
             .head_dim = 2,
             .head_dim_v = 2,
             .dtype = dtype,
             .mod = "bias"});
    }
  }
}

// Probabilities lie over scores that other threads read: no order of the threads may show.
TEST_F(CudaMathBackend, OrderOfThreads) {
  emulation::Machine::get().backwards = true;
  for (const std::int64_t seqlen_kv : {21, 1000, 5000, 40001}) {
    SCOPED_TRACE(seqlen_kv);
    check({.batch = 1,
           .heads = 1,
           .heads_kv = 1,
           .seqlen_q = 3,
           .seqlen_kv = seqlen_kv,
           .head_dim = 2,
           .head_dim_v = 2,
           .dtype = DType::kBF16,
           .mod = "causal"});
  }
  emulation::Machine::get().backwards = false;
}

// In f16, a probability of a long row is subnormal. These, all alike, would be 100.5 of the smallest numbers: stored as
// they are, half a percent would be lost.
TEST_F(CudaMathBackend, SmallProbabilitiesInF16) {
  Call call({.batch = 1,
             .heads = 1,
             .heads_kv = 1,
             .seqlen_q = 1,
             .seqlen_kv = 166938,
             .head_dim = 1,
             .head_dim_v = 1,
             .dtype = DType::kF16,
             .scale = 0.0f});
  call.v.each([&](auto... index) { call.v.set(index..., 1.0f); });
  run(call);
  expect_right(call);
}

// The rows of a grid are fewer than heads can be: blocks take several.
TEST_F(CudaMathBackend, ModOfManyHeads) {
  constexpr unsigned kHeads = 70000;
  std::vector<float> scores(kHeads * math::kVector, 1.0f);
  math::ModParams params{};
  params.scores = scores.data();
  params.pitch = math::kVector;
  params.factor = 2.0f;
  params.num_heads = 7;
  params.seqlen_q = params.seqlen_kv = 1;
  params.heads = kHeads;
  params.kv_tiles = 1;
  params.q_idx_origin = 3;
  host_kernel(mod_rel::attnjit_math_mod_rel)->launch({.x = 1, .y = 65535}, 1, &params, nullptr);
  for (unsigned head = 0; head < kHeads; ++head) ASSERT_EQ(scores[head * math::kVector], 2.0f + 3 * 1.44269504f);
}

// A product of a packed problem is one call, with the rows of a group's heads one below the other.
TEST_F(CudaMathBackend, CallsOfOneProduct) {
  const Problem packed;
  check(packed);
  EXPECT_EQ(fake_->products, 2);
  EXPECT_EQ(fake_->last.n, 14);  // two heads of 7 rows
  EXPECT_EQ(fake_->last.batch, 4);

  fake_->products = 0;
  Problem inside = packed;
  inside.heads_kv = 4;
  inside.q_layout = inside.k_layout = inside.v_layout = inside.o_layout = Layout::kHeadsInside;
  EXPECT_EQ(check(inside).copy, 0);
  EXPECT_EQ(fake_->products, 4);  // one for each batch

  // So many that packing is cheaper.
  fake_->products = 0;
  inside.batch = inside.heads = inside.heads_kv = 20;
  EXPECT_EQ(check(inside).copy, 4);
  EXPECT_EQ(fake_->products, 2);

  // Only what is not packed is copied.
  fake_->products = 0;
  inside.k_layout = inside.v_layout = Layout::kPacked;
  EXPECT_EQ(check(inside).copy, 2);
  EXPECT_EQ(fake_->products, 2);
}

TEST_F(CudaMathBackend, RowsWithoutAKeptElement) {
  Call call({.seqlen_q = 40, .dtype = DType::kBF16, .o_layout = Layout::kPadded, .mod = "bias"});
  // Of one head, of every row: its captured values are -inf. 0 times these values of V would be NaN.
  std::fill_n(call.captures.bias.begin() + 21, 21, -std::numeric_limits<float>::infinity());
  call.v.set(0, 0, 3, 1, kNaN);
  call.v.set(0, 0, 5, 2, std::numeric_limits<float>::infinity());
  run(call);
  for (std::int64_t q = 0; q < 40; ++q) {
    for (std::int64_t d = 0; d < 8; ++d) EXPECT_EQ(call.o.get(0, 1, q, d), 0.0f);
    EXPECT_EQ(call.lse.get(0, q, 1, 0), -kInf);
    EXPECT_EQ(call.row_max.get(0, 1, q, 0), -kInf);
    EXPECT_TRUE(std::isnan(call.o.get(0, 0, q, 1)));
    EXPECT_EQ(call.o.get(0, 0, q, 2), kInf);
  }
  call.v.set(0, 0, 3, 1, 0.0f);
  call.v.set(0, 0, 5, 2, 0.0f);
  run(call);
  expect_right(call);
}

TEST_F(CudaMathBackend, NaNAndInfinity) {
  for (const std::int64_t seqlen_kv : {21, 600, 1500, 33000}) {
    SCOPED_TRACE(seqlen_kv);
    Call call({.batch = 1,
               .heads = 6,
               .heads_kv = 6,
               .seqlen_q = 1,
               .seqlen_kv = seqlen_kv,
               .head_dim = 1,
               .head_dim_v = 1,
               .mod = "bias"});
    const auto bias = [&](std::int64_t h, std::int64_t kv) -> float& {
      return call.captures.bias[static_cast<std::size_t>(h * seqlen_kv + kv)];
    };
    const float inf = std::numeric_limits<float>::infinity();
    bias(0, 3) = kNaN;
    bias(1, 4) = inf;
    bias(2, 5) = inf, bias(2, 6) = kNaN;
    for (std::int64_t kv = 0; kv < seqlen_kv; ++kv) bias(3, kv) = kv == 9 ? kNaN : -inf;
    for (std::int64_t kv = 0; kv < seqlen_kv; ++kv) bias(4, kv) = kv == 9 ? 0.0f : -inf;
    run(call);
    expect_right(call);
    EXPECT_EQ(call.row_max.get(0, 2, 0, 0), inf);
    EXPECT_TRUE(std::isnan(call.row_max.get(0, 3, 0, 0)));
  }
}

// NaN in K reaches a row of zeros, as it does in every product that reads K.
TEST_F(CudaMathBackend, ScaleOfZero) {
  for (const char* mod : {"noop", "bias"}) {
    Call call({.batch = 1, .scale = 0.0f, .mod = mod});
    EXPECT_EQ(run(call).mod, 1);
    expect_right(call);
    call.k.set(0, 1, 3, 2, kNaN);
    run(call);
    EXPECT_TRUE(std::isnan(call.o.get(0, 3, 0, 0)));
    EXPECT_FALSE(std::isnan(call.o.get(0, 0, 0, 0)));
  }
}

TEST_F(CudaMathBackend, ScaleBeyondFloatInLog2) {
  Call call({.batch = 1, .seqlen_kv = 1, .scale = -3e38f});
  call.q.each([&](auto... index) { call.q.set(index..., 0.0f); });
  run(call);
  expect_right(call);
}

// Without the outputs that are not wanted.
TEST_F(CudaMathBackend, NoRowOutputs) {
  Call call({.mod = "causal"});
  ForwardCall forward = call.forward();
  forward.lse = forward.row_max = {};
  const CudaMathPlan plan(forward, {.mod = host_kernel(mod_causal::attnjit_math_mod_causal),
                                    .softmax = host_kernel(kernels_f32::attnjit_math_softmax_warp2_f32),
                                    .zero_rows = host_kernel(kernels_f32::attnjit_math_zero_rows_f32),
                                    .copy = host_kernel(kernels_f32::attnjit_math_copy_f32),
                                    .cublas = cublas_,
                                    .arch = 80,
                                    .score_factor = std::numbers::log2e});
  workspace_size_ = plan.workspace_size();
  std::vector<char> memory(workspace_size_ + 256);
  workspace_ = memory.data() + (256 - reinterpret_cast<std::uintptr_t>(memory.data()) % 256);
  const Check failure = plan.run(forward, workspace_, kStream);
  EXPECT_EQ(message_of(failure), "");
  Call other({.mod = "causal"});
  run(other);
  call.o.each([&](auto... index) { EXPECT_EQ(call.o.get(index...), other.o.get(index...)); });

  // A failure of cuBLAS is the call's.
  fake_->gemm_status = 13;
  const Check failed = plan.run(forward, workspace_, kStream);
  fake_->gemm_status = 0;
  EXPECT_EQ(failed.value_or(Failure{}).status, ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(message_of(failed), HasSubstr("cublasGemmStridedBatchedEx"));
}

TEST_F(CudaMathBackend, Refusals) {
  const auto refuse = [](std::int64_t batch, std::int64_t heads, std::int64_t seqlen_q, std::int64_t seqlen_kv) {
    ForwardCall call;
    call.q.shape[0] = call.k.shape[0] = batch;
    call.q.shape[1] = call.k.shape[1] = heads;
    call.q.shape[2] = seqlen_q;
    call.k.shape[2] = seqlen_kv;
    return CudaMathPlan::refuse(call);
  };
  constexpr std::int64_t kMax = std::numeric_limits<std::int32_t>::max();
  EXPECT_EQ(refuse(1, 1, 131072, 131072), "");
  EXPECT_EQ(refuse(4095, 128, 1, 4096), "");
  EXPECT_THAT(refuse(kMax, kMax, kMax, kMax), HasSubstr("rows"));
  EXPECT_THAT(refuse(1, 2, kMax, 1), HasSubstr("rows"));
  EXPECT_THAT(refuse(1, 2, 1, kMax), HasSubstr("rows"));
  EXPECT_THAT(refuse(1, 1, 1, kMax), HasSubstr("addressed"));
  EXPECT_THAT(refuse(1, 1, kMax, 1 << 20), HasSubstr("addressed"));
}

// ---- cuBLAS

TEST_F(CudaMathBackend, NoCublas) {
  auto device = CudaDevice::get(0, ATTNJIT_FAKE_CUDA);
  ASSERT_TRUE(device);
  const auto missing = Cublas::get(*device, "libno_such_cublas.so.1");
  ASSERT_FALSE(missing);
  EXPECT_EQ(missing.failure().status, ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(missing.failure().message, HasSubstr("libno_such_cublas.so.1"));
  const auto wrong = Cublas::get(*device, "libm.so.6");
  ASSERT_FALSE(wrong);
  EXPECT_THAT(wrong.failure().message, HasSubstr("libm.so.6 has no cublasCreate_v2"));

  cublas_ = nullptr;
  fake_->create_status = 3;
  const auto failed = Cublas::get(*device, ATTNJIT_FAKE_CUBLAS);
  fake_->create_status = 0;
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.failure().status, ATTNJIT_OUT_OF_MEMORY);
  EXPECT_THAT(failed.failure().message, HasSubstr("cublasCreate failed on device 0"));
  // And is not kept.
  const auto later = Cublas::get(*device, ATTNJIT_FAKE_CUBLAS);
  ASSERT_TRUE(later);
  EXPECT_EQ((*later)->description(), "cuBLAS 13.1.0");
  EXPECT_EQ(*later, *Cublas::get(*device, ATTNJIT_FAKE_CUBLAS));
  EXPECT_EQ(fake_->handles, 1);
}

// A handle is one thread's at a time: a product meets its own stream and workspace.
TEST_F(CudaMathBackend, ThreadsShareAHandle) {
  int wrong = 0;
  fake_->on_product = [&](const test::FakeCublas::Product& product) {
    wrong += product.workspace != fake_pointer(reinterpret_cast<std::uintptr_t>(product.stream) << 8);
  };
  std::vector<std::thread> threads;
  for (std::uintptr_t t = 1; t <= 4; ++t) {
    threads.emplace_back([&, t] {
      float a[2] = {1.0f, 2.0f}, c = 0.0f;
      for (int i = 0; i < 200; ++i) {
        Cublas::Queue queue(*cublas_, fake_pointer(t << 8), 1, fake_pointer(t));
        const Check failure = queue.add({.transpose_b = true,
                                         .m = 1,
                                         .n = 1,
                                         .k = 2,
                                         .a = {.data = a, .stride = 2},
                                         .b = {.data = a, .stride = 2},
                                         .c = {.data = &c, .stride = 1}});
        EXPECT_EQ(message_of(failure), "");
        EXPECT_EQ(c, 5.0f);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(fake_->products, 800);
}

// Batches are cut at what a grid's short axis takes.
TEST_F(CudaMathBackend, ManyBatches) {
  fake_->on_product = nullptr;
  constexpr std::int64_t kBatch = 2 * Cublas::kMaxBatch + 3;
  std::vector<float> a(kBatch), c(kBatch);
  for (std::size_t i = 0; i < a.size(); ++i) a[i] = static_cast<float>(i % 1000);
  float b = 2.0f;
  Cublas::Queue queue(*cublas_, fake_pointer(256), 1, nullptr);
  const Check failure = queue.add({.m = 1,
                                   .n = 1,
                                   .k = 1,
                                   .batch = kBatch,
                                   .a = {.data = a.data(), .stride = 1, .batch_stride = 1},
                                   .b = {.data = &b, .stride = 1},
                                   .c = {.data = c.data(), .stride = 1, .batch_stride = 1}});
  EXPECT_EQ(message_of(failure), "");
  EXPECT_EQ(fake_->products, 3);
  for (std::size_t i = 0; i < a.size(); ++i) ASSERT_EQ(c[i], 2.0f * a[i]);
}

}  // namespace
}  // namespace attnjit::runtime
