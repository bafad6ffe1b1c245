// The safetensors format.
#include "bench/safetensors.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "bench/failure.h"

namespace attnjit::tool {

namespace {

using nlohmann::json;

// Every type of the format that is a whole number of bytes, so that a file is checked in full whatever is read of it.
constexpr std::pair<std::string_view, int> kFormatTypes[] = {
    {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
    {"I16", 2},  {"U16", 2}, {"F16", 2}, {"BF16", 2},    {"I32", 4},     {"U32", 4},
    {"F32", 4},  {"I64", 8}, {"U64", 8}, {"F64", 8},     {"C64", 8},
};

std::optional<int> format_type_size(std::string_view dtype) {
  for (const auto& [name, size] : kFormatTypes) {
    if (name == dtype) return size;
  }
  return std::nullopt;
}

std::string errno_text() { return std::strerror(errno); }

// Takes the header apart as it is parsed: nothing is kept but the entries, so a hostile header costs no more memory
// than a good one of its size, however deep or wide its JSON is. `error` says what was wrong when parsing stops.
class HeaderHandler : public nlohmann::json_sax<json> {
 public:
  std::vector<SafetensorsEntry> entries;
  std::map<std::string, std::string> metadata;
  std::string error;

  bool null() override { return unexpected("null"); }
  bool boolean(bool) override { return unexpected("a bool"); }
  bool number_integer(number_integer_t) override { return unexpected("a negative number"); }
  bool number_float(number_float_t, const string_t&) override {
    return unexpected("a number that is no unsigned 64-bit integer");
  }
  bool binary(binary_t&) override { return unexpected("binary data"); }

  bool number_unsigned(number_unsigned_t value) override {
    if (state_ == State::kShape) {
      if (value > static_cast<std::uint64_t>(INT64_MAX)) return fail("an extent of its shape is larger than 2^63 - 1");
      if (current_.shape.size() == SafetensorsReader::kMaxRank) {
        return fail(fmt::format("its shape has more than {} dimensions", SafetensorsReader::kMaxRank));
      }
      current_.shape.push_back(static_cast<std::int64_t>(value));
      return true;
    }
    if (state_ == State::kOffsets) {
      if (offsets_.size() == 2) return fail("'data_offsets' has more than two numbers");
      offsets_.push_back(value);
      return true;
    }
    return unexpected("a number");
  }

  bool string(string_t& value) override {
    if (state_ == State::kMetadata) {
      metadata[key_] = value;
      return true;
    }
    if (state_ == State::kTensor && key_ == "dtype") {
      current_.dtype = value;
      return true;
    }
    return unexpected("a string");
  }

  bool start_object(std::size_t) override {
    if (state_ == State::kStart) {
      state_ = State::kTop;
      return true;
    }
    if (state_ != State::kTop) return unexpected("an object");
    fields_.clear();
    if (key_ == "__metadata__") {
      state_ = State::kMetadata;
    } else {
      state_ = State::kTensor;
      current_ = {};
      current_.name = key_;
    }
    return true;
  }

  bool key(string_t& value) override {
    if (state_ == State::kTop) {
      if (!names_.insert(value).second) {
        error = fmt::format("the name {} appears twice", in_quotes(value));
        return false;
      }
    } else if (!fields_.insert(value).second) {
      return fail(fmt::format("{} appears twice", in_quotes(value)));
    } else if (state_ == State::kTensor && value != "dtype" && value != "shape" && value != "data_offsets") {
      return fail(fmt::format("unknown field {} (allowed: dtype, shape, data_offsets)", in_quotes(value)));
    }
    key_ = value;
    return true;
  }

  bool end_object() override {
    if (state_ == State::kTensor) {
      for (const char* field : {"dtype", "shape", "data_offsets"}) {
        if (!fields_.contains(field)) return fail(fmt::format("'{}' is missing", field));
      }
      entries.push_back(std::move(current_));
    }
    state_ = state_ == State::kTop ? State::kEnd : State::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (state_ == State::kTensor && key_ == "shape") {
      state_ = State::kShape;
      return true;
    }
    if (state_ == State::kTensor && key_ == "data_offsets") {
      state_ = State::kOffsets;
      offsets_.clear();
      return true;
    }
    return unexpected("an array");
  }

  bool end_array() override {
    if (state_ == State::kOffsets) {
      if (offsets_.size() != 2) return fail("'data_offsets' is not two numbers");
      current_.begin = offsets_[0];
      current_.end = offsets_[1];
    }
    state_ = State::kTensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string& token, const json::exception&) override {
    error = fmt::format("it is not JSON at byte {} of the header, near {}", position, in_quotes(token));
    return false;
  }

 private:
  enum class State { kStart, kTop, kMetadata, kTensor, kShape, kOffsets, kEnd };

  bool fail(const std::string& what) {
    error = fmt::format("{}: {}", state_ == State::kMetadata ? "'__metadata__'" : "tensor " + in_quotes(current_.name),
                        what);
    return false;
  }

  bool unexpected(const char* what) {
    switch (state_) {
      case State::kStart:
      case State::kEnd:
        error = fmt::format("it is {} where a JSON object is due", what);
        return false;
      case State::kTop:
        error =
            fmt::format("{} is {} where an object with dtype, shape and data_offsets is due", in_quotes(key_), what);
        return false;
      case State::kMetadata:
        return fail(fmt::format("{} is {} where a string is due", in_quotes(key_), what));
      case State::kTensor:
        return fail(fmt::format("'{}' is {}", key_, what));
      case State::kShape:
        return fail(fmt::format("'shape' contains {}", what));
      case State::kOffsets:
        return fail(fmt::format("'data_offsets' contains {}", what));
    }
    return false;
  }

  State state_ = State::kStart;
  std::string key_;
  SafetensorsEntry current_;
  std::vector<std::uint64_t> offsets_;
  std::set<std::string> names_, fields_;
};

// Bytes of a shape, or nullopt where the product of its extents, zeros left out, does not fit 63 bits: so strides fit,
// too.
std::optional<std::uint64_t> byte_count(const std::vector<std::int64_t>& shape, int element_size) {
  std::int64_t bytes = element_size;
  bool empty = false;
  for (std::int64_t extent : shape) {
    empty = empty || extent == 0;
    if (extent != 0 && __builtin_mul_overflow(bytes, extent, &bytes)) return std::nullopt;
  }
  return empty ? 0 : static_cast<std::uint64_t>(bytes);
}

// Reads all of [offset, offset + size) or says why not; `path` is for the message.
void read_exactly(int file, const std::string& path, void* to, std::uint64_t size, std::uint64_t offset) {
  auto* at = static_cast<char*>(to);
  while (size > 0) {
    const ssize_t got = ::pread(file, at, std::min<std::uint64_t>(size, 1u << 30), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) continue;
    if (got < 0) throw environment_error(fmt::format("cannot read {}: {}", in_quotes(path), errno_text()));
    if (got == 0) throw environment_error(fmt::format("{} became shorter while it was read", in_quotes(path)));
    at += got;
    offset += static_cast<std::uint64_t>(got);
    size -= static_cast<std::uint64_t>(got);
  }
}

void write_exactly(int file, const std::string& path, const void* from, std::uint64_t size) {
  const auto* at = static_cast<const char*>(from);
  while (size > 0) {
    const ssize_t put = ::write(file, at, std::min<std::uint64_t>(size, 1u << 30));
    if (put < 0 && errno == EINTR) continue;
    if (put < 0) throw environment_error(fmt::format("cannot write {}: {}", in_quotes(path), errno_text()));
    at += put;
    size -= static_cast<std::uint64_t>(put);
  }
}

// A file beside the target that disappears unless it is published.
class TemporaryFile {
 public:
  explicit TemporaryFile(const std::filesystem::path& target) : path_(target.string() + ".XXXXXX") {
    file_ = ::mkstemp(path_.data());
    if (file_ < 0) {
      throw environment_error(
          fmt::format("cannot create a file beside {}: {}", in_quotes(target.string()), errno_text()));
    }
    // mkstemp makes it private; give it what any new file gets.
    const mode_t mask = ::umask(0);
    ::umask(mask);
    ::fchmod(file_, 0666 & ~mask);
  }
  ~TemporaryFile() {
    if (file_ >= 0) ::close(file_);
    if (!published_) ::unlink(path_.c_str());
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;

  int file() const { return file_; }
  void publish(const std::filesystem::path& target) {
    if (::fsync(file_) != 0 || ::rename(path_.c_str(), target.c_str()) != 0) {
      throw environment_error(fmt::format("cannot write {}: {}", in_quotes(target.string()), errno_text()));
    }
    published_ = true;
  }

 private:
  std::string path_;
  int file_ = -1;
  bool published_ = false;
};

}  // namespace

std::string in_quotes(std::string_view text) {
  std::string shown = "'";
  for (char c : text.substr(0, 60)) shown += static_cast<unsigned char>(c) < 0x20 || c == 0x7f ? '?' : c;
  if (text.size() > 60) {
    // A cut must not end inside a UTF-8 sequence.
    while (shown.size() > 1 && (static_cast<unsigned char>(shown.back()) & 0xc0) == 0x80) shown.pop_back();
    if (static_cast<unsigned char>(shown.back()) >= 0xc0) shown.pop_back();
    shown += "...";
  }
  return shown + "'";
}

SafetensorsReader::SafetensorsReader(std::string path) : path_(std::move(path)) {
  // Not blocking, so that a named pipe is refused below and not waited for.
  file_ = ::open(path_.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (file_ < 0) {
    const std::string message = fmt::format("cannot open {}: {}", in_quotes(path_), errno_text());
    throw errno == ENOENT || errno == ENOTDIR ? user_error(message) : environment_error(message);
  }
  try {
    const auto bad = [&](const std::string& what) {
      return user_error(fmt::format("{} is not a valid safetensors file: {}", in_quotes(path_), what));
    };
    struct stat status{};
    if (::fstat(file_, &status) != 0) {
      throw environment_error(fmt::format("cannot read {}: {}", in_quotes(path_), errno_text()));
    }
    if (!S_ISREG(status.st_mode)) throw user_error(fmt::format("{} is not a regular file", in_quotes(path_)));
    const auto file_size = static_cast<std::uint64_t>(status.st_size);
    if (file_size < 8) throw bad(fmt::format("it has {} bytes, fewer than the 8 of the header's length", file_size));

    unsigned char length[8];
    read_exactly(file_, path_, length, sizeof length, 0);
    std::uint64_t header_size = 0;
    for (int i = 7; i >= 0; --i) header_size = header_size << 8 | length[i];
    if (header_size > file_size - 8) {
      throw bad(fmt::format("its header claims {} bytes, but only {} follow", header_size, file_size - 8));
    }
    if (header_size > kMaxHeaderBytes) {
      throw bad(fmt::format("its header has {} bytes; at most {} are allowed", header_size, kMaxHeaderBytes));
    }
    std::string header(header_size, '\0');
    read_exactly(file_, path_, header.data(), header_size, 8);

    HeaderHandler handler;
    if (!json::sax_parse(header, &handler)) throw bad(handler.error);
    entries_ = std::move(handler.entries);
    metadata_ = std::move(handler.metadata);
    data_begin_ = 8 + header_size;

    const std::uint64_t data_size = file_size - data_begin_;
    for (const SafetensorsEntry& entry : entries_) {
      const auto in_tensor = [&](const std::string& what) {
        return bad(fmt::format("tensor {}: {}", in_quotes(entry.name), what));
      };
      const std::optional<int> element_size = format_type_size(entry.dtype);
      if (!element_size) throw in_tensor(fmt::format("unknown dtype {}", in_quotes(entry.dtype)));
      if (entry.begin > entry.end || entry.end > data_size) {
        throw in_tensor(fmt::format("its data_offsets [{}, {}] leave the file's {} bytes of data", entry.begin,
                                    entry.end, data_size));
      }
      const std::optional<std::uint64_t> bytes = byte_count(entry.shape, *element_size);
      if (!bytes || *bytes != entry.end - entry.begin) {
        throw in_tensor(fmt::format("{} of shape [{}] takes {} bytes, but its data_offsets span {}", entry.dtype,
                                    fmt::join(entry.shape, ", "), bytes ? std::to_string(*bytes) : "too many",
                                    entry.end - entry.begin));
      }
    }
    std::vector<const SafetensorsEntry*> by_offset;
    by_offset.reserve(entries_.size());
    for (const SafetensorsEntry& entry : entries_) by_offset.push_back(&entry);
    std::ranges::sort(by_offset, {}, [](const SafetensorsEntry* e) { return std::pair(e->begin, e->end); });
    std::uint64_t covered = 0;
    for (const SafetensorsEntry* entry : by_offset) {
      if (entry->begin != covered) {
        throw bad(fmt::format("tensor {}: its data begins at byte {} where byte {} is due ({})", in_quotes(entry->name),
                              entry->begin, covered, entry->begin < covered ? "tensors overlap" : "there is a hole"));
      }
      covered = entry->end;
    }
    if (covered != data_size) {
      throw bad(fmt::format("{} bytes at its end belong to no tensor", data_size - covered));
    }
  } catch (...) {
    ::close(file_);
    throw;
  }
}

SafetensorsReader::~SafetensorsReader() { ::close(file_); }

const SafetensorsEntry* SafetensorsReader::find(std::string_view name) const {
  const auto found = std::ranges::find(entries_, name, &SafetensorsEntry::name);
  return found == entries_.end() ? nullptr : &*found;
}

Tensor SafetensorsReader::read(const SafetensorsEntry& entry) const {
  for (const ElementTypeInfo& row : element_types()) {
    if (row.safetensors != entry.dtype) continue;
    Tensor tensor(row.type, entry.shape);
    read_exactly(file_, path_, tensor.data(), entry.end - entry.begin, data_begin_ + entry.begin);
    if (row.type == ElementType::kBool) {
      for (std::byte& value : std::span(tensor.data(), tensor.bytes())) value = std::byte(value != std::byte(0));
    }
    return tensor;
  }
  throw user_error(fmt::format(
      "tensor {} of {} is {}; allowed: {}", in_quotes(entry.name), in_quotes(path_),
      entry.dtype == "F64" ? "float64, more than the kernels compute in: convert it to float32" : entry.dtype,
      element_type_names()));
}

void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, const Tensor*>>& tensors,
                       const std::map<std::string, std::string>& metadata) {
  nlohmann::ordered_json header;
  if (!metadata.empty()) header["__metadata__"] = metadata;
  std::uint64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", info(tensor->type()).safetensors},
                    {"shape", tensor->shape()},
                    {"data_offsets", {offset, offset + tensor->bytes()}}};
    offset += tensor->bytes();
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');  // the data begins on 8 bytes, as the format asks

  // Through a symbolic link, the file that it names is replaced and the link stays.
  std::error_code ignored;
  std::filesystem::path target = path;
  if (std::filesystem::exists(target, ignored)) {
    if (!std::filesystem::is_regular_file(target, ignored)) {
      throw user_error(fmt::format("output {} exists and is not a regular file", in_quotes(path)));
    }
    target = std::filesystem::canonical(target, ignored);
    if (ignored) target = path;
  }
  TemporaryFile temporary(target);
  unsigned char length[8];
  for (int i = 0; i < 8; ++i) length[i] = static_cast<unsigned char>(static_cast<std::uint64_t>(text.size()) >> 8 * i);
  write_exactly(temporary.file(), path, length, sizeof length);
  write_exactly(temporary.file(), path, text.data(), text.size());
  for (const auto& [name, tensor] : tensors) {
    write_exactly(temporary.file(), path, tensor->data(), tensor->bytes());
  }
  temporary.publish(target);
}

}  // namespace attnjit::tool
