// Summaries of repeated measurements, and the interleaved timing that produces them.
#pragma once

#include <functional>
#include <span>
#include <vector>

namespace attnjit::tool {

// Of a non-empty sample; the mean of the two middle values where their number is even.
double median(std::span<const double> values);
double arithmetic_mean(std::span<const double> values);
// Of positive values.
double geometric_mean(std::span<const double> values);

// Milliseconds.
struct Timing {
  double median = 0.0, min = 0.0, max = 0.0;
};
Timing summarize(std::span<const double> milliseconds);

// Times the candidates in turn (A B A B ...), after one untimed round, so that a change in the machine's speed meets
// them alike. A candidate faster than `min_milliseconds` is repeated within a sample until the sample lasts that long.
// One Timing per candidate, of one call.
std::vector<Timing> time_interleaved(std::span<const std::function<void()>> candidates, int repetitions,
                                     double min_milliseconds = 0.2);

}  // namespace attnjit::tool
