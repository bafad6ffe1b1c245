// The tables of bench/notes.md: the CPU backend against the core's multiply-add peak and against eager attention, what
// mods cost, forward and backward, compile times and the overhead of a prepared call. Everything of one table is timed
// in turn; shown are minima, so that other work on the machine shows least.
#include <attnjit/attnjit.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <sys/wait.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cerrno>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/api.h"
#include "bench/fma_peak.h"
#include "bench/machine.h"
#include "bench/problem.h"
#include "bench/report.h"
#include "bench/statistics.h"
#include "bench/tensor.h"

namespace attnjit::tool {
namespace {

struct ReportOptions {
  int repetitions = 25, heads = 2, seqlen = 1024, compiles = 9;
  std::vector<int> head_dims{64, 128}, threads;
  std::vector<std::string> isas{"host", "avx2"}, dtypes{"float32", "bfloat16"};
  std::vector<std::string> mods{"noop", "causal", "rel", "head_bias", "alibi", "softcap(30)"};
  std::vector<std::string> backward_mods{"noop",
                                         "causal",
                                         "alibi",
                                         "softcap(30)",
                                         "score * grad_g[h]",
                                         "score + grad_b[h, q_idx - kv_idx + 1023]",
                                         "score + grad_b[h, q_idx, kv_idx]",
                                         "score + grad_b[q_idx, kv_idx]",
                                         "score + grad_b[kv_idx, q_idx]"};
};

struct Inputs {
  Inputs(const Shape& s, ElementType type)
      : q(type, {s.batch, s.heads_q, s.seqlen_q, s.head_dim}),
        k(type, {s.batch, s.heads_kv, s.seqlen_kv, s.head_dim}),
        v(type, {s.batch, s.heads_kv, s.seqlen_kv, s.head_dim}),
        o(type, {s.batch, s.heads_q, s.seqlen_q, s.head_dim}) {
    fill_normal(q, 1);
    fill_normal(k, 2);
    fill_normal(v, 3);
  }
  Tensor q, k, v, o;
};

// A prepared call. Stays where it is made.
class Call {
 public:
  Call(attnjit_context* context, const Inputs& inputs, const Shape& shape, std::string mod, attnjit_backend backend)
      : mod_(std::move(mod)),
        captures_(make_captures(context, mod_.c_str(), nullptr, {}, registered_mods(context), shape, 4, false)),
        q_(inputs.q.dl()),
        k_(inputs.k.dl()),
        v_(inputs.v.dl()),
        o_(inputs.o.dl()) {
    attention_.score_mod = mod_.c_str();
    attention_.q = &q_;
    attention_.k = &k_;
    attention_.v = &v_;
    attention_.o = &o_;
    attention_.captures = captures_.lent.data();
    attention_.num_captures = captures_.lent.size();
    attention_.backend = backend;
    const auto begin = std::chrono::steady_clock::now();
    plan_ = prepare(context, attention_);
    prepare_ms_ = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
    workspace_ = Tensor(ElementType::kUInt8, {static_cast<std::int64_t>(attnjit_plan_workspace_size(plan_.get()))});
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  double prepare_ms() const { return prepare_ms_; }
  nlohmann::ordered_json description() const { return description_of(plan_); }
  void run() { check(attnjit_run(plan_.get(), &attention_, workspace_.data(), workspace_.bytes(), nullptr)); }

 private:
  std::string mod_;
  Captures captures_;
  DLTensor q_, k_, v_, o_;
  attnjit_attention attention_ = ATTNJIT_ATTENTION_INIT;
  PlanPtr plan_;
  Tensor workspace_;
  double prepare_ms_ = 0.0;
};

// Prefix of the captured tensors whose gradients are computed.
constexpr std::string_view kGradientPrefix = "grad_";

// A prepared backward call behind its forward. Stays where it is made.
class BackwardCall {
 public:
  BackwardCall(attnjit_context* context, const Inputs& inputs, const Shape& shape, std::string mod)
      : mod_(std::move(mod)),
        captures_(make_captures(context, mod_.c_str(), nullptr, {}, registered_mods(context), shape, 4, false)),
        lse_(ElementType::kFloat32, {shape.batch, shape.heads_q, shape.seqlen_q}),
        grad_out_(inputs.o.type(), inputs.o.shape()),
        dq_(inputs.q.type(), inputs.q.shape()),
        dk_(inputs.k.type(), inputs.k.shape()),
        dv_(inputs.v.type(), inputs.v.shape()) {
    fill_normal(grad_out_, 5);
    for (const auto& [tensor, dl] :
         {std::pair(&inputs.q, &q_), std::pair(&inputs.k, &k_), std::pair(&inputs.v, &v_), std::pair(&inputs.o, &o_)})
      *dl = tensor->dl();
    lse_dl_ = lse_.dl();
    attention_.score_mod = mod_.c_str();
    attention_.q = &q_;
    attention_.k = &k_;
    attention_.v = &v_;
    attention_.o = &o_;
    attention_.lse = &lse_dl_;
    attention_.captures = captures_.lent.data();
    attention_.num_captures = captures_.lent.size();
    attention_.backend = ATTNJIT_BACKEND_CPU;
    for (const auto& [tensor, dl] : {std::pair(&grad_out_, &grad_out_dl_), std::pair(&dq_, &dq_dl_),
                                     std::pair(&dk_, &dk_dl_), std::pair(&dv_, &dv_dl_)})
      *dl = tensor->dl();
    gradients_.grad_out = &grad_out_dl_;
    gradients_.dq = &dq_dl_;
    gradients_.dk = &dk_dl_;
    gradients_.dv = &dv_dl_;
    for (std::size_t i = 0; i < captures_.names.size(); ++i) {
      if (captures_.names[i].starts_with(kGradientPrefix)) wanted_.push_back(i);
    }
    for (const std::size_t i : wanted_)
      captured_.emplace_back(captures_.tensors[i].type(), captures_.tensors[i].shape());
    for (const Tensor& tensor : captured_) captured_dl_.push_back(tensor.dl());
    for (std::size_t i = 0; i < wanted_.size(); ++i)
      lent_.push_back({captures_.names[wanted_[i]].c_str(), &captured_dl_[i]});
    gradients_.captures = lent_.data();
    gradients_.num_captures = lent_.size();
    attnjit_plan *forward = nullptr, *backward = nullptr;
    check(attnjit_prepare_backward(context, &attention_, &gradients_, &forward, &backward));
    const PlanPtr forward_plan(forward);
    plan_.reset(backward);
    workspace_ = workspace_of(forward_plan);
    check(attnjit_run(forward, &attention_, workspace_.data(), workspace_.bytes(), nullptr));
    workspace_ = workspace_of(plan_);
  }
  BackwardCall(const BackwardCall&) = delete;
  BackwardCall& operator=(const BackwardCall&) = delete;

  void run() {
    check(attnjit_run_backward(plan_.get(), &attention_, &gradients_, workspace_.data(), workspace_.bytes(), nullptr));
  }

 private:
  static Tensor workspace_of(const PlanPtr& plan) {
    return {ElementType::kUInt8, {static_cast<std::int64_t>(attnjit_plan_workspace_size(plan.get()))}};
  }

  std::string mod_;
  Captures captures_;
  Tensor lse_, grad_out_, dq_, dk_, dv_;
  DLTensor q_, k_, v_, o_, lse_dl_, grad_out_dl_, dq_dl_, dk_dl_, dv_dl_;
  std::vector<std::size_t> wanted_;
  std::vector<Tensor> captured_;
  std::vector<DLTensor> captured_dl_;
  std::vector<attnjit_capture_gradient> lent_;
  attnjit_attention attention_ = ATTNJIT_ATTENTION_INIT;
  attnjit_gradients gradients_ = ATTNJIT_GRADIENTS_INIT;
  PlanPtr plan_;
  Tensor workspace_;
};

// What this process computes with: its instruction set, and the eager side's BLAS.
struct Engines {
  std::string isa, products;
};
Engines engines() {
  const Shape shape{1, 1, 32, 1, 32, 16};
  const Inputs inputs(shape, ElementType::kFloat32);
  const ContextPtr context = make_context(1);
  const auto fused = Call(context.get(), inputs, shape, "noop", ATTNJIT_BACKEND_CPU).description();
  const auto eager = Call(context.get(), inputs, shape, "noop", ATTNJIT_BACKEND_MATH).description();
  return {fused.at("host").at("isa"), eager_products(eager)};
}

void report_forward(const ReportOptions& options, const Engines& engines, int threads) {
  const FmaLoop peak = fma_loop(engines.isa);
  constexpr long kPeakIterations = 1'000'000;
  const ContextPtr context = make_context(threads);
  std::vector<std::vector<std::string>> rows;
  for (const std::string& dtype : options.dtypes) {
    for (int head_dim : options.head_dims) {
      const Shape shape{1, options.heads, options.seqlen, options.heads, options.seqlen, head_dim};
      const Inputs inputs(shape, parse_dtype(dtype));
      std::vector<std::unique_ptr<Call>> calls;
      for (const std::string& mod : options.mods) {
        for (attnjit_backend backend : {ATTNJIT_BACKEND_CPU, ATTNJIT_BACKEND_MATH}) {
          calls.push_back(std::make_unique<Call>(context.get(), inputs, shape, mod, backend));
        }
      }
      std::vector<std::function<void()>> candidates;
      candidates.reserve(calls.size() + 1);
      for (const auto& call : calls) candidates.push_back([&call] { call->run(); });
      if (peak.run != nullptr) candidates.push_back([&] { peak.run(kPeakIterations); });
      const std::vector<Timing> times = time_interleaved(candidates, options.repetitions);
      const double peak_gflops =
          peak.run != nullptr ? peak.flops_per_iteration * kPeakIterations / times.back().min / 1e6 : 0.0;
      for (std::size_t i = 0; i < options.mods.size(); ++i) {
        const double fused = times[2 * i].min, eager = times[2 * i + 1].min;
        const double gflops = shape.flops() / fused / 1e6;
        rows.push_back({dtype, fmt::format("{}", head_dim), options.mods[i], fmt::format("{:.2f}", fused),
                        fmt::format("{:.2f}", times[2 * i].median), fmt::format("{:.1f}", gflops),
                        peak_gflops > 0 ? fmt::format("{:.1f}%", 100 * gflops / (peak_gflops * threads)) : "-",
                        fmt::format("{:+.1f}%", 100 * (fused / times[0].min - 1)), fmt::format("{:.2f}", eager),
                        fmt::format("{:.2f}", eager / fused)});
      }
      rows.push_back({dtype, fmt::format("{}", head_dim), "(FMA peak of a core)", "", "",
                      fmt::format("{:.1f}", peak_gflops), "", "", "", ""});
    }
  }
  fmt::print("\n## Forward, {}, {} thread{}: (B, H, S) = (1, {}, {}), eager products by {}\n\n{}", engines.isa, threads,
             threads == 1 ? "" : "s", options.heads, options.seqlen, engines.products,
             github_table({"dtype", "d", "score_mod", "fused ms", "median", "GFLOP/s", "of FMA peak", "over noop",
                           "eager ms", "eager / fused"},
                          {false, true, false, true, true, true, true, true, true, true}, rows));
}

// Five products in the place of the forward's two.
constexpr double kBackwardFlops = 2.5;

void report_backward(const ReportOptions& options, const Engines& engines, int threads) {
  const FmaLoop peak = fma_loop(engines.isa);
  constexpr long kPeakIterations = 1'000'000;
  const ContextPtr context = make_context(threads);
  std::vector<std::vector<std::string>> rows;
  for (const std::string& dtype : options.dtypes) {
    for (int head_dim : options.head_dims) {
      const Shape shape{1, options.heads, options.seqlen, options.heads, options.seqlen, head_dim};
      const Inputs inputs(shape, parse_dtype(dtype));
      Call forward(context.get(), inputs, shape, options.backward_mods.front(), ATTNJIT_BACKEND_CPU);
      std::vector<std::unique_ptr<BackwardCall>> calls;
      std::vector<std::function<void()>> candidates{[&] { forward.run(); }};
      for (const std::string& mod : options.backward_mods) {
        calls.push_back(std::make_unique<BackwardCall>(context.get(), inputs, shape, mod));
        candidates.push_back([call = calls.back().get()] { call->run(); });
      }
      if (peak.run != nullptr) candidates.push_back([&] { peak.run(kPeakIterations); });
      const std::vector<Timing> times = time_interleaved(candidates, options.repetitions);
      const double peak_gflops =
          peak.run != nullptr ? peak.flops_per_iteration * kPeakIterations / times.back().min / 1e6 : 0.0;
      for (std::size_t i = 0; i < options.backward_mods.size(); ++i) {
        const Timing& time = times[i + 1];
        const double gflops = kBackwardFlops * shape.flops() / time.min / 1e6;
        rows.push_back({dtype, fmt::format("{}", head_dim), options.backward_mods[i], fmt::format("{:.2f}", time.min),
                        fmt::format("{:.2f}", time.median), fmt::format("{:.1f}", gflops),
                        peak_gflops > 0 ? fmt::format("{:.1f}%", 100 * gflops / (peak_gflops * threads)) : "-",
                        fmt::format("{:+.1f}%", 100 * (time.min / times[1].min - 1)),
                        fmt::format("{:.2f}", time.min / times[0].min)});
      }
    }
  }
  fmt::print("\n## Backward, {}, {} thread{}: (B, H, S) = (1, {}, {}), gradients of q, k, v and of {}*\n\n{}",
             engines.isa, threads, threads == 1 ? "" : "s", options.heads, options.seqlen, kGradientPrefix,
             github_table({"dtype", "d", "score_mod", "ms", "median", "GFLOP/s", "of FMA peak", "over the first",
                           "over the first's forward"},
                          {false, true, false, true, true, true, true, true, true}, rows));
}

// Every text differs by a literal, so nothing is found in a cache.
void report_compiles(const ReportOptions& options, const std::string& isa) {
  const Shape shape{1, 1, 64, 1, 64, 64};
  const Inputs inputs(shape, ElementType::kFloat32);
  const ContextPtr context = make_context(1);
  const std::pair<const char*, std::function<std::string(int)>> texts[] = {
      {"score * c", [](int i) { return fmt::format("score * 1.{:03}", i + 1); }},
      {"where(q_idx + c >= kv_idx, score, -inf)",
       [](int i) { return fmt::format("where(q_idx + {} >= kv_idx, score, -inf)", i + 1); }},
      {"score + c * (q_idx - kv_idx)", [](int i) { return fmt::format("score + {} * (q_idx - kv_idx)", i + 2); }},
      {"score + alibi_slopes[h] * (kv_idx - q_idx + c)",
       [](int i) { return fmt::format("score + alibi_slopes[h] * (kv_idx - q_idx + {})", i + 1); }},
      {"c * tanh(score / c)", [](int i) { return fmt::format("{} * tanh(score / {})", i + 2, i + 2); }},
  };
  const Call first(context.get(), inputs, shape, "score * 0.9990234375", ATTNJIT_BACKEND_CPU);  // sets the compiler up
  std::vector<std::vector<std::string>> rows;
  for (const auto& [name, text] : texts) {
    std::vector<double> cold, cached;
    for (int i = 0; i < options.compiles; ++i) {
      cold.push_back(Call(context.get(), inputs, shape, text(i), ATTNJIT_BACKEND_CPU).prepare_ms());
      cached.push_back(Call(context.get(), inputs, shape, text(i), ATTNJIT_BACKEND_CPU).prepare_ms());
    }
    const Timing time = summarize(cold);
    rows.push_back({name, fmt::format("{:.1f}", time.min), fmt::format("{:.1f}", time.median),
                    fmt::format("{:.1f}", time.max), fmt::format("{:.1f}", 1000 * summarize(cached).median)});
  }
  fmt::print("\n## Compile, {}, warm process, ms of prepare\n\n{}", isa,
             github_table({"score_mod", "cold min", "cold median", "cold max", "cached median (us)"},
                          {false, true, true, true, true}, rows));
}

void report_overhead(const ReportOptions& options) {
  const Shape shape{1, 1, 1, 1, 1, 16};
  const Inputs inputs(shape, ElementType::kFloat32);
  std::vector<std::vector<std::string>> rows;
  for (int threads : options.threads) {
    const ContextPtr context = make_context(threads);
    Call noop(context.get(), inputs, shape, "noop", ATTNJIT_BACKEND_CPU);
    Call alibi(context.get(), inputs, shape, "alibi", ATTNJIT_BACKEND_CPU);
    const std::function<void()> candidates[] = {[&] { noop.run(); }, [&] { alibi.run(); }};
    const std::vector<Timing> times = time_interleaved(candidates, options.repetitions, 2.0);
    for (int i = 0; i < 2; ++i) {
      rows.push_back({fmt::format("{}", threads), i == 0 ? "noop" : "alibi (one captured tensor)",
                      fmt::format("{:.2f}", 1000 * times[i].min), fmt::format("{:.2f}", 1000 * times[i].median)});
    }
  }
  fmt::print("\n## Prepared call, one query row and one key, us\n\n{}",
             github_table({"threads", "score_mod", "min", "median"}, {true, false, true, true}, rows));
}

void report_isa(const ReportOptions& options, const std::string& isa, bool compiles) {
  if (isa != "host") ::setenv("ATTNJIT_CPU_ISA", isa.c_str(), 1);
  // The eager side is limited alike, unless the user chose its kernels.
  if (isa == "avx2") ::setenv("OPENBLAS_CORETYPE", "Haswell", 0);
  if (isa == "sse2") ::setenv("OPENBLAS_CORETYPE", "Prescott", 0);
  const Engines used = engines();
  for (int threads : options.threads) report_forward(options, used, threads);
  for (int threads : options.threads) report_backward(options, used, threads);
  if (!compiles) return;
  report_compiles(options, used.isa);
  report_overhead(options);
}

// The instruction set is chosen when a context is created, OpenBLAS' once in a process: each has a process of its own.
// Returns its exit status.
int in_child(const std::function<void()>& work) {
  std::fflush(stdout);
  const pid_t child = ::fork();
  if (child < 0) throw environment_error("cannot start a process");
  if (child == 0) {
    try {
      work();
      std::fflush(stdout);
      std::_Exit(0);
    } catch (const Failure& failure) {
      fmt::print(stderr, "attnjit_cpu_report: error: {}\n", failure.what());
      std::_Exit(static_cast<int>(failure.fault()));
    }
  }
  int status = 0;
  while (::waitpid(child, &status, 0) < 0 && errno == EINTR) {
  }
  return WIFEXITED(status) ? WEXITSTATUS(status) : static_cast<int>(Fault::kInternal);
}

int report(int argc, const char* const* argv) {
  ReportOptions options;
  CLI::App app("Prints the CPU backend's tables of bench/notes.md", "attnjit_cpu_report");
  app.add_option("--reps", options.repetitions, "repetitions (default: 25)")->check(CLI::Range(1, 10'000));
  app.add_option("--heads", options.heads, "heads (default: 2)")->check(CLI::Range(1, 1024));
  app.add_option("--seqlen", options.seqlen, "sequence length (default: 1024)")->check(CLI::Range(1, 1 << 20));
  app.add_option("--head-dims", options.head_dims, "head dimensions (default: 64 128)");
  app.add_option("--dtypes", options.dtypes, "(default: float32 bfloat16)");
  app.add_option("--threads", options.threads, "thread counts (default: 1 and 2, where there are two processors)");
  app.add_option("--isas", options.isas, "host, sse2, avx2, avx512, avx512bf16 (default: host avx2)");
  app.add_option("--mods", options.mods,
                 "the first is the one that others are compared with (default: noop causal rel "
                 "head_bias alibi softcap(30))");
  app.add_option(
      "--backward-mods", options.backward_mods,
      "likewise for the backward; of captured tensors whose names start with grad_ the gradients are computed");
  app.add_option("--compiles", options.compiles, "compiles of each text (default: 9)")->check(CLI::Range(1, 500));
  CLI11_PARSE(app, argc, argv);
  if (options.threads.empty()) {
    options.threads = {1};
    if (available_processors() > 1) options.threads.push_back(2);
  }
  fmt::print("# attnjit {} on the CPU\n\n{}, {} processors, {:%Y-%m-%d}\n", attnjit_version(), cpu_model(),
             available_processors(), fmt::gmtime(std::time(nullptr)));
  bool first = true;
  for (const std::string& isa : options.isas) {
    const int status = in_child([&] { report_isa(options, isa, first); });
    if (status != 0) return status;
    first = false;
  }
  return 0;
}

}  // namespace
}  // namespace attnjit::tool

int main(int argc, char** argv) {
  try {
    return attnjit::tool::report(argc, argv);
  } catch (const attnjit::tool::Failure& failure) {
    fmt::print(stderr, "attnjit_cpu_report: error: {}\n", failure.what());
    return static_cast<int>(failure.fault());
  } catch (const std::exception& exception) {
    fmt::print(stderr, "attnjit_cpu_report: error: {}\n", exception.what());
    return static_cast<int>(attnjit::tool::Fault::kInternal);
  }
}
