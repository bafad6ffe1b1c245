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

// An open file, closed with the object.
class FileDescriptor {
 public:
  FileDescriptor() = default;
  explicit FileDescriptor(int fd) : fd_(fd) {}
  FileDescriptor(FileDescriptor&& other) noexcept : fd_(other.release()) {}
  FileDescriptor& operator=(FileDescriptor&& other) noexcept;
  ~FileDescriptor();
  explicit operator bool() const { return fd_ >= 0; }
  int get() const { return fd_; }
  int release();

 private:
  int fd_ = -1;
};

// One file per entry: a header with magic, format version, the key, sizes and a checksum over everything, then the
// payload. Written to a temporary file, synced, and renamed. Thread safe; holds no state but its configuration: the
// directory may be removed, filled or made read-only under it, and several processes may use it at once.
//
// The directory is created with mode 0700 when something is first stored. One that belongs to somebody else or that
// others may write to is refused, also where a symbolic link leads there.
class DiskCache {
 public:
  // Larger payloads are not stored, and a larger file is no entry.
  static constexpr std::uint64_t kMaxPayloadBytes = std::uint64_t{1} << 28;

  // `directory` empty: a cache that is switched off, for `reason_off`.
  DiskCache(std::filesystem::path directory, std::uint64_t max_bytes, std::string reason_off = "it is switched off");

  bool enabled() const { return reason_.empty(); }
  const std::string& reason() const { return reason_; }  // why not enabled
  const std::filesystem::path& directory() const { return directory_; }
  std::uint64_t max_bytes() const { return max_bytes_; }

  // The payload stored under `key` (1 to 128 lower-case hexadecimal digits), or nothing. Marks the entry as used. A
  // corrupt, truncated or foreign file is nothing; the next put replaces it.
  std::optional<std::string> get(std::string_view key) const;
  // The same without a mark: to look is no use.
  std::optional<std::string> peek(std::string_view key) const;
  // False where it could not be stored, with `why` set where given. Removes the least recently used entries beyond
  // max_bytes, and what writers that died left behind.
  bool put(std::string_view key, std::string_view payload, std::string* why = nullptr) const;

  struct Entry {
    std::string key;  // by its file name
    std::uint64_t bytes = 0;
    std::int64_t last_used = 0;  // seconds since the epoch; right to a minute
    bool valid = false;          // only where verified
  };
  // Least recently used first. `verify`: reads each entry and checks it.
  std::vector<Entry> list(bool verify) const;
  // False where there was none.
  bool remove(std::string_view key) const;
  // Removes every entry; the number of them. `why`, where given, is set when one cannot be removed.
  std::size_t clear(std::string* why = nullptr) const;

  // The right to make the entry of one key, held by one thread of one process at a time; advisory. It ends with the
  // object or the process. The entry is not locked: readers and writers need no lock.
  class KeyLock {
   public:
    enum class State : std::uint8_t { kHeld, kBusy, kUnavailable };  // unavailable: nobody can hold it here
    State try_acquire();
    void release();
    KeyLock(KeyLock&&) = default;
    KeyLock& operator=(KeyLock&&) = delete;
    ~KeyLock() { release(); }

   private:
    friend class DiskCache;
    KeyLock(FileDescriptor file, std::int64_t place) : file_(std::move(file)), place_(place) {}
    FileDescriptor file_;
    std::int64_t place_;
    bool held_ = false;
  };
  KeyLock lock(std::string_view key) const;

 private:
  std::optional<std::string> read(std::string_view key, bool mark_used) const;
  FileDescriptor open_directory(bool create, std::string* why) const;

  std::filesystem::path directory_;
  std::uint64_t max_bytes_;
  std::string reason_;
};

}  // namespace attnjit::runtime
