// What a context holds for all its calls: settings, registered mods, compiled plans and binaries.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>

#include "dsl/registry.h"
#include "runtime/binary_cache.h"
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
  Context(Environment environment, int num_threads);

  const Environment& environment() const { return environment_; }
  const Logger& logger() const { return logger_; }
  int num_threads() const { return pool_.size(); }
  compiler::CpuIsa cpu_isa() const { return cpu_isa_; }
  ThreadPool& pool() { return pool_; }
  PlanCache<Result<std::shared_ptr<const Plan>>>& plans() { return plans_; }
  BinaryCache& binaries() { return binaries_; }

  RegistrySnapshot registry() const;
  Check register_mod(dsl::RegistryEntry entry);

 private:
  const Environment environment_;
  const Logger logger_;
  const compiler::CpuIsa cpu_isa_;
  mutable std::mutex registry_mutex_;
  RegistrySnapshot registry_;
  ThreadPool pool_;
  PlanCache<Result<std::shared_ptr<const Plan>>> plans_{kMaxCachedPlans};
  BinaryCache binaries_;
};

Result<std::shared_ptr<Context>> create_context(const attnjit_context_options* options);

}  // namespace attnjit::runtime
