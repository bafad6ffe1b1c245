// The C interface's handles, destroyed with their owner.
#pragma once

#include <attnjit/attnjit.h>

#include <memory>

namespace attnjit::test {

struct ContextDeleter {
  void operator()(attnjit_context* context) const { attnjit_context_destroy(context); }
};
struct PlanDeleter {
  void operator()(attnjit_plan* plan) const { attnjit_plan_destroy(plan); }
};
using ContextPtr = std::unique_ptr<attnjit_context, ContextDeleter>;
using PlanPtr = std::unique_ptr<attnjit_plan, PlanDeleter>;

}  // namespace attnjit::test
