// The eager backward against plain loops over the oracle's derivative, with every vector width and with and without a
// BLAS.
#include "runtime/math_backward.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "dsl/derivative.h"
#include "dsl/interpreter.h"
#include "tests/unit/math_testing.h"

namespace attnjit::runtime {
namespace {

using namespace cpu_testing;

constexpr std::uint32_t kAll = ~0u;

struct Wants {
  bool dq = true, dk = true, dv = true;
  std::uint32_t captures = kAll;  // of those with a floating type
  bool grad_lse = true;
};

// A sum and what it is judged by: the sum of its terms' magnitudes.
struct Sum {
  double value = 0.0, magnitude = 0.0;
  void add(double x, double size) {
    value += x;
    magnitude += std::fabs(size);
  }
};

// One problem with random inputs, its gradients and the oracle's.
class Problem : public MathProblem {
 public:
  explicit Problem(const Shape& shape)
      : MathProblem(shape),
        grad_out(shape.batch, shape.heads, shape.seqlen_q, shape.head_dim_v, shape.dtype, shape.layout),
        grad_lse(static_cast<std::size_t>(shape.batch * shape.heads * shape.seqlen_q)),
        dq(0, 0, 0, 0, shape.dtype, shape.layout),
        dk(dq),
        dv(dq),
        o_(dq) {
    std::uniform_int_distribution<int> value(-256, 256);
    grad_out.fill([&] { return value(random_) / 256.0; });
    for (float& x : grad_lse) x = static_cast<float>(value(random_)) / 256.0f;
  }

  // Computes the gradients of `score_mod` and judges every element; returns the first complaint, empty when all is
  // well. `spoil` may falsify them before they are judged.
  std::string check(const std::string& score_mod, const std::string& mask_mod = "", const MathOptions& options = {},
                    const Wants& wants = {}, int threads = 2, void (*spoil)(Problem& problem) = nullptr) {
    if (std::string error = bind(score_mod, mask_mod); !error.empty()) return error;
    forward();
    Gradients gradients;
    const WantedGradients wanted = prepare(wants, &gradients);
    const MathBackwardPlan plan(call_, wanted, score_, mask_ ? &*mask_ : nullptr, options);
    description = plan.describe();
    GuardedWorkspace workspace(plan.workspace_size());
    ThreadPool pool(threads);
    plan.run(call_, gradients, workspace.data(), pool);
    if (!workspace.intact()) return "wrote outside its workspace";
    for (const Tensor* tensor : {&dq, &dk, &dv}) {
      if (!tensor->untouched_between()) return "wrote between the rows of a gradient";
    }
    if (spoil != nullptr) spoil(*this);
    return judge(wants);
  }

  // Everywhere and in every way of computing it.
  void check_all(const std::string& score_mod, const std::string& mask_mod = "", const Wants& wants = {}) {
    for (const MathOptions& options : all_options()) {
      EXPECT_EQ(check(score_mod, mask_mod, options, wants), "")
          << score_mod << " mask " << mask_mod << ", " << options.passes->isa
          << (options.blas ? " with BLAS" : " without BLAS") << "\n"
          << description;
    }
  }

  // Of the capture of that name, as the last check computed it.
  double captured_gradient(const std::string& name, std::size_t element) const {
    const std::size_t number = number_of(name);
    return dsl::read_as_double(captured_data_[number].data(), views_[number].dtype,
                               static_cast<std::int64_t>(3 * element));
  }
  void set_captured_gradient(const std::string& name, std::size_t element, double value) {
    const std::size_t number = number_of(name);
    write_element(captured_data_[number].data(), views_[number].dtype, static_cast<std::int64_t>(3 * element), value);
  }

  std::string description;
  Tensor grad_out;
  std::vector<float> grad_lse;
  Tensor dq, dk, dv;

 private:
  std::size_t number_of(const std::string& name) const {
    std::size_t number = 0;
    while (score_.captures[number].name != name) ++number;
    return number;
  }

  std::size_t row_of(std::int64_t b, std::int64_t h, std::int64_t i) const {
    return static_cast<std::size_t>((b * shape_.heads + h) * shape_.seqlen_q + i);
  }

  // The modified scores of a row; -inf where dropped.
  std::vector<double> modified(std::int64_t b, std::int64_t h, std::int64_t i) {
    std::vector<double> m(static_cast<std::size_t>(shape_.seqlen_kv));
    for (std::size_t j = 0; j < m.size(); ++j) {
      const dsl::Point point = this->point(b, h, i, static_cast<std::int64_t>(j));
      const dsl::Element element = interpreter_->score_mod(point);
      const bool keep = element.keep && (!mask_interpreter_ || mask_interpreter_->mask_mod(point));
      m[j] = keep ? element.value : -kInf;
      if (std::fabs(m[j]) > std::numeric_limits<float>::max()) m[j] = std::copysign(kInf, m[j]);
    }
    return m;
  }

  dsl::Point point(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j) const {
    double score = 0.0;
    const std::int64_t h_kv = h / (shape_.heads / shape_.heads_kv);
    for (std::int64_t d = 0; d < shape_.head_dim; ++d) score += q.get(b, h, i, d) * k.get(b, h_kv, j, d);
    return {score * static_cast<double>(shape_.scale), b, h, i, j};
  }

  // o and lse, in double and rounded, are the backward's inputs.
  void forward() {
    interpreter_ = std::make_unique<dsl::Interpreter>(score_, views_);
    mask_interpreter_ = mask_ ? std::make_unique<dsl::Interpreter>(*mask_, views_) : nullptr;
    const Shape::Layout layout = shape_.layout == Shape::kOverlapping ? Shape::kPacked : shape_.layout;
    o_ = Tensor(shape_.batch, shape_.heads, shape_.seqlen_q, shape_.head_dim_v, shape_.dtype, layout);
    lse_.assign(static_cast<std::size_t>(shape_.batch * shape_.heads * shape_.seqlen_q), 0.0f);
    for (std::int64_t b = 0; b < shape_.batch; ++b) {
      for (std::int64_t h = 0; h < shape_.heads; ++h) {
        const std::int64_t h_kv = h / (shape_.heads / shape_.heads_kv);
        for (std::int64_t i = 0; i < shape_.seqlen_q; ++i) {
          const std::vector<double> m = modified(b, h, i);
          double maximum = -kInf, sum = 0.0;
          bool has_nan = false;
          for (double x : m) {
            maximum = std::max(maximum, x);
            has_nan |= std::isnan(x);
          }
          const bool empty = maximum == -kInf && !has_nan;
          for (double x : m) sum += empty ? 0.0 : std::exp(x - maximum);
          lse_[row_of(b, h, i)] = static_cast<float>(empty ? -kInf : maximum + std::log(sum));
          for (std::int64_t d = 0; d < shape_.head_dim_v; ++d) {
            double value = 0.0;
            for (std::size_t j = 0; j < m.size(); ++j) {
              const double p = empty ? 0.0 : std::exp(m[j] - maximum) / sum;
              if (p != 0.0) value += p * v.get(b, h_kv, static_cast<std::int64_t>(j), d);
            }
            // Kept to what write_element() can round.
            o_.set(b, h, i, d, shape_.dtype == DType::kF32 ? value : std::nearbyint(value * 256.0) / 256.0);
          }
        }
      }
    }
    call_.q = q.view();
    call_.k = k.view();
    call_.v = v.view();
    call_.o = o_.view();
    call_.lse = {lse_.data(), {shape_.heads * shape_.seqlen_q, shape_.seqlen_q, 1}};
    call_.scale = shape_.scale;
  }

  WantedGradients prepare(const Wants& wants, Gradients* gradients) {
    const Shape::Layout layout = shape_.layout == Shape::kOverlapping ? Shape::kPacked : shape_.layout;
    dq = Tensor(shape_.batch, shape_.heads, shape_.seqlen_q, shape_.head_dim, shape_.dtype, layout);
    dk = Tensor(shape_.batch, shape_.heads_kv, shape_.seqlen_kv, shape_.head_dim, shape_.dtype, layout);
    dv = Tensor(shape_.batch, shape_.heads_kv, shape_.seqlen_kv, shape_.head_dim_v, shape_.dtype, layout);
    gradients->grad_out = grad_out.view();
    if (wants.grad_lse) {
      gradients->grad_lse = {grad_lse.data(), {shape_.heads * shape_.seqlen_q, shape_.seqlen_q, 1}};
    }
    WantedGradients wanted{.dq = wants.dq, .dk = wants.dk, .dv = wants.dv};
    if (wants.dq) gradients->dq = dq.view();
    if (wants.dk) gradients->dk = dk.view();
    if (wants.dv) gradients->dv = dv.view();
    captured_data_.assign(views_.size(), {});
    for (std::size_t n = 0; n < views_.size(); ++n) {
      const dsl::CaptureView& view = views_[n];
      if (!is_wanted(wants, n)) continue;
      wanted.captures |= 1u << n;
      std::int64_t stride = 3;  // every third element, NaN between
      for (int d = view.rank - 1; d >= 0; --d) {
        gradients->captures[n].stride[d] = stride;
        stride *= view.extent[d];
      }
      captured_data_[n].assign(static_cast<std::size_t>(stride * dsl::dtype_size(view.dtype)), static_cast<char>(0xff));
      gradients->captures[n].data = captured_data_[n].data();
    }
    return wanted;
  }

  bool is_wanted(const Wants& wants, std::size_t capture) const {
    return (wants.captures >> capture & 1) != 0 && dsl::value_type(views_[capture].dtype) == dsl::Type::kFloat;
  }

  std::string judge(const Wants& wants) {
    dsl::Derivative derivative(score_, views_);
    std::vector<std::vector<Sum>> captured;
    for (const dsl::CaptureView& view : views_) {
      std::size_t elements = 1;
      for (int d = 0; d < view.rank; ++d) elements *= static_cast<std::size_t>(view.extent[d]);
      captured.emplace_back(elements);
    }
    const std::int64_t group = shape_.heads / shape_.heads_kv;
    for (std::int64_t b = 0; b < shape_.batch; ++b) {
      for (std::int64_t h_kv = 0; h_kv < shape_.heads_kv; ++h_kv) {
        std::vector<Sum> sums_k(static_cast<std::size_t>(shape_.seqlen_kv * shape_.head_dim));
        std::vector<Sum> sums_v(static_cast<std::size_t>(shape_.seqlen_kv * shape_.head_dim_v));
        for (std::int64_t h = h_kv * group; h < (h_kv + 1) * group; ++h) {
          for (std::int64_t i = 0; i < shape_.seqlen_q; ++i) {
            std::vector<Sum> sums_q(static_cast<std::size_t>(shape_.head_dim));
            add_row(wants, derivative, b, h, i, &sums_q, &sums_k, &sums_v, &captured);
            for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
              const std::string place = place_of("dq", b, h, i, d);
              const Sum& sum = sums_q[static_cast<std::size_t>(d)];
              if (std::string error = compare(wants.dq, place, dq.get(b, h, i, d), sum, shape_.dtype); !error.empty())
                return error;
            }
          }
        }
        for (std::int64_t j = 0; j < shape_.seqlen_kv; ++j) {
          for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
            const Sum& sum = sums_k[static_cast<std::size_t>(j * shape_.head_dim + d)];
            const std::string place = place_of("dk", b, h_kv, j, d);
            if (std::string error = compare(wants.dk, place, dk.get(b, h_kv, j, d), sum, shape_.dtype); !error.empty())
              return error;
          }
          for (std::int64_t d = 0; d < shape_.head_dim_v; ++d) {
            const Sum& sum = sums_v[static_cast<std::size_t>(j * shape_.head_dim_v + d)];
            const std::string place = place_of("dv", b, h_kv, j, d);
            if (std::string error = compare(wants.dv, place, dv.get(b, h_kv, j, d), sum, shape_.dtype); !error.empty())
              return error;
          }
        }
      }
    }
    for (std::size_t n = 0; n < views_.size(); ++n) {
      if (!is_wanted(wants, n)) continue;
      for (std::size_t i = 0; i < captured[n].size(); ++i) {
        const double got =
            dsl::read_as_double(captured_data_[n].data(), views_[n].dtype, static_cast<std::int64_t>(3 * i));
        const std::string place = "gradient of " + score_.captures[n].name + " at " + std::to_string(i);
        if (std::string error = compare(true, place, got, captured[n][i], views_[n].dtype); !error.empty())
          return error;
      }
    }
    return "";
  }

  void add_row(const Wants& wants, dsl::Derivative& derivative, std::int64_t b, std::int64_t h, std::int64_t i,
               std::vector<Sum>* sums_q, std::vector<Sum>* sums_k, std::vector<Sum>* sums_v,
               std::vector<std::vector<Sum>>* captured) {
    const std::int64_t h_kv = h / (shape_.heads / shape_.heads_kv);
    const std::size_t row = row_of(b, h, i);
    const double lse = static_cast<double>(lse_[row]);
    if (lse == -kInf) return;
    const double scale = static_cast<double>(shape_.scale);
    Sum delta;
    for (std::int64_t d = 0; d < shape_.head_dim_v; ++d) {
      const double x = grad_out.get(b, h, i, d) * o_.get(b, h, i, d);
      delta.add(x, x);
    }
    if (wants.grad_lse) delta.add(-static_cast<double>(grad_lse[row]), static_cast<double>(grad_lse[row]));
    const std::vector<double> m = modified(b, h, i);
    for (std::size_t column = 0; column < m.size(); ++column) {
      const auto j = static_cast<std::int64_t>(column);
      const double p = m[column] == -kInf ? 0.0 : std::exp(m[column] - lse);
      if (p < 0x1p-126) continue;
      const double m_size = 1.0 + std::fabs(m[column]);
      Sum dp;
      for (std::int64_t d = 0; d < shape_.head_dim_v; ++d) {
        const double go = grad_out.get(b, h, i, d);
        (*sums_v)[static_cast<std::size_t>(j * shape_.head_dim_v + d)].add(p * go, p * go * m_size);
        const double x = go * v.get(b, h_kv, j, d);
        dp.add(x, x);
      }
      const double dm = p * (dp.value - delta.value);
      const double dm_size = p * (dp.magnitude + delta.magnitude) * m_size;
      const dsl::ElementGradient gradient = derivative.at(point(b, h, i, j), dm);
      // What a derivative is rounded by is not less than what one of 1 is.
      const double ds_size = std::fabs(gradient.dscore) / std::fabs(dm) * dm_size + dm_size;
      for (std::int64_t d = 0; d < shape_.head_dim; ++d) {
        const double x = q.get(b, h, i, d), y = k.get(b, h_kv, j, d);
        const double ds = gradient.dscore * scale;
        if (ds != 0.0) (*sums_q)[static_cast<std::size_t>(d)].add(ds * y, ds_size * scale * y);
        if (ds != 0.0) (*sums_k)[static_cast<std::size_t>(j * shape_.head_dim + d)].add(ds * x, ds_size * scale * x);
      }
      for (const dsl::Contribution& contribution : gradient.contributions) {
        const auto n = static_cast<std::size_t>(contribution.capture);
        std::int64_t place = 0;
        for (int d = 0; d < views_[n].rank; ++d) place = place * views_[n].extent[d] + contribution.index[d];
        const double size = std::fabs(contribution.value) / std::fabs(dm) * dm_size + dm_size;
        (*captured)[n][static_cast<std::size_t>(place)].add(contribution.value, size);
      }
    }
  }

  static std::string place_of(const char* name, std::int64_t b, std::int64_t h, std::int64_t s, std::int64_t d) {
    return std::string(name) + " of b " + std::to_string(b) + " h " + std::to_string(h) + " s " + std::to_string(s) +
           " d " + std::to_string(d);
  }

  // The complaint. What is not wanted is still what it was, bytes of 0xff.
  static std::string compare(bool wanted, const std::string& place, double got, const Sum& expected, DType dtype) {
    const double unit = dtype == DType::kF32 ? 0x1p-24 : dtype == DType::kF16 ? 0x1p-11 : 0x1p-8;
    const double least = dtype == DType::kF16 ? 0x1p-25 : 0x1p-126;
    const double tolerance = unit * std::fabs(expected.value) + 64 * 0x1p-24 * expected.magnitude + least;
    const double value = wanted ? expected.value : kNaN;
    if (near(got, value, tolerance)) return "";
    return place + " is " + std::to_string(got) + ", expected " + std::to_string(value) + " +- " +
           std::to_string(tolerance);
  }

  std::unique_ptr<dsl::Interpreter> interpreter_, mask_interpreter_;
  Tensor o_;
  std::vector<float> lse_;
  std::vector<std::vector<char>> captured_data_;
};

TEST(MathBackward, PlainMods) {
  Problem problem({});
  for (const char* text : {"score", "score + (q_idx - kv_idx)", "score * 2.5 - 1", "score * (h + 1)", "-score", "7.0",
                           "score / (1 + kv_idx)", "score * 0", "3 - score"}) {
    problem.check_all(text);
  }
}

TEST(MathBackward, FloatFunctions) {
  Problem problem({.scale = 2.0f});
  for (const char* text : {"exp(score/4)",
                           "exp2(score/3)",
                           "log(abs(score) + 0.5)",
                           "log2(score*score + 1)",
                           "log1p(score*score)",
                           "sqrt(abs(score) + 0.25)",
                           "rsqrt(score*score + 0.5)",
                           "tanh(score)",
                           "20*tanh(score/20)",
                           "sigmoid(score)",
                           "silu(score)",
                           "gelu(score)",
                           "erf(score)",
                           "sin(score)",
                           "cos(3*score)",
                           "score ** 2",
                           "abs(score) ** 1.5",
                           "(score*score + 0.5) ** (0.25*score)",
                           "2.0 ** score",
                           "score / (2 + score*score)",
                           "let t = tanh(score); t * t + t",
                           "let a = score + 1; let c = a * a; c / (1 + c) + a",
                           "score * score * score"}) {
    problem.check_all(text);
  }
}

TEST(MathBackward, Kinks) {
  Problem problem({.scale = 2.0f});
  // Scores of exactly 0, which are ties of several of these.
  for (std::int64_t j = 3; j < 9; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) problem.k.set(1, 0, j, d, 0.0);
  }
  for (const char* text : {"relu(score)",
                           "abs(score)",
                           "floor(score*1.7)",
                           "score - ceil(score*1.7)",
                           "score * round(score*1.7)",
                           "score + sign(score)",
                           "min(score, 0.5)",
                           "max(score, 0.0)",
                           "max(score, -score)",
                           "max(score, 2*score, 0)",
                           "min(score, kv_idx/10)",
                           "clamp(score, -1, 1)",
                           "clamp(score, 0, 1)",
                           "clamp(score, h - 2, 1.5)",
                           "clamp(0.5, score, 2*score)",
                           "clamp(score, 2*score, 0.25)",
                           "clamp(2*score, 0.5, score)",
                           "score % 0.75",
                           "4 % (score*score + 0.25)",
                           "score + score // 0.75",
                           "where(score > 0.25, score, 0.5*score)",
                           "where(isnan(log(score)), 1.0, 2*score)",
                           "int(score * 2.3) * score",
                           "where(bool(score), score * score, -score)"}) {
    problem.check_all(text);
  }
}

TEST(MathBackward, Masks) {
  Problem problem({});
  problem.capture("bias", DType::kF32, {37}, random_values(37, -16, 16, 0.125));
  for (const char* text :
       {"where(q_idx >= kv_idx, score + bias[kv_idx], -inf)",
        "score * bias[kv_idx] + where(abs(q_idx - kv_idx) < 4, 0, -inf)",
        "where(kv_idx < 5, where(q_idx > 3, score * score, -inf), bias[q_idx])",
        "min(score, where(kv_idx % 3 == 1, 5.0, -inf))", "2 * where(q_idx >= kv_idx, score, -inf)",
        "where(score > 0, score, -inf)", "where(q_idx > 100, score, -inf)", "where(h == 2, -inf, score)",
        "let none = -inf; where(q_idx >= kv_idx, score, none) + tanh(where(kv_idx > 3, bias[kv_idx], none))",
        "tanh(where(b == 0, score, -inf)) + score"}) {
    problem.check_all(text);
  }
  problem.check_all("score * score", "q_idx >= kv_idx");
  problem.check_all("score * bias[q_idx]", "(kv_idx + q_idx) % 2 == 0 and not (h == 3)");
  problem.check_all("score + where(kv_idx < 7, 0, -inf)", "q_idx >= kv_idx");
  problem.check_all("score", "b == 1");
}

TEST(MathBackward, CapturedGradients) {
  Problem problem({});
  problem.capture("head", DType::kF32, {4}, {-0.5, -0.25, 0.125, 0.75});
  problem.capture("bias", DType::kBF16, {2, 4, 19, 37}, random_values(2 * 4 * 19 * 37, -128, 128, 1.0 / 128));
  problem.capture("plane", DType::kF16, {19, 37}, random_values(19 * 37, -128, 128, 1.0 / 64));
  problem.capture("keys", DType::kF32, {37}, random_values(37, -16, 16, 0.0625));
  problem.capture("queries", DType::kF32, {19}, random_values(19, -16, 16, 0.0625));
  problem.capture("table", DType::kF32, {17}, random_values(17, -16, 16, 0.125));
  problem.capture("factor", DType::kF32, {}, {0.75});
  problem.capture("half_factor", DType::kBF16, {}, {0.5});
  problem.capture("offset", DType::kInt32, {19}, random_values(19, -3, 19, 1));
  for (const char* text : {"score + bias[b, h, q_idx, kv_idx]",
                           "score + plane[q_idx, kv_idx]",
                           "score + keys[kv_idx]",
                           "score * queries[q_idx]",
                           "score + table[abs(q_idx - kv_idx)]",
                           "score + table[clamp(q_idx - kv_idx + 8, 0, 16)]",
                           "score * table[offset[q_idx]]",
                           "score * sigmoid(head[h])",
                           "score * factor + half_factor * kv_idx",
                           "queries[q_idx] * score + keys[kv_idx]",
                           "queries[q_idx] * keys[kv_idx]",
                           "table[q_idx] * score + table[kv_idx]",
                           "score + table[int(score * 3) + 4]",
                           "let t = keys[kv_idx]; t * t * score + exp(t)",
                           "tanh(score * factor) + log(1 + exp(head[h] * kv_idx / 8))",
                           "max(score, keys[kv_idx] * head[h])",
                           "where(score > factor, score, score * half_factor)",
                           "let t = factor * queries[q_idx]; score * t + t * keys[kv_idx]",
                           "score + plane[q_idx - 30, kv_idx * 2]",
                           "score + head[b] * bias[b, h, 3, kv_idx] * queries[q_idx]"}) {
    problem.check_all(text);
  }
  problem.check_all("score + factor * keys[kv_idx]", "queries[q_idx] > 0 or kv_idx < 20");
}

TEST(MathBackward, RowShifts) {
  Problem problem({});
  problem.capture("queries", DType::kF32, {19}, random_values(19, -16, 16, 0.0625));
  problem.capture("head", DType::kF32, {4}, {-0.5, -0.25, 0.125, 0.75});
  problem.capture("more", DType::kF32, {4}, {-0.5, -0.25, 0.125, 0.75});
  problem.capture("factor", DType::kF32, {}, {0.75});
  problem.capture("offset", DType::kInt32, {19}, random_values(19, 0, 18, 1));
  for (const char* text :
       {"score + queries[q_idx]", "score + 2 * head[h] + factor", "score - queries[q_idx] * head[h]",
        "score + exp(head[h]) * (q_idx - 3) / factor", "score + where(q_idx > 3, queries[q_idx], 0)",
        "score + max(head[h], factor) - clamp(queries[q_idx], -0.5, 0.5)",
        "where(q_idx >= kv_idx, score + queries[q_idx], -inf)", "score + queries[q_idx] + where(kv_idx < 9, 0, -inf)",
        "score * more[h] + head[h]", "let t = head[h]; score + t * t", "score + queries[offset[q_idx]]"}) {
    problem.check_all(text);  // the gradient of lse alone
    ASSERT_EQ(problem.check(text, "", {}, {.grad_lse = false}), "") << text;
    const std::string t = text;
    if (t.find("queries[") != std::string::npos) {
      for (std::size_t i = 0; i < 19; ++i) EXPECT_EQ(problem.captured_gradient("queries", i), 0.0) << text;
    }
    if (t.find("head[") != std::string::npos) {
      for (std::size_t i = 0; i < 4; ++i) EXPECT_EQ(problem.captured_gradient("head", i), 0.0) << text;
    }
    if (t.find("factor") != std::string::npos) EXPECT_EQ(problem.captured_gradient("factor", 0), 0.0) << text;
  }
  // Beside a part that is none, a part that is one adds nothing.
  problem.check_all("let t = head[h]; score * t + t");
  problem.check_all("let t = queries[q_idx]; max(score, t) + t", "q_idx >= kv_idx");
}

TEST(MathBackward, WhatIsNotChosenContributesNothing) {
  Problem problem({});
  problem.capture("bias", DType::kF32, {37}, [] {
    std::vector<double> values(37, 0.5);
    values[3] = -kInf;
    values[5] = kNaN;
    values[30] = 0.0;
    return values;
  }());
  problem.capture("row", DType::kF32, {19}, [] {
    std::vector<double> values(19, 0.5);
    values[3] = 0.0;
    values[5] = kNaN;
    return values;
  }());
  for (std::int64_t j = 3; j < 9; ++j) {
    for (std::int64_t d = 0; d < 16; ++d) problem.k.set(1, 0, j, d, 0.0);
  }
  for (const char* text : {"where(score > 0, log(score), score)", "where(score == 0, score, 1/score) / 8",
                           "where(kv_idx < 3 or kv_idx > 5, score * bias[kv_idx], score)",
                           "where(kv_idx < 3 or kv_idx > 5, score + bias[kv_idx], -inf)",
                           "where(bias[kv_idx] > 0, score * sqrt(bias[kv_idx]), score)",
                           "where(q_idx == 3 or q_idx == 5, score, score + log(row[q_idx]))",
                           "score + where(q_idx == 3 or q_idx == 5, 0, 1/row[q_idx])"}) {
    problem.check_all(text);
  }
  problem.check_all("score * bias[kv_idx]", "kv_idx > 5");
  problem.check_all("score + 1/row[q_idx]", "q_idx != 3 and q_idx != 5");
}

TEST(MathBackward, NonFiniteScoresStayWhereTheyAre) {
  Problem problem({.batch = 2, .heads = 2, .heads_kv = 2, .seqlen_q = 20, .seqlen_kv = 40});
  // A dropped value that is not finite; the row's other elements are as they would be.
  problem.capture("poison", DType::kF32, {40}, [] {
    std::vector<double> values(40, 0.25);
    values[12] = kNaN;
    values[15] = kInf;
    return values;
  }());
  problem.check_all("score * poison[kv_idx]", "kv_idx != 12 and kv_idx != 15");
  problem.check_all("where(kv_idx == 12 or kv_idx == 15, -inf, score) + poison[kv_idx]");
  problem.check_all("where(kv_idx == 12, -inf, tanh(score)) + where(kv_idx == 15, -inf, 0) + poison[kv_idx] * score");
}

TEST(MathBackward, Shapes) {
  for (const Shape& shape : std::vector<Shape>{
           {.batch = 1, .heads = 1, .heads_kv = 1, .seqlen_q = 1, .seqlen_kv = 1, .head_dim = 1, .head_dim_v = 1},
           {.seqlen_q = 1, .seqlen_kv = 300},
           {.seqlen_q = 70, .seqlen_kv = 1},
           {.batch = 1, .heads = 6, .heads_kv = 1, .seqlen_q = 33, .seqlen_kv = 65, .head_dim = 24, .head_dim_v = 40},
           {.batch = 3, .heads = 2, .heads_kv = 2, .seqlen_q = 64, .seqlen_kv = 40, .head_dim = 64, .head_dim_v = 64},
           {.batch = 1, .heads = 1, .heads_kv = 1, .seqlen_q = 130, .seqlen_kv = 265, .head_dim = 7, .head_dim_v = 3},
           {.layout = Shape::kHeadsInside},
           {.layout = Shape::kPadded},
           {.layout = Shape::kOverlapping},
           {.dtype = DType::kBF16},
           {.dtype = DType::kF16},
           {.dtype = DType::kBF16, .layout = Shape::kPadded},
           {.dtype = DType::kF16, .layout = Shape::kHeadsInside},
           {.scale = 0.25f},
           {.scale = -1.5f},
           {.scale = 0.0f}}) {
    Problem problem(shape);
    problem.capture("table", DType::kF32, {23}, random_values(23, -16, 16, 0.125));
    problem.capture("head", DType::kF32, {6}, random_values(6, -16, 16, 0.125));
    for (const char* text : {"score", "where(q_idx >= kv_idx, score * head[h] + table[q_idx - kv_idx], -inf)",
                             "2*tanh(score/2) + table[kv_idx]"}) {
      problem.check_all(text);
    }
  }
}

TEST(MathBackward, EachGradientIsOptional) {
  Problem problem({});
  problem.capture("table", DType::kF32, {23}, random_values(23, -16, 16, 0.125));
  problem.capture("head", DType::kF32, {6}, random_values(6, -16, 16, 0.125));
  const char* text = "score * head[h] + table[kv_idx]";
  problem.check_all(text, "", {.dk = false, .dv = false, .captures = 0});
  problem.check_all(text, "", {.dq = false, .dv = false, .captures = 0});
  problem.check_all(text, "", {.dq = false, .dk = false, .captures = 0});
  problem.check_all(text, "", {.dq = false, .dk = false, .dv = false, .captures = 1});
  problem.check_all(text, "", {.dq = false, .dk = false, .dv = false, .captures = 2});
  problem.check_all(text, "", {.dq = false, .dk = false, .dv = false, .captures = 0});
  problem.check_all(text, "", {.grad_lse = false});
  // Nothing is computed that is not needed.
  ASSERT_EQ(problem.check(text, "", {}, {.dq = false, .dk = false, .captures = 0}), "");
  EXPECT_EQ(problem.description.find("grad_out v^T"), std::string::npos) << problem.description;
  ASSERT_EQ(problem.check("score", "", {}, {.dk = false, .dv = false}), "");
  EXPECT_EQ(problem.description.find("p^T"), std::string::npos) << problem.description;
}

TEST(MathBackward, AdjointsHaveBroadcastShapes) {
  Problem problem({});
  problem.capture("slope", DType::kF32, {4}, {1, 2, 3, 4});
  ASSERT_EQ(problem.check("score + exp(slope[h]) * (q_idx - kv_idx)"), "");
  EXPECT_NE(problem.description.find("sum: float (4)\ngradient: float (4)\nadd to the gradient"), std::string::npos)
      << problem.description;
  // The score is only added to: its gradient is the modified score's.
  ASSERT_EQ(problem.check("score + h"), "");
  EXPECT_NE(problem.description.find("gradient of the modified scores: float (2, 4, 19, 37)\nds k\n"),
            std::string::npos)
      << problem.description;
}

TEST(MathBackward, LargeCapturesAreAddedUpInFewerParts) {
  Problem problem({.batch = 1, .heads = 1, .heads_kv = 1, .seqlen_q = 9, .seqlen_kv = 33});
  problem.capture("grid", DType::kF32, {700, 900}, std::vector<double>(700 * 900, 0.125));
  EXPECT_EQ(problem.check("score * grid[q_idx, kv_idx] + grid[q_idx * 77, kv_idx * 27] * grid[q_idx, 3]"), "");
}

TEST(MathBackward, TwoRunsGiveTheSameBits) {
  Problem problem({.batch = 1, .heads = 3, .heads_kv = 1, .seqlen_q = 70, .seqlen_kv = 131});
  problem.capture("table", DType::kF32, {23}, random_values(23, -16, 16, 0.125));
  problem.capture("factor", DType::kF32, {}, {0.75});
  std::vector<double> first;
  for (int run = 0; run < 5; ++run) {
    ASSERT_EQ(problem.check("where(q_idx >= kv_idx, factor * tanh(score) + table[kv_idx // 8], -inf)", "", {}, {}, 3),
              "");
    std::vector<double> all = {problem.captured_gradient("factor", 0)};
    for (std::size_t i = 0; i < 23; ++i) all.push_back(problem.captured_gradient("table", i));
    for (std::int64_t j = 0; j < 131; ++j) all.push_back(problem.dk.get(0, 0, j, 3));
    if (run == 0) first = all;
    EXPECT_EQ(all, first);
  }
}

TEST(MathBackward, JudgeRejectsWrongResults) {
  Problem problem({});
  problem.capture("table", DType::kF32, {23}, random_values(23, -16, 16, 0.125));
  const auto check = [&](void (*spoil)(Problem&)) {
    return problem.check("score + table[kv_idx]", "", {}, {}, 1, spoil);
  };
  EXPECT_EQ(check([](Problem&) {}), "");
  EXPECT_NE(check([](Problem& p) { p.dq.set(1, 2, 3, 4, p.dq.get(1, 2, 3, 4) * 1.005); }), "");
  EXPECT_NE(check([](Problem& p) { p.dk.set(1, 1, 20, 4, p.dk.get(1, 1, 20, 4) * 0.995); }), "");
  EXPECT_NE(check([](Problem& p) { p.dv.set(0, 1, 36, 7, 0.0); }), "");
  EXPECT_NE(check([](Problem& p) { p.dq.set(0, 0, 0, 0, kNaN); }), "");
  EXPECT_NE(check([](Problem& p) { p.set_captured_gradient("table", 22, 0.0); }), "");
}

// Of every pass, at every length around a vector's and with operands that do or do not advance.
TEST(MathBackward, ZeroGradientsStayZero) {
  const float bad[] = {static_cast<float>(kNaN), static_cast<float>(kInf), static_cast<float>(-kInf), 0.0f, -1.0f};
  for (const MathOptions& options : MathProblem::all_options()) {
    for (int pass = 0; pass <= static_cast<int>(GradientPass::kScore); ++pass) {
      if (pass == static_cast<int>(GradientPass::kProbability)) continue;
      const ElementwiseFn function = options.passes->gradient(static_cast<GradientPass>(pass));
      for (const float value : bad) {
        for (std::int64_t n = 1; n < 40; n += 6) {
          for (int step = 0; step < 2; ++step) {
            const std::vector<float> zeros(static_cast<std::size_t>(n)), x(static_cast<std::size_t>(n), value);
            std::vector<float> out(static_cast<std::size_t>(n + 1), 77.0f);
            function({.out = out.data(),
                      .in = {zeros.data(), x.data(), x.data(), x.data()},
                      .step = {1, step, 1 - step, step},
                      .n = n});
            for (std::int64_t i = 0; i < n; ++i) {
              ASSERT_EQ(out[static_cast<std::size_t>(i)], 0.0f) << pass << " " << value << " " << options.passes->isa;
            }
            ASSERT_EQ(out.back(), 77.0f) << pass;
          }
        }
      }
    }
  }
}

TEST(MathBackward, Probabilities) {
  for (const MathOptions& options : MathProblem::all_options()) {
    const ElementwiseFn function = options.passes->gradient(GradientPass::kProbability);
    const auto inf = static_cast<float>(kInf), nan = static_cast<float>(kNaN);
    const struct {
      float m, lse;
      std::uint8_t keep;
      float expected;
    } rows[] = {{1.0f, 1.0f, 1, 1.0f},   {1.0f, 1.0f, 0, 0.0f}, {-inf, 1.0f, 1, 0.0f}, {-inf, nan, 1, 0.0f},
                {2.0f, -inf, 1, 0.0f},   {nan, 1.0f, 0, 0.0f},  {inf, nan, 0, 0.0f},   {nan, 1.0f, 1, nan},
                {-90.0f, 0.0f, 1, 0.0f}, {nan, -inf, 1, 0.0f}};
    for (const auto& row : rows) {
      for (int n : {1, 5, 16, 21}) {
        const auto size = static_cast<std::size_t>(n);
        const std::vector<float> m(size, row.m), lse(size, row.lse);
        const std::vector<std::uint8_t> keep(size, row.keep);
        std::vector<float> out(size);
        for (int step = 0; step < 2; ++step) {
          function({.out = out.data(), .in = {m.data(), lse.data(), keep.data()}, .step = {1, step, step}, .n = n});
          for (float p : out) {
            ASSERT_TRUE(p == row.expected || (std::isnan(p) && std::isnan(row.expected))) << row.m << " " << row.lse;
          }
        }
      }
    }
  }
}

TEST(MathBackward, TooLargeToAddress) {
  ForwardCall call;
  for (TensorView* tensor : {&call.q, &call.k, &call.v}) {
    tensor->shape[0] = tensor->shape[1] = 2;
    tensor->shape[2] = std::int64_t{1} << 40;
    tensor->shape[3] = 16;
  }
  auto expr = dsl::bind(*dsl::parse("score"), {}, dsl::ModKind::kScoreMod);
  EXPECT_EQ(MathBackwardPlan(call, {.dq = true}, *expr, nullptr).workspace_size(),
            std::numeric_limits<std::size_t>::max());
}

}  // namespace
}  // namespace attnjit::runtime
