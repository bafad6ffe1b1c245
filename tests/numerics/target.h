// Where the suite runs: the CPU, a GPU, or nowhere, building a GPU's binaries only. Set once, before the tests.
#pragma once

#include <cstdint>
#include <map>
#include <span>
#include <string>
#include <vector>

namespace attnjit::numerics {

struct Target {
  std::string device = "cpu";  // "cpu" or "cuda"
  // Those that are tested, the fused one of the device first.
  std::vector<std::string> backends = {"cpu", "math"};
  // Not empty: problems are compiled for this architecture ("sm_90") into the disk cache, nothing is run or judged.
  std::string compile_only;

  bool on_gpu() const { return device == "cuda"; }
  // Whether it is a backend that serves some problems only; the best that serves takes the others.
  bool is_partial() const { return fused() == "sm90"; }
  const std::string& fused() const { return backends.front(); }
  // "math" where `eager` and it is tested, else the first.
  const std::string& pick(bool eager) const { return eager ? backends.back() : backends.front(); }
};

// The target of this process.
Target& target();

// `--device cpu|cuda`, `--backend NAME` and `--compile-only ARCH` out of the program's arguments; the others stay.
// Empty, or what is wrong with them.
std::string take_target(int* argc, char** argv);

// What --compile-only did.
struct CompileCounts {
  std::int64_t problems = 0, compiled = 0, found = 0, failed = 0;
  std::vector<std::string> failures;  // the first few, with their cases
};
CompileCounts& compile_counts();

// How often a partial backend ran, and the problems that it was right to leave to others, by reason.
struct ServedCounts {
  std::int64_t served = 0;
  std::map<std::string, std::int64_t> elsewhere;
};
ServedCounts& served_counts();

}  // namespace attnjit::numerics
