// The fused CPU backward against a plain double-precision loop, around a scalar tile that stands for the compiled one.
#include "runtime/cpu_backward.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "tests/unit/cpu_tensor.h"
#include "tests/unit/cpu_testing.h"

namespace attnjit::runtime {
namespace {

using compiler::CpuPlaces;
using compiler::SinkFacts;
using compiler::SinkLevel;
using test::make_tensor;
using test::Order;
using test::Tensor;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

struct Element {
  std::int64_t b, h, q, kv;
};

// One contribution: where it goes, and what it is per unit of the modified score's gradient (of a row shift: of lse's).
struct TestSink {
  SinkFacts facts;
  CpuPlaces places = CpuPlaces::kOffsets;
  std::int64_t (*place)(const Element& e);
  double (*factor)(double score, const Element& e);
};

// A score_mod with its derivative, and contributions that need not be derivatives of anything.
struct TestMod {
  double (*value)(double score, const Element& e) = [](double score, const Element&) { return score; };
  double (*derivative)(double score, const Element& e) = [](double, const Element&) { return 1.0; };
  std::vector<TestSink> sinks;
  cpu::TileFacts tiles = {};
};
const TestMod* g_mod = nullptr;        // of the call in progress
std::atomic<std::int64_t> g_rows = 0;  // keys of all tiles

void scalar_tile(const cpu::GradientTileParams* p) {
  g_rows += p->rows;
  for (int lane = 0; lane < cpu::kPanelLanes; ++lane) {
    for (long long row = 0; row < p->rows; ++row) {
      const long long at = row * cpu::kPanelLanes + lane;
      const Element e{p->b, p->h, p->q_idx + lane, p->kv_idx + row};
      const double score = p->scores[at];
      const double value = g_mod->value(score, e);
      const bool dropped = value == -kInf || p->lse[lane] == static_cast<float>(kInf);
      const double probability = dropped ? 0.0 : std::exp(value - p->lse[lane]);
      const double gradient = probability == 0.0 ? 0.0 : probability * (p->gradients[at] - p->delta[lane]);
      p->scores[at] = static_cast<float>(probability);
      p->gradients[at] = gradient == 0.0 ? 0.0f : static_cast<float>(gradient * g_mod->derivative(score, e));
      for (std::size_t i = 0; i < g_mod->sinks.size(); ++i) {
        const TestSink& sink = g_mod->sinks[i];
        const long long part = static_cast<long long>(i) * cpu::kTileRows * cpu::kPanelLanes;
        if (sink.facts.row_shift) continue;
        p->contributions[part + at] = gradient == 0.0 ? 0.0f : static_cast<float>(gradient * sink.factor(score, e));
        if (sink.places == CpuPlaces::kTile) p->places[part + at] = sink.place(e);
      }
    }
  }
}

class ScalarTile : public compiler::CpuGradientTile {
 public:
  explicit ScalarTile(const TestMod& mod) {
    g_mod = &mod;
    g_rows = 0;
    facts_.knows_tiles = mod.tiles.kind;
    for (const TestSink& sink : mod.sinks) {
      facts_.sinks.push_back(sink.facts);
      places_.push_back(sink.places);
      shifts_ |= sink.facts.row_shift;
    }
  }
  cpu::GradientTileFn function() const override { return scalar_tile; }
  std::span<const CpuPlaces> places() const override { return places_; }
  cpu::SinkOffsetsFn sink_offsets() const override {
    if (places_.empty()) return nullptr;
    return [](long long b, long long h, long long q, long long kv, const cpu::CapturedView*, long long* offsets) {
      for (std::size_t i = 0; i < g_mod->sinks.size(); ++i) {
        // What the tile gives is found in no other way.
        if (g_mod->sinks[i].places != CpuPlaces::kTile) offsets[i] = g_mod->sinks[i].place({b, h, q, kv});
      }
    };
  }
  cpu::RowShiftsFn row_shifts() const override {
    if (!shifts_) return nullptr;
    return [](long long b, long long h, long long q, const cpu::CapturedView*, float gradient, float* values) {
      for (std::size_t i = 0; i < g_mod->sinks.size(); ++i) {
        const TestSink& sink = g_mod->sinks[i];
        if (sink.facts.row_shift) values[i] = static_cast<float>(gradient * sink.factor(kNan, {b, h, q, -1}));
      }
    };
  }
  std::span<const dsl::DType> staged() const override { return {}; }
  cpu::RowsFn rows() const override { return nullptr; }
  cpu::TileFacts tile_facts() const override { return g_mod->tiles; }
  const compiler::ModFacts& facts() const override { return facts_; }
  const compiler::PhaseTimes& phases() const override { return phases_; }

 private:
  bool shifts_ = false;
  std::vector<CpuPlaces> places_;
  compiler::ModFacts facts_;
  compiler::PhaseTimes phases_;
};

// ---- Mods

double causal(double score, const Element& e) { return e.q >= e.kv ? score : -kInf; }
double window(double score, const Element& e) { return test::in_window(e.q, e.kv) ? score : -kInf; }
// Not monotone, and every index matters. Rows 1, 4, 7, ... keep nothing.
double curved(double score, const Element& e) {
  if (e.q % 3 == 1 || e.kv % 5 == 2) return -kInf;
  return score + 0.05 * score * score + 0.3 * static_cast<double>((e.b * 7 + e.h * 5 + e.q * 3 + e.kv * 2) % 11);
}
double curved_derivative(double score, const Element&) { return 1.0 + 0.1 * score; }

// Extents that the places below keep to; the test's shapes stay below.
constexpr std::int64_t kHeads = 4, kQueries = 160, kKeys = 400;

std::vector<TestSink> every_level() {
  const auto score = [](double s, const Element&) { return s; };
  const auto one = [](double, const Element&) { return 1.0; };
  const auto mixed = [](double s, const Element& e) { return s * static_cast<double>((e.q + 2 * e.kv) % 7); };
  return {
      {{.capture = 0, .level = SinkLevel::kBlock}, CpuPlaces::kOffsets, [](const Element& e) { return e.h; }, score},
      {{.capture = 1, .level = SinkLevel::kRow},
       CpuPlaces::kOffsets,
       [](const Element& e) { return e.h * kQueries + e.q; },
       mixed},
      {{.capture = 2, .level = SinkLevel::kColumn},
       CpuPlaces::kOffsets,
       [](const Element& e) { return e.kv * 3 % kKeys; },
       one},
      {{.capture = 3, .level = SinkLevel::kDiagonal},
       CpuPlaces::kOffsets,
       [](const Element& e) { return e.b * (kQueries + kKeys) + e.q - e.kv + kKeys; },
       mixed},
      {{.capture = 4, .level = SinkLevel::kElement, .injective = true},
       CpuPlaces::kAlongKeys,
       [](const Element& e) { return ((e.b * kHeads + e.h) * kQueries + e.q) * kKeys + e.kv; },
       one},
      {{.capture = 5, .level = SinkLevel::kElement},
       CpuPlaces::kAlongKeys,
       [](const Element& e) { return e.q * kKeys + e.kv; },
       mixed},
      {{.capture = 6, .level = SinkLevel::kElement, .data_dependent = true},
       CpuPlaces::kTile,
       [](const Element& e) { return (e.q * 7 + e.kv * 3) % 50; },
       score},
      {{.capture = 7, .level = SinkLevel::kRow, .row_shift = true},
       CpuPlaces::kOffsets,
       [](const Element& e) { return e.h * kQueries + e.q; },
       [](double, const Element& e) { return 1.0 + static_cast<double>(e.q % 3); }},
      // A second one of a tensor.
      {{.capture = 2, .level = SinkLevel::kRow}, CpuPlaces::kOffsets, [](const Element& e) { return e.q; }, score},
  };
}

struct Case {
  std::int64_t batch = 1, num_heads = 1, num_heads_kv = 1, seqlen_q = 1, seqlen_kv = 1, head_dim = 16, head_dim_v = 16;
  dsl::DType dtype = dsl::DType::kF32;
  Order order = Order::kHeadsOutside;
  std::int64_t padding = 0;
  TestMod mod;
  bool grad_lse = true;
  bool wants_dq = true, wants_dk = true, wants_dv = true;
  int isa = 0;
  int threads = 1;
};

std::string describe(const Case& c) {
  return "isa " + std::to_string(c.isa) + " b " + std::to_string(c.batch) + " h " + std::to_string(c.num_heads) + "/" +
         std::to_string(c.num_heads_kv) + " s " + std::to_string(c.seqlen_q) + "x" + std::to_string(c.seqlen_kv) +
         " d " + std::to_string(c.head_dim) + "/" + std::to_string(c.head_dim_v) + " dtype " +
         std::to_string(static_cast<int>(c.dtype)) + " threads " + std::to_string(c.threads);
}

// A captured tensor and its gradient, whose innermost dimension is `step` elements apart.
struct Captured {
  dsl::CaptureView view;
  std::int64_t step = 1;
  std::vector<std::uint8_t> bytes;  // of the gradient

  Captured(dsl::DType dtype, std::vector<std::int64_t> extent, std::int64_t step) : step(step) {
    view.dtype = dtype;
    view.rank = static_cast<int>(extent.size());
    std::int64_t elements = 1;
    for (std::size_t d = 0; d < extent.size(); ++d) {
      view.extent[d] = extent[d];
      elements *= extent[d];
    }
    bytes.assign(static_cast<std::size_t>(elements * step * dsl::dtype_size(dtype)), 0xff);
  }
  CaptureGradient gradient() {
    CaptureGradient out;
    out.data = bytes.data();
    std::int64_t stride = step;
    for (int d = view.rank; d-- > 0;) {
      out.stride[d] = stride;
      stride *= view.extent[d];
    }
    return out;
  }
  double get(std::int64_t place) const {
    const std::uint8_t* const p = bytes.data() + place * step * dsl::dtype_size(view.dtype);
    if (view.dtype == dsl::DType::kF32) {
      float f;
      std::memcpy(&f, p, 4);
      return f;
    }
    std::uint16_t half;
    std::memcpy(&half, p, 2);
    return test::value_of(half, view.dtype == dsl::DType::kF16 ? cpu::Storage::kF16 : cpu::Storage::kBF16);
  }
};

// A sum, and the sum of what its terms' rounding errors are proportional to.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double term, double size) {
    value += term;
    magnitude += size;
  }
};

struct Problem {
  explicit Problem(const Case& c)
      : config(c),
        q(make_tensor(c.dtype, {c.batch, c.num_heads, c.seqlen_q, c.head_dim}, c.order, c.padding)),
        k(make_tensor(c.dtype, {c.batch, c.num_heads_kv, c.seqlen_kv, c.head_dim}, c.order, c.padding)),
        v(make_tensor(c.dtype, {c.batch, c.num_heads_kv, c.seqlen_kv, c.head_dim_v}, c.order, c.padding)),
        o(make_tensor(c.dtype, {c.batch, c.num_heads, c.seqlen_q, c.head_dim_v}, c.order, c.padding)),
        grad_out(make_tensor(c.dtype, {c.batch, c.num_heads, c.seqlen_q, c.head_dim_v}, c.order, c.padding)),
        dq(make_tensor(c.dtype, {c.batch, c.num_heads, c.seqlen_q, c.head_dim}, c.order, c.padding)),
        dk(make_tensor(c.dtype, {c.batch, c.num_heads_kv, c.seqlen_kv, c.head_dim}, c.order, c.padding)),
        dv(make_tensor(c.dtype, {c.batch, c.num_heads_kv, c.seqlen_kv, c.head_dim_v}, c.order, c.padding)),
        lse(static_cast<std::size_t>(c.batch * c.num_heads * c.seqlen_q * 2), 77.0f),
        grad_lse(lse) {
    std::mt19937 random(11);
    std::normal_distribution<double> normal;
    for (Tensor* t : {&q, &k, &v, &grad_out}) {
      const auto& s = t->view.shape;
      for (std::int64_t b = 0; b < s[0]; ++b)
        for (std::int64_t h = 0; h < s[1]; ++h)
          for (std::int64_t i = 0; i < s[2]; ++i)
            for (std::int64_t d = 0; d < s[3]; ++d) t->set(b, h, i, d, normal(random));
    }
    for (float& x : grad_lse) x = static_cast<float>(normal(random));
    if (!c.mod.sinks.empty()) {
      captured = {{dsl::DType::kF32, {kHeads}, 1},
                  {dsl::DType::kBF16, {kHeads, kQueries}, 1},
                  {dsl::DType::kF32, {kKeys}, 3},
                  {dsl::DType::kF16, {2, kQueries + kKeys}, 1},
                  {dsl::DType::kF32, {2, kHeads, kQueries, kKeys}, 1},
                  {dsl::DType::kF32, {kQueries, kKeys}, 2},
                  {dsl::DType::kBF16, {50}, 1},
                  {dsl::DType::kF32, {kHeads, kQueries}, 1},
                  {dsl::DType::kF32, {}, 1}};  // nothing adds to this one
    }
    for (const Captured& t : captured) views.push_back(t.view);
    forward();
  }

  std::size_t row_at(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return static_cast<std::size_t>(((b * config.num_heads + h) * config.seqlen_q + i) * 2);
  }
  std::int64_t head_kv(std::int64_t h) const { return h / (config.num_heads / config.num_heads_kv); }

  // The score and the sum of the absolute values of its terms.
  Sum score(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    Sum sum;
    for (std::int64_t d = 0; d < config.head_dim; ++d) {
      const double term = scale * q.get(b, h, i, d) * k.get(b, head_kv(h), j, d);
      sum.add(term, std::abs(term));
    }
    return sum;
  }

  // o and lse.
  void forward() {
    for (std::int64_t b = 0; b < config.batch; ++b) {
      for (std::int64_t h = 0; h < config.num_heads; ++h) {
        for (std::int64_t i = 0; i < config.seqlen_q; ++i) {
          double sum = 0;
          std::vector<double> out(static_cast<std::size_t>(config.head_dim_v));
          for (std::int64_t j = 0; j < config.seqlen_kv; ++j) {
            const double p = std::exp(config.mod.value(score(b, h, i, j).value, {b, h, i, j}));
            sum += p;
            for (std::int64_t d = 0; d < config.head_dim_v && p > 0; ++d)
              out[static_cast<std::size_t>(d)] += p * v.get(b, head_kv(h), j, d);
          }
          lse[row_at(b, h, i)] = static_cast<float>(std::log(sum));
          for (std::int64_t d = 0; d < config.head_dim_v; ++d)
            o.set(b, h, i, d, sum > 0 ? out[static_cast<std::size_t>(d)] / sum : 0.0);
        }
      }
    }
  }

  ForwardCall call() {
    ForwardCall call;
    call.q = q.view;
    call.k = k.view;
    call.v = v.view;
    call.o = o.view;
    call.lse = {lse.data(), {config.num_heads * config.seqlen_q * 2, config.seqlen_q * 2, 2}};
    call.scale = scale;
    call.captures = views.data();
    call.num_captures = views.size();
    return call;
  }
  Gradients gradients() {
    Gradients g;
    g.grad_out = grad_out.view;
    if (config.grad_lse)
      g.grad_lse = {grad_lse.data(), {config.num_heads * config.seqlen_q * 2, config.seqlen_q * 2, 2}};
    if (config.wants_dq) g.dq = dq.view;
    if (config.wants_dk) g.dk = dk.view;
    if (config.wants_dv) g.dv = dv.view;
    for (std::size_t i = 0; i < captured.size(); ++i) g.captures[i] = captured[i].gradient();
    return g;
  }

  void run(ThreadPool& pool) {
    const ScalarTile tile(config.mod);
    const ForwardCall c = call();
    const Gradients g = gradients();
    const WantedGradients wants{config.wants_dq, config.wants_dk, config.wants_dv, (1u << captured.size()) - 1};
    const std::size_t size = cpu_backward_workspace_size(c, wants, tile, pool.size());
    std::vector<std::uint8_t> memory(size + 64 + 64, 0xff);
    auto* const workspace = static_cast<std::uint8_t*>(test::align_64(memory.data()));
    cpu_backward(c, g, tile, static_cast<compiler::CpuIsa>(config.isa), workspace, pool);
    for (std::size_t i = size; i < size + 64; ++i) ASSERT_EQ(workspace[i], 0xff) << "behind the workspace";
  }

  // Every gradient against the definition, and nothing else written.
  void check() {
    const std::int64_t group = config.num_heads / config.num_heads_kv;
    std::vector<std::vector<Sum>> captures;
    for (const Captured& t : captured)
      captures.emplace_back(t.bytes.size() / static_cast<std::size_t>(t.step * dsl::dtype_size(t.view.dtype)));
    untouched_q = dq.bytes;
    untouched_k = dk.bytes;
    untouched_v = dv.bytes;
    using Row = std::vector<Sum>;
    for (std::int64_t b = 0; b < config.batch; ++b) {
      for (std::int64_t hk = 0; hk < config.num_heads_kv; ++hk) {
        std::vector<Row> gold_dk(static_cast<std::size_t>(config.seqlen_kv),
                                 Row(static_cast<std::size_t>(config.head_dim)));
        std::vector<Row> gold_dv(static_cast<std::size_t>(config.seqlen_kv),
                                 Row(static_cast<std::size_t>(config.head_dim_v)));
        for (std::int64_t h = hk * group; h < (hk + 1) * group; ++h) {
          for (std::int64_t i = 0; i < config.seqlen_q; ++i) {
            Row gold_dq(static_cast<std::size_t>(config.head_dim));
            row(b, h, hk, i, captures, gold_dq, gold_dk, gold_dv);
            for (std::int64_t d = 0; config.wants_dq && d < config.head_dim; ++d)
              expect_close(dq, untouched_q, gold_dq[static_cast<std::size_t>(d)], "dq", b, h, i, d);
          }
        }
        for (std::int64_t j = 0; j < config.seqlen_kv; ++j) {
          for (std::int64_t d = 0; config.wants_dk && d < config.head_dim; ++d)
            expect_close(dk, untouched_k, gold_dk[static_cast<std::size_t>(j)][static_cast<std::size_t>(d)], "dk", b,
                         hk, j, d);
          for (std::int64_t d = 0; config.wants_dv && d < config.head_dim_v; ++d)
            expect_close(dv, untouched_v, gold_dv[static_cast<std::size_t>(j)][static_cast<std::size_t>(d)], "dv", b,
                         hk, j, d);
        }
        if (testing::Test::HasFailure()) return;
      }
    }
    for (const auto* bytes : {&untouched_q, &untouched_k, &untouched_v})
      for (const std::uint8_t byte : *bytes) ASSERT_EQ(byte, 0xff) << "outside a gradient, " << describe(config);
    for (std::size_t c = 0; c < captured.size(); ++c) {
      const Captured& t = captured[c];
      const double u = unit(t.view.dtype);
      for (std::size_t place = 0; place < captures[c].size(); ++place) {
        const Sum& gold = captures[c][place];
        const double ours = t.get(static_cast<std::int64_t>(place));
        const double smallest = t.view.dtype == dsl::DType::kF16 ? 0x1p-25 : 1e-38;  // half a last place of zero
        ASSERT_LE(std::abs(ours - gold.value), u * std::abs(gold.value) + 2e-5 * gold.magnitude + smallest)
            << "capture " << c << " at " << place << ", " << describe(config);
        for (std::int64_t i = dsl::dtype_size(t.view.dtype); i < t.step * dsl::dtype_size(t.view.dtype); ++i)
          ASSERT_EQ(t.bytes[place * static_cast<std::size_t>(t.step * dsl::dtype_size(t.view.dtype)) +
                            static_cast<std::size_t>(i)],
                    0xff);
      }
    }
  }

  // Adds what one query row contributes to everything.
  void row(std::int64_t b, std::int64_t h, std::int64_t hk, std::int64_t i, std::vector<std::vector<Sum>>& captures,
           std::vector<Sum>& gold_dq, std::vector<std::vector<Sum>>& gold_dk,
           std::vector<std::vector<Sum>>& gold_dv) const {
    const double row_lse = lse[row_at(b, h, i)];
    const double row_grad_lse = config.grad_lse ? grad_lse[row_at(b, h, i)] : 0.0;
    if (row_lse == -kInf) return;
    double delta = -row_grad_lse, delta_size = std::abs(delta);
    for (std::int64_t d = 0; d < config.head_dim_v; ++d) {
      delta += grad_out.get(b, h, i, d) * o.get(b, h, i, d);
      delta_size += std::abs(grad_out.get(b, h, i, d) * o.get(b, h, i, d));
    }
    for (const TestSink& sink : config.mod.sinks) {
      if (!sink.facts.row_shift) continue;
      const double term = row_grad_lse * sink.factor(kNan, {b, h, i, -1});
      captures[static_cast<std::size_t>(sink.facts.capture)][static_cast<std::size_t>(sink.place({b, h, i, -1}))].add(
          term, std::abs(term));
    }
    for (std::int64_t j = 0; j < config.seqlen_kv; ++j) {
      const Element e{b, h, i, j};
      const Sum s = score(b, h, i, j);
      const double value = config.mod.value(s.value, e);
      if (value == -kInf) continue;
      const double p = std::exp(value - row_lse);
      double dp = 0, size = delta_size;
      for (std::int64_t d = 0; d < config.head_dim_v; ++d) {
        const double term = grad_out.get(b, h, i, d) * v.get(b, hk, j, d);
        dp += term;
        size += std::abs(term);
      }
      // Of the score's rounding error, what reaches p.
      const double sensitivity = 1 + std::abs(value) + s.magnitude * std::abs(config.mod.derivative(s.value, e));
      const double dm = p * (dp - delta);
      const double dm_size = p * size * sensitivity;
      const double slope = config.mod.derivative(s.value, e);
      const double slope_size = std::abs(slope) + s.magnitude;
      for (std::int64_t d = 0; d < config.head_dim; ++d) {
        const auto at = static_cast<std::size_t>(d);
        const double to_q = scale * k.get(b, hk, j, d), to_k = scale * q.get(b, h, i, d);
        gold_dq[at].add(dm * slope * to_q, dm_size * slope_size * std::abs(to_q));
        gold_dk[static_cast<std::size_t>(j)][at].add(dm * slope * to_k, dm_size * slope_size * std::abs(to_k));
      }
      for (std::int64_t d = 0; d < config.head_dim_v; ++d) {
        const double term = p * grad_out.get(b, h, i, d);
        gold_dv[static_cast<std::size_t>(j)][static_cast<std::size_t>(d)].add(term, std::abs(term) * sensitivity);
      }
      for (const TestSink& sink : config.mod.sinks) {
        if (sink.facts.row_shift) continue;
        const double factor = sink.factor(s.value, e);
        captures[static_cast<std::size_t>(sink.facts.capture)][static_cast<std::size_t>(sink.place(e))].add(
            dm * factor, dm_size * (std::abs(factor) + s.magnitude));
      }
    }
  }

  static double unit(dsl::DType dtype) {
    return dtype == dsl::DType::kF32 ? 0 : dtype == dsl::DType::kF16 ? 0x1p-11 : 0x1p-8;
  }

  void expect_close(const Tensor& t, std::vector<std::uint8_t>& untouched, const Sum& gold, const char* what,
                    std::int64_t b, std::int64_t h, std::int64_t row, std::int64_t d) const {
    // P and dS are rounded, too, where the products are computed on BF16.
    const double inside = config.dtype == dsl::DType::kBF16 && config.isa == 3 ? 0x1p-8 : 2e-6;
    const double tolerance = unit(config.dtype) * std::abs(gold.value) + inside * gold.magnitude + 1e-7;
    EXPECT_LE(std::abs(t.get(b, h, row, d) - gold.value), tolerance)
        << what << " at " << b << ", " << h << ", " << row << ", " << d << ": " << t.get(b, h, row, d) << " for "
        << gold.value << ", " << describe(config);
    std::memset(untouched.data() + t.offset(b, h, row, d), 0xff, config.dtype == dsl::DType::kF32 ? 4 : 2);
  }

  Case config;
  Tensor q, k, v, o, grad_out, dq, dk, dv;
  std::vector<float> lse, grad_lse;
  std::vector<Captured> captured;
  std::vector<dsl::CaptureView> views;
  std::vector<std::uint8_t> untouched_q, untouched_k, untouched_v;
  float scale = 0.37f;
};

class CpuBackward : public testing::Test {
 protected:
  static void check(Case c) {
    for (const int isa : test::host_isas()) {
      c.isa = isa;
      ThreadPool pool(c.threads);
      Problem problem(c);
      problem.run(pool);
      if (!HasFailure()) problem.check();
      if (HasFailure()) return;
    }
  }
};

TEST_F(CpuBackward, TailsOfQueriesAndKeys) {
  for (const std::int64_t seqlen_q : {1, 2, 31, 32, 33, 65}) {
    for (const std::int64_t seqlen_kv : {1, 2, 127, 128, 129, 300}) {
      check({.seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv, .mod = {curved, curved_derivative, {}}});
      if (HasFailure()) return;
    }
  }
}

TEST_F(CpuBackward, HeadDims) {
  const std::pair<std::int64_t, std::int64_t> dims[] = {{1, 1},    {3, 64},   {16, 7},   {40, 40},  {64, 256},
                                                        {100, 20}, {128, 65}, {255, 24}, {256, 255}};
  for (const auto& [head_dim, head_dim_v] : dims) {
    check({.seqlen_q = 33, .seqlen_kv = 131, .head_dim = head_dim, .head_dim_v = head_dim_v});
    if (HasFailure()) return;
  }
}

TEST_F(CpuBackward, DtypesStridesAndGroups) {
  for (const dsl::DType dtype : {dsl::DType::kF32, dsl::DType::kF16, dsl::DType::kBF16}) {
    for (const Order order : {Order::kHeadsOutside, Order::kSequenceOutside}) {
      for (const std::int64_t padding : {0, 3}) {
        check({.batch = 2,
               .num_heads = 4,
               .num_heads_kv = 2,
               .seqlen_q = 40,
               .seqlen_kv = 151,  // odd: NaN stands behind the last row of K and V
               .head_dim = 24,
               .head_dim_v = 20,
               .dtype = dtype,
               .order = order,
               .padding = padding,
               .mod = {curved, curved_derivative, {}},
               .threads = 2});
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(CpuBackward, EachGradientIsOptional) {
  for (int wants = 0; wants < 8; ++wants) {
    check({.seqlen_q = 40,
           .seqlen_kv = 140,
           .mod = {causal, [](double, const Element&) { return 1.0; }, {}},
           .wants_dq = (wants & 1) != 0,
           .wants_dk = (wants & 2) != 0,
           .wants_dv = (wants & 4) != 0});
    if (HasFailure()) return;
  }
}

TEST_F(CpuBackward, CapturedGradientsOfEveryLevel) {
  for (const int threads : {1, 2, 3}) {
    for (const auto& [seqlen_q, seqlen_kv] : {std::pair(7, 5), std::pair(70, 130), std::pair(150, 390)}) {
      for (const bool grad_lse : {true, false}) {
        if (!grad_lse && seqlen_q != 70) continue;
        check({.batch = 2,
               .num_heads = 4,
               .num_heads_kv = 2,
               .seqlen_q = seqlen_q,
               .seqlen_kv = seqlen_kv,
               .head_dim = 5,
               .head_dim_v = 3,
               .mod = {curved, curved_derivative, every_level()},
               .grad_lse = grad_lse,
               .threads = threads});
        if (HasFailure()) return;
      }
    }
  }
}

TEST_F(CpuBackward, SplitsAndChunksOfKeys) {
  // Head dims of which a chunk has one tile, on more threads than heads.
  check({.seqlen_q = 40,
         .seqlen_kv = 390,
         .head_dim = 256,
         .head_dim_v = 250,
         .mod = {curved, curved_derivative, every_level()},
         .threads = 1});
  check({.seqlen_q = 100,
         .seqlen_kv = 390,
         .head_dim = 20,
         .mod = {curved, curved_derivative, every_level()},
         .threads = 3});
  check({.batch = 1,
         .num_heads = 3,
         .num_heads_kv = 3,
         .seqlen_q = 33,
         .seqlen_kv = 300,
         .mod = {curved, curved_derivative, every_level()},
         .threads = 2});
}

TEST_F(CpuBackward, KeysThatTheMaskDropsAreNotComputed) {
  const TestMod mod{.value = window, .sinks = every_level(), .tiles = test::window_facts()};
  for (const int isa : test::host_isas()) {
    for (const dsl::DType dtype : {dsl::DType::kF32, dsl::DType::kBF16}) {
      for (const auto& [seqlen_q, seqlen_kv] : {std::pair{150, 390}, {159, 45}}) {
        // The larger head dim has a chunk for each tile.
        for (const auto& [head_dim, threads] : {std::pair{24, 3}, {136, 1}}) {
          Case c{.num_heads = 2, .num_heads_kv = 1, .seqlen_q = seqlen_q, .seqlen_kv = seqlen_kv};
          c.head_dim = c.head_dim_v = head_dim;
          c.dtype = dtype;
          c.mod = mod;
          c.isa = isa;
          c.threads = threads;
          ThreadPool pool(threads);
          Problem first(c), again(c);
          first.run(pool);
          EXPECT_EQ(g_rows, c.num_heads * test::window_rows(seqlen_q, seqlen_kv)) << describe(c);
          first.check();
          again.run(pool);
          EXPECT_EQ(first.dq.bytes, again.dq.bytes);
          EXPECT_EQ(first.dk.bytes, again.dk.bytes);
          EXPECT_EQ(first.dv.bytes, again.dv.bytes);
          for (std::size_t t = 0; t < first.captured.size(); ++t)
            EXPECT_EQ(first.captured[t].bytes, again.captured[t].bytes) << t;
          if (HasFailure()) return;
        }
      }
    }
  }
}

TEST_F(CpuBackward, EveryRunGivesTheSameBits) {
  std::vector<std::uint8_t> dk, dv;  // whatever the number of threads is
  for (const int threads : {1, 2, 3}) {
    Case c{.batch = 1,
           .num_heads = 4,
           .num_heads_kv = 2,
           .seqlen_q = 150,
           .seqlen_kv = 390,
           .mod = {curved, curved_derivative, every_level()}};
    c.isa = test::host_isas().back();
    ThreadPool pool(threads);
    Problem first(c);
    first.run(pool);
    if (threads == 1) {
      dk = first.dk.bytes;
      dv = first.dv.bytes;
    }
    EXPECT_EQ(first.dk.bytes, dk);
    EXPECT_EQ(first.dv.bytes, dv);
    for (int i = 0; i < 5; ++i) {
      Problem again(c);
      again.run(pool);
      EXPECT_EQ(first.dq.bytes, again.dq.bytes);
      EXPECT_EQ(first.dk.bytes, again.dk.bytes);
      EXPECT_EQ(first.dv.bytes, again.dv.bytes);
      for (std::size_t t = 0; t < first.captured.size(); ++t)
        EXPECT_EQ(first.captured[t].bytes, again.captured[t].bytes) << t;
    }
  }
}

TEST_F(CpuBackward, BroadcastInputs) {
  for (const int isa : test::host_isas()) {
    Case c{.batch = 2, .num_heads = 2, .num_heads_kv = 2, .seqlen_q = 45, .seqlen_kv = 140, .isa = isa};
    c.mod = {curved, curved_derivative, {}};
    Problem problem(c);
    for (Tensor* t : {&problem.q, &problem.k, &problem.v, &problem.grad_out}) {
      t->view.stride[0] = t->view.stride[1] = 0;
    }
    problem.grad_out.view.stride[2] = 0;
    problem.forward();
    ThreadPool pool(1);
    problem.run(pool);
    problem.check();
  }
}

TEST_F(CpuBackward, NanStaysInWhatReadsIt) {
  // Query 3 of the first head: it spoils its own dq, and what its kept keys get.
  for (const int isa : test::host_isas()) {
    Case c{.num_heads = 2, .num_heads_kv = 2, .seqlen_q = 40, .seqlen_kv = 140, .isa = isa};
    c.mod.value = causal;
    Problem problem(c);
    problem.lse[problem.row_at(0, 0, 3)] = static_cast<float>(kNan);
    ThreadPool pool(1);
    problem.run(pool);
    for (std::int64_t i = 0; i < 40; ++i) EXPECT_EQ(std::isnan(problem.dq.get(0, 0, i, 5)), i == 3) << i;
    for (std::int64_t j = 0; j < 140; ++j) {
      EXPECT_EQ(std::isnan(problem.dk.get(0, 0, j, 5)), j <= 3) << j;
      EXPECT_EQ(std::isnan(problem.dv.get(0, 0, j, 5)), j <= 3) << j;
      EXPECT_FALSE(std::isnan(problem.dk.get(0, 1, j, 5))) << j;
    }
  }
}

TEST_F(CpuBackward, RowsThatKeepNothingContributeNothing) {
  // Whatever their o and grad_lse are.
  for (const int isa : test::host_isas()) {
    Case c{.seqlen_q = 50, .seqlen_kv = 140, .mod = {curved, curved_derivative, every_level()}, .isa = isa};
    Problem problem(c);
    for (std::int64_t i = 1; i < 50; i += 3) {
      ASSERT_EQ(problem.lse[problem.row_at(0, 0, i)], -kInf);
      for (std::int64_t d = 0; d < 16; ++d) problem.o.set(0, 0, i, d, kNan);
      problem.grad_lse[problem.row_at(0, 0, i)] = static_cast<float>(kNan);
    }
    ThreadPool pool(1);
    problem.run(pool);
    problem.check();
    for (std::int64_t d = 0; d < 16; ++d) EXPECT_EQ(problem.dq.get(0, 0, 4, d), 0.0);
  }
}

}  // namespace
}  // namespace attnjit::runtime
