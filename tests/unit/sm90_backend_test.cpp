// The sm90 family's configurations: they fit the architecture, and what they are chosen by.
#include "runtime/sm90_backend.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <optional>
#include <random>
#include <set>
#include <string>
#include <utility>
#include <vector>

namespace attnjit::runtime {
namespace {

using sm90::Element;

constexpr int kSharedMemory = 227 * 1024;

Sm90Problem problem_of(int head_dim, int head_dim_v) {
  return {.head_dim = head_dim,
          .head_dim_v = head_dim_v,
          .heads = 256,
          .seqlen_q = 4096,
          .max_shared_memory = max_shared_memory(90)};
}

// Warpgroups of 0 where there is no configuration.
sm90::ForwardConfig chosen(const Sm90Problem& problem) {
  return choose_config(problem).value_or(sm90::ForwardConfig{.warpgroups = 0});
}

// What the template asks of a configuration, and what the architecture has; written down apart from the code that
// chooses.
void expect_possible(const sm90::ForwardConfig& config, const Sm90Problem& problem) {
  SCOPED_TRACE(config_name(config) + ' ' + std::to_string(problem.head_dim) + ' ' + std::to_string(problem.head_dim_v));
  EXPECT_LE(sm90::forward_shared_memory(config), kSharedMemory);
  EXPECT_GE(config.warpgroups, config.ping_pong ? 2 : 1);
  EXPECT_LE(config.warpgroups, 4);
  EXPECT_EQ(sm90::threads(config), 128 * (config.warpgroups + 1));
  EXPECT_GE(config.stages, 2);
  EXPECT_EQ(config.tile_n % 16, 0);
  EXPECT_GE(config.tile_n, 32);
  EXPECT_LE(config.tile_n, 256);
  // Of scores, probabilities and O.
  const int registers =
      config.tile_n / 2 + config.tile_n / 4 + sm90::kRowsOfWarpgroup * sm90::padded(config.head_dim_v) / 128;
  EXPECT_LE(registers, config.warpgroups <= 2 ? 200 : config.warpgroups == 3 ? 128 : 88);
  EXPECT_EQ(config.head_dim, problem.head_dim);
  EXPECT_EQ(config.head_dim_v, problem.head_dim_v);
  EXPECT_EQ(config.element, problem.element);
  EXPECT_EQ(config.frozen, !problem.has_row_max);
}

constexpr int kMaxInt = std::numeric_limits<int>::max();

void expect_exact(int divisor, int dividend) {
  const sm90::Divisor by = sm90::make_divisor(divisor);
  ASSERT_EQ(static_cast<int>(by.divisor), divisor);
  ASSERT_LE(by.shift, 62) << divisor;
  ASSERT_EQ(sm90::quotient(dividend, by), dividend / divisor) << dividend << " / " << divisor;
}

// The ends, and both sides of every multiple are where a rounded multiplier shows.
TEST(Sm90Backend, QuotientsAreExact) {
  std::mt19937 generator(1);
  const auto divide = [&](int divisor) {
    for (const int dividend : {0, 1, divisor - 1, kMaxInt - 1, kMaxInt}) expect_exact(divisor, dividend);
    const int most = kMaxInt / divisor;
    const auto around = [&](int multiple) {
      for (const int step : {-1, 0, 1}) {
        const auto dividend = static_cast<long long>(multiple) * divisor + step;
        if (dividend >= 0 && dividend <= kMaxInt) expect_exact(divisor, static_cast<int>(dividend));
      }
    };
    around(1);
    around(most);
    for (int i = 0; i < 20; ++i) around(std::uniform_int_distribution(0, most)(generator));
    for (int i = 0; i < 20; ++i) expect_exact(divisor, std::uniform_int_distribution(0, kMaxInt)(generator));
  };
  for (int divisor = 1; divisor <= 3000; ++divisor) divide(divisor);
  for (int bit = 12; bit < 31; ++bit) {
    for (const int step : {-1, 0, 1}) divide((1 << bit) + step);
  }
  for (const int divisor : {kMaxInt, kMaxInt - 1, kMaxInt / 2, kMaxInt / 3}) divide(divisor);
  for (int i = 0; i < 20000; ++i) divide(std::uniform_int_distribution(1, kMaxInt)(generator) >> generator() % 31 | 1);
}

int draw(std::mt19937& generator, int most) { return std::uniform_int_distribution(1, most)(generator); }

// With a mask and without, every tile of every head has one number; with one, a section's last queries come first.
TEST(Sm90Backend, TilesArePlacedOnce) {
  std::mt19937 generator(2);
  for (int i = 0; i < 300; ++i) {
    sm90::ForwardParams params = {};
    params.m_tiles = draw(generator, 40);
    params.section = draw(generator, 6);
    const int heads = params.section * draw(generator, 8);
    params.tiles = heads * params.m_tiles;
    params.by_m_tiles = sm90::make_divisor(params.m_tiles);
    params.by_section_tiles = sm90::make_divisor(params.section * params.m_tiles);
    params.by_section = sm90::make_divisor(params.section);
    for (const auto place_of : {sm90::plain_place, sm90::masked_place}) {
      std::set<std::pair<int, int>> seen;
      int last_section = 0, last_m = params.m_tiles;
      for (int tile = 0; tile < params.tiles; ++tile) {
        const sm90::TilePlace place = place_of(tile, params);
        ASSERT_TRUE(place.head >= 0 && place.head < heads && place.m >= 0 && place.m < params.m_tiles);
        ASSERT_TRUE(seen.emplace(place.head, place.m).second) << tile;
        if (place_of != sm90::masked_place) continue;
        const int section = place.head / params.section;
        ASSERT_GE(section, last_section);
        if (section == last_section) ASSERT_LE(place.m, last_m);
        last_section = section;
        last_m = place.m;
      }
    }
  }
}

// Every tile is some block's, in the list's order; and no block starts one while another is free.
TEST(Sm90Backend, SchedulesHoldEveryTileOnce) {
  std::mt19937 generator(3);
  for (int i = 0; i < 300; ++i) {
    const int blocks = draw(generator, 140);
    std::vector<int> costs(static_cast<std::size_t>(draw(generator, 900)));
    for (int& cost : costs) cost = draw(generator, i % 2 == 0 ? 3 : 100);
    const std::vector<int> schedule = make_schedule(costs, blocks);
    ASSERT_EQ(schedule.size() % static_cast<std::size_t>(blocks), 0u);
    const std::size_t rounds = schedule.size() / static_cast<std::size_t>(blocks);
    std::vector<long long> begins(costs.size(), -1), ends(static_cast<std::size_t>(blocks), 0);
    for (std::size_t block = 0; block < ends.size(); ++block) {
      int last = -1;
      bool done = false;
      for (std::size_t round = 0; round < rounds; ++round) {
        const int tile = schedule[round * ends.size() + block];
        done = done || tile < 0;
        ASSERT_EQ(tile < 0, done) << "a block goes on after its end";
        if (done) continue;
        ASSERT_GT(tile, last);
        last = tile;
        long long& begin = begins.at(static_cast<std::size_t>(tile));
        ASSERT_EQ(begin, -1) << "tile " << tile << " is there twice";
        begin = ends[block];
        ends[block] += costs[static_cast<std::size_t>(tile)];
      }
    }
    for (std::size_t tile = 0; tile < costs.size(); ++tile) {
      ASSERT_GE(begins[tile], tile == 0 ? 0 : begins[tile - 1]) << tile;
      // Whoever ends first is free for what comes last.
      for (const long long end : ends) ASSERT_LE(begins[tile], end) << tile;
    }
  }
}

TEST(Sm90Backend, RunsOfBits) {
  std::mt19937 random(1);
  std::vector<unsigned> all = {1, 0x80000000u, ~0u, ~0u << 1, ~0u >> 1, 6};
  for (int i = 0; i < 1000; ++i) {
    const auto some = random();
    all.push_back(static_cast<unsigned>(some & random()));
  }
  for (const unsigned bits : all) {
    unsigned found = 0;
    for (unsigned left = bits; left != 0;) {
      const sm90::BitRun run = sm90::lowest_run(left);
      ASSERT_GT(run.length, 0);
      ASSERT_LE(run.first + run.length, 32);
      const unsigned of_run = sm90::ones_from(run.first) & ~sm90::ones_from(run.first + run.length);
      ASSERT_EQ(left & of_run, of_run);
      ASSERT_EQ(found & of_run, 0u);
      // As long as it can be.
      if (run.first + run.length < 32) ASSERT_EQ(left >> (run.first + run.length) & 1, 0u);
      found |= of_run;
      left &= sm90::ones_from(run.first + run.length);
    }
    ASSERT_EQ(found, bits);
  }
}

// Warpgroups get through the tiles of a message as the planning warp saw them, of any number behind the last bit.
TEST(Sm90Backend, KindsOfTilesAreReadAsTheyWereWritten) {
  std::mt19937 random(2);
  const auto below = [&](int end) { return static_cast<int>(random() % static_cast<unsigned>(end)); };
  for (int round = 0; round < 20000; ++round) {
    // Kinds come in runs.
    enum Kind { kMasked, kSkipped, kFull, kByRow };
    std::array<Kind, 32> kind = {};
    sm90::Kinds of_32 = {0, 0};
    for (int i = 0; i < 32; ++i) {
      const auto at = static_cast<std::size_t>(i);
      kind[at] = i == 0 || below(4) == 0 ? static_cast<Kind>(below(4)) : kind[at - 1];
      of_32.skipped |= static_cast<unsigned>(kind[at] == kSkipped || kind[at] == kByRow) << i;
      of_32.full |= static_cast<unsigned>(kind[at] == kFull || kind[at] == kByRow) << i;
    }
    const int first = below(32), length = 1 + below(32 - first);
    const sm90::Kinds kinds = sm90::cut_out(of_32, {first, length});
    // A message grows by what is full.
    const bool may_grow = length < 32 || kind[31] == kFull;
    const int count = length + (may_grow && round % 2 == 0 ? below(100) : 0);
    const auto kind_of = [&](int i) {
      return i < length ? kind[static_cast<std::size_t>(first) + static_cast<std::size_t>(i)] : kFull;
    };
    for (int number = 0; number < count;) {
      const int same = sm90::same_from(kinds, number, count);
      ASSERT_GT(same, 0);
      ASSERT_LE(number + same, count);
      const int bit = std::min(number, 31);
      const Kind found = kind_of(number);
      ASSERT_EQ(sm90::is_skipped(kinds, bit), found == kSkipped) << number;
      ASSERT_EQ(sm90::is_full(kinds, bit), found == kFull) << number;
      ASSERT_EQ(sm90::is_by_row(kinds, bit), found == kByRow) << number;
      for (int i = number; i < number + same; ++i) ASSERT_EQ(kind_of(i), found) << i;
      number += same;
      // It stops for a reason.
      ASSERT_TRUE(found == kSkipped || number == count || kind_of(number) != found) << number;
    }
  }
}

TEST(Sm90Backend, ConfigurationsFitForEveryHeadDim) {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 8; head_dim_v <= 256; head_dim_v += 8) {
      for (const bool flag : {false, true}) {
        for (const std::int64_t heads : {1, 256}) {
          Sm90Problem problem = problem_of(head_dim, head_dim_v);
          problem.element = flag ? Element::kF16 : Element::kBF16;
          problem.has_mask = problem.has_row_max = flag;
          problem.has_busy_mask = flag && head_dim % 16 == 0;
          problem.has_dense_mask = flag && head_dim_v % 16 == 0;
          problem.heads = heads;
          ASSERT_GT(chosen(problem).warpgroups, 0) << head_dim << ' ' << head_dim_v;
          expect_possible(chosen(problem), problem);
        }
      }
    }
  }
}

TEST(Sm90Backend, WhatAConfigurationIsChosenBy) {
  // Head dims that are padded to a row of the table; the larger of both counts.
  for (const int head_dim : {8, 56, 64}) {
    EXPECT_EQ(sm90::tile_m(chosen(problem_of(head_dim, 64))), 256);
    EXPECT_EQ(chosen(problem_of(64, head_dim)).tile_n, 64);
  }
  EXPECT_EQ(sm90::tile_m(chosen(problem_of(72, 64))), 128);
  EXPECT_EQ(chosen(problem_of(128, 128)).tile_n, 128);
  EXPECT_EQ(chosen(problem_of(128, 128)).q_buffers, 2);
  EXPECT_EQ(chosen(problem_of(136, 128)).tile_n, 96);
  EXPECT_EQ(chosen(problem_of(64, 256)).tile_n, 64);
  EXPECT_EQ(chosen(problem_of(256, 256)).q_buffers, 1);

  // As few tiles of 256 queries as leave a quarter of the multiprocessors idle: smaller ones. With a mask, any of them.
  Sm90Problem problem = problem_of(64, 64);
  problem.heads = 98;
  problem.seqlen_q = 256;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 128);
  problem.heads = 99;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 256);
  problem.has_mask = true;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 128);
  problem.heads = 132;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 256);
  problem.num_sms = 133;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 128);
  problem.seqlen_q = 257;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 256);

  // Where tiles of 64 queries still find a multiprocessor each, a warpgroup by itself.
  for (const int head_dim : {64, 128, 192, 256}) {
    problem = problem_of(head_dim, head_dim);
    for (const bool has_mask : {false, true}) {
      problem.has_mask = has_mask;
      const auto rows = [&](std::int64_t seqlen_q, std::int64_t heads) {
        problem.seqlen_q = seqlen_q;
        problem.heads = heads;
        return sm90::tile_m(chosen(problem));
      };
      EXPECT_EQ(rows(128, 66), 64) << head_dim;
      EXPECT_EQ(rows(128, 67), 128) << head_dim;
      EXPECT_EQ(rows(64, 131), 64) << head_dim;
      // Nor where there are no rows for more.
      EXPECT_EQ(rows(64, 1000), 64) << head_dim;
      EXPECT_EQ(rows(65, 1000), 128) << head_dim;
      EXPECT_EQ(rows(192, 44), 64) << head_dim;
      EXPECT_EQ(rows(192, 45), 128) << head_dim;
    }
  }

  // Arithmetic in every score takes three warpgroups, where their tiles reach little beyond the queries.
  problem = problem_of(128, 128);
  problem.arithmetic = true;
  problem.seqlen_q = 4096;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 192);
  problem.seqlen_q = 1024;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 128);

  // Masks beside what takes registers, as far as the compiler sees them.
  const auto with = [](int head_dim, compiler::ScoreClass score_class, int reads, compiler::ModDemand demand) {
    Sm90Problem of = problem_of(head_dim, head_dim);
    compiler::EmittedCuda emitted;
    emitted.demand = demand;
    emitted.facts.has_mask = true;
    emitted.facts.score_class = score_class;
    emitted.facts.reads_clamped = reads;
    learn(emitted, &of);
    const sm90::ForwardConfig config = chosen(of);
    return std::pair(sm90::tile_m(config), config.tile_n);
  };
  using compiler::ModDemand, compiler::ScoreClass;
  EXPECT_EQ(with(64, ScoreClass::kIdentity, 2, ModDemand::kBusy), std::pair(256, 64));
  EXPECT_EQ(with(64, ScoreClass::kNonlinear, 0, ModDemand::kBusy), std::pair(256, 64));
  EXPECT_EQ(with(64, ScoreClass::kNonlinear, 2, ModDemand::kBusy), std::pair(128, 64));
  EXPECT_EQ(with(128, ScoreClass::kNonlinear, 2, ModDemand::kBusy), std::pair(128, 128));
  EXPECT_EQ(with(128, ScoreClass::kAffine, 1, ModDemand::kDense), std::pair(128, 112));

  // Four warpgroups take turns but where captured values decide which tiles each of them sees.
  compiler::EmittedCuda documents;
  documents.facts.has_mask = true;
  documents.facts.summaries = {compiler::TileSummary{}};
  for (const int head_dim : {64, 128}) {
    problem = problem_of(head_dim, head_dim);
    EXPECT_TRUE(chosen(problem).ping_pong);
    learn(documents, &problem);
    EXPECT_EQ(chosen(problem).ping_pong, head_dim == 128);
    EXPECT_EQ(sm90::tile_m(chosen(problem)), head_dim == 128 ? 192 : 256);
  }

  problem.max_shared_memory = 1000;
  EXPECT_FALSE(choose_config(problem));
}

// Less shared memory gives a configuration that fits it, or none; never one that does not.
TEST(Sm90Backend, SharedMemoryIsKeptTo) {
  for (int head_dim = 16; head_dim <= 256; head_dim += 16) {
    Sm90Problem problem = problem_of(head_dim, head_dim);
    bool had = false;
    for (std::size_t limit = 0; limit <= max_shared_memory(90); limit += 4096) {
      problem.max_shared_memory = limit;
      const std::optional<sm90::ForwardConfig> config = choose_config(problem);
      EXPECT_TRUE(config || !had) << head_dim << ' ' << limit;
      had = config.has_value();
      if (!config) continue;
      EXPECT_LE(static_cast<std::size_t>(sm90::forward_shared_memory(*config)), limit) << head_dim;
      expect_possible(*config, problem);
    }
    EXPECT_TRUE(had) << head_dim;
  }
}

// The reference of the exponentials stays where it is unless the row maximum is asked for, the mod drifts along the
// keys, or a row of f16 is so long that its sum would be too high in any case.
TEST(Sm90Backend, WhatMakesTheReferenceStay) {
  Sm90Problem problem = problem_of(128, 128);
  const auto with = [&](Element element, std::int64_t seqlen_kv) {
    problem.element = element;
    problem.seqlen_kv = seqlen_kv;
    return chosen(problem).frozen;
  };
  EXPECT_TRUE(with(Element::kF16, 16384));
  EXPECT_FALSE(with(Element::kF16, 16385));
  EXPECT_TRUE(with(Element::kBF16, 1 << 20));
  problem.has_row_max = true;
  EXPECT_FALSE(with(Element::kBF16, 100));
  problem.has_row_max = false;

  // A mask, as far as the compiler sees one, is no reason; drift is.
  compiler::EmittedCuda emitted;
  emitted.facts.has_mask = true;
  learn(emitted, &problem);
  EXPECT_TRUE(problem.has_mask);
  EXPECT_TRUE(with(Element::kBF16, 100));
  emitted.facts.folded = compiler::FoldedFacts{.additive = true, .drifts = true};
  learn(emitted, &problem);
  EXPECT_FALSE(with(Element::kBF16, 100));
  emitted.facts.folded->drifts = false;
  learn(emitted, &problem);
  EXPECT_TRUE(with(Element::kBF16, 100));
}

// Exponentials are left to the FMA units where special functions are what a mod is short of, and without a clamp where
// no two scores of a row are further apart than a float's exponents reach.
TEST(Sm90Backend, ExponentialsByFmas) {
  compiler::EmittedCuda emitted;
  const auto with = [&](int head_dim, std::optional<compiler::ScoreBounds> bounds) {
    Sm90Problem problem = problem_of(head_dim, head_dim);
    emitted.facts.score_bounds = bounds;
    learn(emitted, &problem);
    const sm90::ForwardConfig config = chosen(problem);
    return std::pair(config.fma_exponentials, config.bounded);
  };
  emitted.facts.score_class = compiler::ScoreClass::kNonlinear;
  EXPECT_EQ(with(64, compiler::ScoreBounds{-30.0f, 30.0f}), std::pair(3, true));
  // 120 / log2(e) is 83.18.
  EXPECT_EQ(with(64, compiler::ScoreBounds{-41.5f, 41.5f}), std::pair(3, true));
  EXPECT_EQ(with(64, compiler::ScoreBounds{0.0f, 83.3f}), std::pair(2, false));
  EXPECT_EQ(with(64, std::nullopt), std::pair(2, false));
  EXPECT_EQ(with(128, compiler::ScoreBounds{-30.0f, 30.0f}), std::pair(0, false));
  emitted.demand = compiler::ModDemand::kBusy;
  EXPECT_EQ(with(64, compiler::ScoreBounds{-30.0f, 30.0f}), std::pair(0, false));
  emitted.demand = compiler::ModDemand::kNone;
  emitted.facts.score_class = compiler::ScoreClass::kIdentity;
  EXPECT_EQ(with(64, std::nullopt), std::pair(0, false));
}

TEST(Sm90Backend, CandidatesToTime) {
  for (const int head_dim : {16, 64, 96, 128, 192, 256}) {
    for (const bool has_mask : {false, true}) {
      Sm90Problem problem = problem_of(head_dim, head_dim);
      problem.has_mask = has_mask;
      const std::vector<sm90::ForwardConfig> candidates = candidate_configs(problem);
      ASSERT_GE(candidates.size(), 3u) << head_dim;
      // With many tiles a warpgroup by itself is no candidate.
      for (const sm90::ForwardConfig& config : candidates) EXPECT_GE(config.warpgroups, 2) << head_dim;
      EXPECT_LE(candidates.size(), 6u);
      EXPECT_EQ(config_name(candidates[0]), config_name(chosen(problem)));
      std::set<std::string> names;
      for (const sm90::ForwardConfig& config : candidates) {
        EXPECT_TRUE(names.insert(config_name(config)).second) << config_name(config);
        expect_possible(config, problem);
      }
    }
  }
  Sm90Problem nothing = problem_of(64, 64);
  nothing.max_shared_memory = 1000;
  EXPECT_TRUE(candidate_configs(nothing).empty());
  EXPECT_EQ(config_name(chosen(problem_of(64, 64))), "256 x 64, 4 warpgroups, 4 stages, next Q meanwhile, ping-pong");
  Sm90Problem small = problem_of(64, 64);
  small.heads = small.seqlen_q = 1;
  EXPECT_EQ(config_name(chosen(small)), "64 x 64, 1 warpgroup, 4 stages, next Q meanwhile");
}

}  // namespace
}  // namespace attnjit::runtime
