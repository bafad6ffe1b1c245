// The compiler's CUDA end: a bound expression to CUDA text around a template, CUDA text to a binary. Part of the face
// to the runtime; include compiler/compiler.h. It knows NVRTC (opened at run time) and no driver.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/sm80/config.h"
#include "kernels_templates/sm90/config.h"

namespace attnjit::compiler {

// A target: sm_80, sm_90, and with `specific` sm_90a.
struct CudaArch {
  int number = 80;  // 10 * major + minor of the compute capability
  bool specific = false;
};
std::string cuda_arch_name(CudaArch arch);

// One translation unit for NVRTC: it includes nothing.
struct CudaSource {
  // A comment that names expression, problem and config. It stands in front of `text` in a dump and is not compiled, so
  // that problems whose code is the same share a binary.
  std::string header;
  std::string text;
  std::vector<std::string> entries;  // extern "C" kernels, each `void(const __grid_constant__ Params)`
  // What Mod::score expects scaled scores to be multiplied by, as CpuTile::score_factor.
  double score_factor = 1.0;
  // ptxas's, 0 to 10: how far it goes for speed where registers are short. By measurement: bench/notes.md, "Registers".
  int register_usage_level = 10;
};

// What ptxas said of one kernel.
struct CudaResources {
  std::string entry;
  int registers = 0;
  int spill_store_bytes = 0, spill_load_bytes = 0, stack_bytes = 0;
  int static_shared_bytes = 0;
};

// A compiled translation unit.
struct CudaBinary {
  std::string cubin;
  std::vector<CudaResources> resources;  // by entry
  // Spills and what ptxas serialised or ignored: a slower kernel, never a wrong one.
  std::vector<std::string> warnings;
};

// NVRTC as it was found. `library` is a path or a name for the dynamic loader; empty: the usual names are tried.
// Loaded once per process and library; safe from several threads.
struct Nvrtc;
// Null with `error` set where there is none or it is older than 12.8.
const Nvrtc* load_nvrtc(std::string_view library, std::string* error);
int nvrtc_version(const Nvrtc& nvrtc);  // 100 * major + minor
// Names the exact build: version and the file's build id.
std::string_view nvrtc_identity(const Nvrtc& nvrtc);
bool nvrtc_supports(const Nvrtc& nvrtc, CudaArch arch);

// 128 bits, as 32 hexadecimal digits, over everything that decides a binary: the text's bytes, the options, the
// architecture and NVRTC's identity.
std::string cuda_binary_key(const Nvrtc& nvrtc, const CudaSource& source, CudaArch arch);

}  // namespace attnjit::compiler
