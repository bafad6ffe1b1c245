// Keys, compiles and runs plans, and describes them.
#include "runtime/plan.h"

#include <fmt/format.h>

#include <chrono>
#include <cstring>
#include <future>
#include <limits>
#include <optional>
#include <string_view>
#include <system_error>
#include <utility>

#include "dsl/printer.h"
#include "runtime/mods.h"

namespace attnjit::runtime {
namespace {

// ---- Plans

void append_text(std::string* key, const char* text) {
  const std::size_t size = text ? std::strlen(text) : std::numeric_limits<std::size_t>::max();
  key->append(reinterpret_cast<const char*>(&size), sizeof(size));
  if (text) key->append(text, size);
}

Result<std::shared_ptr<const Plan>> make_plan(Context& context, const dsl::Registry& registry,
                                              const attnjit_attention& attention, const CheckedCall& call,
                                              std::string_view key) {
  using Milliseconds = std::chrono::duration<double, std::milli>;
  const auto start = std::chrono::steady_clock::now();
  Result<Mods> parsed = parse_mods(attention.score_mod, attention.mask_mod, registry);
  if (!parsed) return parsed.failure();
  Result<Mods> bound = bind_mods(*parsed, attention.score_mod, attention.mask_mod, registry, call);
  if (!bound) return bound.failure();
  const auto bound_at = std::chrono::steady_clock::now();
  const DumpFiles files(context, key, dump_header(context, call, attention));
  Result<ReadyBackend> ready = prepare_backend({.context = context, .call = call, .mods = *bound, .files = files});
  if (!ready) return ready.failure();
  const double total = Milliseconds(std::chrono::steady_clock::now() - start).count();

  auto plan = std::make_shared<Plan>();
  const Signature& s = plan->signature = call.signature;
  plan->has_score_mod = attention.score_mod != nullptr;
  plan->has_mask_mod = attention.mask_mod != nullptr;
  plan->score_mod = attention.score_mod ? attention.score_mod : "";
  plan->mask_mod = attention.mask_mod ? attention.mask_mod : "";
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) plan->names.emplace_back(call.capture_names[i]);
  plan->backend = ready->backend;
  // Only tensor maps mind how far tensors reach.
  if (plan->backend != ATTNJIT_BACKEND_SM90) plan->signature.near_strides = 0;
  plan->forward = std::move(ready->forward);
  plan->backward = std::move(ready->backward);

  const std::optional<dsl::Expr>& mask_mod = parsed->mask_mod;
  Json json = {{"backend", attnjit_backend_name(plan->backend)},
               {"score_mod", dsl::print(parsed->score_mod)},
               {"mask_mod", mask_mod ? Json(dsl::print(*mask_mod)) : Json()},
               {"problem", shape_text(s)},
               {"on", device_text(s.device)},
               {"host", host_json(context)}};
  if (s.backward) json["gradients"] = gradients_json(call);
  json.update(ready->description);
  json["workspace_bytes"] = plan->workspace_size();
  json["compiled"] = true;
  json["compile_ms"] = total;
  Json phases = {{"parse_and_bind", Milliseconds(bound_at - start).count()}};
  phases.update(phases_json(ready->phases));
  json["phases_ms"] = std::move(phases);
  plan->description_compiled = json.dump(2);
  json["compiled"] = false;
  plan->description_cached = json.dump(2);
  if (context.logger().enabled(LogLevel::kInfo)) {
    context.logger().log(LogLevel::kInfo,
                         fmt::format("compiled '{}' for {} on {} in {:.1f} ms", json["score_mod"].get<std::string>(),
                                     shape_text(s), attnjit_backend_name(plan->backend), total));
  }
  return std::shared_ptr<const Plan>(std::move(plan));
}

// ---- What differs between prepare and run

bool same_text(const char* given, bool has, const std::string& text) { return given ? has && text == given : !has; }

Failure changed(std::string_view what, const auto& was, const auto& is) {
  return {ATTNJIT_INVALID_ARGUMENT,
          fmt::format("{} was {} when the plan was prepared and is {} now; prepare again", what, was, is)};
}

std::string dimensions(const std::int64_t* extent, int rank) {
  return fmt::format("({})", fmt::join(extent, extent + rank, ", "));
}

std::string shown_text(bool has, std::string_view text) { return has ? fmt::format("'{}'", text) : "NULL"; }

// The first difference, by name. Only called when there is one.
Failure difference(const Plan& plan, const CheckedCall& call, const attnjit_attention& attention) {
  if (!same_text(attention.score_mod, plan.has_score_mod, plan.score_mod)) {
    return changed("score_mod", shown_text(plan.has_score_mod, plan.score_mod),
                   shown_text(attention.score_mod, attention.score_mod ? attention.score_mod : ""));
  }
  if (!same_text(attention.mask_mod, plan.has_mask_mod, plan.mask_mod)) {
    return changed("mask_mod", shown_text(plan.has_mask_mod, plan.mask_mod),
                   shown_text(attention.mask_mod, attention.mask_mod ? attention.mask_mod : ""));
  }
  const std::size_t given = call.forward.num_captures;
  const std::span names(call.capture_names, given);
  if (!std::ranges::equal(plan.names, names)) {
    return changed("the names in captures", "(" + listed(plan.names) + ")", "(" + listed(names) + ")");
  }

  const Signature& was = plan.signature;
  const Signature& is = call.signature;
  const struct {
    std::string_view what;
    std::int64_t was, is;
  } numbers[] = {{"q's batch", was.batch, is.batch},
                 {"q's number of heads", was.num_heads, is.num_heads},
                 {"k's number of heads", was.num_heads_kv, is.num_heads_kv},
                 {"q's sequence length", was.seqlen_q, is.seqlen_q},
                 {"k's sequence length", was.seqlen_kv, is.seqlen_kv},
                 {"q's head_dim", was.head_dim, is.head_dim},
                 {"v's head_dim", was.head_dim_v, is.head_dim_v}};
  for (const auto& number : numbers) {
    if (number.was != number.is) return changed(number.what, number.was, number.is);
  }
  const auto dtype = [](std::uint8_t value) { return dsl::dtype_name(static_cast<dsl::DType>(value)); };
  if (was.dtype != is.dtype) return changed("q's dtype", dtype(was.dtype), dtype(is.dtype));
  if (was.backend != is.backend) {
    return changed("backend", attnjit_backend_name(static_cast<attnjit_backend>(was.backend)),
                   attnjit_backend_name(static_cast<attnjit_backend>(is.backend)));
  }
  if (was.device != is.device) return changed("q's device", device_text(was.device), device_text(is.device));
  const auto wanted = [](std::uint8_t flag) { return flag ? "given" : "NULL"; };
  if (was.has_lse != is.has_lse) return changed("lse", wanted(was.has_lse), wanted(is.has_lse));
  if (was.has_row_max != is.has_row_max) return changed("row_max", wanted(was.has_row_max), wanted(is.has_row_max));
  const struct {
    std::string_view what;
    std::uint8_t was, is;
  } gradients[] = {{"dq", was.wants_dq, is.wants_dq},
                   {"dk", was.wants_dk, is.wants_dk},
                   {"dv", was.wants_dv, is.wants_dv},
                   {"grad_lse", was.has_grad_lse, is.has_grad_lse}};
  for (const auto& gradient : gradients) {
    if (gradient.was != gradient.is) return changed(gradient.what, wanted(gradient.was), wanted(gradient.is));
  }
  if (was.deterministic != is.deterministic) {
    return changed("gradients.deterministic", int{was.deterministic}, int{is.deterministic});
  }
  if (was.partial_keys != is.partial_keys) {
    return changed("gradients.partial_keys", int{was.partial_keys}, int{is.partial_keys});
  }
  static constexpr std::string_view kStrideClasses[] = {"0", "1", "another"};
  const struct {
    std::string_view name;
    const std::uint8_t* was;
    const std::uint8_t* is;
  } strides[] = {{"q", was.q_stride, is.q_stride}, {"k", was.k_stride, is.k_stride}, {"v", was.v_stride, is.v_stride}};
  for (const auto& tensor : strides) {
    for (int d = 0; d < 3; ++d) {
      if (tensor.was[d] != tensor.is[d]) {
        return changed(fmt::format("{}'s stride of dimension {}", tensor.name, d), kStrideClasses[tensor.was[d]],
                       kStrideClasses[tensor.is[d]]);
      }
    }
  }
  for (std::size_t i = 0; i < call.num_rows; ++i) {
    const CheckedCall::Rows& rows = call.rows[i];
    const int needed = rows.output ? was.store_bytes : was.load_bytes;
    if (rows.bytes < needed) {
      return {ATTNJIT_INVALID_ARGUMENT,
              fmt::format("{} has rows aligned to {} bytes, by its address and strides; the plan was prepared for {}: "
                          "prepare it with pointers that are aligned as little",
                          rows.name, rows.bytes, needed)};
    }
  }
  if (was.near_strides != is.near_strides) {
    return {ATTNJIT_INVALID_ARGUMENT,
            fmt::format("the strides of {} reach 2^40 bytes, and did not when the plan was prepared; prepare again",
                        call.far)};
  }
  for (std::size_t i = 0; i < given; ++i) {
    const Signature::Capture& a = was.captures[i];
    const Signature::Capture& b = is.captures[i];
    const std::string name = dsl::shortened(plan.names[i]);
    const auto gradient = [i](const Signature& signature) { return signature.capture_gradients >> i & 1u; };
    if (gradient(was) != gradient(is)) {
      return changed(fmt::format("the gradient of {}", name), gradient(was) ? "wanted" : "not wanted",
                     gradient(is) ? "wanted" : "not wanted");
    }
    if (a.dtype != b.dtype) return changed(fmt::format("captured {}'s dtype", name), dtype(a.dtype), dtype(b.dtype));
    const std::string was_shape = dimensions(a.extent, a.rank);
    const std::string shape = dimensions(b.extent, b.rank);
    if (was_shape != shape) return changed(fmt::format("captured {}'s shape", name), was_shape, shape);
    for (int d = 0; d < a.rank; ++d) {
      if (a.stride_class[d] != b.stride_class[d]) {
        return changed(fmt::format("captured {}'s stride of dimension {}", name, d), kStrideClasses[a.stride_class[d]],
                       kStrideClasses[b.stride_class[d]]);
      }
    }
    if (a.offsets_fit_32 != b.offsets_fit_32) {
      return {ATTNJIT_INVALID_ARGUMENT,
              fmt::format("captured {} reaches beyond 2^31 elements by its strides, and did not when the plan was "
                          "prepared; prepare again",
                          name)};
    }
  }
  return {ATTNJIT_INTERNAL, "the call differs from the prepared one in a way that has no name"};
}

bool same_call(const Plan& plan, const CheckedCall& call, const attnjit_attention& attention) {
  if (!(plan.signature == call.signature)) return false;
  if (!same_text(attention.score_mod, plan.has_score_mod, plan.score_mod)) return false;
  if (!same_text(attention.mask_mod, plan.has_mask_mod, plan.mask_mod)) return false;
  for (std::size_t i = 0; i < plan.names.size(); ++i) {
    if (plan.names[i] != call.capture_names[i]) return false;
  }
  return true;
}

// `call` was checked as kRun.
Check run_checked(const Context& context, const Plan& plan, const attnjit_attention& attention, CheckedCall* call,
                  void* workspace, std::size_t workspace_size, void* stream) {
  weaken(plan.signature, &call->signature);
  if (!same_call(plan, *call, attention)) return difference(plan, *call, attention);
  if (stream && plan.signature.device == kCpu) {
    return Failure{ATTNJIT_INVALID_ARGUMENT, "stream is not NULL; a CPU plan runs on the calling thread"};
  }
  if (Check failure = check_workspace(*call, workspace, workspace_size, plan.workspace_size())) return failure;
  if (context.logger().enabled(LogLevel::kTrace)) {
    context.logger().log(LogLevel::kTrace, fmt::format("run {}", shape_text(plan.signature)));
  }
  if (plan.signature.backward) return plan.backward.run(call->forward, call->gradients, workspace, stream);
  return plan.forward.run(call->forward, workspace, stream);
}

// From here on `gradients` is null in a forward.

Check check(const attnjit_attention* attention, const attnjit_gradients* gradients, Purpose purpose,
            CheckedCall* call) {
  return gradients ? check_backward_call(attention, gradients, purpose, call) : check_call(attention, purpose, call);
}

// `call` was checked as kPrepare.
Result<PlanHandle> prepare_checked(const std::shared_ptr<Context>& context, const attnjit_attention& attention,
                                   CheckedCall* call) {
  const RegistrySnapshot snapshot = context->registry();
  std::string key = make_key(*call, attention, snapshot.generation);
  if (call->signature.autotune != 0 && !context->plans().find(key)) {
    Result<std::shared_ptr<CudaDevice>> device = context->cuda_device(call->signature.device);
    if (device && (*device)->is_capturing(nullptr)) {
      // A plan of its own: the one that is tuned can still be made after the capture.
      call->signature.autotune = static_cast<std::uint8_t>(AutotuneMode::kStored);
      key = make_key(*call, attention, snapshot.generation);
    }
  }
  auto found =
      context->plans().get(key, [&] { return make_plan(*context, *snapshot.registry, attention, *call, key); });
  if (!found.outcome) return found.outcome.failure();
  return PlanHandle{.context = context, .plan = std::move(*found.outcome), .compiled_here = found.compiled_here};
}

Check run_plan(const PlanHandle& handle, const attnjit_attention* attention, const attnjit_gradients* gradients,
               void* workspace, std::size_t workspace_size, void* stream) {
  const bool backward = gradients != nullptr;
  if ((handle.plan->signature.backward != 0) != backward) {
    return Failure{ATTNJIT_INVALID_ARGUMENT,
                   backward ? "plan is a forward's; attnjit_run_backward takes one of attnjit_prepare_backward"
                            : "plan is a backward's; attnjit_run takes one of attnjit_prepare"};
  }
  CheckedCall call;
  if (Check failure = check(attention, gradients, Purpose::kRun, &call)) return failure;
  return run_checked(*handle.context, *handle.plan, *attention, &call, workspace, workspace_size, stream);
}

Check prepare_and_run(const std::shared_ptr<Context>& context, const attnjit_attention* attention,
                      const attnjit_gradients* gradients, void* workspace, std::size_t workspace_size, void* stream) {
  CheckedCall call;
  if (Check failure = check(attention, gradients, Purpose::kRun, &call)) return failure;
  const RegistrySnapshot snapshot = context->registry();
  const std::string key = make_key(call, *attention, snapshot.generation);
  std::optional<Result<std::shared_ptr<const Plan>>> plan = context->plans().find(key);
  if (!plan) {
    if (call.signature.device != kCpu) {
      Result<std::shared_ptr<CudaDevice>> device = context->cuda_device(call.signature.device);
      if (!device) return device.failure();
      if ((*device)->is_capturing(stream)) {
        return Failure{
            ATTNJIT_NOT_PREPARED,
            fmt::format("{} is not compiled yet, and its stream is being captured; call {}, or {} once, "
                        "before the capture",
                        shape_text(call.signature), gradients ? "attnjit_prepare_backward" : "attnjit_prepare",
                        gradients ? "attnjit_backward" : "attnjit_forward")};
      }
    }
    plan = context->plans()
               .get(key, [&] { return make_plan(*context, *snapshot.registry, *attention, call, key); })
               .outcome;
  }
  if (!*plan) return plan->failure();
  return run_checked(*context, ***plan, *attention, &call, workspace, workspace_size, stream);
}

Failure no_gradients() { return {ATTNJIT_INVALID_ARGUMENT, "gradients is NULL"}; }

}  // namespace

std::string make_key(const CheckedCall& call, const attnjit_attention& attention, std::uint64_t generation) {
  std::string key(reinterpret_cast<const char*>(&call.signature), sizeof(Signature));
  key.append(reinterpret_cast<const char*>(&generation), sizeof(generation));
  append_text(&key, attention.score_mod);
  append_text(&key, attention.mask_mod);
  for (std::size_t i = 0; i < call.forward.num_captures; ++i) append_text(&key, call.capture_names[i]);
  return key;
}

std::string dump_header(const Context& context, const CheckedCall& call, const attnjit_attention& attention) {
  return fmt::format("score_mod: {}\nmask_mod: {}\n{} {}", attention.score_mod ? attention.score_mod : "none",
                     attention.mask_mod ? attention.mask_mod : "none", shape_text(call.signature),
                     call.signature.device == kCpu ? std::string(compiler::cpu_isa_name(context.cpu_isa()))
                                                   : "on " + device_text(call.signature.device));
}

Result<PlanHandle> prepare(const std::shared_ptr<Context>& context, const attnjit_attention* attention) {
  CheckedCall call;
  if (Check failure = check_call(attention, Purpose::kPrepare, &call)) return *failure;
  return prepare_checked(context, *attention, &call);
}

Result<PlanPair> prepare_backward(const std::shared_ptr<Context>& context, const attnjit_attention* attention,
                                  const attnjit_gradients* gradients, bool with_forward) {
  CheckedCall call, forward_call;
  if (Check failure = check_backward_call(attention, gradients, Purpose::kPrepare, &call)) return *failure;
  std::future<Result<PlanHandle>> forward;
  if (with_forward) {
    if (Check failure = check_call(attention, Purpose::kPrepare, &forward_call)) return *failure;
    const auto work = [&] { return prepare_checked(context, *attention, &forward_call); };
    try {
      forward = std::async(std::launch::async, work);
    } catch (const std::system_error&) {
      // Where there is no thread to be had, this one does both.
      forward = std::async(std::launch::deferred, work);
    }
  }
  Result<PlanHandle> backward = prepare_checked(context, *attention, &call);
  PlanPair pair;
  if (with_forward) {
    Result<PlanHandle> found = forward.get();
    if (!found) return found.failure();
    pair.forward = std::move(*found);
  }
  if (!backward) return backward.failure();
  pair.backward = std::move(*backward);
  return pair;
}

Check run(const PlanHandle& handle, const attnjit_attention* attention, void* workspace, std::size_t workspace_size,
          void* stream) {
  return run_plan(handle, attention, nullptr, workspace, workspace_size, stream);
}

Check run_backward(const PlanHandle& handle, const attnjit_attention* attention, const attnjit_gradients* gradients,
                   void* workspace, std::size_t workspace_size, void* stream) {
  if (!gradients) return no_gradients();
  return run_plan(handle, attention, gradients, workspace, workspace_size, stream);
}

Check forward(const std::shared_ptr<Context>& context, const attnjit_attention* attention, void* workspace,
              std::size_t workspace_size, void* stream) {
  return prepare_and_run(context, attention, nullptr, workspace, workspace_size, stream);
}

Check backward(const std::shared_ptr<Context>& context, const attnjit_attention* attention,
               const attnjit_gradients* gradients, void* workspace, std::size_t workspace_size, void* stream) {
  if (!gradients) return no_gradients();
  return prepare_and_run(context, attention, gradients, workspace, workspace_size, stream);
}

}  // namespace attnjit::runtime
