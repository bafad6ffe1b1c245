// The backward of one key/value head: rows in parallel, which give P, dS and their errors, then columns.
#include "dsl/float32_backward.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <exception>
#include <limits>
#include <optional>

#include "dsl/derivative.h"

namespace attnjit::dsl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

// As many elements' P and dS are kept at a time.
constexpr std::int64_t kCells = std::int64_t{1} << 20;

struct Format {
  int precision;
  int min_exponent;
  double max;
};

Format format_of(DType dtype) {
  if (dtype == DType::kF16) return {.precision = 11, .min_exponent = -14, .max = 65504.0};
  if (dtype == DType::kBF16) return {.precision = 8, .min_exponent = -126, .max = 0x1.fep127};
  return {.precision = 24, .min_exponent = -126, .max = std::numeric_limits<float>::max()};
}

double rounded_to(DType dtype, double x) {
  if (!std::isfinite(x) || x == 0.0) return x;
  const Format format = format_of(dtype);
  const double ulp = std::ldexp(1.0, std::max(std::ilogb(x), format.min_exponent) - (format.precision - 1));
  const double rounded = std::nearbyint(x / ulp) * ulp;
  return std::fabs(rounded) > format.max ? std::copysign(kInfinity, x) : rounded;
}

// What is multiplied by nothing is nothing, an infinite bound of a finite number included.
double product(double a, double b) { return a == 0.0 || b == 0.0 ? 0.0 : a * b; }

double finite_magnitude(double x) { return std::isfinite(x) ? std::fabs(x) : 0.0; }

std::size_t index_of(std::int64_t i) { return static_cast<std::size_t>(i); }

// A value, what an ideal fused kernel has in its place, and what float32 may be off by: `scatter`, and `error`, which
// also has what the roundings of what the kernel is given make of it.
struct Term {
  double value = 0.0, ideal = 0.0;
  double scatter = 0.0, error = 0.0;
  // False: a kernel's may be NaN or infinite, and is not nothing where it is multiplied by 0. Then `error` is infinite.
  bool finite = true;

  bool is_nothing() const { return value == 0.0 && error == 0.0; }
};

// A dot product and the sum of its terms' magnitudes.
struct Dot {
  double value = 0.0, magnitude = 0.0;
};

// Of one element: what enters the products.
struct Cell {
  Term p, ds;
};

struct CapturedTerm {
  int capture = 0;
  std::int64_t place = 0;  // negative: any
  Term term;
};

// A term and the factors that it is multiplied by, one for each of neighbouring sums.
struct Factored {
  double value, ideal, magnitude, error, scatter;
  bool finite;
  const double* factors;
};

// `rounding`: of the term before it is multiplied, relative, and `least`, absolute.
Factored factored(const Term& term, std::span<const double> factors, double rounding, double least) {
  const double magnitude = finite_magnitude(term.value);
  return {.value = term.value,
          .ideal = term.ideal,
          .magnitude = magnitude,
          .error = term.error + rounding * (magnitude + term.error) + least,
          .scatter = term.scatter,
          .finite = term.finite,
          .factors = factors.data()};
}

// Sums of terms, each times a factor, with what rounding does to the terms.
class Sums {
 public:
  Sums() = default;
  explicit Sums(std::size_t size) : gradient_{.value = zeros(size)}, magnitude_(size), touched_(size) {
    gradient_.ideal = gradient_.bound = gradient_.scatter = gradient_.value;
  }

  // Terms times their factors, to `count` neighbours from `at`.
  void add(std::size_t at, std::size_t count, std::span<const Factored> terms) {
    if (terms.empty()) return;
    std::fill_n(touched_.begin() + static_cast<std::ptrdiff_t>(at), count, true);
    while (!terms.empty()) {
      std::size_t block = 0;
      while (block < std::min(terms.size(), kBlock) && std::isfinite(terms[block].error)) ++block;
      if (block == 0) {
        add_unspecified(at, count, terms[block++]);
      } else {
        std::size_t d = 0;
        for (; d + kTile <= count; d += kTile) add_tile<kTile>(at, d, terms.first(block));
        for (; d < count; ++d) add_tile<1>(at, d, terms.first(block));
      }
      terms = terms.subspan(block);
    }
  }

  void add(std::size_t at, const Term& term) {
    gradient_.value[at] += term.value;
    gradient_.ideal[at] += term.ideal;
    gradient_.bound[at] += term.error;
    gradient_.scatter[at] += term.scatter;
    magnitude_[at] += finite_magnitude(term.value);
    touched_[at] = true;
  }

  // What an ideal kernel is off by, before it rounds, is added to the bound.
  void allow_ideal(std::size_t at) {
    gradient_.bound[at] += finite_magnitude(gradient_.ideal[at] - gradient_.value[at]);
  }

  void unspecified(std::size_t at) {
    touched_[at] = true;
    gradient_.bound[at] = kInfinity;
  }

  // The sum in float32, of terms whose sum has `roundoffs`, times `scale`, in the type `dtype`. `partial`: partial sums
  // may have been rounded to that type, too.
  void finish(std::size_t at, double roundoffs, double scale, DType dtype, bool partial) {
    double& value = gradient_.value[at];
    double& bound = gradient_.bound[at];
    double& scatter = gradient_.scatter[at];
    value *= scale;
    gradient_.ideal[at] = rounded_to(dtype, gradient_.ideal[at] * scale);
    const double summing = 2.0 * roundoffs * kUnit * magnitude_[at];
    // A scale of 0 does not make a number of what is not finite.
    if (bound != kInfinity)
      bound = product(bound + summing + (partial ? unit_roundoff(dtype) * magnitude_[at] : 0.0), std::fabs(scale));
    bound += unit_roundoff(dtype) * (finite_magnitude(value) + bound);
    scatter = product(scatter + summing, std::fabs(scale));
    if (touched_[at]) bound += underflow(dtype);
    // Just past the type's range a result is infinite, or just not yet.
    if (std::isfinite(value) && !(std::fabs(value) + bound <= format_of(dtype).max)) bound = kInfinity;
    if (bound == kInfinity) scatter = 0.0;
  }

  const JudgedGradient& gradient() const { return gradient_; }
  JudgedGradient take() { return std::move(gradient_); }

 private:
  // Factors of as many terms stay in the first cache while tile after tile of them is added.
  static constexpr std::size_t kBlock = 32;
  // As many features' sums are kept in registers.
  static constexpr std::size_t kTile = 4;

  static std::vector<double> zeros(std::size_t size) { return std::vector<double>(size); }

  // Of `terms` whose errors are finite, to the features from `d` on. Each sum gets its terms in their order.
  template <std::size_t kCount>
  void add_tile(std::size_t at, std::size_t d, std::span<const Factored> terms) {
    double* const to[] = {&gradient_.value[at + d], &gradient_.ideal[at + d], &magnitude_[at + d],
                          &gradient_.bound[at + d], &gradient_.scatter[at + d]};
    double sums[std::size(to)][kCount];
    for (std::size_t i = 0; i < std::size(to); ++i) std::copy_n(to[i], kCount, sums[i]);
    for (const Factored& term : terms) {
      for (std::size_t l = 0; l < kCount; ++l) {
        const double factor = term.factors[d + l], size = std::fabs(factor);
        sums[0][l] += term.value * factor;
        sums[1][l] += term.ideal * factor;
        sums[2][l] += term.magnitude * size;
        sums[3][l] += term.error * size;
        sums[4][l] += term.scatter * size;
      }
    }
    for (std::size_t i = 0; i < std::size(to); ++i) std::copy_n(sums[i], kCount, to[i]);
  }

  void add_unspecified(std::size_t at, std::size_t count, const Factored& term) {
    for (std::size_t d = 0; d < count; ++d) {
      const double factor = term.factors[d];
      gradient_.value[at + d] += term.value * factor;
      gradient_.ideal[at + d] += term.ideal * factor;
      magnitude_[at + d] += term.magnitude * std::fabs(factor);
      gradient_.bound[at + d] += term.finite ? product(term.error, std::fabs(factor)) : term.error;
    }
  }

  JudgedGradient gradient_;
  std::vector<double> magnitude_;
  std::vector<char> touched_;
};

// A captured tensor's: its elements have as many terms each as elements of the problem read them.
struct CapturedSums {
  Sums sums;
  std::vector<std::int64_t> terms;  // of each element
  DType dtype = DType::kF32;
  bool everywhere = false;  // some term may go to any element
};

}  // namespace

struct Float32Backward::State {
  // What one thread evaluates with.
  struct Worker {
    Worker(const BackwardOptions& options, const Expr& score_mod, std::span<const CaptureView> score_captures,
           const Expr* mask_mod, std::span<const CaptureView> mask_captures)
        : scores(score_mod, score_captures, mask_mod, mask_captures, options.approximation),
          derivative(score_mod, score_captures) {
      // Whether float32 decides a row is not asked of approximate functions.
      if (options.approximation > 0.0) exact.emplace(score_mod, score_captures, mask_mod, mask_captures);
    }
    ModifiedScores scores;
    std::optional<ModifiedScores> exact;
    Derivative derivative;
    // Of a row.
    std::vector<ModifiedScore> reach, exact_reach;
    std::vector<dsl::Point> points;
    std::vector<Interval> derivatives;
    std::vector<ReadDerivative> reads;
    std::vector<std::size_t> reads_end;  // of each element
    std::vector<FeatureSums> features;
    std::vector<Dot> dots;
    // Of a row or a column.
    std::vector<Factored> terms[2];
    std::vector<double> magnitudes[2];
    bool agree = true;
  };

  // Rows of one head, which are in work.
  struct Chunk {
    std::int64_t begin = 0, end = 0;                  // of (num_heads, seqlen_q)
    std::vector<Cell> cells;                          // (rows, seqlen_kv)
    std::vector<std::vector<CapturedTerm>> captured;  // of each row
  };

  BackwardOptions options;
  const Expr& score_mod;
  std::vector<CaptureView> captures;
  std::vector<std::unique_ptr<Worker>> workers;
  std::vector<CapturedSums> captured;  // by number; empty where not wanted

  State(const BackwardOptions& wanted, const Expr& expr, std::span<const CaptureView> views)
      : options(wanted), score_mod(expr), captures(views.begin(), views.end()), captured(views.size()) {}

  void parallel(std::int64_t tasks, const std::function<void(std::int64_t, Worker&)>& function) {
    // A task must not throw, and may run out of memory: that is the caller's, once all are done.
    std::exception_ptr fault;
    std::atomic_flag failed;
    const auto task = [&](std::int64_t number, int thread) {
      try {
        function(number, *workers[index_of(thread)]);
      } catch (...) {
        if (!failed.test_and_set()) fault = std::current_exception();
      }
    };
    if (options.parallel_for) {
      options.parallel_for(tasks, task);
    } else {
      for (std::int64_t number = 0; number < tasks; ++number) task(number, 0);
    }
    if (fault) std::rethrow_exception(fault);
  }

  void score_row(const BackwardHead& head, std::int64_t row, Worker* worker) const;
  void row(const BackwardHead& head, std::span<const double> k, double largest_v, std::int64_t row, Chunk* chunk,
           Worker* worker, HeadGradients* result, Sums* dq);
};

namespace {

std::span<const double> slice(std::span<const double> values, std::int64_t row, std::int64_t length) {
  return values.subspan(index_of(row * length), index_of(length));
}

// The dot products of `a` and the rows, where `wanted(row)`. Four at a time, whose sums do not wait for one another.
template <typename Wanted>
void dot_rows(std::span<const double> a, std::span<const double> rows, Wanted&& wanted, std::vector<Dot>* dots) {
  constexpr std::size_t kRows = 4;
  const auto some = [&]<std::size_t kCount>(std::size_t first, std::integral_constant<std::size_t, kCount>) {
    bool any = false;
    for (std::size_t i = 0; i < kCount; ++i) any = any || wanted(first + i);
    if (!any) return;
    const double* const row = rows.data() + first * a.size();
    Dot sums[kCount];
    for (std::size_t d = 0; d < a.size(); ++d) {
      for (std::size_t i = 0; i < kCount; ++i) {
        const double term = a[d] * row[i * a.size() + d];
        sums[i].value += term;
        sums[i].magnitude += std::fabs(term);
      }
    }
    std::copy_n(sums, kCount, dots->begin() + static_cast<std::ptrdiff_t>(first));
  };
  std::size_t at = 0;
  for (; at + kRows <= dots->size(); at += kRows) some(at, std::integral_constant<std::size_t, kRows>());
  for (; at < dots->size(); ++at) some(at, std::integral_constant<std::size_t, 1>());
}

// What is not finite is 0: the features of it are unspecified, whatever is added to them.
std::vector<double> finite(std::span<const double> values) {
  std::vector<double> result(values.begin(), values.end());
  for (double& value : result) value = std::isfinite(value) ? value : 0.0;
  return result;
}

// Features in which some row is not finite: a tile multiplies it by a zero of another row.
std::vector<std::size_t> unspecified_features(std::span<const double> rows, std::int64_t length) {
  std::vector<std::size_t> result;
  for (std::size_t d = 0; d < index_of(length); ++d) {
    for (std::size_t at = d; at < rows.size(); at += index_of(length)) {
      if (std::isfinite(rows[at])) continue;
      result.push_back(d);
      break;
    }
  }
  return result;
}

// A term times a derivative that lies in an interval.
Term scaled(const Term& term, double exact, const Interval& derivative) {
  const double width = derivative.unsure ? kInfinity
                       : std::isnan(derivative.lo)
                           ? 0.0
                           : std::max({derivative.hi - derivative.value, derivative.value - derivative.lo, 0.0});
  // What is unspecified stays so, whatever it is multiplied with.
  const double reach = std::isfinite(exact) ? std::fabs(exact) + width : kInfinity;
  const double moved = product(finite_magnitude(term.value), width) + (width == 0.0 && exact == 0.0 ? 0.0 : 0x1p-126);
  return {.value = product(term.value, exact),
          .ideal = product(term.ideal, exact),
          .scatter = moved + product(term.scatter, reach),
          .error = moved + product(term.error, reach),
          .finite = term.finite};
}

bool same(double a, double b, const Interval& reach) {
  if (reach.unsure || (std::isnan(a) && std::isnan(b)) || a == b) return true;
  return std::fabs(a - b) <= 1e-9 * (1.0 + std::fabs(a)) || (a >= reach.lo && a <= reach.hi);
}

// Whether the derivative of one element and the intervals' agree.
bool agree(const ElementGradient& gradient, const Interval& score, std::span<const ReadDerivative> reads,
           std::span<const CaptureView> captures) {
  bool result = same(gradient.dscore, score.value, score);
  for (const ReadDerivative& read : reads) {
    if (read.place_unsure) return result;
    Interval total{};
    for (const ReadDerivative& each : reads) {
      if (each.capture != read.capture || each.place != read.place) continue;
      total = {total.value + each.derivative.value, total.lo + each.derivative.lo, total.hi + each.derivative.hi, 0,
               total.unsure || each.derivative.unsure};
    }
    double found = 0.0;
    for (const Contribution& each : gradient.contributions) {
      const CaptureView& view = captures[index_of(each.capture)];
      std::int64_t place = 0;
      for (int i = 0; i < view.rank; ++i) place = place * view.extent[i] + each.index[i];
      if (each.capture == read.capture && place == read.place) found += each.value;
    }
    result = result && same(found, total.value, total);
  }
  return result;
}

}  // namespace

// Modified scores of a row, where float32 may put them, and their derivatives.
void Float32Backward::State::score_row(const BackwardHead& head, std::int64_t row, Worker* worker) const {
  const std::size_t keys = index_of(head.seqlen_kv);
  worker->reach.resize(keys);
  worker->points.resize(keys);
  worker->derivatives.resize(keys);
  worker->reads_end.resize(keys);
  worker->reads.clear();
  if (worker->exact) worker->exact_reach.resize(keys);
  worker->dots.resize(keys);
  dot_rows(slice(head.q, row, head.head_dim), head.k, [](std::size_t) { return true; }, &worker->dots);
  for (std::size_t j = 0; j < keys; ++j) {
    const auto kv_idx = static_cast<std::int64_t>(j);
    const auto [product, magnitude] = worker->dots[j];
    const dsl::Point point{.score = options.scale * product,
                           .b = head.b,
                           .h = head.h + row / head.seqlen_q,
                           .q_idx = row % head.seqlen_q,
                           .kv_idx = kv_idx};
    const ModifiedScore score = worker->scores.at(point, std::fabs(options.scale) * magnitude);
    worker->points[j] = point;
    worker->reach[j] = score;
    worker->agree = worker->agree && score.agree;
    if (worker->exact) worker->exact_reach[j] = worker->exact->at(point, std::fabs(options.scale) * magnitude);
    worker->derivatives[j] = {};
    if (score.keep || score.hi != -kInfinity) {
      worker->derivatives[j] = worker->scores.differentiate();
      for (const ReadDerivative& read : worker->scores.read_derivatives()) {
        if (options.captures >> read.capture & 1) worker->reads.push_back(read);
      }
    }
    worker->reads_end[j] = worker->reads.size();
  }
}

// `k`: with what is finite of the keys, for the product. `largest_v`: of the values, infinite where one is not finite.
void Float32Backward::State::row(const BackwardHead& head, std::span<const double> k, double largest_v,
                                 std::int64_t row, Chunk* chunk, Worker* worker, HeadGradients* result, Sums* dq) {
  const std::size_t keys = index_of(head.seqlen_kv), features = index_of(head.head_dim_v);
  Cell* const cells = &chunk->cells[index_of(row - chunk->begin) * keys];
  std::fill_n(cells, keys, Cell());
  std::vector<CapturedTerm>& captured_terms = chunk->captured[index_of(row - chunk->begin)];
  captured_terms.clear();
  score_row(head, row, worker);
  const std::vector<ModifiedScore>& reach = worker->reach;
  const Float32Row decision(worker->exact ? worker->exact_reach : reach, options.approximation);
  // NaN in double precision, or infinite; float32 need not be where `poison` is false.
  const auto is_nan = [&](std::size_t j) {
    return reach[j].keep && (std::isnan(reach[j].value) || reach[j].value == kInfinity);
  };
  // A given lse is of all keys, and says alone what becomes of the row; `decision` is of a part of them. Each element
  // has its own bounds: a P that is recomputed from lse knows nothing of the others.
  const bool is_given = !head.lse.empty();
  const double given_lse = is_given ? head.lse[index_of(row)] : 0.0;
  bool infinite = false;
  for (std::size_t j = 0; j < keys && !is_given && !decision.poisoned; ++j) infinite = infinite || is_nan(j);
  const bool poisoned = is_given ? !(given_lse < kInfinity) : decision.poisoned || infinite;
  const bool empty = !poisoned && (is_given ? given_lse : decision.maximum) == -kInfinity;

  // ---- What the forward gives, and what of it the kernel is given.
  double* const o = &result->o[index_of(row) * features];
  double sum = 0.0;
  std::fill_n(o, features, 0.0);
  for (std::size_t j = 0; j < keys && !empty && !is_given; ++j) {
    if (!reach[j].keep) continue;
    const double p = poisoned ? kNan : std::exp(reach[j].value - decision.maximum);
    sum += p;
    const auto v = slice(head.v, static_cast<std::int64_t>(j), head.head_dim_v);
    for (std::size_t d = 0; d < features; ++d) o[d] += p * v[d];
  }
  for (std::size_t d = 0; d < features && !empty; ++d) {
    o[d] = is_given ? head.o[index_of(row) * features + d] : o[d] / sum;
  }
  const double lse = poisoned ? kNan : empty ? -kInfinity : is_given ? given_lse : decision.maximum + std::log(sum);
  result->lse[index_of(row)] = lse;
  // A forward of its own may give the row an lse of NaN.
  const bool may_be_poisoned = poisoned || (options.own_forward && decision.may_be_poisoned);
  // Given an lse of -inf a kernel does nothing.
  const bool nothing = empty && (!options.own_forward || !decision.undecided);
  const double ideal_lse = static_cast<double>(static_cast<float>(lse));
  const auto grad_out = slice(head.grad_out, row, head.head_dim_v);
  const double grad_lse = head.grad_lse.empty() ? 0.0 : head.grad_lse[index_of(row)];
  // Of what a kernel holds in `dtype`; false for what is not a number.
  const auto fits = [](const Term& term, DType dtype) {
    return std::fabs(term.value) + term.error <= format_of(dtype).max;
  };
  double lse_error = 5.0 * kUnit * finite_magnitude(lse);
  double delta = -grad_lse, ideal_delta = -grad_lse, delta_magnitude = std::fabs(grad_lse), delta_given = 0.0;
  bool delta_is_number = true;  // false: by a right forward, too, it may be NaN or infinite
  if (options.own_forward && !poisoned) {
    lse_error += decision.undecided ? kInfinity : decision.lse_scatter() + exponential_approximation(options.dtype);
    worker->features.assign(features, {});
    if (!decision.undecided && !empty)
      add_features(decision.p, decision.change, head.v, {o, features}, worker->features);
    // Whatever P is in a row that float32 does not decide: o is a mean of its values, P and itself rounded, or the row
    // is NaN.
    if (decision.undecided) {
      const double rounded = largest_v * (1.0 + 4.0 * unit_roundoff(options.dtype));
      delta_is_number = !may_be_poisoned && rounded <= format_of(options.dtype).max;
    }
  }
  for (std::size_t d = 0; d < features; ++d) {
    const double term = grad_out[d] * o[d];
    delta += term;
    delta_magnitude += std::fabs(term);
    ideal_delta += grad_out[d] * rounded_to(options.dtype, o[d]);
    if (options.own_forward && !poisoned) {
      const double bound = decision.undecided ? kInfinity : decision.o_bound(options.dtype, worker->features[d]);
      delta_given += product(std::fabs(grad_out[d]), bound);
      // An o that may be NaN or infinite is not nothing times 0.
      const Term feature = {.value = o[d], .error = bound};
      delta_is_number = delta_is_number && (decision.undecided || fits(feature, options.dtype));
    } else if (!is_given) {
      delta_given += unit_roundoff(options.dtype) * std::fabs(term) + underflow(options.dtype) * std::fabs(grad_out[d]);
    }
  }

  // ---- The elements.
  const auto unspecified = [](Term* term) {
    term->error = term->scatter = kInfinity;
    term->finite = false;
  };
  // No forward gives an lse that is not NaN to a row of such a score: P may be what is computed from the two, or 0.
  const auto contradicts = [&](std::size_t j) { return is_given && !std::isnan(given_lse) && is_nan(j); };
  const auto contributes = [&](std::size_t j) {
    return nothing ? contradicts(j) : reach[j].hi != -kInfinity || reach[j].keep;
  };
  // The least that a kernel is given: of a row that float32 does not decide, too, lse is no less than its maximum.
  const double least_lse = lse_error == kInfinity ? decision.maximum_lo : lse - lse_error;
  bool decided = is_given || !decision.undecided;
  dot_rows(grad_out, head.v, contributes, &worker->dots);
  for (std::size_t j = 0; j < keys; ++j) {
    if (!contributes(j)) continue;
    const ModifiedScore& score = reach[j];
    Cell& cell = cells[j];
    Term dm;
    const auto [dp, dp_magnitude] = worker->dots[j];
    const double difference = dp - delta;
    if (score.hi == -kInfinity && (is_given ? !std::isnan(given_lse) : !may_be_poisoned)) {
      // What is surely -infinity has a P of exactly 0, but for an lse of NaN. Only what is not finite makes anything of
      // it.
      if (std::isfinite(difference) && delta_is_number) continue;
      unspecified(&dm);
    } else if (poisoned || contradicts(j)) {
      // NaN, whatever is computed from it.
      if (score.keep) cell.p.value = cell.p.ideal = dm.value = dm.ideal = kNan;
      // An element that may be -infinity or dropped counts as a dropped one to some; an lse of +infinity, which a
      // forward of its own may give here, too, makes nothing of P, or NaN. An lse of NaN leaves no choice.
      const bool may_be_infinite = options.own_forward || (is_given && !std::isnan(given_lse));
      if (infinite || !score.keep || score.lo == -kInfinity || may_be_infinite) {
        unspecified(&cell.p);
        unspecified(&dm);
      }
    } else {
      const double p = score.keep && !empty ? std::exp(score.value - lse) : 0.0;
      const double ideal_p = score.keep && !empty ? std::exp(score.value - ideal_lse) : 0.0;
      // Up to what exp makes of the largest score in reach; what is very small may be flushed.
      const double largest = std::exp(score.hi - least_lse);
      const double change = score.hi == kInfinity || lse_error == kInfinity
                                ? kInfinity
                                : std::max(largest - p, p - std::exp(score.lo - lse - lse_error)) + 0x1p-126;
      cell.p = {.value = p, .ideal = rounded_to(options.dtype, ideal_p), .scatter = change, .error = change};
      if (may_be_poisoned || !(largest <= format_of(options.dtype).max)) unspecified(&cell.p);
      // 16-bit products may be added 16 at a time, and what does not fit the sum cut off.
      const double cut =
          options.dtype == DType::kF32 ? 0.0 : static_cast<double>(head.head_dim_v) / 8.0 * kUnit * dp_magnitude;
      const double arithmetic = kUnit * (8.0 * (dp_magnitude + delta_magnitude) + 4.0 * std::fabs(difference)) + cut;
      const double error = product(change, std::fabs(difference)) + product(p + change, arithmetic);
      dm = {.value = product(p, difference), .ideal = product(ideal_p, dp - ideal_delta)};
      dm.error = error + product(p + change, delta_given);
      // Of errors of both signs a mean has an eighth of the bound; of what is cut off, half.
      dm.scatter = (options.own_forward ? dm.error : error) + product(p + change, 3.0 * cut);
      // A difference of 0 is not nothing times an infinite P.
      const bool p_fits = largest <= format_of(DType::kF32).max;
      if (!p_fits || !delta_is_number || !fits(dm, DType::kF32)) unspecified(&dm);
    }
    decided = decided && (!is_given || cell.p.error != kInfinity);
    ElementGradient gradient;
    if (score.keep) {
      gradient = worker->derivative.at(worker->points[j], 1.0);
    }
    const std::size_t reads_begin = j == 0 ? 0 : worker->reads_end[j - 1];
    const std::span<const ReadDerivative> reads(worker->reads.data() + reads_begin, worker->reads_end[j] - reads_begin);
    if (score.keep && score.lo != -kInfinity) {
      worker->agree = worker->agree && agree(gradient, worker->derivatives[j], reads, captures);
    }
    cell.ds = scaled(dm, score.keep ? gradient.dscore : 0.0, worker->derivatives[j]);
    if (!poisoned && !fits(cell.ds, options.dtype)) unspecified(&cell.ds);
    cell.ds.ideal = rounded_to(options.dtype, cell.ds.ideal);
    for (const ReadDerivative& read : reads) {
      Term term = scaled(dm, score.keep ? read.derivative.value : 0.0, read.derivative);
      if (!poisoned && !std::isfinite(term.value)) unspecified(&term);
      // What the rounding of the gold o and lse does is known: the ideal kernel is given the same.
      if (!options.own_forward) term.error = term.scatter;
      captured_terms.push_back({.capture = read.capture, .place = read.place_unsure ? -1 : read.place, .term = term});
    }
  }

  result->decided[index_of(row)] = decided;

  // ---- dQ of the row.
  std::vector<Factored>& terms = worker->terms[0];
  std::vector<double>& magnitudes = worker->magnitudes[0];
  terms.clear();
  magnitudes.clear();
  double total = 0.0;
  const double u = unit_roundoff(options.dtype), least = underflow(options.dtype);
  const std::size_t at = index_of(row * head.head_dim);
  for (std::size_t j = 0; j < keys; ++j) {
    const Term& ds = cells[j].ds;
    if (ds.is_nothing()) continue;
    terms.push_back(factored(ds, slice(k, static_cast<std::int64_t>(j), head.head_dim), u, least));
    magnitudes.push_back(terms.back().magnitude);
    total += magnitudes.back();
  }
  dq->add(at, index_of(head.head_dim), terms);
  const double roundoffs = total > 0.0 ? summation_roundoffs(magnitudes, total) : 0.0;
  for (std::size_t d = 0; d < index_of(head.head_dim); ++d) {
    // The normalisation, which a given lse does not leave open, may move all of such a row.
    if (!is_given && decision.undecided) dq->unspecified(at + d);
    dq->finish(at + d, roundoffs, options.scale, options.dtype, true);
  }
}

Float32Backward::Float32Backward(const BackwardOptions& options, const Expr& score_mod,
                                 std::span<const CaptureView> score_captures, const Expr* mask_mod,
                                 std::span<const CaptureView> mask_captures)
    : state_(std::make_unique<State>(options, score_mod, score_captures)) {
  for (int i = 0; i < std::max(options.threads, 1); ++i) {
    state_->workers.push_back(
        std::make_unique<State::Worker>(options, score_mod, score_captures, mask_mod, mask_captures));
  }
  for (std::size_t number = 0; number < score_captures.size(); ++number) {
    if (!(options.captures >> number & 1)) continue;
    std::int64_t size = 1;
    for (int i = 0; i < score_captures[number].rank; ++i) size *= score_captures[number].extent[i];
    state_->captured[number] = {.sums = Sums(index_of(size)),
                                .terms = std::vector<std::int64_t>(index_of(size)),
                                .dtype = score_captures[number].dtype};
  }
}

Float32Backward::~Float32Backward() = default;

HeadGradients Float32Backward::run(const BackwardHead& head) {
  State& state = *state_;
  const BackwardOptions& options = state.options;
  const std::int64_t rows = head.num_heads * head.seqlen_q, keys = head.seqlen_kv;
  HeadGradients result;
  result.o.resize(index_of(rows * head.head_dim_v));
  result.lse.resize(index_of(rows));
  result.decided.resize(index_of(rows));
  Sums dq(index_of(rows * head.head_dim)), dk(index_of(keys * head.head_dim)), dv(index_of(keys * head.head_dim_v));
  std::vector<double> dk_roundoffs(index_of(keys)), dv_roundoffs(index_of(keys));
  const double u = unit_roundoff(options.dtype), least = underflow(options.dtype);

  // A product with a value that is not finite is unspecified where some other row's zero meets it.
  const auto spoil = [](Sums* sums, std::int64_t count, std::int64_t length, const std::vector<std::size_t>& features) {
    for (std::int64_t at = 0; at < count; ++at) {
      for (const std::size_t d : features) sums->unspecified(index_of(at * length) + d);
    }
  };
  spoil(&dq, rows, head.head_dim, unspecified_features(head.k, head.head_dim));
  spoil(&dk, keys, head.head_dim, unspecified_features(head.q, head.head_dim));
  spoil(&dv, keys, head.head_dim_v, unspecified_features(head.grad_out, head.head_dim_v));
  const std::vector<double> q = finite(head.q), k = finite(head.k), grad_out = finite(head.grad_out);
  double largest_v = 0.0;
  for (const double v : head.v) largest_v = std::max(largest_v, std::isfinite(v) ? std::fabs(v) : kInfinity);

  State::Chunk chunk;
  const std::int64_t chunk_rows =
      std::clamp<std::int64_t>(kCells / std::max<std::int64_t>(keys, 1), 1, std::max<std::int64_t>(rows, 1));
  chunk.cells.resize(index_of(chunk_rows * keys));
  chunk.captured.resize(index_of(chunk_rows));
  for (chunk.begin = 0; chunk.begin < rows; chunk.begin = chunk.end) {
    chunk.end = std::min(chunk.begin + chunk_rows, rows);
    const std::int64_t count = chunk.end - chunk.begin;
    state.parallel(count, [&](std::int64_t task, State::Worker& worker) {
      state.row(head, k, largest_v, chunk.begin + task, &chunk, &worker, &result, &dq);
    });
    state.parallel(keys, [&](std::int64_t j, State::Worker& worker) {
      struct Side {
        Sums& sums;
        std::span<const double> factors;
        std::int64_t length;
        std::vector<double>& roundoffs;
        double total = 0.0;
      } sides[] = {{dv, grad_out, head.head_dim_v, dv_roundoffs}, {dk, q, head.head_dim, dk_roundoffs}};
      for (std::size_t of = 0; of < std::size(sides); ++of) {
        worker.terms[of].clear();
        worker.magnitudes[of].clear();
      }
      // A column's elements lie far from one another: they are walked through once for both.
      for (std::int64_t i = 0; i < count; ++i) {
        const Cell& cell = chunk.cells[index_of(i * keys + j)];
        const Term* const of_sides[] = {&cell.p, &cell.ds};
        for (std::size_t of = 0; of < std::size(sides); ++of) {
          Side& side = sides[of];
          if (of_sides[of]->is_nothing()) continue;
          worker.terms[of].push_back(
              factored(*of_sides[of], slice(side.factors, chunk.begin + i, side.length), u, least));
          worker.magnitudes[of].push_back(worker.terms[of].back().magnitude);
          side.total += worker.magnitudes[of].back();
        }
      }
      for (std::size_t of = 0; of < std::size(sides); ++of) {
        const Side& side = sides[of];
        side.sums.add(index_of(j * side.length), index_of(side.length), worker.terms[of]);
        // As if the errors of one chunk were all like those of the next.
        if (side.total > 0.0) {
          side.roundoffs[index_of(j)] += summation_roundoffs(worker.magnitudes[of], side.total);
        }
      }
    });
    for (std::int64_t i = 0; i < count; ++i) {
      for (const CapturedTerm& each : chunk.captured[index_of(i)]) {
        CapturedSums& captured = state.captured[index_of(each.capture)];
        if (each.place < 0) {
          captured.everywhere = true;
        } else {
          captured.sums.add(index_of(each.place), each.term);
          ++captured.terms[index_of(each.place)];
        }
      }
    }
  }
  for (std::int64_t j = 0; j < keys; ++j) {
    for (std::int64_t d = 0; d < head.head_dim; ++d) {
      dk.finish(index_of(j * head.head_dim + d), dk_roundoffs[index_of(j)], options.scale, options.dtype, true);
    }
    for (std::int64_t d = 0; d < head.head_dim_v; ++d) {
      dv.finish(index_of(j * head.head_dim_v + d), dv_roundoffs[index_of(j)], 1.0, options.dtype, true);
    }
  }
  result.dq = dq.take();
  result.dk = dk.take();
  result.dv = dv.take();
  for (const auto& worker : state.workers) result.agree = result.agree && worker->agree;
  return result;
}

JudgedGradient Float32Backward::captured(int capture) const {
  CapturedSums captured = state_->captured[index_of(capture)];
  for (std::size_t at = 0; at < captured.terms.size(); ++at) {
    if (captured.everywhere) captured.sums.unspecified(at);
    if (!state_->options.own_forward) captured.sums.allow_ideal(at);
    captured.sums.finish(at, std::sqrt(static_cast<double>(captured.terms[at])), 1.0, captured.dtype, false);
  }
  return captured.sums.take();
}

}  // namespace attnjit::dsl
