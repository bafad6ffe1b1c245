// What the examples share: random inputs, and how far two results are apart.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <random>
#include <vector>

// Standard normal values; the same at every run.
inline std::vector<float> random_values(std::size_t count, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> values(count);
  for (float& value : values) value = normal(random);
  return values;
}

// The largest difference. NaN in either counts as infinite.
inline float largest_difference(const std::vector<float>& x, const std::vector<float>& y) {
  float largest = 0.0f;
  for (std::size_t i = 0; i < x.size(); ++i) {
    const float difference = std::fabs(x[i] - y[i]);
    largest = std::max(largest, std::isnan(difference) ? INFINITY : difference);
  }
  return largest;
}
