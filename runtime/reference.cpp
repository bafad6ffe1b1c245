// The oracle: scores, mod, softmax and both sums in double precision, from the rounded inputs.
#include "runtime/reference.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <vector>

#include "dsl/float32_backward.h"
#include "dsl/float32_row.h"
#include "dsl/interpreter.h"

namespace attnjit::runtime {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// `count` neighbours along the innermost dimension, widened.
void widen(const TensorView& tensor, std::int64_t b, std::int64_t h, std::int64_t s, std::vector<double>* out) {
  const std::int64_t offset = b * tensor.stride[0] + h * tensor.stride[1] + s * tensor.stride[2];
  for (std::size_t d = 0; d < out->size(); ++d) {
    (*out)[d] = dsl::read_as_double(tensor.data, tensor.dtype, offset + static_cast<std::int64_t>(d));
  }
}

// All of `count` heads from `h`, packed.
std::vector<double> widened(const TensorView& tensor, std::int64_t b, std::int64_t h, std::int64_t count) {
  std::vector<double> result, row(static_cast<std::size_t>(tensor.shape[3]));
  result.reserve(static_cast<std::size_t>(count * tensor.shape[2] * tensor.shape[3]));
  for (std::int64_t head = h; head < h + count; ++head) {
    for (std::int64_t s = 0; s < tensor.shape[2]; ++s) {
      widen(tensor, b, head, s, &row);
      result.insert(result.end(), row.begin(), row.end());
    }
  }
  return result;
}

// Likewise a number per row; empty where there is none.
std::vector<double> widened(const RowView& rows, std::int64_t b, std::int64_t h, std::int64_t count,
                            std::int64_t seqlen_q) {
  std::vector<double> result;
  if (!rows.data) return result;
  result.reserve(static_cast<std::size_t>(count * seqlen_q));
  for (std::int64_t head = h; head < h + count; ++head) {
    for (std::int64_t i = 0; i < seqlen_q; ++i) {
      result.push_back(static_cast<double>(rows.data[b * rows.stride[0] + head * rows.stride[1] + i * rows.stride[2]]));
    }
  }
  return result;
}

// +inf wins over NaN, and NaN over every other number; either way the row is NaN.
double larger(double a, double b) {
  if (a == kInfinity || b == kInfinity) return kInfinity;
  if (std::isnan(a) || std::isnan(b)) return std::numeric_limits<double>::quiet_NaN();
  return std::max(a, b);
}

// One thread's rows.
class Worker {
 public:
  Worker(const ForwardCall& call, const Mods& mods)
      : call_(call),
        score_mod_(mods.score_mod, {call.captures, call.num_captures}),
        modified_scores_(mods.score_mod, {call.captures, call.num_captures}, mods.mask_mod ? &*mods.mask_mod : nullptr,
                         {call.captures, call.num_captures}),
        approximation_(dsl::function_approximation(mods.score_mod, call.q.dtype)),
        q_(static_cast<std::size_t>(call.q.shape[3])),
        k_(static_cast<std::size_t>(call.k.shape[3])),
        v_(static_cast<std::size_t>(call.v.shape[3])),
        v_sum_(v_.size()),
        o_(v_.size()),
        element_(static_cast<std::size_t>(call.k.shape[2])),
        scores_(element_.size()) {
    if (mods.mask_mod) mask_mod_.emplace(*mods.mask_mod, std::span(call.captures, call.num_captures));
  }

  void row(const attnjit_row& row, double* o, double* lse, double* row_max) {
    const std::int64_t h_kv = head_kv(row);
    widen(call_.q, row.b, row.h, row.q_idx, &q_);
    double maximum = -kInfinity;
    for (std::size_t j = 0; j < element_.size(); ++j) {
      const dsl::Point point = point_at(row, h_kv, j);
      dsl::Element element = score_mod_.score_mod(point);
      if (mask_mod_ && element.keep && !mask_mod_->mask_mod(point)) element = {.value = -kInfinity, .keep = false};
      element_[j] = element;
      if (element.keep) maximum = larger(maximum, element.value);
    }

    std::fill(v_sum_.begin(), v_sum_.end(), 0.0);
    double sum = 0.0;
    // A row of which nothing is left has no maximum to take away: O = 0, LSE = -inf.
    if (maximum != -kInfinity) {
      for (std::size_t j = 0; j < element_.size(); ++j) {
        // Skipped, not multiplied by 0: what stands in V there may be infinite.
        if (!element_[j].keep) continue;
        const double p = std::exp(element_[j].value - maximum);
        sum += p;
        if (!o) continue;
        widen(call_.v, row.b, h_kv, static_cast<std::int64_t>(j), &v_);
        for (std::size_t d = 0; d < v_.size(); ++d) v_sum_[d] += p * v_[d];
      }
      if (o) {
        for (std::size_t d = 0; d < v_.size(); ++d) o[d] = v_sum_[d] / sum;
      }
    } else if (o) {
      std::fill_n(o, v_.size(), 0.0);
    }
    if (lse) *lse = maximum == -kInfinity ? -kInfinity : maximum + std::log(sum);
    if (row_max) *row_max = maximum;
  }

  void bounds(const attnjit_row& at, double* o_bound, double* lse_bound, unsigned char* decided) {
    const std::int64_t h_kv = head_kv(at);
    row(at, o_.data(), nullptr, nullptr);
    widen(call_.q, at.b, at.h, at.q_idx, &q_);
    const auto scale = static_cast<double>(call_.scale);
    for (std::size_t j = 0; j < scores_.size(); ++j) {
      const dsl::Point point = point_at(at, h_kv, j);
      double magnitude = 0.0;
      for (std::size_t d = 0; d < q_.size(); ++d) magnitude += std::fabs(q_[d] * k_[d]);
      scores_[j] = modified_scores_.at(point, std::fabs(scale) * magnitude);
    }
    const dsl::Float32Row reach(scores_, approximation_);
    if (decided) *decided = reach.undecided ? 0 : 1;
    // A row that is NaN is that exactly; of one that float32 does not decide nothing can be said.
    const bool has_bounds = !reach.undecided && !reach.poisoned;
    const double otherwise = reach.undecided ? kInfinity : 0.0;
    if (lse_bound) *lse_bound = has_bounds ? reach.lse_bound() : otherwise;
    if (!o_bound) return;
    sums_.assign(v_.size(), {});
    if (has_bounds && !reach.empty()) {
      for (std::size_t j = 0; j < scores_.size(); ++j) {
        widen(call_.v, at.b, h_kv, static_cast<std::int64_t>(j), &v_);
        for (std::size_t d = 0; d < v_.size(); ++d) sums_[d].add(reach.p[j], reach.change[j], v_[d], o_[d]);
      }
    }
    for (std::size_t d = 0; d < v_.size(); ++d) {
      o_bound[d] = has_bounds ? reach.o_bound(call_.q.dtype, sums_[d]) : otherwise;
    }
  }

  // `number`: the row's place among the rows.
  void clamped(const attnjit_row& at, std::size_t number) {
    const std::int64_t h_kv = head_kv(at);
    widen(call_.q, at.b, at.h, at.q_idx, &q_);
    for (std::size_t j = 0; j < element_.size(); ++j) {
      const dsl::Point point = point_at(at, h_kv, j);
      if (mask_mod_) {
        const bool keep = mask_mod_->mask_mod(point);
        count_clamped(mask_mod_->clamped_indices(), point, number);
        if (!keep) continue;
      }
      score_mod_.score_mod(point);
      count_clamped(score_mod_.clamped_indices(), point, number);
    }
  }

  // What clamped() counted, and in which row it met the first.
  struct Count {
    ClampedReads reads;
    std::size_t row = 0;
  };
  using Counts = std::array<std::array<Count, dsl::kMaxRank>, dsl::kMaxCaptures>;
  const Counts& clamped_counts() const { return clamped_counts_; }

 private:
  std::int64_t head_kv(const attnjit_row& row) const {
    const std::int64_t heads_kv = call_.k.shape[1];
    return heads_kv > 0 ? row.h / (call_.q.shape[1] / heads_kv) : 0;
  }

  // The element of `row`, whose query is in q_, at a key, which it leaves in k_.
  dsl::Point point_at(const attnjit_row& row, std::int64_t h_kv, std::size_t key) {
    const auto kv_idx = static_cast<std::int64_t>(key);
    widen(call_.k, row.b, h_kv, kv_idx, &k_);
    double product = 0.0;
    for (std::size_t d = 0; d < q_.size(); ++d) product += q_[d] * k_[d];
    return {.score = product * static_cast<double>(call_.scale),
            .b = row.b,
            .h = row.h,
            .q_idx = row.q_idx,
            .kv_idx = kv_idx};
  }

  void count_clamped(std::span<const dsl::ClampedIndex> indices, const dsl::Point& point, std::size_t row) {
    for (const dsl::ClampedIndex& each : indices) {
      const auto capture = static_cast<std::size_t>(each.capture);
      Count& count = clamped_counts_[capture][static_cast<std::size_t>(each.dimension)];
      // A worker's rows need not come in their order.
      if (count.reads.count == 0 || row < count.row) {
        count.row = row;
        count.reads = {.capture = capture,
                       .dimension = each.dimension,
                       .count = count.reads.count,
                       .first = point,
                       .index = each.index};
      }
      ++count.reads.count;
    }
  }

  const ForwardCall& call_;
  dsl::Interpreter score_mod_;
  std::optional<dsl::Interpreter> mask_mod_;
  dsl::ModifiedScores modified_scores_;
  double approximation_;
  std::vector<double> q_, k_, v_, v_sum_, o_;
  std::vector<dsl::Element> element_;
  std::vector<dsl::ModifiedScore> scores_;
  std::vector<dsl::FeatureSums> sums_;
  Counts clamped_counts_;
};

// Hands each row's number to `work` with a worker of the thread that it runs on. Returns the workers.
template <typename Work>
std::vector<std::unique_ptr<Worker>> for_each_row(const ForwardCall& call, const Mods& mods, std::size_t num_rows,
                                                  ThreadPool& pool, Work&& work) {
  // Made before the threads start: a task may not throw.
  std::vector<std::unique_ptr<Worker>> workers;
  const std::size_t count = std::min(static_cast<std::size_t>(pool.size()), num_rows);
  workers.reserve(count);
  for (std::size_t i = 0; i < count; ++i) workers.push_back(std::make_unique<Worker>(call, mods));
  pool.parallel_for(static_cast<std::int64_t>(num_rows), [&](std::int64_t task, int thread) {
    work(*workers[static_cast<std::size_t>(thread)], static_cast<std::size_t>(task));
  });
  return workers;
}

// Row `i` of an array of rows, or null where there is no array.
template <typename T>
T* at(T* array, std::size_t i, std::size_t length) {
  return array ? array + i * length : nullptr;
}

// Throws where there is not enough memory.
void backward_of_head(const ForwardCall& call, const Gradients& gradients, const Mods& mods, std::int64_t b,
                      std::int64_t h_kv, ThreadPool& pool, const ReferenceGradients& out) {
  const std::int64_t num_heads = call.k.shape[1] > 0 ? call.q.shape[1] / call.k.shape[1] : 0;
  dsl::BackwardHead head{.b = b,
                         .h = h_kv * num_heads,
                         .num_heads = num_heads,
                         .seqlen_q = call.q.shape[2],
                         .seqlen_kv = call.k.shape[2],
                         .head_dim = call.q.shape[3],
                         .head_dim_v = call.v.shape[3]};
  const std::vector<double> q = widened(call.q, b, head.h, num_heads);
  const std::vector<double> k = widened(call.k, b, h_kv, 1);
  const std::vector<double> v = widened(call.v, b, h_kv, 1);
  const std::vector<double> grad_out = widened(gradients.grad_out, b, head.h, num_heads);
  const std::vector<double> grad_lse = widened(gradients.grad_lse, b, head.h, num_heads, head.seqlen_q);
  const std::vector<double> lse = widened(call.lse, b, head.h, num_heads, head.seqlen_q);
  const std::vector<double> o = lse.empty() ? std::vector<double>() : widened(call.o, b, head.h, num_heads);
  head.q = q;
  head.k = k;
  head.v = v;
  head.grad_out = grad_out;
  head.grad_lse = grad_lse;
  head.lse = lse;
  head.o = o;

  dsl::BackwardOptions options{
      .dtype = call.q.dtype,
      .scale = static_cast<double>(call.scale),
      .approximation = dsl::function_approximation(mods.score_mod, call.q.dtype),
      .own_forward = lse.empty(),
      .threads = pool.size(),
      .parallel_for = [&pool](std::int64_t tasks, const auto& function) { pool.parallel_for(tasks, function); }};
  for (std::size_t number = 0; number < call.num_captures; ++number) {
    const ReferenceGradient& wanted = out.captures[number];
    if (wanted.value || wanted.bound) options.captures |= 1u << number;
  }
  const std::span captures(call.captures, call.num_captures);
  dsl::Float32Backward backward(options, mods.score_mod, captures, mods.mask_mod ? &*mods.mask_mod : nullptr, captures);
  const auto give = [](const dsl::JudgedGradient& gradient, const ReferenceGradient& to) {
    if (to.value) std::ranges::copy(gradient.value, to.value);
    if (to.bound) std::ranges::copy(gradient.bound, to.bound);
  };
  const dsl::HeadGradients found = backward.run(head);
  give(found.dq, out.dq);
  give(found.dk, out.dk);
  give(found.dv, out.dv);
  for (int number = 0; number < static_cast<int>(call.num_captures); ++number) {
    if (options.captures >> number & 1) give(backward.captured(number), out.captures[number]);
  }
}

}  // namespace

void reference_rows(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows, ThreadPool& pool,
                    double* o, double* lse, double* row_max) {
  const auto dim = static_cast<std::size_t>(call.v.shape[3]);
  for_each_row(call, mods, rows.size(), pool, [&](Worker& worker, std::size_t i) {
    worker.row(rows[i], at(o, i, dim), at(lse, i, 1), at(row_max, i, 1));
  });
}

void reference_bounds(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows, ThreadPool& pool,
                      double* o_bound, double* lse_bound, unsigned char* decided) {
  const auto dim = static_cast<std::size_t>(call.v.shape[3]);
  for_each_row(call, mods, rows.size(), pool, [&](Worker& worker, std::size_t i) {
    worker.bounds(rows[i], at(o_bound, i, dim), at(lse_bound, i, 1), at(decided, i, 1));
  });
}

Check reference_backward(const ForwardCall& call, const Gradients& gradients, const Mods& mods, std::int64_t b,
                         std::int64_t h_kv, ThreadPool& pool, const ReferenceGradients& out) {
  const auto out_of_memory = [&]() -> Failure {
    const std::int64_t heads = call.k.shape[1] > 0 ? call.q.shape[1] / call.k.shape[1] : 0;
    return {ATTNJIT_OUT_OF_MEMORY,
            fmt::format("out of memory for the double-precision gradients of {} query heads of {} rows and one "
                        "key/value head of {}, of {} and {} features",
                        heads, call.q.shape[2], call.k.shape[2], call.q.shape[3], call.v.shape[3])};
  };
  try {
    backward_of_head(call, gradients, mods, b, h_kv, pool, out);
  } catch (const std::bad_alloc&) {
    return out_of_memory();
  } catch (const std::length_error&) {
    return out_of_memory();
  }
  return {};
}

std::vector<ClampedReads> clamped_reads(const ForwardCall& call, const Mods& mods, std::span<const attnjit_row> rows,
                                        ThreadPool& pool) {
  const auto workers =
      for_each_row(call, mods, rows.size(), pool, [&](Worker& worker, std::size_t i) { worker.clamped(rows[i], i); });
  std::vector<ClampedReads> all;
  for (std::size_t capture = 0; capture < call.num_captures; ++capture) {
    for (std::size_t dimension = 0; dimension < dsl::kMaxRank; ++dimension) {
      const Worker::Count* first = nullptr;
      std::int64_t count = 0;
      for (const auto& worker : workers) {
        const Worker::Count& part = worker->clamped_counts()[capture][dimension];
        if (part.reads.count == 0) continue;
        if (!first || part.row < first->row) first = &part;
        count += part.reads.count;
      }
      if (!first) continue;
      all.push_back(first->reads);
      all.back().count = count;
    }
  }
  return all;
}

}  // namespace attnjit::runtime
