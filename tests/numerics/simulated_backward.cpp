// The backward in float32, element by element, and its deliberate flaws.
#include "tests/numerics/simulated_backward.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>

#include "dsl/derivative.h"
#include "dsl/interpreter.h"

namespace attnjit::numerics {
namespace {

using Flaw = BackwardFlaw;

constexpr std::int64_t kTile = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

class Simulation {
 public:
  Simulation(const Problem& problem, const GoldGradients& gold, Flaw flaw)
      : problem_(problem),
        gold_(gold),
        flaw_(flaw),
        score_mod_(problem.score_mod.expr, problem.score_mod.views()),
        derivative_(problem.score_mod.expr, problem.score_mod.views()) {
    const Case& spec = problem.spec;
    if (problem.mask_mod && flaw != Flaw::kMaskIgnored) {
      mask_mod_.emplace(problem.mask_mod->expr, problem.mask_mod->views());
    }
    q_ = packed(problem.q);
    k_ = packed(problem.k);
    v_ = packed(problem.v);
    o_ = packed(gold.o);
    grad_out_ = packed(problem.grad_out);
    dq_.resize(q_.size());
    dk_.resize(k_.size());
    dv_.resize(v_.size());
    for (const GradientSpec& wanted : spec.backward.captures) {
      const Tensor& tensor = problem.capture(wanted.name).tensor;
      captures_.emplace_back(static_cast<std::size_t>(tensor.size()));
    }
  }

  Gradients run() {
    const Case& spec = problem_.spec;
    for (std::int64_t b = 0; b < spec.batch; ++b) {
      for (std::int64_t h = 0; h < spec.num_heads; ++h) {
        for (std::int64_t i = 0; i < spec.seqlen_q; ++i) row(b, h, i);
        if (flaw_ != Flaw::kPaddingCounted) continue;
        for (std::int64_t i = spec.seqlen_q; i % kTile != 0; ++i) row(b, h, spec.seqlen_q - 1);
      }
    }
    return finish();
  }

 private:
  static float narrow(double x) { return static_cast<float>(x); }

  static std::vector<float> packed(const Tensor& tensor) {
    std::vector<float> values;
    values.reserve(static_cast<std::size_t>(tensor.size()));
    for_each_index(tensor.shape(), [&](auto index) { values.push_back(narrow(tensor.at(index))); });
    return values;
  }
  // The row (b, h, i) of a packed tensor of `tensor`'s shape.
  template <typename Values>
  static auto* row_of(Values& values, const Tensor& tensor, std::int64_t b, std::int64_t h, std::int64_t i) {
    const auto& shape = tensor.shape();
    return values.data() + ((b * shape[1] + h) * shape[2] + i) * shape[3];
  }

  // What flows into the score, and the place in dk and dv, of one element.
  void row(std::int64_t b, std::int64_t h, std::int64_t i) {
    const Case& spec = problem_.spec;
    const bool counts = !(flaw_ == Flaw::kLastQTileSkipped && i / kTile == (spec.seqlen_q - 1) / kTile);
    const std::int64_t head = flaw_ == Flaw::kSwappedKvHead ? h % spec.num_heads_kv : problem_.head_kv(h);
    const std::int64_t group = spec.num_heads / spec.num_heads_kv;
    const bool in_sum = counts && !(flaw_ == Flaw::kOneHeadOfGroup && h % group != group - 1);
    const std::int64_t last_tile = (spec.seqlen_kv - 1) / kTile;
    const auto scale = narrow(problem_.scale());
    const std::int64_t above = std::max<std::int64_t>(i - 1, 0);
    float lse = narrow(gold_.lse.at({b, h, flaw_ == Flaw::kLseOfOtherRow ? above : i}));
    if (flaw_ == Flaw::kLseInLog2) lse *= 1.44269504f;
    const bool masked = lse == -kInfinity;
    const float grad_lse = spec.backward.grad_lse ? narrow(problem_.grad_lse.at({b, h, i})) : 0.0f;
    float delta = 0.0f;
    const std::int64_t delta_row = flaw_ == Flaw::kDeltaOfOtherRow ? above : i;
    const float* const delta_grad = row_of(grad_out_, problem_.grad_out, b, h, delta_row);
    const float* const delta_o = row_of(o_, problem_.grad_out, b, h, delta_row);
    for (std::int64_t d = 0; d < spec.head_dim_v; ++d) delta += delta_grad[d] * delta_o[d];
    if (flaw_ == Flaw::kGradLseAdded) delta += grad_lse;
    if (flaw_ != Flaw::kGradLseAdded && flaw_ != Flaw::kGradLseIgnored) delta -= grad_lse;
    if (flaw_ == Flaw::kNoDelta) delta = 0.0f;

    const std::int64_t query_head = flaw_ == Flaw::kQueriesOfOtherHead ? h / group * group : h;
    const float* const q = row_of(q_, problem_.q, b, h, i);
    const float* const other_q = row_of(q_, problem_.q, b, query_head, i);
    const float* const grad_out = row_of(grad_out_, problem_.grad_out, b, h, i);
    float* const dq = row_of(dq_, problem_.q, b, h, i);
    bool shifted = false;
    for (std::int64_t j = 0; j < spec.seqlen_kv; ++j) {
      if (flaw_ == Flaw::kLastKvTileSkipped && j / kTile == last_tile) break;
      const float* const k = row_of(k_, problem_.k, b, head, j);
      const float* const v = row_of(v_, problem_.v, b, head, j);
      float score = 0.0f, dp = 0.0f;
      for (std::int64_t d = 0; d < spec.head_dim; ++d) score = std::fma(q[d], k[d], score);
      const std::int64_t used = spec.head_dim_v - (flaw_ == Flaw::kHeadDimCut ? 1 : 0);
      for (std::int64_t d = 0; d < used; ++d) dp = std::fma(grad_out[d], v[d], dp);
      if (flaw_ != Flaw::kScoresWithoutScale) score *= scale;
      if (flaw_ == Flaw::kScoresRounded) score = narrow(round_to(dsl::DType::kBF16, score));
      dsl::Point point{score, b, h, i, j};
      if (flaw_ == Flaw::kMaskOffByOne) ++point.kv_idx;
      if (flaw_ == Flaw::kWrongHead) point.h = (h + 1) % spec.num_heads;
      const dsl::Element element = score_mod_.score_mod(point);
      const bool clamped = !score_mod_.clamped_indices().empty();
      const bool keep = element.keep && (!mask_mod_ || mask_mod_->mask_mod(point));
      float p = keep ? std::exp(narrow(element.value) - lse) : 0.0f;
      if (masked) p = flaw_ == Flaw::kMaskedRowsCount ? 1.0f : 0.0f;
      float dm = p * (dp - delta);
      if (p == 0.0f) dm = flaw_ == Flaw::kDroppedNan && !std::isfinite(score) ? score : 0.0f;

      if (flaw_ == Flaw::kDerivativeOfOther) point.score = -point.score;
      if (flaw_ == Flaw::kDerivativeOfModified) point.score = element.value;
      const dsl::ElementGradient gradient = derivative_.at(point, dm);
      float ds = narrow(gradient.dscore);
      if (flaw_ == Flaw::kNoDerivative) ds = dm;
      if (flaw_ == Flaw::kDroppedNan && !keep && std::isnan(dm)) ds = dm;
      const float captured = flaw_ == Flaw::kCaptureOfDs && dm != 0.0f ? ds / dm : 1.0f;
      if (counts && !(flaw_ == Flaw::kClampedLeftOut && clamped)) {
        capture(gradient.contributions, captured, /*shifts=*/flaw_ == Flaw::kRowShiftSummed);
      }
      if (flaw_ == Flaw::kDerivativeTwice) ds = narrow(derivative_.at(point, ds).dscore);

      const auto p_narrow = narrow(round_to(spec.dtype, flaw_ == Flaw::kUnnormalisedDv ? p * std::exp(lse) : p));
      const auto ds_narrow = narrow(round_to(spec.dtype, ds));
      if (p_narrow == 0.0f && ds_narrow == 0.0f) continue;
      for (std::int64_t d = 0; d < spec.head_dim; ++d) dq[d] += ds_narrow * k[d];
      float* const dk = row_of(dk_, problem_.k, b, head, j);
      float* const dv = row_of(dv_, problem_.v, b, head, j);
      for (std::int64_t d = 0; in_sum && d < spec.head_dim; ++d) dk[d] += ds_narrow * other_q[d];
      for (std::int64_t d = 0; in_sum && d < spec.head_dim_v; ++d) dv[d] += p_narrow * grad_out[d];
      if (keep && !shifted && flaw_ != Flaw::kRowShiftSummed) {
        shifted = true;
        if (grad_lse != 0.0f) capture(derivative_.at(point, grad_lse).contributions, 1.0f, /*shifts=*/true);
      }
    }
  }

  // Adds contributions to captured tensors; `shifts`: to those that shift rows, too, or only to those.
  void capture(std::span<const dsl::Contribution> contributions, float factor, bool shifts) {
    const auto& wanted = problem_.spec.backward.captures;
    for (std::size_t number = 0; number < wanted.size(); ++number) {
      const Tensor& tensor = problem_.capture(wanted[number].name).tensor;
      const bool is_shift = problem_.spec.backward.shifts_rows(wanted[number].name);
      if (flaw_ != Flaw::kRowShiftSummed && is_shift != shifts) continue;
      const dsl::Contribution* only = nullptr;
      for (const dsl::Contribution& each : contributions) {
        if (problem_.score_mod.name_of(each.capture) == wanted[number].name) only = &each;
      }
      for (const dsl::Contribution& each : contributions) {
        if (problem_.score_mod.name_of(each.capture) != wanted[number].name) continue;
        if (flaw_ == Flaw::kOneReadOfTwo && &each != only) continue;
        const std::size_t place = packed_offset(tensor, std::span(each.index, tensor.shape().size()));
        float& sum = captures_[number][flaw_ == Flaw::kCaptureShifted ? (place + 1) % captures_[number].size() : place];
        sum += narrow(each.value) * factor;
        if (flaw_ == Flaw::kCaptureInType) sum = narrow(round_to(tensor.dtype(), sum));
      }
    }
  }

  // Rounded to the type, with the flaws of a result that is right elsewhere.
  std::vector<double> rounded(const std::vector<float>& sums, float scale, dsl::DType dtype) const {
    std::vector<double> values;
    values.reserve(sums.size());
    const double factor = flaw_ == Flaw::kErrorHalfPercent ? 1.005 : flaw_ == Flaw::kNothingWritten ? 0.0 : 1.0;
    for (const float sum : sums) values.push_back(round_to(dtype, factor * static_cast<double>(sum * scale)));
    if (flaw_ == Flaw::kOneElement && !values.empty()) {
      // One that stands out: an element near to zero may be anything by 5% of it.
      double& largest =
          *std::ranges::max_element(values, {}, [](double x) { return std::isfinite(x) ? std::fabs(x) : 0.0; });
      largest *= 1.05;
    }
    return values;
  }

  Gradients finish() {
    const Case& spec = problem_.spec;
    const auto scale = narrow(problem_.scale());
    Gradients result;
    const auto spoil = [&](std::vector<double>* values, std::int64_t width, Flaw not_written) {
      if (values->empty()) return;
      if (flaw_ == not_written) std::fill_n(values->end() - width, width, kNan);
      const auto size = static_cast<std::int64_t>(values->size());
      if (flaw_ == Flaw::kRowsExchanged && size >= 2 * width) {
        std::swap_ranges(values->begin(), values->begin() + width, values->begin() + width);
      }
    };
    if (spec.backward.dq) result.dq = rounded(dq_, flaw_ == Flaw::kNoScaleInDq ? 1.0f : scale, spec.dtype);
    if (spec.backward.dk) result.dk = rounded(dk_, flaw_ == Flaw::kNoScaleInDk ? 1.0f : scale, spec.dtype);
    if (spec.backward.dv) result.dv = rounded(dv_, 1.0f, spec.dtype);
    spoil(&result.dq, spec.head_dim, Flaw::kDqRowNotWritten);
    spoil(&result.dk, spec.head_dim, Flaw::kDkRowNotWritten);
    spoil(&result.dv, spec.head_dim_v, Flaw::kDvRowNotWritten);
    for (std::size_t number = 0; number < captures_.size(); ++number) {
      const Tensor& tensor = problem_.capture(spec.backward.captures[number].name).tensor;
      result.captures.push_back(rounded(captures_[number], 1.0f, tensor.dtype()));
      if (flaw_ == Flaw::kCaptureNotWritten) result.captures.back().back() = kNan;
    }
    return result;
  }

  const Problem& problem_;
  const GoldGradients& gold_;
  const Flaw flaw_;
  dsl::Interpreter score_mod_;
  dsl::Derivative derivative_;
  std::optional<dsl::Interpreter> mask_mod_;
  std::vector<float> q_, k_, v_, o_, grad_out_, dq_, dk_, dv_;
  std::vector<std::vector<float>> captures_;
};

}  // namespace

std::string_view flaw_name(BackwardFlaw flaw) {
  static constexpr auto kNames = std::to_array<std::string_view>({"None",
                                                                  "NoScaleInDq",
                                                                  "NoScaleInDk",
                                                                  "ScoresWithoutScale",
                                                                  "NoDelta",
                                                                  "DeltaOfOtherRow",
                                                                  "GradLseIgnored",
                                                                  "GradLseAdded",
                                                                  "LseOfOtherRow",
                                                                  "LseInLog2",
                                                                  "UnnormalisedDv",
                                                                  "MaskOffByOne",
                                                                  "WrongHead",
                                                                  "MaskIgnored",
                                                                  "NoDerivative",
                                                                  "DerivativeTwice",
                                                                  "DerivativeOfOther",
                                                                  "DerivativeOfModified",
                                                                  "SwappedKvHead",
                                                                  "OneHeadOfGroup",
                                                                  "QueriesOfOtherHead",
                                                                  "LastKvTileSkipped",
                                                                  "LastQTileSkipped",
                                                                  "PaddingCounted",
                                                                  "HeadDimCut",
                                                                  "ScoresRounded",
                                                                  "CaptureShifted",
                                                                  "OneReadOfTwo",
                                                                  "ClampedLeftOut",
                                                                  "CaptureInType",
                                                                  "CaptureOfDs",
                                                                  "RowShiftSummed",
                                                                  "DroppedNan",
                                                                  "MaskedRowsCount",
                                                                  "ErrorHalfPercent",
                                                                  "OneElement",
                                                                  "DqRowNotWritten",
                                                                  "DkRowNotWritten",
                                                                  "DvRowNotWritten",
                                                                  "CaptureNotWritten",
                                                                  "NothingWritten",
                                                                  "RowsExchanged"});
  return kNames.at(static_cast<std::size_t>(flaw));
}

Gradients simulate_backward(const Problem& problem, const GoldGradients& gold, BackwardFlaw flaw) {
  return Simulation(problem, gold, flaw).run();
}

}  // namespace attnjit::numerics
