// CUDA text to a binary: one compile per key in a process however many threads ask, and per machine however many
// processes, through the disk cache.
#pragma once

#include "compiler/compiler.h"
#include "runtime/binary_cache.h"
#include "runtime/logging.h"
#include "runtime/status.h"

namespace attnjit::runtime {

class Context;

// ATTNJIT_UNSUPPORTED for an architecture without the instructions of every template: older than 8.0.
Check check_cuda_arch(compiler::CudaArch arch);

// From memory, disk or NVRTC, in this order. Warnings of the binary reach the log, at `warnings`. With `options.dump`
// set it is always compiled, and not kept. ATTNJIT_ENVIRONMENT where NVRTC is missing (a binary's key names the NVRTC
// that made it) or does not know `arch`.
Result<FoundBinary> find_cuda_binary(Context& context, const compiler::CudaSource& source, compiler::CudaArch arch,
                                     const compiler::CompileOptions& options, LogLevel warnings = LogLevel::kWarn);

// Adds times to those of the same name.
void add_phases(const compiler::PhaseTimes& phases, compiler::PhaseTimes* sums);

}  // namespace attnjit::runtime
