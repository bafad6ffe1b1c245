// The fused CPU forward against a plain double-precision loop, around a scalar tile that stands for the compiled one.
#include "runtime/cpu_backend.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <limits>
#include <numbers>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "tests/unit/cpu_tensor.h"
#include "tests/unit/cpu_testing.h"

namespace attnjit::runtime {
namespace {

using test::make_tensor;
using test::Order;
using test::Tensor;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

using Mod = double (*)(double score, std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t kv,
                       const cpu::CapturedView* captured);
Mod g_mod = nullptr;  // of the calls in progress
bool g_log2 = true;
std::atomic<std::int64_t> g_largest_q = 0;  // query position that any lane had
std::atomic<std::int64_t> g_rows = 0;       // keys of all tiles

// The contract of TileParams, one element at a time.
void scalar_tile(const cpu::TileParams* p) {
  const std::int64_t last_q = p->q_idx + cpu::kPanelLanes - 1;
  std::int64_t seen = g_largest_q;
  while (seen < last_q && !g_largest_q.compare_exchange_weak(seen, last_q)) {
  }
  g_rows += p->rows;
  for (int lane = 0; lane < cpu::kPanelLanes; ++lane) {
    const auto at = [&](long long row) -> float& { return p->scores[row * cpu::kPanelLanes + lane]; };
    float max = p->row_max[lane];
    for (long long row = 0; row < p->rows; ++row) {
      const double score = g_log2 ? at(row) / std::numbers::log2e : at(row);
      at(row) = static_cast<float>(g_mod(score, p->b, p->h, p->q_idx + lane, p->kv_idx + row, p->captured) *
                                   std::numbers::log2e);
      max = std::fmax(max, at(row));
    }
    const float reference = std::isinf(max) && max < 0 ? 0.0f : max;
    const float rescale = std::exp2(p->row_max[lane] - reference);
    float sum = p->row_sum[lane] * rescale;
    for (long long row = 0; row < p->rows; ++row) sum += at(row) = std::exp2(at(row) - reference);
    p->row_max[lane] = max;
    p->row_sum[lane] = sum;
    p->rescale[lane] = rescale;
  }
}

class ScalarTile : public compiler::CpuTile {
 public:
  ScalarTile(Mod mod, bool log2, const cpu::TileFacts& tiles = {}) : log2_(log2), tiles_(tiles) {
    g_mod = mod;
    g_log2 = log2;
    g_largest_q = 0;
    g_rows = 0;
  }
  cpu::TileFn function() const override { return scalar_tile; }
  double score_factor() const override { return log2_ ? std::numbers::log2e : 1.0; }
  std::span<const dsl::DType> staged() const override { return {}; }
  cpu::RowsFn rows() const override { return nullptr; }
  cpu::TileFacts tile_facts() const override { return tiles_; }
  const compiler::ModFacts& facts() const override { return facts_; }
  const compiler::PhaseTimes& phases() const override { return phases_; }

 private:
  bool log2_;
  cpu::TileFacts tiles_;
  compiler::ModFacts facts_;
  compiler::PhaseTimes phases_;
};

double noop(double score, std::int64_t, std::int64_t, std::int64_t, std::int64_t, const cpu::CapturedView*) {
  return score;
}
double causal(double score, std::int64_t, std::int64_t, std::int64_t q, std::int64_t kv, const cpu::CapturedView*) {
  return q >= kv ? score : -kInf;
}
double window(double score, std::int64_t, std::int64_t, std::int64_t q, std::int64_t kv, const cpu::CapturedView*) {
  return test::in_window(q, kv) ? score : -kInf;
}
// Every index matters, each in its own way.
double indexed(double score, std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t kv,
               const cpu::CapturedView*) {
  return score + 0.3 * static_cast<double>((b * 7 + h * 5 + q * 3 + kv * 2) % 11);
}
// Rows 1, 4, 7, ... keep nothing.
double some_rows_empty(double score, std::int64_t, std::int64_t, std::int64_t q, std::int64_t kv,
                       const cpu::CapturedView*) {
  return q % 3 == 1 || kv % 2 == 0 ? -kInf : score;
}
double captured_bias(double score, std::int64_t, std::int64_t h, std::int64_t, std::int64_t kv,
                     const cpu::CapturedView* captured) {
  const auto* bias = static_cast<const float*>(captured[1].data);
  return score + bias[h * captured[1].stride[0] + kv % captured[1].extent[1] * captured[1].stride[1]];
}

struct Case {
  std::int64_t batch = 1, num_heads = 1, num_heads_kv = 1, seqlen_q = 1, seqlen_kv = 1, head_dim = 16, head_dim_v = 16;
  dsl::DType dtype = dsl::DType::kF32;
  Order order = Order::kHeadsOutside;
  std::int64_t padding = 0;
  Mod mod = noop;
  bool log2 = true;
  int isa = 0;
  int threads = 1;
};

std::string describe(const Case& c) {
  return "isa " + std::to_string(c.isa) + " b " + std::to_string(c.batch) + " h " + std::to_string(c.num_heads) + "/" +
         std::to_string(c.num_heads_kv) + " s " + std::to_string(c.seqlen_q) + "x" + std::to_string(c.seqlen_kv) +
         " d " + std::to_string(c.head_dim) + "/" + std::to_string(c.head_dim_v) + " dtype " +
         std::to_string(static_cast<int>(c.dtype)) + " threads " + std::to_string(c.threads);
}

// Inputs, outputs and one call of a case.
struct Problem {
  explicit Problem(const Case& c)
      : config(c),
        q(make_tensor(c.dtype, {c.batch, c.num_heads, c.seqlen_q, c.head_dim}, c.order, c.padding)),
        k(make_tensor(c.dtype, {c.batch, c.num_heads_kv, c.seqlen_kv, c.head_dim}, c.order, c.padding)),
        v(make_tensor(c.dtype, {c.batch, c.num_heads_kv, c.seqlen_kv, c.head_dim_v}, c.order, c.padding)),
        o(make_tensor(c.dtype, {c.batch, c.num_heads, c.seqlen_q, c.head_dim_v}, c.order, c.padding)),
        lse(static_cast<std::size_t>(c.batch * c.num_heads * c.seqlen_q * 2), 77.0f),
        row_max(lse),
        bias(static_cast<std::size_t>(c.num_heads * 13 * 2)) {
    std::mt19937 random(11);
    std::normal_distribution<double> normal;
    for (Tensor* t : {&q, &k, &v}) {
      const auto& s = t->view.shape;
      for (std::int64_t b = 0; b < s[0]; ++b)
        for (std::int64_t h = 0; h < s[1]; ++h)
          for (std::int64_t i = 0; i < s[2]; ++i)
            for (std::int64_t d = 0; d < s[3]; ++d) t->set(b, h, i, d, normal(random));
    }
    for (float& x : bias) x = static_cast<float>(normal(random));
    captures[0].data = nullptr;
    captures[1] = {bias.data(), dsl::DType::kF32, 2, {c.num_heads, 13}, {26, 2}};
  }

  ForwardCall call() {
    ForwardCall call;
    call.q = q.view;
    call.k = k.view;
    call.v = v.view;
    call.o = o.view;
    // Every other float: strides of the row outputs count, too.
    const std::int64_t row = 2;
    call.lse = {lse.data(), {config.num_heads * config.seqlen_q * row, config.seqlen_q * row, row}};
    call.row_max = {row_max.data(), {config.num_heads * config.seqlen_q * row, config.seqlen_q * row, row}};
    call.scale = scale;
    call.captures = captures;
    call.num_captures = 2;
    return call;
  }

  void run(ThreadPool& pool) {
    const ScalarTile tile(config.mod, config.log2);
    run(pool, tile);
  }
  void run(ThreadPool& pool, const compiler::CpuTile& tile) {
    const ForwardCall c = call();
    const std::size_t size = cpu_workspace_size(c, tile, pool.size());
    std::vector<std::uint8_t> memory(size + 64 + 64, 0xff);
    auto* const workspace = static_cast<std::uint8_t*>(test::align_64(memory.data()));
    cpu_forward(c, tile, static_cast<compiler::CpuIsa>(config.isa), workspace, pool);
    for (std::size_t i = size; i < size + 64; ++i) ASSERT_EQ(workspace[i], 0xff) << "behind the workspace";
  }

  // Every output element against the definition, and nothing else written.
  void check() {
    const double u = config.dtype == dsl::DType::kF32 ? 0 : config.dtype == dsl::DType::kF16 ? 0x1p-11 : 0x1p-8;
    // The weights are rounded, too, where the products are computed on BF16.
    const double u_weights = config.dtype == dsl::DType::kBF16 && config.isa == 3 ? 0x1p-8 : 0;
    const std::vector<cpu::CapturedView> captured = {{}, {bias.data(), {26, 2}, {config.num_heads, 13}}};
    std::vector<double> m(static_cast<std::size_t>(config.seqlen_kv));
    std::vector<std::uint8_t> untouched = o.bytes;
    for (std::int64_t b = 0; b < config.batch; ++b) {
      for (std::int64_t h = 0; h < config.num_heads; ++h) {
        const std::int64_t hk = h / (config.num_heads / config.num_heads_kv);
        for (std::int64_t i = 0; i < config.seqlen_q; ++i) {
          double max = -kInf, sum = 0, size = 1;
          for (std::int64_t j = 0; j < config.seqlen_kv; ++j) {
            double score = 0, magnitude = 0;
            for (std::int64_t d = 0; d < config.head_dim; ++d) {
              score += q.get(b, h, i, d) * k.get(b, hk, j, d);
              magnitude += std::abs(q.get(b, h, i, d) * k.get(b, hk, j, d));
            }
            m[static_cast<std::size_t>(j)] = config.mod(score * scale, b, h, i, j, captured.data());
            max = std::fmax(max, m[static_cast<std::size_t>(j)]);
            size = std::max(size, 1 + magnitude * scale + std::abs(score * scale));
          }
          const bool empty = max == -kInf;
          for (const double x : m) sum += empty && !std::isnan(x) ? 0 : std::exp(x - max);
          const std::size_t row = static_cast<std::size_t>(((b * config.num_heads + h) * config.seqlen_q + i) * 2);
          const double gold_lse = std::isnan(sum) ? kNan : empty ? -kInf : max + std::log(sum);
          expect_close(lse[row], gold_lse, 1e-5 + 1e-6 * size, "lse", b, h, i);
          expect_close(row_max[row], std::isnan(sum) && max < kInf ? kNan : max, 1e-5 + 1e-6 * size, "row_max", b, h,
                       i);
          ASSERT_EQ(lse[row + 1], 77.0f);
          for (std::int64_t d = 0; d < config.head_dim_v; ++d) {
            double gold = 0, magnitude = 0;
            for (std::int64_t j = 0; j < config.seqlen_kv; ++j) {
              const double p = empty && !std::isnan(sum) ? 0 : std::exp(m[static_cast<std::size_t>(j)] - max) / sum;
              gold += p * v.get(b, hk, j, d);
              magnitude += std::abs(p * v.get(b, hk, j, d));
            }
            expect_close(o.get(b, h, i, d), gold, u * std::abs(gold) + magnitude * (u_weights + 1e-6 * size) + 1e-7,
                         "o", b, h, i);
            std::memset(untouched.data() + o.offset(b, h, i, d), 0xff, config.dtype == dsl::DType::kF32 ? 4 : 2);
          }
          if (testing::Test::HasFailure()) return;
        }
      }
    }
    // What the code was compiled for: indices that are narrowed or read by would be wrong beyond.
    ASSERT_LT(g_largest_q, std::max<std::int64_t>(config.seqlen_q, cpu::kPanelLanes));
    for (const std::uint8_t byte : untouched) ASSERT_EQ(byte, 0xff) << "outside o";
  }

  void expect_close(double ours, double gold, double tolerance, const char* what, std::int64_t b, std::int64_t h,
                    std::int64_t i) const {
    const bool same = std::isnan(gold)   ? std::isnan(ours)
                      : std::isinf(gold) ? ours == gold
                                         : std::abs(ours - gold) <= tolerance;
    EXPECT_TRUE(same) << what << " at " << b << ", " << h << ", " << i << ": " << ours << " for " << gold << " (+- "
                      << tolerance << "), " << describe(config);
  }

  Case config;
  Tensor q, k, v, o;
  std::vector<float> lse, row_max, bias;
  dsl::CaptureView captures[2];
  float scale = 0.37f;
};

class CpuBackend : public testing::Test {
 protected:
  static void check(Case c) {
    for (const int isa : test::host_isas()) {
      c.isa = isa;
      ThreadPool pool(c.threads);
      Problem problem(c);
      problem.run(pool);
      problem.check();
      if (HasFailure()) return;
    }
  }
};

TEST_F(CpuBackend, TailsOfQueriesAndKeys) {
  for (const std::int64_t seqlen_q : {1, 2, 31, 32, 33, 63, 64, 65, 100}) {
    for (const std::int64_t seqlen_kv : {1, 2, 127, 128, 129, 300}) {
      check({.seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv, .mod = indexed});
      if (HasFailure()) return;
    }
  }
}

TEST_F(CpuBackend, HeadDims) {
  const std::pair<std::int64_t, std::int64_t> dims[] = {{1, 1},    {3, 64},   {16, 7},   {40, 40},  {64, 256},
                                                        {100, 20}, {128, 65}, {255, 24}, {256, 255}};
  for (const auto& [head_dim, head_dim_v] : dims) {
    check({.seqlen_q = 33, .seqlen_kv = 131, .head_dim = head_dim, .head_dim_v = head_dim_v});
    if (HasFailure()) return;
  }
}

TEST_F(CpuBackend, DtypesStridesAndGroups) {
  for (const dsl::DType dtype : {dsl::DType::kF32, dsl::DType::kF16, dsl::DType::kBF16}) {
    for (const Order order : {Order::kHeadsOutside, Order::kSequenceOutside}) {
      for (const std::int64_t padding : {0, 3}) {
        for (const bool log2 : {true, false}) {
          check({.batch = 2,
                 .num_heads = 4,
                 .num_heads_kv = 2,
                 .seqlen_q = 40,
                 .seqlen_kv = 151,  // odd: NaN stands behind the last row of V
                 .head_dim = 24,
                 .head_dim_v = 20,
                 .dtype = dtype,
                 .order = order,
                 .padding = padding,
                 .mod = indexed,
                 .log2 = log2,
                 .threads = 2});
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(CpuBackend, PackedValuesOfCollidingStrides) {
  // Rows of V 2048 bytes apart.
  check({.seqlen_q = 40, .seqlen_kv = 300, .head_dim = 16, .head_dim_v = 12, .padding = 500});
}

TEST_F(CpuBackend, ManyPanelsAndThreadsGiveTheSameBits) {
  Case c{.batch = 1, .num_heads = 3, .num_heads_kv = 1, .seqlen_q = 500, .seqlen_kv = 200, .mod = causal};
  c.isa = test::host_isas().back();
  ThreadPool one(1), three(3);
  Problem a(c), b(c);
  a.run(one);
  a.check();
  b.run(three);
  EXPECT_EQ(a.o.bytes, b.o.bytes);
  EXPECT_EQ(a.lse, b.lse);
}

TEST_F(CpuBackend, KeysThatTheMaskDropsAreNotComputed) {
  for (const int isa : test::host_isas()) {
    for (const dsl::DType dtype : {dsl::DType::kF32, dsl::DType::kF16, dsl::DType::kBF16}) {
      // With more queries than keys the last rows see nothing.
      for (const auto& [seqlen_q, seqlen_kv] : {std::pair{1, 300}, {170, 170}, {260, 101}, {97, 400}}) {
        std::vector<std::uint8_t> o;
        for (const int threads : {1, 3}) {
          Case c{.num_heads = 2, .num_heads_kv = 1, .seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv};
          c.dtype = dtype;
          c.mod = window;
          c.isa = isa;
          c.threads = threads;
          ThreadPool pool(threads);
          Problem problem(c);
          problem.run(pool, ScalarTile(c.mod, c.log2, test::window_facts()));
          EXPECT_EQ(g_rows, c.batch * c.num_heads * test::window_rows(seqlen_q, seqlen_kv)) << describe(c);
          problem.check();
          if (threads == 1) o = problem.o.bytes;
          EXPECT_EQ(problem.o.bytes, o) << describe(c);
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(CpuBackend, NoKeysGiveZeroAndMinusInfinity) {
  Case c{.num_heads = 2, .num_heads_kv = 1, .seqlen_q = 40, .seqlen_kv = 0};
  check(c);
  c.seqlen_q = 3;
  c.dtype = dsl::DType::kBF16;
  check(c);
}

TEST_F(CpuBackend, EmptyProblemsNeedNothing) {
  for (Case c : {Case{.batch = 0}, Case{.num_heads = 0, .num_heads_kv = 0}, Case{.seqlen_q = 0}}) {
    Problem problem(c);
    ThreadPool pool(2);
    const ScalarTile tile(noop, true);
    EXPECT_EQ(cpu_workspace_size(problem.call(), tile, pool.size()), 0u);
    cpu_forward(problem.call(), tile, compiler::CpuIsa::kSse2, nullptr, pool);
  }
}

TEST_F(CpuBackend, FewTasksNeedScratchForAsManyThreads) {
  const Case c{.num_heads = 3, .num_heads_kv = 3, .seqlen_q = 1};
  Problem problem(c);
  const ScalarTile tile(c.mod, c.log2);
  EXPECT_EQ(cpu_workspace_size(problem.call(), tile, 64), 3 * cpu_workspace_size(problem.call(), tile, 1));
  ThreadPool pool(8);
  problem.run(pool, tile);
  problem.check();
}

TEST_F(CpuBackend, EmptyRows) {
  check({.seqlen_q = 70, .seqlen_kv = 260, .mod = some_rows_empty});
  check({.seqlen_q = 5, .seqlen_kv = 1, .dtype = dsl::DType::kF16, .mod = some_rows_empty});
}

TEST_F(CpuBackend, CapturedTensorsArriveByNumber) {
  check({.num_heads = 3, .num_heads_kv = 3, .seqlen_q = 34, .seqlen_kv = 130, .mod = captured_bias});
}

TEST_F(CpuBackend, BroadcastInputs) {
  for (const int isa : test::host_isas()) {
    Case c{.batch = 2, .num_heads = 2, .num_heads_kv = 2, .seqlen_q = 45, .seqlen_kv = 140, .mod = indexed, .isa = isa};
    Problem problem(c);
    for (Tensor* t : {&problem.q, &problem.k, &problem.v}) t->view.stride[0] = t->view.stride[1] = 0;
    problem.k.view.stride[2] = 0;
    ThreadPool pool(1);
    problem.run(pool);
    problem.check();
  }
}

TEST_F(CpuBackend, NanAndInfinityStayInTheirRows) {
  for (const int isa : test::host_isas()) {
    Case c{.seqlen_q = 64, .seqlen_kv = 200, .mod = causal, .isa = isa};
    Problem problem(c);
    problem.q.set(0, 0, 3, 5, kNan);
    problem.k.set(0, 0, 50, 2, kNan);  // dropped for the rows before it
    ThreadPool pool(1);
    problem.run(pool);
    problem.check();
  }
}

TEST_F(CpuBackend, PositiveInfinityMakesTheRowNan) {
  const Mod mod = [](double score, std::int64_t, std::int64_t, std::int64_t q, std::int64_t kv,
                     const cpu::CapturedView*) { return q == 7 && kv == 130 ? kInf : score; };
  check({.seqlen_q = 33, .seqlen_kv = 200, .mod = mod});
}

TEST_F(CpuBackend, ValuesThatAreNotFiniteStayOutOfEmptyRows) {
  for (const int isa : test::host_isas()) {
    Case c{.seqlen_q = 33, .seqlen_kv = 10, .mod = some_rows_empty, .isa = isa};
    Problem problem(c);
    problem.v.set(0, 0, 4, 3, kNan);
    ThreadPool pool(1);
    problem.run(pool);
    for (std::int64_t i = 1; i < 33; i += 3) {
      for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(problem.o.get(0, 0, i, d), 0.0);
    }
  }
}

TEST_F(CpuBackend, RowOutputsAreOptional) {
  Case c{.seqlen_q = 40, .seqlen_kv = 40};
  Problem problem(c);
  ThreadPool pool(1);
  const ScalarTile tile(noop, true);
  ForwardCall call = problem.call();
  call.lse.data = nullptr;
  call.row_max.data = nullptr;
  test::PanelBuffer workspace(static_cast<std::int64_t>(cpu_workspace_size(call, tile, 1)) / 128 + 1);
  cpu_forward(call, tile, compiler::CpuIsa::kSse2, workspace.data(), pool);
  EXPECT_FALSE(std::isnan(problem.o.get(0, 0, 39, 15)));
}

// Two staged reads of 77 rows and 300 columns, in f32 and in bytes, which count up from row to row.
const std::vector<float>& staged_floats() {
  static const std::vector<float> values = [] {
    std::vector<float> out(77 * 300);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<float>(i);
    return out;
  }();
  return values;
}
const std::vector<std::uint8_t>& staged_bytes() {
  static const std::vector<std::uint8_t> values = [] {
    std::vector<std::uint8_t> out(77 * 300);
    for (std::size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::uint8_t>(i);
    return out;
  }();
  return values;
}
std::atomic<int> g_wrong_staged = 0;

class StagedTile : public ScalarTile {
 public:
  StagedTile() : ScalarTile(noop, true) { g_wrong_staged = 0; }
  std::span<const dsl::DType> staged() const override { return kTypes; }
  cpu::RowsFn rows() const override {
    return [](const cpu::TileParams* p, const void** addresses) {
      for (int lane = 0; lane < cpu::kPanelLanes; ++lane) {
        addresses[lane] = &staged_floats()[place(p, lane, 0)];
        addresses[cpu::kPanelLanes + lane] = &staged_bytes()[place(p, lane, 0)];
      }
    };
  }
  cpu::TileFn function() const override {
    return [](const cpu::TileParams* p) {
      for (int row = 0; row < p->rows; ++row) {
        for (int lane = 0; lane < cpu::kPanelLanes; ++lane) {
          const std::size_t element = static_cast<std::size_t>(row) * cpu::kPanelLanes + static_cast<std::size_t>(lane);
          const float first = static_cast<const float*>(p->staged)[element];
          std::int32_t second;
          std::memcpy(&second, static_cast<const float*>(p->staged) + cpu::kTileRows * cpu::kPanelLanes + element, 4);
          g_wrong_staged +=
              first != staged_floats()[place(p, lane, row)] || second != staged_bytes()[place(p, lane, row)];
        }
      }
      scalar_tile(p);
    };
  }

 private:
  static constexpr dsl::DType kTypes[] = {dsl::DType::kF32, dsl::DType::kBool};
  // Lanes beyond the last row read that one, as clamped indices do.
  static std::size_t place(const cpu::TileParams* p, int lane, int row) {
    return static_cast<std::size_t>(std::min<std::int64_t>(p->q_idx + lane, 76) * 300 + p->kv_idx + row);
  }
};

TEST_F(CpuBackend, StagedReadsReachTheTile) {
  for (const int isa : test::host_isas()) {
    for (const std::int64_t seqlen_q : {5, 77}) {
      Case c{.batch = 1, .num_heads = 2, .num_heads_kv = 1, .seqlen_q = seqlen_q, .seqlen_kv = 300, .isa = isa};
      Problem problem(c);
      ThreadPool pool(2);
      const StagedTile tile;
      EXPECT_GE(cpu_workspace_size(problem.call(), tile, 2),
                cpu_workspace_size(problem.call(), ScalarTile(noop, true), 2) + 2 * 2 * 4 * 128 * 32);
      problem.run(pool, tile);
      problem.check();
      EXPECT_EQ(g_wrong_staged, 0);
    }
  }
}

TEST_F(CpuBackend, ConcurrentCallsOnOnePool) {
  Case c{.num_heads = 4, .num_heads_kv = 4, .seqlen_q = 70, .seqlen_kv = 130, .mod = indexed};
  c.isa = test::host_isas().back();
  ThreadPool pool(2);
  const ScalarTile tile(c.mod, c.log2);
  std::deque<Problem> problems;
  for (int i = 0; i < 4; ++i) problems.emplace_back(c);
  std::vector<std::thread> callers;
  callers.reserve(problems.size());
  for (Problem& p : problems) callers.emplace_back([&] { p.run(pool, tile); });
  for (std::thread& caller : callers) caller.join();
  for (Problem& p : problems) p.check();
}

}  // namespace
}  // namespace attnjit::runtime
