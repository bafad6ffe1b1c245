// A problem through attnjit_prepare and attnjit_run.
#include "tests/numerics/execute.h"

#include <fmt/format.h>

#include <cstdlib>
#include <map>
#include <utility>

namespace attnjit::numerics {
namespace {

// The C structs of one call; holds what they point to.
class Call {
 public:
  explicit Call(Problem& problem) : scale_(problem.spec.scale.value_or(0.0f)) {
    call_.score_mod = problem.spec.score_mod.c_str();
    call_.mask_mod = problem.spec.mask_mod.empty() ? nullptr : problem.spec.mask_mod.c_str();
    call_.q = problem.q.dl();
    call_.k = problem.k.dl();
    call_.v = problem.v.dl();
    for (NamedTensor& capture : problem.captures) captures_.push_back({capture.name.c_str(), capture.tensor.dl()});
    call_.captures = captures_.data();
    call_.num_captures = captures_.size();
    call_.scale = problem.spec.scale ? &scale_ : nullptr;
    call_.backend = backend_of(problem.spec.backend).value_or(ATTNJIT_BACKEND_AUTO);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  attnjit_attention* get() { return &call_; }

 private:
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

  void give_to(attnjit_attention* call, Outputs outputs) {
    call->o = o.dl();
    if (outputs == Outputs::kOnlyO) return;
    call->lse = lse.dl();
    call->row_max = row_max.dl();
  }

  Tensor o, lse, row_max;
};

RunResult run_plan(attnjit_plan* plan, Problem& problem, Outputs outputs) {
  Call call(problem);
  OutputTensors out(problem.spec);
  out.give_to(call.get(), outputs);
  std::vector<std::pair<Tensor*, std::vector<std::byte>>> inputs;
  for (Tensor* tensor : {&problem.q, &problem.k, &problem.v}) inputs.emplace_back(tensor, tensor->snapshot());
  for (NamedTensor& capture : problem.captures) inputs.emplace_back(&capture.tensor, capture.tensor.snapshot());
  Buffer workspace(attnjit_plan_workspace_size(plan));
  const attnjit_status status = attnjit_run(plan, call.get(), workspace.data(), workspace.size(), nullptr);
  if (status != ATTNJIT_OK) return failed("attnjit_run", status);

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
  if (outputs == Outputs::kAll) {
    result.outcome.lse = widen(out.lse);
    result.outcome.row_max = widen(out.row_max);
  }
  return result;
}

}  // namespace

RunResult run(Problem& problem, attnjit_context* context, Outputs outputs) {
  if (context == nullptr) context = shared_context(problem.spec.threads);
  if (context == nullptr) return failed("attnjit_context_create", ATTNJIT_INTERNAL);
  Call call(problem);
  OutputTensors out(problem.spec);
  out.give_to(call.get(), outputs);
  attnjit_plan* made = nullptr;
  const attnjit_status status = attnjit_prepare(context, call.get(), &made);
  if (status != ATTNJIT_OK) return failed("attnjit_prepare", status);
  const PlanPtr plan(made);
  return run_plan(plan.get(), problem, outputs);
}

std::vector<RunResult> run_with_one_plan(std::vector<Problem*> problems) {
  attnjit_context* const context = shared_context(problems.front()->spec.threads);
  if (context == nullptr) return {failed("attnjit_context_create", ATTNJIT_INTERNAL)};
  Call call(*problems.front());
  OutputTensors out(problems.front()->spec);
  out.give_to(call.get(), Outputs::kAll);
  attnjit_plan* made = nullptr;
  const attnjit_status status = attnjit_prepare(context, call.get(), &made);
  if (status != ATTNJIT_OK) return {failed("attnjit_prepare", status)};
  const PlanPtr plan(made);
  std::vector<RunResult> results;
  results.reserve(problems.size());
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
  Call call(problem);
  const attnjit_status status =
      attnjit_reference(context, call.get(), c_rows.data(), c_rows.size(), result.outcome.o.data(),
                        result.outcome.lse.data(), result.outcome.row_max.data());
  if (status != ATTNJIT_OK) return failed("attnjit_reference", status);
  return result;
}

}  // namespace attnjit::numerics
