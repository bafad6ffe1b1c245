// One call, left to right: validate, problem, key, (cache | compile), run.
#pragma once

#include <cstddef>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attnjit/attnjit.h"
#include "runtime/backends.h"
#include "runtime/context.h"
#include "runtime/status.h"
#include "runtime/validation.h"

namespace attnjit::runtime {

// Immutable, shared by the cache and the handles.
struct Plan {
  Signature signature;
  std::string score_mod, mask_mod;  // as asked for
  bool has_score_mod = false, has_mask_mod = false;
  std::vector<std::string> names;  // of captures, sorted
  attnjit_backend backend = ATTNJIT_BACKEND_CPU;
  // The one that the signature asks for.
  PreparedForward forward;
  PreparedBackward backward;
  // JSON for the handle that compiled the plan, and for those that found it.
  std::string description_compiled, description_cached;

  std::size_t workspace_size() const { return signature.backward ? backward.workspace_size : forward.workspace_size; }
};

// What a caller holds.
struct PlanHandle {
  std::shared_ptr<Context> context;  // threads and settings outlive the context's own handle
  std::shared_ptr<const Plan> plan;
  bool compiled_here = false;
};

Result<PlanHandle> prepare(const std::shared_ptr<Context>& context, const attnjit_attention* attention);

// The plans of a training step.
struct PlanPair {
  std::optional<PlanHandle> forward;  // where it was asked for
  PlanHandle backward;
};
// What has to be compiled is compiled at the same time, each in a thread of its own.
Result<PlanPair> prepare_backward(const std::shared_ptr<Context>& context, const attnjit_attention* attention,
                                  const attnjit_gradients* gradients, bool with_forward);

// Allocate only to report a failure. A plan of the other kind is refused.
Check run(const PlanHandle& handle, const attnjit_attention* attention, void* workspace, std::size_t workspace_size,
          void* stream);
Check run_backward(const PlanHandle& handle, const attnjit_attention* attention, const attnjit_gradients* gradients,
                   void* workspace, std::size_t workspace_size, void* stream);

// prepare and run. ATTNJIT_NOT_PREPARED where it would have to compile while `stream` is captured.
Check forward(const std::shared_ptr<Context>& context, const attnjit_attention* attention, void* workspace,
              std::size_t workspace_size, void* stream);
Check backward(const std::shared_ptr<Context>& context, const attnjit_attention* attention,
               const attnjit_gradients* gradients, void* workspace, std::size_t workspace_size, void* stream);

// The exact bytes a plan depends on within one context, so that nothing can be forgotten by a hash.
std::string make_key(const CheckedCall& call, const attnjit_attention& attention, std::uint64_t generation);
// What heads the files of ATTNJIT_DUMP.
std::string dump_header(const Context& context, const CheckedCall& call, const attnjit_attention& attention);

}  // namespace attnjit::runtime
