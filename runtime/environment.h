// The environment variables of the library: every one there is, read once when a context is created.
// docs/environment.md is the table for users.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "runtime/logging.h"
#include "runtime/status.h"

namespace attnjit::runtime {

struct Environment {
  LogLevel log = LogLevel::kOff;            // ATTNJIT_LOG: off, error, warn, info, debug, trace
  std::vector<std::string> dump;            // ATTNJIT_DUMP: comma list of mlir, llvm, asm, cuda, ptx, cubin
  std::string dump_dir = ".";               // ATTNJIT_DUMP_DIR: created when missing
  int num_threads = 0;                      // ATTNJIT_NUM_THREADS: 1 to kMaxThreads; 0: not set
  std::optional<compiler::CpuIsa> cpu_isa;  // ATTNJIT_CPU_ISA: sse2, avx2, avx512, avx512bf16; nothing: the host's
  std::string nvrtc;                        // ATTNJIT_NVRTC: the library's path or name; empty: the usual names
  std::string cublas;                       // ATTNJIT_CUBLAS: likewise
  // Where binaries are kept, absolute: ATTNJIT_CACHE_DIR, else $XDG_CACHE_HOME/attnjit, else ~/.cache/attnjit. Empty
  // with ATTNJIT_DISABLE_CACHE=1 and for a user without a home, and then cache_off says why.
  std::filesystem::path cache_dir;
  std::string cache_off;
  std::uint64_t cache_max_bytes = std::uint64_t{1} << 30;  // ATTNJIT_CACHE_MAX_BYTES
  std::uint32_t backends = 0;  // ATTNJIT_BACKENDS: comma list of names; 1 << attnjit_backend; 0: not set
  std::string cuda_driver;     // ATTNJIT_CUDA_DRIVER: file of the CUDA driver; empty: libcuda.so.1
  int cuda_max_sms = 0;        // ATTNJIT_CUDA_MAX_SMS: from 1 on; 0: not set
};

inline constexpr int kMaxThreads = 1024;

// Reads the process's environment. A value that is not allowed is an ATTNJIT_ENVIRONMENT failure that names it.
Result<Environment> read_environment();

}  // namespace attnjit::runtime
