// The target, and the options that set it.
#include "tests/numerics/target.h"

#include <algorithm>
#include <string_view>

namespace attnjit::numerics {

Target& target() {
  static Target target;
  return target;
}

CompileCounts& compile_counts() {
  static CompileCounts counts;
  return counts;
}

ServedCounts& served_counts() {
  static ServedCounts counts;
  return counts;
}

std::string take_target(int* argc, char** argv) {
  Target& wanted = target();
  std::string backend;
  int kept = 1;
  for (int i = 1; i < *argc; ++i) {
    const std::string_view name = argv[i];
    std::string* const value = name == "--device"         ? &wanted.device
                               : name == "--backend"      ? &backend
                               : name == "--compile-only" ? &wanted.compile_only
                                                          : nullptr;
    if (value == nullptr) {
      argv[kept++] = argv[i];
      continue;
    }
    if (++i == *argc) return std::string(name) + ": a value is missing";
    *value = argv[i];
  }
  *argc = kept;
  argv[kept] = nullptr;
  if (wanted.device != "cpu" && wanted.device != "cuda") return "--device: allowed are cpu and cuda";
  if (!wanted.compile_only.empty() && !wanted.on_gpu()) return "--compile-only: needs --device cuda";
  wanted.backends = {wanted.on_gpu() ? "sm80" : "cpu", "math"};
  if (backend.empty()) return "";
  // On a GPU, each case may be the best backend's that serves it.
  const bool others = wanted.on_gpu() && (backend == "auto" || backend == "sm90");
  if (!others && std::ranges::find(wanted.backends, backend) == wanted.backends.end()) {
    return "--backend: allowed are " + wanted.backends.front() + (wanted.on_gpu() ? ", sm90, auto" : "") + " and math";
  }
  wanted.backends = {backend};
  return "";
}

}  // namespace attnjit::numerics
