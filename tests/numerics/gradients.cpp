// The backward in double precision, row by row.
#include "tests/numerics/gradients.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <stdexcept>

#include "dsl/derivative.h"
#include "dsl/float32_backward.h"
#include "dsl/interpreter.h"

namespace attnjit::numerics {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr double kUnit = 0x1p-24;

// The values of one tensor's gradient while they are summed.
struct Sum {
  std::vector<double> value;
  // Of row shifts: the magnitudes of the terms, and their squares.
  std::vector<double> magnitude, squares;

  explicit Sum(const Tensor& tensor)
      : value(static_cast<std::size_t>(tensor.size())), magnitude(value), squares(value) {}
  void add_shift(std::size_t at, double term) {
    value[at] += term;
    magnitude[at] += std::fabs(term);
    squares[at] += term * term;
  }
};

// Gold by plain loops.
class PlainLoops {
 public:
  explicit PlainLoops(const Problem& problem, const GivenForward* given = nullptr)
      : dq(problem.q),
        dk(problem.k),
        dv(problem.v),
        problem_(problem),
        given_(given),
        score_mod_(problem.score_mod.expr, problem.score_mod.views()),
        derivative_(problem.score_mod.expr, problem.score_mod.views()) {
    if (problem.mask_mod) mask_mod_.emplace(problem.mask_mod->expr, problem.mask_mod->views());
    for (const GradientSpec& wanted : problem.spec.backward.captures) {
      captures.emplace_back(problem.capture(wanted.name).tensor);
    }
  }

  void run() {
    for (std::int64_t b = 0; b < problem_.spec.batch; ++b) {
      for (std::int64_t h = 0; h < problem_.spec.num_heads; ++h) {
        for (std::int64_t i = 0; i < problem_.spec.seqlen_q; ++i) row(b, h, i);
      }
    }
  }

  Sum dq, dk, dv;
  std::vector<Sum> captures;
  double loss = 0.0;

 private:
  // Widens the keys and values of one head.
  void load(std::int64_t b, std::int64_t head) {
    if (loaded_ == std::pair(b, head)) return;
    loaded_ = {b, head};
    k_.clear();
    v_.clear();
    for (std::int64_t j = 0; j < problem_.spec.seqlen_kv; ++j) {
      append(problem_.k, {b, head, j, 0}, &k_);
      append(problem_.v, {b, head, j, 0}, &v_);
    }
  }

  static void append(const Tensor& tensor, std::array<std::int64_t, 4> index, std::vector<double>* values) {
    for (index[3] = 0; index[3] < tensor.shape()[3]; ++index[3]) values->push_back(tensor.at(index));
  }

  static double dot(const double* a, const double* b, std::size_t count) {
    double sum = 0.0;
    for (std::size_t d = 0; d < count; ++d) sum += a[d] * b[d];
    return sum;
  }

  struct Element {
    double m = 0.0, p = 0.0, dp = 0.0;
    double score = 0.0;
    bool keep = false;
  };

  void row(std::int64_t b, std::int64_t h, std::int64_t i) {
    const Case& spec = problem_.spec;
    load(b, problem_.head_kv(h));
    q_.clear();
    grad_out_.clear();
    append(problem_.q, {b, h, i, 0}, &q_);
    append(problem_.grad_out, {b, h, i, 0}, &grad_out_);
    const std::size_t features = grad_out_.size();
    std::vector<Element> elements(static_cast<std::size_t>(spec.seqlen_kv));
    double maximum = -kInfinity, sum = 0.0;
    bool poisoned = false;
    for (std::int64_t j = 0; j < spec.seqlen_kv; ++j) {
      Element& element = elements[static_cast<std::size_t>(j)];
      const auto column = static_cast<std::size_t>(j);
      const double product = dot(q_.data(), &k_[column * q_.size()], q_.size());
      const dsl::Point point{problem_.scale() * product, b, h, i, j};
      const dsl::Element modified = score_mod_.score_mod(point);
      element.score = point.score;
      element.m = modified.value;
      element.keep = modified.keep && (!mask_mod_ || mask_mod_->mask_mod(point));
      if (!element.keep) continue;
      poisoned = poisoned || std::isnan(element.m) || element.m == kInfinity;
      maximum = std::max(maximum, element.m);
      element.dp = dot(grad_out_.data(), &v_[column * features], features);
    }
    if (given_ != nullptr) {
      // The caller's, of all keys.
      maximum = given_->lse.at({b, h, i});
      poisoned = false;
    }
    // A row whose scores are all -inf is as one without a kept element.
    const bool empty = !poisoned && maximum == -kInfinity;
    for (Element& element : elements) {
      if (element.keep && !empty) sum += element.p = poisoned ? kNan : std::exp(element.m - maximum);
    }
    if (given_ != nullptr) sum = 1.0;
    const double grad_lse = spec.backward.grad_lse ? problem_.grad_lse.at({b, h, i}) : 0.0;
    double delta = -grad_lse;
    for (std::size_t d = 0; d < features; ++d) {
      double feature = given_ != nullptr ? given_->o.at({b, h, i, static_cast<std::int64_t>(d)}) : 0.0;
      for (std::size_t j = 0; j < elements.size(); ++j) {
        if (given_ == nullptr && elements[j].keep && !empty) feature += elements[j].p / sum * v_[j * features + d];
      }
      delta += grad_out_[d] * feature;
    }
    if (empty) return;
    const double row_lse = poisoned ? kNan : maximum + std::log(sum);
    loss += delta + grad_lse * (1.0 + row_lse);  // delta lacks what flows into lse

    bool shifted = false;
    for (std::int64_t j = 0; j < spec.seqlen_kv; ++j) {
      const Element& element = elements[static_cast<std::size_t>(j)];
      if (!element.keep) continue;
      const dsl::Point point{element.score, b, h, i, j};
      const double p = element.p / sum;
      if (p == 0.0) continue;
      const dsl::ElementGradient gradient = derivative_.at(point, p * (element.dp - delta));
      add_products(b, h, i, j, p, gradient.dscore);
      add_contributions(gradient.contributions, /*shifts=*/false);
      if (shifted) continue;
      // All that a row shift adds is what flows into lse: the gradients of a row's scores sum to that.
      shifted = true;
      if (grad_lse != 0.0) add_contributions(derivative_.at(point, grad_lse).contributions, /*shifts=*/true);
    }
  }

  void add_products(std::int64_t b, std::int64_t h, std::int64_t i, std::int64_t j, double p, double ds) {
    const std::int64_t head = problem_.head_kv(h);
    const double scale = problem_.scale();
    const std::size_t q_at = offset(problem_.q, {b, h, i, 0}), k_at = offset(problem_.k, {b, head, j, 0});
    const double* const k = &k_[static_cast<std::size_t>(j) * q_.size()];
    for (std::size_t d = 0; d < q_.size(); ++d) {
      dq.value[q_at + d] += scale * ds * k[d];
      dk.value[k_at + d] += scale * ds * q_[d];
    }
    const std::size_t v_at = offset(problem_.v, {b, head, j, 0});
    for (std::size_t d = 0; d < grad_out_.size(); ++d) dv.value[v_at + d] += p * grad_out_[d];
  }

  // To captured tensors that shift rows, or to all others.
  void add_contributions(std::span<const dsl::Contribution> contributions, bool shifts) {
    const BackwardSpec& backward = problem_.spec.backward;
    for (const dsl::Contribution& each : contributions) {
      const std::string& name = problem_.score_mod.name_of(each.capture);
      if (backward.shifts_rows(name) != shifts) continue;
      for (std::size_t number = 0; number < captures.size(); ++number) {
        if (backward.captures[number].name != name) continue;
        const Tensor& tensor = problem_.capture(name).tensor;
        const std::size_t at = packed_offset(tensor, std::span(each.index, tensor.shape().size()));
        if (shifts) {
          captures[number].add_shift(at, each.value);
        } else {
          captures[number].value[at] += each.value;
        }
      }
    }
  }

  static std::size_t offset(const Tensor& tensor, std::initializer_list<std::int64_t> index) {
    return packed_offset(tensor, std::span(index.begin(), index.size()));
  }

  const Problem& problem_;
  const GivenForward* given_;
  dsl::Interpreter score_mod_;
  dsl::Derivative derivative_;
  std::optional<dsl::Interpreter> mask_mod_;
  std::pair<std::int64_t, std::int64_t> loaded_{-1, -1};
  std::vector<double> k_, v_, q_, grad_out_;  // of one key/value head, of one query row
};

// What the bounds' own evaluation of the gradients says, put together from its heads.
class Bounds {
 public:
  explicit Bounds(const Problem& problem)
      : problem_(problem), backward_(options(problem), problem.score_mod.expr, views_, mask_expr(), mask_views_) {}

  void run(const GivenForward* given, GoldGradients* gold) {
    const Case& spec = problem_.spec;
    const std::int64_t group = spec.num_heads_kv == 0 ? 0 : spec.num_heads / spec.num_heads_kv;
    const std::vector<double> q = packed(problem_.q), k = packed(problem_.k), v = packed(problem_.v),
                              grad_out = packed(problem_.grad_out), grad_lse = packed(problem_.grad_lse),
                              o = given ? packed(given->o) : std::vector<double>(),
                              lse = given ? packed(given->lse) : std::vector<double>();
    for (std::int64_t head = 0; head < spec.batch * spec.num_heads_kv; ++head) {
      const auto part = [&](const std::vector<double>& values) {
        const std::size_t size = values.size() / static_cast<std::size_t>(spec.batch * spec.num_heads_kv);
        return std::span(values).subspan(size * static_cast<std::size_t>(head), size);
      };
      const dsl::HeadGradients gradients = backward_.run({.b = head / spec.num_heads_kv,
                                                          .h = head % spec.num_heads_kv * group,
                                                          .num_heads = group,
                                                          .seqlen_q = spec.seqlen_q,
                                                          .seqlen_kv = spec.seqlen_kv,
                                                          .head_dim = spec.head_dim,
                                                          .head_dim_v = spec.head_dim_v,
                                                          .q = part(q),
                                                          .k = part(k),
                                                          .v = part(v),
                                                          .grad_out = part(grad_out),
                                                          .grad_lse = part(grad_lse),
                                                          .o = part(o),
                                                          .lse = part(lse)});
      if (!gradients.agree) {
        throw std::logic_error("two evaluations of the expressions or of their derivatives differ");
      }
      if (given == nullptr) give(gradients, head, group, gold);
      gold->rows += static_cast<std::int64_t>(gradients.decided.size());
      gold->undecided += std::ranges::count(gradients.decided, 0);
      append(gradients.dq, &dq);
      append(gradients.dk, &dk);
      append(gradients.dv, &dv);
    }
  }

  // Of the captured tensor of that name; all zero where the score_mod does not read it.
  dsl::JudgedGradient captured(const std::string& name, const Tensor& tensor) const {
    const auto& captures = problem_.score_mod.expr.captures;
    const auto found = std::ranges::find(captures, name, &dsl::Capture::name);
    if (found != captures.end()) return backward_.captured(static_cast<int>(found - captures.begin()));
    const std::vector<double> zeros(static_cast<std::size_t>(tensor.size()));
    return {zeros, zeros, zeros, zeros};
  }

  dsl::JudgedGradient dq, dk, dv;

 private:
  static dsl::BackwardOptions options(const Problem& problem) {
    dsl::BackwardOptions options;
    options.dtype = problem.spec.dtype;
    options.scale = problem.scale();
    options.own_forward = problem.spec.backward.own_forward;
    // The CPU's functions are not approximate.
    if (problem.spec.device == "cuda") {
      options.approximation = dsl::function_approximation(problem.score_mod.expr, problem.spec.dtype);
    }
    for (const GradientSpec& wanted : problem.spec.backward.captures) {
      const auto& captures = problem.score_mod.expr.captures;
      const auto found = std::ranges::find(captures, wanted.name, &dsl::Capture::name);
      if (found != captures.end()) options.captures |= std::uint32_t{1} << (found - captures.begin());
    }
    return options;
  }

  const dsl::Expr* mask_expr() const { return problem_.mask_mod ? &problem_.mask_mod->expr : nullptr; }

  static std::vector<double> packed(const Tensor& tensor) {
    std::vector<double> values;
    if (tensor.shape().empty()) return values;
    values.reserve(static_cast<std::size_t>(tensor.size()));
    for_each_index(tensor.shape(), [&](auto index) { values.push_back(tensor.at(index)); });
    return values;
  }

  // What the ideal kernel is given has to be what ours is: a tie may be rounded either way.
  void give(const dsl::HeadGradients& gradients, std::int64_t head, std::int64_t group, GoldGradients* gold) {
    const Case& spec = problem_.spec;
    std::size_t row = 0;
    for (std::int64_t h = head % spec.num_heads_kv * group; h < (head % spec.num_heads_kv + 1) * group; ++h) {
      for (std::int64_t i = 0; i < spec.seqlen_q; ++i, ++row) {
        const std::int64_t b = head / spec.num_heads_kv;
        gold->lse.set({b, h, i}, gradients.lse[row]);
        for (std::int64_t d = 0; d < spec.head_dim_v; ++d) {
          gold->o.set({b, h, i, d},
                      gradients.o[row * static_cast<std::size_t>(spec.head_dim_v) + static_cast<std::size_t>(d)]);
        }
      }
    }
  }

  static void append(const dsl::JudgedGradient& part, dsl::JudgedGradient* whole) {
    const auto add = [](const std::vector<double>& from, std::vector<double>* to) {
      to->insert(to->end(), from.begin(), from.end());
    };
    add(part.value, &whole->value);
    add(part.ideal, &whole->ideal);
    add(part.bound, &whole->bound);
    add(part.scatter, &whole->scatter);
  }

  const Problem& problem_;
  const std::vector<dsl::CaptureView> views_ = problem_.score_mod.views();
  const std::vector<dsl::CaptureView> mask_views_ =
      problem_.mask_mod ? problem_.mask_mod->views() : std::vector<dsl::CaptureView>();
  dsl::Float32Backward backward_;
};

// The bounds' own values against the plain loops', where they say anything.
void compare(const std::string& name, const std::vector<double>& plain, dsl::JudgedGradient* bounds) {
  if (plain.size() != bounds->value.size()) throw std::logic_error("two evaluations of " + name + " differ in size");
  for (std::size_t at = 0; at < plain.size(); ++at) {
    const double ours = plain[at], theirs = bounds->value[at];
    double& bound = bounds->bound[at];
    if (bound == kInfinity || (std::isnan(ours) && std::isnan(theirs)) || ours == theirs) continue;
    if (std::isnan(ours)) {
      // The NaN of a poisoned row times a derivative of zero may be taken for either.
      bound = kInfinity;
    } else if (!(std::fabs(ours - theirs) <= 1e-6 * bound + 1e-12 * (1.0 + std::fabs(ours)))) {
      throw std::logic_error("two evaluations of " + name + ", element " + std::to_string(at) +
                             ", differ: " + std::to_string(ours) + " and " + std::to_string(theirs));
    }
  }
}

// A row shift's gradient is a float32 sum of what flows into lse, times factors of the expression.
double shift_bound(dsl::DType dtype, double value, double magnitude, double squares) {
  if (magnitude == 0.0) return 0.0;
  const bool is_half = dtype == dsl::DType::kF16;
  const double u = is_half ? 0x1p-11 : dtype == dsl::DType::kBF16 ? 0x1p-8 : kUnit;
  return 2.0 * u * std::fabs(value) + kUnit * (16.0 * magnitude + 2.0 * std::sqrt(squares)) +
         (is_half ? 0x1p-25 : 0x1p-126);
}

GoldGradient assemble(std::string name, const Tensor& tensor, const Sum& plain, dsl::JudgedGradient bounds) {
  compare(name, plain.value, &bounds);
  return {std::move(name),         tensor.shape(),          tensor.dtype(),           plain.value,
          std::move(bounds.ideal), std::move(bounds.bound), std::move(bounds.scatter)};
}

}  // namespace

GoldGradients empty_forward(const Problem& problem) {
  GoldGradients gold;
  const Case& spec = problem.spec;
  gold.o = Tensor(spec.dtype, {spec.batch, spec.num_heads, spec.seqlen_q, spec.head_dim_v}, spec.layout_o,
                  spec.layout_o == Layout::kPadded ? 1 : 0);
  gold.lse = Tensor(dsl::DType::kF32, {spec.batch, spec.num_heads, spec.seqlen_q},
                    spec.backward.layout_grad_out == Layout::kPadded ? Layout::kPadded : Layout::kPacked);
  return gold;
}

GoldGradients compute_gold_gradients(const Problem& problem, const GivenForward* given) {
  PlainLoops plain(problem, given);
  plain.run();
  GoldGradients gold = empty_forward(problem);
  if (given != nullptr) gold.o = given->o, gold.lse = given->lse;
  Bounds bounds(problem);
  bounds.run(given, &gold);
  const BackwardSpec& backward = problem.spec.backward;
  if (backward.dq) gold.wanted.push_back(assemble("dq", problem.q, plain.dq, std::move(bounds.dq)));
  if (backward.dk) gold.wanted.push_back(assemble("dk", problem.k, plain.dk, std::move(bounds.dk)));
  if (backward.dv) gold.wanted.push_back(assemble("dv", problem.v, plain.dv, std::move(bounds.dv)));
  for (std::size_t number = 0; number < backward.captures.size(); ++number) {
    const std::string& name = backward.captures[number].name;
    const Tensor& tensor = problem.capture(name).tensor;
    const Sum& sum = plain.captures[number];
    GoldGradient& added = gold.wanted.emplace_back(assemble("d_" + name, tensor, sum, bounds.captured(name, tensor)));
    if (!backward.shifts_rows(name)) continue;
    for (std::size_t at = 0; at < sum.value.size(); ++at) {
      added.ideal[at] = round_to(tensor.dtype(), sum.value[at]);
      added.scatter[at] = 0.0;
      added.bound[at] = shift_bound(tensor.dtype(), sum.value[at], sum.magnitude[at], sum.squares[at]);
    }
  }
  return gold;
}

double compute_loss(const Problem& problem) {
  PlainLoops plain(problem);
  plain.run();
  return plain.loss;
}

std::vector<const std::vector<double>*> in_order(const GoldGradients& gold, const Gradients& gradients) {
  std::vector<const std::vector<double>*> result;
  std::size_t captures = 0;
  for (const GoldGradient& each : gold.wanted) {
    result.push_back(each.name == "dq"   ? &gradients.dq
                     : each.name == "dk" ? &gradients.dk
                     : each.name == "dv" ? &gradients.dv
                                         : &gradients.captures.at(captures++));
  }
  return result;
}

}  // namespace attnjit::numerics
