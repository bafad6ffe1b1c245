// The forward in double precision.
#include "tests/numerics/oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>
#include <tuple>

#include "dsl/float32_row.h"
#include "dsl/interpreter.h"

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class Rows {
 public:
  explicit Rows(const Problem& problem)
      : problem_(problem),
        scores_(problem.score_mod.expr, problem.score_mod.views(), problem.mask_mod ? &problem.mask_mod->expr : nullptr,
                problem.mask_mod ? problem.mask_mod->views() : std::vector<dsl::CaptureView>()),
        score_mod_(problem.score_mod.expr, problem.score_mod.views()) {
    elements_.resize(static_cast<std::size_t>(problem.spec.seqlen_kv));
    eager_.resize(elements_.size());
  }

  GoldRow compute(const RowIndex& at) {
    load(at.b, problem_.head_kv(at.h));
    GoldRow row;
    row.at = at;
    score_elements(at);
    // The CPU's functions are not approximate.
    const double approximation = problem_.spec.device == "cuda"
                                     ? dsl::function_approximation(problem_.score_mod.expr, problem_.spec.dtype)
                                     : 0.0;
    const dsl::Float32Row reach(elements_, approximation);
    row.undecided = reach.undecided;
    row.poisoned = reach.poisoned;
    row.row_max = reach.maximum;
    row.row_max_lo = reach.maximum_lo;
    row.row_max_hi = reach.maximum_hi;
    // The score's 8 u are (8 + D / 8) u where tensor cores add its products.
    if (problem_.spec.device == "cuda" && problem_.spec.dtype != dsl::DType::kF32 && std::isfinite(row.row_max)) {
      const double more = static_cast<double>(problem_.spec.head_dim) / 64.0;
      row.row_max_lo -= more * (row.row_max - row.row_max_lo);
      row.row_max_hi += more * (row.row_max_hi - row.row_max);
    }
    const auto features = static_cast<std::size_t>(problem_.spec.head_dim_v);
    row.o.assign(features, 0.0);
    row.ideal = row.eager = row.bound = row.scatter = row.o;
    if (!row.undecided) finish(reach, &row);
    return row;
  }

 private:
  // Widens the keys and values of one head; rows come sorted, so that this happens once per head.
  void load(std::int64_t b, std::int64_t head) {
    if (loaded_ == std::pair(b, head)) return;
    loaded_ = {b, head};
    const Case& spec = problem_.spec;
    k_.clear();
    v_.clear();
    for (std::int64_t j = 0; j < spec.seqlen_kv; ++j) {
      for (std::int64_t d = 0; d < spec.head_dim; ++d) k_.push_back(problem_.k.at({b, head, j, d}));
      for (std::int64_t d = 0; d < spec.head_dim_v; ++d) v_.push_back(problem_.v.at({b, head, j, d}));
    }
  }

  void score_elements(const RowIndex& at) {
    const Case& spec = problem_.spec;
    const auto head_dim = static_cast<std::size_t>(spec.head_dim);
    std::vector<double> q(head_dim);
    for (std::int64_t d = 0; d < spec.head_dim; ++d) {
      q[static_cast<std::size_t>(d)] = problem_.q.at({at.b, at.h, at.q_idx, d});
    }
    const double scale = problem_.scale();
    for (std::size_t j = 0; j < elements_.size(); ++j) {
      double dot = 0.0, magnitude = 0.0;
      for (std::size_t d = 0; d < head_dim; ++d) {
        const double product = q[d] * k_[j * head_dim + d];
        dot += product;
        magnitude += std::fabs(product);
      }
      dsl::Point point{scale * dot, at.b, at.h, at.q_idx, static_cast<std::int64_t>(j)};
      elements_[j] = scores_.at(point, std::fabs(scale) * magnitude);
      if (!elements_[j].agree) {
        throw std::logic_error("two evaluations of the expressions differ at score " + std::to_string(point.score) +
                               ", b " + std::to_string(at.b) + ", h " + std::to_string(at.h) + ", q_idx " +
                               std::to_string(at.q_idx) + ", kv_idx " + std::to_string(j));
      }
      point.score = round_to(spec.dtype, point.score);
      eager_[j] = elements_[j].keep ? round_to(spec.dtype, score_mod_.score_mod(point).value) : -kInfinity;
    }
  }

  // As P enters the second product, but for a common factor: the eager path on a GPU rounds what softmax gives, a fused
  // kernel (and the CPU's eager path, in f32) what is divided by the sum later.
  double ideal_p(double p, double sum) const {
    const dsl::DType dtype = problem_.spec.dtype;
    const bool eager = problem_.spec.device == "cuda" && problem_.spec.backend == "math";
    return eager ? round_to(dtype, p / sum) * sum : round_to(dtype, p);
  }

  void finish(const dsl::Float32Row& reach, GoldRow* row) {
    if (row->poisoned) {
      row->lse = kNan;
      std::fill(row->o.begin(), row->o.end(), kNan);
      row->ideal = row->eager = row->o;
      return;
    }
    if (reach.empty()) {
      row->lse = -kInfinity;
      return;
    }
    row->lse = row->row_max + std::log(reach.sum);
    row->lse_bound = reach.lse_bound();
    const dsl::DType dtype = problem_.spec.dtype;
    double eager_sum = 0.0, eager_max = -kInfinity;
    std::vector<double> eager_p(elements_.size());
    for (const double eager : eager_) eager_max = std::max(eager_max, eager);
    for (std::size_t j = 0; j < elements_.size(); ++j) eager_sum += eager_p[j] = std::exp(eager_[j] - eager_max);
    const std::vector<double>& p = reach.p;
    const std::size_t features = row->o.size();
    for (std::size_t d = 0; d < features; ++d) {
      double o = 0.0, ideal = 0.0, eager = 0.0;
      for (std::size_t j = 0; j < elements_.size(); ++j) {
        if (!elements_[j].keep) continue;
        const double v = v_[j * features + d];
        o += p[j] * v;
        ideal += ideal_p(p[j], reach.sum) * v;
        eager += round_to(dtype, eager_p[j] / eager_sum) * v;
      }
      o /= reach.sum;
      dsl::FeatureSums sums;
      for (std::size_t j = 0; j < elements_.size(); ++j) sums.add(p[j], reach.change[j], v_[j * features + d], o);
      row->o[d] = o;
      row->ideal[d] = round_to(dtype, ideal / reach.sum);
      row->eager[d] = round_to(dtype, eager);
      row->scatter[d] = reach.scatter(sums);
      row->bound[d] = reach.o_bound(dtype, sums);
    }
  }

  const Problem& problem_;
  dsl::ModifiedScores scores_;
  dsl::Interpreter score_mod_;  // for eager math
  std::pair<std::int64_t, std::int64_t> loaded_{-1, -1};
  std::vector<double> k_, v_;
  std::vector<dsl::ModifiedScore> elements_;
  std::vector<double> eager_;  // modified scores as eager math rounds them
};

}  // namespace

std::vector<RowIndex> Gold::rows() const {
  std::vector<RowIndex> result;
  result.reserve(row.size());
  for (const GoldRow& each : row) result.push_back(each.at);
  return result;
}

std::vector<RowIndex> sample_rows(const Case& spec) {
  const std::int64_t total = spec.batch * spec.num_heads * spec.seqlen_q;
  std::set<std::tuple<std::int64_t, std::int64_t, std::int64_t>> chosen;
  const auto add = [&](std::int64_t flat) {
    chosen.insert(
        {flat / (spec.num_heads * spec.seqlen_q), flat / spec.seqlen_q % spec.num_heads, flat % spec.seqlen_q});
  };
  if (total <= spec.rows) {
    for (std::int64_t i = 0; i < total; ++i) add(i);
  } else {
    Random random(spec.seed ^ 0x726f7773);
    add(0);
    add(total - 1);
    // Rows around the edges of 32-row panels, each of another batch and head.
    for (std::int64_t edge = 0; edge < spec.seqlen_q && static_cast<std::int64_t>(chosen.size()) < spec.rows / 2;
         edge += 32) {
      for (const std::int64_t q_idx : {edge - 1, edge}) {
        if (q_idx < 0) continue;
        chosen.insert({random.between(0, spec.batch - 1), random.between(0, spec.num_heads - 1), q_idx});
      }
    }
    chosen.insert({spec.batch - 1, spec.num_heads - 1, 0});
    while (static_cast<std::int64_t>(chosen.size()) < spec.rows) add(random.between(0, total - 1));
  }
  std::vector<RowIndex> rows;
  rows.reserve(chosen.size());
  for (const auto& [b, h, q_idx] : chosen) rows.push_back({b, h, q_idx});
  return rows;
}

Gold compute_gold(const Problem& problem, const std::vector<RowIndex>& rows) {
  Gold gold;
  Rows oracle(problem);
  gold.row.reserve(rows.size());
  for (const RowIndex& at : rows) gold.row.push_back(oracle.compute(at));
  return gold;
}

}  // namespace attnjit::numerics
