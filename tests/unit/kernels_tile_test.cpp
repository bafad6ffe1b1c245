// The softmax tile: the template as plain code around a mod that the test chooses, and compiled at run time around the
// identity for every instruction set of this machine.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <numbers>
#include <random>
#include <string>
#include <vector>

#include "compiler/compiler.h"
#include "tests/unit/cpu_testing.h"

#ifdef __clang__
#pragma clang diagnostic ignored "-Wpass-failed"
#else
#pragma GCC diagnostic ignored "-Wunknown-pragmas"
#endif
#define ATTNJIT_VECTOR_WIDTH 4
#include "kernels_templates/cpu/tile.cpp"  // NOLINT(bugprone-suspicious-include): built here as plain code

namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

using Mod = float (*)(float score, long long b, long long h, long long q_idx, long long kv_idx,
                      const attnjit::cpu::CapturedView* captured);
Mod g_mod = nullptr;

float identity(float score, long long, long long, long long, long long, const attnjit::cpu::CapturedView*) {
  return score;
}

}  // namespace

float attnjit_mod(float score, long long b, long long h, long long q_idx, long long kv_idx,
                  const attnjit::cpu::CapturedView* captured, const void*, long long) {
  return g_mod(score, b, h, q_idx, kv_idx, captured);
}

namespace attnjit::cpu {
namespace {

using test::PanelBuffer;

// -1: the template as plain code. Else compiler::CpuIsa's number.
class KernelsTile : public testing::TestWithParam<int> {
 protected:
  void SetUp() override {
    if (GetParam() < 0) return;
    dsl::Expr score;
    score.nodes.push_back({.op = dsl::Op::kScore, .args = {}, .location = {}});
    score.root = 0;
    compiler::ModProblem problem{.score_mod = score, .mask_mod = {}, .captures = {}};
    problem.seqlen_q = problem.seqlen_kv = 1024;
    auto compiled = compiler::compile_cpu_tile(problem, {.isa = static_cast<compiler::CpuIsa>(GetParam()), .dump = {}});
    if (compiled.error) FAIL() << compiled.error->message;
    compiled_ = compiled.value;
    ASSERT_EQ(compiled_->score_factor(), std::numbers::log2e);
  }
  TileFn tile() const { return compiled_ ? compiled_->function() : attnjit_tile; }

 private:
  std::shared_ptr<const compiler::CpuTile> compiled_;
};

std::vector<int> tiles() {
  std::vector<int> all = test::host_isas();
  all.insert(all.begin(), -1);
  return all;
}
std::string tile_label(const testing::TestParamInfo<int>& info) {
  return info.param < 0 ? "Template" : "Isa" + std::to_string(info.param);
}
// The prefix is what CTest filters by.
INSTANTIATE_TEST_SUITE_P(KernelsTileHost, KernelsTile, testing::ValuesIn(tiles()), tile_label);

// The state of one panel over several tile calls, and what it should be in double precision.
class TilePanel {
 public:
  explicit TilePanel(TileFn tile, Mod mod = identity) : tile_(tile), mod_(mod) {
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      row_max_[lane] = -kInf;
      row_sum_[lane] = 0.0f;
    }
  }

  // Feeds rows of scores; [row][lane].
  void feed(const std::vector<float>& scores) {
    const auto rows = static_cast<long long>(scores.size()) / kPanelLanes;
    for (std::size_t i = 0; i < scores.size(); ++i) block_[static_cast<std::int64_t>(i)] = scores[i];
    const TileParams params{block_.data(), row_max_.data(), row_sum_.data(), rescale_.data(), 3, 5, 100, kv_idx_,
                            rows,          nullptr};
    g_mod = mod_;
    tile_(&params);
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const int lane = static_cast<int>(i % kPanelLanes);
      modified_[lane].push_back(
          mod_(scores[i], 3, 5, 100 + lane, kv_idx_ + static_cast<long long>(i) / kPanelLanes, nullptr));
    }
    // What the products do with the factor, here to the probabilities themselves.
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      for (float& p : weights_[lane]) p *= rescale_[lane];
      for (long long row = 0; row < rows; ++row) weights_[lane].push_back(block_[row * kPanelLanes + lane]);
    }
    kv_idx_ += rows;
  }

  // Against softmax over everything fed, in double precision.
  void check_finite() const {
    for (int lane = 0; lane < kPanelLanes; ++lane) {
      double max = -kInf, sum = 0;
      for (const double s : modified_[lane]) max = std::max(max, s);
      for (const double s : modified_[lane]) sum += std::exp2(s - max);
      ASSERT_EQ(row_max_[lane], static_cast<float>(max));
      ASSERT_NEAR(row_sum_[lane] / sum, 1.0, 1e-6);
      for (std::size_t i = 0; i < modified_[lane].size(); ++i) {
        // The difference to the maximum is rounded once per block and once per change of the maximum.
        const double gold = std::exp2(modified_[lane][i] - max);
        ASSERT_NEAR(weights_[lane][i], gold, gold * (1e-6 + 0x1p-23 * (max - modified_[lane][i])) + 1.2e-38)
            << "element " << i << " of lane " << lane;
      }
    }
  }

  float max(int lane) const { return row_max_[lane]; }
  float sum(int lane) const { return row_sum_[lane]; }
  const std::vector<float>& weights(int lane) const { return weights_[lane]; }

 private:
  TileFn tile_;
  Mod mod_;
  PanelBuffer block_{kTileRows};
  PanelBuffer row_max_{1}, row_sum_{1}, rescale_{1};
  long long kv_idx_ = 40;
  std::vector<float> modified_[kPanelLanes];
  std::vector<float> weights_[kPanelLanes];
};

std::size_t at(std::int64_t row, std::int64_t lane) { return static_cast<std::size_t>(row * kPanelLanes + lane); }

std::vector<float> random_scores(long long rows, float scale, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> out(static_cast<std::size_t>(rows * kPanelLanes));
  for (float& x : out) x = normal(random);
  return out;
}

TEST_P(KernelsTile, OnlineSoftmaxMatchesDouble) {
  for (const float scale : {1.0f, 20.0f, 1000.0f}) {
    TilePanel panel(tile());
    unsigned seed = 1;
    for (const long long rows : {128, 1, 7, 128}) panel.feed(random_scores(rows, scale, seed++));
    panel.check_finite();
  }
}

TEST_P(KernelsTile, ModSeesLogicalIndices) {
  if (GetParam() >= 0) GTEST_SKIP() << "the compiled tiles here have no mod";
  TilePanel panel(attnjit_tile,
                  [](float score, long long b, long long h, long long q, long long kv, const CapturedView*) {
                    return score + static_cast<float>(b * 1000 + h * 100 + 3 * (q - 100) - 2 * kv);
                  });
  panel.feed(random_scores(50, 1.0f, 9));
  panel.feed(random_scores(3, 1.0f, 10));
  panel.check_finite();
  EXPECT_GT(panel.max(31), panel.max(0));
}

TEST_P(KernelsTile, Exp2IsAccurateOverItsRange) {
  // One row of 0 pins the maximum, so that the others are exponents.
  double worst = 0;
  const double step = 0.00173;
  const double span = step * kPanelLanes * (kTileRows - 1);
  for (int part = 0; part * span < 126.0; ++part) {
    const double x = -126.0 + part * span;
    TilePanel panel(tile());
    std::vector<float> scores(kTileRows * kPanelLanes, 0.0f);
    for (int i = kPanelLanes; i < kTileRows * kPanelLanes; ++i) {
      scores[static_cast<std::size_t>(i)] = std::min(0.0f, static_cast<float>(x + step * (i - kPanelLanes)));
    }
    panel.feed(scores);
    for (int i = kPanelLanes; i < kTileRows * kPanelLanes; ++i) {
      const double gold = std::exp2(static_cast<double>(scores[static_cast<std::size_t>(i)]));
      worst = std::max(worst,
                       std::abs(panel.weights(i % kPanelLanes)[static_cast<std::size_t>(i / kPanelLanes)] / gold - 1));
    }
  }
  EXPECT_LT(worst, 3e-7);
}

TEST_P(KernelsTile, Exp2EndsAreZeroOneAndNeverDenormal) {
  TilePanel panel(tile());
  std::vector<float> scores(kPanelLanes * 8, 0.0f);
  const float row[] = {0.0f, -0.0f, -126.0f, -126.00001f, -150.0f, -1e30f, -kInf, -0x1p-30f};
  for (int i = 0; i < 8; ++i) {
    for (int lane = 0; lane < kPanelLanes; ++lane) scores[at(i, lane)] = row[i];
  }
  panel.feed(scores);
  const float gold[] = {1.0f, 1.0f, 0x1p-126f, 0.0f, 0.0f, 0.0f, 0.0f, 1.0f};
  for (int i = 0; i < 8; ++i) {
    EXPECT_NEAR(panel.weights(0)[static_cast<std::size_t>(i)], gold[i], 2e-7 * gold[i]) << row[i];
  }
  EXPECT_EQ(panel.weights(0)[0], 1.0f);
  EXPECT_EQ(panel.weights(0)[1], 1.0f);
}

TEST_P(KernelsTile, DroppedElementsWeighNothing) {
  // Lane 0: dropped in the first block, then kept; lane 1: the other way round; lane 2: never kept.
  TilePanel panel(tile());
  std::vector<float> first = random_scores(16, 1.0f, 3), second = random_scores(16, 1.0f, 4);
  for (int row = 0; row < 16; ++row) {
    first[at(row, 0)] = -kInf;
    second[at(row, 1)] = -kInf;
    first[at(row, 2)] = second[at(row, 2)] = -kInf;
  }
  panel.feed(first);
  panel.feed(second);
  for (int row = 0; row < 16; ++row) {
    EXPECT_EQ(panel.weights(0)[static_cast<std::size_t>(row)], 0.0f);
    EXPECT_GT(panel.weights(0)[static_cast<std::size_t>(16 + row)], 0.0f);
    EXPECT_GT(panel.weights(1)[static_cast<std::size_t>(row)], 0.0f);
    EXPECT_EQ(panel.weights(1)[static_cast<std::size_t>(16 + row)], 0.0f);
  }
  for (const float p : panel.weights(2)) EXPECT_EQ(p, 0.0f);
  EXPECT_EQ(panel.sum(2), 0.0f);
  EXPECT_EQ(panel.max(2), -kInf);
}

TEST_P(KernelsTile, NanAndPositiveInfinityMakeTheSumNan) {
  std::uint32_t payload = 0xffffffff;  // a NaN whose low bits would reach an exponent
  float odd_nan;
  std::memcpy(&odd_nan, &payload, 4);
  for (const float bad : {kNan, -kNan, odd_nan, kInf}) {
    for (const int block : {0, 1, 2}) {
      TilePanel panel(tile());
      for (int i = 0; i < 3; ++i) {
        std::vector<float> scores = random_scores(20, 1.0f, 5);
        if (i == block) scores[at(7, 4)] = bad;
        panel.feed(scores);
      }
      EXPECT_TRUE(std::isnan(panel.sum(4))) << bad << " in block " << block;
      EXPECT_FALSE(std::isnan(panel.sum(3)));
      EXPECT_FALSE(std::isnan(panel.sum(5)));
    }
  }
}

TEST_P(KernelsTile, NanBesideOnlyDroppedElementsIsStillNan) {
  TilePanel panel(tile());
  std::vector<float> scores(4 * kPanelLanes, -kInf);
  scores[0] = kNan;
  panel.feed(scores);
  EXPECT_TRUE(std::isnan(panel.sum(0)));
  EXPECT_TRUE(std::isnan(panel.weights(0)[0]));
}

}  // namespace
}  // namespace attnjit::cpu
