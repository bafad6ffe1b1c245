// The forward in double precision.
#include "tests/numerics/oracle.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <optional>
#include <set>
#include <stdexcept>
#include <tuple>

#include "dsl/interpreter.h"
#include "tests/numerics/float32_interval.h"

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// The row is left out when float32 may move this share of its probability.
constexpr double kUndecided = 0x1p-7;

// Both evaluations of one expression.
class Mod {
 public:
  explicit Mod(const BoundMod& mod)
      : views_(views_of(mod)),
        interpreter_(mod.expr, views_),
        interval_(mod.expr, mod.captures),
        condition_reads_score_(reads_score(mod.expr)) {}

  struct Result {
    dsl::Element element;
    Interval interval;
  };

  Result score(const dsl::Point& point, double error) {
    const dsl::Element element = interpreter_.score_mod(point);
    Interval interval = interval_.evaluate(point, error);
    // The keep rule drops an element whose plain value may be anything; compare what is kept.
    if (element.keep) check(interval.value, element.value, point);
    return {element, interval};
  }

  double value(const dsl::Point& point) { return interpreter_.score_mod(point).value; }

  // Whether an element's `keep` changes within the score's error.
  bool keep_varies(const dsl::Point& point, double error, bool keep) {
    if (!condition_reads_score_) return false;
    for (const double score : {point.score - error, point.score + error}) {
      dsl::Point moved = point;
      moved.score = score;
      if (interpreter_.score_mod(moved).keep != keep) return true;
    }
    return false;
  }

  Interval mask(const dsl::Point& point) {
    const bool keep = interpreter_.mask_mod(point);
    const Interval interval = interval_.evaluate(point, 0.0);
    if (keep != (interval.integer != 0)) throw std::logic_error("two evaluations of the mask_mod differ");
    return interval;
  }

 private:
  static std::vector<dsl::CaptureView> views_of(const BoundMod& mod) {
    std::vector<dsl::CaptureView> views;
    views.reserve(mod.captures.size());
    for (const Tensor& tensor : mod.captures) views.push_back(tensor.capture_view());
    return views;
  }

  // Only a condition drops, so without one that depends on the score `keep` does not, either.
  static bool reads_score(const dsl::Expr& expr) {
    std::vector<bool> depends(expr.nodes.size(), false);
    for (std::size_t i = 0; i < expr.nodes.size(); ++i) {
      const dsl::Node& node = expr.nodes[i];
      depends[i] = node.op == dsl::Op::kScore;
      for (const dsl::NodeId arg : node.args) depends[i] = depends[i] || depends[static_cast<std::size_t>(arg)];
      if (depends[i] && node.type == dsl::Type::kBool) return true;
    }
    return false;
  }

  static void check(double ours, double theirs, const dsl::Point& at) {
    const bool same = (std::isnan(ours) && std::isnan(theirs)) || ours == theirs ||
                      std::fabs(ours - theirs) <= 1e-9 * (1.0 + std::fabs(ours));
    if (!same) {
      throw std::logic_error("two evaluations of the score_mod differ: " + std::to_string(ours) + " and " +
                             std::to_string(theirs) + " at score " + std::to_string(at.score) + ", q_idx " +
                             std::to_string(at.q_idx) + ", kv_idx " + std::to_string(at.kv_idx));
    }
  }

  std::vector<dsl::CaptureView> views_;
  dsl::Interpreter interpreter_;
  Float32Interval interval_;
  bool condition_reads_score_;
};

struct Element {
  double score = 0.0;     // scale * q . k
  double modified = 0.0;  // -inf where dropped
  double lo = 0.0, hi = 0.0;
  double eager = 0.0;
  bool keep = true;
};

class Rows {
 public:
  explicit Rows(const Problem& problem) : problem_(problem), score_mod_(problem.score_mod) {
    if (problem.mask_mod) mask_mod_.emplace(*problem.mask_mod);
    elements_.resize(static_cast<std::size_t>(problem.spec.seqlen_kv));
  }

  GoldRow compute(const RowIndex& at) {
    load(at.b, problem_.head_kv(at.h));
    GoldRow row;
    row.at = at;
    score_elements(at, &row);
    const auto features = static_cast<std::size_t>(problem_.spec.head_dim_v);
    row.o.assign(features, 0.0);
    row.ideal = row.eager = row.bound = row.scatter = row.o;
    if (!row.undecided) finish(&row);
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

  void score_elements(const RowIndex& at, GoldRow* row) {
    const Case& spec = problem_.spec;
    const auto head_dim = static_cast<std::size_t>(spec.head_dim);
    std::vector<double> q(head_dim);
    for (std::int64_t d = 0; d < spec.head_dim; ++d) {
      q[static_cast<std::size_t>(d)] = problem_.q.at({at.b, at.h, at.q_idx, d});
    }
    const double scale = problem_.scale();
    row->row_max = row->row_max_lo = row->row_max_hi = -kInfinity;
    for (std::size_t j = 0; j < elements_.size(); ++j) {
      double dot = 0.0, magnitude = 0.0;
      for (std::size_t d = 0; d < head_dim; ++d) {
        const double product = q[d] * k_[j * head_dim + d];
        dot += product;
        magnitude += std::fabs(product);
      }
      Element& element = elements_[j];
      element.score = scale * dot;
      dsl::Point point{element.score, at.b, at.h, at.q_idx, static_cast<std::int64_t>(j)};
      const double error = std::isfinite(magnitude) ? 8.0 * kUnit * std::fabs(scale) * magnitude : 0.0;
      bool undecided = false;
      bool masked = false;
      if (mask_mod_) {
        const Interval mask = mask_mod_->mask(point);
        masked = mask.integer == 0;
        undecided = mask.unsure;
      }
      const Mod::Result result = score_mod_.score(point, error);
      element.keep = result.element.keep && !masked;
      if (!element.keep) {
        element.modified = element.eager = element.lo = element.hi = -kInfinity;
        // A dropped element's own value does not matter, only whether it is dropped: if the mask did not do it, ask
        // whether another score in reach would have kept it.
        if (undecided || (!masked && score_mod_.keep_varies(point, error, false))) element.hi = kInfinity;
      } else {
        element.modified = result.element.value;
        const double slack = 8.0 * kUnit * (1.0 + std::fabs(element.modified));
        element.lo = result.interval.lo - (std::isfinite(slack) ? slack : 0.0);
        element.hi = result.interval.hi + (std::isfinite(slack) ? slack : 0.0);
        undecided = undecided || result.interval.unsure || score_mod_.keep_varies(point, error, true);
        point.score = round_to(spec.dtype, element.score);
        element.eager = round_to(spec.dtype, score_mod_.value(point));
        if (std::isnan(element.modified) || element.modified == kInfinity) {
          // Infinite for float32, too, or just past its range?
          const bool sure = std::isnan(element.modified) || result.interval.lo == kInfinity;
          row->poisoned = row->poisoned || (!undecided && sure);
        }
        if (undecided) element.lo = -kInfinity, element.hi = kInfinity;
        // A NaN's maximum is left open.
        row->row_max = std::max(row->row_max, element.modified);
      }
      row->row_max_lo = std::max(row->row_max_lo, element.lo);
      row->row_max_hi = std::max(row->row_max_hi, element.hi);
    }
    if (row->poisoned) return;
    double largest_hi = -kInfinity;
    for (const Element& element : elements_) largest_hi = std::max(largest_hi, element.hi);
    row->undecided = largest_hi == kInfinity || std::isnan(row->row_max) || row->row_max == kInfinity;
  }

  void finish(GoldRow* row) {
    const auto features = row->o.size();
    if (row->poisoned) {
      row->lse = kNan;
      std::fill(row->o.begin(), row->o.end(), kNan);
      row->ideal = row->eager = row->o;
      return;
    }
    if (row->row_max == -kInfinity) {
      row->lse = -kInfinity;
      return;
    }
    const dsl::DType dtype = problem_.spec.dtype;
    double sum = 0.0, eager_sum = 0.0, eager_max = -kInfinity, moved = 0.0;
    for (const Element& element : elements_) eager_max = std::max(eager_max, element.eager);
    std::vector<double> p(elements_.size()), eager_p(elements_.size()), change(elements_.size());
    for (std::size_t j = 0; j < elements_.size(); ++j) {
      const Element& element = elements_[j];
      p[j] = std::exp(element.modified - row->row_max);
      sum += p[j];
      eager_p[j] = std::exp(element.eager - eager_max);
      eager_sum += eager_p[j];
      change[j] = std::max(std::exp(element.hi - row->row_max) - p[j], p[j] - std::exp(element.lo - row->row_max));
      moved += change[j];
    }
    const double share = moved / sum;
    if (!(share <= kUndecided)) {
      row->undecided = true;
      return;
    }
    row->lse = row->row_max + std::log(sum);
    row->lse_slack = share / (1.0 - share);
    const double u = unit_roundoff(dtype);
    const double rounding = 2.0 * (u + u) + 2.0 * summation_roundoffs(p, sum) * kUnit;
    for (std::size_t d = 0; d < features; ++d) {
      double o = 0.0, ideal = 0.0, eager = 0.0, magnitude = 0.0, plain = 0.0;
      bool unspecified = false;
      for (std::size_t j = 0; j < elements_.size(); ++j) {
        const double v = v_[j * features + d];
        if (!std::isfinite(v) && !(p[j] > 1e-30)) {
          unspecified = true;
          continue;
        }
        o += p[j] * v;
        ideal += round_to(dtype, p[j]) * v;
        eager += round_to(dtype, eager_p[j] / eager_sum) * v;
        magnitude += p[j] * std::fabs(v);
        plain += p[j] > 0.0 ? std::fabs(v) : 0.0;
      }
      o /= sum;
      double scatter = 0.0;
      for (std::size_t j = 0; j < elements_.size(); ++j) {
        const double v = v_[j * features + d];
        if (std::isfinite(v)) scatter += change[j] * std::fabs(v - o);
      }
      row->o[d] = o;
      row->ideal[d] = round_to(dtype, ideal / sum);
      row->eager[d] = round_to(dtype, eager);
      row->scatter[d] = scatter / sum / (1.0 - share);
      row->bound[d] = rounding * magnitude / sum + row->scatter[d] + half_subnormal(dtype) * (1.0 + plain / sum);
      if (unspecified) row->bound[d] = kInfinity;
    }
  }

  // The standard deviation of a float32 sum of `terms`, in roundings of `sum`: independent ones grow like a square
  // root. Terms that differ by less than the sum's last place round alike, so theirs add up.
  static double summation_roundoffs(const std::vector<double>& terms, double sum) {
    std::map<std::int64_t, double> alike;
    for (const double term : terms) {
      if (term > 0.0) alike[static_cast<std::int64_t>(term / sum / (4.0 * kUnit))] += 1.0;
    }
    double squares = 0.0;
    for (const auto& [bucket, count] : alike) squares += count * count;
    return std::sqrt(squares);
  }

  const Problem& problem_;
  Mod score_mod_;
  std::optional<Mod> mask_mod_;
  std::pair<std::int64_t, std::int64_t> loaded_{-1, -1};
  std::vector<double> k_, v_;
  std::vector<Element> elements_;
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
