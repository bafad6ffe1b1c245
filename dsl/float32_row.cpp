// The error bounds of one row.
#include "dsl/float32_row.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace attnjit::dsl {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// A row is left out when float32 may move this share of its probability.
constexpr double kUndecided = 0x1p-7;

// Only a condition drops, so without one that depends on the score `keep` does not, either.
bool condition_reads_score(const Expr& expr) {
  std::vector<bool> depends(expr.nodes.size(), false);
  for (std::size_t i = 0; i < expr.nodes.size(); ++i) {
    const Node& node = expr.nodes[i];
    depends[i] = node.op == Op::kScore;
    for (const NodeId arg : node.args) depends[i] = depends[i] || depends[static_cast<std::size_t>(arg)];
    if (depends[i] && node.type == Type::kBool) return true;
  }
  return false;
}

bool same(double a, double b) {
  return (std::isnan(a) && std::isnan(b)) || a == b || std::fabs(a - b) <= 1e-9 * (1.0 + std::fabs(a));
}

}  // namespace

double unit_roundoff(DType dtype) { return dtype == DType::kF16 ? 0x1p-11 : dtype == DType::kBF16 ? 0x1p-8 : kUnit; }

double underflow(DType dtype) { return dtype == DType::kF16 ? 0x1p-25 : 0x1p-126; }

double summation_roundoffs(std::span<const double> terms, double sum) {
  std::vector<std::uint32_t> places, sorted;
  places.reserve(terms.size());
  for (const double term : terms) {
    if (term > 0.0) places.push_back(static_cast<std::uint32_t>(term / sum / (4.0 * kUnit)));
  }
  // By bytes, the lowest first: a place is at most 2^22.
  sorted.resize(places.size());
  for (const int shift : {0, 8, 16}) {
    std::size_t next[257] = {};
    for (const std::uint32_t place : places) ++next[(place >> shift & 0xff) + 1];
    for (std::size_t byte = 1; byte < 256; ++byte) next[byte] += next[byte - 1];
    for (const std::uint32_t place : places) sorted[next[place >> shift & 0xff]++] = place;
    places.swap(sorted);
  }
  double squares = 0.0;
  for (std::size_t begin = 0, end = 0; begin < places.size(); begin = end) {
    while (end < places.size() && places[end] == places[begin]) ++end;
    const auto alike = static_cast<double>(end - begin);
    squares += alike * alike;
  }
  return std::sqrt(squares);
}

ModifiedScores::ModifiedScores(const Expr& score_mod, std::span<const CaptureView> score_captures, const Expr* mask_mod,
                               std::span<const CaptureView> mask_captures, double approximation)
    // The PTX manual promises half of it.
    : score_mod_(score_mod, score_captures, approximation / 2.0),
      condition_reads_score_(condition_reads_score(score_mod)) {
  if (mask_mod) mask_mod_.emplace(*mask_mod, mask_captures, 0.0);
}

// Whether an element's `keep` changes within the score's error.
bool ModifiedScores::keep_varies(Point point, double error, bool keep) {
  if (!condition_reads_score_) return false;
  const double score = point.score;
  for (const double moved : {score - error, score + error}) {
    point.score = moved;
    if (score_mod_.value.score_mod(point).keep != keep) return true;
  }
  return false;
}

ModifiedScore ModifiedScores::at(const Point& point, double magnitude) {
  // Where the sum is not finite, the score's own NaN or infinity says it.
  const double error = std::isfinite(magnitude) ? 8.0 * kUnit * magnitude : 0.0;
  ModifiedScore result;
  bool masked = false, undecided = false;
  if (mask_mod_) {
    masked = !mask_mod_->value.mask_mod(point);
    const Interval mask = mask_mod_->interval.evaluate(point, 0.0);
    result.agree = masked == (mask.integer == 0);
    undecided = mask.unsure;
  }
  const Element element = score_mod_.value.score_mod(point);
  const Interval interval = score_mod_.interval.evaluate(point, error);
  // The keep rule drops an element whose plain value may be anything: what is kept is compared.
  if (element.keep) result.agree = result.agree && same(interval.value, element.value);
  result.keep = element.keep && !masked;
  const bool may_poison = !(interval.hi < kInfinity);
  if (!result.keep) {
    result.value = result.lo = result.hi = -kInfinity;
    // Its own value does not matter, only whether it is dropped: if the mask did not do it, ask whether another score
    // in reach would have kept it.
    if (undecided || (!masked && keep_varies(point, error, false))) {
      result.hi = kInfinity;
      result.may_poison = may_poison;
    }
    return result;
  }
  result.value = element.value;
  const double softmax = 8.0 * kUnit * (1.0 + std::fabs(element.value));
  result.lo = interval.lo - (std::isfinite(softmax) ? softmax : 0.0);
  result.hi = interval.hi + (std::isfinite(softmax) ? softmax : 0.0);
  undecided = undecided || interval.unsure || keep_varies(point, error, true);
  // Infinite for float32, too, or just past its range?
  const bool sure = std::isnan(element.value) || (element.value == kInfinity && interval.lo == kInfinity);
  result.poison = !undecided && sure;
  result.may_poison = may_poison;
  if (undecided) result.lo = -kInfinity, result.hi = kInfinity;
  return result;
}

double function_approximation(const Expr& score_mod, DType dtype) {
  if (dtype != DType::kBF16 && dtype != DType::kF16) return 0.0;
  const bool calls_tanh = std::any_of(score_mod.nodes.begin(), score_mod.nodes.end(), [](const Node& node) {
    return node.op == Op::kCall && node.function == Function::kTanh;
  });
  return calls_tanh ? 0x1p-10 : 0.0;
}

double exponential_approximation(DType dtype) {
  return dtype == DType::kBF16 || dtype == DType::kF16 ? 48.0 * kUnit : 0.0;
}

Float32Row::Float32Row(std::span<const ModifiedScore> scores, double relative_approximation)
    : maximum(-kInfinity), maximum_lo(-kInfinity), maximum_hi(-kInfinity) {
  for (const ModifiedScore& score : scores) {
    poisoned = poisoned || score.poison;
    may_be_poisoned = may_be_poisoned || score.may_poison;
    // In this order a NaN is passed over.
    maximum = std::max(maximum, score.value);
    maximum_lo = std::max(maximum_lo, score.lo);
    maximum_hi = std::max(maximum_hi, score.hi);
    if (std::isfinite(score.value)) approximation = std::max(approximation, std::fabs(score.value));
  }
  approximation *= relative_approximation;
  maximum_lo -= approximation;
  maximum_hi += approximation;
  if (poisoned) return;
  undecided = maximum_hi == kInfinity || maximum == kInfinity;
  if (undecided || empty()) return;
  p.resize(scores.size());
  change.resize(scores.size());
  double moved = 0.0;
  for (std::size_t j = 0; j < scores.size(); ++j) {
    p[j] = std::exp(scores[j].value - maximum);
    sum += p[j];
    change[j] = std::max(std::exp(scores[j].hi - maximum) - p[j], p[j] - std::exp(scores[j].lo - maximum));
    moved += change[j];
  }
  share = moved / sum;
  undecided = !(share <= kUndecided);
  roundoffs = summation_roundoffs(p, sum);
}

void FeatureSums::add(double p, double change, double v, double o) {
  if (!std::isfinite(v)) {
    unspecified = unspecified || !(p >= kSurelyPositive);
    return;
  }
  magnitude += p * std::fabs(v);
  plain += p > 0.0 ? std::fabs(v) : 0.0;
  spread += change * std::fabs(v - o);
}

namespace {

// The elements from `begin` to `end` and kCount features from `d` on, whose sums stay in registers.
template <std::size_t kCount>
void add_tile(std::span<const double> p, std::span<const double> change, std::span<const double> v,
              std::span<const double> o, std::size_t begin, std::size_t end, std::size_t d,
              std::span<FeatureSums> sums) {
  double magnitude[kCount], plain[kCount], spread[kCount];
  for (std::size_t l = 0; l < kCount; ++l) {
    magnitude[l] = sums[d + l].magnitude;
    plain[l] = sums[d + l].plain;
    spread[l] = sums[d + l].spread;
  }
  for (std::size_t j = begin; j < end; ++j) {
    const double* const row = v.data() + j * o.size() + d;
    const double weight = p[j] > 0.0 ? 1.0 : 0.0;
    for (std::size_t l = 0; l < kCount; ++l) {
      const double size = std::fabs(row[l]);
      magnitude[l] += p[j] * size;
      plain[l] += weight * size;
      spread[l] += change[j] * std::fabs(row[l] - o[d + l]);
    }
  }
  for (std::size_t l = 0; l < kCount; ++l) {
    FeatureSums& to = sums[d + l];
    if (std::isfinite(magnitude[l] + plain[l] + spread[l])) {
      to.magnitude = magnitude[l];
      to.plain = plain[l];
      to.spread = spread[l];
    } else {  // some value, perhaps, is not finite: one by one
      for (std::size_t j = begin; j < end; ++j) to.add(p[j], change[j], v[j * o.size() + d + l], o[d + l]);
    }
  }
}

}  // namespace

void add_features(std::span<const double> p, std::span<const double> change, std::span<const double> v,
                  std::span<const double> o, std::span<FeatureSums> sums) {
  // As many rows of `v` stay in the first cache while tile after tile of them is added.
  constexpr std::size_t kBlock = 32, kTile = 4;
  for (std::size_t begin = 0; begin < p.size(); begin += kBlock) {
    const std::size_t end = std::min(begin + kBlock, p.size());
    std::size_t d = 0;
    for (; d + kTile <= sums.size(); d += kTile) add_tile<kTile>(p, change, v, o, begin, end, d, sums);
    for (; d < sums.size(); ++d) add_tile<1>(p, change, v, o, begin, end, d, sums);
  }
}

bool Float32Row::empty() const { return maximum == -kInfinity; }

double Float32Row::lse_bound() const {
  if (empty()) return 0.0;
  return 1e-4 + 1e-5 * std::fabs(maximum + std::log(sum)) + share / (1.0 - share) + approximation;
}

double Float32Row::lse_scatter() const {
  if (empty()) return 0.0;
  // The sum's roundings, and the logarithm's: absolute near one, relative else.
  const double rounding = 2.0 * roundoffs * kUnit + 8.0 * kUnit * (1.0 + std::fabs(maximum + std::log(sum)));
  return rounding + share / (1.0 - share) + approximation;
}

double Float32Row::scatter(const FeatureSums& sums) const { return sums.spread / sum / (1.0 - share); }

double Float32Row::o_bound(DType dtype, const FeatureSums& sums) const {
  if (sums.unspecified) return kInfinity;
  if (empty()) return 0.0;
  const double u = unit_roundoff(dtype);
  const double rounding = 2.0 * (u + u) + 2.0 * roundoffs * kUnit;
  return rounding * sums.magnitude / sum + scatter(sums) + underflow(dtype) * (1.0 + sums.plain / sum);
}

}  // namespace attnjit::dsl
