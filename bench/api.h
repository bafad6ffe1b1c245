// The C interface as the tool uses it: owned handles, and a Failure for every status that is not OK.
#pragma once

#include <attnjit/attnjit.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <span>
#include <string>

#include "bench/failure.h"

namespace attnjit::tool {

// Whose fault a status is. A problem that no backend serves is the user's: they asked for it.
Fault fault_of(attnjit_status status);
// Throws a Failure with the library's message.
void check(attnjit_status status);

struct ContextDelete {
  void operator()(attnjit_context* context) const { attnjit_context_destroy(context); }
};
using ContextPtr = std::unique_ptr<attnjit_context, ContextDelete>;
// threads 0: one per processor.
ContextPtr make_context(int threads);

struct PlanDelete {
  void operator()(attnjit_plan* plan) const { attnjit_plan_destroy(plan); }
};
using PlanPtr = std::unique_ptr<attnjit_plan, PlanDelete>;
PlanPtr prepare(attnjit_context* context, const attnjit_attention& attention);
PlanPtr prepare_backward(attnjit_context* context, const attnjit_attention& attention,
                         const attnjit_gradients& gradients);
// Both plans of a training step, compiled at the same time.
struct TrainingPlans {
  PlanPtr forward, backward;
};
TrainingPlans prepare_training(attnjit_context* context, const attnjit_attention& attention,
                               const attnjit_gradients& gradients);

nlohmann::ordered_json description_of(const PlanPtr& plan);
// What does the products of an eager plan, as "OpenBLAS 0.3.21, SkylakeX, ...": a baseline is worth what that is.
std::string eager_products(const nlohmann::ordered_json& description);
// `arch` "sm_80" and the like: of the CUDA kernels; empty: of what runs where the tensors are. `gradients`: of the
// backward; null: of the forward.
nlohmann::ordered_json explain(attnjit_context* context, const attnjit_attention& attention,
                               const attnjit_gradients* gradients, const std::string& arch, bool dump);
nlohmann::ordered_json list_mods(attnjit_context* context);
nlohmann::ordered_json clamped_reads(attnjit_context* context, const attnjit_attention& attention,
                                     std::span<const attnjit_row> rows);
nlohmann::ordered_json cache_list(attnjit_context* context, bool verify);

// A name that an expression captures.
struct CapturedName {
  std::string name;
  int rank = 0;
};
// Either text may be null.
std::vector<CapturedName> captured_names(attnjit_context* context, const char* score_mod, const char* mask_mod);

}  // namespace attnjit::tool
