// attnjit bench score-mod: a sweep of shapes and mods, eager against compiled, each cell checked against the oracle.
// The sweep and its options are those of PyTorch's benchmarks/transformer/score_mod.py.
#include <attnjit/attnjit.h>
#include <fmt/chrono.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bench/api.h"
#include "bench/commands.h"
#include "bench/cuda.h"
#include "bench/device_tensor.h"
#include "bench/gpu_timing.h"
#include "bench/judge.h"
#include "bench/machine.h"
#include "bench/parallel.h"
#include "bench/problem.h"
#include "bench/report.h"
#include "bench/safetensors.h"
#include "bench/statistics.h"
#include "bench/tensor.h"

namespace attnjit::tool {

namespace {

// PyTorch's sweep is one for a GPU. On a CPU it would take an hour and 16 GiB of eager scores; the one there takes
// about a minute on two cores and 256 MiB.
constexpr std::int64_t kGpuBatches[] = {2, 8, 16}, kGpuSeqlens[] = {512, 1024, 4096};
constexpr std::int64_t kCpuBatches[] = {1}, kCpuSeqlens[] = {512, 1024, 2048}, kHeadDims[] = {64, 128};
constexpr const char* kHeads[] = {"16,16"};
constexpr const char* kMods[] = {"noop", "causal", "rel", "head_bias"};

// How many bounds of the sampled rows another row may be away from the eager result before the oracle is asked.
constexpr double kScreenFactor = 8.0;

struct BenchOptions {
  std::vector<std::int64_t> batches, seqlens, head_dims;
  std::vector<std::string> heads, mods, captures;
  std::string dtype = "bfloat16", device = "auto", baseline = "math", backend = "auto", format = "github", output;
  bool dynamic = false, max_autotune = false, calculate_bwd = false, deterministic = false;
  bool on_gpu = false, default_sweep = false;  // found out from the others
  int repetitions = 5, threads = 0;
  std::size_t rows = 16;
  std::uint64_t seed = 1;
};

// The command line that gives the same sweep on any machine, defaults spelled out.
std::string command_line(const BenchOptions& o) {
  const auto words = [](const auto& values) {
    std::string text;
    for (const auto& value : values) text += " " + shell_quoted(fmt::format("{}", value));
    return text;
  };
  std::string text = fmt::format(
      "attnjit bench score-mod -b{} -nh{} -s{} -d{} -mods{} -dtype {} --device {} --baseline {} --backend {} --reps {} "
      "--threads {} --rows {} --seed {}",
      words(o.batches), words(o.heads), words(o.seqlens), words(o.head_dims), words(o.mods), o.dtype, o.device,
      o.baseline, o.backend, o.repetitions, o.threads, o.rows, o.seed);
  for (const std::string& capture : o.captures) text += " --captures " + shell_quoted(capture);
  if (o.dynamic) text += " --dynamic";
  if (o.max_autotune) text += " --max-autotune";
  if (o.calculate_bwd) text += " --calculate-bwd";
  if (o.deterministic) text += " --deterministic";
  return text + " --format " + o.format;
}

std::string_view variable(const char* name) {
  const char* value = std::getenv(name);
  return value != nullptr ? value : "";
}

// On a terminal, and not where one is only pretended to be (CI, TERM=dumb): one line that is rewritten, and erased at
// the end.
class Progress {
 public:
  explicit Progress(std::size_t total)
      : total_(total), visible_(::isatty(STDERR_FILENO) == 1 && variable("CI").empty() && variable("TERM") != "dumb") {}
  ~Progress() {
    if (visible_) fmt::print(stderr, "\r\x1b[K");
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void begin(const std::string& what) {
    if (visible_) {
      const std::size_t filled = done_ * kWidth / std::max<std::size_t>(total_, 1);
      fmt::print(stderr, "\r\x1b[K[{}{}] {}/{} {}", std::string(filled, '#'), std::string(kWidth - filled, '.'), done_,
                 total_, what.substr(0, 60));
      std::fflush(stderr);
    }
    ++done_;
  }

 private:
  static constexpr std::size_t kWidth = 24;
  std::size_t total_, done_ = 0;
  bool visible_;
};

std::vector<Shape> make_shapes(const BenchOptions& options) {
  std::vector<Shape> shapes;
  for (std::int64_t batch : options.batches) {
    for (const std::string& text : options.heads) {
      const auto [heads_q, heads_kv] = parse_heads(text);
      for (std::int64_t seqlen : options.seqlens) {
        for (std::int64_t head_dim : options.head_dims) {
          shapes.push_back({batch, heads_q, seqlen, heads_kv, seqlen, head_dim});
        }
      }
    }
  }
  return shapes;
}

std::uint64_t tensor_bytes(const Shape& s, ElementType type, bool backward) {
  // q and two o; k and v. In the backward, besides, grad_out and two dq; two dk and two dv.
  const double of_queries = backward ? 6.0 : 3.0, of_keys = backward ? 6.0 : 2.0;
  const double elements = static_cast<double>(s.batch) * static_cast<double>(s.head_dim) *
                          (of_queries * static_cast<double>(s.heads_q) * static_cast<double>(s.seqlen_q) +
                           of_keys * static_cast<double>(s.heads_kv) * static_cast<double>(s.seqlen_kv));
  return static_cast<std::uint64_t>(std::min(elements * info(type).bits / 8, 1e18));
}

// A problem's tensors, on the host for the oracle and where the calls want them.
struct Inputs {
  Inputs(const Shape& s, ElementType type, std::uint64_t seed, bool on_gpu)
      : q(Tensor::sequence_major(type, s.batch, s.heads_q, s.seqlen_q, s.head_dim), on_gpu),
        k(Tensor::sequence_major(type, s.batch, s.heads_kv, s.seqlen_kv, s.head_dim), on_gpu),
        v(Tensor::sequence_major(type, s.batch, s.heads_kv, s.seqlen_kv, s.head_dim), on_gpu),
        o(Tensor::sequence_major(type, s.batch, s.heads_q, s.seqlen_q, s.head_dim), on_gpu),
        eager_o(Tensor::sequence_major(type, s.batch, s.heads_q, s.seqlen_q, s.head_dim), on_gpu),
        lse(Tensor(ElementType::kFloat32, {s.batch, s.heads_q, s.seqlen_q}), on_gpu),
        eager_lse(Tensor(ElementType::kFloat32, {s.batch, s.heads_q, s.seqlen_q}), on_gpu) {
    fill_normal(q.host, seed * 3 + 0);
    fill_normal(k.host, seed * 3 + 1);
    fill_normal(v.host, seed * 3 + 2);
    for (const Placed* input : {&q, &k, &v}) input->device.upload();
  }
  Placed q, k, v, o, eager_o, lse, eager_lse;
};

// What the backward of a problem needs besides.
struct Gradients {
  Gradients(const Shape& s, ElementType type, std::uint64_t seed, bool on_gpu)
      : grad_out(Tensor::sequence_major(type, s.batch, s.heads_q, s.seqlen_q, s.head_dim), on_gpu),
        compiled(s, type, on_gpu),
        eager(s, type, on_gpu) {
    fill_normal(grad_out.host, seed ^ 0x9e3779b9u);
    grad_out.device.upload();
  }

  struct Outputs {
    Outputs(const Shape& s, ElementType type, bool on_gpu)
        : dq(Tensor::sequence_major(type, s.batch, s.heads_q, s.seqlen_q, s.head_dim), on_gpu),
          dk(Tensor::sequence_major(type, s.batch, s.heads_kv, s.seqlen_kv, s.head_dim), on_gpu),
          dv(Tensor::sequence_major(type, s.batch, s.heads_kv, s.seqlen_kv, s.head_dim), on_gpu) {}
    std::array<const Placed*, 3> all() const { return {&dq, &dk, &dv}; }
    Placed dq, dk, dv;
  };
  Placed grad_out;
  Outputs compiled, eager;
};

// Captured tensors where the calls want them; scalars stay on the host, and are passed by value.
class PlacedCaptures {
 public:
  PlacedCaptures(Captures& captures, bool on_gpu) : dl_(captures.dl), lent_(captures.lent) {
    memory_.reserve(dl_.size());
    for (std::size_t i = 0; i < dl_.size(); ++i) {
      memory_.emplace_back(captures.tensors[i], on_gpu && dl_[i].ndim > 0);
      memory_.back().upload();
      dl_[i] = memory_.back().dl();
      lent_[i].tensor = &dl_[i];
    }
  }
  PlacedCaptures(const PlacedCaptures&) = delete;
  PlacedCaptures& operator=(const PlacedCaptures&) = delete;
  std::span<const attnjit_capture> lent() const { return lent_; }

 private:
  std::vector<DeviceTensor> memory_;
  std::vector<DLTensor> dl_;
  std::vector<attnjit_capture> lent_;
};

// The structs of a backward call. Stays where it is made: they point into each other.
class GradientsOfCall {
 public:
  GradientsOfCall(const DLTensor& grad_out, const DLTensor& dq, const DLTensor& dk, const DLTensor& dv,
                  bool deterministic)
      : grad_out_(grad_out), dq_(dq), dk_(dk), dv_(dv) {
    gradients_.grad_out = &grad_out_;
    gradients_.dq = &dq_;
    gradients_.dk = &dk_;
    gradients_.dv = &dv_;
    gradients_.deterministic = deterministic ? 1 : 0;
  }
  GradientsOfCall(const GradientsOfCall&) = delete;
  GradientsOfCall& operator=(const GradientsOfCall&) = delete;
  const attnjit_gradients& get() const { return gradients_; }

 private:
  DLTensor grad_out_, dq_, dk_, dv_;
  attnjit_gradients gradients_ = ATTNJIT_GRADIENTS_INIT;
};

// A call with its plan, and that of its backward where there is one. Stays where it is made: the structs point into
// each other.
class Call {
 public:
  Call(attnjit_context* context, const DLTensor& q, const DLTensor& k, const DLTensor& v,
       std::span<const attnjit_capture> captures, const char* score_mod, attnjit_backend backend,
       bool max_autotune = false)
      : context_(context), q_(q), k_(k), v_(v) {
    attention_.score_mod = score_mod;
    attention_.q = &q_;
    attention_.k = &k_;
    attention_.v = &v_;
    attention_.captures = captures.data();
    attention_.num_captures = captures.size();
    attention_.backend = backend;
    attention_.max_autotune = max_autotune ? 1 : 0;
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  void bind_outputs(const DLTensor& o, const DLTensor& lse) {
    o_ = o;
    lse_ = lse;
    attention_.o = &o_;
    attention_.lse = &lse_;
  }

  void bind_gradients(const attnjit_gradients& gradients) { gradients_ = &gradients; }

  // Milliseconds.
  double prepare() {
    plan_.reset();
    backward_plan_.reset();
    const auto begin = std::chrono::steady_clock::now();
    if (gradients_ != nullptr) {
      TrainingPlans plans = prepare_training(context_, attention_, *gradients_);
      plan_ = std::move(plans.forward);
      backward_plan_ = std::move(plans.backward);
    } else {
      plan_ = tool::prepare(context_, attention_);
    }
    return std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - begin).count();
  }
  nlohmann::ordered_json description() const { return description_of(plan_); }
  std::size_t workspace_size() const {
    return std::max(attnjit_plan_workspace_size(plan_.get()), attnjit_plan_workspace_size(backward_plan_.get()));
  }
  void allocate_workspace() { workspace_ = Workspace(workspace_size(), q_.device.device_type == kDLCUDA); }
  void free_workspace() { workspace_ = Workspace(); }
  void run(void* stream = nullptr) {
    check(attnjit_run(plan_.get(), &attention_, workspace_.data(), workspace_size(), stream));
  }
  // Of the results of a run before it.
  void run_backward(void* stream = nullptr) {
    check(attnjit_run_backward(backward_plan_.get(), &attention_, gradients_, workspace_.data(), workspace_size(),
                               stream));
  }
  const attnjit_attention& attention() const { return attention_; }

 private:
  attnjit_context* context_;
  attnjit_attention attention_ = ATTNJIT_ATTENTION_INIT;
  DLTensor q_, k_, v_;
  DLTensor o_ = q_, lse_ = q_;  // until bind_outputs()
  const attnjit_gradients* gradients_ = nullptr;
  PlanPtr plan_, backward_plan_;
  Workspace workspace_;
};

std::int64_t offset_of(const Tensor& tensor, const attnjit_row& row) {
  return row.b * tensor.strides()[0] + row.h * tensor.strides()[1] + row.q_idx * tensor.strides()[2];
}

// The largest bounds of some rows.
struct Allowed {
  double o = 0.0, lse = 0.0;
};

// Rows against the oracle. `allowed`, where given, is set to the largest differences that any of their elements may
// have.
Verdict judge_rows(attnjit_context* context, const attnjit_attention& attention, const Tensor& o, const Tensor& lse,
                   std::span<const attnjit_row> rows, Allowed* allowed = nullptr) {
  const auto dim = static_cast<std::size_t>(o.shape()[3]);
  std::vector<double> gold(rows.size() * dim), bound(gold.size()), gold_lse(rows.size()), lse_bound(rows.size());
  std::vector<unsigned char> decided(rows.size());
  check(attnjit_reference(context, &attention, rows.data(), rows.size(), gold.data(), gold_lse.data(), nullptr));
  check(attnjit_reference_bounds(context, &attention, rows.data(), rows.size(), bound.data(), lse_bound.data(),
                                 decided.data()));
  Verdict verdict;
  std::vector<double> result(dim);
  for (std::size_t i = 0; i < rows.size(); ++i) {
    o.get(offset_of(o, rows[i]), result);
    const auto part = [&](const std::vector<double>& all) { return std::span(all).subspan(i * dim, dim); };
    const RowTruth truth{part(gold), part(bound), gold_lse[i], lse_bound[i], decided[i] != 0};
    verdict.merge(judge_row(result, lse.get(offset_of(lse, rows[i])), truth, o.type(),
                            fmt::format("row b={} h={} q_idx={}", rows[i].b, rows[i].h, rows[i].q_idx)));
    if (allowed == nullptr) continue;
    for (const double each : truth.o_bound) {
      if (std::isfinite(each)) allowed->o = std::max(allowed->o, each);
    }
    if (std::isfinite(truth.lse_bound)) allowed->lse = std::max(allowed->lse, truth.lse_bound);
  }
  return verdict;
}

// |a - b|, and infinity where one of them is NaN or where they are different infinities; 0 where both are NaN.
double distance(double a, double b) {
  if (a == b || (std::isnan(a) && std::isnan(b))) return 0.0;
  const double d = std::fabs(a - b);
  return std::isnan(d) ? std::numeric_limits<double>::infinity() : d;
}

// What a row of two tensors of one type and layout shows.
struct RowDistance {
  double worst = 0.0;  // distance
  bool nan = false;    // in the first
};

// Reads rows of a pair of tensors.
class RowPair {
 public:
  RowPair(const Tensor& a, const Tensor& b)
      : a_(a), b_(b), values_(2 * static_cast<std::size_t>(a.shape().back())), dim_(values_.size() / 2) {}
  RowDistance at(const attnjit_row& row) {
    const std::span<double> a = std::span(values_).first(dim_), b = std::span(values_).last(dim_);
    a_.get(offset_of(a_, row), a);
    b_.get(offset_of(b_, row), b);
    RowDistance result;
    for (std::size_t d = 0; d < dim_; ++d) {
      result.worst = std::max(result.worst, distance(a[d], b[d]));
      result.nan = result.nan || std::isnan(a[d]);
    }
    return result;
  }

 private:
  const Tensor &a_, &b_;
  std::vector<double> values_;
  std::size_t dim_;
};

// Rows in which compiled and eager results are further apart than kScreenFactor times what is `allowed`, or in which
// something is NaN, which may be one of the poison that was never overwritten: the worst first. They find a tile that
// no sampled row met; the oracle says whether it is wrong, since rows that were not sampled may have larger bounds than
// those that were.
std::vector<attnjit_row> suspect_rows(const Tensor& o, const Tensor& eager_o, const Tensor& lse,
                                      const Tensor& eager_lse, const Allowed& allowed) {
  struct Suspect {
    double difference;
    attnjit_row row;
  };
  const std::int64_t batches = o.shape()[0], heads = o.shape()[1], seqlen = o.shape()[2];
  std::vector<std::vector<Suspect>> of_heads(static_cast<std::size_t>(batches * heads));
  parallel_for(batches * heads, [&](std::int64_t head) {
    RowPair pair(o, eager_o);
    for (std::int64_t q_idx = 0; q_idx < seqlen; ++q_idx) {
      const attnjit_row row{head / heads, head % heads, q_idx};
      const auto [worst, nan] = pair.at(row);
      const double row_lse = lse.get(offset_of(lse, row));
      const bool lse_off = distance(row_lse, eager_lse.get(offset_of(eager_lse, row))) > kScreenFactor * allowed.lse;
      if (worst > kScreenFactor * allowed.o || lse_off || nan || std::isnan(row_lse)) {
        of_heads[static_cast<std::size_t>(head)].push_back({worst, row});
      }
    }
  });
  std::vector<Suspect> suspects;
  for (const auto& of_head : of_heads) suspects.insert(suspects.end(), of_head.begin(), of_head.end());
  std::ranges::sort(suspects, std::ranges::greater(), &Suspect::difference);
  std::vector<attnjit_row> rows;
  rows.reserve(suspects.size());
  for (const Suspect& suspect : suspects) rows.push_back(suspect.row);
  return rows;
}

std::string too_many_left_out(const Verdict& verdict, std::size_t allowed, const std::string& what) {
  return fmt::format("float32 does not decide {} of {} {}; at most {} may be left out", verdict.left_out, verdict.rows,
                     what, allowed);
}

// Sampled rows, then the worst suspects, until `count` of them were judged: rows that float32 does not decide are among
// the worst and may not hide a wrong one.
Verdict judge_cell(attnjit_context* context, const attnjit_attention& attention, const Tensor& o, const Tensor& eager_o,
                   const Tensor& lse, const Tensor& eager_lse, const std::vector<attnjit_row>& sampled) {
  Allowed allowed;
  Verdict verdict = judge_rows(context, attention, o, lse, sampled, &allowed);
  if (verdict.ok && (verdict.left_out > allowed_left_out(verdict.rows) || verdict.left_out == verdict.rows)) {
    verdict.ok = false;
    verdict.why = too_many_left_out(verdict, allowed_left_out(verdict.rows), "sampled rows");
  }
  if (!verdict.ok) return verdict;

  const std::vector<attnjit_row> suspects = suspect_rows(o, eager_o, lse, eager_lse, allowed);
  const auto all_rows = static_cast<std::size_t>(o.shape()[0] * o.shape()[1] * o.shape()[2]);
  Verdict found;
  while (found.ok && found.rows < suspects.size() && found.rows - found.left_out < sampled.size()) {
    const std::size_t next = std::min(sampled.size(), suspects.size() - found.rows);
    found.merge(judge_rows(context, attention, o, lse, std::span(suspects).subspan(found.rows, next)));
    if (found.ok && found.left_out > allowed_left_out(all_rows)) {
      found.ok = false;
      found.why = too_many_left_out(found, allowed_left_out(all_rows), "rows that differ from eager");
    }
  }
  verdict.merge(found);
  return verdict;
}

// ---- Gradients

// One batch and key/value head with the query heads that share it.
struct HeadGroup {
  std::int64_t b, h_kv;
};

// A gradient as it is judged: the result and the eager one, (B, H, S, D), and how many of its heads a group has.
struct JudgedGradient {
  const char* name;
  const Tensor &result, &eager;
  std::int64_t heads;
};

// Every gradient of a group against the oracle.
Verdict judge_group(attnjit_context* context, const attnjit_attention& attention, const attnjit_gradients& gradients,
                    std::span<const JudgedGradient, 3> judged, const HeadGroup& group, Allowed* allowed) {
  std::array<std::vector<double>, 3> gold, bound;
  for (std::size_t i = 0; i < judged.size(); ++i) {
    const std::vector<std::int64_t>& shape = judged[i].result.shape();
    gold[i].resize(static_cast<std::size_t>(judged[i].heads * shape[2] * shape[3]));
    bound[i].resize(gold[i].size());
  }
  attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
  out.dq = gold[0].data();
  out.dk = gold[1].data();
  out.dv = gold[2].data();
  out.dq_bound = bound[0].data();
  out.dk_bound = bound[1].data();
  out.dv_bound = bound[2].data();
  check(attnjit_reference_backward(context, &attention, &gradients, group.b, group.h_kv, &out));
  Verdict verdict;
  for (std::size_t i = 0; i < judged.size(); ++i) {
    const JudgedGradient& g = judged[i];
    const std::int64_t seqlen = g.result.shape()[2];
    const auto dim = static_cast<std::size_t>(g.result.shape()[3]);
    std::vector<double> values(dim);
    for (std::int64_t row = 0; row < g.heads * seqlen; ++row) {
      const attnjit_row at{group.b, group.h_kv * g.heads + row / seqlen, row % seqlen};
      const std::int64_t offset = offset_of(g.result, at);
      g.result.get(offset, values);
      const std::size_t first = static_cast<std::size_t>(row) * dim;
      verdict.merge(judge_values(values, std::span(gold[i]).subspan(first, dim),
                                 std::span(bound[i]).subspan(first, dim), g.result.type(), g.name,
                                 fmt::format("b={} h={} row {}", at.b, at.h, at.q_idx)));
    }
    for (const double each : bound[i]) {
      if (std::isfinite(each)) allowed[i].o = std::max(allowed[i].o, each);
    }
  }
  return verdict;
}

// How far each group's results are from the eager ones, in units of what is allowed; infinite where something is NaN
// that is not NaN there.
std::vector<double> distances_from_eager(std::span<const JudgedGradient, 3> judged, const Allowed* allowed) {
  const std::int64_t batches = judged[1].result.shape()[0], heads_kv = judged[1].result.shape()[1];
  std::vector<double> distances(static_cast<std::size_t>(batches * heads_kv));
  parallel_for(batches * heads_kv, [&](std::int64_t group) {
    const std::int64_t b = group / heads_kv, h_kv = group % heads_kv;
    double& worst = distances[static_cast<std::size_t>(group)];
    for (std::size_t i = 0; i < judged.size(); ++i) {
      const JudgedGradient& g = judged[i];
      RowPair pair(g.result, g.eager);
      double furthest = 0.0;
      for (std::int64_t h = h_kv * g.heads; h < (h_kv + 1) * g.heads; ++h) {
        for (std::int64_t row = 0; row < g.result.shape()[2]; ++row) {
          furthest = std::max(furthest, pair.at({b, h, row}).worst);
        }
      }
      if (furthest > 0.0) worst = std::max(worst, furthest / allowed[i].o);
    }
  });
  return distances;
}

// One group of heads in full, and of the others the one that is furthest from eager, where it is suspiciously far.
Verdict judge_gradients(attnjit_context* context, const attnjit_attention& attention,
                        const attnjit_gradients& gradients, std::span<const JudgedGradient, 3> judged,
                        std::uint64_t seed) {
  const std::vector<std::int64_t>& shape = judged[1].result.shape();
  const std::int64_t groups = shape[0] * shape[1];
  const auto group_at = [&](std::int64_t i) { return HeadGroup{i / shape[1], i % shape[1]}; };
  const std::int64_t sampled = static_cast<std::int64_t>(seed % static_cast<std::uint64_t>(groups));
  Allowed allowed[3];
  Verdict verdict = judge_group(context, attention, gradients, judged, group_at(sampled), allowed);
  if (verdict.ok && verdict.unbounded > allowed_left_out(verdict.rows)) {
    verdict.ok = false;
    verdict.why = fmt::format("float32 does not decide {} of {} rows of the gradients; at most {} may be left out",
                              verdict.unbounded, verdict.rows, allowed_left_out(verdict.rows));
  }
  if (!verdict.ok) return verdict;
  std::vector<double> distances = distances_from_eager(judged, allowed);
  distances[static_cast<std::size_t>(sampled)] = 0.0;
  const auto worst = std::ranges::max_element(distances);
  if (*worst > kScreenFactor) {
    const HeadGroup suspect = group_at(worst - distances.begin());
    verdict.merge(judge_group(context, attention, gradients, judged, suspect, allowed));
  }
  return verdict;
}

struct PrepareTimes {
  std::vector<double> new_shape, cached;
};

// Whether preparing this plan made native code. A plan whose expression compiles to what an earlier one did shares it.
bool made_code(const nlohmann::ordered_json& description) {
  if (!description.value("compiled", false) || !description.contains("phases_ms")) return false;
  const auto& phases = description["phases_ms"];
  return phases.contains("codegen") || phases.contains("nvrtc") || phases.contains("autotune");
}

class Bench {
 public:
  explicit Bench(const BenchOptions& options)
      : options_(options),
        type_(parse_dtype(options.dtype)),
        backend_(parse_backend(options.backend)),
        on_gpu_(options.on_gpu),
        specs_(parse_captures(options.captures)),
        shapes_(make_shapes(options)) {
    context_ = make_context(options.threads);
    // Winners are to be found again: they need the disk cache.
    cold_context_ = options.max_autotune ? make_context(options.threads) : cold_context();
    mods_ = registered_mods(context_.get());
    check_problems();
  }

  Report run() {
    Report report;
    first_compile();
    for (const std::string& mod : options_.mods) report.compiles.push_back({.mod = mod});
    times_.resize(options_.mods.size());
    {
      Progress progress(shapes_.size() * options_.mods.size());
      for (std::size_t i = 0; i < shapes_.size(); ++i) {
        with_memory_for(fmt::format("shape {}; choose smaller -b, -nh or -s", shapes_[i].text()),
                        [&] { run_shape(i, progress, report); });
      }
    }
    for (std::size_t i = 0; i < times_.size(); ++i) {
      if (!times_[i].new_shape.empty()) report.compiles[i].new_shape = median(times_[i].new_shape);
      report.compiles[i].cached = median(times_[i].cached);
    }
    fill_header(report);
    return report;
  }

 private:
  // What compiles the calls that are measured: without the disk cache, whose entries would be no compiles.
  ContextPtr cold_context() const {
    constexpr const char* kVariable = "ATTNJIT_DISABLE_CACHE";
    const bool set = !variable(kVariable).empty();
    if (!set) setenv(kVariable, "1", 1);
    ContextPtr context = make_context(options_.threads);
    if (!set) unsetenv(kVariable);
    return context;
  }

  // Everything that can be wrong is found before minutes are spent on the cells in front of it: texts, captured
  // tensors, shapes, and the memory for eager attention's scores. In a context of its own, so that the compiles below
  // stay cold.
  void check_problems() {
    const ContextPtr context = make_context(options_.threads);
    const std::uint64_t host_memory = available_memory_bytes();
    const std::uint64_t available = on_gpu_ ? Gpu::get().free_memory() : host_memory;
    std::set<std::string> read;
    for (const Shape& s : shapes_) {
      const std::uint64_t bytes = tensor_bytes(s, type_, options_.calculate_bwd);
      check_memory(s, options_.calculate_bwd ? "for tensors and gradients" : "for q, k, v and o", bytes, host_memory);
      const std::vector q_shape = {s.batch, s.heads_q, s.seqlen_q, s.head_dim};
      const std::vector kv_shape = {s.batch, s.heads_kv, s.seqlen_kv, s.head_dim};
      const std::vector lse_shape = {s.batch, s.heads_q, s.seqlen_q};
      DLTensor q = dl_without_data(type_, q_shape), kv = dl_without_data(type_, kv_shape), o = q;
      for (DLTensor* tensor : {&q, &kv, &o}) tensor->device.device_type = on_gpu_ ? kDLCUDA : kDLCPU;
      for (const std::string& mod : options_.mods) {
        Captures captures = make_captures(context.get(), mod.c_str(), nullptr, specs_, mods_, s, std::nullopt, false);
        for (DLTensor& captured : captures.dl) captured.device = q.device;
        read.insert(captures.names.begin(), captures.names.end());
        attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
        attention.score_mod = mod.c_str();
        attention.q = &q;
        attention.k = attention.v = &kv;
        attention.o = &o;
        attention.captures = captures.lent.data();
        attention.num_captures = captures.lent.size();
        attention.backend = ATTNJIT_BACKEND_MATH;
        DLTensor lse = dl_without_data(ElementType::kFloat32, lse_shape);
        lse.device = q.device;
        TrainingPlans plans;
        if (options_.calculate_bwd) {
          attention.lse = &lse;
          const GradientsOfCall gradients(o, q, kv, kv, options_.deterministic);
          plans = prepare_training(context.get(), attention, gradients.get());
        } else {
          plans.forward = prepare(context.get(), attention);
        }
        check_memory(s, "with the eager baseline's scores",
                     bytes + std::max(attnjit_plan_workspace_size(plans.forward.get()),
                                      attnjit_plan_workspace_size(plans.backward.get())),
                     available);
        if (math_products_.empty()) math_products_ = eager_products(description_of(plans.forward));
      }
    }
    for (const CaptureSpec& spec : specs_) {
      if (read.contains(spec.name)) continue;
      throw user_error(fmt::format("--captures: none of the mods reads {}; they read {}", in_quotes(spec.name),
                                   read.empty() ? "nothing captured" : fmt::format("{}", fmt::join(read, ", "))));
    }
  }

  static void check_memory(const Shape& shape, std::string_view what, std::uint64_t needed, std::uint64_t available) {
    if (needed <= available) return;
    constexpr double kGiB = 1024.0 * 1024.0 * 1024.0;
    throw environment_error(fmt::format(
        "shape {} needs {:.1f} GiB {}, but {:.1f} GiB of memory are available; choose smaller -b, -nh or -s",
        shape.text(), static_cast<double>(needed) / kGiB, what, static_cast<double>(available) / kGiB));
  }

  // The compiler sets itself up in the first compile of a process; the cold times of the mods leave that out.
  void first_compile() {
    const Shape shape{1, 1, 64, 1, 64, 64};
    const Inputs inputs(shape, type_, options_.seed, on_gpu_);
    Call call(cold_context_.get(), inputs.q.device.dl(), inputs.k.device.dl(), inputs.v.device.dl(), {},
              "score * 0.9990234375 + 0.0009765625 * kv_idx", backend_);
    call.bind_outputs(inputs.o.device.dl(), inputs.lse.device.dl());
    first_compile_ = call.prepare();
    const nlohmann::ordered_json description = call.description();
    if (description.contains("host")) host_ = description["host"];
  }

  void run_shape(std::size_t shape_index, Progress& progress, Report& report) {
    const Shape& shape = shapes_[shape_index];
    Inputs inputs(shape, type_, options_.seed + shape_index, on_gpu_);
    const DLTensor q = inputs.q.device.dl(), k = inputs.k.device.dl(), v = inputs.v.device.dl();
    std::optional<Gradients> gradients;
    if (options_.calculate_bwd) gradients.emplace(shape, type_, options_.seed + shape_index, on_gpu_);
    for (std::size_t i = 0; i < options_.mods.size(); ++i) {
      const std::string& mod = options_.mods[i];
      progress.begin(fmt::format("{} {}", mod, shape.text()));
      Captures captures =
          make_captures(context_.get(), mod.c_str(), nullptr, specs_, mods_, shape, options_.seed, false);
      const PlacedCaptures placed(captures, on_gpu_);

      Call compiled(cold_context_.get(), q, k, v, placed.lent(), mod.c_str(), backend_, options_.max_autotune);
      compiled.bind_outputs(inputs.o.device.dl(), inputs.lse.device.dl());
      std::optional<GradientsOfCall> compiled_gradients, eager_gradients;
      if (gradients) {
        const auto bind = [&](std::optional<GradientsOfCall>& of_call,
                              const Gradients::Outputs& outputs) -> const attnjit_gradients& {
          return of_call
              .emplace(gradients->grad_out.device.dl(), outputs.dq.device.dl(), outputs.dk.device.dl(),
                       outputs.dv.device.dl(), options_.deterministic)
              .get();
        };
        compiled.bind_gradients(bind(compiled_gradients, gradients->compiled));
        bind(eager_gradients, gradients->eager);
      }
      const double milliseconds = compiled.prepare();
      CompileRow& row = report.compiles[i];
      const nlohmann::ordered_json description = compiled.description();
      row.compiles += made_code(description);
      if (row.prepared++ == 0) {
        row.cold = milliseconds;
      } else {
        times_[i].new_shape.push_back(milliseconds);
      }
      times_[i].cached.push_back(compiled.prepare());

      // The eager side with the mod is also what the compiled result is compared with.
      Call math(context_.get(), q, k, v, placed.lent(), mod.c_str(), ATTNJIT_BACKEND_MATH);
      Call plain(context_.get(), q, k, v, {}, nullptr, ATTNJIT_BACKEND_MATH);
      Call& eager = options_.baseline == "plain" ? plain : math;
      for (Call* call : {&math, &eager}) {
        call->bind_outputs(inputs.eager_o.device.dl(), inputs.eager_lse.device.dl());
        if (eager_gradients) call->bind_gradients(eager_gradients->get());
        call->prepare();
      }
      compiled.allocate_workspace();
      eager.allocate_workspace();

      Cell cell{.mod = mod,
                .dtype = std::string(info(type_).name),
                .backend = description.value("backend", ""),
                .shape = shape};
      time_cell(eager, compiled, cell);
      std::vector<const Placed*> outputs = {&inputs.o, &inputs.lse, &inputs.eager_o, &inputs.eager_lse};
      if (gradients) {
        for (const Gradients::Outputs* of_side : {&gradients->compiled, &gradients->eager}) {
          for (const Placed* output : of_side->all()) outputs.push_back(output);
        }
      }

      // Judged is a run into poisoned outputs: an element that is not written shows.
      for (const Placed* output : outputs) output->device.fill_nan();
      compiled.run();
      if (gradients) compiled.run_backward();
      if (&eager != &math) {
        if (on_gpu_) Gpu::get().synchronize();
        eager.free_workspace();  // there need not be room for both
        math.allocate_workspace();
      }
      math.run();
      if (gradients) math.run_backward();
      for (const Placed* output : outputs) output->device.download();
      const Call oracle(context_.get(), inputs.q.host.dl(), inputs.k.host.dl(), inputs.v.host.dl(), captures.lent,
                        mod.c_str(), ATTNJIT_BACKEND_AUTO);
      cell.forward.verdict =
          judge_cell(context_.get(), oracle.attention(), inputs.o.host, inputs.eager_o.host, inputs.lse.host,
                     inputs.eager_lse.host, sample_rows(shape, options_.rows, options_.seed));
      if (gradients) {
        const GradientsOfCall of_oracle(gradients->grad_out.host.dl(), gradients->compiled.dq.host.dl(),
                                        gradients->compiled.dk.host.dl(), gradients->compiled.dv.host.dl(), false);
        const JudgedGradient judged[] = {
            {"dq", gradients->compiled.dq.host, gradients->eager.dq.host, shape.heads_q / shape.heads_kv},
            {"dk", gradients->compiled.dk.host, gradients->eager.dk.host, 1},
            {"dv", gradients->compiled.dv.host, gradients->eager.dv.host, 1}};
        // A cell that was not timed throws here: none is reported unjudged.
        cell.backward.value().verdict = judge_gradients(context_.get(), oracle.attention(), of_oracle.get(), judged,
                                                        options_.seed + 7 * shape_index + i);
      }
      report.cells.push_back(std::move(cell));
    }
  }

  void time_cell(Call& eager, Call& compiled, Cell& cell) const {
    cell.forward = time_pass([&](void* stream) { eager.run(stream); }, [&](void* stream) { compiled.run(stream); });
    cell.forward.flops = cell.shape.flops();
    if (!options_.calculate_bwd) return;
    // What they need of the forward is there: it ran before.
    cell.backward = time_pass([&](void* stream) { eager.run_backward(stream); },
                              [&](void* stream) { compiled.run_backward(stream); });
    cell.backward->flops = cell.shape.backward_flops();
  }

  Pass time_pass(const std::function<void(void* stream)>& eager,
                 const std::function<void(void* stream)>& compiled) const {
    Pass pass;
    std::vector<Timing> timings;
    if (on_gpu_) {
      const Enqueue candidates[] = {[&](const GpuStream& stream) { eager(stream.handle()); },
                                    [&](const GpuStream& stream) { compiled(stream.handle()); }};
      timings = time_graphs(candidates, options_.repetitions);
      pass.host_us = 1e3 * host_milliseconds(candidates[1]);
    } else {
      const std::function<void()> candidates[] = {[&] { eager(nullptr); }, [&] { compiled(nullptr); }};
      timings = time_interleaved(candidates, options_.repetitions);
    }
    pass.eager = timings[0];
    pass.compiled = timings[1];
    return pass;
  }

  void fill_header(Report& report) const {
    const auto add = [&](const char* name, std::string value) { report.header.emplace_back(name, std::move(value)); };
    add("attnjit", attnjit_version());
    add("date", fmt::format("{:%Y-%m-%d %H:%M} UTC", fmt::gmtime(std::time(nullptr))));
    if (on_gpu_) {
      const Gpu& gpu = Gpu::get();
      add("machine",
          fmt::format("{}, compute capability {}.{}, {} multiprocessors, driver for CUDA {}.{}; {}, {} processors",
                      gpu.name(), gpu.arch() / 10, gpu.arch() % 10, gpu.num_sms(), gpu.driver_version() / 1000,
                      gpu.driver_version() % 1000 / 10, cpu_model(), available_processors()));
      add("device", "cuda");
      add("sweep", options_.default_sweep ? "that of PyTorch's benchmarks/transformer/score_mod.py" : "as asked for");
    } else {
      add("machine",
          fmt::format("{}, {} processors, {}, {} threads", cpu_model(), available_processors(),
                      host_.value("isa", "unknown instruction set"), host_.value("threads", options_.threads)));
      add("device", "cpu");
      add("sweep", options_.default_sweep
                       ? "smaller than PyTorch's, for a CPU; PyTorch's own: -b 2 8 16 -nh 16,16 -s 512 1024 "
                         "4096 -d 64 128"
                       : "as asked for");
    }
    add("inputs",
        fmt::format("standard normal, seed {}, memory order (batch, sequence, heads, head_dim)", options_.seed));
    add("eager",
        fmt::format("{}; products by {}",
                    options_.baseline == "plain" ? "plain: unfused attention without the mod, scores in memory"
                    : on_gpu_
                        ? "math: unfused attention, scores in memory, the mod compiled to one pass over them"
                        : "math: unfused attention, scores in memory, each operation of the mod one pass over them",
                    math_products_));
    // They may hold the baseline to slower kernels than OpenBLAS would take by itself.
    std::string forced;
    for (const char* name : {"OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE"}) {
      const std::string_view value = on_gpu_ ? "" : variable(name);
      if (!value.empty()) forced += fmt::format("{}={} ", name, value);
    }
    if (!forced.empty()) {
      add("caution", fmt::format("{}in the environment may make eager slower than OpenBLAS is by itself", forced));
    }
    add("times", fmt::format("{}median [min..max] of {} interleaved repetitions, one untimed before",
                             on_gpu_ ? "of the GPU alone, by replayed CUDA graphs; " : "", options_.repetitions));
    if (on_gpu_)
      add("host", "microseconds of the calling thread for one call of the compiled side, which it does not wait for");
    add("TFLOP/s", "of the compiled call, 4 B Hq M N D operations: what a mask skips is counted");
    add("check",
        fmt::format(
            "{} rows a cell against the double-precision oracle, and those furthest from eager; \"of bound\" is "
            "the largest error in units of what is allowed; rows that float32 does not decide are left out and counted",
            options_.rows));
    if (options_.calculate_bwd) {
      add("backward",
          fmt::format("dq, dk and dv{}, given o and lse; TFLOP/s count 10 B Hq M N D operations; checked are all "
                      "gradients of one batch and key/value head, and those furthest from eager",
                      options_.deterministic ? ", deterministic" : ""));
    }
    add("first compile in the process", fmt::format("{:.1f} ms", first_compile_));
    if (options_.max_autotune) {
      add("max autotune",
          "the compiled side's configuration is the fastest of a few that prepare timed, or found in the disk cache: "
          "compile times are with both");
    }
    if (options_.dynamic) add("dynamic", "one compile of a mod has to serve all shapes; see the compile table");
    add("command", command_line(options_));
  }

  const BenchOptions& options_;
  ElementType type_;
  attnjit_backend backend_;
  bool on_gpu_;
  std::vector<CaptureSpec> specs_;
  std::vector<Shape> shapes_;
  ContextPtr context_, cold_context_;
  std::vector<RegisteredMod> mods_;
  std::vector<PrepareTimes> times_;
  std::string math_products_;
  double first_compile_ = 0.0;
  nlohmann::ordered_json host_ = nlohmann::ordered_json::object();
};

// The report's file, opened before the sweep so that a wrong path does not cost the sweep.
class Output {
 public:
  explicit Output(const std::string& path) : path_(path) {
    if (path.empty()) return;
    file_ = std::fopen(path.c_str(), "w");
    if (file_ == nullptr) {
      throw environment_error(fmt::format("--output: cannot write {}: {}", in_quotes(path), std::strerror(errno)));
    }
  }
  ~Output() {
    if (file_ != nullptr) std::fclose(file_);
  }
  Output(const Output&) = delete;
  Output& operator=(const Output&) = delete;

  void write(const std::string& text) {
    std::FILE* to = file_ != nullptr ? file_ : stdout;
    if (std::fwrite(text.data(), 1, text.size(), to) != text.size() || std::fflush(to) != 0) {
      throw environment_error(
          fmt::format("cannot write {}: {}", file_ != nullptr ? in_quotes(path_) : "the report", std::strerror(errno)));
    }
  }

 private:
  std::string path_;
  std::FILE* file_ = nullptr;
};

// Upstream's --dynamic compiles once for a range of shapes. The CPU's code does so as far as the facts about a mod
// (which integers fit 32 bits, which captured reads are in bounds) are the same for all of them.
void check_dynamic(const Report& report) {
  for (const CompileRow& row : report.compiles) {
    if (row.compiles <= 1) continue;
    throw user_error(
        fmt::format("--dynamic: {} took {} compiles for {} shapes; code for ranges of shapes is not "
                    "supported where the facts about a mod differ between them",
                    in_quotes(row.mod), row.compiles, row.prepared));
  }
}

// With the defaults of the device that it runs on.
BenchOptions resolved(BenchOptions options) {
  options.on_gpu = uses_gpu(options.device, parse_backend(options.backend));
  options.default_sweep = options.batches.empty() && options.seqlens.empty();
  const auto set = [&](std::vector<std::int64_t>& values, std::span<const std::int64_t> gpu,
                       std::span<const std::int64_t> cpu) {
    const std::span<const std::int64_t> defaults = options.on_gpu ? gpu : cpu;
    if (values.empty()) values.assign(defaults.begin(), defaults.end());
  };
  set(options.batches, kGpuBatches, kCpuBatches);
  set(options.seqlens, kGpuSeqlens, kCpuSeqlens);
  return options;
}

int bench_score_mod(const BenchOptions& given) {
  const BenchOptions options = resolved(given);
  if (options.baseline != "math" && options.baseline != "plain") {
    throw user_error(fmt::format("--baseline {}: allowed are math (eager with the mod) and plain (without it)",
                                 in_quotes(options.baseline)));
  }
  if (options.deterministic && !options.calculate_bwd) throw user_error("--deterministic goes with --calculate-bwd");
  const std::optional<ReportFormat> format = report_format_named(options.format);
  if (!format) {
    throw user_error(fmt::format("--format {}: allowed are github, csv and json", in_quotes(options.format)));
  }
  Bench bench(options);
  Output output(options.output);
  const Report report = bench.run();
  output.write(format_report(report, *format));
  if (options.dynamic) check_dynamic(report);
  return report.ok() ? 0 : 1;
}

}  // namespace

void add_bench_command(CLI::App& app, Action& action) {
  auto options = std::make_shared<BenchOptions>();
  options->heads.assign(std::begin(kHeads), std::end(kHeads));
  options->head_dims.assign(std::begin(kHeadDims), std::end(kHeadDims));
  options->mods.assign(std::begin(kMods), std::end(kMods));

  CLI::App* bench = app.add_subcommand("bench", "Measurements");
  CLI::App* command = bench->add_subcommand(
      "score-mod", "Speed of compiled score_mods against eager attention, each result checked against the oracle");
  const auto positive = CLI::Range(std::int64_t{1}, std::int64_t{1} << 40);
  command->add_option("-b", options->batches, "batch sizes (default: 2 8 16 on a GPU, 1 on a CPU)")->check(positive);
  command->add_option("--nh", options->heads, "-nh: query heads,key/value heads, or one number (default: 16,16)");
  command
      ->add_option("-s", options->seqlens, "sequence lengths (default: 512 1024 4096 on a GPU, 512 1024 2048 on a CPU)")
      ->check(positive);
  command->add_option("-d", options->head_dims, "head dimensions (default: 64 128)")->check(positive);
  command->add_option("--mods", options->mods,
                      "-mods: registered names or expressions (default: noop causal rel head_bias)");
  command->add_option("--dtype", options->dtype, "-dtype: bfloat16, float16 or float32 (default: bfloat16)");
  command
      ->add_option("--captures", options->captures,
                   "NAME:DTYPE:DIMS[=VALUE] of a captured tensor, as slopes:float32:Hq or ids:int32:B,Sq; repeatable")
      ->allow_extra_args(false);
  command->add_flag("--dynamic", options->dynamic,
                    "fail where one compile of a mod does not serve all shapes (CPU code is shared by itself)");
  command->add_flag("--max-autotune", options->max_autotune,
                    "on a GPU, time a few configurations of each kernel beforehand and keep the fastest");
  command->add_flag("--calculate-bwd", options->calculate_bwd, "also the backward: dq, dk, dv");
  command->add_flag("--deterministic", options->deterministic, "the backward that gives the same bits in every run");
  command->add_option("--device", options->device, "auto, cpu or cuda (default: auto)");
  command->add_option("--baseline", options->baseline,
                      "math: eager with the mod; plain: unfused attention without it (default: math)");
  command->add_option("--backend", options->backend,
                      "of the compiled side: auto, sm90, sm80, math or cpu (default: auto)");
  command->add_option("--reps", options->repetitions, "timed repetitions of each cell (default: 5)")
      ->check(CLI::Range(1, 1'000'000));
  command->add_option("--threads", options->threads, "CPU threads (default: one per processor)")
      ->check(CLI::Range(0, 1024));
  command->add_option("--rows", options->rows, "rows of each cell checked against the oracle (default: 16)")
      ->check(CLI::Range(std::size_t{1}, std::size_t{1} << 20));
  command->add_option("--seed", options->seed, "of the inputs (default: 1)")->check(CLI::NonNegativeNumber);
  command->add_option("--format", options->format, "github, csv or json (default: github)");
  command->add_option("--output", options->output, "file for the report (default: standard output)");
  command->callback([options, &action] { action = [options] { return bench_score_mod(*options); }; });
}

}  // namespace attnjit::tool
