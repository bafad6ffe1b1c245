// Reads and checks the environment variables.
#include "runtime/environment.h"

#include <fmt/format.h>
#include <pwd.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <string_view>
#include <system_error>
#include <utility>

namespace attnjit::runtime {
namespace {

// An empty variable counts as one that is not set.
std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value ? std::string_view(value) : std::string_view();
}

Failure refused(std::string_view name, std::string_view value, std::string_view allowed) {
  return {ATTNJIT_ENVIRONMENT, fmt::format("{} is '{}'; allowed: {}", name, value, allowed)};
}

constexpr std::array<std::pair<std::string_view, LogLevel>, 6> kLogLevels = {{
    {"off", LogLevel::kOff},
    {"error", LogLevel::kError},
    {"warn", LogLevel::kWarn},
    {"info", LogLevel::kInfo},
    {"debug", LogLevel::kDebug},
    {"trace", LogLevel::kTrace},
}};

constexpr std::array<std::pair<std::string_view, compiler::CpuIsa>, 4> kCpuIsas = {{
    {"sse2", compiler::CpuIsa::kSse2},
    {"avx2", compiler::CpuIsa::kAvx2},
    {"avx512", compiler::CpuIsa::kAvx512},
    {"avx512bf16", compiler::CpuIsa::kAvx512Bf16},
}};

constexpr std::array<std::string_view, 6> kDumps = {"mlir", "llvm", "asm", "cuda", "ptx", "cubin"};

constexpr std::array<std::pair<std::string_view, attnjit_backend>, 4> kBackends = {{
    {"sm90", ATTNJIT_BACKEND_SM90},
    {"sm80", ATTNJIT_BACKEND_SM80},
    {"math", ATTNJIT_BACKEND_MATH},
    {"cpu", ATTNJIT_BACKEND_CPU},
}};

// The pieces between commas; none of an empty text.
std::vector<std::string_view> split(std::string_view list) {
  std::vector<std::string_view> pieces;
  for (std::string_view rest = list; !rest.empty();) {
    const std::size_t comma = rest.find(',');
    pieces.push_back(rest.substr(0, comma));
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
  }
  return pieces;
}

// The row of `table` named `value`, or null.
template <typename T, std::size_t N>
const T* lookup(const std::array<std::pair<std::string_view, T>, N>& table, std::string_view value) {
  for (const auto& [name, entry] : table) {
    if (name == value) return &entry;
  }
  return nullptr;
}

// ~/.cache of the user whose rights this process has, or nothing. HOME may be another user's (sudo keeps it): files in
// there would be in that user's way.
std::filesystem::path home_cache() {
  const auto is_ours = [](const char* directory) {
    struct stat status;
    return ::stat(directory, &status) == 0 && status.st_uid == ::geteuid();
  };
  std::string home(variable("HOME"));
  if (!home.starts_with('/') || !is_ours(home.c_str())) {
    passwd entry;
    passwd* found = nullptr;
    std::array<char, 16384> text;
    home.clear();
    if (::getpwuid_r(::geteuid(), &entry, text.data(), text.size(), &found) == 0 && found && entry.pw_dir &&
        entry.pw_dir[0] == '/' && is_ours(entry.pw_dir)) {
      home = entry.pw_dir;
    }
  }
  return home.empty() ? std::filesystem::path() : std::filesystem::path(home) / ".cache";
}

Check read_cache(Environment* environment) {
  if (const std::string_view value = variable("ATTNJIT_CACHE_MAX_BYTES"); !value.empty()) {
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), environment->cache_max_bytes);
    if (error != std::errc() || end != value.data() + value.size()) {
      return refused("ATTNJIT_CACHE_MAX_BYTES", value, "a whole number of bytes");
    }
  }
  if (const std::string_view value = variable("ATTNJIT_DISABLE_CACHE"); !value.empty()) {
    if (value != "0" && value != "1") return refused("ATTNJIT_DISABLE_CACHE", value, "0 or 1");
    if (value == "1") {
      environment->cache_off = "ATTNJIT_DISABLE_CACHE is 1";
      return {};
    }
  }
  if (const std::string_view value = variable("ATTNJIT_CACHE_DIR"); !value.empty()) {
    // Absolute: the process may change its directory.
    std::error_code error;
    environment->cache_dir = std::filesystem::absolute(value, error);
    if (error) return refused("ATTNJIT_CACHE_DIR", value, "a path that can be made absolute: " + error.message());
    return {};
  }
  // The XDG specification has relative paths ignored.
  const std::string_view xdg = variable("XDG_CACHE_HOME");
  const std::filesystem::path base = xdg.starts_with('/') ? std::filesystem::path(xdg) : home_cache();
  if (base.empty()) {
    environment->cache_off = "this user has no home directory; ATTNJIT_CACHE_DIR names another";
  } else {
    environment->cache_dir = base / "attnjit";
  }
  return {};
}

}  // namespace

Result<Environment> read_environment() {
  Environment environment;
  if (const std::string_view value = variable("ATTNJIT_LOG"); !value.empty()) {
    const LogLevel* level = lookup(kLogLevels, value);
    if (!level) return refused("ATTNJIT_LOG", value, "off, error, warn, info, debug, trace");
    environment.log = *level;
  }
  for (const std::string_view kind : split(variable("ATTNJIT_DUMP"))) {
    if (std::find(kDumps.begin(), kDumps.end(), kind) == kDumps.end()) {
      return refused("ATTNJIT_DUMP", variable("ATTNJIT_DUMP"),
                     fmt::format("a comma-separated list of {}", fmt::join(kDumps, ", ")));
    }
    environment.dump.emplace_back(kind);
  }
  if (const std::string_view value = variable("ATTNJIT_DUMP_DIR"); !value.empty()) environment.dump_dir = value;
  if (const std::string_view value = variable("ATTNJIT_NUM_THREADS"); !value.empty()) {
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), environment.num_threads);
    if (error != std::errc() || end != value.data() + value.size() || environment.num_threads < 1 ||
        environment.num_threads > kMaxThreads) {
      return refused("ATTNJIT_NUM_THREADS", value, fmt::format("a whole number from 1 to {}", kMaxThreads));
    }
  }
  if (const std::string_view value = variable("ATTNJIT_CPU_ISA"); !value.empty()) {
    const compiler::CpuIsa* isa = lookup(kCpuIsas, value);
    if (!isa) return refused("ATTNJIT_CPU_ISA", value, "sse2, avx2, avx512, avx512bf16");
    environment.cpu_isa = *isa;
  }
  environment.nvrtc = variable("ATTNJIT_NVRTC");
  environment.cublas = variable("ATTNJIT_CUBLAS");
  for (const std::string_view name : split(variable("ATTNJIT_BACKENDS"))) {
    const attnjit_backend* backend = lookup(kBackends, name);
    if (!backend) {
      return refused("ATTNJIT_BACKENDS", variable("ATTNJIT_BACKENDS"),
                     "a comma-separated list of sm90, sm80, math, cpu");
    }
    environment.backends |= 1u << *backend;
  }
  environment.cuda_driver = variable("ATTNJIT_CUDA_DRIVER");
  if (const std::string_view value = variable("ATTNJIT_CUDA_MAX_SMS"); !value.empty()) {
    const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), environment.cuda_max_sms);
    if (error != std::errc() || end != value.data() + value.size() || environment.cuda_max_sms < 1) {
      return refused("ATTNJIT_CUDA_MAX_SMS", value, "a whole number from 1 on");
    }
  }
  if (Check failure = read_cache(&environment)) return *failure;
  return environment;
}

}  // namespace attnjit::runtime
