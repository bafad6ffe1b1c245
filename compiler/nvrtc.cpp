// NVRTC, opened at run time: which one it is, what it is told, and what its log says.
#include <dlfcn.h>
#include <elf.h>
#include <link.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <regex>
#include <type_traits>

#include "compiler/frontend.h"
#include "compiler/nvrtc_log.h"
#include "llvm/Support/xxhash.h"

namespace attnjit::compiler {

namespace {

// NVRTC's interface, as far as it is used.
struct NvrtcProgram;
using Result = int;
constexpr Result kSuccess = 0;
constexpr Result kInvalidOption = 5;
constexpr int kOldest = 1208;

struct Api {
  Result (*version)(int*, int*);
  const char* (*error_string)(Result);
  Result (*num_supported_archs)(int*);
  Result (*supported_archs)(int*);
  Result (*create)(NvrtcProgram**, const char* source, const char* name, int, const char* const*, const char* const*);
  Result (*destroy)(NvrtcProgram**);
  Result (*compile)(NvrtcProgram*, int num_options, const char* const* options);
  Result (*log_size)(NvrtcProgram*, std::size_t*);
  Result (*log)(NvrtcProgram*, char*);
  Result (*cubin_size)(NvrtcProgram*, std::size_t*);
  Result (*cubin)(NvrtcProgram*, char*);
  Result (*ptx_size)(NvrtcProgram*, std::size_t*);
  Result (*ptx)(NvrtcProgram*, char*);
};

}  // namespace

struct Nvrtc {
  Api api{};
  int version = 0;
  std::string identity;
  std::vector<int> archs;
  bool has_cache = false;  // and the option that switches it off
};

namespace {

// Empty, or the name of what is missing.
std::string find_symbols(void* library, Api& api) {
  std::string missing;
  const auto find = [&](const char* name, auto& function) {
    void* const symbol = dlsym(library, name);
    if (!symbol && missing.empty()) missing = name;
    function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(symbol);
  };
  find("nvrtcVersion", api.version);
  find("nvrtcGetErrorString", api.error_string);
  find("nvrtcGetNumSupportedArchs", api.num_supported_archs);
  find("nvrtcGetSupportedArchs", api.supported_archs);
  find("nvrtcCreateProgram", api.create);
  find("nvrtcDestroyProgram", api.destroy);
  find("nvrtcCompileProgram", api.compile);
  find("nvrtcGetProgramLogSize", api.log_size);
  find("nvrtcGetProgramLog", api.log);
  find("nvrtcGetCUBINSize", api.cubin_size);
  find("nvrtcGetCUBIN", api.cubin);
  find("nvrtcGetPTXSize", api.ptx_size);
  find("nvrtcGetPTX", api.ptx);
  return missing;
}

// ---- Identity

struct BuildId {
  const void* base;
  std::string hex;
};

int find_build_id(dl_phdr_info* info, std::size_t, void* data) {
  BuildId& wanted = *static_cast<BuildId*>(data);
  const auto contains = [&](const ElfW(Phdr) & header) {
    const auto address = reinterpret_cast<ElfW(Addr)>(wanted.base) - info->dlpi_addr;
    return header.p_type == PT_LOAD && address - header.p_vaddr < header.p_memsz;
  };
  const ElfW(Phdr)* const end = info->dlpi_phdr + info->dlpi_phnum;
  if (std::none_of(info->dlpi_phdr, end, contains)) return 0;
  for (const ElfW(Phdr)* header = info->dlpi_phdr; header != end; ++header) {
    if (header->p_type != PT_NOTE) continue;
    const char* note =
        reinterpret_cast<const char*>(info->dlpi_addr + header->p_vaddr);  // NOLINT(performance-no-int-to-ptr)
    const char* const notes_end = note + header->p_memsz;
    while (notes_end - note >= static_cast<std::ptrdiff_t>(sizeof(ElfW(Nhdr)))) {
      ElfW(Nhdr) head;
      std::memcpy(&head, note, sizeof(head));
      const auto aligned = [](std::size_t size) { return (size + 3) & ~std::size_t{3}; };
      const char* const name = note + sizeof(head);
      const char* const bytes = name + aligned(head.n_namesz);
      note = bytes + aligned(head.n_descsz);
      if (note > notes_end) break;
      if (head.n_type != NT_GNU_BUILD_ID || head.n_namesz != 4 || std::memcmp(name, "GNU", 4) != 0) continue;
      for (unsigned i = 0; i < head.n_descsz; ++i) {
        char digits[3];
        std::snprintf(digits, sizeof(digits), "%02x", static_cast<unsigned char>(bytes[i]));
        wanted.hex += digits;
      }
      return 1;
    }
  }
  return 1;
}

std::string hash_text(std::string_view text) {
  const llvm::XXH128_hash_t hash =
      llvm::xxh3_128bits({reinterpret_cast<const std::uint8_t*>(text.data()), text.size()});
  char digits[33];
  std::snprintf(digits, sizeof(digits), "%016llx%016llx", static_cast<unsigned long long>(hash.high64),
                static_cast<unsigned long long>(hash.low64));
  return digits;
}

// The exact file that `symbol` is from.
std::string file_identity(void* symbol) {
  BuildId id{symbol, {}};
  dl_iterate_phdr(find_build_id, &id);
  if (!id.hex.empty()) return "build-id " + id.hex;
  Dl_info info{};
  if (!dladdr(symbol, &info)) return "unknown";
  std::ifstream file(info.dli_fname, std::ios::binary);
  const std::string bytes{std::istreambuf_iterator<char>(file), {}};
  return "size " + std::to_string(bytes.size()) + " hash " + hash_text(bytes);
}

// ---- Programs

class Program {
 public:
  explicit Program(const Nvrtc& nvrtc) : api_(nvrtc.api) {}
  ~Program() {
    if (program_) api_.destroy(&program_);
  }
  Program(const Program&) = delete;
  Program& operator=(const Program&) = delete;

  Result compile(const std::string& text, const std::vector<std::string>& options) {
    Result result = api_.create(&program_, text.c_str(), "attnjit.cu", 0, nullptr, nullptr);
    if (result != kSuccess) return result;
    std::vector<const char*> pointers;
    pointers.reserve(options.size());
    for (const std::string& option : options) pointers.push_back(option.c_str());
    result = api_.compile(program_, static_cast<int>(pointers.size()), pointers.data());
    return result;
  }
  std::string log() { return bytes(api_.log_size, api_.log, true); }
  std::string cubin() { return bytes(api_.cubin_size, api_.cubin, false); }
  std::string ptx() { return bytes(api_.ptx_size, api_.ptx, true); }

 private:
  // Texts are counted with their final zero.
  std::string bytes(Result (*size_of)(NvrtcProgram*, std::size_t*), Result (*get)(NvrtcProgram*, char*), bool is_text) {
    std::size_t size = 0;
    if (!program_ || size_of(program_, &size) != kSuccess || size == 0) return {};
    std::string result(size, '\0');
    if (get(program_, result.data()) != kSuccess) return {};
    if (is_text) result.pop_back();
    return result;
  }

  const Api& api_;
  NvrtcProgram* program_ = nullptr;
};

// What a cache of NVRTC's own would hide: which code this very build makes, and how long it takes.
constexpr const char* kNoCache = "--no-cache";

std::vector<std::string> options_for(const Nvrtc& nvrtc, const CudaSource& source, CudaArch arch) {
  std::vector<std::string> options{
      "-arch=" + cuda_arch_name(arch),
      "-std=c++20",
      // Functions without a mark are device code: the templates' headers are also the host's.
      "-default-device",
      "--ptxas-options=-v",
      "--ptxas-options=--register-usage-level=" + std::to_string(source.register_usage_level),
  };
  if (nvrtc.has_cache) options.emplace_back(kNoCache);
  return options;
}

// Null with `error` set.
std::unique_ptr<Nvrtc> open(const char* name, std::string& error) {
  void* const library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
  if (!library) {
    error = dlerror();
    return nullptr;
  }
  // Nothing unloads it again: it starts threads and registers exit handlers of its own.
  auto nvrtc = std::make_unique<Nvrtc>();
  if (const std::string missing = find_symbols(library, nvrtc->api); !missing.empty()) {
    error = std::string(name) + " has no " + missing;
    return nullptr;
  }
  int major = 0, minor = 0, count = 0;
  if (nvrtc->api.version(&major, &minor) != kSuccess) {
    error = std::string(name) + " does not tell its version";
    return nullptr;
  }
  nvrtc->version = 100 * major + minor;
  const std::string version = std::to_string(major) + "." + std::to_string(minor);
  if (nvrtc->version < kOldest) {
    error = std::string(name) + " is NVRTC " + version + "; needed is 12.8 or later";
    return nullptr;
  }
  if (nvrtc->api.num_supported_archs(&count) == kSuccess && count > 0) {
    nvrtc->archs.resize(static_cast<std::size_t>(count));
    if (nvrtc->api.supported_archs(nvrtc->archs.data()) != kSuccess) nvrtc->archs.clear();
  }
  nvrtc->identity = "nvrtc " + version + " " + file_identity(reinterpret_cast<void*>(nvrtc->api.version));
  // 12 has it from some release on.
  nvrtc->has_cache = nvrtc->version >= 1300 || Program(*nvrtc).compile("", {kNoCache}) != kInvalidOption;
  return nvrtc;
}

}  // namespace

std::string cuda_arch_name(CudaArch arch) { return "sm_" + std::to_string(arch.number) + (arch.specific ? "a" : ""); }

const Nvrtc* load_nvrtc(std::string_view library, std::string* error) {
  static std::mutex mutex;
  static auto* const loaded = new std::map<std::string, std::unique_ptr<Nvrtc>, std::less<>>;
  const std::lock_guard lock(mutex);
  if (const auto found = loaded->find(library); found != loaded->end()) return found->second.get();
  std::vector<std::string> names{std::string(library)};
  if (library.empty())
    names = {"libnvrtc.so.13", "libnvrtc.so.12", "/usr/local/cuda/lib64/libnvrtc.so.13",
             "/usr/local/cuda/lib64/libnvrtc.so.12"};
  std::string reasons;
  for (const std::string& name : names) {
    std::string reason;
    if (std::unique_ptr<Nvrtc> nvrtc = open(name.c_str(), reason))
      return loaded->emplace(std::string(library), std::move(nvrtc)).first->second.get();
    reasons += (reasons.empty() ? "" : "; ") + reason;
  }
  // Not remembered: a later call may find one.
  if (error) *error = "NVRTC was not found: " + reasons;
  return nullptr;
}

int nvrtc_version(const Nvrtc& nvrtc) { return nvrtc.version; }

std::string_view nvrtc_identity(const Nvrtc& nvrtc) { return nvrtc.identity; }

bool nvrtc_supports(const Nvrtc& nvrtc, CudaArch arch) {
  if (arch.specific && arch.number < 90) return false;
  return std::find(nvrtc.archs.begin(), nvrtc.archs.end(), arch.number) != nvrtc.archs.end();
}

std::string cuda_binary_key(const Nvrtc& nvrtc, const CudaSource& source, CudaArch arch) {
  std::string all = source.text;
  for (const std::string& option : options_for(nvrtc, source, arch)) all += '\0' + option;
  all += '\0' + nvrtc.identity;
  return hash_text(all);
}

// ---- The log

ParsedLog parse_nvrtc_log(const std::string& log) {
  static const std::regex entry("Compiling entry function '([^']+)'");
  static const std::regex stack(R"((\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads)");
  static const std::regex registers(R"(Used (\d+) registers)");
  static const std::regex shared(R"((\d+) bytes smem)");
  static const std::regex time(R"(Compile time = ([0-9.]+) ms)");
  static const std::regex advisory(R"(\((C7\d+)\)\s*(.*))");
  ParsedLog parsed;
  const auto number = [](const std::smatch& match, unsigned i) { return std::stoi(match[i].str()); };
  std::size_t start = 0;
  while (start < log.size()) {
    const std::size_t end = std::min(log.find('\n', start), log.size());
    const std::string line = log.substr(start, end - start);
    start = end + 1;
    std::smatch match;
    CudaResources* const current = parsed.resources.empty() ? nullptr : &parsed.resources.back();
    if (std::regex_search(line, match, entry)) {
      parsed.resources.emplace_back().entry = match[1];
    } else if (current && std::regex_search(line, match, stack)) {
      // Functions that were not inlined have lines of their own.
      current->stack_bytes = std::max(current->stack_bytes, number(match, 1));
      current->spill_store_bytes += number(match, 2);
      current->spill_load_bytes += number(match, 3);
    } else if (current && std::regex_search(line, match, registers)) {
      current->registers = number(match, 1);
      if (std::regex_search(line, match, shared)) current->static_shared_bytes = number(match, 1);
    } else if (std::regex_search(line, match, time)) {
      parsed.ptxas_ms += std::stod(match[1].str());
    } else if (std::regex_search(line, match, advisory)) {
      // An arrival that ptxas adds where none is needed costs nothing.
      if (match[1] != "C7519") parsed.warnings.push_back("ptxas: " + match[1].str() + ": " + match[2].str());
    } else if (line.starts_with("ptxas warning") || line.find(": warning") != std::string::npos) {
      parsed.warnings.push_back(line);
    }
  }
  for (const CudaResources& r : parsed.resources) {
    if (r.spill_store_bytes == 0 && r.spill_load_bytes == 0) continue;
    parsed.warnings.push_back(r.entry + " spills registers: " + std::to_string(r.spill_store_bytes) +
                              " bytes of stores, " + std::to_string(r.spill_load_bytes) + " of loads");
  }
  return parsed;
}

CompileResult<CudaBinary> compile_cuda(const Nvrtc& nvrtc, const CudaSource& source, CudaArch arch,
                                       const CompileOptions& options, PhaseTimes* phases) {
  CompileResult<CudaBinary> result;
  if (!nvrtc_supports(nvrtc, arch)) {
    result.error = CompileError{nvrtc.identity + " does not compile for " + cuda_arch_name(arch)};
    return result;
  }
  PhaseTimes times;
  Program program(nvrtc);
  Result status = kSuccess;
  {
    const PhaseTimer timer(times, "nvrtc");
    status = program.compile(source.text, options_for(nvrtc, source, arch));
  }
  CudaBinary& binary = result.value;
  const std::string log = program.log();
  if (status != kSuccess) {
    // Not the user's fault: the text is ours.
    constexpr std::size_t kShown = 4000;
    result.error = CompileError{std::string("NVRTC does not compile the kernel (") + nvrtc.api.error_string(status) +
                                ")" + (log.empty() ? "" : ": ") + log.substr(0, kShown)};
    return result;
  }
  ParsedLog parsed = parse_nvrtc_log(log);
  binary.cubin = program.cubin();
  if (binary.cubin.empty()) {
    result.error = CompileError{"NVRTC made no binary for " + cuda_arch_name(arch)};
    return result;
  }
  binary.resources = std::move(parsed.resources);
  binary.warnings = std::move(parsed.warnings);
  if (phases) {
    phases->emplace_back("nvrtc", std::max(0.0, times.front().second - parsed.ptxas_ms));
    phases->emplace_back("ptxas", parsed.ptxas_ms);
  }
  if (options.dump) {
    options.dump("ptx", program.ptx());
    options.dump("cubin", binary.cubin);
  }
  return result;
}

}  // namespace attnjit::compiler
