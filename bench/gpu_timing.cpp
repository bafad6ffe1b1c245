// Timing of work on the GPU.
#include "bench/gpu_timing.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <limits>
#include <memory>

namespace attnjit::tool {

namespace {

constexpr int kMaxCalls = 400;  // nodes of a graph

struct Candidate {
  int calls = 1;
  std::unique_ptr<GpuGraph> graph;
};

}  // namespace

std::vector<Timing> time_graphs(std::span<const Enqueue> candidates, int repetitions, double min_milliseconds) {
  const GpuStream stream;
  const GpuEvent begin, end;
  const auto milliseconds_of = [&](const std::function<void()>& work) {
    begin.record(stream);
    work();
    end.record(stream);
    return end.milliseconds_since(begin);
  };
  std::vector<Candidate> captured;
  for (const Enqueue& enqueue : candidates) {
    Candidate candidate;
    const auto call = [&] { enqueue(stream); };
    const auto capture = [&] {
      candidate.graph = std::make_unique<GpuGraph>(stream, [&] {
        for (int i = 0; i < candidate.calls; ++i) enqueue(stream);
      });
    };
    call();  // nothing that happens once is timed or captured
    // Long calls are rough alone; short ones would be the host's time, so their graph's length is found from a graph.
    const double once = milliseconds_of(call);
    candidate.calls = once >= min_milliseconds ? 1 : 8;
    capture();
    milliseconds_of([&] { candidate.graph->launch(stream); });
    if (candidate.calls > 1) {
      const double each = milliseconds_of([&] { candidate.graph->launch(stream); }) / candidate.calls;
      const double wanted = std::ceil(min_milliseconds / std::max(each, 1e-4));
      candidate.calls = static_cast<int>(std::clamp(wanted, 1.0, static_cast<double>(kMaxCalls)));
      capture();
    }
    captured.push_back(std::move(candidate));
  }
  std::vector<std::vector<double>> samples(captured.size());
  for (int round = -1; round < repetitions; ++round) {
    for (std::size_t i = 0; i < captured.size(); ++i) {
      const double sample = milliseconds_of([&] { captured[i].graph->launch(stream); }) / captured[i].calls;
      if (round >= 0) samples[i].push_back(sample);
    }
  }
  std::vector<Timing> timings;
  timings.reserve(samples.size());
  for (const auto& sample : samples) timings.push_back(summarize(sample));
  return timings;
}

double host_milliseconds(const Enqueue& candidate) {
  using Clock = std::chrono::steady_clock;
  constexpr int kGroups = 5, kCalls = 64;  // far fewer than a stream holds before a launch waits
  const GpuStream stream;
  double least = std::numeric_limits<double>::infinity();
  for (int group = 0; group < kGroups; ++group) {
    stream.synchronize();
    const auto begin = Clock::now();
    for (int i = 0; i < kCalls; ++i) candidate(stream);
    least = std::min(least, std::chrono::duration<double, std::milli>(Clock::now() - begin).count() / kCalls);
  }
  stream.synchronize();
  return least;
}

}  // namespace attnjit::tool
