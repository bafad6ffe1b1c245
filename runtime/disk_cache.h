// Compiled binaries on disk, shared by the processes of one user. Every failure is a miss: the cache costs speed, never
// a result.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace attnjit::runtime {

// One file per entry: a header with magic, format version, the key, sizes and a checksum over everything, then the
// payload. Written to a temporary file, synced, and renamed. Thread safe; holds no state but its configuration.
class DiskCache {
 public:
  // `directory` empty: a cache that is switched off. The directory is created with mode 0700; one that belongs to
  // somebody else or is writable by others is refused, and reason() says so.
  DiskCache(std::filesystem::path directory, std::uint64_t max_bytes);

  bool enabled() const { return enabled_; }
  const std::string& reason() const { return reason_; }  // why not enabled
  const std::filesystem::path& directory() const { return directory_; }

  // The payload stored under `key` (hexadecimal digits), or nothing. Marks the entry as used. A corrupt, truncated or
  // foreign file is nothing, and is removed.
  std::optional<std::string> get(std::string_view key) const;
  // False where it could not be stored. Removes the least recently used entries beyond max_bytes.
  bool put(std::string_view key, std::string_view payload) const;

  struct Entry {
    std::string key;  // by its file name
    std::uint64_t bytes = 0;
    std::int64_t last_used = 0;  // seconds since the epoch
    bool valid = false;          // only where verified
  };
  // Least recently used first. `verify`: reads each entry and checks it.
  std::vector<Entry> list(bool verify) const;
  // Removes every entry; the number of them.
  std::size_t clear() const;

 private:
  std::filesystem::path directory_;
  std::uint64_t max_bytes_;
  bool enabled_ = false;
  std::string reason_;
};

}  // namespace attnjit::runtime
