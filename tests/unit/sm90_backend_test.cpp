// The sm90 family's configurations: they fit the architecture, and what they are chosen by.
#include "runtime/sm90_backend.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
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
  EXPECT_GE(config.warpgroups, 2);
  EXPECT_LE(config.warpgroups, 4);
  EXPECT_EQ(sm90::threads(config), 128 * (config.warpgroups + 1));
  EXPECT_GE(config.stages, 2);
  EXPECT_EQ(config.tile_n % 16, 0);
  EXPECT_GE(config.tile_n, 32);
  EXPECT_LE(config.tile_n, 256);
  // Of scores, probabilities and O.
  const int registers =
      config.tile_n / 2 + config.tile_n / 4 + sm90::kRowsOfWarpgroup * sm90::padded(config.head_dim_v) / 128;
  EXPECT_LE(registers, config.warpgroups == 2 ? 200 : config.warpgroups == 3 ? 128 : 88);
  EXPECT_EQ(config.head_dim, problem.head_dim);
  EXPECT_EQ(config.head_dim_v, problem.head_dim_v);
  EXPECT_EQ(config.element, problem.element);
  EXPECT_EQ(config.frozen, !problem.has_row_max);
}

TEST(Sm90Backend, ConfigurationsFitForEveryHeadDim) {
  for (int head_dim = 8; head_dim <= 256; head_dim += 8) {
    for (int head_dim_v = 8; head_dim_v <= 256; head_dim_v += 8) {
      for (const bool flag : {false, true}) {
        for (const std::int64_t heads : {1, 256}) {
          Sm90Problem problem = problem_of(head_dim, head_dim_v);
          problem.element = flag ? Element::kF16 : Element::kBF16;
          problem.has_mask = problem.has_row_max = flag;
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
  EXPECT_TRUE(chosen(problem_of(128, 128)).o_buffer);
  EXPECT_EQ(chosen(problem_of(136, 128)).tile_n, 96);
  EXPECT_EQ(chosen(problem_of(64, 256)).tile_n, 64);
  EXPECT_FALSE(chosen(problem_of(256, 256)).o_buffer);

  // As few tiles of 256 queries as leave multiprocessors idle: smaller ones.
  Sm90Problem problem = problem_of(64, 64);
  problem.heads = 131;
  problem.seqlen_q = 256;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 128);
  problem.heads = 132;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 256);
  problem.num_sms = 133;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 128);
  problem.seqlen_q = 257;
  EXPECT_EQ(sm90::tile_m(chosen(problem)), 256);

  // A mask, as far as the compiler sees one.
  EXPECT_TRUE(chosen(problem).ping_pong);
  compiler::EmittedCuda emitted;
  emitted.facts.has_mask = true;
  learn(emitted, &problem);
  EXPECT_FALSE(chosen(problem).ping_pong);
  problem.head_dim = 128;
  EXPECT_TRUE(chosen(problem).ping_pong);

  EXPECT_TRUE(chosen(problem).frozen);
  problem.has_row_max = true;
  EXPECT_FALSE(chosen(problem).frozen);
  problem.max_shared_memory = 1000;
  EXPECT_FALSE(choose_config(problem));
}

TEST(Sm90Backend, CandidatesToTime) {
  for (const int head_dim : {16, 64, 96, 128, 192, 256}) {
    for (const bool has_mask : {false, true}) {
      Sm90Problem problem = problem_of(head_dim, head_dim);
      problem.has_mask = has_mask;
      const std::vector<sm90::ForwardConfig> candidates = candidate_configs(problem);
      ASSERT_GE(candidates.size(), 3u) << head_dim;
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
  EXPECT_EQ(config_name(chosen(problem_of(64, 64))), "256 x 64, 4 warpgroups, 3 stages, O apart, ping-pong");
}

}  // namespace
}  // namespace attnjit::runtime
