// What blocks of the sm80 kernels walk over and in which order, run on the host.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <vector>

#include "kernels_templates/cuda/params.h"
#include "support/cuda_emulation.h"

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wunused-parameter"
namespace attnjit::cuda {
using namespace emulation;
}  // namespace attnjit::cuda
#include "kernels_templates/cuda/mod_defaults.cuh"

namespace attnjit::cuda {
namespace {

// What the mod below says, and what it was asked.
struct Facts {
  int rows = 1;  // of a tile
  Tile all;
  bool over_keys = true;
  std::vector<TileKind> kinds;  // by tile of what is walked over
  IndexRange range;
  bool asked_beyond = false;

  TileKind of(const Tile& tile) {
    const int origin = over_keys ? all.kv_first : all.q_first;
    const int first = over_keys ? tile.kv_first : tile.q_first, last = over_keys ? tile.kv_last : tile.q_last;
    const int end = over_keys ? all.kv_last : all.q_last;
    const bool own_kept = over_keys ? tile.q_first == all.q_first && tile.q_last == all.q_last
                                    : tile.kv_first == all.kv_first && tile.kv_last == all.kv_last;
    if (!own_kept || first < origin || first > end || (first - origin) % rows != 0 ||
        last != std::min(first + rows - 1, end)) {
      asked_beyond = true;
      return TileKind::kPartial;
    }
    return kinds[static_cast<std::size_t>((first - origin) / rows)];
  }
};
Facts facts;

struct Mod : ModDefaults {
  static constexpr bool kKnowsTiles = true, kKnowsRanges = true;
  static TileKind tile_kind(const CapturedView*, const Tile& tile) { return facts.of(tile); }
  static IndexRange kv_range(const CapturedView*, const Tile&) { return facts.range; }
  static IndexRange q_range(const CapturedView*, const Tile&) { return facts.range; }
};

}  // namespace
}  // namespace attnjit::cuda

namespace attnjit::sm80 {
using namespace emulation;
}  // namespace attnjit::sm80
#include "kernels_templates/sm80/walk.cuh"
#pragma GCC diagnostic pop

namespace attnjit::sm80 {
namespace {

using cuda::facts;

constexpr int kRows = 16;
constexpr unsigned kThreads = 64;

// Every thread's steps.
template <bool kOverKeys>
std::vector<std::vector<Step>> walked(int length) {
  std::vector<std::vector<Step>> all(kThreads);
  emulation::Machine::get().run({1, 1, 1}, kThreads, [&] {
    const auto whole = [] { return facts.all; };
    Walk<kOverKeys, kRows, decltype(whole)> walk(nullptr, length, whole);
    std::vector<Step>& steps = all[emulation::threadIdx.x];
    for (Step step = walk.first(); walk.has(step); step = walk.after(step)) steps.push_back(step);
  });
  return all;
}

template <bool kOverKeys>
void expect_walk(std::mt19937& random, int tiles, int missing) {
  const int length = tiles * kRows - missing, origin = 1000 + static_cast<int>(random() % 100);
  facts = {.rows = kRows,
           .all = {.b = 0, .h_first = 3, .h_last = 3, .q_first = 7, .q_last = 9, .kv_first = 7, .kv_last = 9},
           .over_keys = kOverKeys,
           .kinds = {},
           .range = {origin, origin + length - 1}};
  (kOverKeys ? facts.all.kv_first : facts.all.q_first) = origin;
  (kOverKeys ? facts.all.kv_last : facts.all.q_last) = origin + length - 1;
  const unsigned skipped = random() % 5;  // of four
  for (int i = 0; i < tiles; ++i) {
    facts.kinds.push_back(random() % 4 < skipped ? cuda::TileKind::kSkip
                          : random() % 2 == 0    ? cuda::TileKind::kFull
                                                 : cuda::TileKind::kPartial);
  }
  if (length > 0 && random() % 2 == 0) {
    facts.range.first += static_cast<int>(random() % static_cast<unsigned>(length));
    facts.range.last -= static_cast<int>(random() % static_cast<unsigned>(length));
  }
  std::vector<Step> expected;
  for (int i = 0; i < tiles; ++i) {
    const cuda::TileKind kind = facts.kinds[static_cast<std::size_t>(i)];
    const int first = origin + i * kRows;
    if (facts.range.first > facts.range.last || facts.range.last < first || facts.range.first >= first + kRows)
      continue;
    if (kind != cuda::TileKind::kSkip) expected.push_back({i, kind == cuda::TileKind::kFull});
  }
  const auto found = walked<kOverKeys>(length);
  EXPECT_FALSE(facts.asked_beyond);
  for (const std::vector<Step>& steps : found) {
    ASSERT_EQ(steps.size(), expected.size());
    for (std::size_t i = 0; i < steps.size(); ++i) {
      EXPECT_EQ(steps[i].tile, expected[i].tile);
      EXPECT_EQ(steps[i].full, expected[i].full);
    }
  }
}

TEST(Sm80Walk, IsOverWhatTheMaskKeeps) {
  std::mt19937 random(1);
  for (const int tiles : {0, 1, 2, 31, 32, 33, 64, 65, 150}) {
    for (int round = 0; round < 12; ++round) {
      SCOPED_TRACE(testing::Message() << tiles << " tiles, round " << round);
      const int missing = tiles == 0 ? 0 : static_cast<int>(random() % kRows);
      expect_walk<true>(random, tiles, missing);
      expect_walk<false>(random, tiles, missing);
      if (testing::Test::HasFailure()) return;
    }
  }
}

// Each tile of each head once; of each section's heads the same tile side by side, from the first to the last.
TEST(Sm80Walk, BlocksAreInSections) {
  constexpr long long kMega = 1 << 20;
  for (const int heads : {1, 6, 16, 96}) {
    for (const int group : {1, 2, 3}) {
      if (heads % group != 0) continue;
      for (const int tiles : {1, 5, 32}) {
        for (const long long head_bytes : {64ll, kMega, 10 * kMega, 1000 * kMega}) {
          const long long fitting = std::max(32 * kMega / head_bytes, 1ll);
          const int section = static_cast<int>(std::min<long long>(fitting, heads / group)) * group;
          const int blocks = heads * tiles;
          std::vector<int> seen(static_cast<std::size_t>(blocks));
          int tile_before = 0, section_before = 0;
          for (int index = 0; index < blocks; ++index) {
            const HeadTile at = place_in_order(index, heads, tiles, head_bytes, group);
            ASSERT_TRUE(at.head >= 0 && at.head < heads && at.tile >= 0 && at.tile < tiles);
            const int block = at.head * tiles + at.tile;
            ++seen[static_cast<std::size_t>(block)];
            const int section_now = at.head / section;
            EXPECT_TRUE(section_now == section_before ? at.tile >= tile_before : section_now == section_before + 1);
            section_before = section_now;
            tile_before = at.tile;
          }
          EXPECT_EQ(std::ranges::count(seen, 1), blocks);
        }
      }
    }
  }
}

TEST(Sm80Walk, BlocksShareTilesBackAndForth) {
  for (const int blocks : {1, 2, 3, 16}) {
    for (int tiles = blocks; tiles < 5 * blocks; ++tiles) {
      std::vector<int> seen(static_cast<std::size_t>(tiles));
      std::vector<int> work;  // where tile number i costs tiles - i
      for (int block = 0; block < blocks; ++block) {
        int sum = 0;
        for (int tile = block; tile < tiles; tile = tile_after(tile, block, blocks)) {
          ++seen[static_cast<std::size_t>(tile)];
          sum += tiles - tile;
        }
        work.push_back(sum);
      }
      EXPECT_EQ(std::ranges::count(seen, 1), tiles);
      if (tiles % (2 * blocks) == 0) EXPECT_EQ(*std::ranges::min_element(work), *std::ranges::max_element(work));
    }
  }
}

}  // namespace
}  // namespace attnjit::sm80
