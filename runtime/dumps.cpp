// Names and writes the files of ATTNJIT_DUMP.
#include "runtime/dumps.h"

#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <filesystem>
#include <fstream>
#include <system_error>
#include <utility>

namespace attnjit::runtime {
namespace {

struct Kind {
  std::string_view name, extension, comment;
};
constexpr std::array<Kind, 6> kKinds = {{{"mlir", "mlir", "//"},
                                         {"llvm", "ll", ";"},
                                         {"asm", "s", "#"},
                                         {"cuda", "cu", "//"},
                                         {"ptx", "ptx", "//"},
                                         {"cubin", "cubin", ""}}};  // bytes: no header

}  // namespace

DumpFiles::DumpFiles(const Context& context, std::string_view key, std::string header)
    : context_(context), header_(std::move(header)) {
  const XXH128_hash_t hash = XXH3_128bits(key.data(), key.size());
  name_ = fmt::format("attnjit-{:016x}", hash.high64 ^ hash.low64);
}

bool DumpFiles::wants(std::string_view kind) const {
  const auto& wanted = context_.environment().dump;
  return std::find(wanted.begin(), wanted.end(), kind) != wanted.end();
}

bool DumpFiles::any() const { return !context_.environment().dump.empty(); }

void DumpFiles::write(std::string_view kind, std::string_view part, std::string_view text) const {
  const auto found = std::find_if(kKinds.begin(), kKinds.end(), [&](const Kind& known) { return known.name == kind; });
  if (found == kKinds.end()) return;
  const std::filesystem::path directory = context_.environment().dump_dir;
  const std::filesystem::path path =
      directory / fmt::format("{}{}{}.{}", name_, part.empty() ? "" : "-", part, found->extension);
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  std::ofstream file(path, std::ios::binary);
  for (std::string_view rest = header_; !rest.empty() && !found->comment.empty();) {
    const std::size_t newline = rest.find('\n');
    file << found->comment << ' ' << rest.substr(0, newline) << '\n';
    rest = newline == std::string_view::npos ? std::string_view() : rest.substr(newline + 1);
  }
  file << text;
  file.close();
  const bool written = !file.fail();
  const LogLevel level = written ? LogLevel::kInfo : LogLevel::kWarn;
  if (context_.logger().enabled(level)) {
    context_.logger().log(level, fmt::format("{} {}", written ? "wrote" : "cannot write", path.string()));
  }
}

CollectText DumpFiles::collector(const CollectText& collect) const {
  if (!any() && !collect) return nullptr;
  return [this, &collect](std::string_view kind, std::string_view text) {
    if (wants(kind)) write(kind, "", text);
    if (collect) collect(kind, text);
  };
}

}  // namespace attnjit::runtime
