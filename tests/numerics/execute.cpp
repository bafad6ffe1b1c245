// A problem through attnjit_prepare and attnjit_run.
#include "tests/numerics/execute.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cstdlib>
#include <map>
#include <mutex>
#include <utility>

#include "bench/cuda.h"
#include "tests/numerics/device.h"
#include "tests/numerics/target.h"

namespace attnjit::numerics {
namespace {

Lender::Place place_of(const Case& spec) {
  if (spec.device == "cpu") return Lender::Place::kHost;
  return target().compile_only.empty() ? Lender::Place::kGpu : Lender::Place::kNowhere;
}

// The C structs of one call, and the memory that they point to.
class Call {
 public:
  Call(Problem& problem, Lender::Place place) : lender_(place), scale_(problem.spec.scale.value_or(0.0f)) {
    call_.score_mod = problem.spec.score_mod.c_str();
    call_.mask_mod = problem.spec.mask_mod.empty() ? nullptr : problem.spec.mask_mod.c_str();
    call_.q = lender_.lend(problem.q);
    call_.k = lender_.lend(problem.k);
    call_.v = lender_.lend(problem.v);
    for (NamedTensor& capture : problem.captures) {
      // A scalar may be on either side: half of the cases have theirs on the host.
      const bool by_value = capture.tensor.shape().empty() && problem.spec.seed % 2 == 0;
      captures_.push_back(
          {capture.name.c_str(), by_value ? lender_.lend_host(capture.tensor) : lender_.lend(capture.tensor)});
    }
    call_.captures = captures_.data();
    call_.num_captures = captures_.size();
    call_.scale = problem.spec.scale ? &scale_ : nullptr;
    call_.backend = backend_of(problem.spec.backend).value_or(ATTNJIT_BACKEND_AUTO);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  attnjit_attention* get() { return &call_; }
  Lender& lender() { return lender_; }

 private:
  Lender lender_;
  float scale_;
  std::vector<attnjit_capture> captures_;
  attnjit_attention call_ = ATTNJIT_ATTENTION_INIT;
};

std::vector<double> widen(const Tensor& tensor) {
  std::vector<double> values;
  values.reserve(static_cast<std::size_t>(tensor.size()));
  for_each_index(tensor.shape(), [&](auto index) { values.push_back(tensor.at(index)); });
  return values;
}

RunResult failed(std::string step, attnjit_status status) {
  return {{}, fmt::format("{}: {}: {}", step, attnjit_status_name(status), attnjit_last_error()), status};
}

}  // namespace

attnjit_context* shared_context(int threads, const std::string& isa) {
  static std::map<std::pair<int, std::string>, ContextPtr> contexts;
  ContextPtr& context = contexts[{threads, isa}];
  if (!context) {
    const char* const before = std::getenv("ATTNJIT_CPU_ISA");
    const std::string saved = before == nullptr ? "" : before;
    if (!isa.empty()) setenv("ATTNJIT_CPU_ISA", isa.c_str(), 1);
    attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
    options.num_threads = threads;
    attnjit_context* made = nullptr;
    if (attnjit_context_create(&options, &made) == ATTNJIT_OK) context.reset(made);
    if (!isa.empty()) {
      if (before != nullptr) {
        setenv("ATTNJIT_CPU_ISA", saved.c_str(), 1);
      } else {
        unsetenv("ATTNJIT_CPU_ISA");
      }
    }
  }
  return context.get();
}

std::vector<std::string> host_isas() {
  std::vector<std::string> isas = {"sse2"};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) isas.push_back("avx2");
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl")) isas.push_back("avx512");
#if defined(__clang__) || __GNUC__ >= 12
  if (__builtin_cpu_supports("avx512bf16")) isas.push_back("avx512bf16");
#endif
#endif
  return isas;
}

namespace {

// The outputs of one call, NaN and guarded.
struct OutputTensors {
  explicit OutputTensors(const Case& spec)
      : o(spec.dtype, {spec.batch, spec.num_heads, spec.seqlen_q, spec.head_dim_v}, spec.layout_o,
          spec.layout_o == Layout::kPadded ? 1 : 0),
        lse(dsl::DType::kF32, {spec.batch, spec.num_heads, spec.seqlen_q}, Layout::kPacked),
        row_max(lse.dtype(), lse.shape(), Layout::kPacked) {
    o.poison();
  }

  void give_to(Call* call, Outputs outputs) {
    call->get()->o = call->lender().lend(o);
    if (outputs == Outputs::kOnlyO) return;
    call->get()->lse = call->lender().lend(lse);
    if (outputs == Outputs::kNoRowMax) return;
    call->get()->row_max = call->lender().lend(row_max);
  }

  Tensor o, lse, row_max;
};

// Half of the cases use the legacy default stream.
void* stream_of(const Case& spec) {
  if (spec.device == "cpu" || spec.seed % 4 < 2) return nullptr;
  thread_local const tool::GpuStream stream;
  return stream.handle();
}

RunResult run_plan(attnjit_plan* plan, Problem& problem, Outputs outputs) {
  std::vector<std::pair<Tensor*, std::vector<std::byte>>> inputs;
  for (Tensor* tensor : {&problem.q, &problem.k, &problem.v}) inputs.emplace_back(tensor, tensor->snapshot());
  for (NamedTensor& capture : problem.captures) inputs.emplace_back(&capture.tensor, capture.tensor.snapshot());
  Call call(problem, place_of(problem.spec));
  OutputTensors out(problem.spec);
  out.give_to(&call, outputs);
  Buffer workspace(attnjit_plan_workspace_size(plan));
  void* const scratch = call.lender().lend(workspace);
  const attnjit_status status = attnjit_run(plan, call.get(), scratch, workspace.size(), stream_of(problem.spec));
  if (status != ATTNJIT_OK) return failed("attnjit_run", status);
  call.lender().fetch();

  RunResult result;
  if (!workspace.guards_intact()) result.error = "rule 3: wrote outside the workspace";
  if (!out.o.surroundings_intact()) result.error = "rule 3: wrote outside o, or in a gap of it";
  if (!out.lse.surroundings_intact()) result.error = "rule 3: wrote outside lse";
  if (!out.row_max.surroundings_intact()) result.error = "rule 3: wrote outside row_max";
  for (const auto& [tensor, before] : inputs) {
    const bool intact = tensor->snapshot() == before && tensor->guards_intact();
    if (!intact) result.error = "rule 3: an input was written to";
  }
  result.outcome.o = widen(out.o);
  if (outputs != Outputs::kOnlyO) result.outcome.lse = widen(out.lse);
  if (outputs == Outputs::kAll) result.outcome.row_max = widen(out.row_max);
  return result;
}

}  // namespace

namespace {

// --compile-only: the binaries of a call end up in the disk cache. `gradients` null: of a forward.
void compile_only(attnjit_context* context, const Case& spec, const attnjit_attention* call,
                  const attnjit_gradients* gradients) {
  CompileCounts& counts = compile_counts();
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.arch = target().compile_only.c_str();
  options.gradients = gradients;
  char* text = nullptr;
  static std::mutex mutex;
  const attnjit_status status = attnjit_explain(context, call, &options, &text);
  const std::string json = text != nullptr ? text : "";
  attnjit_free(text);
  const std::lock_guard lock(mutex);
  ++counts.problems;
  if (status != ATTNJIT_OK) {
    ++counts.failed;
    if (counts.failures.size() < 20) {
      counts.failures.push_back(std::string(attnjit_last_error()) + "\n  --case '" + to_line(spec) + "'");
    }
  } else {
    ++(json.find("\"origin\": \"compiled\"") != std::string::npos ? counts.compiled : counts.found);
  }
}

// The outcome is zeros.
RunResult compile_only(Problem& problem, attnjit_context* context, Outputs outputs) {
  RunResult result;
  const Case& spec = problem.spec;
  const auto rows = static_cast<std::size_t>(spec.batch * spec.num_heads * spec.seqlen_q);
  result.outcome.o.resize(rows * static_cast<std::size_t>(spec.head_dim_v));
  if (outputs != Outputs::kOnlyO) result.outcome.lse.resize(rows);
  if (outputs == Outputs::kAll) result.outcome.row_max.resize(rows);
  if (result.outcome.o.empty()) return result;  // no kernel

  Call call(problem, Lender::Place::kNowhere);
  OutputTensors out(spec);
  out.give_to(&call, outputs);
  compile_only(context, spec, call.get(), nullptr);
  return result;
}

// Prepares `problem` on buffers of its own, whose alignment is that of any later ones.
attnjit_status prepare(attnjit_context* context, Problem& problem, Outputs outputs, PlanPtr* plan) {
  Call call(problem, place_of(problem.spec));
  OutputTensors out(problem.spec);
  out.give_to(&call, outputs);
  attnjit_plan* made = nullptr;
  const attnjit_status status = attnjit_prepare(context, call.get(), &made);
  plan->reset(made);
  return status;
}

// Why sm90 does not serve a problem, written down apart from the code that refuses; empty where it has to.
std::string not_of_sm90(const Problem& problem, const Tensor& o) {
  const Case& spec = problem.spec;
  if (o.size() == 0) return "";
  if (spec.dtype == dsl::DType::kF32) return "float32";
  if (spec.head_dim % 8 != 0 || spec.head_dim_v % 8 != 0) return "head dims that are no multiples of 8";
  if (spec.seqlen_kv == 0) return "no keys";
  for (const Tensor* const tensor : {&problem.q, &problem.k, &problem.v, &o}) {
    if (tensor->offset(std::array<std::int64_t, 4>{}) % 8 != 0) return "rows that are not aligned";
    for (std::size_t d = 0; d < 3; ++d) {
      if (tensor->shape()[d] <= 1) continue;
      if (tensor->stride()[d] == 0) return "broadcast tensors";
      if (tensor->stride()[d] % 8 != 0) return "rows that are not aligned";
    }
  }
  return "";
}

// A problem that a partial backend leaves to others gets "auto" in its place. What is wrong if it serves that, too.
std::string settle_backend(attnjit_context* context, Problem& problem, Outputs outputs) {
  if (problem.spec.backend != "sm90") return "";
  static std::mutex mutex;
  ServedCounts& counts = served_counts();
  const std::string reason =
      problem.spec.backward.wanted() ? "gradients" : not_of_sm90(problem, OutputTensors(problem.spec).o);
  if (reason.empty()) {
    const std::lock_guard lock(mutex);
    ++counts.served;
    return "";
  }
  if (!problem.spec.backward.wanted() && target().compile_only.empty()) {
    PlanPtr plan;
    const attnjit_status status = prepare(context, problem, outputs, &plan);
    if (status != ATTNJIT_UNSUPPORTED) return "sm90 serves what the suite takes it not to: " + reason;
  }
  problem.spec.backend = "auto";
  const std::lock_guard lock(mutex);
  ++counts.elsewhere[reason];
  return "";
}

// The gradients of one call, NaN and guarded, and what is given beside them.
class GradientCall {
 public:
  explicit GradientCall(const Problem& problem) : problem_(problem) {
    const Case& spec = problem.spec;
    const BackwardSpec& wanted = spec.backward;
    const auto place = [&](dsl::DType dtype, std::vector<std::int64_t> shape, Layout layout) {
      Tensor tensor(dtype, std::move(shape), layout, layout == Layout::kPadded ? 1 : 0);
      tensor.poison();
      return tensor;
    };
    if (wanted.dq) dq_ = place(spec.dtype, problem.q.shape(), wanted.layout_dq);
    if (wanted.dk) dk_ = place(spec.dtype, problem.k.shape(), wanted.layout_dk);
    if (wanted.dv) dv_ = place(spec.dtype, problem.v.shape(), wanted.layout_dv);
    captures_.reserve(wanted.captures.size());
    for (const GradientSpec& capture : wanted.captures) {
      const Tensor& tensor = problem.capture(capture.name).tensor;
      captures_.push_back(place(tensor.dtype(), tensor.shape(), capture.layout));
    }
  }

  // Good while this object, the lender and the problem exist.
  const attnjit_gradients* lend(Lender* lender) {
    const BackwardSpec& wanted = problem_.spec.backward;
    given_ = {problem_.grad_out, problem_.grad_lse};
    call_.grad_out = lender->lend(given_[0]);
    if (wanted.grad_lse) call_.grad_lse = lender->lend(given_[1]);
    if (wanted.dq) call_.dq = lender->lend(dq_);
    if (wanted.dk) call_.dk = lender->lend(dk_);
    if (wanted.dv) call_.dv = lender->lend(dv_);
    c_captures_.clear();
    for (std::size_t i = 0; i < captures_.size(); ++i) {
      c_captures_.push_back({wanted.captures[i].name.c_str(), lender->lend(captures_[i])});
    }
    call_.captures = c_captures_.data();
    call_.num_captures = c_captures_.size();
    call_.deterministic = wanted.deterministic ? 1 : 0;
    call_.partial_keys = wanted.partial_keys ? 1 : 0;
    return &call_;
  }

  // Whether nothing was written beside the gradients.
  bool intact() const {
    const BackwardSpec& wanted = problem_.spec.backward;
    return (!wanted.dq || dq_.surroundings_intact()) && (!wanted.dk || dk_.surroundings_intact()) &&
           (!wanted.dv || dv_.surroundings_intact()) &&
           std::ranges::all_of(captures_, [](const Tensor& tensor) { return tensor.surroundings_intact(); });
  }

  Gradients values() const {
    const BackwardSpec& wanted = problem_.spec.backward;
    Gradients result;
    if (wanted.dq) result.dq = widen(dq_);
    if (wanted.dk) result.dk = widen(dk_);
    if (wanted.dv) result.dv = widen(dv_);
    for (const Tensor& tensor : captures_) result.captures.push_back(widen(tensor));
    return result;
  }

 private:
  const Problem& problem_;
  Tensor dq_, dk_, dv_;
  std::vector<Tensor> captures_;
  std::array<Tensor, 2> given_;
  std::vector<attnjit_capture_gradient> c_captures_;
  attnjit_gradients call_ = ATTNJIT_GRADIENTS_INIT;
};

BackwardResult backward_failed(std::string step, attnjit_status status) {
  return {{}, {}, failed(std::move(step), status).error, status};
}

// A backward's plan, and that of the forward which was made with it.
struct BackwardPlans {
  PlanPtr forward, backward;
};

attnjit_status prepare_backward(attnjit_context* context, BackwardCall& given, BackwardPlans* plans) {
  Call call(*given.problem, place_of(given.problem->spec));
  call.get()->o = call.lender().lend(given.o);
  call.get()->lse = call.lender().lend(given.lse);
  GradientCall gradients(*given.problem);
  attnjit_plan *forward = nullptr, *backward = nullptr;
  const attnjit_status status =
      attnjit_prepare_backward(context, call.get(), gradients.lend(&call.lender()), &forward, &backward);
  plans->forward.reset(forward);
  plans->backward.reset(backward);
  return status;
}

// Likewise: gradients of zeros.
BackwardResult compile_only(BackwardCall& given, attnjit_context* context) {
  Problem& problem = *given.problem;
  BackwardResult result;
  GradientCall gradients(problem);
  result.gradients = gradients.values();
  const auto clear = [](std::vector<double>& values) { std::fill(values.begin(), values.end(), 0.0); };
  clear(result.gradients.dq);
  clear(result.gradients.dk);
  clear(result.gradients.dv);
  for (std::vector<double>& values : result.gradients.captures) clear(values);
  if (problem.q.size() == 0 || problem.k.size() == 0) return result;  // no kernel

  Call call(problem, Lender::Place::kNowhere);
  call.get()->o = call.lender().lend(given.o);
  call.get()->lse = call.lender().lend(given.lse);
  const attnjit_gradients* const lent = gradients.lend(&call.lender());
  compile_only(context, problem.spec, call.get(), lent);
  if (problem.spec.backward.own_forward) compile_only(context, problem.spec, call.get(), nullptr);
  return result;
}

BackwardResult run_backward_plans(const BackwardPlans& plans, BackwardCall& given) {
  Problem& problem = *given.problem;
  const bool own = problem.spec.backward.own_forward;
  std::vector<std::pair<Tensor*, std::vector<std::byte>>> inputs;
  const auto keep = [&](Tensor& tensor) { inputs.emplace_back(&tensor, tensor.snapshot()); };
  for (Tensor* const tensor : {&problem.q, &problem.k, &problem.v, &problem.grad_out}) keep(*tensor);
  for (NamedTensor& capture : problem.captures) keep(capture.tensor);
  if (problem.spec.backward.grad_lse) keep(problem.grad_lse);
  if (own) {
    given.o.poison();
    given.lse.poison();
  } else {
    keep(given.o);
    keep(given.lse);
  }
  Call call(problem, place_of(problem.spec));
  call.get()->o = call.lender().lend(given.o);
  call.get()->lse = call.lender().lend(given.lse);
  GradientCall gradients(problem);
  const attnjit_gradients* const lent = gradients.lend(&call.lender());
  Buffer forward_workspace(own ? attnjit_plan_workspace_size(plans.forward.get()) : 0);
  Buffer workspace(attnjit_plan_workspace_size(plans.backward.get()));
  void* const forward_scratch = call.lender().lend(forward_workspace);
  void* const scratch = call.lender().lend(workspace);
  void* const stream = stream_of(problem.spec);
  if (own) {
    const attnjit_status status =
        attnjit_run(plans.forward.get(), call.get(), forward_scratch, forward_workspace.size(), stream);
    if (status != ATTNJIT_OK) return backward_failed("attnjit_run", status);
  }
  const attnjit_status status =
      attnjit_run_backward(plans.backward.get(), call.get(), lent, scratch, workspace.size(), stream);
  if (status != ATTNJIT_OK) return backward_failed("attnjit_run_backward", status);
  call.lender().fetch();

  BackwardResult result;
  if (!workspace.guards_intact()) result.error = "rule 3: wrote outside the workspace";
  if (!gradients.intact()) result.error = "rule 3: wrote outside a gradient, or in a gap of one";
  if (!given.o.surroundings_intact() || !given.lse.surroundings_intact()) {
    result.error = "rule 3: wrote outside o or lse, or in a gap of it";
  }
  for (const auto& [tensor, before] : inputs) {
    const bool intact = tensor->snapshot() == before && tensor->guards_intact();
    if (!intact) result.error = "rule 3: an input was written to";
  }
  result.gradients = gradients.values();
  if (own) result.forward = {widen(given.o), widen(given.lse), {}};
  return result;
}

}  // namespace

std::vector<BackwardResult> run_backward_with_one_plan(std::span<BackwardCall> calls, attnjit_context* context) {
  if (context == nullptr) context = shared_context(calls.front().problem->spec.threads);
  if (context == nullptr) return {backward_failed("attnjit_context_create", ATTNJIT_INTERNAL)};
  for (const BackwardCall& call : calls) settle_backend(context, *call.problem, Outputs::kAll);
  std::vector<BackwardResult> results;
  results.reserve(calls.size());
  if (!target().compile_only.empty()) {
    for (BackwardCall& call : calls) results.push_back(compile_only(call, context));
    return results;
  }
  BackwardPlans plans;
  const attnjit_status status = prepare_backward(context, calls.front(), &plans);
  if (status != ATTNJIT_OK) return {backward_failed("attnjit_prepare_backward", status)};
  for (BackwardCall& call : calls) results.push_back(run_backward_plans(plans, call));
  return results;
}

BackwardResult run_backward(Problem& problem, Tensor o, Tensor lse, attnjit_context* context) {
  BackwardCall call{&problem, std::move(o), std::move(lse)};
  return std::move(run_backward_with_one_plan(std::span(&call, 1), context).front());
}

ReferenceGradients run_reference_backward(Problem& problem, const GivenForward* given) {
  ReferenceGradients result;
  attnjit_context* const context = shared_context(problem.spec.threads);
  if (context == nullptr) return {{}, {}, failed("attnjit_context_create", ATTNJIT_INTERNAL).error};
  const Case& spec = problem.spec;
  const BackwardSpec& wanted = spec.backward;
  const auto size = [](const Tensor& tensor) { return static_cast<std::size_t>(tensor.size()); };
  const std::size_t heads_kv = static_cast<std::size_t>(spec.batch * spec.num_heads_kv);
  const std::size_t parts = std::max<std::size_t>(heads_kv, 1);
  Call call(problem, Lender::Place::kHost);
  GivenForward forward = given != nullptr ? *given : GivenForward();
  if (given != nullptr) {
    call.get()->o = call.lender().lend(forward.o);
    call.get()->lse = call.lender().lend(forward.lse);
  }
  GradientCall gradients(problem);
  const attnjit_gradients* const lent = gradients.lend(&call.lender());
  for (Gradients* const each : {&result.gradients, &result.bounds}) {
    if (wanted.dq) each->dq.resize(size(problem.q));
    if (wanted.dk) each->dk.resize(size(problem.k));
    if (wanted.dv) each->dv.resize(size(problem.v));
    for (const GradientSpec& capture : wanted.captures) {
      each->captures.emplace_back(size(problem.capture(capture.name).tensor));
    }
  }
  // One head's part of each captured gradient.
  Gradients part = result.gradients, part_bound = result.gradients;
  std::vector<double*> captures, bounds;
  for (std::vector<double>& values : part.captures) captures.push_back(values.data());
  for (std::vector<double>& values : part_bound.captures) bounds.push_back(values.data());
  for (std::size_t head = 0; head < heads_kv; ++head) {
    // Query heads of a group lie side by side.
    const auto at = [&](std::vector<double>& values) {
      return values.empty() ? nullptr : values.data() + values.size() / parts * head;
    };
    attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
    out.dq = at(result.gradients.dq), out.dq_bound = at(result.bounds.dq);
    out.dk = at(result.gradients.dk), out.dk_bound = at(result.bounds.dk);
    out.dv = at(result.gradients.dv), out.dv_bound = at(result.bounds.dv);
    out.captures = captures.data(), out.capture_bounds = bounds.data();
    const auto number = static_cast<std::int64_t>(head);
    const attnjit_status status = attnjit_reference_backward(context, call.get(), lent, number / spec.num_heads_kv,
                                                             number % spec.num_heads_kv, &out);
    if (status != ATTNJIT_OK) return {{}, {}, failed("attnjit_reference_backward", status).error};
    for (std::size_t i = 0; i < captures.size(); ++i) {
      for (std::size_t e = 0; e < part.captures[i].size(); ++e) {
        result.gradients.captures[i][e] += part.captures[i][e];
        result.bounds.captures[i][e] += part_bound.captures[i][e];
      }
    }
  }
  return result;
}

RunResult run(Problem& problem, attnjit_context* context, Outputs outputs) {
  if (context == nullptr) context = shared_context(problem.spec.threads);
  if (context == nullptr) return failed("attnjit_context_create", ATTNJIT_INTERNAL);
  if (std::string wrong = settle_backend(context, problem, outputs); !wrong.empty()) return {{}, wrong, ATTNJIT_OK};
  if (!target().compile_only.empty()) return compile_only(problem, context, outputs);
  PlanPtr plan;
  const attnjit_status status = prepare(context, problem, outputs, &plan);
  if (status != ATTNJIT_OK) return failed("attnjit_prepare", status);
  return run_plan(plan.get(), problem, outputs);
}

std::vector<RunResult> run_with_one_plan(std::vector<Problem*> problems) {
  attnjit_context* const context = shared_context(problems.front()->spec.threads);
  if (context == nullptr) return {failed("attnjit_context_create", ATTNJIT_INTERNAL)};
  for (Problem* const problem : problems) {
    if (std::string wrong = settle_backend(context, *problem, Outputs::kAll); !wrong.empty()) {
      return {{{}, wrong, ATTNJIT_OK}};
    }
  }
  std::vector<RunResult> results;
  results.reserve(problems.size());
  if (!target().compile_only.empty()) {
    for (Problem* const problem : problems) results.push_back(compile_only(*problem, context, Outputs::kAll));
    return results;
  }
  PlanPtr plan;
  const attnjit_status status = prepare(context, *problems.front(), Outputs::kAll, &plan);
  if (status != ATTNJIT_OK) return {failed("attnjit_prepare", status)};
  for (Problem* const problem : problems) results.push_back(run_plan(plan.get(), *problem, Outputs::kAll));
  return results;
}

RunResult run_reference(Problem& problem, const std::vector<RowIndex>& rows) {
  attnjit_context* const context = shared_context(problem.spec.threads);
  if (context == nullptr) return failed("attnjit_context_create", ATTNJIT_INTERNAL);
  std::vector<attnjit_row> c_rows;
  c_rows.reserve(rows.size());
  for (const RowIndex& row : rows) c_rows.push_back({row.b, row.h, row.q_idx});
  RunResult result;
  result.outcome.o.resize(rows.size() * static_cast<std::size_t>(problem.spec.head_dim_v));
  result.outcome.lse.resize(rows.size());
  result.outcome.row_max.resize(rows.size());
  Call call(problem, Lender::Place::kHost);
  const attnjit_status status =
      attnjit_reference(context, call.get(), c_rows.data(), c_rows.size(), result.outcome.o.data(),
                        result.outcome.lse.data(), result.outcome.row_max.data());
  if (status != ATTNJIT_OK) return failed("attnjit_reference", status);
  return result;
}

}  // namespace attnjit::numerics
