// attnjit cache: what the disk cache holds, whether it is sound, and an empty one.
#include <attnjit/attnjit.h>
#include <fmt/chrono.h>
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <ctime>
#include <memory>
#include <string>
#include <vector>

#include "bench/api.h"
#include "bench/commands.h"
#include "bench/report.h"

namespace attnjit::tool {

namespace {

using Json = nlohmann::ordered_json;

std::string size_text(std::uint64_t bytes) {
  const auto size = static_cast<double>(bytes);
  if (bytes < 1024) return fmt::format("{} B", bytes);
  if (bytes < 1024 * 1024) return fmt::format("{:.1f} KiB", size / 1024);
  if (bytes < 1024 * 1024 * 1024) return fmt::format("{:.1f} MiB", size / (1024 * 1024));
  return fmt::format("{:.1f} GiB", size / (1024 * 1024 * 1024));
}

std::string time_text(std::time_t seconds) {
  std::tm local{};
  if (!localtime_r(&seconds, &local)) return "?";
  return fmt::format("{:%Y-%m-%d %H:%M}", local);
}

// On one line, and no longer than a table bears.
std::string about_text(const Json& entry) {
  constexpr std::size_t kMaxSize = 100;
  std::string text = entry.value("about", "");
  std::ranges::replace(text, '\n', ';');
  if (text.size() > kMaxSize) {
    std::size_t size = kMaxSize - 3;
    while ((static_cast<unsigned char>(text[size]) & 0xc0) == 0x80) --size;  // no half of a UTF-8 character
    text = text.substr(0, size) + "...";
  }
  return text;
}

std::string check_text(const Json& entry) {
  if (entry.at("valid")) return "whole";
  return entry.at("removed") ? "damaged, removed" : "damaged";
}

std::string list_text(const Json& json, bool verify) {
  std::vector<std::string> columns = {"key", "size", "last used", "first made for"};
  std::vector<bool> right = {false, true, false, false};
  if (verify) {
    columns.emplace_back("check");
    right.push_back(false);
  }
  std::vector<std::vector<std::string>> rows;
  for (const Json& entry : json.at("entries")) {
    rows.push_back(
        {entry.at("key"), size_text(entry.at("bytes")), time_text(entry.at("last_used")), about_text(entry)});
    if (verify) rows.back().push_back(check_text(entry));
  }
  return fmt::format("{}{}: {} {}, {} of at most {}\n", rows.empty() ? "" : github_table(columns, right, rows) + "\n",
                     json.at("directory").get<std::string>(), rows.size(), rows.size() == 1 ? "entry" : "entries",
                     size_text(json.at("bytes")), size_text(json.at("max_bytes")));
}

int list_cache(const std::string& format, bool verify) {
  const Json json = cache_list(make_context(1).get(), verify);
  fmt::print("{}", format == "json" ? json.dump(2) + "\n" : list_text(json, verify));
  std::size_t damaged = 0;
  for (const Json& entry : json.at("entries")) damaged += !entry.value("valid", true);
  if (damaged > 0) throw environment_error(fmt::format("damaged entries in the disk cache: {}", damaged));
  return 0;
}

int clear_cache() {
  std::size_t removed = 0;
  check(attnjit_cache_clear(make_context(1).get(), &removed));
  fmt::print("removed {} {}\n", removed, removed == 1 ? "entry" : "entries");
  return 0;
}

}  // namespace

void add_cache_command(CLI::App& app, Action& action) {
  CLI::App* cache = app.add_subcommand("cache", "The GPU binaries that are kept on disk");
  const auto add = [&](const char* name, const char* description, bool verify) {
    auto format = std::make_shared<std::string>("text");
    CLI::App* command = cache->add_subcommand(name, description);
    command->add_option("--format", *format, "text or json (default: text)")->check(CLI::IsMember({"text", "json"}));
    command->callback([=, &action] { action = [=] { return list_cache(*format, verify); }; });
  };
  add("list", "Each binary with its size and last use", false);
  add("verify", "Reads each binary, and removes those that are damaged", true);
  CLI::App* clear = cache->add_subcommand("clear", "Removes all of them");
  clear->callback([&action] { action = [] { return clear_cache(); }; });
}

}  // namespace attnjit::tool
