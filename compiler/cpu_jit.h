// Native code in memory: object files in, addresses out.
#pragma once

#include <memory>
#include <string>

#include "llvm/ADT/ArrayRef.h"
#include "llvm/ADT/StringRef.h"
#include "llvm/Support/MemoryBuffer.h"

namespace attnjit::compiler {

// Code of one object file, unmapped when destroyed. Callable from any thread.
class NativeCode {
 public:
  virtual ~NativeCode() = default;
  virtual void* entry() const = 0;  // the first that was looked up
  // Null for a name that was not looked up.
  virtual void* find(llvm::StringRef name) const = 0;
};

struct LoadResult {
  std::shared_ptr<const NativeCode> code;
  std::string error;  // set where code is null
};

// Loads `object` and looks `entries` up, at least one. The code may call the C library's functions named in cpu_jit.cpp
// and nothing else of the process. Safe to call from several threads.
LoadResult load_object(std::unique_ptr<llvm::MemoryBuffer> object, llvm::ArrayRef<llvm::StringRef> entries);

}  // namespace attnjit::compiler
