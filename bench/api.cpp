// The C interface as the tool uses it.
#include "bench/api.h"

#include <fmt/format.h>

#include <utility>

namespace attnjit::tool {

namespace {

// Takes the text that the library allocated.
nlohmann::ordered_json take_json(char* text) {
  const std::unique_ptr<char, decltype(&attnjit_free)> owned(text, attnjit_free);
  return nlohmann::ordered_json::parse(text);
}

}  // namespace

Fault fault_of(attnjit_status status) {
  switch (status) {
    case ATTNJIT_INVALID_ARGUMENT:
    case ATTNJIT_INVALID_EXPRESSION:
    case ATTNJIT_UNSUPPORTED:
      return Fault::kUser;
    case ATTNJIT_OUT_OF_MEMORY:
    case ATTNJIT_ENVIRONMENT:
      return Fault::kEnvironment;
    default:
      return Fault::kInternal;
  }
}

void check(attnjit_status status) {
  if (status != ATTNJIT_OK) throw Failure(fault_of(status), attnjit_last_error());
}

ContextPtr make_context(int threads) {
  attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
  options.num_threads = threads;
  attnjit_context* context = nullptr;
  check(attnjit_context_create(&options, &context));
  return ContextPtr(context);
}

PlanPtr prepare(attnjit_context* context, const attnjit_attention& attention) {
  attnjit_plan* plan = nullptr;
  check(attnjit_prepare(context, &attention, &plan));
  return PlanPtr(plan);
}

PlanPtr prepare_backward(attnjit_context* context, const attnjit_attention& attention,
                         const attnjit_gradients& gradients) {
  attnjit_plan* plan = nullptr;
  check(attnjit_prepare_backward(context, &attention, &gradients, nullptr, &plan));
  return PlanPtr(plan);
}

TrainingPlans prepare_training(attnjit_context* context, const attnjit_attention& attention,
                               const attnjit_gradients& gradients) {
  attnjit_plan *forward = nullptr, *backward = nullptr;
  check(attnjit_prepare_backward(context, &attention, &gradients, &forward, &backward));
  return {.forward = PlanPtr(forward), .backward = PlanPtr(backward)};
}

nlohmann::ordered_json description_of(const PlanPtr& plan) {
  return nlohmann::ordered_json::parse(attnjit_plan_description(plan.get()));
}

std::string eager_products(const nlohmann::ordered_json& description) {
  const std::string passes = description.value("passes", "");
  // On the CPU, and on a GPU, where what follows is the types.
  for (const auto& [label, end] : {std::pair("products by ", "\n"), std::pair("q k^T by ", ":\n")}) {
    const std::size_t at = passes.rfind(label);
    if (at == std::string::npos) continue;
    const std::size_t begin = at + std::string_view(label).size();
    return passes.substr(begin, passes.find_first_of(end, begin) - begin);
  }
  return "unknown code";
}

nlohmann::ordered_json explain(attnjit_context* context, const attnjit_attention& attention,
                               const attnjit_gradients* gradients, const std::string& arch, bool dump) {
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.arch = arch.empty() ? nullptr : arch.c_str();
  options.dump = dump ? 1 : 0;
  options.gradients = gradients;
  char* text = nullptr;
  check(attnjit_explain(context, &attention, &options, &text));
  return take_json(text);
}

nlohmann::ordered_json list_mods(attnjit_context* context) {
  char* text = nullptr;
  check(attnjit_list_mods(context, &text));
  return take_json(text);
}

nlohmann::ordered_json clamped_reads(attnjit_context* context, const attnjit_attention& attention,
                                     std::span<const attnjit_row> rows) {
  char* text = nullptr;
  check(attnjit_clamped_reads(context, &attention, rows.data(), rows.size(), &text));
  return take_json(text);
}

nlohmann::ordered_json cache_list(attnjit_context* context, bool verify) {
  char* text = nullptr;
  check(attnjit_cache_list(context, verify ? 1 : 0, &text));
  return take_json(text);
}

std::vector<CapturedName> captured_names(attnjit_context* context, const char* score_mod, const char* mask_mod) {
  char* text = nullptr;
  check(attnjit_captures(context, score_mod, mask_mod, &text));
  std::vector<CapturedName> names;
  for (const auto& row : take_json(text)) names.push_back({row.at("name"), row.at("rank")});
  return names;
}

}  // namespace attnjit::tool
