// The C edge: handles, statuses and messages; no exception leaves this file.
#include <fmt/format.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "attnjit/attnjit.h"
#include "runtime/autotune.h"
#include "runtime/context.h"
#include "runtime/explain.h"
#include "runtime/mods.h"
#include "runtime/plan.h"
#include "runtime/reference.h"

using attnjit::runtime::Check;
using attnjit::runtime::CheckedCall;
using attnjit::runtime::Failure;

struct attnjit_context {
  std::shared_ptr<attnjit::runtime::Context> state;
};

struct attnjit_plan {
  attnjit::runtime::PlanHandle handle;
};

namespace {

thread_local std::string last_error;
// Set where there is no memory to keep a message in.
thread_local const char* last_error_literal = nullptr;

attnjit_status fail(attnjit_status status, const char* literal) {
  last_error_literal = literal;
  return status;
}

attnjit_status fail(Failure failure) {
  last_error_literal = nullptr;
  last_error = std::move(failure.message);
  return failure.status;
}

// Runs `body`, which returns a Check, and turns whatever happens into a status.
template <typename Body>
attnjit_status guarded(Body&& body) noexcept {
  try {
    Check failure = body();
    return failure ? fail(std::move(*failure)) : ATTNJIT_OK;
  } catch (const std::bad_alloc&) {
    return fail(ATTNJIT_OUT_OF_MEMORY, "out of memory");
  } catch (const std::exception& exception) {
    try {
      return fail({ATTNJIT_INTERNAL, fmt::format("internal error: {}", exception.what())});
    } catch (...) {
      return fail(ATTNJIT_INTERNAL, "internal error");
    }
  } catch (...) {
    return fail(ATTNJIT_INTERNAL, "internal error");
  }
}

Failure null_argument(const char* name) { return {ATTNJIT_INVALID_ARGUMENT, fmt::format("{} is NULL", name)}; }

Check give_text(const std::string& text, char** out) {
  *out = static_cast<char*>(std::malloc(text.size() + 1));
  if (!*out) throw std::bad_alloc();
  std::memcpy(*out, text.c_str(), text.size() + 1);
  return {};
}

// The comments of a registered body and paths need not be UTF-8; JSON has to be.
Check give_json(const nlohmann::ordered_json& json, char** out) {
  return give_text(json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace), out);
}

Failure no_disk_cache(const attnjit::runtime::DiskCache& disk) {
  return {ATTNJIT_ENVIRONMENT, fmt::format("there is no disk cache: {}", disk.reason())};
}

attnjit::runtime::Result<attnjit::runtime::Mods> bound_mods(attnjit_context& context,
                                                            const attnjit_attention& attention,
                                                            const CheckedCall& call) {
  namespace rt = attnjit::runtime;
  const rt::RegistrySnapshot snapshot = context.state->registry();
  auto parsed = rt::parse_mods(attention.score_mod, attention.mask_mod, *snapshot.registry);
  if (!parsed) return parsed.failure();
  return rt::bind_mods(*parsed, attention.score_mod, attention.mask_mod, *snapshot.registry, call);
}

// Checks the arguments that the oracle's functions share and hands `work` the call and its bound mods.
template <typename Work>
Check with_reference_call(attnjit_context* context, const attnjit_attention* attention, const attnjit_row* rows,
                          size_t num_rows, Work&& work) {
  namespace rt = attnjit::runtime;
  if (!context) return null_argument("context");
  if (num_rows > 0 && !rows) return null_argument("rows");
  CheckedCall call;
  if (Check failure = rt::check_call(attention, rt::Purpose::kReference, &call)) return failure;
  for (size_t i = 0; i < num_rows; ++i) {
    const rt::Signature& s = call.signature;
    const auto inside = [](int64_t index, int64_t extent) { return index >= 0 && index < extent; };
    if (!inside(rows[i].b, s.batch) || !inside(rows[i].h, s.num_heads) || !inside(rows[i].q_idx, s.seqlen_q)) {
      return Failure{ATTNJIT_INVALID_ARGUMENT,
                     fmt::format("rows[{}] is ({}, {}, {}); allowed (b, h, q_idx): below ({}, {}, {})", i, rows[i].b,
                                 rows[i].h, rows[i].q_idx, s.batch, s.num_heads, s.seqlen_q)};
    }
  }
  auto mods = bound_mods(*context, *attention, call);
  if (!mods) return mods.failure();
  work(call.forward, *mods);
  return {};
}

Check reference_backward(attnjit_context* context, const attnjit_attention* attention,
                         const attnjit_gradients* gradients, int64_t b, int64_t h_kv,
                         const attnjit_reference_gradients* out) {
  namespace rt = attnjit::runtime;
  if (!context) return null_argument("context");
  if (!out) return null_argument("out");
  CheckedCall call;
  if (Check failure = rt::check_backward_call(attention, gradients, rt::Purpose::kReference, &call)) return failure;
  if (Check failure = rt::check_struct("out", "ATTNJIT_REFERENCE_GRADIENTS_INIT", out, out->struct_size,
                                       sizeof(attnjit_reference_gradients))) {
    return failure;
  }
  const rt::Signature& s = call.signature;
  if (b < 0 || b >= s.batch || h_kv < 0 || h_kv >= s.num_heads_kv) {
    return Failure{ATTNJIT_INVALID_ARGUMENT,
                   fmt::format("(b, h_kv) is ({}, {}); allowed: below ({}, {})", b, h_kv, s.batch, s.num_heads_kv)};
  }
  auto mods = bound_mods(*context, *attention, call);
  if (!mods) return mods.failure();
  rt::ReferenceGradients wanted{
      .dq = {out->dq, out->dq_bound}, .dk = {out->dk, out->dk_bound}, .dv = {out->dv, out->dv_bound}};
  for (size_t i = 0; i < gradients->num_captures; ++i) {
    const auto number = static_cast<size_t>(
        std::ranges::find(mods->captures(), gradients->captures[i].name, &attnjit::dsl::Capture::name) -
        mods->captures().begin());
    wanted.captures[number] = {out->captures ? out->captures[i] : nullptr,
                               out->capture_bounds ? out->capture_bounds[i] : nullptr};
  }
  return rt::reference_backward(call.forward, call.gradients, *mods, b, h_kv, context->state->pool(), wanted);
}

}  // namespace

extern "C" {

const char* attnjit_status_name(attnjit_status status) {
  switch (status) {
    case ATTNJIT_OK:
      return "ok";
    case ATTNJIT_INVALID_ARGUMENT:
      return "invalid argument";
    case ATTNJIT_INVALID_EXPRESSION:
      return "invalid expression";
    case ATTNJIT_UNSUPPORTED:
      return "unsupported";
    case ATTNJIT_OUT_OF_MEMORY:
      return "out of memory";
    case ATTNJIT_ENVIRONMENT:
      return "environment";
    case ATTNJIT_INTERNAL:
      return "internal error";
    case ATTNJIT_NOT_PREPARED:
      return "not prepared";
  }
  return "unknown status";
}

const char* attnjit_last_error(void) { return last_error_literal ? last_error_literal : last_error.c_str(); }

const char* attnjit_version(void) { return ATTNJIT_VERSION; }

const char* attnjit_backend_name(attnjit_backend backend) {
  switch (backend) {
    case ATTNJIT_BACKEND_AUTO:
      return "auto";
    case ATTNJIT_BACKEND_MATH:
      return "math";
    case ATTNJIT_BACKEND_CPU:
      return "cpu";
    case ATTNJIT_BACKEND_SM80:
      return "sm80";
    case ATTNJIT_BACKEND_SM90:
      return "sm90";
  }
  return "unknown backend";
}

attnjit_status attnjit_context_create(const attnjit_context_options* options, attnjit_context** context) {
  return guarded([&]() -> Check {
    if (!context) return null_argument("context");
    *context = nullptr;
    auto state = attnjit::runtime::create_context(options);
    if (!state) return state.failure();
    *context = new attnjit_context{std::move(*state)};
    return {};
  });
}

void attnjit_context_destroy(attnjit_context* context) { delete context; }

attnjit_status attnjit_register_mod(attnjit_context* context, const char* name, const char* const* parameters,
                                    size_t num_parameters, const char* body, int is_mask) {
  return guarded([&]() -> Check {
    if (!context) return null_argument("context");
    if (!name) return null_argument("name");
    if (!body) return null_argument("body");
    if (num_parameters > 0 && !parameters) return null_argument("parameters");
    attnjit::dsl::RegistryEntry entry{
        .name = name, .parameters = {}, .body = body, .is_mask = is_mask != 0, .summary = ""};
    for (size_t i = 0; i < num_parameters; ++i) {
      if (!parameters[i]) return null_argument(fmt::format("parameters[{}]", i).c_str());
      entry.parameters.emplace_back(parameters[i]);
    }
    return context->state->register_mod(std::move(entry));
  });
}

attnjit_status attnjit_prepare(attnjit_context* context, const attnjit_attention* attention, attnjit_plan** plan) {
  return guarded([&]() -> Check {
    if (!plan) return null_argument("plan");
    *plan = nullptr;
    if (!context) return null_argument("context");
    auto handle = attnjit::runtime::prepare(context->state, attention);
    if (!handle) return handle.failure();
    *plan = new attnjit_plan{std::move(*handle)};
    return {};
  });
}

void attnjit_plan_destroy(attnjit_plan* plan) { delete plan; }

size_t attnjit_plan_workspace_size(const attnjit_plan* plan) { return plan ? plan->handle.plan->workspace_size() : 0; }

attnjit_backend attnjit_plan_backend(const attnjit_plan* plan) {
  return plan ? plan->handle.plan->backend : ATTNJIT_BACKEND_AUTO;
}

const char* attnjit_plan_description(const attnjit_plan* plan) {
  if (!plan) return "";
  const attnjit::runtime::Plan& shared = *plan->handle.plan;
  return (plan->handle.compiled_here ? shared.description_compiled : shared.description_cached).c_str();
}

attnjit_status attnjit_run(attnjit_plan* plan, const attnjit_attention* attention, void* workspace,
                           size_t workspace_size, void* stream) {
  return guarded([&]() -> Check {
    if (!plan) return null_argument("plan");
    return attnjit::runtime::run(plan->handle, attention, workspace, workspace_size, stream);
  });
}

attnjit_status attnjit_forward(attnjit_context* context, const attnjit_attention* attention, void* workspace,
                               size_t workspace_size, void* stream) {
  return guarded([&]() -> Check {
    if (!context) return null_argument("context");
    return attnjit::runtime::forward(context->state, attention, workspace, workspace_size, stream);
  });
}

attnjit_status attnjit_prepare_backward(attnjit_context* context, const attnjit_attention* attention,
                                        const attnjit_gradients* gradients, attnjit_plan** forward,
                                        attnjit_plan** backward) {
  return guarded([&]() -> Check {
    if (forward) *forward = nullptr;
    if (!backward) return null_argument("backward");
    *backward = nullptr;
    if (!context) return null_argument("context");
    auto pair = attnjit::runtime::prepare_backward(context->state, attention, gradients, forward != nullptr);
    if (!pair) return pair.failure();
    auto plan = std::make_unique<attnjit_plan>(std::move(pair->backward));
    if (forward) *forward = new attnjit_plan{std::move(*pair->forward)};
    *backward = plan.release();
    return {};
  });
}

attnjit_status attnjit_run_backward(attnjit_plan* plan, const attnjit_attention* attention,
                                    const attnjit_gradients* gradients, void* workspace, size_t workspace_size,
                                    void* stream) {
  return guarded([&]() -> Check {
    if (!plan) return null_argument("plan");
    return attnjit::runtime::run_backward(plan->handle, attention, gradients, workspace, workspace_size, stream);
  });
}

attnjit_status attnjit_backward(attnjit_context* context, const attnjit_attention* attention,
                                const attnjit_gradients* gradients, void* workspace, size_t workspace_size,
                                void* stream) {
  return guarded([&]() -> Check {
    if (!context) return null_argument("context");
    return attnjit::runtime::backward(context->state, attention, gradients, workspace, workspace_size, stream);
  });
}

attnjit_status attnjit_reference(attnjit_context* context, const attnjit_attention* attention, const attnjit_row* rows,
                                 size_t num_rows, double* o, double* lse, double* row_max) {
  return guarded([&] {
    return with_reference_call(context, attention, rows, num_rows, [&](const auto& call, const auto& mods) {
      attnjit::runtime::reference_rows(call, mods, std::span(rows, num_rows), context->state->pool(), o, lse, row_max);
    });
  });
}

attnjit_status attnjit_reference_bounds(attnjit_context* context, const attnjit_attention* attention,
                                        const attnjit_row* rows, size_t num_rows, double* o_bound, double* lse_bound,
                                        unsigned char* decided) {
  return guarded([&] {
    return with_reference_call(context, attention, rows, num_rows, [&](const auto& call, const auto& mods) {
      attnjit::runtime::reference_bounds(call, mods, std::span(rows, num_rows), context->state->pool(), o_bound,
                                         lse_bound, decided);
    });
  });
}

attnjit_status attnjit_reference_backward(attnjit_context* context, const attnjit_attention* attention,
                                          const attnjit_gradients* gradients, int64_t b, int64_t h_kv,
                                          const attnjit_reference_gradients* out) {
  return guarded([&] { return reference_backward(context, attention, gradients, b, h_kv, out); });
}

attnjit_status attnjit_clamped_reads(attnjit_context* context, const attnjit_attention* attention,
                                     const attnjit_row* rows, size_t num_rows, char** json) {
  return guarded([&]() -> Check {
    if (!json) return null_argument("json");
    *json = nullptr;
    auto list = nlohmann::ordered_json::array();
    Check failure = with_reference_call(context, attention, rows, num_rows, [&](const auto& call, const auto& mods) {
      for (const attnjit::runtime::ClampedReads& reads :
           attnjit::runtime::clamped_reads(call, mods, std::span(rows, num_rows), context->state->pool())) {
        list.push_back({{"name", mods.captures()[reads.capture].name},
                        {"dimension", reads.dimension},
                        {"extent", call.captures[reads.capture].extent[reads.dimension]},
                        {"count", reads.count},
                        {"first",
                         {{"b", reads.first.b},
                          {"h", reads.first.h},
                          {"q_idx", reads.first.q_idx},
                          {"kv_idx", reads.first.kv_idx},
                          {"index", reads.index}}}});
      }
    });
    if (failure) return failure;
    return give_json(list, json);
  });
}

attnjit_status attnjit_explain(attnjit_context* context, const attnjit_attention* attention,
                               const attnjit_explain_options* options, char** json) {
  return guarded([&]() -> Check {
    if (!json) return null_argument("json");
    *json = nullptr;
    if (!context) return null_argument("context");
    auto text = attnjit::runtime::explain(*context->state, attention, options);
    if (!text) return text.failure();
    return give_text(*text, json);
  });
}

attnjit_status attnjit_list_mods(attnjit_context* context, char** json) {
  return guarded([&]() -> Check {
    if (!json) return null_argument("json");
    *json = nullptr;
    if (!context) return null_argument("context");
    auto list = nlohmann::ordered_json::array();
    const attnjit::runtime::RegistrySnapshot snapshot = context->state->registry();
    for (const attnjit::dsl::RegistryEntry* entry : snapshot.registry->entries()) {
      list.push_back({{"name", entry->name},
                      {"parameters", entry->parameters},
                      {"body", entry->body},
                      {"is_mask", entry->is_mask},
                      {"summary", entry->summary}});
    }
    return give_json(list, json);
  });
}

attnjit_status attnjit_captures(attnjit_context* context, const char* score_mod, const char* mask_mod, char** json) {
  return guarded([&]() -> Check {
    if (!json) return null_argument("json");
    *json = nullptr;
    if (!context) return null_argument("context");
    const attnjit::runtime::RegistrySnapshot snapshot = context->state->registry();
    auto parsed = attnjit::runtime::parse_mods(score_mod, mask_mod, *snapshot.registry);
    if (!parsed) return parsed.failure();
    auto list = nlohmann::ordered_json::array();
    for (const attnjit::dsl::Capture& capture : parsed->captures()) {
      list.push_back({{"name", capture.name}, {"rank", capture.rank}});
    }
    return give_json(list, json);
  });
}

attnjit_status attnjit_cache_list(attnjit_context* context, int verify, char** json) {
  return guarded([&]() -> Check {
    if (!json) return null_argument("json");
    *json = nullptr;
    if (!context) return null_argument("context");
    const attnjit::runtime::DiskCache& disk = context->state->binaries().disk();
    if (!disk.enabled()) return no_disk_cache(disk);
    auto list = nlohmann::ordered_json::array();
    std::uint64_t bytes = 0;
    for (const auto& entry : disk.list(verify != 0)) {
      bytes += entry.bytes;
      list.push_back({{"key", entry.key}, {"bytes", entry.bytes}, {"last_used", entry.last_used}});
      if (const auto payload = disk.peek(entry.key)) {
        if (auto stored = attnjit::runtime::binary_from_bytes(*payload)) {
          list.back()["about"] = std::move(stored->about);
        } else if (auto tuned = attnjit::runtime::tuned_about(*payload)) {
          list.back()["about"] = std::move(*tuned);
        }
      }
      if (!verify) continue;
      list.back()["valid"] = entry.valid;
      if (!entry.valid) list.back()["removed"] = disk.remove(entry.key);
    }
    return give_json({{"directory", disk.directory().string()},
                      {"max_bytes", disk.max_bytes()},
                      {"bytes", bytes},
                      {"entries", std::move(list)}},
                     json);
  });
}

attnjit_status attnjit_cache_clear(attnjit_context* context, size_t* removed) {
  return guarded([&]() -> Check {
    if (removed) *removed = 0;
    if (!context) return null_argument("context");
    const attnjit::runtime::DiskCache& disk = context->state->binaries().disk();
    if (!disk.enabled()) return no_disk_cache(disk);
    std::string why;
    const std::size_t count = disk.clear(&why);
    if (removed) *removed = count;
    if (!why.empty()) return Failure{ATTNJIT_ENVIRONMENT, std::move(why)};
    return {};
  });
}

void attnjit_free(char* text) { std::free(text); }

}  // extern "C"
