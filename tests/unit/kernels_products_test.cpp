// The native CPU products, conversions and transposes, for every instruction set of this machine.
#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "kernels_templates/cpu/products.h"
#include "tests/unit/cpu_testing.h"

namespace attnjit::cpu {
namespace {

using test::host_isas;
using test::PanelBuffer;
using test::value_of;

class KernelsProducts : public testing::TestWithParam<int> {
 protected:
  const Products& products_ = products(GetParam());
  std::mt19937 random_{7};

  float uniform() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(random_); }
  std::vector<float> values(std::size_t count) {
    std::vector<float> out(count);
    for (float& x : out) x = uniform();
    return out;
  }
  PanelBuffer panel(std::int64_t rows) {
    PanelBuffer out(rows);
    for (std::int64_t i = 0; i < rows * kPanelLanes; ++i) out[i] = uniform();
    return out;
  }
};

std::string isa_label(const testing::TestParamInfo<int>& info) { return "Isa" + std::to_string(info.param); }
// The prefix is what CTest filters by.
INSTANTIATE_TEST_SUITE_P(KernelsProductsHost, KernelsProducts, testing::ValuesIn(host_isas()), isa_label);

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

TEST_P(KernelsProducts, QkMatchesDouble) {
  for (const std::int64_t depth : {1, 2, 7, 16, 64, 100, 256}) {
    for (const std::int64_t rows : {1, 2, 3, 5, 8, 13, 127, 128}) {
      const std::int64_t stride = depth + rows % 3;
      // Exactly as long as it may be read: the last row has no padding behind it.
      const std::vector<float> k = values(static_cast<std::size_t>((rows - 1) * stride + depth));
      const PanelBuffer queries = panel(depth);
      PanelBuffer scores(rows);
      products_.qk(k.data(), stride, rows, depth, queries.data(), 0.75f, scores.data());
      for (std::int64_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < kPanelLanes; ++lane) {
          double gold = 0, magnitude = 0;
          for (std::int64_t i = 0; i < depth; ++i) {
            const double term = 0.75 * k[row * stride + i] * queries[i * kPanelLanes + lane];
            gold += term;
            magnitude += std::abs(term);
          }
          ASSERT_NEAR(scores[row * kPanelLanes + lane], gold, magnitude * (depth + 1) * 0x1p-24)
              << "depth " << depth << " rows " << rows << " at " << row << ", " << lane;
        }
      }
      EXPECT_TRUE(scores.guard_intact());
    }
  }
}

TEST_P(KernelsProducts, PvMatchesDouble) {
  for (const std::int64_t width : {1, 2, 7, 16, 64, 100, 256}) {
    for (const std::int64_t rows : {1, 2, 3, 13, 128}) {
      const std::int64_t stride = width + rows % 3;
      const std::vector<float> v = values(static_cast<std::size_t>((rows - 1) * stride + width));
      const PanelBuffer weights = panel(rows);
      const PanelBuffer rescale = panel(1);
      PanelBuffer out = panel(width);
      const PanelBuffer before = out;
      products_.pv(v.data(), stride, rows, width, weights.data(), rescale.data(), out.data());
      for (std::int64_t i = 0; i < width; ++i) {
        for (int lane = 0; lane < kPanelLanes; ++lane) {
          double gold = static_cast<double>(before[i * kPanelLanes + lane]) * rescale[lane];
          double magnitude = std::abs(gold);
          for (std::int64_t row = 0; row < rows; ++row) {
            const double term = static_cast<double>(v[row * stride + i]) * weights[row * kPanelLanes + lane];
            gold += term;
            magnitude += std::abs(term);
          }
          ASSERT_NEAR(out[i * kPanelLanes + lane], gold, magnitude * (rows + 2) * 0x1p-24)
              << "width " << width << " rows " << rows << " at " << i << ", " << lane;
        }
      }
      EXPECT_TRUE(out.guard_intact());
    }
  }
}

TEST_P(KernelsProducts, AddLanesMatchesDouble) {
  for (const std::int64_t width : {16, 32, 48, 80, 256}) {
    for (const std::int64_t rows : {1, 2, 3, 5, 8, 13, 128}) {
      const std::int64_t stride = width + rows % 3, out_stride = width + rows % 2;
      const std::vector<float> in = values(static_cast<std::size_t>((kPanelLanes - 1) * stride + width));
      const PanelBuffer weights = panel(rows);
      std::vector<float> out = values(static_cast<std::size_t>(rows * out_stride));
      const std::vector<float> before = out;
      products_.add_lanes(in.data(), stride, rows, width, weights.data(), out.data(), out_stride);
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t i = 0; i < out_stride; ++i) {
          double gold = before[row * out_stride + i], magnitude = std::abs(gold);
          for (std::int64_t lane = 0; i < width && lane < kPanelLanes; ++lane) {
            const double term = static_cast<double>(weights[row * kPanelLanes + lane]) * in[lane * stride + i];
            gold += term;
            magnitude += std::abs(term);
          }
          ASSERT_NEAR(out[row * out_stride + i], gold, magnitude * (kPanelLanes + 1) * 0x1p-24)
              << "width " << width << " rows " << rows << " at " << row << ", " << i;
        }
      }
    }
  }
}

TEST_P(KernelsProducts, WidensEvery16BitValue) {
  std::vector<std::uint16_t> in(65536);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<std::uint16_t>(i);
  for (const Storage storage : {Storage::kF16, Storage::kBF16}) {
    std::vector<float> out(in.size(), kNan);
    products_.widen(in.data(), storage, 256, 256, 256, out.data(), 256);
    for (std::size_t i = 0; i < in.size(); ++i) {
      const double gold = value_of(in[i], storage);
      if (std::isnan(gold)) {
        ASSERT_TRUE(std::isnan(out[i])) << i;
      } else {
        ASSERT_EQ(out[i], gold) << i;
        ASSERT_EQ(std::signbit(out[i]), std::signbit(gold)) << i;
      }
    }
  }
}

TEST_P(KernelsProducts, WidenKeepsToItsRowsAndColumns) {
  for (const std::int64_t width : {1, 5, 16, 33}) {
    std::vector<std::uint16_t> in(static_cast<std::size_t>(2 * 40 + width), 0x3c00);  // 1 as f16
    std::vector<float> out(3 * 50, -7.0f);
    products_.widen(in.data(), Storage::kF16, 40, 3, width, out.data(), 50);
    for (std::int64_t i = 0; i < 150; ++i) EXPECT_EQ(out[i], i % 50 < width ? 1.0f : -7.0f) << i;
  }
}

// Rounds to nearest even by comparing the neighbours among all values of the type.
class Rounder {
 public:
  explicit Rounder(Storage storage) : storage_(storage), infinity_(storage == Storage::kF16 ? 0x7c00 : 0x7f80) {}
  std::uint16_t operator()(float x) const {
    const std::uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    const double magnitude = std::abs(static_cast<double>(x));
    int low = 0, high = infinity_;  // positive values are ordered as their bits
    while (high - low > 1) (value((low + high) / 2) <= magnitude ? low : high) = (low + high) / 2;
    // Infinity stands for the next value of the unbounded format.
    const double top = high == infinity_ ? 2 * value(infinity_ - 1) - value(infinity_ - 2) : value(high);
    const double down = magnitude - value(low), up = top - magnitude;
    const bool upper = std::isinf(magnitude) || up < down || (up == down && high % 2 == 0);
    return static_cast<std::uint16_t>(sign | (upper ? high : low));
  }

 private:
  double value(int bits) const { return value_of(static_cast<std::uint16_t>(bits), storage_); }
  Storage storage_;
  int infinity_;
};

TEST_P(KernelsProducts, NarrowsToNearestEven) {
  for (const Storage storage : {Storage::kF16, Storage::kBF16}) {
    // Every 16-bit value, the midpoint to the next one and the floats around both; then floats at random.
    std::vector<float> in;
    for (int bits = 0; bits < 65536; ++bits) {
      const double a = value_of(static_cast<std::uint16_t>(bits), storage);
      const double b = value_of(static_cast<std::uint16_t>(bits + 1), storage);
      in.push_back(static_cast<float>(a));
      if (!std::isfinite(a) || !std::isfinite(b)) continue;
      const float middle = static_cast<float>((a + b) / 2);
      for (const float x : {std::nextafterf(middle, -INFINITY), middle, std::nextafterf(middle, INFINITY)})
        in.push_back(x);
    }
    for (const float x : {65504.0f, 65519.996f, 65520.0f, 1e30f, 3.4e38f, 0x1p-25f, 0x1.000002p-25f, 1e-40f}) {
      in.push_back(x);
      in.push_back(-x);
    }
    for (int i = 0; i < 100000; ++i) {
      const std::uint32_t bits = static_cast<std::uint32_t>(random_());
      float x;
      std::memcpy(&x, &bits, 4);
      in.push_back(x);
    }
    while (in.size() % kPanelLanes) in.push_back(0.0f);
    const Rounder round(storage);
    PanelBuffer scratch(1), ones(1);
    for (int lane = 0; lane < kPanelLanes; ++lane) ones[lane] = 1.0f;
    std::uint16_t out[kPanelLanes];
    for (std::size_t i = 0; i < in.size(); i += kPanelLanes) {
      std::memcpy(scratch.data(), &in[i], sizeof(float) * kPanelLanes);
      products_.store_panel(scratch.data(), ones.data(), 0, kPanelLanes, 1, out, storage, 1);
      for (int lane = 0; lane < kPanelLanes; ++lane) {
        const float x = in[i + lane];
        if (std::isnan(x)) {
          ASSERT_TRUE(std::isnan(value_of(out[lane], storage))) << x;
        } else {
          ASSERT_EQ(out[lane], round(x)) << x << (storage == Storage::kF16 ? " as f16" : " as bf16");
        }
      }
    }
  }
}

TEST_P(KernelsProducts, LoadPanelTransposesAndPads) {
  for (const std::int64_t width : {1, 3, 4, 30, 64, 256}) {
    for (const std::int64_t lanes : {1, 6, 31, 32}) {
      const std::int64_t stride = width + 5;
      const std::vector<float> in = values(static_cast<std::size_t>((lanes - 1) * stride + width));
      PanelBuffer out(width);
      products_.load_panel(in.data(), Storage::kF32, stride, lanes, width, out.data());
      for (std::int64_t i = 0; i < width; ++i) {
        for (std::int64_t lane = 0; lane < kPanelLanes; ++lane) {
          ASSERT_EQ(out[i * kPanelLanes + lane], lane < lanes ? in[lane * stride + i] : 0.0f);
        }
      }
      EXPECT_TRUE(out.guard_intact());
    }
  }
}

TEST_P(KernelsProducts, StorePanelWritesItsLanesOnly) {
  for (const std::int64_t width : {1, 3, 4, 30, 64, 256}) {
    for (const auto& [first, lanes] : {std::pair(0, 32), std::pair(0, 1), std::pair(31, 32), std::pair(5, 30)}) {
      const std::int64_t stride = width + 3;
      const PanelBuffer in = panel(width);
      const PanelBuffer factor = panel(1);
      std::vector<float> out(static_cast<std::size_t>(kPanelLanes * stride), -7.0f);
      products_.store_panel(in.data(), factor.data(), first, lanes, width, out.data(), Storage::kF32, stride);
      for (std::int64_t lane = 0; lane < kPanelLanes; ++lane) {
        for (std::int64_t i = 0; i < stride; ++i) {
          const bool inside = lane >= first && lane < lanes && i < width;
          ASSERT_EQ(out[lane * stride + i], inside ? in[i * kPanelLanes + lane] * factor[lane] : -7.0f);
        }
      }
    }
  }
}

TEST_P(KernelsProducts, NarrowScalesRows) {
  for (const std::int64_t width : {1, 3, 30, 64, 256}) {
    const std::int64_t in_stride = width + 1, out_stride = width + 3;
    const std::vector<float> in = values(static_cast<std::size_t>(5 * in_stride));
    std::vector<float> out(static_cast<std::size_t>(5 * out_stride), -7.0f);
    products_.narrow(in.data(), in_stride, 0.75f, 5, width, out.data(), Storage::kF32, out_stride);
    for (std::int64_t i = 0; i < 5 * out_stride; ++i) {
      const std::int64_t row = i / out_stride, column = i % out_stride;
      ASSERT_EQ(out[i], column < width ? in[row * in_stride + column] * 0.75f : -7.0f);
    }
    for (const Storage storage : {Storage::kF16, Storage::kBF16}) {
      const Rounder round(storage);
      std::vector<std::uint16_t> halves(static_cast<std::size_t>(5 * out_stride), 77);
      products_.narrow(in.data(), in_stride, 0.75f, 5, width, halves.data(), storage, out_stride);
      for (std::int64_t i = 0; i < 5 * out_stride; ++i) {
        const std::int64_t row = i / out_stride, column = i % out_stride;
        ASSERT_EQ(halves[i], column < width ? round(in[row * in_stride + column] * 0.75f) : 77);
      }
    }
  }
}

TEST_P(KernelsProducts, SumsOfRowsLanesAndDiagonals) {
  for (const std::int64_t rows : {1, 2, 5, 31, 32, 33, 127, 128}) {
    const PanelBuffer in = panel(rows);
    // One float beyond what they may touch on either side, and on no boundary.
    const auto sums = [&](std::int64_t count, auto&& sum, auto&& index) {
      std::vector<float> out = values(static_cast<std::size_t>(count + 2));
      const std::vector<float> before = out;
      sum(in.data(), rows, out.data() + 1);
      std::vector<double> gold(before.begin(), before.end());
      for (std::int64_t row = 0; row < rows; ++row)
        for (std::int64_t lane = 0; lane < kPanelLanes; ++lane)
          gold[static_cast<std::size_t>(1 + index(row, lane))] += in[row * kPanelLanes + lane];
      for (std::size_t i = 0; i < gold.size(); ++i) ASSERT_NEAR(out[i], gold[i], 2e-5) << rows << " rows, at " << i;
      ASSERT_EQ(out.front(), before.front());
      ASSERT_EQ(out.back(), before.back());
    };
    sums(kPanelLanes, products_.sum_rows, [](std::int64_t, std::int64_t lane) { return lane; });
    sums(rows, products_.sum_lanes, [](std::int64_t row, std::int64_t) { return row; });
    sums(rows + kPanelLanes - 1, products_.sum_diagonals,
         [&](std::int64_t row, std::int64_t lane) { return rows - 1 + lane - row; });
  }
}

TEST_P(KernelsProducts, UnstagePutsLanesBackInRows) {
  for (const bool store : {true, false}) {
    for (const std::int64_t rows : {1, 3, 16, 17, 127, 128}) {
      for (const auto& [first, lanes] : {std::pair(0, 32), std::pair(0, 1), std::pair(31, 32), std::pair(5, 30)}) {
        const PanelBuffer in = panel(rows);
        const std::int64_t stride = rows + 2;
        std::vector<float> out = values(static_cast<std::size_t>(kPanelLanes * stride));
        const std::vector<float> before = out;
        float* rows_of[kPanelLanes] = {};
        for (std::int64_t lane = first; lane < lanes; ++lane) rows_of[lane] = out.data() + lane * stride + 1;
        products_.unstage(in.data(), rows, first, lanes, store, rows_of);
        for (std::int64_t lane = 0; lane < kPanelLanes; ++lane) {
          for (std::int64_t i = 0; i < stride; ++i) {
            const std::int64_t at = lane * stride + i;
            const bool inside = lane >= first && lane < lanes && i >= 1 && i <= rows;
            const float value = inside ? in[(i - 1) * kPanelLanes + lane] : 0.0f;
            ASSERT_EQ(out[at], !inside ? before[at] : store ? value : before[at] + value);
          }
        }
      }
    }
  }
}

// Values of BF16, and what they mean.
struct Bf16Values {
  std::vector<std::uint16_t> bits;
  double operator[](std::int64_t i) const { return value_of(bits[static_cast<std::size_t>(i)], Storage::kBF16); }
};

Bf16Values bf16_values(std::mt19937& random, std::size_t count) {
  Bf16Values out;
  std::uniform_real_distribution<float> uniform(-1.0f, 1.0f);
  for (std::size_t i = 0; i < count; ++i) {
    const float x = uniform(random);
    std::uint32_t bits;
    std::memcpy(&bits, &x, 4);
    out.bits.push_back(static_cast<std::uint16_t>(bits >> 16));
  }
  return out;
}

TEST_P(KernelsProducts, Bf16QkMatchesDouble) {
  if (!products_.qk_bf16) GTEST_SKIP() << "no BF16 instructions";
  for (const std::int64_t depth : {2, 6, 16, 64, 100, 256}) {
    for (const std::int64_t rows : {1, 2, 7, 128}) {
      const std::int64_t stride = depth + rows % 3;
      const Bf16Values k = bf16_values(random_, static_cast<std::size_t>((rows - 1) * stride + depth));
      const Bf16Values q = bf16_values(random_, static_cast<std::size_t>(30 * stride + depth));
      PanelBuffer queries(depth / 2), scores(rows);
      products_.load_panel_bf16(q.bits.data(), stride, 31, depth, queries.data());
      products_.qk_bf16(k.bits.data(), stride, rows, depth, queries.data(), 0.75f, scores.data());
      EXPECT_TRUE(queries.guard_intact());
      EXPECT_TRUE(scores.guard_intact());
      for (std::int64_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < kPanelLanes; ++lane) {
          double gold = 0, magnitude = 0;
          for (std::int64_t i = 0; lane < 31 && i < depth; ++i) {
            const double term = 0.75 * k[row * stride + i] * q[lane * stride + i];
            gold += term;
            magnitude += std::abs(term);
          }
          ASSERT_NEAR(scores[row * kPanelLanes + lane], gold, magnitude * (depth + 1) * 0x1p-24);
        }
      }
    }
  }
}

TEST_P(KernelsProducts, Bf16PvMatchesDouble) {
  if (!products_.pv_bf16) GTEST_SKIP() << "no BF16 instructions";
  for (const std::int64_t width : {1, 7, 16, 64, 100, 256}) {
    for (const std::int64_t rows : {1, 2, 3, 13, 128}) {
      const std::int64_t stride = width + rows % 3;
      const Bf16Values v = bf16_values(random_, static_cast<std::size_t>((rows - 1) * stride + width));
      std::vector<float> pairs(static_cast<std::size_t>((rows + 1) / 2 * width));
      products_.pair_rows_bf16(v.bits.data(), stride, rows, width, pairs.data());
      PanelBuffer weights = panel(rows);
      const PanelBuffer exact = weights;
      const PanelBuffer rescale = panel(1);
      PanelBuffer out = panel(width);
      const PanelBuffer before = out;
      products_.pv_bf16(pairs.data(), rows, width, weights.data(), rescale.data(), out.data());
      EXPECT_TRUE(weights.guard_intact());
      EXPECT_TRUE(out.guard_intact());
      for (std::int64_t i = 0; i < width; ++i) {
        for (int lane = 0; lane < kPanelLanes; ++lane) {
          const double base = static_cast<double>(before[i * kPanelLanes + lane]) * rescale[lane];
          double gold = base, magnitude = 0;
          for (std::int64_t row = 0; row < rows; ++row) {
            const double term = v[row * stride + i] * exact[row * kPanelLanes + lane];
            gold += term;
            magnitude += std::abs(term);
          }
          // Weights are rounded to BF16.
          ASSERT_NEAR(out[i * kPanelLanes + lane], gold,
                      magnitude * 0x1p-8 + (std::abs(base) + magnitude) * (rows + 2) * 0x1p-24)
              << "width " << width << " rows " << rows << " at " << i << ", " << lane;
        }
      }
    }
  }
}

TEST_P(KernelsProducts, Bf16AddLanesMatchesDouble) {
  if (!products_.add_lanes_bf16) GTEST_SKIP() << "no BF16 instructions";
  for (const std::int64_t width : {16, 32, 48, 256}) {
    for (const std::int64_t rows : {1, 2, 3, 13, 128}) {
      const Bf16Values in = bf16_values(random_, static_cast<std::size_t>(kPanelLanes * width));
      std::vector<float> pairs(static_cast<std::size_t>(kPanelLanes / 2 * width));
      products_.pair_rows_bf16(in.bits.data(), width, kPanelLanes, width, pairs.data());
      PanelBuffer weights = panel(rows);
      const PanelBuffer exact = weights;
      products_.pair_lanes_bf16(weights.data(), rows, weights.data());
      EXPECT_TRUE(weights.guard_intact());
      const std::int64_t out_stride = width + 1;
      std::vector<float> out = values(static_cast<std::size_t>(rows * out_stride));
      const std::vector<float> before = out;
      products_.add_lanes_bf16(pairs.data(), width, rows, width, weights.data(), out.data(), out_stride);
      for (std::int64_t row = 0; row < rows; ++row) {
        for (std::int64_t i = 0; i < out_stride; ++i) {
          double gold = before[row * out_stride + i], magnitude = 0;
          for (std::int64_t lane = 0; i < width && lane < kPanelLanes; ++lane) {
            const double term = in[lane * width + i] * exact[row * kPanelLanes + lane];
            gold += term;
            magnitude += std::abs(term);
          }
          // Weights are rounded to BF16.
          ASSERT_NEAR(out[row * out_stride + i], gold, magnitude * 0x1p-8 + (1 + magnitude) * 40 * 0x1p-24)
              << "width " << width << " rows " << rows << " at " << row << ", " << i;
        }
      }
    }
  }
}

// A page that cannot be touched stands right behind each row.
TEST_P(KernelsProducts, StageTransposesRowsOfEveryElementType) {
  constexpr std::size_t kPage = 4096;
  const auto mapped = [](int lane, void* base) { return static_cast<unsigned char*>(base) + (2 * lane + 1) * kPage; };
  void* const base = mmap(nullptr, 2 * kPanelLanes * kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  ASSERT_NE(base, MAP_FAILED);
  for (int lane = 0; lane < kPanelLanes; ++lane) ASSERT_EQ(mprotect(mapped(lane, base), kPage, PROT_NONE), 0);
  const std::pair<Element, int> elements[] = {{Element::kF32, 4},   {Element::kF16, 2},   {Element::kBF16, 2},
                                              {Element::kInt32, 4}, {Element::kInt16, 2}, {Element::kInt8, 1},
                                              {Element::kUInt8, 1}};
  for (const auto& [element, size] : elements) {
    for (std::int64_t rows = 1; rows <= kTileRows; ++rows) {
      const void* addresses[kPanelLanes];
      for (int lane = 0; lane < kPanelLanes; ++lane) {
        unsigned char* const row = mapped(lane, base) - rows * size;
        for (std::int64_t i = 0; i < rows * size; ++i) row[i] = static_cast<unsigned char>(random_());
        addresses[lane] = row;
      }
      PanelBuffer panel(rows);
      products_.stage(addresses, element, rows, panel.data());
      int wrong = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < kPanelLanes; ++lane) {
          std::uint32_t in = 0, out = 0;
          std::memcpy(&in, static_cast<const unsigned char*>(addresses[lane]) + row * size,
                      static_cast<std::size_t>(size));
          std::memcpy(&out, panel.data() + row * kPanelLanes + lane, 4);
          if (element == Element::kF16 || element == Element::kBF16) {
            const double gold =
                value_of(static_cast<std::uint16_t>(in), element == Element::kF16 ? Storage::kF16 : Storage::kBF16);
            const double value = panel[row * kPanelLanes + lane];
            wrong += std::isnan(gold) ? !std::isnan(value) : value != gold;
          } else {
            if (element == Element::kInt16) in = static_cast<std::uint32_t>(static_cast<std::int16_t>(in));
            if (element == Element::kInt8) in = static_cast<std::uint32_t>(static_cast<std::int8_t>(in));
            wrong += in != out;
          }
        }
      }
      ASSERT_EQ(wrong, 0) << "element " << static_cast<int>(element) << " rows " << rows;
      ASSERT_TRUE(panel.guard_intact());
    }
  }
  munmap(base, 2 * kPanelLanes * kPage);
}

}  // namespace
}  // namespace attnjit::cpu
