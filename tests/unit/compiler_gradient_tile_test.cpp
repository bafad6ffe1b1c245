// Compiled gradient tiles against the interpreter and its derivative, element by element.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "dsl/derivative.h"
#include "kernels_templates/cpu/products.h"
#include "tests/unit/compiler_testing.h"
#include "tests/unit/cpu_testing.h"

namespace attnjit::compiler::testing {
namespace {

using cpu::kPanelLanes;
using cpu::kTileRows;
using dsl::DType;
using dsl::Point;
using test::PanelBuffer;

constexpr double kInf = std::numeric_limits<double>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<CpuIsa> isas() {
  std::vector<CpuIsa> result;
  for (const int isa : test::host_isas()) result.push_back(static_cast<CpuIsa>(isa));
  return result;
}

std::vector<float> floats(std::int64_t count) {
  std::mt19937 random(5);
  std::uniform_real_distribution<float> uniform(0.5f, 1.5f);
  std::vector<float> out(static_cast<std::size_t>(count));
  for (float& x : out) x = uniform(random);
  return out;
}
Tensor floating(std::string name, std::vector<std::int64_t> extent) {
  std::int64_t count = 1;
  for (const std::int64_t e : extent) count *= e;
  return Tensor::of(std::move(name), DType::kF32, std::move(extent), floats(count));
}
Tensor offsets(std::int64_t count, std::int64_t below) {
  std::vector<std::int32_t> values;
  for (std::int64_t i = 0; i < count; ++i) values.push_back(static_cast<std::int32_t>(i * 7 % below));
  return Tensor::of("off", DType::kInt32, {count}, values);
}

// What went to each element of each captured tensor, and the size of what may be wrong with it.
struct Sum {
  double value = 0, size = 0;
};
using Sums = std::map<std::pair<int, std::int64_t>, Sum>;

std::int64_t packed(const dsl::Contribution& contribution, const dsl::CaptureView& view) {
  std::int64_t offset = 0;
  for (int d = 0; d < view.rank; ++d) offset = offset * view.extent[d] + contribution.index[d];
  return offset;
}

struct Tile {
  long long b = 1, h = 2, q_idx = 20, kv_idx = 10, rows = 70;
};

// One tile of a mod whose captured floating tensors all want gradients.
class GradientTile {
 public:
  GradientTile(const std::string& text, std::vector<Tensor> tensors, CpuIsa isa)
      : mod_(text, std::move(tensors)), isa_(isa) {
    for (std::size_t i = 0; i < mod_.problem.captures.size(); ++i)
      if (dsl::value_type(mod_.problem.captures[i].dtype) == dsl::Type::kFloat) mod_.problem.gradients |= 1u << i;
    auto compiled = compile_cpu_gradient_tile(mod_.problem, {.isa = isa, .dump = {}});
    if (compiled.error) ADD_FAILURE() << compiled.error->message;
    tile = compiled.value;
  }

  // Random inputs around the given scores, and the tile over them. Lane 5 is a row without a kept element; where an
  // element is dropped, dP is NaN.
  void run(double mean, double deviation) {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    dsl::Interpreter interpreter(mod_.problem.score_mod, mod_.views);
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      double sum = 0;
      for (long long row = 0; row < at_.rows; ++row) {
        const auto i = row * kPanelLanes + lane;
        scores[i] = static_cast<float>(mean) + static_cast<float>(deviation) * normal(random);
        given_dp[i] = normal(random);
        const dsl::Element element = interpreter.score_mod(point(row, lane));
        if (!element.keep) given_dp[i] = kNan;
        if (element.keep && !std::isnan(element.value)) sum += std::exp(element.value);
      }
      lse[lane] = sum > 0 && lane != 5 ? static_cast<float>(std::log(sum)) : static_cast<float>(kInf);
      delta[lane] = normal(random);
    }
    for (std::int64_t i = 0; i < at_.rows * kPanelLanes; ++i) {
      p[i] = scores[i];
      ds[i] = given_dp[i];
    }
    PanelBuffer staged(cpu::kMaxStagedReads * kTileRows);
    if (tile->rows()) {
      const cpu::TileParams lanes{.b = at_.b,
                                  .h = at_.h,
                                  .q_idx = at_.q_idx,
                                  .kv_idx = at_.kv_idx,
                                  .rows = at_.rows,
                                  .captured = mod_.table.data()};
      const void* addresses[cpu::kMaxStagedReads * kPanelLanes];
      tile->rows()(&lanes, addresses);
      for (std::size_t i = 0; i < tile->staged().size(); ++i) {
        ASSERT_EQ(tile->staged()[i], DType::kF32);
        cpu::products(static_cast<int>(isa_))
            .stage(addresses + i * kPanelLanes, cpu::Element::kF32, at_.rows,
                   staged.data() + static_cast<std::int64_t>(i) * kTileRows * kPanelLanes);
      }
    }
    const auto sinks = static_cast<std::int64_t>(tile->facts().sinks.size());
    contributions = std::vector<float>(static_cast<std::size_t>(sinks * kTileRows * kPanelLanes + 16), kNan);
    places = std::vector<long long>(static_cast<std::size_t>(sinks * kTileRows * kPanelLanes + 8), -1);
    const cpu::GradientTileParams params{.scores = p.data(),
                                         .gradients = ds.data(),
                                         .lse = lse.data(),
                                         .delta = delta.data(),
                                         .b = at_.b,
                                         .h = at_.h,
                                         .q_idx = at_.q_idx,
                                         .kv_idx = at_.kv_idx,
                                         .rows = at_.rows,
                                         .captured = mod_.table.data(),
                                         .staged = staged.data(),
                                         .contributions = aligned_contributions(),
                                         .places = aligned_places()};
    tile->function()(&params);
  }

  void check() {
    dsl::Interpreter interpreter(mod_.problem.score_mod, mod_.views);
    dsl::Derivative derivative(mod_.problem.score_mod, mod_.views);
    const std::vector<SinkFacts>& sinks = tile->facts().sinks;
    Sums gold, ours;
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      for (long long row = 0; row < at_.rows; ++row) {
        const auto i = row * kPanelLanes + lane;
        SCOPED_TRACE("row " + std::to_string(row) + " lane " + std::to_string(lane) + " score " +
                     std::to_string(scores[i]));
        const dsl::Element element = interpreter.score_mod(point(row, lane));
        const bool dead = !element.keep || lse[lane] == static_cast<float>(kInf);
        const double probability = dead ? 0.0 : std::exp(element.value - lse[lane]);
        // 2^-126 is where the tile's exponential ends.
        const double dm = probability < 2e-38 ? 0.0 : probability * (given_dp[i] - delta[lane]);
        const double size = probability * (std::abs(given_dp[i]) + std::abs(delta[lane])) *
                            (1 + std::abs(element.value) + std::abs(lse[lane]));
        const dsl::ElementGradient expected = derivative.at(point(row, lane), dm);
        if (dm == 0.0) {
          ASSERT_LE(p[i], dead ? 0.0f : 2.5e-38f);
          ASSERT_EQ(ds[i], 0.0f);
        } else {
          ASSERT_NEAR(p[i], probability, probability * (1 + std::abs(element.value) + std::abs(lse[lane])) * 2e-6);
          const double slope = std::abs(expected.dscore / dm);
          ASSERT_NEAR(ds[i], expected.dscore, size * (slope + 0.1) * 1e-5 + 1e-30);
        }
        for (const dsl::Contribution& each : expected.contributions) {
          const dsl::CaptureView& view = mod_.views[static_cast<std::size_t>(each.capture)];
          Sum& sum = gold[{each.capture, packed(each, view)}];
          sum.value += each.value;
          if (dm != 0.0) sum.size += std::abs(each.value) + size * (0.1 + std::abs(each.value / dm));
        }
        for (std::size_t s = 0; s < sinks.size(); ++s) {
          if (sinks[s].row_shift) continue;
          const float value = aligned_contributions()[static_cast<std::int64_t>(s) * kTileRows * kPanelLanes + i];
          if (dm == 0.0) {
            ASSERT_EQ(value, 0.0f);
          }
          ours[{sinks[s].capture, place(s, row, lane)}].value += value;
        }
      }
    }
    // Of a captured tensor that is also in a row shift the tile gives a part only.
    const auto shifted = [&](const auto& entry) {
      return std::ranges::any_of(
          sinks, [&](const SinkFacts& sink) { return sink.capture == entry.first.first && sink.row_shift; });
    };
    std::erase_if(gold, shifted);
    std::erase_if(ours, shifted);
    for (const auto& [where, sum] : gold) {
      EXPECT_NEAR(ours[where].value, sum.value, sum.size * 1e-5 + 1e-30)
          << "capture " << where.first << " at " << where.second;
      ours.erase(where);
    }
    for (const auto& [where, sum] : ours) EXPECT_EQ(sum.value, 0.0) << "capture " << where.first;
  }

  // Of one row: what row_shifts() gives, against the derivative at any key.
  void check_row_shifts() {
    ASSERT_TRUE(tile->row_shifts());
    const std::vector<SinkFacts>& sinks = tile->facts().sinks;
    dsl::Derivative derivative(mod_.problem.score_mod, mod_.views);
    std::vector<float> values(sinks.size(), kNan);
    tile->row_shifts()(at_.b, at_.h, at_.q_idx, mod_.table.data(), 1.5f, values.data());
    Sums gold, ours;
    for (const dsl::Contribution& each : derivative.at(point(0, 0), 1.5).contributions)
      gold[{each.capture, packed(each, mod_.views[static_cast<std::size_t>(each.capture)])}].value += each.value;
    for (std::size_t s = 0; s < sinks.size(); ++s) {
      if (sinks[s].row_shift) ours[{sinks[s].capture, place(s, 0, 0)}].value += values[s];
    }
    ASSERT_FALSE(ours.empty());
    for (const auto& [where, sum] : ours) EXPECT_NEAR(sum.value, gold[where].value, 1e-5 * std::abs(sum.value));
  }

  std::shared_ptr<const CpuGradientTile> tile;
  PanelBuffer scores{kTileRows}, given_dp{kTileRows}, p{kTileRows}, ds{kTileRows}, lse{1}, delta{1};
  std::vector<float> contributions;
  std::vector<long long> places;

 private:
  Point point(long long row, int lane) const {
    return {.score = scores[row * kPanelLanes + lane],
            .b = at_.b,
            .h = at_.h,
            .q_idx = at_.q_idx + lane,
            .kv_idx = at_.kv_idx + row};
  }
  float* aligned_contributions() { return static_cast<float*>(test::align_64(contributions.data())); }
  long long* aligned_places() { return static_cast<long long*>(test::align_64(places.data())); }

  // As a runtime finds it, by the sink's level.
  std::int64_t place(std::size_t sink, long long row, int lane) {
    const SinkLevel level = tile->facts().sinks[sink].level;
    const auto part = static_cast<std::int64_t>(sink) * kTileRows * kPanelLanes;
    if (tile->places()[sink] == CpuPlaces::kTile) return aligned_places()[part + row * kPanelLanes + lane];
    std::vector<long long> found(tile->facts().sinks.size(), -1);
    long long q = at_.q_idx + lane, kv = at_.kv_idx + row;
    if (level == SinkLevel::kBlock || level == SinkLevel::kRow) kv = 0;
    if (level == SinkLevel::kBlock || level == SinkLevel::kColumn) q = 0;
    if (level == SinkLevel::kDiagonal) {
      q = std::max<long long>(0, q - kv);
      kv = q - (at_.q_idx + lane - at_.kv_idx - row);
    }
    const bool along_keys = tile->places()[sink] == CpuPlaces::kAlongKeys;
    if (along_keys) kv = at_.kv_idx;
    tile->sink_offsets()(at_.b, at_.h, q, kv, mod_.table.data(), found.data());
    return found[sink] + (along_keys ? row : 0);
  }

  Mod mod_;
  CpuIsa isa_;
  Tile at_;
};

void check(const std::string& text, const std::vector<Tensor>& tensors = {}, double mean = 0.0,
           double deviation = 2.0) {
  for (const CpuIsa isa : isas()) {
    SCOPED_TRACE(text + " on " + std::string(cpu_isa_name(isa)));
    GradientTile tile(text, tensors, isa);
    if (!tile.tile) return;
    tile.run(mean, deviation);
    tile.check();
    if (::testing::Test::HasFailure()) return;
  }
}

TEST(CompilerGradientTile, ScoresAlone) {
  for (const char* text :
       {"score", "score + 2 * h", "where(q_idx >= kv_idx, score, -inf)", "20 * tanh(score / 20)",
        "score * 0.5 + kv_idx", "score * (1 + h)", "abs(score)", "score * score", "max(score, 0.25 * score)",
        "clamp(score, -1, 1.5)", "where((q_idx + kv_idx) % 3 == 0, exp(score * 0.1), sin(score))",
        "score * sigmoid(score)", "where(kv_idx < 30, -inf, score - 0.1 * abs(q_idx - kv_idx))"})
    check(text);
}

TEST(CompilerGradientTile, WhatIsNotChosenOrDroppedContributesNothing) {
  check("where(score > 0, log(score), score)");
  check("where(q_idx >= kv_idx, score * score, -inf)", {}, 0.0, 4.0);
  check("where(q_idx > kv_idx, score + log(q_idx - kv_idx), -inf)");
  check("where(score > 0, sqrt(score), -inf) * where(h > 100, 1 / (score - score), 1)");
  // Far below the row's maximum p is 0, whatever the derivative is.
  check("where(kv_idx == 20, score, score - 1e5 * abs(score))");
  check("where(kv_idx == 20, 0.0, 0 - exp(40 * abs(score) + 40))");
}

TEST(CompilerGradientTile, CapturedReadsOfEveryLevel) {
  check("score * b[h]", {floating("b", {4})});
  check("score * g", {floating("g", {})});
  check("score * b[q_idx]", {floating("b", {64})});
  check("score + b[kv_idx]", {floating("b", {96})});
  check("score + 0.5 * b[h, q_idx - kv_idx + 95]", {floating("b", {4, 159})});
  check("score + b[abs(q_idx - kv_idx)]", {floating("b", {96})});
  check("score + b[clamp(q_idx - kv_idx + 8, 0, 16)]", {floating("b", {17})});
  check("score + b[q_idx, kv_idx]", {floating("b", {64, 96})});
  check("score + b[b, h, q_idx, kv_idx]", {floating("b", {2, 4, 64, 96})});
  check("score * b[h, kv_idx, q_idx]", {floating("b", {4, 96, 64})});
  check("score + b[q_idx + kv_idx]", {floating("b", {160})});
  check("score + b[off[q_idx]]", {floating("b", {50}), offsets(64, 50)});
  check("score * b[off[kv_idx] + q_idx]", {floating("b", {114}), offsets(96, 50)});
  // Out of range, and so clamped; one tensor read twice.
  check("score + b[q_idx * 2, kv_idx]", {floating("b", {64, 96})});
  check("score + b[q_idx, kv_idx * 2 - 40]", {floating("b", {64, 96})});
  check("score * b[kv_idx] + b[q_idx]", {floating("b", {96})});
  check("score * (1 + b[h]) + 2 * b[h] * b[h]", {floating("b", {4})});
  check("score * sigmoid(g[h])", {floating("g", {4})});
}

TEST(CompilerGradientTile, PlacesThatDependOnTheScore) {
  check("score + b[int(score * 3) + 20]", {floating("b", {40})});
  check("score * b[h, int(score) + kv_idx]", {floating("b", {4, 96})});
}

TEST(CompilerGradientTile, RowShifts) {
  const std::pair<const char*, std::vector<Tensor>> cases[] = {
      {"score + b[b, q_idx]", {floating("b", {2, 64})}},
      {"score + 2 * g[h]", {floating("g", {4})}},
      {"score + kv_idx * 0.1 + g[h] * g[h] + c[off[q_idx]]",
       {floating("g", {4}), floating("c", {50}), offsets(64, 50)}}};
  for (const auto& [text, tensors] : cases) {
    check(text, tensors);
    for (const CpuIsa isa : isas()) {
      SCOPED_TRACE(text);
      GradientTile tile(text, tensors, isa);
      if (!tile.tile) return;
      tile.run(0.0, 1.0);
      tile.check_row_shifts();
    }
  }
}

TEST(CompilerGradientTile, FindsPlacesTheCheapestWay) {
  const auto places = [](const char* text, const std::vector<Tensor>& tensors) {
    const GradientTile tile(text, tensors, host_cpu_isa());
    return tile.tile && tile.tile->places().size() == 1 ? tile.tile->places()[0] : CpuPlaces{255};
  };
  EXPECT_EQ(places("score + b[b, h, q_idx, kv_idx]", {floating("b", {2, 4, 64, 96})}), CpuPlaces::kAlongKeys);
  EXPECT_EQ(places("score + b[q_idx, kv_idx, 0]", {floating("b", {64, 96, 1})}), CpuPlaces::kAlongKeys);
  EXPECT_EQ(places("score + b[kv_idx, q_idx]", {floating("b", {96, 64})}), CpuPlaces::kTile);
  EXPECT_EQ(places("score + b[q_idx, kv_idx]", {floating("b", {64, 90})}), CpuPlaces::kTile);  // clamped
  EXPECT_EQ(places("score + b[kv_idx]", {floating("b", {96})}), CpuPlaces::kOffsets);
}

TEST(CompilerGradientTile, SharesEqualCode) {
  const GradientTile one("score * 2", {}, host_cpu_isa()), two("2 * score", {}, host_cpu_isa());
  ASSERT_TRUE(one.tile && two.tile);
  EXPECT_EQ(one.tile->function(), two.tile->function());
  EXPECT_EQ(one.tile->sink_offsets(), nullptr);
  EXPECT_EQ(one.tile->row_shifts(), nullptr);
}

}  // namespace
}  // namespace attnjit::compiler::testing
