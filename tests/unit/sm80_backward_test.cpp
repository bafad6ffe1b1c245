// The sm80 family's backward: its configurations fit every architecture, what they are chosen by, and its workspace.
#include "runtime/sm80_backward.h"

#include <gtest/gtest.h>

#include <vector>

namespace attnjit::runtime {
namespace {

using compiler::ModDemand;
using compiler::SinkFacts;
using compiler::SinkLevel;
using sm80::Element;

Sm80BackwardProblem problem_of(Element element, int head_dim, int arch) {
  return {.element = element,
          .head_dim = head_dim,
          .head_dim_v = head_dim,
          .max_shared_memory = max_shared_memory(arch),
          .sinks = {}};
}

// One more of a level than anybody's expression has.
const std::vector<SinkFacts> kManySinks = {{.level = SinkLevel::kRow},      {.level = SinkLevel::kRow},
                                           {.level = SinkLevel::kDiagonal}, {.level = SinkLevel::kElement},
                                           {.level = SinkLevel::kColumn},   {.level = SinkLevel::kBlock}};

// What the template asks of a configuration, written down apart from the code that chooses.
TEST(Sm80Backward, ConfigurationsFitEveryArchitecture) {
  for (const int arch : {80, 86, 87, 89, 90, 100, 120, 121}) {
    for (const Element element : {Element::kF32, Element::kF16, Element::kBF16}) {
      for (int head_dim = 1; head_dim <= 256; ++head_dim) {
        for (const ModDemand demand : {ModDemand::kNone, ModDemand::kBusy, ModDemand::kDense}) {
          for (const bool many_sinks : {false, true}) {
            Sm80BackwardProblem problem = problem_of(element, head_dim, arch);
            problem.head_dim_v = 257 - head_dim;
            problem.demand = demand;
            if (many_sinks) problem.sinks = kManySinks;
            const auto config = choose_backward_config(problem);
            ASSERT_TRUE(config) << arch << ' ' << head_dim << ' ' << many_sinks;
            EXPECT_LE(backward_shared_memory(*config, problem.sinks), max_shared_memory(arch));
            EXPECT_LE(static_cast<std::size_t>(sm80::backward_dq_shared_memory(*config)), max_shared_memory(arch));
            EXPECT_EQ(config->tile_n % (16 * config->warps), 0);
            EXPECT_EQ(config->tile_m % config->step_m, 0);
            EXPECT_EQ(config->step_m % 16, 0);
            EXPECT_TRUE(config->stages == 1 || config->stages == 2);
            EXPECT_EQ(config->head_dim, head_dim);
            EXPECT_EQ(config->head_dim_v, 257 - head_dim);
            EXPECT_EQ(config->element, element);
            // Every feature belongs to a slice, and slices start at whole steps of 16.
            for (const int features : {head_dim, 257 - head_dim}) {
              EXPECT_GE(sm80::sliced(*config, features), features);
              EXPECT_EQ(sm80::slice_width(*config, features) % 16, 0);
            }
          }
        }
      }
    }
  }
}

TEST(Sm80Backward, WhatAConfigurationIsChosenBy) {
  Sm80BackwardProblem problem = problem_of(Element::kBF16, 128, 90);
  const auto config = choose_backward_config(problem);
  ASSERT_TRUE(config);
  EXPECT_EQ(config->tile_n, 128);
  EXPECT_EQ(config->step_m, 64);
  EXPECT_EQ(config->slices, 1);
  problem.demand = ModDemand::kDense;
  EXPECT_LT(choose_backward_config(problem)->step_m, 64);
  EXPECT_EQ(choose_backward_config(problem)->stages, 2);
  problem.max_shared_memory = max_shared_memory(86);
  EXPECT_EQ(choose_backward_config(problem)->stages, 1);
  problem.max_shared_memory = 1024;
  EXPECT_FALSE(choose_backward_config(problem));
  // Accumulators of 256 features and more than one element's type.
  EXPECT_GT(choose_backward_config(problem_of(Element::kF16, 129, 90))->slices, 1);
  problem = problem_of(Element::kBF16, 64, 90);
  problem.wants_dk = false;
  problem.deterministic = true;
  problem.load_bytes = 4;
  problem.store_bytes = 2;
  const auto passed_on = choose_backward_config(problem);
  ASSERT_TRUE(passed_on);
  EXPECT_FALSE(passed_on->wants_dk);
  EXPECT_TRUE(passed_on->wants_dq);
  EXPECT_TRUE(passed_on->deterministic);
  EXPECT_EQ(passed_on->load_bytes, 4);
  EXPECT_EQ(passed_on->store_bytes, 2);
}

TEST(Sm80Backward, Workspace) {
  Signature s;
  s.batch = 2;
  s.num_heads = 6;
  s.num_heads_kv = 3;
  s.seqlen_q = 100;
  s.seqlen_kv = 1000;
  sm80::BackwardConfig config{.head_dim = 72, .head_dim_v = 40, .tile_m = 64, .tile_n = 128};
  const std::size_t rows = 2 * 6 * 128;
  const Sm80BackwardWorkspace plain = backward_workspace(s, config, 100, 512);
  EXPECT_EQ(plain.splits, 1);
  EXPECT_GE(plain.row_delta, rows * 4);
  EXPECT_GE(plain.dq_sum, plain.row_delta + rows * 4);
  EXPECT_GE(plain.sums, plain.dq_sum + rows * 80 * 4);  // features in steps of 16
  EXPECT_EQ(plain.size, plain.sums + 512);
  for (const std::size_t offset : {plain.row_delta, plain.dq_sum, plain.sums}) EXPECT_EQ(offset % 256, 0u);

  config.deterministic = true;
  const Sm80BackwardWorkspace split = backward_workspace(s, config, 100, 0);
  EXPECT_EQ(split.splits, 8);  // as many as there are tiles of keys
  EXPECT_GE(split.sums, split.dq_sum + 8 * rows * 80 * 4);
  EXPECT_EQ(backward_workspace(s, config, 6, 0).splits, 2);
  s.batch = 1000;
  EXPECT_EQ(backward_workspace(s, config, 100, 0).splits, 1);
  s.batch = 2;
  s.seqlen_kv = 0;
  EXPECT_EQ(backward_workspace(s, config, 100, 0).splits, 1);

  config.wants_dq = false;
  s.seqlen_kv = 1000;
  const Sm80BackwardWorkspace none = backward_workspace(s, config, 100, 0);
  EXPECT_EQ(none.sums, none.dq_sum);
  EXPECT_EQ(none.splits, 1);  // nothing to split
}

}  // namespace
}  // namespace attnjit::runtime
