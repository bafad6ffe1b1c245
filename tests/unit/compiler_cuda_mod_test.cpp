// Emitted mods without a GPU: their text, and compiled for the host against the interpreter.
#include <dlfcn.h>
#include <gmock/gmock.h>
#include <unistd.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <random>

#include "compiler/cuda_mod.h"
#include "compiler/frontend.h"
#include "dsl/float32_row.h"
#include "kernels_templates/cuda/embedded.h"
#include "tests/support/random_inputs.h"
#include "tests/support/temporary_directory.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;
using dsl::Point;
using ::testing::HasSubstr;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLn2 = 0.69314718055994530942;

struct Emitted {
  std::string text;
  double score_factor = 1;
  bool mask_reads_score = false;
};

Emitted emitted(const ModProblem& problem, CudaAccuracy accuracy = CudaAccuracy::kFull) {
  PhaseTimes phases;
  Frontend frontend(phases);
  if (!frontend.run(problem, {}, Target::kCuda)) {
    ADD_FAILURE() << frontend.error();
    return {};
  }
  CudaMod mod = emit_cuda_mod(frontend.function(), problem, accuracy);
  EXPECT_EQ(mod.error, "");
  return {std::move(mod.text), frontend.score_factor(), frontend.facts().mask_reads_score};
}

std::string text_of(const std::string& expression, CudaAccuracy accuracy = CudaAccuracy::kFull) {
  return emitted(Mod(expression, {Tensor::of<float>("t", DType::kF32, {64}, std::vector<float>(64)),
                                  Tensor::of<float>("c", DType::kF32, {}, {1.0f})})
                     .problem,
                 accuracy)
      .text;
}

// ---- Host code

// Mods compiled together, each run by its number.
class HostMods {
 public:
  using Function = void (*)(const cuda::CapturedView*, const float*, const int*, float*, bool*, int);

  explicit HostMods(const std::vector<std::string>& mods) {
    const std::string directory = directory_.path().string();
    const std::string source = directory + "/mods.cpp", library = directory + "/mods.so", log = directory + "/log";
    std::ofstream(source) << text(mods);
    // What would be undefined traps.
    const std::string command =
        ATTNJIT_TEST_CLANGXX
        " -std=c++20 -O1 -shared -fPIC -Wall -Wextra -Werror -Wno-unused-parameter -Wno-unused-const-variable"
        " -Wno-tautological-compare -Wno-bitwise-instead-of-logical -ffp-contract=fast -fno-math-errno"
        " -fsanitize=signed-integer-overflow,integer-divide-by-zero,shift-exponent,float-cast-overflow"
        " -fsanitize-trap=all -I" ATTNJIT_SOURCE_DIR " -o " +
        library + " " + source + " >" + log + " 2>&1";
    if (std::system(command.c_str()) != 0) {  // NOLINT(bugprone-command-processor)
      std::ifstream file(log);
      std::string line;
      std::string message;
      for (int i = 0; i < 40 && std::getline(file, line); ++i) message += line + "\n";
      ADD_FAILURE() << message;
      return;
    }
    library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    EXPECT_TRUE(library_) << dlerror();
  }
  ~HostMods() {
    if (library_) dlclose(library_);
  }
  HostMods(const HostMods&) = delete;
  HostMods& operator=(const HostMods&) = delete;

  Function function(std::size_t i) const {
    return library_ ? reinterpret_cast<Function>(dlsym(library_, ("run_" + std::to_string(i)).c_str())) : nullptr;
  }

 private:
  static std::string text(const std::vector<std::string>& mods) {
    const auto file = [](const char* path) {
      const cuda::EmbeddedText text = cuda::template_text(path);
      return std::string(text.data, text.size) + "\n";
    };
    std::string all = "#include \"tests/support/cuda_host.h\"\n" + file("cuda/params.h") + file("cuda/functions.cuh") +
                      file("cuda/mod_defaults.cuh") + R"(
using namespace attnjit::cuda;
template <typename Mod>
void run(const CapturedView* captured, const float* scores, const int* points, float* values, bool* keeps, int n) {
  for (int i = 0; i < n; ++i) {
    const auto block = Mod::block(captured, points[4 * i], points[4 * i + 1]);
    const auto row = Mod::row(captured, block, points[4 * i + 2]);
    const auto column = Mod::column(captured, block, points[4 * i + 3]);
    const auto q_minus_kv = points[4 * i + 2] - points[4 * i + 3];
    const auto diagonal = Mod::diagonal(captured, block, q_minus_kv, static_cast<float>(q_minus_kv));
    values[i] = Mod::kIdentity ? scores[i] : Mod::score(captured, scores[i], block, row, column, diagonal);
    keeps[i] = !Mod::kHasMask || Mod::keep(captured, scores[i], block, row, column, diagonal);
  }
}
)";
    for (std::size_t i = 0; i < mods.size(); ++i) {
      const std::string name = "mod" + std::to_string(i);
      all += "namespace attnjit::cuda::" + name + " {\n" + mods[i] + "}\n";
      all +=
          "extern \"C\" void run_" + std::to_string(i) +
          "(const CapturedView* c, const float* s, const int* p, float* v, bool* k, int n) {\n  run<attnjit::cuda::" +
          name + "::Mod>(c, s, p, v, k, n);\n}\n";
    }
    return all;
  }

  const test::TemporaryDirectory directory_;
  void* library_ = nullptr;
};

// An expression with its captured values, ready to be emitted and judged.
struct Case {
  std::string text;
  std::string mask;
  test::Captures captures;
  ModProblem problem;
  std::vector<dsl::CaptureView> views;
  std::vector<cuda::CapturedView> table;
  CudaAccuracy accuracy = CudaAccuracy::kFull;
  double score_factor = 1;
  bool mask_reads_score = false;

  // Scalars are passed by value in every second case.
  void bind(bool by_value, bool fits_32) {
    const auto expr = test::bound(text, captures);
    ASSERT_TRUE(expr) << dsl::format_error(expr.error(), text);
    problem.score_mod = *expr;
    if (!mask.empty()) problem.mask_mod = *test::bound(mask, {}, dsl::ModKind::kMaskMod);
    views = test::views(*expr, captures);
    for (const dsl::CaptureView& view : views) {
      const auto rank = static_cast<std::size_t>(view.rank);
      CaptureInfo info{.dtype = view.dtype, .extent = {}, .stride_class = {}, .offsets_fit_32 = fits_32};
      cuda::CapturedView native{.data = view.data, .value = 0, .stride = {}, .extent = {}};
      if (rank == 0 && by_value) {
        std::memcpy(&native.value, view.data, static_cast<std::size_t>(dsl::dtype_size(view.dtype)));
        native.data = nullptr;
      }
      for (std::size_t i = 0; i < rank; ++i) {
        info.extent.push_back(view.extent[i]);
        info.stride_class.push_back(view.stride[i] == 0   ? StrideClass::kZero
                                    : view.stride[i] == 1 ? StrideClass::kUnit
                                                          : StrideClass::kAny);
        native.extent[i] = static_cast<int>(view.extent[i]);
        native.stride[i] = view.stride[i];
      }
      problem.captures.push_back(std::move(info));
      table.push_back(native);
    }
  }

  std::string emit() {
    Emitted mod = emitted(problem, accuracy);
    score_factor = mod.score_factor;
    mask_reads_score = mod.mask_reads_score;
    return std::move(mod.text);
  }

  // How many of the points a float32 evaluation decides; they have to be right.
  int judge(HostMods::Function function, const std::vector<Point>& points) {
    const std::size_t n = points.size();
    std::vector<float> scores, values(n);
    std::vector<int> where;
    const std::unique_ptr<bool[]> keeps(new bool[n]);
    for (const Point& point : points) {
      scores.push_back(static_cast<float>(point.score * score_factor));
      for (const std::int64_t index : {point.b, point.h, point.q_idx, point.kv_idx})
        where.push_back(static_cast<int>(index));
    }
    function(table.data(), scores.data(), where.data(), values.data(), keeps.get(), static_cast<int>(n));
    dsl::ModifiedScores gold(problem.score_mod, views, problem.mask_mod ? &*problem.mask_mod : nullptr, {});
    int decided = 0, wrong = 0;
    for (std::size_t i = 0; i < n && wrong < 3; ++i) {
      const dsl::ModifiedScore expected = gold.at(points[i], std::abs(points[i].score));
      if (!expected.agree) continue;  // the judge's own tests look into that
      // A condition's own rounding is not in the bound of what it drops.
      if (mask_reads_score && std::abs(points[i].score) > 1e6) continue;
      // log2(e) carries the largest numbers out of float32's range.
      if (expected.keep && std::abs(expected.value) > 2e38 && std::isfinite(expected.value)) continue;
      const double value = static_cast<double>(values[i]) * kLn2;
      bool right = true;
      if (!expected.poison && expected.hi == kInfinity) {
        continue;  // undecided
      } else if (!expected.keep) {
        right = !keeps[i] || value == -kInfinity;
      } else if (expected.poison) {
        right = keeps[i] && (std::isnan(expected.value) ? std::isnan(value) : value == kInfinity);
      } else {
        right = keeps[i] && value >= expected.lo && value <= expected.hi;
      }
      ++decided;
      if (right) continue;
      ++wrong;
      ADD_FAILURE() << text << (mask.empty() ? "" : "\nmask_mod " + mask) << "\nscore " << points[i].score << " b "
                    << points[i].b << " h " << points[i].h << " q " << points[i].q_idx << " kv " << points[i].kv_idx
                    << ": " << value << (keeps[i] ? "" : " dropped") << ", expected " << expected.value << " in ["
                    << expected.lo << ", " << expected.hi << "]" << (expected.keep ? "" : " dropped") << "\n"
                    << emitted(problem, accuracy).text;
    }
    return decided;
  }
};

// The number of random expressions; more of them on request.
int random_count() {
  const char* const wanted = std::getenv("ATTNJIT_TEST_RANDOM_MODS");
  return wanted ? static_cast<int>(std::strtol(wanted, nullptr, 10)) : 160;
}

// Compiles `count` cases and judges each on the same random points.
void expect_right(std::mt19937_64& random, int count, const std::function<Case(int)>& make) {
  constexpr int kTogether = 80;
  for (int first = 0; first < count; first += kTogether) {
    std::vector<Case> cases;
    std::vector<std::string> texts;
    for (int i = first; i < std::min(count, first + kTogether); ++i) {
      cases.push_back(make(i));
      texts.push_back(cases.back().emit());
    }
    const HostMods mods(texts);
    std::vector<Point> points;
    for (int i = 0; i < 100; ++i) {
      points.push_back(test::random_point(random));
      points.back().score = static_cast<float>(points.back().score);
    }
    int decided = 0;
    for (std::size_t i = 0; i < cases.size(); ++i) {
      ASSERT_TRUE(mods.function(i));
      decided += cases[i].judge(mods.function(i), points);
    }
    EXPECT_GT(decided, static_cast<int>(cases.size() * points.size() / 3));
  }
}

Case random_case(std::mt19937_64& random, int i, bool moderate) {
  test::RandomExpressionOptions options{.size = 3 + i % 14, .moderate = moderate};
  const test::RandomExpression expression = test::random_expression(random, options);
  Case made{.text = expression.text, .mask = {}, .captures = test::random_captures(random, expression)};
  if (random() % 4 == 0) {
    options.is_mask = true;
    options.max_captures = 0;
    made.mask = test::random_expression(random, options).text;
  }
  made.problem.batch = 3;
  made.problem.num_heads = 5;
  made.problem.seqlen_q = random() % 3 == 0 ? 2'000'000'000 : 20;
  made.problem.seqlen_kv = random() % 3 == 0 ? 2'000'000'000 : 20;
  made.bind(i % 2 == 0, random() % 2 == 0);
  return made;
}

TEST(CompilerCudaMod, RandomExpressionsAreRight) {
  std::mt19937_64 random(20);
  expect_right(random, random_count(), [&](int i) { return random_case(random, i, false); });
}

// What random texts hold seldom: each comparison's negation under NaN, sums of both positions, the ends of integers.
TEST(CompilerCudaMod, WrittenExpressionsAreRight) {
  const std::vector<std::string> texts{
      "float(not (score <= 0.5)) + float(not (score <= h))",
      "float(not (score < 0.5)) + float(not (score < h))",
      "float(not (score > 0.5)) + float(not (score > h))",
      "float(not (score >= 0.5)) + float(not (score >= h))",
      "float(not (score == 0.5)) + float(not (score == h))",
      "where(not (0.5 < score < 1.5), 1, 2)",
      "where(isnan(score), 1, where(isinf(score), 2, 3))",
      "min(score, h - 1.5) + max(score, 0.25 * b)",
      "relu(score) + clamp(score, -1, h)",
      "score + (2 * q_idx - 3 * kv_idx)",
      "score + (q_idx + kv_idx) * 0.5 - max(q_idx, kv_idx) * min(q_idx, 2 * kv_idx)",
      "score + where(h > 2, q_idx - 2 * kv_idx, q_idx * kv_idx)",
      "score + abs(q_idx - kv_idx) / 49 + (kv_idx - q_idx + 3) // 7 + (h + q_idx - kv_idx) % 5",
      "where(q_idx + 3 >= kv_idx and kv_idx > q_idx - 5, score, -inf)",
      "where((q_idx - kv_idx) // 4 == h, score / 49, score // 49)",
      "score + (q_idx - kv_idx) % 8 + (q_idx - kv_idx) // 16 + kv_idx % 1 + q_idx // -8",
      "score + (9223372036854775807 + h) % 10 + (-9223372036854775807 - 1) // (h - 3) % 7",
      "score + ((-9223372036854775807 - b) % (h - 2)) + (q_idx // (h - 2)) + q_idx % (b - 1)",
      "score + (q_idx * 4294967296) // 4294967295 % 100 + (kv_idx - 7) ** 300 % 100",
      "score + float(int(h * 1e18) % 7) + float(int(1.0 / (h - 2)) % 5) + float(int(nan) + h)",
      "round(score) + floor(-score) + ceil(score * 0.5) + sign(score)",
      "gelu(score) + silu(score) + sigmoid(score) + erf(score) + tanh(score)",
      "log1p(abs(score)) + rsqrt(abs(score) + 1) + sqrt(score) + log(score) + sin(score) * cos(score)",
      "score % 0.7 + score % -2.5 + score // 3",
      "abs(score) ** 0.25 + score ** 3 + (b + 2) ** score"};
  std::mt19937_64 random(23);
  std::vector<Case> cases;
  std::vector<std::string> mods;
  for (const std::string& text : texts) {
    Case made{.text = text, .mask = {}, .captures = {}};
    made.problem.batch = 3;
    made.problem.num_heads = 5;
    made.problem.seqlen_q = made.problem.seqlen_kv = 20;
    made.bind(false, true);
    mods.push_back(made.emit());
    cases.push_back(std::move(made));
  }
  const HostMods host(mods);
  std::vector<Point> points;
  for (int i = 0; i < 300; ++i) {
    points.push_back(test::random_point(random));
    if (i % 30 == 0) points.back().score = std::nan("");
    points.back().score = static_cast<float>(points.back().score);
  }
  for (std::size_t i = 0; i < cases.size(); ++i) {
    ASSERT_TRUE(host.function(i));
    EXPECT_GT(cases[i].judge(host.function(i), points), 50) << cases[i].text;
  }
}

// Their every point is decided, and nothing overflows.
TEST(CompilerCudaMod, ModerateExpressionsAreRight) {
  std::mt19937_64 random(21);
  expect_right(random, random_count(), [&](int i) { return random_case(random, i, true); });
}

// Hardware's approximations stay away where their error would be seen: in float32, before a jump, multiplied by more
// than the caps that people use, or of what does not depend on the score.
TEST(CompilerCudaMod, ApproximatesOnlyWhatTheScoreBlurs) {
  const auto bf16 = [](const char* text) { return text_of(text, CudaAccuracy::kBFloat16); };
  EXPECT_THAT(bf16("softcap(30)"), HasSubstr("tanh_approx(s) * 43.28085f"));
  EXPECT_THAT(bf16("where(q_idx > kv_idx, softcap(30), -inf) + t[q_idx]"), HasSubstr("tanh_approx"));
  EXPECT_THAT(text_of("softcap(30)", CudaAccuracy::kFloat16), HasSubstr("tanh_by_exp2"));
  EXPECT_THAT(text_of("softcap(30)"), HasSubstr("tanhf"));
  for (const char* text : {"1000 * tanh(score)", "c * tanh(score)", "score + tanh(c)", "where(tanh(score) > c, 1, 2)",
                           "floor(tanh(score))", "exp(tanh(score))", "score * tanh(score)", "tanh(score) % 0.1"})
    EXPECT_THAT(bf16(text), HasSubstr("tanhf")) << text;
  EXPECT_THAT(bf16("exp(score) + sqrt(score) + score / c"),
              AllOf(HasSubstr("exp_approx"), HasSubstr("sqrt_approx"), HasSubstr("divide_approx")));
  EXPECT_THAT(bf16("exp(q_idx - kv_idx) + score // 3"), AllOf(HasSubstr("expf("), HasSubstr("divide_by(s, 3.0f")));
}

TEST(CompilerCudaMod, ApproximationsAreWithinTheirBounds) {
  std::mt19937_64 random(22);
  const std::vector<std::string> texts{
      "softcap(30)",       "20 * tanh(score / 20) + b",  "exp(score) * 0.01",
      "log(abs(score)+1)", "sigmoid(score) * score / 7", "silu(score)",
      "sqrt(abs(score))",  "score / (1 + abs(score))",   "exp2(score / 4) + log2(abs(score))"};
  for (const CudaAccuracy accuracy : {CudaAccuracy::kFloat16, CudaAccuracy::kBFloat16}) {
    std::vector<std::string> mods;
    std::vector<double> factors;
    for (const std::string& text : texts) {
      Emitted mod = emitted(Mod(text).problem, accuracy);
      mods.push_back(std::move(mod.text));
      factors.push_back(mod.score_factor);
    }
    const HostMods host(mods);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      SCOPED_TRACE(texts[i]);
      const Mod mod(texts[i]);
      dsl::Interpreter interpreter(mod.problem.score_mod, mod.views);
      ASSERT_TRUE(host.function(i));
      for (int n = 0; n < 200; ++n) {
        const Point point = n == 0   ? Point{.score = kInfinity}
                            : n == 1 ? Point{.score = -kInfinity}
                            : n == 2 ? Point{.score = std::nan("")}
                                     : test::random_point(random);
        const double expected = interpreter.score_mod(point).value;
        const float score = static_cast<float>(point.score * factors[i]);
        const int where[] = {static_cast<int>(point.b), 0, 0, 0};
        float value = 0;
        bool keep = false;
        host.function(i)(nullptr, &score, where, &value, &keep, 1);
        // Of a cap of 30: 2^-11 of it, the bound of LSE in numerics.md doubled by the rest, or 2^-21 of the cap.
        const bool tanh = texts[i].find("tanh") != std::string::npos || i == 0;
        const double size = std::max(1.0, std::abs(i == 1 ? expected - static_cast<double>(point.b) : expected));
        const double bound = !tanh ? 3e-6 * size : accuracy == CudaAccuracy::kBFloat16 ? 0x1p-10 * size : 30 * 0x1p-21;
        if (std::isnan(expected)) {
          EXPECT_TRUE(std::isnan(value)) << point.score;
        } else if (std::isinf(expected)) {
          EXPECT_EQ(value, expected) << point.score;
        } else {
          EXPECT_NEAR(value * kLn2, expected, bound) << point.score;
        }
      }
    }
  }
}

}  // namespace
}  // namespace attnjit::compiler::testing
