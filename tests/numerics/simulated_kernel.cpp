// Flash attention in float32 with 32-column tiles, and its deliberate flaws.
#include "tests/numerics/simulated_kernel.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <utility>

#include "dsl/interpreter.h"

namespace attnjit::numerics {
namespace {

constexpr std::int64_t kTile = 32;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

}  // namespace

std::string_view flaw_name(Flaw flaw) {
  static constexpr std::array<std::string_view, 32> kNames = {
      "None",           "ScaleDropped",   "ScaleTwice",     "MaskOffByOne",    "QueryOffByOne",   "WrongHead",
      "WrongBatch",     "IndicesSwapped", "SwappedKvHead",  "LastTileSkipped", "PaddingScored",   "ErrorHalfPercent",
      "OneElement",     "NoRescale",      "NoSumRescale",   "RowsExchanged",   "HeadDimCut",      "ScoresRounded",
      "LseInLog2",      "LseWithoutMax",  "RowMaxOfScores", "NanSwallowed",    "DroppedNan",      "MaskedRowNan",
      "MaskedLseZero",  "MaskIgnored",    "RowNotWritten",  "LseNotWritten",   "ReferenceFrozen", "FrozenSaturated",
      "DroppedMaximum", "MaskedTileNan"};
  return kNames[static_cast<std::size_t>(flaw)];
}

Outcome simulate(const Problem& problem, Flaw flaw) {
  const Case& spec = problem.spec;
  dsl::Interpreter score_mod(problem.score_mod.expr, problem.score_mod.views());
  std::optional<dsl::Interpreter> mask_mod;
  if (problem.mask_mod && flaw != Flaw::kMaskIgnored) {
    mask_mod.emplace(problem.mask_mod->expr, problem.mask_mod->views());
  }
  const auto scale = static_cast<float>(problem.scale());
  const float largest = spec.dtype == dsl::DType::kF16 ? 65504.0f : std::numeric_limits<float>::max();
  const std::int64_t features = spec.head_dim_v;
  const std::int64_t used = spec.head_dim - (flaw == Flaw::kHeadDimCut ? 1 : 0);
  const std::int64_t tiles = (spec.seqlen_kv + kTile - 1) / kTile - (flaw == Flaw::kLastTileSkipped ? 1 : 0);

  Outcome out;
  std::vector<float> accumulated(static_cast<std::size_t>(features));
  for (std::int64_t b = 0; b < spec.batch; ++b) {
    for (std::int64_t h = 0; h < spec.num_heads; ++h) {
      const std::int64_t head = flaw == Flaw::kSwappedKvHead ? h % spec.num_heads_kv : problem.head_kv(h);
      for (std::int64_t i = 0; i < spec.seqlen_q; ++i) {
        float maximum = -kInfinity, sum = 0.0f, plain_maximum = -kInfinity;
        std::fill(accumulated.begin(), accumulated.end(), 0.0f);
        for (std::int64_t tile = 0; tile < tiles; ++tile) {
          std::array<float, kTile> m;
          float next = maximum;
          bool has_nan = false;
          for (std::int64_t c = 0; c < kTile; ++c) {
            const std::int64_t j = tile * kTile + c;
            float& value = m[static_cast<std::size_t>(c)];
            if (j >= spec.seqlen_kv) {
              value = flaw == Flaw::kPaddingScored ? 0.0f : -kInfinity;
              next = std::max(next, value);
              continue;
            }
            float dot = 0.0f;
            for (std::int64_t d = 0; d < used; ++d) {
              dot = std::fma(static_cast<float>(problem.q.at({b, h, i, d})),
                             static_cast<float>(problem.k.at({b, head, j, d})), dot);
            }
            float score = flaw == Flaw::kScaleDropped ? dot : dot * scale;
            if (flaw == Flaw::kScaleTwice) score *= scale;
            if (flaw == Flaw::kScoresRounded) score = static_cast<float>(round_to(dsl::DType::kBF16, score));
            plain_maximum = std::max(plain_maximum, score);
            dsl::Point point{score, b, h, i, j};
            if (flaw == Flaw::kMaskOffByOne) ++point.kv_idx;
            if (flaw == Flaw::kQueryOffByOne) ++point.q_idx;
            if (flaw == Flaw::kWrongHead) point.h = (h + 1) % spec.num_heads;
            if (flaw == Flaw::kWrongBatch) point.b = (b + 1) % spec.batch;
            if (flaw == Flaw::kIndicesSwapped) std::swap(point.q_idx, point.kv_idx);
            const dsl::Element element = score_mod.score_mod(point);
            const bool keep = element.keep && (!mask_mod || mask_mod->mask_mod(point));
            value = keep ? static_cast<float>(element.value) : -kInfinity;
            if (!keep && flaw == Flaw::kDroppedNan && !std::isfinite(score)) value = score;
            if (std::isnan(value)) {
              if (flaw == Flaw::kNanSwallowed) {
                value = -kInfinity;
              } else {
                has_nan = true;
              }
            }
            next = std::max(next, value);
            if (flaw == Flaw::kDroppedMaximum) next = std::max(next, score);
          }
          const bool frozen = flaw == Flaw::kReferenceFrozen || flaw == Flaw::kFrozenSaturated;
          if (frozen && maximum != -kInfinity) next = maximum;
          if (has_nan) next = std::numeric_limits<float>::quiet_NaN();
          if (next == -kInfinity && flaw != Flaw::kMaskedTileNan) continue;
          const float rescale = std::exp(maximum - next);
          if (flaw != Flaw::kNoSumRescale) sum *= rescale;
          if (flaw != Flaw::kNoRescale) {
            for (float& value : accumulated) value *= rescale;
          }
          maximum = next;
          for (std::int64_t c = 0; c < kTile; ++c) {
            const std::int64_t j = tile * kTile + c;
            const float p = std::exp(m[static_cast<std::size_t>(c)] - maximum);
            sum += p;
            if (j >= spec.seqlen_kv) continue;
            auto narrow = static_cast<float>(round_to(spec.dtype, p));
            if (flaw == Flaw::kFrozenSaturated) narrow = std::min(narrow, largest);
            for (std::int64_t d = 0; d < features; ++d) {
              accumulated[static_cast<std::size_t>(d)] += narrow * static_cast<float>(problem.v.at({b, head, j, d}));
            }
          }
        }
        const bool empty = maximum == -kInfinity;
        const float inverse = empty && flaw != Flaw::kMaskedRowNan ? 0.0f : 1.0f / sum;
        for (const float value : accumulated) {
          const double factor = flaw == Flaw::kErrorHalfPercent ? 1.005 : 1.0;
          out.o.push_back(round_to(spec.dtype, factor * static_cast<double>(value * inverse)));
        }
        double lse = empty ? -static_cast<double>(kInfinity) : static_cast<double>(maximum + std::log(sum));
        if (flaw == Flaw::kLseInLog2) lse *= 1.4426950408889634;
        if (flaw == Flaw::kLseWithoutMax) lse -= static_cast<double>(maximum);
        if (flaw == Flaw::kMaskedLseZero && empty) lse = 0.0;
        out.lse.push_back(lse);
        out.row_max.push_back(static_cast<double>(flaw == Flaw::kRowMaxOfScores ? plain_maximum : maximum));
      }
    }
  }
  const auto width = static_cast<std::size_t>(features);
  if (flaw == Flaw::kOneElement && !out.o.empty()) out.o[out.o.size() / 2] *= 1.05;
  if (flaw == Flaw::kRowsExchanged && out.o.size() >= 2 * width) {
    std::swap_ranges(out.o.begin(), out.o.begin() + static_cast<std::ptrdiff_t>(width),
                     out.o.begin() + static_cast<std::ptrdiff_t>(width));
  }
  if (flaw == Flaw::kRowNotWritten || flaw == Flaw::kLseNotWritten) {
    std::vector<bool> sampled(out.lse.size(), false);
    for (const RowIndex& at : sample_rows(spec)) {
      sampled[static_cast<std::size_t>((at.b * spec.num_heads + at.h) * spec.seqlen_q + at.q_idx)] = true;
    }
    const auto row = static_cast<std::size_t>(std::find(sampled.begin(), sampled.end(), false) - sampled.begin());
    constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
    if (row < sampled.size()) {
      if (flaw == Flaw::kLseNotWritten) out.lse[row] = kNan;
      if (flaw == Flaw::kRowNotWritten) {
        std::fill_n(out.o.begin() + static_cast<std::ptrdiff_t>(row * width), width, kNan);
      }
    }
  }
  return out;
}

}  // namespace attnjit::numerics
