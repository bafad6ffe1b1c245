// Binaries by key, each compiled once: from memory, from disk, or by a compile function that one thread of one process
// runs while all others that want the key wait.
#pragma once

#include <chrono>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>

#include "compiler/compiler.h"
#include "runtime/disk_cache.h"
#include "runtime/logging.h"
#include "runtime/plan_cache.h"
#include "runtime/status.h"

namespace attnjit::runtime {

enum class BinaryOrigin : std::uint8_t { kMemory, kDisk, kCompiled };
std::string_view binary_origin_name(BinaryOrigin origin);

struct FoundBinary {
  std::shared_ptr<const compiler::CudaBinary> binary;
  std::string key;
  BinaryOrigin origin = BinaryOrigin::kCompiled;
  compiler::PhaseTimes phases;  // what this call spent: disk read, NVRTC's phases
};

// Binaries a context keeps in memory; the least recently used one goes first. Plans keep theirs alive.
inline constexpr std::size_t kMaxCachedBinaries = 256;

// Safe to use from several threads at once.
class BinaryCache {
 public:
  // Appends its phases.
  using Compile = std::function<Result<compiler::CudaBinary>(compiler::PhaseTimes*)>;

  // `patience`: how long to wait for another process that compiles the same key.
  BinaryCache(DiskCache disk, const Logger& logger, std::chrono::milliseconds patience = std::chrono::minutes(1))
      : disk_(std::move(disk)), logger_(logger), patience_(patience) {}

  const DiskCache& disk() const { return disk_; }

  // `key` in lower-case hexadecimal digits decides the binary; `about` tells a person what it is. A failure of
  // `compile` reaches the threads that waited for it, and is not kept.
  Result<FoundBinary> find(const std::string& key, std::string_view about, const Compile& compile);

 private:
  Result<FoundBinary> make(const std::string& key, std::string_view about, const Compile& compile) const;

  const DiskCache disk_;
  const Logger& logger_;
  const std::chrono::milliseconds patience_;
  PlanCache<Result<FoundBinary>> memory_{kMaxCachedBinaries};
};

// An entry's payload.
struct StoredBinary {
  std::string about;
  compiler::CudaBinary binary;
};
// As bytes, and back; nothing where the bytes are not one.
std::string binary_to_bytes(const StoredBinary& stored);
std::optional<StoredBinary> binary_from_bytes(std::string_view bytes);

}  // namespace attnjit::runtime
