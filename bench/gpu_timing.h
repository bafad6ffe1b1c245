// Timing of work on the GPU by replaying CUDA graphs, and of what the host spends on a call.
#pragma once

#include <functional>
#include <span>
#include <vector>

#include "bench/cuda.h"
#include "bench/statistics.h"

namespace attnjit::tool {

// Work that a call enqueues on a stream.
using Enqueue = std::function<void(const GpuStream&)>;

// Milliseconds of the GPU for one call of each candidate, none of the host. Each is captured, as many calls in a graph
// as fill `min_milliseconds`, and the graphs are replayed in turn (A B A B ...), after one untimed round, so that a
// change of the clocks meets them alike.
std::vector<Timing> time_graphs(std::span<const Enqueue> candidates, int repetitions, double min_milliseconds = 4.0);

// Milliseconds of the calling thread for one call, least of a few groups that an idle GPU starts on.
double host_milliseconds(const Enqueue& candidate);

}  // namespace attnjit::tool
