// What compiled mods say of whole tiles, against every element of them: as CUDA compiled for the host, and on the CPU.
#include <gmock/gmock.h>

#include <limits>
#include <memory>
#include <random>

#include "compiler/cuda_mod.h"
#include "compiler/frontend.h"
#include "kernels_templates/cuda/params.h"
#include "tests/support/host_library.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr Shape kShape{.batch = 2, .num_heads = 4, .seqlen_q = 24, .seqlen_kv = 32};

std::vector<Tensor> tensors() {
  constexpr std::int64_t kSmallest = std::numeric_limits<std::int64_t>::min();
  constexpr std::int64_t kLargest = std::numeric_limits<std::int64_t>::max();
  std::vector<std::int32_t> ids;
  for (int i = 0; i < 32; ++i) ids.push_back(i / 9);
  std::vector<std::int32_t> far, documents;
  std::vector<std::int64_t> rows;
  std::vector<std::uint8_t> flags;
  for (int i = 0; i < 200; ++i) far.push_back(i / 11 - (i % 37 == 0 ? 20 : 0));
  for (int i = 0; i < 1024; ++i) documents.push_back(i / 32 / 9);
  for (int i = 0; i < 300; ++i) rows.push_back(i == 40 ? kLargest : i == 200 ? kSmallest : i / 8);
  for (int i = 0; i < 400; ++i) flags.push_back(i / 70 % 2 == 0 ? 1 : 0);
  return {
      Tensor::of<std::int32_t>("len", DType::kInt32, {2}, {11, 29}),
      Tensor::of<std::int64_t>("wide", DType::kInt64, {2}, {7, -3}),
      Tensor::of<std::int64_t>("edge", DType::kInt64, {2}, {kLargest - 5, kSmallest + 9}),
      Tensor::of<std::int32_t>("edge32", DType::kInt32, {2},
                               {std::numeric_limits<std::int32_t>::max(), std::numeric_limits<std::int32_t>::min()}),
      Tensor::of<std::int64_t>("window", DType::kInt64, {4}, {2, 5, 9, kLargest}),
      Tensor::of<std::uint8_t>("chosen", DType::kBool, {2}, {1, 0}),
      Tensor::of<std::uint8_t>("heads", DType::kBool, {4}, {1, 0, 1, 1}),
      Tensor::of<float>("limit", DType::kF32, {2}, {12.5f, std::numeric_limits<float>::quiet_NaN()}),
      Tensor::of<std::int32_t>("n", DType::kInt32, {}, {6}),
      Tensor::of<std::int32_t>("ids", DType::kInt32, {32}, ids),
      Tensor::of<std::uint8_t>("some", DType::kBool, {4, 32}, std::vector<std::uint8_t>(128, 1)),
      Tensor::of<std::int32_t>("far", DType::kInt32, {200}, far),
      Tensor::of<std::int32_t>("documents", DType::kInt32, {1024}, documents),
      Tensor::of<std::int64_t>("rows", DType::kInt64, {2, 150}, rows),
      Tensor::of<std::uint8_t>("flags", DType::kBool, {4, 100}, flags),
  };
}

Mod mod_of(const std::string& mask) { return Mod("where(" + mask + ", score, -inf)", tensors(), kShape); }

// One of a captured tensor's summaries, as compiler::TileSummary says.
Tensor summary_of(const Mod& mod, const TileSummary& summary) {
  const auto capture = static_cast<std::size_t>(summary.capture);
  const CaptureInfo& info = mod.problem.captures[capture];
  const dsl::CaptureView& view = mod.views[capture];
  const std::vector<std::int64_t> extents = summary_extents(info, summary.dimension);
  const std::int64_t blocks = extents.back(), levels = extents[extents.size() - 2];
  const std::int64_t along = info.extent[static_cast<std::size_t>(summary.dimension)];
  std::int64_t others = 1;
  for (std::size_t i = 0; i + 3 < extents.size(); ++i) others *= extents[i];
  std::vector<std::int64_t> values;
  for (std::int64_t other = 0; other < others; ++other) {
    std::int64_t start = 0, rest = other;
    for (int d = view.rank - 1; d >= 0; --d) {
      if (d == summary.dimension) continue;
      start += rest % view.extent[d] * view.stride[d];
      rest /= view.extent[d];
    }
    for (const int part : {0, 1, 2, 3}) {
      for (std::int64_t level = 0; level < levels; ++level) {
        for (std::int64_t block = 0; block < blocks; ++block) {
          const std::int64_t span = std::int64_t{1} << level;
          const std::int64_t first = part % 2 == 0 ? block : std::max<std::int64_t>(block - span + 1, 0);
          const std::int64_t last = part % 2 == 0 ? std::min(block + span, blocks) - 1 : block;
          std::int64_t least = std::numeric_limits<std::int64_t>::max(), largest = -least - 1;
          for (std::int64_t i = first * kSummaryBlock; i < std::min((last + 1) * kSummaryBlock, along); ++i) {
            const std::int64_t value =
                dsl::read_as_int(view.data, view.dtype, start + i * view.stride[summary.dimension]);
            least = std::min(least, value);
            largest = std::max(largest, value);
          }
          values.push_back(part < 2 ? least : largest);
        }
      }
    }
  }
  if (info.dtype == DType::kInt64) return Tensor::of<std::int64_t>("", DType::kInt64, extents, values);
  return Tensor::of<std::int32_t>("", DType::kInt32, extents, {values.begin(), values.end()});
}

// A mod that is given its summaries, behind its captures.
struct SummarisedMod {
  Mod mod;
  std::vector<Tensor> summaries;

  explicit SummarisedMod(const std::string& mask) : mod(mod_of(mask)) {
    mod.problem.summaries = true;
    const auto facts = analyze(mod.problem);
    EXPECT_FALSE(facts.error) << facts.error->message;
    for (const TileSummary& summary : facts.value.summaries) summaries.push_back(summary_of(mod, summary));
    for (const Tensor& tensor : summaries) {
      cpu::CapturedView native{.data = tensor.bytes.data(), .stride = {}, .extent = {}};
      dsl::CaptureView view{
          .data = tensor.bytes.data(), .dtype = tensor.dtype, .rank = static_cast<int>(tensor.extent.size())};
      for (std::size_t i = 0; i < tensor.extent.size(); ++i) {
        view.extent[i] = native.extent[i] = tensor.extent[i];
        view.stride[i] = native.stride[i] = tensor.stride(i);
      }
      mod.views.push_back(view);
      mod.table.push_back(native);
    }
  }
};

std::vector<cuda::CapturedView> cuda_table(const Mod& mod) {
  std::vector<cuda::CapturedView> table;
  for (const dsl::CaptureView& view : mod.views) {
    cuda::CapturedView native{.data = view.data, .value = 0, .stride = {}, .extent = {}};
    for (int i = 0; i < view.rank; ++i) {
      native.extent[i] = static_cast<int>(view.extent[i]);
      native.stride[i] = view.stride[i];
    }
    table.push_back(native);
  }
  return table;
}

CudaMod emitted(const Mod& mod, bool backward) {
  PhaseTimes phases;
  Frontend frontend(phases);
  if (!(backward ? frontend.run_backward(mod.problem, {}, Target::kCuda)
                 : frontend.run(mod.problem, {}, Target::kCuda))) {
    ADD_FAILURE() << frontend.error();
    return {};
  }
  CudaMod made = emit_cuda_mod(frontend.function(), mod.problem, CudaAccuracy::kFull, frontend.facts().sinks,
                               frontend.tile_facts(), backward ? ModForm::kPlain : ModForm::kFolded);
  EXPECT_EQ(made.error, "");
  return made;
}

// What the mask keeps, element by element, as the interpreter has it.
class Kept {
 public:
  explicit Kept(const Mod& mod) {
    dsl::Interpreter interpreter(mod.problem.score_mod, mod.views);
    for (std::int64_t b = 0; b < kShape.batch; ++b)
      for (std::int64_t h = 0; h < kShape.num_heads; ++h)
        for (std::int64_t q = 0; q < kShape.seqlen_q; ++q)
          for (std::int64_t kv = 0; kv < kShape.seqlen_kv; ++kv)
            kept_.push_back(interpreter.score_mod({.score = 1, .b = b, .h = h, .q_idx = q, .kv_idx = kv}).keep);
  }
  bool at(long long b, long long h, long long q, long long kv) const {
    return kept_[static_cast<std::size_t>(((b * kShape.num_heads + h) * kShape.seqlen_q + q) * kShape.seqlen_kv + kv)];
  }

 private:
  std::vector<bool> kept_;
};

// What a mod says of one tile; of what it has no function for, what is always right.
struct Said {
  cpu::TileKind kind = cpu::TileKind::kPartial;
  bool by_row = false;  // of partial ones
  cpu::IndexRange kv, q;
};

// How much was said beside what could have been.
struct Score {
  long long uniform_tiles = 0, found = 0;  // tiles of which all or no elements are kept; how many were told as such
  long long by_row = 0, found_by_row = 0;  // other tiles of several keys, of each query all or none kept
  long long range = 0, needed = 0;         // lengths
};

// Nothing that is said may be wrong.
void judge(const std::string& mask, const Kept& kept, const cpu::Tile& tile, const Said& said, Score& score) {
  const auto range = [](long long first, long long last) {
    return "[" + std::to_string(first) + ", " + std::to_string(last) + "]";
  };
  const std::string at = mask + ": b " + std::to_string(tile.b) + " h " + range(tile.h_first, tile.h_last) + " q " +
                         range(tile.q_first, tile.q_last) + " kv " + range(tile.kv_first, tile.kv_last);
  long long count = 0, all = 0;
  bool by_row = true;
  cpu::IndexRange kv{tile.kv_last + 1, tile.kv_first - 1}, q{tile.q_last + 1, tile.q_first - 1};
  for (long long h = tile.h_first; h <= tile.h_last; ++h) {
    for (long long i = tile.q_first; i <= tile.q_last; ++i) {
      for (long long j = tile.kv_first; j <= tile.kv_last; ++j) {
        by_row &= kept.at(tile.b, h, i, j) == kept.at(tile.b, h, i, tile.kv_first);
        ++all;
        if (!kept.at(tile.b, h, i, j)) continue;
        ++count;
        kv = {std::min(kv.first, j), std::max(kv.last, j)};
        q = {std::min(q.first, i), std::max(q.last, i)};
      }
    }
  }
  if (said.kind == cpu::TileKind::kSkip) {
    EXPECT_EQ(count, 0) << at;
  } else if (said.kind == cpu::TileKind::kFull) {
    EXPECT_EQ(count, all) << at;
  } else {
    EXPECT_EQ(said.kind, cpu::TileKind::kPartial) << at;
    EXPECT_TRUE(by_row || !said.by_row) << at;
  }
  if (count > 0 && count < all && tile.kv_first < tile.kv_last) {
    score.by_row += by_row ? 1 : 0;
    score.found_by_row += said.by_row ? 1 : 0;
  }
  score.uniform_tiles += count == 0 || count == all ? 1 : 0;
  score.found += said.kind != cpu::TileKind::kPartial ? 1 : 0;
  const auto check = [&](const char* what, const cpu::IndexRange& is, const cpu::IndexRange& least, long long first,
                         long long last) {
    EXPECT_TRUE(is.first >= first && is.last <= last) << at << " " << what << " " << range(is.first, is.last);
    if (count > 0) {
      EXPECT_TRUE(is.first <= least.first && is.last >= least.last)
          << at << " " << what << " " << range(is.first, is.last) << ", kept are " << range(least.first, least.last);
    }
    score.range += std::max(is.last - is.first + 1, 0ll);
    score.needed += count > 0 ? least.last - least.first + 1 : 0;
  };
  check("kv", said.kv, kv, tile.kv_first, tile.kv_last);
  check("q", said.q, q, tile.q_first, tile.q_last);
}

cpu::Tile random_tile(std::mt19937_64& random) {
  const auto below = [&](std::int64_t n) { return static_cast<long long>(random() % static_cast<std::uint64_t>(n)); };
  const auto ends = [&](std::int64_t extent, std::int64_t longest) {
    const long long first = below(extent);
    return std::pair(first, std::min<long long>(extent - 1, first + below(longest)));
  };
  const auto [h_first, h_last] = ends(kShape.num_heads, below(3) == 0 ? 3 : 1);
  const auto [q_first, q_last] = ends(kShape.seqlen_q, 8);
  const auto [kv_first, kv_last] = ends(kShape.seqlen_kv, 12);
  return {below(kShape.batch), h_first, h_last, q_first, q_last, kv_first, kv_last};
}

// ---- Ways to ask

// Mods as CUDA, compiled together for the host.
class HostTiles {
 public:
  HostTiles(const std::vector<Mod>& mods, bool backward) : library_(text(mods, backward)) {
    for (const Mod& mod : mods) tables_.push_back(cuda_table(mod));
  }

  Said ask(std::size_t i, const cpu::Tile& t) const {
    using Function = void (*)(const cuda::CapturedView*, const int* tile, int* said);
    const auto function = reinterpret_cast<Function>(library_.find("tile_" + std::to_string(i)));
    if (!function) return {};
    int tile[7], said[6];
    const long long ends[] = {t.b, t.h_first, t.h_last, t.q_first, t.q_last, t.kv_first, t.kv_last};
    std::copy(std::begin(ends), std::end(ends), tile);
    function(tables_[i].data(), tile, said);
    return {.kind = static_cast<cpu::TileKind>(said[0]),
            .by_row = said[5] != 0,
            .kv = {said[1], said[2]},
            .q = {said[3], said[4]}};
  }

 private:
  static std::string text(const std::vector<Mod>& mods, bool backward) {
    std::string all = test::host_prelude() + R"(
using namespace attnjit::cuda;
template <typename Mod>
void ask(const CapturedView* captured, const int* t, int* said) {
  const Tile tile{t[0], t[1], t[2], t[3], t[4], t[5], t[6]};
  const TileKind kind = Mod::tile_kind(captured, tile);
  const IndexRange kv = Mod::kv_range(captured, tile), q = Mod::q_range(captured, tile);
  const bool whole = kv.first == tile.kv_first && kv.last == tile.kv_last && q.first == tile.q_first &&
                     q.last == tile.q_last;
  // Traits may not say less than the hooks.
  if ((!Mod::kKnowsTiles && kind != TileKind::kPartial) || (!Mod::kKnowsRanges && !whole)) __builtin_trap();
  if (!Mod::kKnowsRows && kind == TileKind::kByRow) __builtin_trap();
  said[5] = kind == TileKind::kByRow;
  said[0] = static_cast<int>(said[5] != 0 ? TileKind::kPartial : kind);
  said[1] = kv.first, said[2] = kv.last, said[3] = q.first, said[4] = q.last;
}
)";
    for (std::size_t i = 0; i < mods.size(); ++i) {
      const std::string number = std::to_string(i), name = "mod" + number;
      all += "namespace attnjit::cuda::" + name + " {\n" + emitted(mods[i], backward).text + "}\n";
      all += "extern \"C\" void tile_" + number +
             "(const CapturedView* c, const int* t, int* s) { ask<attnjit::cuda::" + name + "::Mod>(c, t, s); }\n";
    }
    return all;
  }

  const test::HostLibrary library_;
  std::vector<std::vector<cuda::CapturedView>> tables_;
};

Said ask(const cpu::TileFacts& facts, const Mod& mod, const cpu::Tile& tile) {
  Said said{.kv = {tile.kv_first, tile.kv_last}, .q = {tile.q_first, tile.q_last}};
  if (facts.kind) said.kind = facts.kind(&tile, mod.table.data());
  if (facts.kv_range) facts.kv_range(&tile, mod.table.data(), &said.kv);
  if (facts.q_range) facts.q_range(&tile, mod.table.data(), &said.q);
  return said;
}

// ---- Masks

// Conditions over indices and captured values that a tile's analysis follows, and some that it does not.
class MaskGenerator {
 public:
  // `reads`: many captured reads by q_idx and kv_idx.
  explicit MaskGenerator(std::uint64_t seed, bool reads = false) : reads_(reads), random_(seed) {}

  std::string condition(int depth) {
    const auto inner = [&] { return condition(depth - 1); };
    switch (depth > 0 ? below(9) : 8) {
      case 0:
      case 1:
        return "(" + inner() + " and " + inner() + ")";
      case 2:
      case 3:
        return "(" + inner() + " or " + inner() + ")";
      case 4:
        return "not (" + inner() + ")";
      case 5:
        return "(" + inner() + " if " + inner() + " else " + inner() + ")";
      default:
        return atom();
    }
  }

 private:
  std::size_t below(std::size_t n) { return random_() % n; }
  std::string one_of(std::initializer_list<const char*> texts) { return texts.begin()[below(texts.size())]; }
  std::string relation() { return one_of({" < ", " <= ", " > ", " >= ", " == ", " != "}); }
  std::string small() { return std::to_string(static_cast<int>(below(40)) - 8); }

  std::string atom() {
    if (reads_ && below(2) == 0) {
      if (below(4) == 0)
        return one_of({"flags[h, 3 * kv_idx]", "flags[2, 4 * q_idx]", "flags[h, kv_idx - q_idx + 40]"});
      return "(" + read() + relation() + (below(2) == 0 ? read() : bound()) + ")";
    }
    switch (below(16)) {
      case 0:
        return one_of({"chosen[b]", "heads[h]", "some[h, kv_idx]", "b == 1", "h < 2", "true"});
      case 1:
        return "(float(" + plain(2) + ")" + relation() + one_of({"limit[b]", "3.5", "10.0", "inf", "7.0"}) + ")";
      case 2:
        return "(" + plain(1) + " * 0.5" + relation() + plain(1) + ")";
      case 3:
        return "(" + plain(1) + " + 1.0" + relation() + plain(1) + " * 2.0)";
      case 4:
        return "(" + one_of({"ids[q_idx]", "ids[kv_idx]"}) + relation() + one_of({"ids[kv_idx]", "len[b]", "2"}) + ")";
      case 5:
        return "(" +
               one_of({"edge[b]", "edge32[b]", "wide[b]", "q_idx + edge[b]", "kv_idx - edge[b]",
                       "3 * edge32[b] - q_idx", "edge[b] * 2 + kv_idx"}) +
               relation() + integer(1) + ")";
      case 6:
        return "((" + integer(2) + " > 3) != (" + integer(1) + " < 9))";
      case 7:
      case 8:
        return "(q_idx - kv_idx" + relation() + bound() + ")";
      case 9:
      case 10:
        return "(" + one_of({"q_idx", "kv_idx"}) + relation() + bound() + ")";
      default:
        return "(" + integer(2) + relation() + integer(2) + ")";
    }
  }
  std::string read() {
    return one_of({"far[7 * q_idx + 3]", "far[5 * kv_idx]", "far[9 * kv_idx - 60]", "rows[b, 4 * kv_idx + q_idx]",
                   "rows[b, 6 * q_idx]", "(rows[b, 2 * q_idx] - kv_idx)", "documents[40 * q_idx]", "ids[q_idx]",
                   "documents[31 * kv_idx]", "far[len[b] + 3 * q_idx]", "far[window[h] + kv_idx]"});
  }
  std::string bound() { return one_of({"len[b]", "wide[b]", "window[h]", "n", "0", "5", "13", "20"}); }

  // Of indices and literals alone.
  std::string plain(int depth) {
    switch (depth > 0 ? below(6) : below(3)) {
      case 0:
        return "q_idx";
      case 1:
        return "kv_idx";
      case 2:
        return one_of({"h", "b", "3", "-7", "12"});
      default:
        return "(" + plain(depth - 1) + one_of({" + ", " - "}) + plain(depth - 1) + ")";
    }
  }

  std::string integer(int depth) {
    const auto inner = [&] { return integer(depth - 1); };
    if (depth == 0)
      return one_of({"q_idx", "q_idx", "kv_idx", "kv_idx", "h", "b", "len[b]", "wide[b]", "window[h]", "n", "4", "11"});
    switch (below(12)) {
      case 0:
      case 1:
        return "(" + inner() + " + " + inner() + ")";
      case 2:
      case 3:
      case 4:
        return "(" + inner() + " - " + inner() + ")";
      case 5:
        return "(" + one_of({"2", "-3", "5"}) + " * " + inner() + ")";
      case 6:
        return "(" + inner() + " // " + one_of({"4", "8", "-3", "1"}) + ")";
      case 7:
        return "(" + inner() + " % " + one_of({"4", "7", "-5", "64"}) + ")";
      case 8:
        return "abs(" + inner() + ")";
      case 9:
        return one_of({"min(", "max("}) + inner() + ", " + inner() + ")";
      case 10:
        return "(" + inner() + " if " + inner() + relation() + small() + " else " + inner() + ")";
      default:
        return one_of({"(q_idx * kv_idx)", "int(kv_idx > 5)", "clamp(q_idx - kv_idx, -3, 6)", "(kv_idx * len[b])"});
    }
  }

  const bool reads_;
  std::mt19937_64 random_;
};

// What people write: here nothing is to be missed.
const std::vector<std::string>& usual_masks() {
  static const std::vector<std::string> masks{
      "q_idx >= kv_idx",
      "q_idx >= kv_idx and q_idx - kv_idx <= 5",
      "kv_idx < n or q_idx >= kv_idx",
      "abs(q_idx - kv_idx) < 7",
      "q_idx // 8 == kv_idx // 8",
      "q_idx // 8 >= kv_idx // 8",
      "kv_idx < len[b]",
      "kv_idx < wide[b] and q_idx < len[b]",
      "q_idx + wide[b] >= kv_idx",
      "q_idx + 8 >= kv_idx and kv_idx < len[b]",
      "float(kv_idx) < limit[b]",
      "float(q_idx - kv_idx) >= 0.0",
      "chosen[b]",
  };
  return masks;
}

// ---- Tests

TEST(CompilerTileFacts, AreRightInCudaForRandomMasks) {
  const int count = random_count(600);
  MaskGenerator generator(7);
  std::mt19937_64 random(8);
  Score score;
  for (int done = 0; done < count;) {
    std::vector<std::string> masks;
    std::vector<Mod> mods;
    mods.reserve(100);
    for (; done < count && mods.size() < 100; ++done) {
      masks.push_back(generator.condition(static_cast<int>(random() % 4)));
      mods.push_back(mod_of(masks.back()));
    }
    const HostTiles host(mods, done % 200 == 0);
    for (std::size_t i = 0; i < mods.size(); ++i) {
      const Kept kept(mods[i]);
      for (int k = 0; k < 60; ++k) {
        const cpu::Tile tile = random_tile(random);
        judge(masks[i], kept, tile, host.ask(i, tile), score);
      }
    }
  }
  RecordProperty("found_percent", static_cast<int>(100 * score.found / std::max(score.uniform_tiles, 1ll)));
  RecordProperty("range_percent_of_needed", static_cast<int>(100 * score.range / std::max(score.needed, 1ll)));
  // Reads by q_idx or kv_idx, products and what a text knows of its own contradictions are not followed.
  EXPECT_GT(score.found * 10, score.uniform_tiles * 7) << score.found << " of " << score.uniform_tiles;
  EXPECT_LT(score.range * 10, score.needed * 20) << score.range << " of " << score.needed;
}

TEST(CompilerTileFacts, AreRightOnTheCpuForRandomMasks) {
  const int count = random_count(600) / 5;
  MaskGenerator generator(9);
  std::mt19937_64 random(10);
  Score score;
  int told = 0;
  for (int i = 0; i < count; ++i) {
    const std::string mask = generator.condition(static_cast<int>(random() % 4));
    const Mod mod = mod_of(mask);
    const Elementwise compiled(mod);
    ASSERT_TRUE(compiled.compiled.code) << mask;
    const cpu::TileFacts facts = tile_facts_of(*compiled.compiled.code);
    EXPECT_EQ(facts.kind != nullptr, compiled.compiled.facts.knows_tiles) << mask;
    EXPECT_EQ(facts.kv_range != nullptr, compiled.compiled.facts.knows_kv_range) << mask;
    EXPECT_EQ(facts.q_range != nullptr, compiled.compiled.facts.knows_q_range) << mask;
    // Without captured values, the facts alone say the same.
    const auto alone = compile_cpu_tile_facts(mod.problem);
    ASSERT_FALSE(alone.error) << alone.error->message;
    EXPECT_EQ(alone.value != nullptr, facts.kind && !compiled.compiled.facts.tiles_read_captured) << mask;
    const Kept kept(mod);
    for (int k = 0; k < 60; ++k) {
      const cpu::Tile tile = random_tile(random);
      const Said said = ask(facts, mod, tile);
      judge(mask, kept, tile, said, score);
      if (!alone.value) continue;
      const Said again = ask(*alone.value, mod, tile);
      EXPECT_EQ(again.kind, said.kind) << mask;
      EXPECT_EQ(std::pair(again.kv.first, again.kv.last), std::pair(said.kv.first, said.kv.last)) << mask;
      EXPECT_EQ(std::pair(again.q.first, again.q.last), std::pair(said.q.first, said.q.last)) << mask;
    }
    told += alone.value != nullptr;
  }
  EXPECT_GT(told, count / 10);
  EXPECT_GT(score.found * 10, score.uniform_tiles * 7) << score.found << " of " << score.uniform_tiles;
}

TEST(CompilerTileFacts, AreRightWithSummariesOfCapturedValues) {
  const int count = random_count(600) / 3;
  MaskGenerator generator(12, true);
  std::mt19937_64 random(13);
  std::vector<std::string> masks;
  std::vector<std::unique_ptr<SummarisedMod>> summarised;
  std::vector<Mod> mods;
  for (int i = 0; i < count; ++i) {
    masks.push_back(generator.condition(static_cast<int>(random() % 3)));
    summarised.push_back(std::make_unique<SummarisedMod>(masks.back()));
    mods.push_back(summarised.back()->mod);
  }
  const HostTiles host(mods, false);
  Score score, of_cpu;
  std::size_t summaries = 0;
  for (std::size_t i = 0; i < mods.size(); ++i) {
    summaries += summarised[i]->summaries.size();
    const Kept kept(mods[i]);
    std::unique_ptr<Elementwise> compiled;
    if (i % 4 == 0) compiled = std::make_unique<Elementwise>(mods[i]);
    for (int k = 0; k < 60; ++k) {
      const cpu::Tile tile = random_tile(random);
      judge(masks[i], kept, tile, host.ask(i, tile), score);
      if (compiled && compiled->compiled.code)
        judge(masks[i], kept, tile, ask(tile_facts_of(*compiled->compiled.code), mods[i], tile), of_cpu);
    }
  }
  EXPECT_GT(summaries, mods.size() / 2);
  RecordProperty("found_percent", static_cast<int>(100 * score.found / std::max(score.uniform_tiles, 1ll)));
  // Blocks are larger than most of these tiles.
  EXPECT_GT(score.found * 10, score.uniform_tiles * 6) << score.found << " of " << score.uniform_tiles;
  EXPECT_GT(of_cpu.found * 10, of_cpu.uniform_tiles * 5) << of_cpu.found << " of " << of_cpu.uniform_tiles;
  RecordProperty("found_by_row_percent", static_cast<int>(100 * score.found_by_row / std::max(score.by_row, 1ll)));
  EXPECT_GT(score.found_by_row, 0) << "of " << score.by_row;
}

// Of ids in order, one block per position.
TEST(CompilerTileFacts, MissNothingOfDocuments) {
  const std::string mask = "documents[32 * q_idx] == documents[32 * kv_idx]";
  const SummarisedMod summarised(mask);
  ASSERT_EQ(summarised.summaries.size(), 1u);
  const HostTiles host({summarised.mod}, false);
  const Kept kept(summarised.mod);
  std::mt19937_64 random(14);
  Score score;
  for (int k = 0; k < 400; ++k) {
    const cpu::Tile tile = random_tile(random);
    judge(mask, kept, tile, host.ask(0, tile), score);
  }
  EXPECT_GT(score.uniform_tiles, 100);
  EXPECT_EQ(score.found, score.uniform_tiles) << emitted(summarised.mod, false).text;
  EXPECT_GT(score.by_row, 20);
  EXPECT_EQ(score.found_by_row, score.by_row);
}

// Up to eight comparisons of positions and their difference, of which not even a corner of a tile is missed.
std::string difference_mask(std::mt19937_64& random, int depth) {
  const auto one_of = [&](std::initializer_list<const char*> texts) {
    return std::string(texts.begin()[random() % texts.size()]);
  };
  if (depth == 0)
    return one_of({"q_idx", "kv_idx", "q_idx - kv_idx", "kv_idx - q_idx"}) + one_of({" < ", " <= ", " > ", " >= "}) +
           std::to_string(static_cast<int>(random() % 36) - 8);
  const std::string a = difference_mask(random, depth - 1), b = difference_mask(random, depth - 1);
  return one_of({"", "not "}) + "(" + a + one_of({" and ", " or "}) + b + ")";
}

TEST(CompilerTileFacts, MissNothingOfDifferences) {
  const int count = random_count(200);
  std::mt19937_64 random(15);
  std::vector<std::string> masks;
  std::vector<Mod> mods;
  mods.reserve(static_cast<std::size_t>(count));
  for (int i = 0; i < count; ++i) {
    masks.push_back(difference_mask(random, 1 + i % 3));
    mods.push_back(mod_of(masks.back()));
  }
  const HostTiles host(mods, false);
  for (std::size_t i = 0; i < mods.size(); ++i) {
    const Kept kept(mods[i]);
    Score score, of_cpu;
    std::unique_ptr<Elementwise> compiled;
    if (i % 8 == 0) compiled = std::make_unique<Elementwise>(mods[i]);
    for (int k = 0; k < 100; ++k) {
      const cpu::Tile tile = random_tile(random);
      judge(masks[i], kept, tile, host.ask(i, tile), score);
      if (compiled) judge(masks[i], kept, tile, ask(tile_facts_of(*compiled->compiled.code), mods[i], tile), of_cpu);
    }
    EXPECT_EQ(score.found, score.uniform_tiles) << masks[i];
    EXPECT_EQ(of_cpu.found, of_cpu.uniform_tiles) << masks[i];
  }
}

// Comparisons whose intervals say nothing, and what they say together.
TEST(CompilerTileFacts, TakeComparisonsTogether) {
  const auto kind = [](const char* mask, int q, int kv) {
    const Mod mod = mod_of(mask);
    const HostTiles host({mod}, false);
    return host
        .ask(0, {.b = 0, .h_first = 0, .h_last = 0, .q_first = q, .q_last = q + 7, .kv_first = kv, .kv_last = kv + 7})
        .kind;
  };
  // Queries from 6 on and keys up to 1, of which none is before its query by less than 3.
  EXPECT_EQ(kind("q_idx > 5 and kv_idx < 2 and q_idx - kv_idx < 3", 0, 0), cpu::TileKind::kSkip);
  EXPECT_EQ(kind("q_idx <= 5 or kv_idx >= 2 or q_idx - kv_idx >= 3", 0, 0), cpu::TileKind::kFull);
  EXPECT_EQ(kind("q_idx > 5 and kv_idx < 3 and q_idx - kv_idx < 5", 0, 0), cpu::TileKind::kPartial);
  // Queries from 13 on: the batch's length is 11.
  EXPECT_EQ(kind("q_idx >= kv_idx + len[b] and q_idx < 15 and kv_idx > 1", 5, 0), cpu::TileKind::kSkip);
  EXPECT_EQ(kind("q_idx >= kv_idx + len[b] and q_idx < 15 and kv_idx > 1", 6, 0), cpu::TileKind::kPartial);
}

// What intervals decide is not asked for again.
TEST(CompilerTileFacts, LeaveUsualMasksToIntervals) {
  EXPECT_THAT(
      emitted(mod_of("q_idx >= kv_idx and q_idx - kv_idx <= 5"), false).text,
      HasSubstr("if ((tile.kv_first > tile.q_last) | (tile.q_first - tile.kv_last > 5)) return TileKind::kSkip;"));
  EXPECT_THAT(emitted(mod_of("q_idx >= kv_idx and q_idx - kv_idx < window[0]"), false).text,
              Not(HasSubstr("(i1 < 1)")));
}

TEST(CompilerTileFacts, TellRowsApartWhereKeysMayBeAlike) {
  const auto knows_rows = [](const char* mask) { return analyze(mod_of(mask).problem).value.knows_rows; };
  EXPECT_TRUE(knows_rows("q_idx // 8 == kv_idx // 8"));
  EXPECT_TRUE(knows_rows("not (kv_idx // 8 > q_idx) and q_idx < len[b]"));
  EXPECT_FALSE(knows_rows("q_idx >= kv_idx"));
  EXPECT_FALSE(knows_rows("kv_idx < len[b] and q_idx < len[b]"));
  EXPECT_FALSE(knows_rows("(q_idx - kv_idx) // 8 == 0"));
}

// Nothing is read that the caller does not say to give.
TEST(CompilerTileFacts, ReadSummariesOnlyWhereTheyAreGiven) {
  const auto facts = analyze(mod_of("documents[q_idx] == documents[kv_idx]").problem);
  ASSERT_FALSE(facts.error) << facts.error->message;
  EXPECT_TRUE(facts.value.summaries.empty());
  EXPECT_FALSE(facts.value.knows_tiles);
}

TEST(CompilerTileFacts, MissNothingOfUsualMasks) {
  std::vector<Mod> mods;
  for (const std::string& mask : usual_masks()) mods.push_back(mod_of(mask));
  const HostTiles host(mods, false), backward(mods, true);
  std::mt19937_64 random(11);
  for (std::size_t i = 0; i < mods.size(); ++i) {
    const Kept kept(mods[i]);
    Score score, of_backward;
    for (int k = 0; k < 400; ++k) {
      const cpu::Tile tile = random_tile(random);
      judge(usual_masks()[i], kept, tile, host.ask(i, tile), score);
      judge(usual_masks()[i], kept, tile, backward.ask(i, tile), of_backward);
    }
    EXPECT_EQ(score.found, score.uniform_tiles) << usual_masks()[i];
    EXPECT_EQ(of_backward.found, of_backward.uniform_tiles) << usual_masks()[i];
  }
}

// The tiles that kernels meet have bounds of their own in the key's direction, and a window's range is exact.
TEST(CompilerTileFacts, GiveAWindowItsKeys) {
  const Mod mod = mod_of("q_idx >= kv_idx and q_idx - kv_idx < 6");
  const HostTiles host({mod}, false);
  const cpu::Tile tile{.b = 0, .h_first = 1, .h_last = 1, .q_first = 8, .q_last = 11, .kv_first = 0, .kv_last = 31};
  const Said said = host.ask(0, tile);
  EXPECT_EQ(said.kv.first, 3);
  EXPECT_EQ(said.kv.last, 11);
  EXPECT_EQ(said.kind, cpu::TileKind::kPartial);
  const cpu::Tile column{.b = 0, .h_first = 1, .h_last = 1, .q_first = 0, .q_last = 23, .kv_first = 8, .kv_last = 9};
  EXPECT_EQ(host.ask(0, column).q.first, 8);
  EXPECT_EQ(host.ask(0, column).q.last, 14);
}

TEST(CompilerTileFacts, OfTheTilesThatAreCompiledForTheCpu) {
  const Mod mod = mod_of("q_idx >= kv_idx");
  const cpu::Tile above{.b = 0, .h_first = 0, .h_last = 3, .q_first = 0, .q_last = 7, .kv_first = 8, .kv_last = 15};
  const cpu::Tile below{.b = 0, .h_first = 0, .h_last = 3, .q_first = 8, .q_last = 15, .kv_first = 0, .kv_last = 8};
  const auto forward = compile_cpu_tile(mod.problem);
  ASSERT_FALSE(forward.error) << forward.error->message;
  const auto backward = compile_cpu_gradient_tile(mod.problem);
  ASSERT_FALSE(backward.error) << backward.error->message;
  const auto alone = compile_cpu_tile_facts(mod.problem);
  ASSERT_FALSE(alone.error) << alone.error->message;
  ASSERT_TRUE(alone.value);
  for (const cpu::TileFacts& facts : {forward.value->tile_facts(), backward.value->tile_facts(), *alone.value}) {
    EXPECT_EQ(ask(facts, mod, above).kind, cpu::TileKind::kSkip);
    EXPECT_EQ(ask(facts, mod, below).kind, cpu::TileKind::kFull);
    EXPECT_EQ(ask(facts, mod, below).q.first, 8);
    EXPECT_EQ(ask(facts, mod, above).kv.last, 7);
  }
}

TEST(CompilerTileFacts, AreNotThereWhereNothingIsKnown) {
  for (const char* const mask : {"true", "score > 0.5", "q_idx >= kv_idx and score > 0.0", "ids[q_idx] == ids[kv_idx]",
                                 "some[h, kv_idx]", "q_idx * kv_idx * q_idx * edge[b] > 3"}) {
    const Mod mod = mod_of(mask);
    const auto tile = compile_cpu_tile(mod.problem);
    ASSERT_FALSE(tile.error) << tile.error->message;
    const cpu::TileFacts facts = tile.value->tile_facts();
    EXPECT_TRUE(!facts.kind && !facts.kv_range && !facts.q_range) << mask;
    const auto alone = compile_cpu_tile_facts(mod.problem);
    EXPECT_TRUE(!alone.error && !alone.value) << mask;
    EXPECT_THAT(emitted(mod, false).text, Not(HasSubstr("tile"))) << mask;
    EXPECT_THAT(emitted(mod, false).text, Not(HasSubstr("kKnows"))) << mask;
  }
}

// Equal facts are one code while somebody uses it.
TEST(CompilerTileFacts, AreSharedBetweenProblems) {
  const auto first = compile_cpu_tile_facts(mod_of("q_idx >= kv_idx").problem);
  const auto second = compile_cpu_tile_facts(mod_of("kv_idx <= q_idx").problem);
  const auto other = compile_cpu_tile_facts(mod_of("kv_idx < q_idx").problem);
  ASSERT_TRUE(first.value && second.value && other.value);
  EXPECT_EQ(first.value->kind, second.value->kind);
  EXPECT_NE(first.value->kind, other.value->kind);
  ModProblem unbound;
  EXPECT_THAT(compile_cpu_tile_facts(unbound).error.value_or(CompileError{}).message, HasSubstr("not bound"));
}

// Too long to be asked once per tile.
TEST(CompilerTileFacts, AreNotThereOfLongMasks) {
  std::string mask = "q_idx >= kv_idx";
  for (int i = 0; i < 200; ++i) mask += " and kv_idx != " + std::to_string(7 * i + 40);
  const auto facts = analyze(mod_of(mask).problem);
  ASSERT_FALSE(facts.error) << facts.error->message;
  EXPECT_TRUE(facts.value.has_mask);
  EXPECT_FALSE(facts.value.knows_tiles);
}

// Heads that are packed in a tile may have windows of their own.
TEST(CompilerTileFacts, ReadByHeadForOneHead) {
  const Mod mod = mod_of("q_idx - kv_idx < window[h]");
  const HostTiles host({mod}, false);
  cpu::Tile tile{.b = 0, .h_first = 0, .h_last = 0, .q_first = 20, .q_last = 23, .kv_first = 0, .kv_last = 7};
  EXPECT_EQ(host.ask(0, tile).kind, cpu::TileKind::kSkip);
  tile.h_last = 3;
  EXPECT_EQ(host.ask(0, tile).kind, cpu::TileKind::kPartial);
}

}  // namespace
}  // namespace attnjit::compiler::testing
