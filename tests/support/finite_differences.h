// Central differences of a function in double precision, with a tolerance that comes from the function itself.
#pragma once

#include <algorithm>
#include <cmath>

namespace attnjit::test {

struct Differences {
  bool usable = false;  // finite, and without a kink or a jump in reach
  double value = 0.0;
  double tolerance = 0.0;
};

// `move(distance, &largest)` evaluates at a distance from the point, and notes the largest
// magnitude that it met.
template <typename Move>
Differences differences(Move move, double step = 0x1p-10) {
  double largest = 0.0;
  double f[5];
  for (int i = 0; i < 5; ++i) {
    f[i] = move((i - 2) * step, &largest);
    if (!std::isfinite(f[i])) return {};
  }
  Differences result{.usable = true, .value = (f[3] - f[1]) / (2 * step)};
  const double wide = (f[4] - f[0]) / (4 * step);
  // A smooth function's second difference shrinks with the square of the step, a kink's with the step, a jump's not.
  const double bend = std::fabs(f[3] - 2 * f[2] + f[1]), wide_bend = std::fabs(f[4] - 2 * f[2] + f[0]);
  const double rounding = 64.0 * 0x1p-52 * largest;
  result.usable = bend <= 0.3 * wide_bend + rounding && wide_bend <= 0.05 * step * (1.0 + std::fabs(wide)) + rounding;
  // The truncation error t of `value` is a quarter of that of `wide`, to first order: they differ by 3 t.
  result.tolerance = std::fabs(result.value - wide) + rounding / step;
  return result;
}

}  // namespace attnjit::test
