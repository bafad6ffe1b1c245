// A CUDA driver without a GPU: what tests see of it. It is a shared library with the functions of libcuda that attnjit
// uses; device memory is host memory, kernels are not run but written down.
#pragma once

#include <dlfcn.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

namespace attnjit::test {

struct FakeCuda {
  // ---- What it pretends to be.
  int devices = 1;
  int major = 9, minor = 0;
  int sms = 132;
  int shared_memory = 232448;
  bool lazy = true;  // a function is loaded by cuFuncLoad or by its first launch, not with its module
  // Result of a function by its name, until it is erased.
  std::map<std::string, int> failing;
  // The stream that is being captured, where `capturing` is set. Work that a capture forbids breaks it, as it does on a
  // GPU, unless the thread's capture mode is relaxed.
  bool capturing = false;
  void* captured_stream = nullptr;
  std::size_t parameter_bytes = 0;                        // of each launch, to write down
  std::map<std::string, std::size_t> parameter_bytes_of;  // of entries that differ
  bool record = true;                                     // false: launches are counted only

  // Milliseconds of a launch's kernel, by threads and shared memory of a block: what events measure. Without it every
  // event is a millisecond after the last.
  std::function<float(unsigned block, unsigned shared)> kernel_ms;

  // Called by each load of a module, before it and without the driver's lock.
  std::function<void()> before_load;

  // ---- What happened.
  struct Launch {
    std::string entry;
    std::string image;  // of the module, up to its first NUL
    int device = -1;
    unsigned grid[3] = {}, block = 0, shared = 0;
    void* stream = nullptr;
    std::vector<unsigned char> parameters;
    bool captured = false;
  };
  std::vector<Launch> launches;
  // A tensor map as it was encoded, or moved; where launches are written down, the map's first word is its place here.
  struct TensorMap {
    int type = 0, interleave = 0, swizzle = 0, promotion = 0, fill = 0;
    const void* data = nullptr;
    std::vector<std::uint64_t> extents, strides;
    std::vector<std::uint32_t> box, element_strides;
    bool moved = false;  // of another one, whose address was replaced
  };
  std::vector<TensorMap> maps;
  int launched = 0;
  bool capture_broken = false;
  int events_recorded = 0;
  int memory_allocated = 0, memory_freed = 0;  // blocks
  int modules_loaded = 0, modules_unloaded = 0;
  int contexts_retained = 0, contexts_released = 0;
  int unbalanced_pops = 0;
  std::mutex mutex;

  // Back to a fresh driver; no attnjit object may be alive that uses it.
  void reset() {
    devices = 1, major = 9, minor = 0, sms = 132, shared_memory = 232448, lazy = true;
    failing.clear(), parameter_bytes_of.clear();
    capturing = false, captured_stream = nullptr, parameter_bytes = 0, record = true;
    kernel_ms = nullptr, before_load = nullptr, events_recorded = memory_allocated = memory_freed = 0;
    launches.clear(), maps.clear();
    launched = 0, capture_broken = false;
    modules_loaded = modules_unloaded = contexts_retained = contexts_released = unbalanced_pops = 0;
  }
};

// The state of the fake driver at `path`, which is loaded for good; null where it cannot be.
inline FakeCuda* fake_cuda(const char* path) {
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  void* const get = library ? dlsym(library, "attnjit_fake_cuda") : nullptr;
  return get ? reinterpret_cast<FakeCuda* (*)()>(get)() : nullptr;
}

// This thread's current context, as the driver sees it: 0 for none, else 1 + the device's ordinal, or what
// fake_cuda_enter() pushed.
inline long fake_cuda_current(const char* path) {
  return reinterpret_cast<long (*)()>(dlsym(dlopen(path, RTLD_NOW | RTLD_LOCAL), "attnjit_fake_cuda_current"))();
}

}  // namespace attnjit::test
