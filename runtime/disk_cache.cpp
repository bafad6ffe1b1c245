// The disk cache: every operation opens and judges the directory anew and works relative to what it opened.
#include "runtime/disk_cache.h"

#include <dirent.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <sys/random.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <ctime>
#include <system_error>
#include <tuple>
#include <utility>

namespace attnjit::runtime {
namespace {

constexpr std::string_view kEntrySuffix = ".attnjit";
constexpr std::string_view kTemporaryPrefix = "tmp-";
constexpr const char* kLockFile = "lock";
constexpr std::size_t kMaxKeySize = 128;
// A writer that takes longer finds its temporary file gone, and stores nothing. Whether it lives cannot be asked: it
// may run on another host or in another PID namespace.
constexpr std::int64_t kTemporaryLifeSeconds = 600;
// A use is recorded in the entry's modification time (access times are not kept on many mounts), and not at every
// read: each record writes to the disk.
constexpr std::int64_t kUseMarkSeconds = 60;

std::string error_text(int error) { return std::generic_category().message(error); }

void set(std::string* why, std::string text) {
  if (why) *why = std::move(text);
}

// ---- The format of an entry, little-endian as every machine that it is built for

constexpr std::array<char, 8> kMagic = {'a', 't', 't', 'n', 'j', 'i', 't', '\0'};
constexpr std::uint32_t kFormatVersion = 1;

struct Header {
  std::array<char, 8> magic = kMagic;
  std::uint32_t version = kFormatVersion;
  std::uint32_t key_size = 0;
  std::uint64_t payload_size = 0;
  std::array<std::uint64_t, 2> checksum = {};  // of the fields above, the key and the payload
};
static_assert(sizeof(Header) == 40);  // no padding: the file's bytes are the object's

std::array<std::uint64_t, 2> checksum_of(const Header& header, std::string_view key, std::string_view payload) {
  XXH3_state_t state;
  XXH3_128bits_reset(&state);
  XXH3_128bits_update(&state, &header, offsetof(Header, checksum));
  XXH3_128bits_update(&state, key.data(), key.size());
  XXH3_128bits_update(&state, payload.data(), payload.size());
  const XXH128_hash_t hash = XXH3_128bits_digest(&state);
  return {hash.low64, hash.high64};
}

// ---- Names. A key is part of a path: nothing but digits may reach it.

bool valid_key(std::string_view key) {
  return !key.empty() && key.size() <= kMaxKeySize &&
         key.find_first_not_of("0123456789abcdef") == std::string_view::npos;
}

std::string entry_name(std::string_view key) { return fmt::format("{}{}", key, kEntrySuffix); }

// The key of an entry's file name; empty for any other name.
std::string_view key_of(std::string_view name) {
  if (!name.ends_with(kEntrySuffix)) return {};
  name.remove_suffix(kEntrySuffix.size());
  return valid_key(name) ? name : std::string_view();
}

// ---- Files

template <typename Call>
auto retried(Call&& call) {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

bool read_all(int fd, void* data, std::size_t size) {
  for (char* place = static_cast<char*>(data); size > 0;) {
    const ssize_t count = retried([&] { return ::read(fd, place, size); });
    if (count <= 0) return false;
    place += count;
    size -= static_cast<std::size_t>(count);
  }
  return true;
}

bool write_all(int fd, std::string_view data) {
  while (!data.empty()) {
    const ssize_t count = retried([&] { return ::write(fd, data.data(), data.size()); });
    if (count <= 0) return false;
    data.remove_prefix(static_cast<std::size_t>(count));
  }
  return true;
}

bool writable_by_others(const struct stat& status) { return (status.st_mode & (S_IWGRP | S_IWOTH)) != 0; }

// An entry's payload, checked; nothing where anything is wrong with the file.
std::optional<std::string> read_entry(int directory, std::string_view key, bool mark_used) {
  // Neither led elsewhere by a link nor held up by a pipe.
  const FileDescriptor file(retried([&] {
    return ::openat(directory, entry_name(key).c_str(), O_RDONLY | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK | O_NOCTTY);
  }));
  struct stat status;
  if (!file || ::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode)) return std::nullopt;
  if (status.st_uid != ::geteuid() || writable_by_others(status)) return std::nullopt;

  Header header;
  std::array<char, kMaxKeySize> echoed;
  if (!read_all(file.get(), &header, sizeof(header))) return std::nullopt;
  if (header.magic != kMagic || header.version != kFormatVersion || header.key_size != key.size() ||
      header.payload_size > DiskCache::kMaxPayloadBytes ||
      static_cast<std::uint64_t>(status.st_size) != sizeof(header) + header.key_size + header.payload_size) {
    return std::nullopt;
  }
  if (!read_all(file.get(), echoed.data(), key.size()) || key != std::string_view(echoed.data(), key.size())) {
    return std::nullopt;
  }
  std::string payload(header.payload_size, '\0');
  if (!read_all(file.get(), payload.data(), payload.size())) return std::nullopt;
  if (checksum_of(header, key, payload) != header.checksum) return std::nullopt;

  // A time in the future is a clock that was set back: it would outlive everything.
  if (const std::int64_t age = std::time(nullptr) - status.st_mtim.tv_sec;
      mark_used && (age > kUseMarkSeconds || age < -kUseMarkSeconds)) {
    const std::array<timespec, 2> times = {timespec{0, UTIME_OMIT}, timespec{0, UTIME_NOW}};
    ::futimens(file.get(), times.data());
  }
  return payload;
}

// What stands in the directory under a name of ours.
struct Item {
  std::string name;
  std::uint64_t bytes = 0;
  timespec last_used{};
};

struct Items {
  std::vector<Item> entries;      // least recently used first
  std::vector<Item> temporaries;  // in any order
};

Items scan(int directory) {
  Items items;
  // A descriptor of its own: reading moves the position, closedir closes.
  FileDescriptor own(::openat(directory, ".", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  DIR* stream = own ? ::fdopendir(own.get()) : nullptr;
  if (!stream) return items;
  own.release();
  while (const dirent* row = ::readdir(stream)) {
    const std::string_view name = row->d_name;
    const bool temporary = name.starts_with(kTemporaryPrefix);
    if (!temporary && key_of(name).empty()) continue;
    struct stat status;
    if (::fstatat(directory, row->d_name, &status, AT_SYMLINK_NOFOLLOW) != 0 || S_ISDIR(status.st_mode)) continue;
    (temporary ? items.temporaries : items.entries)
        .push_back({std::string(name), static_cast<std::uint64_t>(status.st_size), status.st_mtim});
  }
  ::closedir(stream);
  std::ranges::sort(items.entries, [](const Item& a, const Item& b) {
    return std::tie(a.last_used.tv_sec, a.last_used.tv_nsec, a.name) <
           std::tie(b.last_used.tv_sec, b.last_used.tv_nsec, b.name);
  });
  return items;
}

// Entries beyond `max_bytes` except `kept`, and temporary files that nobody can be writing any more.
void trim(int directory, std::uint64_t max_bytes, const std::string& kept) {
  const Items items = scan(directory);
  const std::int64_t now = std::time(nullptr);
  for (const Item& item : items.temporaries) {
    if (now - item.last_used.tv_sec > kTemporaryLifeSeconds) ::unlinkat(directory, item.name.c_str(), 0);
  }
  std::uint64_t total = 0;
  for (const Item& item : items.entries) total += item.bytes;
  for (const Item& item : items.entries) {
    if (total <= max_bytes) break;
    if (item.name == kept) continue;
    // Gone already is as good: another process trims, too.
    if (::unlinkat(directory, item.name.c_str(), 0) == 0 || errno == ENOENT) total -= item.bytes;
  }
}

// Creates `path` and what is missing above it, for this user alone.
bool make_directories(const std::filesystem::path& path) {
  if (::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST) return true;
  if (errno != ENOENT || !path.has_relative_path() || path.parent_path() == path) return false;
  return make_directories(path.parent_path()) && (::mkdir(path.c_str(), 0700) == 0 || errno == EEXIST);
}

}  // namespace

FileDescriptor& FileDescriptor::operator=(FileDescriptor&& other) noexcept {
  FileDescriptor old(std::exchange(fd_, other.release()));
  return *this;
}

FileDescriptor::~FileDescriptor() {
  if (fd_ >= 0) ::close(fd_);
}

int FileDescriptor::release() { return std::exchange(fd_, -1); }

DiskCache::DiskCache(std::filesystem::path directory, std::uint64_t max_bytes, std::string reason_off)
    : directory_(std::move(directory)), max_bytes_(max_bytes) {
  if (directory_.empty()) {
    reason_ = std::move(reason_off);
    return;
  }
  // "a/b/" has an empty last part: the directory above it would be "a/b" itself.
  if (!directory_.has_filename()) directory_ = directory_.parent_path();
  std::string why;
  // One that is missing is created by the first put.
  if (!open_directory(false, &why)) reason_ = std::move(why);
}

// Nothing, with an empty `why` where it is only missing.
FileDescriptor DiskCache::open_directory(bool create, std::string* why) const {
  const uid_t user = ::geteuid();
  struct stat status;
  // Who may replace a link decides where it leads.
  if (::lstat(directory_.c_str(), &status) == 0 && S_ISLNK(status.st_mode) && status.st_uid != user &&
      status.st_uid != 0) {
    set(why, fmt::format("{} is a symbolic link of user {}", directory_.string(), status.st_uid));
    return {};
  }
  const auto open = [&] {
    return FileDescriptor(retried([&] { return ::open(directory_.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC); }));
  };
  FileDescriptor opened = open();
  if (!opened && errno == ENOENT) {
    if (!create) return {};
    if (make_directories(directory_)) opened = open();
  }
  if (!opened) {
    set(why, fmt::format("{}: {}", directory_.string(), error_text(errno)));
    return {};
  }
  if (::fstat(opened.get(), &status) != 0) {
    set(why, fmt::format("{}: {}", directory_.string(), error_text(errno)));
    return {};
  }
  if (status.st_uid != user) {
    set(why, fmt::format("{} belongs to user {}, not to {}", directory_.string(), status.st_uid, user));
    return {};
  }
  if (writable_by_others(status)) {
    set(why, fmt::format("{} has mode {:04o}: others may write to it", directory_.string(), status.st_mode & 07777));
    return {};
  }
  return opened;
}

std::optional<std::string> DiskCache::get(std::string_view key) const { return read(key, true); }
std::optional<std::string> DiskCache::peek(std::string_view key) const { return read(key, false); }

std::optional<std::string> DiskCache::read(std::string_view key, bool mark_used) const {
  if (!enabled() || !valid_key(key)) return std::nullopt;
  const FileDescriptor directory = open_directory(false, nullptr);
  if (!directory) return std::nullopt;
  return read_entry(directory.get(), key, mark_used);
}

bool DiskCache::put(std::string_view key, std::string_view payload, std::string* why) const {
  const auto fail = [&](std::string text) {
    set(why, std::move(text));
    return false;
  };
  if (!enabled()) return fail(reason_);
  if (!valid_key(key)) return fail("the key is not made of 1 to 128 lower-case hexadecimal digits");
  Header header{.key_size = static_cast<std::uint32_t>(key.size()), .payload_size = payload.size()};
  header.checksum = checksum_of(header, key, payload);
  const std::uint64_t size = sizeof(header) + key.size() + payload.size();
  if (payload.size() > kMaxPayloadBytes || size > max_bytes_) {
    return fail(fmt::format("{} bytes are more than the cache holds", size));
  }
  // To write beyond it would be a signal that ends the process.
  if (rlimit limit; ::getrlimit(RLIMIT_FSIZE, &limit) == 0 && limit.rlim_cur < size) {
    return fail(fmt::format("{} bytes are beyond the process's limit of file sizes", size));
  }
  std::string reason;
  const FileDescriptor directory = open_directory(true, &reason);
  if (!directory) return fail(std::move(reason));

  const auto failed = [&](int error) { return fail(fmt::format("{}: {}", directory_.string(), error_text(error))); };
  std::uint64_t number = 0;
  if (::getrandom(&number, sizeof(number), 0) != sizeof(number)) return failed(errno);
  const std::string temporary = fmt::format("{}{:016x}", kTemporaryPrefix, number);
  FileDescriptor file(retried([&] {
    return ::openat(directory.get(), temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC | O_NOFOLLOW, 0600);
  }));
  if (!file) return failed(errno);
  const std::string name = entry_name(key);
  const bool written = write_all(file.get(), {reinterpret_cast<const char*>(&header), sizeof(header)}) &&
                       write_all(file.get(), key) && write_all(file.get(), payload) &&
                       retried([&] { return ::fsync(file.get()); }) == 0 && ::close(file.release()) == 0 &&
                       ::renameat(directory.get(), temporary.c_str(), directory.get(), name.c_str()) == 0;
  if (!written) {
    const int error = errno;
    ::unlinkat(directory.get(), temporary.c_str(), 0);
    return failed(error);
  }
  trim(directory.get(), max_bytes_, name);
  return true;
}

std::vector<DiskCache::Entry> DiskCache::list(bool verify) const {
  std::vector<Entry> entries;
  if (!enabled()) return entries;
  const FileDescriptor directory = open_directory(false, nullptr);
  if (!directory) return entries;
  for (const Item& item : scan(directory.get()).entries) {
    const std::string_view key = key_of(item.name);
    const bool valid = verify && read_entry(directory.get(), key, false).has_value();
    // Not damaged, but gone since.
    if (verify && !valid && ::faccessat(directory.get(), item.name.c_str(), F_OK, AT_SYMLINK_NOFOLLOW) != 0) continue;
    entries.push_back(
        {.key = std::string(key), .bytes = item.bytes, .last_used = item.last_used.tv_sec, .valid = valid});
  }
  return entries;
}

bool DiskCache::remove(std::string_view key) const {
  if (!enabled() || !valid_key(key)) return false;
  const FileDescriptor directory = open_directory(false, nullptr);
  return directory && ::unlinkat(directory.get(), entry_name(key).c_str(), 0) == 0;
}

std::size_t DiskCache::clear(std::string* why) const {
  if (!enabled()) return 0;
  const FileDescriptor directory = open_directory(false, why);
  if (!directory) return 0;
  const Items items = scan(directory.get());
  for (const Item& item : items.temporaries) ::unlinkat(directory.get(), item.name.c_str(), 0);
  std::size_t removed = 0;
  for (const Item& item : items.entries) {
    if (::unlinkat(directory.get(), item.name.c_str(), 0) == 0) {
      ++removed;
    } else if (errno != ENOENT) {
      set(why, fmt::format("{}: {}", (directory_ / item.name).string(), error_text(errno)));
    }
  }
  return removed;
}

// ---- Locks: one byte of one file for each key, so that no file has to be created and removed for each.

DiskCache::KeyLock DiskCache::lock(std::string_view key) const {
  FileDescriptor file;
  if (enabled()) {
    if (const FileDescriptor directory = open_directory(true, nullptr)) {
      file = FileDescriptor(retried([&] {
        return ::openat(directory.get(), kLockFile, O_RDWR | O_CREAT | O_CLOEXEC | O_NOFOLLOW | O_NONBLOCK, 0600);
      }));
    }
  }
  // Two keys that share a byte wait for each other, and no more.
  return {std::move(file), static_cast<std::int64_t>(XXH3_64bits(key.data(), key.size()) >> 2)};
}

DiskCache::KeyLock::State DiskCache::KeyLock::try_acquire() {
  if (held_) return State::kHeld;
  if (!file_) return State::kUnavailable;
  // Of the open file, not of the process: two threads exclude each other, too.
  struct flock range{};
  range.l_type = F_WRLCK;
  range.l_whence = SEEK_SET;
  range.l_start = place_;
  range.l_len = 1;
  if (retried([&] { return ::fcntl(file_.get(), F_OFD_SETLK, &range); }) == 0) {
    held_ = true;
    return State::kHeld;
  }
  return errno == EAGAIN || errno == EACCES ? State::kBusy : State::kUnavailable;
}

void DiskCache::KeyLock::release() {
  if (!file_ || !held_) return;
  // Not left to close: a process that was forked meanwhile shares the open file.
  struct flock range{};
  range.l_type = F_UNLCK;
  range.l_whence = SEEK_SET;
  range.l_start = place_;
  range.l_len = 1;
  ::fcntl(file_.get(), F_OFD_SETLK, &range);
  held_ = false;
}

}  // namespace attnjit::runtime
