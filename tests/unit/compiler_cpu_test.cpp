// Compiled mods against the interpreter, point by point.
#include <gmock/gmock.h>

#include <atomic>
#include <bit>
#include <cmath>
#include <limits>
#include <numbers>
#include <random>
#include <thread>

#include "kernels_templates/cpu/products.h"
#include "tests/unit/compiler_testing.h"
#include "tests/unit/cpu_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;
using dsl::Point;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLn2 = 0.69314718055994530942;

std::vector<Point> points(const Shape& shape, bool specials = false) {
  std::mt19937 random(1);
  std::normal_distribution<double> score(0.0, 3.0);
  std::vector<Point> result;
  const double special[] = {0.0, -0.0, kInfinity, -kInfinity, std::nan(""), 1e-30, -1e30, 2e38, 0.5, -1.5, 2.5};
  for (int i = 0; i < 533; ++i) {
    const double s = specials && i % 3 == 0 ? special[(i / 3) % 11] : score(random);
    result.push_back({.score = static_cast<float>(s),
                      .b = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.batch)),
                      .h = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.num_heads)),
                      .q_idx = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.seqlen_q)),
                      .kv_idx = static_cast<std::int64_t>(random() % static_cast<unsigned>(shape.seqlen_kv))});
  }
  return result;
}

std::vector<CpuIsa> isas() {
  std::vector<CpuIsa> result;
  for (const CpuIsa isa : {CpuIsa::kSse2, CpuIsa::kAvx2, CpuIsa::kAvx512})
    if (isa <= host_cpu_isa()) result.push_back(isa);
  return result;
}

// `tolerance` is relative to the largest of 1 and the value's magnitude.
void expect_equal(const std::string& text, std::vector<Tensor> tensors = {}, Shape shape = {}, bool specials = false,
                  double tolerance = 3e-6) {
  SCOPED_TRACE(text);
  const Mod mod(text, std::move(tensors), shape);
  if (::testing::Test::HasFatalFailure() || mod.problem.score_mod.root < 0) return;
  const std::vector<Point> where = points(shape, specials);
  dsl::Interpreter interpreter(mod.problem.score_mod, mod.views);
  for (const CpuIsa isa : isas()) {
    SCOPED_TRACE(std::string(cpu_isa_name(isa)));
    const Elementwise compiled(mod, isa);
    const std::vector<float> values = compiled.log2_values(where);
    int wrong = 0;
    for (std::size_t i = 0; i < where.size() && wrong < 3; ++i) {
      const dsl::Element expected = interpreter.score_mod(where[i]);
      const double actual = static_cast<double>(values[i]) * kLn2, value = static_cast<float>(expected.value);
      const bool equal = std::isnan(value)   ? std::isnan(actual)
                         : std::isinf(value) ? actual == value
                                             : std::abs(actual - value) <= tolerance * std::max(1.0, std::abs(value));
      if (equal) continue;
      ++wrong;
      ADD_FAILURE() << "score " << where[i].score << " b " << where[i].b << " h " << where[i].h << " q "
                    << where[i].q_idx << " kv " << where[i].kv_idx << ": " << actual << ", expected " << value;
    }
  }
}

TEST(CompilerCpu, BuiltinMods) {
  for (const char* text : {"noop", "causal", "rel", "head_bias", "softcap(20)", "sliding_window(7)", "prefix_lm(5)"})
    expect_equal(text, {}, {}, true);
  expect_equal("alibi", {Tensor::of<float>("alibi_slopes", DType::kF32, {4}, {0.5f, 0.25f, 0.125f, 0.0625f})}, {},
               true);
}

TEST(CompilerCpu, Arithmetic) {
  for (const char* text : {"score + 1",
                           "1 - score",
                           "-score",
                           "score * 0.5 + h",
                           "score / 3",
                           "score / 8",
                           "(score + h) * (b + 1)",
                           "score * score",
                           "score // 2",
                           "score % 3",
                           "score % -2.5",
                           "score if q_idx > kv_idx else score * 0.5",
                           "min(score, 1)",
                           "max(score, -1.0)",
                           "clamp(score, -1, 1)",
                           "abs(score)",
                           "relu(score)",
                           "sign(score)",
                           "floor(score) + ceil(score) + round(score)",
                           "float(isinf(score)) + 2 * float(isnan(score))",
                           "score + float(score > 1) - float(not (score <= 0.5)) * 2",
                           "where(score == 0.5, 1, score)",
                           "where(score != score, 1, 2)",
                           "float(bool(score)) + float(bool(q_idx))",
                           "min(score, nan)",
                           "max(nan, score)",
                           "let x = score * 2; x * x + x",
                           "score ** 2",
                           "score ** 3",
                           "abs(score) ** 0.25",
                           "(b + 2) ** score"})
    expect_equal(text, {}, {}, true);
}

TEST(CompilerCpu, Integers) {
  const Shape wide{.batch = 3, .num_heads = 5, .seqlen_q = 1'000'000, .seqlen_kv = 3'000'000'000};
  for (const char* text : {"score + (q_idx - kv_idx)",
                           "score + q_idx * kv_idx",
                           "score + q_idx * kv_idx * kv_idx * kv_idx * 7",
                           "score + (q_idx - kv_idx) // 7",
                           "score + (q_idx - kv_idx) % 7",
                           "score + (kv_idx - q_idx) // (h - 2)",
                           "score + (kv_idx - q_idx) % (h - 2)",
                           "score + q_idx // -8 + kv_idx % -8",
                           "score + (q_idx // 0) + (kv_idx % 0)",
                           "score + ((q_idx & 7) | (kv_idx & 12)) + ~h",
                           "score + abs(q_idx - kv_idx)",
                           "score + min(q_idx, kv_idx, 100)",
                           "score + max(h - 3, 0) + clamp(q_idx, 5, 9)",
                           "score + (h - 2) ** 5",
                           "score + (h - 2) ** 255 % 1000 + (h - 2) ** 256 % 1000",
                           "score + (h - 2) ** 9223372036854775807 % 1000",
                           "score + (q_idx - kv_idx) ** 257 % 1000",
                           "score + 3 ** 9223372036854775807 % 1000",
                           "score + sign(h - 2)",
                           "score + (q_idx == kv_idx) * 3 + (q_idx < kv_idx)",
                           "score + float(int(score * 1000) % 7)",
                           "score + (b == 1 and h > 2 or not (q_idx >= 3))",
                           "score + where(h < 2, q_idx, -kv_idx)",
                           "score + (9223372036854775807 + h) % 10",
                           "score + (-9223372036854775807 - 1) // (h - 2)",
                           "score + ((-9223372036854775807 - 1) % (h - 2))",
                           "score + abs(-9223372036854775807 - h)",
                           "score + (q_idx * 4294967296) // 4294967295",
                           "score + relu(h - 2)",
                           "score + (true + 2 * (h > 1))"}) {
    expect_equal(text);
    expect_equal(text, {}, wide);
  }
}

TEST(CompilerCpu, UndefinedElsewhereIsDefinedHere) {
  for (const char* text :
       {"float(int(score))", "float(int(score * 1e30) // 3)", "float(int(score / 0) % 5)", "float(int(nan) + h)",
        "float(int(inf) - 9223372036854775807)", "float(int(-inf) + 9223372036854775807)", "score / (h - 2)",
        "sqrt(score)", "log(score)", "score % 0", "rsqrt(score - 0.5)"})
    expect_equal(text, {}, {}, true);
}

TEST(CompilerCpu, DroppedElements) {
  const double nan = std::nan("");
  const std::vector<float> poison{1.0f, static_cast<float>(nan), static_cast<float>(kInfinity), -2.0f};
  for (const char* text : {"where(q_idx >= kv_idx, score, -inf)",
                           "score + where(q_idx >= kv_idx, 0, -inf)",
                           "where(q_idx >= kv_idx, score, -inf) + p[h]",
                           "p[h] - where(q_idx >= kv_idx, 1, -inf)",
                           "where(q_idx >= kv_idx, score, -inf) - p[h]",
                           "2 * where(h < 2, score, -inf) + p[h]",
                           "where(h < 2, score, -inf) * -2",
                           "where(h < 2, score, -inf) * 0",
                           "min(where(h < 2, score, -inf), p[h])",
                           "max(where(h < 2, score, -inf), p[h])",
                           "tanh(where(h < 2, score, -inf))",
                           "where(score > 0, score, -inf)",
                           "where(score > 1, score, -inf)",
                           "where(h < 2, where(q_idx < 9, score, -inf), where(kv_idx < 30, score + 1, -inf))",
                           "-inf",
                           "score - inf",
                           "-(-2) * where(h < 2, score, -inf) + p[h]",
                           "int(2.5) * where(h < 2, score, -inf) + p[h]",
                           "where(h < 2, -inf, score) ** 2 + p[h]",
                           "clamp(where(h < 2, score, -inf), -3, 3)",
                           "where(h < 2, score, -1e38)",
                           "where(h < 2, score, -inf) / 2 + p[h]",
                           "1e-300 * where(h < 2, score, -inf) + p[h]",
                           "where(h < 2, score, -inf) * 1e-300",
                           "score % where(h < 2, 2, -inf)",
                           "sign(where(h < 2, score, -inf)) + p[h]",
                           "where(score > 1, -inf, where(isnan(score), 0, score))"})
    expect_equal(text, {Tensor::of("p", DType::kF32, {4}, poison)}, {}, true);
}

// Masks are also made of the smallest float, whose rows are equal elements and not dropped ones.
TEST(CompilerCpu, SmallestFloatsStayFinite) {
  constexpr float kLowest = std::numeric_limits<float>::lowest();
  const std::vector<float> values{kLowest, static_cast<float>(-kInfinity), std::nanf(""), 2.0f};
  for (const char* text : {"score + t[h]", "where(q_idx >= 0, t[h], score)", "tanh(score) + t[h]", "t[h] - 0 * score",
                           "where(h == 0, -3.4e38, tanh(t[h]) + t[h])", "min(t[h], exp(score) + 5)"}) {
    SCOPED_TRACE(text);
    const Mod mod(text, {Tensor::of("t", DType::kF32, {4}, values)});
    for (const CpuIsa isa : isas()) {
      const std::vector<float> found = Elementwise(mod, isa).log2_values(
          {{.score = 0.5, .h = 0}, {.score = 0.5, .h = 1}, {.score = 0.5, .h = 2}, {.score = 0.5, .h = 3}});
      EXPECT_NEAR(found[0], kLowest, 1e32);
      EXPECT_EQ(found[1], -kInfinity);
      EXPECT_TRUE(std::isnan(found[2]));
      EXPECT_LT(std::abs(found[3]), 10.0f);
    }
  }
}

TEST(CompilerCpu, MaskModIsOneMoreCondition) {
  Mod mod("score + h");
  const auto mask = dsl::parse("kv_idx <= q_idx + 3", dsl::ModKind::kMaskMod);
  ASSERT_TRUE(mask);
  mod.problem.mask_mod = *dsl::bind(*mask, {}, dsl::ModKind::kMaskMod);
  const Elementwise compiled(mod);
  EXPECT_TRUE(compiled.compiled.facts.has_mask);
  EXPECT_EQ(compiled.compiled.score_factor, std::numbers::log2e);
  const std::vector<Point> where = points({});
  const std::vector<float> values = compiled.log2_values(where);
  for (std::size_t i = 0; i < where.size(); ++i) {
    if (where[i].kv_idx <= where[i].q_idx + 3) {
      EXPECT_NEAR(values[i] * kLn2, where[i].score + static_cast<double>(where[i].h), 1e-5);
    } else {
      EXPECT_EQ(values[i], -kInfinity);
    }
  }
}

// bf16 and f16 as bits.
std::uint16_t bf16(float x) { return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(x) >> 16); }

TEST(CompilerCpu, CapturedReads) {
  std::vector<std::uint16_t> halves;
  std::vector<std::uint8_t> bytes;
  std::vector<float> floats;
  std::vector<std::int64_t> longs;
  for (int i = 0; i < 4 * 96; ++i) {
    halves.push_back(static_cast<std::uint16_t>(i * 677 + 11));  // subnormals, infinities and NaN among them
    bytes.push_back(static_cast<std::uint8_t>(i * 7));
    floats.push_back(0.25f * static_cast<float>(i) - 40.0f);
    longs.push_back(i % 5 == 0 ? std::numeric_limits<std::int64_t>::min() + i : i * 1'000'000'007LL);
  }
  std::vector<std::uint16_t> brains;
  brains.reserve(floats.size());
  for (const float x : floats) brains.push_back(bf16(x));
  const std::vector<std::int64_t> extent{4, 96};
  for (const DType dtype : {DType::kF16, DType::kBF16, DType::kInt16})
    for (const char* text : {"score + t[h, kv_idx]", "score + t[h, q_idx]", "score + t[h - 9, kv_idx * 2 - 50]"})
      expect_equal(text, {Tensor::of("t", dtype, extent, dtype == DType::kBF16 ? brains : halves)});
  for (const DType dtype : {DType::kInt8, DType::kUInt8, DType::kBool})
    for (const char* text : {"score + t[h, kv_idx] * 2", "score + t[q_idx - kv_idx, q_idx - kv_idx]"})
      expect_equal(text, {Tensor::of("t", dtype, extent, bytes)});
  expect_equal("score + t[h, kv_idx] % 1000 + t[h, q_idx] // 1000000", {Tensor::of("t", DType::kInt64, extent, longs)});
  // Indices from nowhere: the smallest integers, a captured index, a float that does not fit, NaN.
  const Tensor table = Tensor::of("t", DType::kF32, extent, floats);
  const Tensor index = Tensor::of("i", DType::kInt64, extent, longs);
  for (const char* text :
       {"score + t[i[h, kv_idx], i[h, q_idx]]", "t[int(score * 1e30), int(score)] + t[int(nan), int(-inf)]",
        "score + t[9223372036854775807 + h, -9223372036854775807]", "score * t[1000, 1000] - t[-1, -1]"})
    expect_equal(text, {table, index}, {}, true);
  expect_equal("score + s", {Tensor::of<float>("s", DType::kF32, {}, {2.5f})});
  expect_equal("where(kv_idx < n, score, -inf)", {Tensor::of<std::int32_t>("n", DType::kInt32, {}, {17})});
}

// What a compiled tile makes of every element of a block against the interpreter, reads staged as its caller does it.
void expect_tile_equal(const std::string& text, const std::vector<Tensor>& tensors, const Shape& shape,
                       const std::vector<DType>& staged) {
  SCOPED_TRACE(text);
  // Lanes beyond a short head are compiled for.
  Shape padded = shape;
  padded.seqlen_q = std::max<std::int64_t>(shape.seqlen_q, cpu::kPanelLanes);
  const Mod mod(text, tensors, padded);
  dsl::Interpreter interpreter(mod.problem.score_mod, mod.views);
  for (const CpuIsa isa : isas()) {
    SCOPED_TRACE(std::string(cpu_isa_name(isa)));
    const auto compiled = compile_cpu_tile(mod.problem, {.isa = isa, .dump = {}});
    ASSERT_FALSE(compiled.error) << compiled.error->message;
    const CpuTile& tile = *compiled.value;
    ASSERT_EQ(std::vector<DType>(tile.staged().begin(), tile.staged().end()), staged);
    ASSERT_EQ(tile.rows() != nullptr, !staged.empty());
    for (std::int64_t kv_idx = 0; kv_idx < shape.seqlen_kv; kv_idx += cpu::kTileRows) {
      const std::int64_t rows = std::min<std::int64_t>(cpu::kTileRows, shape.seqlen_kv - kv_idx);
      test::PanelBuffer scores(rows), row_max(1), row_sum(1), rescale(1), scratch(2 * cpu::kTileRows);
      const float units = static_cast<float>(tile.score_factor());
      for (std::int64_t i = 0; i < rows * cpu::kPanelLanes; ++i) scores[i] = static_cast<float>(i % 7) * 0.5f * units;
      for (int lane = 0; lane < cpu::kPanelLanes; ++lane) {
        row_max[lane] = static_cast<float>(-kInfinity);
        row_sum[lane] = 0.0f;
      }
      const std::int64_t q_idx = std::max<std::int64_t>(0, shape.seqlen_q - cpu::kPanelLanes);
      const cpu::TileParams params{.scores = scores.data(),
                                   .row_max = row_max.data(),
                                   .row_sum = row_sum.data(),
                                   .rescale = rescale.data(),
                                   .b = 1,
                                   .h = 2,
                                   .q_idx = q_idx,
                                   .kv_idx = kv_idx,
                                   .rows = rows,
                                   .captured = mod.table.data(),
                                   .staged = scratch.data()};
      std::vector<const void*> addresses(cpu::kMaxStagedReads * cpu::kPanelLanes);
      if (tile.rows()) tile.rows()(&params, addresses.data());
      for (std::size_t i = 0; i < staged.size(); ++i) {
        const cpu::Element element = staged[i] == DType::kF32    ? cpu::Element::kF32
                                     : staged[i] == DType::kBF16 ? cpu::Element::kBF16
                                     : staged[i] == DType::kF16  ? cpu::Element::kF16
                                     : staged[i] == DType::kInt8 ? cpu::Element::kInt8
                                                                 : cpu::Element::kUInt8;
        cpu::products(static_cast<int>(isa))
            .stage(addresses.data() + i * cpu::kPanelLanes, element, rows,
                   scratch.data() + i * cpu::kTileRows * cpu::kPanelLanes);
      }
      tile.function()(&params);
      int wrong = 0;
      for (std::int64_t row = 0; row < rows; ++row) {
        for (int lane = 0; lane < cpu::kPanelLanes; ++lane) {
          const std::int64_t i = row * cpu::kPanelLanes + lane;
          const dsl::Element gold = interpreter.score_mod({.score = static_cast<double>(i % 7) * 0.5,
                                                           .b = 1,
                                                           .h = 2,
                                                           .q_idx = q_idx + lane,
                                                           .kv_idx = kv_idx + row});
          const double value = (std::log2(static_cast<double>(scores[i])) + row_max[lane]) * kLn2;
          const bool equal = std::isinf(gold.value) ? scores[i] == 0.0f : std::abs(value - gold.value) < 1e-4;
          if (equal || ++wrong > 3) continue;
          ADD_FAILURE() << "row " << row << " lane " << lane << " kv " << kv_idx << ": " << value << ", expected "
                        << gold.value;
        }
      }
    }
  }
}

TEST(CompilerCpu, StagedReads) {
  const Shape shape{.batch = 2, .num_heads = 4, .seqlen_q = 50, .seqlen_kv = 201};
  const Shape short_head{.batch = 2, .num_heads = 4, .seqlen_q = 5, .seqlen_kv = 130};
  std::mt19937 random(5);
  for (const Shape& s : {shape, short_head}) {
    const std::size_t count = static_cast<std::size_t>(4 * s.seqlen_q * (s.seqlen_kv + 3));
    std::vector<float> floats(count);
    std::vector<std::uint16_t> brains(count);
    std::vector<std::uint16_t> halves(count);
    std::vector<std::uint8_t> bytes(count);
    for (std::size_t i = 0; i < count; ++i) {
      floats[i] = static_cast<float>(random() % 4096) * 0x1p-9f;
      brains[i] = bf16(static_cast<float>(random() % 128) * 0x1p-4f);
      halves[i] = static_cast<std::uint16_t>(0x3c00 + random() % 2048);  // 1 to 4
      bytes[i] = static_cast<std::uint8_t>(random() % 3 ? random() : 0);
    }
    const std::vector<std::int64_t> whole{4, s.seqlen_q, s.seqlen_kv}, wide{4, s.seqlen_q, s.seqlen_kv + 3};
    const Tensor f = Tensor::of("f", DType::kF32, whole, floats), offset = Tensor::of("f", DType::kF32, wide, floats);
    const Tensor g = Tensor::of("g", DType::kBF16, whole, brains), k = Tensor::of("k", DType::kF16, whole, halves);
    const Tensor m = Tensor::of("m", DType::kBool, whole, bytes), i = Tensor::of("i", DType::kInt8, whole, bytes);
    expect_tile_equal("score + f[h, q_idx, kv_idx]", {f}, s, {DType::kF32});
    expect_tile_equal("score + f[h, q_idx, kv_idx + b + 2]", {offset}, s, {DType::kF32});
    expect_tile_equal("score + f[h - 7, 3 * q_idx - 20, kv_idx]", {f}, s, {DType::kF32});
    expect_tile_equal("where(m[b, q_idx, kv_idx], score, -inf)", {m}, s, {DType::kBool});
    expect_tile_equal("score * g[b, q_idx, kv_idx]", {g}, s, {DType::kBF16});
    expect_tile_equal("where(m[b, q_idx, kv_idx], score + i[h, q_idx, kv_idx] / 16, -inf) + f[h, q_idx, kv_idx]",
                      {m, i, f}, s, {DType::kF32, DType::kInt8});
    expect_tile_equal("score + (k[h, q_idx, kv_idx] - g[h, i[0, q_idx, 0] + 30, kv_idx])", {k, g, i}, s,
                      {DType::kF16, DType::kBF16});
    // As before: what may lie outside, and what is the same for every lane.
    expect_tile_equal("score + f[h, q_idx, kv_idx + 1]", {f}, s, {});
    expect_tile_equal("score + f[h, 3, kv_idx]", {f}, s, {});
  }
}

TEST(CompilerCpu, Facts) {
  const auto facts = [](const char* text) {
    return analyze(Mod(text, {Tensor::of<float>("t", DType::kF32, {64}, std::vector<float>(64))}).problem).value;
  };
  EXPECT_EQ(facts("score").score_class, ScoreClass::kIdentity);
  EXPECT_EQ(facts("causal").score_class, ScoreClass::kIdentity);
  EXPECT_TRUE(facts("causal").has_mask);
  EXPECT_FALSE(facts("score + where(h > 1, 0, 1)").has_mask);
  EXPECT_EQ(facts("score * 2 + h").score_class, ScoreClass::kAffine);
  EXPECT_EQ(facts("score * score").score_class, ScoreClass::kNonlinear);
  EXPECT_TRUE(facts("where(score > 0, score, -inf)").mask_reads_score);
  EXPECT_EQ(facts("score + t[q_idx]").reads_proven, 1);
  EXPECT_EQ(facts("score + t[kv_idx]").reads_clamped, 1);
  EXPECT_TRUE(facts("score + q_idx * kv_idx").indices_fit_32);
  EXPECT_FALSE(facts("score + q_idx * 1000000000").indices_fit_32);
}

TEST(CompilerCpu, SpellingsShareAHash) {
  const auto hash = [](const std::string& text, Shape shape = {}) {
    const ModFacts facts =
        analyze(Mod(text, {Tensor::of<float>("t", DType::kF32, {4}, std::vector<float>(4))}, shape).problem).value;
    return std::pair(facts.hash_low, facts.hash_high);
  };
  const std::vector<std::vector<const char*>> same{
      {"causal", "where(q_idx >= kv_idx, score, -inf)", "where(kv_idx > q_idx, -inf, score)",
       "score if not (q_idx < kv_idx) else -inf", "score + where(kv_idx <= q_idx, 0, -inf)"},
      {"score + 2 * h", "h * 2 + score", "2 * h + 1.0 * score", "score + h * 2 + 0"},
      {"where(kv_idx < 5, score, 0)", "where(kv_idx >= 5, 0, score)", "where(kv_idx <= 4, score, 0)",
       "where(5 > kv_idx, score, 0)"},
      {"score / 2", "score * 0.5"},
      {"score - 1", "score + -1", "-1 + score"},
      {"t[h] * score + exp(score)", "exp(score) + score * t[h]"}};
  std::vector<std::pair<std::uint64_t, std::uint64_t>> distinct;
  for (const auto& group : same) {
    for (const char* text : group) EXPECT_EQ(hash(text), hash(group.front())) << text << " and " << group.front();
    for (const auto& other : distinct) EXPECT_NE(hash(group.front()), other) << group.front();
    distinct.push_back(hash(group.front()));
  }
  EXPECT_NE(hash("where(q_idx > kv_idx, score, -inf)"), hash("causal"));
  EXPECT_NE(hash("where(score < 1, score, 0)"), hash("where(not (score >= 1), score, 0)"));  // NaN tells them apart
  EXPECT_EQ(hash("causal"), hash("causal", {.seqlen_q = 1024, .seqlen_kv = 2048}));
}

TEST(CompilerCpu, EqualCodeIsShared) {
  const Mod small("score + h"), large("h + score", {}, {.seqlen_q = 4096, .seqlen_kv = 4096});
  const auto first = compile_cpu_tile(small.problem);
  ASSERT_FALSE(first.error);
  const auto second = compile_cpu_tile(large.problem);
  ASSERT_FALSE(second.error);
  EXPECT_EQ(first.value->function(), second.value->function());
  EXPECT_LT(second.value->phases().size(), first.value->phases().size());
  const auto other = compile_cpu_tile(Mod("score - h").problem);
  EXPECT_NE(first.value->function(), other.value->function());
}

TEST(CompilerCpu, DumpsEachIntermediateText) {
  std::vector<std::string> kinds;
  const auto tile =
      compile_cpu_tile(Mod("softcap(30)").problem, {.dump = [&](std::string_view kind, std::string_view text) {
                         kinds.emplace_back(kind);
                         EXPECT_FALSE(text.empty());
                         if (kind == "llvm") {
                           EXPECT_EQ(text.find("call float @attnjit_tanh"), std::string_view::npos) << "not inlined";
                         }
                       }});
  ASSERT_FALSE(tile.error);
  EXPECT_EQ(kinds, (std::vector<std::string>{"mlir", "llvm", "asm"}));
}

template <typename T>
std::string message(const CompileResult<T>& result) {
  return result.error ? result.error->message : "no error";
}

TEST(CompilerCpu, RefusesWhatItCannotDo) {
  Mod mod("score + t[h]", {Tensor::of<float>("t", DType::kF32, {4}, std::vector<float>(4))});
  ModProblem problem = mod.problem;
  problem.captures.clear();
  EXPECT_THAT(message(compile_cpu_tile(problem)), ::testing::HasSubstr("no CaptureInfo"));
  problem = mod.problem;
  problem.captures[0].extent = {4, 4};
  EXPECT_THAT(message(analyze(problem)), ::testing::HasSubstr("number of indices"));
  problem = mod.problem;
  problem.captures[0].extent = {0};
  EXPECT_THAT(message(analyze(problem)), ::testing::HasSubstr("extents of at least 1"));
  EXPECT_THAT(message(compile_cpu_tile(ModProblem{})), ::testing::HasSubstr("not bound"));
}

TEST(CompilerCpu, CompilesInSeveralThreads) {
  std::vector<std::thread> threads;
  threads.reserve(4);
  std::atomic<int> good = 0;
  for (int i = 0; i < 4; ++i)
    threads.emplace_back([&good, i] {
      for (int n = 0; n < 4; ++n)
        good += !compile_cpu_tile(Mod("tanh(score) * " + std::to_string(n % 2 ? i : n) + " + h").problem).error;
    });
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(good, 16);
}

// As large as the language allows.
TEST(CompilerCpu, LargeExpressions) {
  std::string sum = "score", nested = "score";
  for (int i = 0; i < 1300; ++i) sum += " + h";
  for (int i = 0; i < 120; ++i) nested.insert(0, "abs(").append(" - 1)");
  expect_equal(sum, {}, {}, false, 1e-3);
  expect_equal(nested, {}, {}, false, 1e-3);
}

}  // namespace
}  // namespace attnjit::compiler::testing
