// One call, left to right: validate, problem, key, (cache | compile), run.
#pragma once

#include <cstddef>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "attnjit/attnjit.h"
#include "runtime/context.h"
#include "runtime/forward.h"
#include "runtime/status.h"
#include "runtime/validation.h"

namespace attnjit::runtime {

// A backend made ready for one problem.
struct PreparedForward {
  std::size_t workspace_size = 0;
  // Neither allocates nor fails; safe from several threads at once, each with its own workspace.
  std::function<void(const ForwardCall&, void* workspace)> run;
};

// Immutable, shared by the cache and the handles.
struct Plan {
  Signature signature;
  std::string score_mod, mask_mod;  // as asked for
  bool has_score_mod = false, has_mask_mod = false;
  std::vector<std::string> names;  // of captures, sorted
  attnjit_backend backend = ATTNJIT_BACKEND_CPU;
  PreparedForward forward;
  // JSON for the handle that compiled the plan, and for those that found it.
  std::string description_compiled, description_cached;
};

// What a caller holds.
struct PlanHandle {
  std::shared_ptr<Context> context;  // threads and settings outlive the context's own handle
  std::shared_ptr<const Plan> plan;
  bool compiled_here = false;
};

Result<PlanHandle> prepare(const std::shared_ptr<Context>& context, const attnjit_attention* attention);

// Allocates only to report a failure.
Check run(const PlanHandle& handle, const attnjit_attention* attention, void* workspace, std::size_t workspace_size,
          void* stream);

// The JSON of attnjit_explain.
Result<std::string> explain(Context& context, const attnjit_attention* attention, bool dump);

}  // namespace attnjit::runtime
