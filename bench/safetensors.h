// Reads and writes safetensors files: 8 bytes of little-endian header length, a JSON header, the tensors' bytes.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/tensor.h"

namespace attnjit::tool {

// One tensor as the header describes it.
struct SafetensorsEntry {
  std::string name;
  std::string dtype;  // as the format spells it: "F32"
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // bytes, within the data
};

// An open file whose header has been checked: every dtype is known, every shape's bytes are its range of the data, the
// ranges cover the data without overlap or hole, no name appears twice. What is allocated for a header is bounded by
// the file's size and kMaxHeaderBytes. Failures are the user's (a wrong file) or the environment's (an unreadable one).
class SafetensorsReader {
 public:
  static constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the format's limit
  static constexpr std::size_t kMaxRank = 8;

  explicit SafetensorsReader(std::string path);
  ~SafetensorsReader();
  SafetensorsReader(const SafetensorsReader&) = delete;
  SafetensorsReader& operator=(const SafetensorsReader&) = delete;

  const std::string& path() const { return path_; }
  const std::vector<SafetensorsEntry>& entries() const { return entries_; }
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  const SafetensorsEntry* find(std::string_view name) const;
  // A copy in aligned memory; bools as 0 or 1. A type that the library does not read (float64, uint64...) is refused.
  Tensor read(const SafetensorsEntry& entry) const;

 private:
  std::string path_;
  int file_ = -1;
  std::uint64_t data_begin_ = 0;
  std::vector<SafetensorsEntry> entries_;
  std::map<std::string, std::string> metadata_;
};

// Writes row-major tensors to a new file beside `path`, then renames it: `path` is either the whole file or as before.
void write_safetensors(const std::string& path, const std::vector<std::pair<std::string, const Tensor*>>& tensors,
                       const std::map<std::string, std::string>& metadata);

// Text from outside for a message: quoted, control characters shown as '?', cut at 60 bytes.
std::string in_quotes(std::string_view text);

}  // namespace attnjit::tool
