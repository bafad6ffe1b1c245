// Summaries of repeated measurements.
#include "bench/statistics.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <numeric>

namespace attnjit::tool {

double median(std::span<const double> values) {
  std::vector<double> sorted(values.begin(), values.end());
  std::ranges::sort(sorted);
  const std::size_t middle = sorted.size() / 2;
  return sorted.size() % 2 == 1 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

double arithmetic_mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

double geometric_mean(std::span<const double> values) {
  double sum = 0.0;
  for (double value : values) sum += std::log(value);
  return std::exp(sum / static_cast<double>(values.size()));
}

Timing summarize(std::span<const double> milliseconds) {
  const auto [min, max] = std::ranges::minmax(milliseconds);
  return {median(milliseconds), min, max};
}

std::vector<Timing> time_interleaved(std::span<const std::function<void()>> candidates, int repetitions,
                                     double min_milliseconds) {
  using Clock = std::chrono::steady_clock;
  const auto milliseconds_of = [](const std::function<void()>& candidate, int calls) {
    const auto begin = Clock::now();
    for (int i = 0; i < calls; ++i) candidate();
    return std::chrono::duration<double, std::milli>(Clock::now() - begin).count();
  };
  std::vector<int> calls;
  for (const auto& candidate : candidates) {
    candidate();
    const double once = std::max(milliseconds_of(candidate, 1), 1e-6);
    calls.push_back(static_cast<int>(std::clamp(std::ceil(min_milliseconds / once), 1.0, 1e6)));
  }
  std::vector<std::vector<double>> samples(candidates.size());
  for (int repetition = 0; repetition < repetitions; ++repetition) {
    for (std::size_t i = 0; i < candidates.size(); ++i) {
      samples[i].push_back(milliseconds_of(candidates[i], calls[i]) / calls[i]);
    }
  }
  std::vector<Timing> timings;
  timings.reserve(samples.size());
  for (const auto& sample : samples) timings.push_back(summarize(sample));
  return timings;
}

}  // namespace attnjit::tool
