// Creation of a context and its registry.
#include "runtime/context.h"

#include <fmt/format.h>

#include <algorithm>
#include <optional>
#include <string>
#include <utility>

#include "runtime/validation.h"

namespace attnjit::runtime {
namespace {

int choose_threads(int asked, const Environment& environment) {
  if (asked > 0) return asked;
  if (environment.num_threads > 0) return environment.num_threads;
  return std::min(available_processors(), kMaxThreads);
}

// BF16's products have 1.7 times the speed of fp32's on AMD's processors, and 0.55 times on Intel's (bench/notes.md,
// "The backward on the CPU").
compiler::CpuIsa fastest_cpu_isa() {
  const compiler::CpuIsa best = compiler::host_cpu_isa();
  return best == compiler::CpuIsa::kAvx512Bf16 && __builtin_cpu_is("intel") ? compiler::CpuIsa::kAvx512 : best;
}

}  // namespace

Context::Context(Environment environment, int num_threads, std::uint32_t backends)
    : environment_(std::move(environment)),
      logger_(environment_.log),
      cpu_isa_(environment_.cpu_isa.value_or(fastest_cpu_isa())),
      backends_(backends != 0 ? backends : environment_.backends),
      registry_{std::make_shared<const dsl::Registry>(dsl::Registry::builtin()), 0},
      pool_(choose_threads(num_threads, environment_)),
      binaries_(DiskCache(environment_.cache_dir, environment_.cache_max_bytes, environment_.cache_off), logger_) {}

Result<std::shared_ptr<CudaDevice>> Context::cuda_device(int ordinal) {
  std::lock_guard lock(devices_mutex_);
  if (const auto it = devices_.find(ordinal); it != devices_.end()) return it->second;
  Result<std::shared_ptr<CudaDevice>> device =
      CudaDevice::get(ordinal, environment_.cuda_driver, environment_.cuda_max_sms);
  if (device) devices_.emplace(ordinal, *device);
  return device;
}

RegistrySnapshot Context::registry() const {
  std::lock_guard lock(registry_mutex_);
  return registry_;
}

Check Context::register_mod(dsl::RegistryEntry entry) {
  const std::string body = entry.body;
  const std::string name = entry.name;
  std::lock_guard lock(registry_mutex_);
  auto next = std::make_shared<dsl::Registry>(*registry_.registry);
  if (const std::optional<dsl::Error> error = next->add(std::move(entry))) {
    return Failure{ATTNJIT_INVALID_EXPRESSION,
                   fmt::format("mod '{}', {}", dsl::shortened(name), dsl::format_error(*error, body))};
  }
  registry_ = {std::move(next), registry_.generation + 1};
  return {};
}

Result<std::shared_ptr<Context>> create_context(const attnjit_context_options* options) {
  constexpr std::uint32_t kAllBackends =
      1u << ATTNJIT_BACKEND_MATH | 1u << ATTNJIT_BACKEND_CPU | 1u << ATTNJIT_BACKEND_SM80 | 1u << ATTNJIT_BACKEND_SM90;
  int num_threads = 0;
  std::uint32_t backends = 0;
  if (options) {
    if (Check failure = check_struct("options", "ATTNJIT_CONTEXT_OPTIONS_INIT", options, options->struct_size,
                                     sizeof(attnjit_context_options))) {
      return *failure;
    }
    num_threads = options->num_threads;
    if (num_threads < 0 || num_threads > kMaxThreads) {
      return Failure{ATTNJIT_INVALID_ARGUMENT,
                     fmt::format("options.num_threads is {}; allowed: 0 to {}", num_threads, kMaxThreads)};
    }
    backends = options->backends;
    if ((backends & ~kAllBackends) != 0) {
      return Failure{ATTNJIT_INVALID_ARGUMENT,
                     fmt::format("options.backends is {:#x}; allowed: 0, or bits of {:#x}", backends, kAllBackends)};
    }
  }
  Result<Environment> environment = read_environment();
  if (!environment) return environment.failure();
  const std::optional<compiler::CpuIsa> isa = environment->cpu_isa;
  if (isa && *isa > compiler::host_cpu_isa()) {
    return Failure{ATTNJIT_ENVIRONMENT,
                   fmt::format("ATTNJIT_CPU_ISA is '{}'; this processor has at most '{}'", compiler::cpu_isa_name(*isa),
                               compiler::cpu_isa_name(compiler::host_cpu_isa()))};
  }
  auto context = std::make_shared<Context>(std::move(*environment), num_threads, backends);
  if (context->logger().enabled(LogLevel::kInfo)) {
    context->logger().log(LogLevel::kInfo, fmt::format("context: {} threads, {}", context->num_threads(),
                                                       compiler::cpu_isa_name(context->cpu_isa())));
  }
  const DiskCache& disk = context->binaries().disk();
  if (const LogLevel level = disk.enabled() ? LogLevel::kDebug : LogLevel::kInfo; context->logger().enabled(level)) {
    context->logger().log(level, disk.enabled() ? fmt::format("disk cache: {}", disk.directory().string())
                                                : fmt::format("no disk cache: {}", disk.reason()));
  }
  return context;
}

}  // namespace attnjit::runtime
