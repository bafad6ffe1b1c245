// Whether float32 decides one row of attention, and how far it may move the result (docs/numerics.md, rules 2 to 5).
#pragma once

#include <optional>
#include <span>
#include <vector>

#include "dsl/expr.h"
#include "dsl/float32_interval.h"
#include "dsl/interpreter.h"

namespace attnjit::dsl {

double unit_roundoff(DType dtype);
// Where a type has no more relative precision: half a step of float16's subnormal numbers; those of the other types
// may be flushed to zero.
double underflow(DType dtype);
// The smallest float16: what is below may be rounded to zero.
inline constexpr double kSurelyPositive = 0x1p-24;
// The standard deviation of a float32 sum of `terms`, in roundings of `sum`: independent ones grow like a square root.
// Terms that differ by less than the sum's last place round alike, so theirs add up. Terms of 0 do not count.
double summation_roundoffs(std::span<const double> terms, double sum);

// One modified score, and where a kernel's that computes in float32 may lie.
struct ModifiedScore {
  double value = 0.0;         // exact; -inf where dropped
  double lo = 0.0, hi = 0.0;  // what the softmax may make of it included
  bool keep = false;
  bool poison = false;      // NaN or +infinity for every kernel, and so is the row
  bool may_poison = false;  // for some kernel
  bool agree = true;        // false: the interpreter and the interval evaluation differ, a fault of one of them
};

// Evaluates bound expressions, which must outlive it; not safe for concurrent use of one object.
class ModifiedScores {
 public:
  // `mask_mod` null: none. `approximation`: see function_approximation.
  ModifiedScores(const Expr& score_mod, std::span<const CaptureView> score_captures, const Expr* mask_mod,
                 std::span<const CaptureView> mask_captures, double approximation = 0.0);
  // `magnitude`: |scale| sum_d |q_d k_jd|, what the rounding errors of the score are proportional to.
  ModifiedScore at(const Point& point, double magnitude);
  // Of the score_mod at the last point: Float32Interval's.
  Interval differentiate() { return score_mod_.interval.differentiate(); }
  std::span<const ReadDerivative> read_derivatives() const { return score_mod_.interval.read_derivatives(); }

 private:
  bool keep_varies(Point point, double error, bool keep);

  struct Mod {
    Mod(const Expr& expr, std::span<const CaptureView> captures, double tanh_error)
        : value(expr, captures), interval(expr, captures, tanh_error) {}
    Interpreter value;
    Float32Interval interval;
  };
  Mod score_mod_;
  std::optional<Mod> mask_mod_;
  bool condition_reads_score_;
};

// What the bound of one feature of o is made of: sums over the row.
struct FeatureSums {
  double magnitude = 0.0;    // sum_j p_j |v_j|
  double plain = 0.0;        // the sum of |v_j| where p_j is not 0
  double spread = 0.0;       // sum_j change_j |v_j - o|
  bool unspecified = false;  // a v_j that is not finite meets a p_j that is 0, or may be rounded to it: 0 * NaN

  void add(double p, double change, double v, double o);
};
// Adds the elements of a row to the sums of all its features. `p` and `change`: Float32Row's; `v` (keys, features),
// packed.
void add_features(std::span<const double> p, std::span<const double> change, std::span<const double> v,
                  std::span<const double> o, std::span<FeatureSums> sums);

// How far off, relative to it, a score_mod on a GPU may be by approximate functions, which only problems of 16-bit
// inputs allow: 2^-10 where it calls tanh, else 0 (rule 4).
double function_approximation(const Expr& score_mod, DType dtype);

// How far off, relative to it, a kernel's exponential may be besides, with 16-bit inputs: 48 u (docs/numerics.md).
double exponential_approximation(DType dtype);

// One row's probabilities, and what float32 may do to them. What follows `undecided` holds where neither it nor
// `poisoned` is true and the row has a kept element.
struct Float32Row {
  // `relative_approximation`: see function_approximation. It widens what is asked of the maximum and of LSE.
  explicit Float32Row(std::span<const ModifiedScore> scores, double relative_approximation = 0.0);

  bool poisoned = false;         // a kept element is NaN or +infinity: the row is NaN
  bool may_be_poisoned = false;  // a kernel may have NaN or +infinity for a kept element
  bool undecided = false;        // float32 may move more than 2^-7 of the row's probability: any result may be right
  double maximum, maximum_lo, maximum_hi;  // of the scores; -inf where none is kept
  std::vector<double> p;                   // exp(m_j - maximum)
  std::vector<double> change;              // how far float32 may move p_j
  double sum = 0.0;                        // of p
  double share = 0.0;                      // sum of change / sum
  double approximation = 0.0;              // what approximate functions may move the largest score by
  double roundoffs = 0.0;                  // of sums over the row, as a multiple of the sum's unit roundoff

  bool empty() const;  // no element is kept: O = 0, LSE = -inf

  // What |lse - gold| may be; the second by float32 alone, without rule 4's allowance.
  double lse_bound() const;
  double lse_scatter() const;
  // What float32 scores may move one feature of o by.
  double scatter(const FeatureSums& sums) const;
  // What |o - gold| may be for one feature of a result of type `dtype`; infinite where it is unspecified.
  double o_bound(DType dtype, const FeatureSums& sums) const;
};

}  // namespace attnjit::dsl
