// What a softmax whose reference lags behind the scores, or is looked for in tiles that hold nothing, gets wrong:
// scores that rise along the keys in either direction, outliers, infinities, rows whose first tiles are masked, shifts
// that are not finite; over lengths at the edges of tiles.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "tests/numerics/check.h"
#include "tests/numerics/expressions.h"
#include "tests/numerics/random_case.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

// No row is left to chance: float32 decides all of them.
void expect_accepted(const Case& spec) {
  const Check check = check_case(spec);
  EXPECT_TRUE(check.accepted) << check.message;
  EXPECT_EQ(check.undecided(), 0) << check.message << "\n  --case '" << to_line(spec) << "'";
}

constexpr Inputs kGrowing[] = {Inputs::kRising,       Inputs::kFalling,  Inputs::kSteep,
                               Inputs::kSteepFalling, Inputs::kOutliers, Inputs::kHugeValues};

struct Row {
  std::string name, fields, backend;
};

std::vector<Row> every(std::initializer_list<std::pair<const char*, const char*>> expressions) {
  std::vector<Row> rows;
  for (const std::string& backend : target().backends) {
    for (const auto& [name, fields] : expressions) rows.push_back({name, fields, backend});
  }
  return rows;
}

std::string name_of(const testing::TestParamInfo<Row>& info) { return info.param.name + "_" + info.param.backend; }

// All kinds of mods that a kernel has a way of its own for, over all kinds of growth.
class NumericsReferenceGrowth : public testing::TestWithParam<Row> {};

TEST_P(NumericsReferenceGrowth, MeetsTheRules) {
  std::uint64_t number = 0;
  for (const Inputs inputs : kGrowing) {
    for (const dsl::DType dtype : {dsl::DType::kBF16, dsl::DType::kF16}) {
      for (const std::int64_t length : {384, 500}) {
        ++number;
        const std::int64_t head_dim = (number + number / 4) % 2 == 0 ? 128 : 64;
        const Case spec = with_expression({.batch = 1,
                                           .num_heads = 2,
                                           .num_heads_kv = 2,
                                           .seqlen_q = number % 3 == 0 ? 200 : 64,
                                           .seqlen_kv = length,
                                           .head_dim = head_dim,
                                           .head_dim_v = head_dim,
                                           .dtype = dtype,
                                           .inputs = inputs,
                                           .backend = GetParam().backend,
                                           .rows = 24,
                                           .seed = number},
                                          GetParam().fields);
        expect_accepted(spec);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(
    All, NumericsReferenceGrowth,
    testing::ValuesIn(
        every({{"Noop", R"_(score_mod="noop")_"},
               {"Causal", R"_(score_mod="causal")_"},
               {"Later", R"_(score_mod="where(kv_idx >= q_idx, score, -inf)")_"},
               {"Rel", R"_(score_mod="rel")_"},
               {"RelUp", R"_(score_mod="score + 0.5 * (kv_idx - q_idx)")_"},
               {"AlibiCausal", R"_(score_mod="alibi_exp2(8)" mask_mod="causal")_"},
               {"Dense", R"_(score_mod="score + t[q_idx, kv_idx]" capture=t:float16:QxK:packed:normal)_"},
               {"Table", R"_(score_mod="score + t[q_idx - kv_idx + 63]" capture=t:float32:300:packed:normal)_"},
               {"Softcap", R"_(score_mod="softcap(30)")_"},
               {"SoftcapEdge", R"_(score_mod="softcap(41)")_"},
               {"SoftcapWide", R"_(score_mod="softcap(400)" mask_mod="kv_idx % 5 != 2")_"},
               {"RowShift", R"_(score_mod="score + 50 * w[h, q_idx]" capture=w:float32:HxQ:packed:normal)_"},
               {"Blocks", R"_(score_mod="document(ids)" capture=ids:int32:K:packed:blocks)_"},
               {"Window", R"_(score_mod="sliding_window(70)")_"},
               {"Keys", R"_(score_mod="score" mask_mod="not drop[kv_idx]" capture=drop:bool:K:packed:normal)_"}})),
    name_of);

// Infinite scores: +inf makes a row NaN, -inf is nothing; both where they are kept only.
TEST(NumericsReference, InfiniteKeys) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod : {"noop", "causal", "score + 0.5 * (q_idx - kv_idx)", "where(kv_idx < 33, score, -inf)",
                                  "where(kv_idx % 50 > 12, score, -inf)", "softcap(20)"}) {
      for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
        expect_accepted(parse(std::string("b=1 hq=4 hkv=2 sq=70 skv=290 d=64 inputs=infinite rows=60 score_mod=\"") +
                              mod + "\" dtype=" + dtype + " backend=" + backend));
      }
    }
  }
}

// Tiles in front that hold nothing for some rows, and for all: masks whose edges are those of tiles and beside them.
class NumericsReferenceMask : public testing::TestWithParam<Row> {};

TEST_P(NumericsReferenceMask, MeetsTheRules) {
  std::uint64_t number = 0;
  for (const auto& [queries, keys] : {std::pair(300, 300), {130, 400}, {400, 130}, {64, 1000}}) {
    ++number;
    const std::int64_t head_dim = number % 2 == 0 ? 128 : 64;
    const Inputs inputs = number % 2 == 0 ? Inputs::kRising : number % 3 == 0 ? Inputs::kOutliers : Inputs::kNormal;
    expect_accepted(with_expression({.batch = 1,
                                     .num_heads = 2,
                                     .num_heads_kv = 1,
                                     .seqlen_q = queries,
                                     .seqlen_kv = keys,
                                     .head_dim = head_dim,
                                     .head_dim_v = head_dim,
                                     .dtype = number % 4 < 2 ? dsl::DType::kBF16 : dsl::DType::kF16,
                                     .inputs = inputs,
                                     .backend = GetParam().backend,
                                     .rows = 48,
                                     .seed = number},
                                    GetParam().fields));
  }
}

std::vector<Row> every_mask() {
  std::vector<Row> rows = every(
      {{"Blocks64", R"_(score_mod="document(ids)" capture=ids:int32:1000:packed:blocks)_"},
       {"Blocks128",
        R"_(score_mod="where(ids[q_idx // 2] == ids[kv_idx // 2], score, -inf)" capture=ids:int32:1000:packed:blocks)_"},
       {"BlocksBeside",
        R"_(score_mod="where(ids[q_idx + 63] == ids[kv_idx + 63], score, -inf)" capture=ids:int32:1100:packed:blocks)_"},
       // Each warpgroup has rows of two blocks, and tiles of keys of one.
       {"BlocksAstride",
        R"_(score_mod="where(ids[q_idx + 17] == ids[kv_idx], score, -inf)" capture=ids:int32:1100:packed:blocks)_"},
       {"BlocksAstride256", R"_(score_mod="where(ids[(q_idx + 17) // 4] == ids[kv_idx // 4], score, -inf)" )_"
                            "capture=ids:int32:1100:packed:blocks"},
       {"BlocksAstrideKnown", R"_(score_mod="where((q_idx + 17) // 64 == kv_idx // 64, score, -inf)")_"},
       {"BlocksBefore",
        R"_(score_mod="where(ids[q_idx + 17] >= ids[kv_idx], score, -inf)" capture=ids:int32:1100:packed:blocks)_"},
       {"Blocks64Known", R"_(score_mod="where(q_idx // 64 == kv_idx // 64, score, -inf)")_"},
       {"Blocks128Known", R"_(score_mod="where(q_idx // 128 == kv_idx // 128, score * 2, -inf)")_"},
       {"Blocks100Known", R"_(score_mod="where(q_idx // 100 == kv_idx // 100, 9 * tanh(score / 9), -inf)")_"},
       {"BlocksReversed", R"_(score_mod="where(ids[q_idx] + ids[kv_idx] == 4, score, -inf)" )_"
                          "capture=ids:int32:1000:packed:blocks"},
       {"Documents", R"_(score_mod="document(ids) and causal()" capture=ids:int32:1000:packed:documents)_"},
       {"Causal", R"_(score_mod="causal")_"},
       {"CausalFromEnd", R"_(score_mod="where(q_idx >= kv_idx - 128, score + 0.25 * h, -inf)")_"},
       {"CausalLate", R"_(score_mod="where(q_idx >= kv_idx + 65, score, -inf)")_"},
       {"Future", R"_(score_mod="where(kv_idx >= q_idx + 64, score, -inf)")_"},
       {"FutureAlibi", R"_(score_mod="where(kv_idx > q_idx, score + 0.5 * (q_idx - kv_idx), -inf)")_"},
       {"Prefix64", R"_(score_mod="prefix_lm(64)")_"},
       {"Prefix129", R"_(score_mod="prefix_lm(129)")_"},
       {"LastKeys", R"_(score_mod="where(kv_idx >= 128 + q_idx % 3, score, -inf)")_"},
       {"OneTileOfRows", R"_(score_mod="where(q_idx // 64 == 1, score, -inf)")_"},
       {"EveryThirdRow", R"_(score_mod="where(q_idx % 3 == 0 or kv_idx < 64, score, -inf)")_"},
       {"MinusInfinity", R"_(score_mod="score - where(kv_idx // 64 % 2 == 0, inf, 0)")_"},
       {"MaskOfScore", R"_(score_mod="where(kv_idx < 200 or h == 0, score, -inf) + 0.125 * (kv_idx - q_idx)")_"}});
  for (const std::string& backend : target().backends) {
    for (const int window : {1, 63, 64, 65, 128, 129, 512}) {
      rows.push_back(
          {fmt::format("Window{}", window), fmt::format("score_mod=\"sliding_window({})\"", window), backend});
      rows.push_back({fmt::format("CausalWindow{}", window),
                      fmt::format("score_mod=\"causal() and sliding_window({})\"", window), backend});
    }
  }
  return rows;
}

INSTANTIATE_TEST_SUITE_P(All, NumericsReferenceMask, testing::ValuesIn(every_mask()), name_of);

// Shifts of whole rows that are not finite: -inf empties a row, +inf and NaN spread over it.
TEST(NumericsReference, ShiftsOfRowsThatAreNotFinite) {
  constexpr const char* kMods[] = {
      R"_(score_mod="score + w[h, q_idx]")_",
      R"_(score_mod="score * 2 - 1000 * w[h, q_idx]")_",
      R"_(score_mod="where(q_idx >= kv_idx, score + w[h, q_idx], -inf)")_",
      R"_(score_mod="where(kv_idx > q_idx, score, -inf) + w[h, q_idx]")_",
      R"_(score_mod="score + 0.5 * (q_idx - kv_idx) + w[h, q_idx]")_",
      R"_(score_mod="score + w[h, q_idx]" mask_mod="(q_idx + kv_idx) % 3 != 0")_",
      R"_(score_mod="5 * tanh(score / 5) + w[h, q_idx]")_",
      R"_(score_mod="score + w[h, 0]")_",
  };
  for (const std::string& backend : target().backends) {
    std::uint64_t seed = 0;
    for (const char* const mod : kMods) {
      for (const char* const shape : {"b=2 hq=4 hkv=2 sq=70 skv=200 d=64", "b=1 hq=8 hkv=8 sq=150 skv=90 d=128"}) {
        ++seed;
        const Case spec = parse(std::string(shape) + " rows=120 dtype=" + (seed % 2 == 0 ? "bfloat16" : "float16") +
                                " backend=" + backend + " inputs=" + (seed % 3 == 0 ? "rising" : "normal") +
                                " seed=" + std::to_string(seed));
        expect_accepted(with_expression(spec, std::string(mod) + " capture=w:float32:HxQ:packed:poison"));
      }
    }
  }
}

// Scores that rise far in tiles that are whole, and farther in one behind them that the mask divides: what was summed
// before must not be lost, nor what was too high be hidden.
TEST(NumericsReference, RisesBehindFullTiles) {
  // Of queries 256 to 319 keys 256 on are at 0. Those of a whole tile before, of 64 or of 128, are at {0}, and those
  // before it, with the window's end among them, at {1}.
  constexpr const char* kMasks[] = {
      "where(q_idx >= kv_idx and q_idx - kv_idx <= 190, 0.01 * score + where(t[kv_idx] >= 4, 0, where(t[kv_idx] >= 3, "
      "{0}, {1})), -inf)",
      "where(q_idx >= kv_idx and q_idx - kv_idx <= 196, 0.01 * score + where(t[kv_idx] >= 4, 0, where(t[kv_idx] >= 2, "
      "{0}, {1})), -inf)"};
  for (const std::string& backend : target().backends) {
    for (const char* const head_dim : {"64", "128"}) {
      for (const char* const mask : kMasks) {
        for (const auto& [full, masked] : {std::pair(83.2, 87.7), {83.2, 95.0}, {40.0, 87.7}, {60.0, 30.0}}) {
          expect_accepted(with_expression(
              parse(std::string("b=1 hq=2 hkv=2 sq=400 skv=400 dtype=bfloat16 rows=200 d=") + head_dim +
                    " dv=" + head_dim + " backend=" + backend),
              "score_mod=\"" + fmt::format(fmt::runtime(mask), full, masked) + "\" capture=t:float32:K:packed:blocks"));
        }
      }
    }
  }
}

// Rows that a captured -inf empties for some tiles, in front or behind: no reference, and no mask that says so.
TEST(NumericsReference, CapturedValuesThatDrop) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod : {"score - where(t[kv_idx] >= 3, inf, 0)", "score - where(t[kv_idx] < 3, inf, 0)",
                                  "where(q_idx >= kv_idx, score - where(t[kv_idx] == 3, inf, 0), -inf)",
                                  "where(q_idx >= kv_idx, score - where(t[kv_idx] + q_idx % 2 == 3, inf, 0), -inf)"}) {
      for (const char* const shape : {"sq=400 skv=400 d=64 dv=64", "sq=100 skv=330 d=128 dv=128"}) {
        expect_accepted(with_expression(
            parse(std::string("b=1 hq=2 hkv=1 dtype=bfloat16 rows=200 ") + shape + " backend=" + backend),
            std::string("score_mod=\"") + mod + "\" capture=t:float32:K:packed:blocks"));
      }
    }
  }
}

constexpr std::int64_t kLengths[] = {1, 37, 64, 65, 127, 128, 129, 191, 192, 193, 256, 257, 1000};

// Every pair of lengths, at the edges of tiles and one to either side.
class NumericsReferenceLength : public testing::TestWithParam<std::int64_t> {};

TEST_P(NumericsReferenceLength, WithEveryOther) {
  constexpr const char* kMods[] = {R"_(score_mod="noop")_", R"_(score_mod="causal")_", R"_(score_mod="rel")_",
                                   R"_(score_mod="score + t[kv_idx]" capture=t:float32:K:packed:normal)_",
                                   R"_(score_mod="softcap(20)" mask_mod="(q_idx + kv_idx) % 3 != 0")_"};
  constexpr std::int64_t kHeadDims[] = {64, 128, 96, 192, 256, 40, 80};
  for (const std::string& backend : target().backends) {
    std::uint64_t number = 0;
    for (const std::int64_t keys : kLengths) {
      ++number;
      const auto at = static_cast<std::size_t>(number) + static_cast<std::size_t>(GetParam());
      expect_accepted(with_expression({.batch = 2,
                                       .num_heads = 2,
                                       .num_heads_kv = 1,
                                       .seqlen_q = GetParam(),
                                       .seqlen_kv = keys,
                                       .head_dim = kHeadDims[at % 7],
                                       .head_dim_v = kHeadDims[at % 3 == 0 ? at / 3 % 7 : at % 7],
                                       .dtype = at % 2 == 0 ? dsl::DType::kBF16 : dsl::DType::kF16,
                                       .layout_q = at % 4 == 1 ? Layout::kBshd : Layout::kAligned,
                                       .layout_k = at % 4 == 2 ? Layout::kBshd : Layout::kAligned,
                                       .layout_v = at % 4 == 3 ? Layout::kPacked : Layout::kAligned,
                                       .layout_o = at % 3 == 0 ? Layout::kBshd : Layout::kAligned,
                                       .inputs = at % 5 == 0 ? Inputs::kRising : Inputs::kNormal,
                                       .backend = backend,
                                       .rows = 8,
                                       .seed = number},
                                      kMods[at % 5]));
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, NumericsReferenceLength, testing::ValuesIn(kLengths),
                         [](const auto& info) { return std::to_string(info.param); });

TEST(NumericsReference, GroupsOfHeads) {
  for (const std::string& backend : target().backends) {
    for (std::int64_t group = 1; group <= 8; ++group) {
      for (const std::int64_t heads_kv : {1, 3}) {
        expect_accepted(parse(fmt::format(
            "b=2 hq={} hkv={} sq=70 skv=140 d=64 rows=64 dtype=bfloat16 "
            "score_mod=\"{}\" inputs={} backend={} seed={}",
            group * heads_kv, heads_kv, group % 2 == 0 ? "where(q_idx >= kv_idx, score + 0.3 * h, -inf)" : "noop",
            group % 3 == 0 ? "rising" : "normal", backend, group)));
      }
    }
  }
}

// More tiles of queries than any device takes at once, some of which have sums that run too high: a block goes from one
// to the next, and to what it has to do again.
TEST(NumericsReference, ManyTiles) {
  // Elsewhere there is no device to fill.
  const std::string heads = target().on_gpu() ? "b=4 hq=36 hkv=4 rows=64 " : "b=2 hq=4 hkv=2 rows=64 ";
  for (const std::string& backend : target().backends) {
    for (const char* const fields :
         {R"_(score_mod="noop" d=64 sq=520 skv=130)_", R"_(score_mod="causal" d=64 sq=520 skv=520 inputs=rising)_",
          R"_(score_mod="noop" d=64 sq=300 skv=257 inputs=outliers)_",
          R"_(score_mod="causal" d=128 sq=257 skv=300 inputs=steep)_",
          R"_(score_mod="document(ids)" d=64 sq=520 skv=520 capture=ids:int32:520:packed:blocks inputs=outliers)_",
          // Rows of two blocks in each warpgroup, beside warpgroups without rows.
          R"_(score_mod="where(ids[q_idx + 17] == ids[kv_idx], score, -inf)" d=64 sq=520 skv=520 )_"
          R"_(capture=ids:int32:540:packed:blocks inputs=outliers)_",
          R"_(score_mod="where(ids[(q_idx + 17) // 4] == ids[kv_idx // 4], score, -inf)" d=128 sq=520 skv=520 )_"
          R"_(capture=ids:int32:540:packed:blocks)_",
          R"_(score_mod="sliding_window(64)" d=128 sq=300 skv=300 inputs=falling)_",
          // Tiles without keys between others, where O leaves from Q's memory.
          R"_(score_mod="where(q_idx >= 130 and q_idx >= kv_idx, score, -inf)" d=192 sq=520 skv=520)_",
          R"_(score_mod="where(q_idx % 256 >= 128 and q_idx >= kv_idx, score, -inf)" d=256 sq=640 skv=300)_"}) {
      for (const char* const dtype : {"bfloat16", "float16"}) {
        expect_accepted(parse(fmt::format("{}{} dtype={} backend={}", heads, fields, dtype, backend)));
      }
    }
  }
}

// Scales that only some ways through a kernel can apply late.
TEST(NumericsReference, Scales) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod : {"noop", "causal", "score + 0.25 * (q_idx - kv_idx)", "softcap(5)"}) {
      for (const char* const scale : {"0", "-0.125", "-2", "3", "1e-30", "-0"}) {
        for (const char* const inputs : {"normal", "rising"}) {
          expect_accepted(parse(std::string("b=1 hq=2 hkv=1 sq=70 skv=290 d=64 rows=32 dtype=bfloat16 scale=") + scale +
                                " score_mod=\"" + mod + "\" inputs=" + inputs + " backend=" + backend));
        }
      }
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
