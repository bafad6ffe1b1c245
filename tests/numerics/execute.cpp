// A problem through attnjit_prepare and attnjit_run.
#include "tests/numerics/execute.h"

#include <fmt/format.h>

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
  if (outputs == Outputs::kAll) {
    result.outcome.lse = widen(out.lse);
    result.outcome.row_max = widen(out.row_max);
  }
  return result;
}

}  // namespace

namespace {

// --compile-only: the binaries of `problem` end up in the disk cache. The outcome is zeros.
RunResult compile_only(Problem& problem, attnjit_context* context, Outputs outputs) {
  CompileCounts& counts = compile_counts();
  RunResult result;
  const Case& spec = problem.spec;
  const auto rows = static_cast<std::size_t>(spec.batch * spec.num_heads * spec.seqlen_q);
  result.outcome.o.resize(rows * static_cast<std::size_t>(spec.head_dim_v));
  if (outputs == Outputs::kAll) result.outcome.lse.resize(rows), result.outcome.row_max.resize(rows);
  if (result.outcome.o.empty()) return result;  // no kernel

  Call call(problem, Lender::Place::kNowhere);
  OutputTensors out(spec);
  out.give_to(&call, outputs);
  attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
  options.arch = target().compile_only.c_str();
  char* text = nullptr;
  static std::mutex mutex;
  const attnjit_status status = attnjit_explain(context, call.get(), &options, &text);
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

}  // namespace

RunResult run(Problem& problem, attnjit_context* context, Outputs outputs) {
  if (context == nullptr) context = shared_context(problem.spec.threads);
  if (context == nullptr) return failed("attnjit_context_create", ATTNJIT_INTERNAL);
  if (!target().compile_only.empty()) return compile_only(problem, context, outputs);
  PlanPtr plan;
  const attnjit_status status = prepare(context, problem, outputs, &plan);
  if (status != ATTNJIT_OK) return failed("attnjit_prepare", status);
  return run_plan(plan.get(), problem, outputs);
}

std::vector<RunResult> run_with_one_plan(std::vector<Problem*> problems) {
  attnjit_context* const context = shared_context(problems.front()->spec.threads);
  if (context == nullptr) return {failed("attnjit_context_create", ATTNJIT_INTERNAL)};
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
