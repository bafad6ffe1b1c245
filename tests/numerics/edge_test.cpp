// Shapes at the edges: nothing to do, one of everything, more than 32 bits of elements, more heads than 16 bits.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>

#include "tests/numerics/check.h"
#include "tests/numerics/testing.h"

namespace attnjit::numerics {
namespace {

void expect_accepted(const std::string& line) {
  const Check check = check_case(parse(line), nullptr, true);
  EXPECT_TRUE(check.accepted) << check.message;
  EXPECT_EQ(check.verdict.undecided, 0) << check.message;
}

TEST(NumericsEdge, NoKeysGiveZeroAndMinusInfinity) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      Problem problem = make(std::string("b=2 hq=2 sq=33 skv=0 d=16 dv=9 dtype=") + dtype + " backend=" + backend);
      const Case& spec = problem.spec;
      const RunResult result = run(problem);
      ASSERT_EQ(result.error, "") << to_line(spec);
      const auto is = [](double expected) { return [expected](double value) { return value == expected; }; };
      EXPECT_TRUE(std::all_of(result.outcome.o.begin(), result.outcome.o.end(), is(0.0))) << to_line(spec);
      const double lowest = -std::numeric_limits<double>::infinity();
      EXPECT_TRUE(std::all_of(result.outcome.lse.begin(), result.outcome.lse.end(), is(lowest))) << to_line(spec);
      EXPECT_TRUE(std::all_of(result.outcome.row_max.begin(), result.outcome.row_max.end(), is(lowest)));
      EXPECT_EQ(result.outcome.o.size(), 2u * 2u * 33u * 9u);
    }
  }
}

// Nothing is written where there is nothing: run() compares the guards.
TEST(NumericsEdge, EmptyOutputsAreNoOps) {
  for (const std::string& backend : target().backends) {
    for (const char* const sizes :
         {"b=0 hq=2 sq=8 skv=8", "b=2 hq=0 hkv=0 sq=8 skv=8", "b=2 hq=2 sq=0 skv=8", "b=0 hq=0 hkv=0 sq=0 skv=0"}) {
      Problem problem = make(std::string(sizes) + " d=16 score_mod=\"causal\" backend=" + backend);
      const RunResult result = run(problem);
      EXPECT_EQ(result.error, "") << to_line(problem.spec);
      EXPECT_TRUE(result.outcome.o.empty());
    }
  }
}

TEST(NumericsEdge, OneOfEverything) {
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16", "float16"}) {
      for (const char* const sizes :
           {"b=1 hq=1 sq=1 skv=1 d=1", "b=1 hq=1 sq=1 skv=1 d=256", "b=1 hq=1 sq=1 skv=257 d=1",
            "b=1 hq=1 sq=257 skv=1 d=3 dv=1", "b=1 hq=2 sq=2 skv=2 d=2 dv=256"}) {
        for (const char* const mod : {"noop", "causal", "where(kv_idx > q_idx, score, -inf)"}) {
          expect_accepted(std::string(sizes) + " dtype=" + dtype + " backend=" + backend + " score_mod=\"" + mod +
                          "\"");
        }
      }
    }
  }
}

// Every head dim of one to 80 and those about the powers above: none is padded wrongly.
TEST(NumericsEdge, EveryHeadDim) {
  for (std::int64_t head_dim = 1; head_dim <= 256; head_dim += head_dim < 80 ? 1 : 11) {
    const std::string sizes =
        "b=1 hq=2 hkv=1 sq=35 skv=37 rows=12 d=" + std::to_string(head_dim) + " dv=" + std::to_string(257 - head_dim);
    expect_accepted(sizes + " dtype=" + (head_dim % 2 == 0 ? "bfloat16" : "float32") + " q=padded k=bshd v=padded");
  }
}

// The same of multiples of eight whose rows are aligned, with poison behind each.
TEST(NumericsEdge, EveryAlignedHeadDim) {
  for (std::int64_t head_dim = 8; head_dim <= 256; head_dim += 8) {
    const std::string sizes = "b=1 hq=2 hkv=1 sq=35 skv=37 rows=12 d=" + std::to_string(head_dim);
    const std::string rest = std::string(" dtype=") + (head_dim % 16 == 0 ? "bfloat16" : "float16") +
                             " q=aligned k=aligned v=aligned o=aligned";
    expect_accepted(sizes + " dv=" + std::to_string(264 - head_dim) + rest);
  }
}

TEST(NumericsEdge, MoreHeadsThanSixteenBits) {
  for (const std::string& backend : target().backends) {
    expect_accepted(std::string("b=3 hq=22000 hkv=11000 sq=1 skv=2 d=2 dtype=bfloat16 score_mod=\"score + 0.001 * h\" "
                                "backend=") +
                    backend);
    expect_accepted(std::string("b=66000 hq=1 sq=1 skv=1 d=2 score_mod=\"score + 0.0001 * b\" backend=") + backend);
  }
}

// Far from the diagonal: many tiles to skip or not, and positions that a sloppy float32 would confuse.
TEST(NumericsEdge, LongSequences) {
  for (const char* const mod :
       {"noop", "causal", "sliding_window(100)", "prefix_lm(1500)", "alibi_exp2(2)", "score + 0.001 * (q_idx - kv_idx)",
        "where(kv_idx >= q_idx, score, -inf)", "where((q_idx - kv_idx) % 512 == 0, score, -inf)",
        "where(q_idx // 700 == kv_idx // 700, 5 * tanh(score / 5), -inf)"}) {
    const std::string fields = mod;
    expect_accepted("b=1 hq=2 hkv=1 sq=2049 skv=2100 d=64 rows=24 dtype=bfloat16 score_mod=\"" + fields + "\"");
    expect_accepted("b=1 hq=1 sq=130 skv=4097 d=32 rows=12 dtype=float32 score_mod=\"" + fields + "\"");
  }
}

// Batches more than 2^31 elements apart, in memory that is there only where it is touched.
TEST(NumericsEdge, OffsetsBeyond32Bits) {
  for (const std::string& backend : target().backends) {
    for (const char* const layout : {"q", "k", "v", "o"}) {
      expect_accepted(std::string("b=2 hq=2 hkv=1 sq=33 skv=40 d=16 dtype=bfloat16 score_mod=\"causal\" backend=") +
                      backend + " " + layout + "=huge");
    }
    // A captured tensor of rank 2 with as large a stride.
    expect_accepted(std::string("b=2 hq=2 sq=33 skv=40 d=16 score_mod=\"score + t[b, kv_idx]\" "
                                "capture=t:int8:2x40:huge:normal backend=") +
                    backend);
  }
}

// A q of 2^31 + 2^23 elements that is one row, repeated by stride 0.
TEST(NumericsEdgeSlow, MoreElementsThan31Bits) {
  const Case spec = parse(
      "b=1 hq=1 sq=8421376 skv=3 d=256 dv=1 dtype=float32 q=broadcast_s rows=16 "
      "score_mod=\"score + 0.0000001 * q_idx * kv_idx\"");
  const Check check = check_case(spec);
  EXPECT_TRUE(check.accepted) << check.message;
}

// What lies behind a mask never reaches the result: keys and captured values of NaN and infinity.
TEST(NumericsEdge, PoisonBehindMasks) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod :
         {"where(kv_idx < 40, score, -inf)", "score + where(kv_idx < 40, 0, -inf)", "causal", "sliding_window(5)",
          "softcap(2) + where(kv_idx % 2 == 0, 0, -inf)", "min(score, where(kv_idx >= 64, 1, -inf))"}) {
      expect_accepted(std::string("b=1 hq=2 hkv=1 sq=40 skv=100 d=24 inputs=poisoned score_mod=\"") + mod +
                      "\" backend=" + backend);
      expect_accepted(
          std::string("b=1 hq=2 hkv=1 sq=40 skv=100 d=24 dtype=bfloat16 inputs=poisoned score_mod=\"score\" "
                      "mask_mod=\"kv_idx < 33 or kv_idx == 64\" backend=") +
          backend);
    }
    expect_accepted(std::string("b=1 hq=2 sq=40 skv=60 d=24 score_mod=\"where(isnan(t[kv_idx]) or isinf(t[kv_idx]), "
                                "-inf, score + t[kv_idx])\" capture=t:float32:60:packed:poison backend=") +
                    backend);
    expect_accepted(std::string("b=1 hq=2 sq=40 skv=60 d=24 score_mod=\"score + t[kv_idx]\" "
                                "mask_mod=\"not (isnan(t[kv_idx]) or isinf(t[kv_idx]))\" "
                                "capture=t:bfloat16:60:packed:poison backend=") +
                    backend);
  }
}

// Masks that leave whole tiles out, and keep whole tiles, of keys that no query keeps NaN and infinities.
TEST(NumericsEdge, MasksThatLeaveTilesOut) {
  std::size_t number = 0;
  for (const std::string& backend : target().backends) {
    for (const char* const mask :
         {"causal", "q_idx + 100 >= kv_idx", "q_idx - 200 >= kv_idx", "kv_idx - q_idx >= 70", "sliding_window(40)",
          "prefix_lm(300)", "q_idx // 128 == kv_idx // 128", "(q_idx // 128 + kv_idx // 64) % 2 == 0",
          "(q_idx // 128 + kv_idx // 64) % 40 == 3", "q_idx < 130 or q_idx >= 500", "kv_idx < 70 or kv_idx >= 460",
          "h == 0 and q_idx >= kv_idx", "kv_idx < lengths[b]", "ids[b, q_idx] == ids[b, kv_idx]"}) {
      const std::string name = mask;
      const std::string captured = name.find("ids") != std::string::npos ? " capture=ids:int32:1x600:packed:blocks"
                                   : name.find("lengths") != std::string::npos ? " capture=lengths:int32:1:packed:index"
                                                                               : "";
      for (const char* const mod : {"score", "softcap(5)"}) {
        ++number;
        expect_accepted("b=1 hq=2 hkv=1 d=" + std::to_string(number % 3 == 0 ? 96 : 40) +
                        (number % 2 == 0 ? " sq=600 skv=530" : " sq=540 skv=600") +
                        " dtype=" + (number % 4 == 0 ? "float32" : "bfloat16") + " inputs=poisoned score_mod=\"" + mod +
                        "\" mask_mod=\"" + mask + "\"" + captured + " backend=" + backend);
      }
    }
    // More messages about tiles than a kernel has room for at a time, some of whose sums run too high; and the same by
    // tables.
    for (const char* const fields :
         {"sq=70 inputs=outliers",
          "sq=200 inputs=poisoned mask_mod=\"q_idx // 64 == kv_idx // 64 or kv_idx % 4096 < 2048\"",
          "sq=150 inputs=outliers mask_mod=\"ids[q_idx] == ids[kv_idx] or kv_idx % 4096 < 2048\" "
          "capture=ids:int32:20000:packed:blocks"}) {
      expect_accepted(std::string("b=1 hq=1 d=64 skv=20000 rows=16 dtype=bfloat16 backend=") + backend + " " + fields);
    }
    // More tiles than are looked at at once, most of them left out.
    for (const char* const mask : {"q_idx // 64 == kv_idx // 64 or kv_idx >= 4800", "q_idx + 4200 == kv_idx"}) {
      expect_accepted(std::string("b=1 hq=1 d=16 sq=150 skv=5000 dtype=float16 inputs=poisoned mask_mod=\"") + mask +
                      "\" backend=" + backend);
    }
  }
}

// A NaN key that is kept reaches every row that keeps it, and no other.
TEST(NumericsEdge, KeptNanReachesItsRows) {
  for (const std::string& backend : target().backends) {
    for (const char* const mod : {"causal", "softcap(3)", "noop", "score + relu(score) + clamp(score, -1, 1)",
                                  "max(score, 0)", "where(q_idx >= kv_idx, abs(score) ** 2, -inf)"}) {
      Problem problem = make(std::string("b=1 hq=2 sq=40 skv=70 d=16 score_mod=\"") + mod + "\" backend=" + backend);
      problem.k.set({0, 0, 20, 3}, std::numeric_limits<double>::quiet_NaN());
      const Check check = check_problem(problem);
      EXPECT_TRUE(check.accepted) << check.message << " (with k[0, 0, 20, 3] NaN)";
    }
  }
}

// Slopes that are not finite: 0 times one is NaN on the diagonal, and rows on one side of it are all -infinity, which
// is to keep nothing. A kernel that adds slope times a difference in parts has to notice its NaN. Sizes are of several
// tiles, with queries beyond the last key.
TEST(NumericsEdge, InfiniteSlopes) {
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  constexpr double kSlopes[] = {kInfinity, -kInfinity, std::numeric_limits<double>::quiet_NaN(), 0.25};
  for (const std::string& backend : target().backends) {
    for (const char* const dtype : {"float32", "bfloat16"}) {
      for (const char* const mod :
           {R"_(score_mod="alibi")_", R"_(score_mod="alibi" mask_mod="causal")_",
            R"_(score_mod="alibi" mask_mod="q_idx > kv_idx")_", R"_(score_mod="alibi" mask_mod="q_idx < kv_idx")_",
            R"_(score_mod="score + alibi_slopes[h] * (q_idx - kv_idx - 1)")_"}) {
        Problem problem = make(std::string("b=1 hq=4 hkv=2 sq=400 skv=330 d=64 rows=32 ") + mod +
                               " capture=alibi_slopes:float32:4:packed:normal dtype=" + dtype + " backend=" + backend);
        for (std::int64_t h = 0; h < 4; ++h) problem.captures[0].tensor.set({h}, kSlopes[h]);
        const Check check = check_problem(problem);
        EXPECT_TRUE(check.accepted) << check.message << " (with slopes of infinity, -infinity, NaN and 1/4)";
        EXPECT_EQ(check.undecided(), 0) << check.message;
      }
    }
  }
}

// The scale times log2(e), or times a literal that was taken into it, may leave float's range where the scores do not.
TEST(NumericsEdge, ScaleAtTheEndsOfFloat) {
  struct {
    const char* fields;
    double magnitude;  // of q and k
  } const problems[] = {
      {"scale=3e38 score_mod=\"noop\"", 3e-19},
      {"scale=3e38 score_mod=\"score + t[q_idx, kv_idx]\" capture=t:float32:40x70:packed:normal", 3e-19},
      {"scale=1e38 score_mod=\"3 * tanh(score / 0.1)\"", 1e-19},
      {"scale=1e38 score_mod=\"3 * tanh(score * 1e9)\"", 1e-19},
      {"scale=1e-30 score_mod=\"1e15 * tanh(score / 1e15)\"", 1e15},
      {"scale=-1e-30 score_mod=\"1e15 * tanh(score / 1e15)\" dtype=bfloat16", 1e15},
      {"scale=1e-30 score_mod=\"score + h\" dtype=bfloat16", 1e15},
      {"scale=3e38 score_mod=\"noop\" dtype=bfloat16", 3e-19},
      {"scale=-3e38 score_mod=\"causal\" dtype=bfloat16", 3e-19},
      {"scale=1e38 score_mod=\"score + 0.5 * (q_idx - kv_idx)\" dtype=bfloat16", 1e-19},
  };
  for (const std::string& backend : target().backends) {
    for (const auto& each : problems) {
      Problem problem = make(std::string("b=1 hq=2 hkv=1 sq=40 skv=70 d=16 ") + each.fields + " backend=" + backend);
      for (Tensor* const tensor : {&problem.q, &problem.k}) {
        for_each_index(tensor->shape(), [&](std::span<const std::int64_t> index) {
          tensor->set(index, tensor->at(index) * each.magnitude);
        });
      }
      const Check check = check_problem(problem, nullptr, true);
      EXPECT_TRUE(check.accepted) << check.message << " (with q and k times " << each.magnitude << ")";
      EXPECT_EQ(check.verdict.undecided, 0) << check.message;
    }
  }
}

}  // namespace
}  // namespace attnjit::numerics
