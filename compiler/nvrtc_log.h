// What ptxas and NVRTC's front end print, as facts.
#pragma once

#include <string>
#include <vector>

#include "compiler/cuda.h"

namespace attnjit::compiler {

struct ParsedLog {
  std::vector<CudaResources> resources;  // in the order of the log
  std::vector<std::string> warnings;     // see CudaBinary
  double ptxas_ms = 0;                   // of all kernels
};

// A program log made with `--ptxas-options=-v`.
ParsedLog parse_nvrtc_log(const std::string& log);

}  // namespace attnjit::compiler
