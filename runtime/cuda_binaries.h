// Binaries by key: one compile per key in a process however many threads ask, and per machine however many processes,
// through the disk cache.
#pragma once

#include <memory>
#include <optional>
#include <string>

#include "compiler/compiler.h"
#include "runtime/status.h"

namespace attnjit::runtime {

class Context;

enum class BinaryOrigin : std::uint8_t { kMemory, kDisk, kCompiled };

struct FoundBinary {
  std::shared_ptr<const compiler::CudaBinary> binary;
  std::string key;
  BinaryOrigin origin = BinaryOrigin::kCompiled;
  compiler::PhaseTimes phases;  // what this call spent: disk read, NVRTC's phases
};

// From memory, disk or NVRTC, in this order. Warnings of the binary reach the log. With `options.dump` set it is always
// compiled. ATTNJIT_ENVIRONMENT where NVRTC is needed and missing.
Result<FoundBinary> find_cuda_binary(Context& context, const compiler::CudaSource& source, compiler::CudaArch arch,
                                     const compiler::CompileOptions& options);

}  // namespace attnjit::runtime
