// The sm80 family's configurations: they fit every architecture, and what they are chosen by; and kernel parameters.
#include "runtime/sm80_backend.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <numbers>
#include <set>
#include <string>
#include <vector>

#include "runtime/cuda_call.h"

namespace attnjit::runtime {
namespace {

using sm80::Element;

Sm80Problem problem_of(Element element, int head_dim, int arch) {
  return {.element = element,
          .head_dim = head_dim,
          .head_dim_v = head_dim,
          .seqlen_q = 4096,
          .seqlen_kv = 4096,
          .arch = arch,
          .max_shared_memory = max_shared_memory(arch)};
}

// Tiles of 0 where there is no configuration.
sm80::ForwardConfig chosen(const Sm80Problem& problem) {
  return choose_config(problem).value_or(sm80::ForwardConfig{.tile_m = 0, .tile_n = 0});
}

// What the template asks of a configuration, and what the architecture has; written down apart from the code that
// chooses.
TEST(Sm80Backend, ConfigurationsFitEveryArchitecture) {
  const struct {
    int arch, kib;
  } archs[] = {{80, 163}, {86, 99}, {87, 163}, {89, 99}, {90, 227}, {100, 227}, {120, 99}, {121, 99}};
  for (const auto& [arch, kib] : archs) {
    EXPECT_EQ(max_shared_memory(arch), static_cast<std::size_t>(kib) * 1024) << arch;
    for (const Element element : {Element::kF32, Element::kF16, Element::kBF16}) {
      for (int head_dim = 1; head_dim <= 256; ++head_dim) {
        for (const compiler::ModDemand demand :
             {compiler::ModDemand::kNone, compiler::ModDemand::kBusy, compiler::ModDemand::kDense}) {
          for (const std::int64_t seqlen_q : {1, 4096}) {
            Sm80Problem problem = problem_of(element, head_dim, arch);
            problem.head_dim_v = 257 - head_dim;
            problem.demand = demand;
            problem.seqlen_q = seqlen_q;
            const sm80::ForwardConfig config = chosen(problem);
            ASSERT_GT(config.tile_m, 0) << arch << ' ' << head_dim;
            EXPECT_LE(sm80::forward_shared_memory(config), kib * 1024) << arch << ' ' << head_dim;
            EXPECT_EQ(config.tile_m % (16 * config.warps), 0);
            EXPECT_EQ(config.tile_n % 16, 0);
            EXPECT_TRUE(config.stages == 1 || config.stages == 2);
            EXPECT_EQ(config.head_dim, head_dim);
            EXPECT_EQ(config.head_dim_v, 257 - head_dim);
            EXPECT_EQ(config.element, element);
          }
        }
      }
    }
  }
}

TEST(Sm80Backend, WhatAConfigurationIsChosenBy) {
  // A measured row, by head dims that are padded to it.
  for (const int head_dim : {49, 64}) {
    const sm80::ForwardConfig config = chosen(problem_of(Element::kBF16, head_dim, 90));
    EXPECT_EQ(config.tile_m, 128);
    EXPECT_EQ(config.tile_n, 64);
    EXPECT_EQ(config.stages, 2);
    EXPECT_TRUE(config.q_in_registers);
  }
  Sm80Problem problem = problem_of(Element::kBF16, 128, 90);
  EXPECT_EQ(chosen(problem).tile_n, 64);
  problem.demand = compiler::ModDemand::kBusy;
  EXPECT_EQ(chosen(problem).tile_n, 32);
  // The larger of both head dims counts.
  problem.demand = compiler::ModDemand::kNone;
  problem.head_dim = 64;
  EXPECT_EQ(chosen(problem).stages, 1);
  problem.head_dim_v = 64;
  EXPECT_EQ(chosen(problem).stages, 2);
  // Few queries: the smaller tile that still holds them all.
  problem.seqlen_q = 64;
  EXPECT_EQ(chosen(problem).tile_m, 64);
  problem.seqlen_q = 65;
  EXPECT_EQ(chosen(problem).tile_m, 128);
  // 99 KiB are not 227.
  EXPECT_EQ(chosen(problem_of(Element::kF32, 64, 90)).tile_m, 128);
  EXPECT_EQ(chosen(problem_of(Element::kF32, 64, 86)).tile_m, 64);
  problem.load_bytes = 4;
  problem.store_bytes = 8;
  EXPECT_EQ(chosen(problem).load_bytes, 4);
  EXPECT_EQ(chosen(problem).store_bytes, 8);
  problem.max_shared_memory = 1000;
  EXPECT_FALSE(choose_config(problem));
}

TEST(Sm80Backend, CandidatesToTime) {
  for (const int arch : {80, 86, 90, 120}) {
    for (const Element element : {Element::kF32, Element::kBF16}) {
      for (const int head_dim : {16, 64, 96, 128, 192, 256}) {
        const Sm80Problem problem = problem_of(element, head_dim, arch);
        const std::vector<sm80::ForwardConfig> candidates = candidate_configs(problem);
        // The largest f32 tiles leave no room for another.
        const bool one_fits = element == Element::kF32 && head_dim == 256;
        ASSERT_GE(candidates.size(), one_fits ? 1u : 2u) << arch << ' ' << head_dim;
        EXPECT_LE(candidates.size(), 6u);
        EXPECT_EQ(config_name(candidates[0]), config_name(chosen(problem)));
        std::set<std::string> names;
        for (const sm80::ForwardConfig& config : candidates) {
          EXPECT_TRUE(names.insert(config_name(config)).second) << config_name(config);
          EXPECT_LE(sm80::forward_shared_memory(config), max_shared_memory(arch));
          EXPECT_EQ(config.tile_n % 16, 0);
          EXPECT_TRUE(config.stages == 1 || config.stages == 2);
          EXPECT_EQ(config.head_dim, head_dim);
          EXPECT_EQ(config.load_bytes, problem.load_bytes);
        }
      }
    }
  }
  Sm80Problem nothing = problem_of(Element::kF32, 64, 90);
  nothing.max_shared_memory = 1000;
  EXPECT_TRUE(candidate_configs(nothing).empty());
  EXPECT_EQ(config_name(chosen(problem_of(Element::kBF16, 64, 90))), "128 x 64, 4 warps, 2 stages, Q in registers");
}

TEST(Sm80Backend, Parameters) {
  ForwardCall call;
  float q = 0, k = 0, v = 0, o = 0, lse = 0;
  call.q = {.data = &q, .dtype = dsl::DType::kF32, .shape = {2, 8, 100, 64}, .stride = {51200, 6400, 64, 1}};
  call.k = {.data = &k, .dtype = dsl::DType::kF32, .shape = {2, 4, 200, 64}, .stride = {0, 12800, 65, 1}};
  call.v = {
      .data = &v, .dtype = dsl::DType::kF32, .shape = {2, 4, 200, 32}, .stride = {std::int64_t{1} << 40, 1, 2, 1}};
  call.o = {.data = &o, .dtype = dsl::DType::kF32, .shape = {2, 8, 100, 32}, .stride = {25600, 3200, 32, 1}};
  call.lse = {.data = &lse, .stride = {800, 100, 1}};
  call.scale = 0.125f;
  const std::int16_t small = -3;
  const float table[6] = {};
  dsl::CaptureView captures[2];
  captures[0] = {.data = &small, .dtype = dsl::DType::kInt16, .rank = 0};
  captures[1] = {.data = table, .dtype = dsl::DType::kF32, .rank = 2, .extent = {2, 3}, .stride = {3, 1}};
  call.captures = captures;
  call.num_captures = 2;
  call.host_scalars = 1;

  const cuda::ForwardParams params = forward_params(call, std::numbers::log2e);
  EXPECT_EQ(params.q, &q);
  EXPECT_EQ(params.o, &o);
  EXPECT_EQ(params.lse, &lse);
  EXPECT_EQ(params.row_max, nullptr);
  EXPECT_EQ(params.k_stride[0], 0);
  EXPECT_EQ(params.k_stride[2], 65);
  EXPECT_EQ(params.v_stride[0], std::int64_t{1} << 40);
  EXPECT_EQ(params.lse_stride[1], 100);
  EXPECT_EQ(params.batch, 2);
  EXPECT_EQ(params.num_heads, 8);
  EXPECT_EQ(params.num_heads_kv, 4);
  EXPECT_EQ(params.seqlen_q, 100);
  EXPECT_EQ(params.seqlen_kv, 200);
  EXPECT_FLOAT_EQ(params.score_scale, 0.125f * std::numbers::log2e_v<float>);
  EXPECT_EQ(params.captured[0].data, nullptr);
  EXPECT_EQ(params.captured[0].value, 0xfffdu) << "the element's own bytes, and nothing above them";
  EXPECT_EQ(params.captured[1].data, table);
  EXPECT_EQ(params.captured[1].extent[1], 3);
  EXPECT_EQ(params.captured[1].stride[0], 3);
  call.host_scalars = 0;
  EXPECT_EQ(forward_params(call, 1.0).captured[0].data, &small);

  EXPECT_EQ(params.score_prescale, 1.0f);

  // One row of 20 elements is aligned to 16 bytes; the rows behind it, which a tile's copies skip, have to be, too.
  ForwardCall short_call = call;
  short_call.q.shape[2] = short_call.k.shape[2] = short_call.v.shape[2] = 1;
  short_call.q.stride[2] = short_call.k.stride[2] = short_call.v.stride[2] = 20;
  const cuda::ForwardParams one_row = forward_params(short_call, 1.0);
  EXPECT_EQ(one_row.q_stride[2], 0);
  EXPECT_EQ(one_row.k_stride[2], 0);
  EXPECT_EQ(one_row.v_stride[2], 0);
  EXPECT_EQ(one_row.q_stride[1], 6400);

  // Beyond the range of floats, below zero and at it, two floats hold the scale, of which the second is positive.
  for (const float scale : {-3e38f, 3e38f, -0.25f, 1e-38f, 0.0f}) {
    call.scale = scale;
    const cuda::ForwardParams scaled = forward_params(call, std::numbers::log2e);
    EXPECT_TRUE(std::isnormal(scaled.score_scale) && scaled.score_scale > 0) << scale;
    const double product = static_cast<double>(scaled.score_prescale) * scaled.score_scale;
    const double expected = static_cast<double>(scale) * std::numbers::log2e;
    EXPECT_NEAR(product, expected, 1e-7 * std::fabs(expected)) << scale;
  }
}

}  // namespace
}  // namespace attnjit::runtime
