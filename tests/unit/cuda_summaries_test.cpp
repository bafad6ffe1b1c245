// The kernel that summarises captured tensors, run on the host, against what compiler::TileSummary says of tables.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <random>
#include <utility>
#include <vector>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/cuda/summaries.h"
#include "support/cuda_emulation.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
namespace attnjit::cuda {
using namespace emulation;
template <typename T>
T exchange(T x, int mask) {
  const unsigned source = lane() ^ static_cast<unsigned>(mask);
  const auto bits = static_cast<std::uint64_t>(x);
  const std::uint64_t low = Machine::get().exchange(static_cast<std::uint32_t>(bits), source);
  const std::uint64_t high = Machine::get().exchange(static_cast<std::uint32_t>(bits >> 32), source);
  return static_cast<T>(high << 32 | low);
}
}  // namespace attnjit::cuda
#include "kernels_templates/cuda/summaries.cuh"
#pragma GCC diagnostic pop

namespace attnjit::cuda {
namespace {

// Rows of `outer` times `inner`, values `stride` apart.
template <typename T>
struct Values {
  SummaryType type;
  int outer, inner, extent, stride;
  std::vector<T> data;
  std::vector<long long> wide = {};
  std::vector<int> narrow = {};

  static Values random(SummaryType type, int outer, int inner, int extent, int stride) {
    Values made{type, outer, inner, extent, stride, {}};
    std::mt19937_64 bits(static_cast<unsigned>(extent));
    made.data.resize(static_cast<std::size_t>(outer) * static_cast<std::size_t>(inner * extent * stride));
    for (T& value : made.data) value = static_cast<T>(bits());
    return made;
  }
  long long at(int row, int i) const {
    const T value = data[static_cast<std::size_t>((static_cast<long long>(row) * extent + i) * stride)];
    return type == SummaryType::kBool ? value != 0 : static_cast<long long>(value);
  }
  SummaryTable table(int first_row) {
    int blocks = (extent + kSummaryBlockValues - 1) / kSummaryBlockValues, levels = 1;
    while (1 << levels <= blocks) ++levels;
    const auto size = static_cast<std::size_t>(4ll * outer * inner * levels * blocks);
    const bool is_wide = type == SummaryType::kInt64;
    wide.assign(is_wide ? size : 0, 77);
    narrow.assign(is_wide ? 0 : size, 77);
    const long long row = static_cast<long long>(extent) * stride;
    return {.data = data.data(),
            .table = is_wide ? static_cast<void*>(wide.data()) : narrow.data(),
            .stride = stride,
            .row_stride = {row * inner, row},
            .extent = extent,
            .inner = inner,
            .blocks = blocks,
            .levels = levels,
            .first_row = first_row,
            .type = type};
  }
  void expect(const SummaryTable& of) const {
    std::size_t next = 0;
    for (int row = 0; row < outer * inner; ++row) {
      std::vector<std::pair<long long, long long>> ends;  // of each block
      for (int i = 0; i < extent; ++i) {
        const long long value = at(row, i);
        if (i % kSummaryBlockValues == 0) ends.emplace_back(value, value);
        ends.back() = {std::min(ends.back().first, value), std::max(ends.back().second, value)};
      }
      for (int part = 0; part < 4; ++part) {
        for (int level = 0; level < of.levels; ++level) {
          for (int block = 0; block < of.blocks; ++block) {
            const int span = 1 << level;
            const int first = part % 2 == 0 ? block : std::max(block - span + 1, 0);
            const int last = part % 2 == 0 ? std::min(block + span, of.blocks) - 1 : block;
            const auto begin = ends.begin() + first, end = ends.begin() + last + 1;
            const auto by_least = [](const auto& a, const auto& b) { return a.first < b.first; };
            const auto by_largest = [](const auto& a, const auto& b) { return a.second < b.second; };
            const long long expected = part < 2 ? std::min_element(begin, end, by_least)->first
                                                : std::max_element(begin, end, by_largest)->second;
            const long long found = type == SummaryType::kInt64 ? wide[next] : narrow[next];
            ASSERT_EQ(found, expected) << "row " << row << " part " << part << " level " << level << " block " << block;
            ++next;
          }
        }
      }
    }
  }
};

TEST(CudaSummaries, AllTypesAndLengths) {
  for (const bool backwards : {false, true}) {
    Machine::get().backwards = backwards;
    // Levels of the longest find no room in shared memory.
    for (const int extent : {1, 31, 32, 33, 100, 700, 33000}) {
      if (backwards && extent == 33000) continue;
      SCOPED_TRACE(extent);
      auto bools = Values<std::uint8_t>::random(SummaryType::kBool, 1, 2, extent, 1);
      auto bytes = Values<std::uint8_t>::random(SummaryType::kUInt8, 1, 1, extent, 1);
      auto chars = Values<std::int8_t>::random(SummaryType::kInt8, 1, 1, extent, 3);
      auto shorts = Values<std::int16_t>::random(SummaryType::kInt16, 2, 1, extent, 1);
      auto ints = Values<std::int32_t>::random(SummaryType::kInt32, 2, 2, extent, 2);
      auto longs = Values<std::int64_t>::random(SummaryType::kInt64, 1, 1, extent, 1);
      SummaryParams params = {};
      params.count = 6;
      int counter = 5;
      params.counter = &counter;
      params.tables[0] = bools.table(0);
      params.tables[1] = bytes.table(2);
      params.tables[2] = chars.table(3);
      params.tables[3] = shorts.table(4);
      params.tables[4] = ints.table(6);
      params.tables[5] = longs.table(10);
      Machine::get().run({11, 1, 1}, kSummaryThreads, [&] { attnjit_summarize(params); });
      EXPECT_EQ(counter, 0);
      bools.expect(params.tables[0]);
      bytes.expect(params.tables[1]);
      chars.expect(params.tables[2]);
      shorts.expect(params.tables[3]);
      ints.expect(params.tables[4]);
      longs.expect(params.tables[5]);
    }
  }
  Machine::get().backwards = false;
}

}  // namespace
}  // namespace attnjit::cuda
