// Memory, disk, compile; and a binary as bytes.
#include "runtime/binary_cache.h"

#include <fmt/format.h>

#include <algorithm>
#include <thread>
#include <utility>
#include <vector>

namespace attnjit::runtime {
namespace {

using compiler::CudaBinary;

// ---- A binary as bytes: the fields in order; texts and lists with their length in front.

// Grows with every change of what the fields mean.
constexpr std::uint32_t kBytesVersion = 1;

class Writer {
 public:
  template <typename Number>
  void number(Number value) {
    bytes_.append(reinterpret_cast<const char*>(&value), sizeof(value));
  }
  void text(const std::string& text) {
    number(static_cast<std::uint64_t>(text.size()));
    bytes_.append(text);
  }
  template <typename T, typename Element>
  void list(const std::vector<T>& list, Element&& element) {
    number(static_cast<std::uint64_t>(list.size()));
    for (const T& value : list) element(value);
  }
  std::string take() { return std::move(bytes_); }

 private:
  std::string bytes_;
};

class Reader {
 public:
  explicit Reader(std::string_view bytes) : rest_(bytes) {}

  template <typename Number>
  void number(Number& value) {
    if (!has(sizeof(value))) return;
    rest_.copy(reinterpret_cast<char*>(&value), sizeof(value));
    rest_.remove_prefix(sizeof(value));
  }
  void text(std::string& text) {
    std::uint64_t size = 0;
    number(size);
    if (!has(size)) return;
    text.assign(rest_.substr(0, size));
    rest_.remove_prefix(size);
  }
  template <typename T, typename Element>
  void list(std::vector<T>& list, Element&& element) {
    std::uint64_t size = 0;
    number(size);
    // A length is believed only as far as its elements come.
    for (std::uint64_t i = 0; i < size && good_; ++i) element(list.emplace_back());
  }
  bool done() const { return good_ && rest_.empty(); }

 private:
  bool has(std::uint64_t size) {
    good_ = good_ && size <= rest_.size();
    return good_;
  }

  std::string_view rest_;
  bool good_ = true;
};

// The fields, for both directions. A binding names every member: a new one is an error here.
template <typename Archive, typename Stored>
void describe(Archive& archive, Stored& stored) {
  auto& [about, binary] = stored;
  auto& [cubin, resources, warnings] = binary;
  archive.text(about);
  archive.text(cubin);
  archive.list(resources, [&](auto& kernel) {
    auto& [entry, registers, spill_stores, spill_loads, stack, shared] = kernel;
    archive.text(entry);
    for (auto* number : {&registers, &spill_stores, &spill_loads, &stack, &shared}) archive.number(*number);
  });
  archive.list(warnings, [&](auto& warning) { archive.text(warning); });
}

// ---- Time

using Clock = std::chrono::steady_clock;

double milliseconds_since(Clock::time_point start) {
  return std::chrono::duration<double, std::milli>(Clock::now() - start).count();
}

}  // namespace

std::string_view binary_origin_name(BinaryOrigin origin) {
  switch (origin) {
    case BinaryOrigin::kMemory:
      return "memory";
    case BinaryOrigin::kDisk:
      return "disk";
    case BinaryOrigin::kCompiled:
      return "compiled";
  }
  return "?";
}

std::string binary_to_bytes(const StoredBinary& stored) {
  Writer writer;
  writer.number(kBytesVersion);
  describe(writer, stored);
  return writer.take();
}

std::optional<StoredBinary> binary_from_bytes(std::string_view bytes) {
  Reader reader(bytes);
  std::uint32_t version = 0;
  reader.number(version);
  if (version != kBytesVersion) return std::nullopt;
  StoredBinary stored;
  describe(reader, stored);
  if (!reader.done()) return std::nullopt;
  return stored;
}

Result<FoundBinary> BinaryCache::find(const std::string& key, std::string_view about, const Compile& compile) {
  auto found = memory_.get(key, [&] { return make(key, about, compile); });
  if (found.outcome && !found.compiled_here) {
    found.outcome->origin = BinaryOrigin::kMemory;
    found.outcome->phases.clear();
  }
  return std::move(found.outcome);
}

Result<FoundBinary> BinaryCache::make(const std::string& key, std::string_view about, const Compile& compile) const {
  using State = DiskCache::KeyLock::State;
  const Clock::time_point start = Clock::now();
  const auto from_disk = [&]() -> std::optional<CudaBinary> {
    const std::optional<std::string> bytes = disk_.get(key);
    std::optional<StoredBinary> stored = bytes ? binary_from_bytes(*bytes) : std::nullopt;
    if (!stored) return std::nullopt;
    return std::move(stored->binary);
  };
  const auto found = [&](CudaBinary binary, BinaryOrigin origin, compiler::PhaseTimes phases) {
    return FoundBinary{.binary = std::make_shared<const CudaBinary>(std::move(binary)),
                       .key = key,
                       .origin = origin,
                       .phases = std::move(phases)};
  };
  const auto hit = [&](CudaBinary binary, const char* phase) {
    return found(std::move(binary), BinaryOrigin::kDisk, {{phase, milliseconds_since(start)}});
  };
  if (auto binary = from_disk()) return hit(std::move(*binary), "disk_read");

  DiskCache::KeyLock lock = disk_.lock(key);
  State state = lock.try_acquire();
  bool waited = false;
  for (auto pause = std::chrono::milliseconds(1); state == State::kBusy && Clock::now() - start < patience_;
       pause = std::min(2 * pause, std::chrono::milliseconds(10))) {
    std::this_thread::sleep_for(pause);
    waited = true;
    if (auto binary = from_disk()) return hit(std::move(*binary), "wait_for_process");
    state = lock.try_acquire();
  }
  // Stored between the look and the lock.
  if (auto binary = from_disk()) return hit(std::move(*binary), waited ? "wait_for_process" : "disk_read");
  compiler::PhaseTimes phases;
  if (waited) {
    phases.emplace_back("wait_for_process", milliseconds_since(start));
    // Whoever held the lock stored nothing: a full disk, or a compile that fails. The next ones need not queue.
    lock.release();
  }
  Result<CudaBinary> compiled = compile(&phases);
  if (!compiled) return compiled.failure();
  StoredBinary stored{.about = std::string(about), .binary = std::move(*compiled)};
  if (disk_.enabled()) {
    const Clock::time_point written = Clock::now();
    std::string why;
    if (disk_.put(key, binary_to_bytes(stored), &why)) {
      phases.emplace_back("disk_write", milliseconds_since(written));
    } else if (logger_.enabled(LogLevel::kWarn)) {
      logger_.log(LogLevel::kWarn, fmt::format("binary {} is not kept on disk: {}", key, why));
    }
  }
  return found(std::move(stored.binary), BinaryOrigin::kCompiled, std::move(phases));
}

}  // namespace attnjit::runtime
