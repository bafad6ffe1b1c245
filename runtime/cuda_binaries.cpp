// The binary cache over NVRTC.
#include "runtime/cuda_binaries.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "runtime/context.h"

namespace attnjit::runtime {
namespace {

// The architecture, the kernels and the header, which is a comment: expression, problem, config.
std::string about_text(const compiler::CudaSource& source, compiler::CudaArch arch) {
  std::string about = fmt::format("{}: {}", compiler::cuda_arch_name(arch), fmt::join(source.entries, ", "));
  for (std::string_view rest = source.header; !rest.empty();) {
    std::string_view line = rest.substr(0, rest.find('\n'));
    rest.remove_prefix(std::min(line.size() + 1, rest.size()));
    if (line.starts_with("// ")) line.remove_prefix(3);
    about += '\n';
    about += line;
  }
  return about;
}

}  // namespace

Check check_cuda_arch(compiler::CudaArch arch) {
  if (arch.number >= 80) return {};
  return Failure{ATTNJIT_UNSUPPORTED,
                 fmt::format("it needs compute capability 8.0 or later, and not {}", compiler::cuda_arch_name(arch))};
}

Result<FoundBinary> find_cuda_binary(Context& context, const compiler::CudaSource& source, compiler::CudaArch arch,
                                     const compiler::CompileOptions& options, LogLevel warnings) {
  std::string missing;
  const compiler::Nvrtc* nvrtc = compiler::load_nvrtc(context.environment().nvrtc, &missing);
  if (!nvrtc) return Failure{ATTNJIT_ENVIRONMENT, std::move(missing)};
  if (!compiler::nvrtc_supports(*nvrtc, arch)) {
    return Failure{ATTNJIT_ENVIRONMENT, fmt::format("{} does not compile for {}; ATTNJIT_NVRTC names another",
                                                    compiler::nvrtc_identity(*nvrtc), compiler::cuda_arch_name(arch))};
  }
  const auto compile = [&](compiler::PhaseTimes* phases) -> Result<compiler::CudaBinary> {
    auto compiled = compiler::compile_cuda(*nvrtc, source, arch, options, phases);
    if (compiled.error) {
      return Failure{ATTNJIT_INTERNAL, fmt::format("the kernel does not compile for {}: {}",
                                                   compiler::cuda_arch_name(arch), compiled.error->message)};
    }
    return std::move(compiled.value);
  };
  const std::string key = compiler::cuda_binary_key(*nvrtc, source, arch);
  const auto find = [&]() -> Result<FoundBinary> {
    if (!options.dump) return context.binaries().find(key, about_text(source, arch), compile);
    compiler::PhaseTimes phases;
    auto compiled = compile(&phases);
    if (!compiled) return compiled.failure();
    return FoundBinary{.binary = std::make_shared<const compiler::CudaBinary>(std::move(*compiled)),
                       .key = key,
                       .origin = BinaryOrigin::kCompiled,
                       .phases = std::move(phases)};
  };
  Result<FoundBinary> found = find();
  if (!found) return found.failure();

  const Logger& logger = context.logger();
  if (found->origin != BinaryOrigin::kMemory) {
    if (logger.enabled(LogLevel::kDebug)) {
      logger.log(LogLevel::kDebug, fmt::format("binary {} ({}) for {}: {}", key, fmt::join(source.entries, ", "),
                                               compiler::cuda_arch_name(arch), binary_origin_name(found->origin)));
    }
    if (logger.enabled(warnings)) {
      for (const std::string& warning : found->binary->warnings) {
        logger.log(warnings, fmt::format("binary {} for {}: {}", key, compiler::cuda_arch_name(arch), warning));
      }
    }
  }
  return found;
}

void add_phases(const compiler::PhaseTimes& phases, compiler::PhaseTimes* sums) {
  for (const auto& phase : phases) {
    const auto same =
        std::find_if(sums->begin(), sums->end(), [&](const auto& sum) { return sum.first == phase.first; });
    if (same == sums->end()) {
      sums->push_back(phase);
    } else {
      same->second += phase.second;
    }
  }
}

}  // namespace attnjit::runtime
