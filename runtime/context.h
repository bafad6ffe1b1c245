// What a context holds for all its calls: settings, registered mods, compiled plans and binaries.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>

#include "dsl/registry.h"
#include "runtime/binary_cache.h"
#include "runtime/cuda_driver.h"
#include "runtime/environment.h"
#include "runtime/logging.h"
#include "runtime/plan_cache.h"
#include "runtime/status.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

struct Plan;

// Plans a context keeps; the least recently used one goes first. Handles keep their plan alive.
inline constexpr std::size_t kMaxCachedPlans = 256;

// The registered mods at one moment. `generation` grows with every registration: one text may mean another thing then.
struct RegistrySnapshot {
  std::shared_ptr<const dsl::Registry> registry;
  std::uint64_t generation = 0;
};

// Shared by the context's handle and its plans; safe to use from several threads at once.
class Context {
 public:
  // `num_threads` 0: ATTNJIT_NUM_THREADS, else one per processor of this process.
  // `backends` 0: ATTNJIT_BACKENDS, else all.
  Context(Environment environment, int num_threads, std::uint32_t backends = 0);

  const Environment& environment() const { return environment_; }
  const Logger& logger() const { return logger_; }
  int num_threads() const { return pool_.size(); }
  compiler::CpuIsa cpu_isa() const { return cpu_isa_; }
  ThreadPool& pool() { return pool_; }
  PlanCache<Result<std::shared_ptr<const Plan>>>& plans() { return plans_; }
  BinaryCache& binaries() { return binaries_; }

  bool permits(attnjit_backend backend) const { return backends_ == 0 || (backends_ >> backend & 1u) != 0; }

  // A device that was used stays with its context: its primary context is not set up again.
  Result<std::shared_ptr<CudaDevice>> cuda_device(int ordinal);

  RegistrySnapshot registry() const;
  Check register_mod(dsl::RegistryEntry entry);

 private:
  const Environment environment_;
  const Logger logger_;
  const compiler::CpuIsa cpu_isa_;
  const std::uint32_t backends_;
  std::mutex devices_mutex_;
  std::map<int, std::shared_ptr<CudaDevice>> devices_;
  mutable std::mutex registry_mutex_;
  RegistrySnapshot registry_;
  ThreadPool pool_;
  PlanCache<Result<std::shared_ptr<const Plan>>> plans_{kMaxCachedPlans};
  BinaryCache binaries_;
};

Result<std::shared_ptr<Context>> create_context(const attnjit_context_options* options);

}  // namespace attnjit::runtime
