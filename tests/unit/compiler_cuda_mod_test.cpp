// Emitted mods without a GPU: their text, and compiled for the host against the interpreter.
#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <functional>
#include <limits>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <sstream>

#include "compiler/cuda_mod.h"
#include "compiler/frontend.h"
#include "dsl/float32_row.h"
#include "tests/support/host_library.h"
#include "tests/support/random_inputs.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using dsl::DType;
using dsl::Point;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kLn2 = 0.69314718055994530942;

struct Emitted {
  std::string text;
  double score_factor = 1;
  bool mask_reads_score = false;
  std::size_t sinks = 0;
  FoldedFacts folded;
  ModCost cost;
};

Emitted emitted(const ModProblem& problem, CudaAccuracy accuracy = CudaAccuracy::kFull, bool backward = false,
                ModForm form = ModForm::kPlain) {
  PhaseTimes phases;
  Frontend frontend(phases);
  if (!(backward ? frontend.run_backward(problem, {}, Target::kCuda) : frontend.run(problem, {}, Target::kCuda))) {
    ADD_FAILURE() << frontend.error();
    return {};
  }
  CudaMod mod =
      emit_cuda_mod(frontend.function(), problem, accuracy, frontend.facts().sinks, frontend.tile_facts(), form);
  EXPECT_EQ(mod.error, "");
  return {std::move(mod.text),
          frontend.score_factor(),
          frontend.facts().mask_reads_score,
          mod.sink_levels.size(),
          mod.folded.value_or(FoldedFacts{}),
          mod.cost};
}

std::string text_of(const std::string& expression, CudaAccuracy accuracy = CudaAccuracy::kFull) {
  return emitted(Mod(expression, {Tensor::of<float>("t", DType::kF32, {64}, std::vector<float>(64)),
                                  Tensor::of<float>("c", DType::kF32, {}, {1.0f})})
                     .problem,
                 accuracy)
      .text;
}

// ---- Host code

// What the folded form has beside score(), of one element.
struct FoldedParts {
  float shift, term, slope;
};

// Mods of forwards or of backwards compiled together, each run by its number.
class HostMods {
 public:
  using Forward = void (*)(const cuda::CapturedView*, const float* scores, const int* points, float* values,
                           bool* keeps, FoldedParts* parts, int n);
  // The last three: per point, of each sink, what it adds, to which capture and where.
  using Backward = void (*)(const cuda::CapturedView*, const cuda::GradientView*, const float* scores,
                            const float* grads, const int* points, float* values, bool* keeps, float* dscores,
                            float* added, int* captures, long long* places, int n);

  explicit HostMods(const std::vector<std::string>& mods, bool backward = false)
      : backward_(backward), library_(text(mods)) {}

  Forward forward(std::size_t i) const { return reinterpret_cast<Forward>(function(i)); }
  Backward backward(std::size_t i) const { return reinterpret_cast<Backward>(function(i)); }

 private:
  void* function(std::size_t i) const { return library_.find("run_" + std::to_string(i)); }

  std::string text(const std::vector<std::string>& mods) const {
    std::string all = test::host_prelude() + R"(
using namespace attnjit::cuda;
struct FoldedParts {
  float shift, term, slope;
};
template <typename Mod>
void run(const CapturedView* captured, const float* scores, const int* points, float* values, bool* keeps,
         FoldedParts* parts, int n) {
  static_assert(!Mod::kIdentity || !(Mod::kAdditive || Mod::kDrifts));
  static_assert(!Mod::kAdditive || Mod::kScoresInLog2);
  static_assert(!Mod::kLinear || (Mod::kAdditive && !Mod::kDrifts));
  for (int i = 0; i < n; ++i) {
    const auto block = Mod::block(captured, points[4 * i], points[4 * i + 1]);
    const auto row = Mod::row(captured, block, points[4 * i + 2]);
    const auto column = Mod::column(captured, block, points[4 * i + 3]);
    const auto q_minus_kv = points[4 * i + 2] - points[4 * i + 3];
    const auto diagonal = Mod::diagonal(captured, block, q_minus_kv, static_cast<float>(q_minus_kv));
    values[i] = Mod::kIdentity ? scores[i] : Mod::score(captured, scores[i], block, row, column, diagonal);
    keeps[i] = !Mod::kHasMask || Mod::keep(captured, scores[i], block, row, column, diagonal);
    parts[i] = {Mod::shift(captured, block, row), Mod::term(captured, block, row, column, diagonal),
                Mod::slope(captured, block)};
  }
}
template <typename Mod, typename... Sink>
void run_sinks(SinkList<Sink...>, const CapturedView* captured, const GradientView* gradients, float s, float grad,
               const int* here, const int* elsewhere, float* added, int* captures, long long* places) {
  const auto block = Mod::block(captured, here[0], here[1]);
  const auto row = Mod::row(captured, block, here[2]), other_row = Mod::row(captured, block, elsewhere[2]);
  const auto column = Mod::column(captured, block, here[3]), other_column = Mod::column(captured, block, elsewhere[3]);
  const auto at = [&](int difference) {
    return Mod::diagonal(captured, block, difference, static_cast<float>(difference));
  };
  const auto diagonal = at(here[2] - here[3]), other_diagonal = at(elsewhere[2] - elsewhere[3]);
  // What a hook says that it does not look at is another element's.
  [[maybe_unused]] const auto run = [&]<typename S>(int i) {
    constexpr bool kAll = S::kLevel == SinkLevel::kElement;
    captures[i] = S::kCapture;
    added[i] = S::kRowShift ? S::value(captured, kNan, grad, block, row, other_column, other_diagonal)
                            : S::value(captured, s, grad, block, row, column, diagonal);
    places[i] = S::offset(captured, gradients, kAll ? s : kNan, block,
                          kAll || S::kLevel == SinkLevel::kRow ? row : other_row,
                          kAll || S::kLevel == SinkLevel::kColumn ? column : other_column,
                          kAll || S::kLevel == SinkLevel::kDiagonal ? diagonal : other_diagonal);
  };
  [[maybe_unused]] int i = 0;
  (run.template operator()<Sink>(i++), ...);
}
template <typename Mod>
void run_backward(const CapturedView* captured, const GradientView* gradients, const float* scores, const float* grads,
                  const int* points, float* values, bool* keeps, float* dscores, float* added, int* captures,
                  long long* places, int n) {
  static_assert(!Mod::kScoresInLog2 && !Mod::kHasShift);
  for (int i = 0; i < n; ++i) {
    FoldedParts none;
    run<Mod>(captured, scores + i, points + 4 * i, values + i, keeps + i, &none, 1);
  }
  constexpr int kSinks = Mod::Sinks::kSize;
  for (int i = 0; i < n; ++i) {
    const int* const here = points + 4 * i;
    const auto block = Mod::block(captured, here[0], here[1]);
    const auto row = Mod::row(captured, block, here[2]);
    const auto column = Mod::column(captured, block, here[3]);
    const auto diagonal = Mod::diagonal(captured, block, here[2] - here[3], static_cast<float>(here[2] - here[3]));
    dscores[i] = Mod::kUnitDerivative ? grads[i]
                                      : Mod::dscore(captured, scores[i], grads[i], block, row, column, diagonal);
    run_sinks<Mod>(typename Mod::Sinks{}, captured, gradients, scores[i], grads[i], here, points + 4 * ((i + 1) % n),
                   added + kSinks * i, captures + kSinks * i, places + kSinks * i);
  }
}
)";
    for (std::size_t i = 0; i < mods.size(); ++i) {
      const std::string name = "mod" + std::to_string(i);
      all += "namespace attnjit::cuda::" + name + " {\n" + mods[i] + "}\n";
      const std::string number = std::to_string(i), type = "attnjit::cuda::" + name + "::Mod";
      all += "extern \"C\" void run_" + number;
      all += backward_ ? "(const CapturedView* c, const GradientView* g, const float* s, const float* d, const int* p, "
                         "float* v, bool* k, float* ds, float* a, int* ac, long long* ap, int n) {\n  run_backward<" +
                             type + ">(c, g, s, d, p, v, k, ds, a, ac, ap, n);\n}\n"
                       : "(const CapturedView* c, const float* s, const int* p, float* v, bool* k, FoldedParts* f, "
                         "int n) {\n  run<" +
                             type + ">(c, s, p, v, k, f, n);\n}\n";
    }
    return all;
  }

  const bool backward_;
  const test::HostLibrary library_;
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
  std::size_t sinks = 0;
  FoldedFacts folded;

  // Gradients are wanted of every floating tensor. `by_value`: scalars are passed so; `broadcast`: tensors have a
  // stride of 0 along their first dimension, and gradients of their full shape.
  void bind(bool by_value, bool fits_32, bool broadcast = false) {
    const auto expr = test::bound(text, captures);
    ASSERT_TRUE(expr) << dsl::format_error(expr.error(), text);
    problem.score_mod = *expr;
    if (!mask.empty()) problem.mask_mod = *test::bound(mask, {}, dsl::ModKind::kMaskMod);
    views = test::views(*expr, captures);
    for (dsl::CaptureView& view : views) {
      if (broadcast && view.rank > 0) view.stride[0] = 0;
      const auto rank = static_cast<std::size_t>(view.rank);
      if (dsl::value_type(view.dtype) == dsl::Type::kFloat) problem.gradients |= 1u << table.size();
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

  std::string emit(bool backward = false, ModForm form = ModForm::kPlain) {
    Emitted mod = emitted(problem, accuracy, backward, form);
    score_factor = mod.score_factor;
    mask_reads_score = mod.mask_reads_score;
    sinks = mod.sinks;
    folded = mod.folded;
    return std::move(mod.text);
  }

  struct Values {
    std::vector<float> values;
    std::unique_ptr<bool[]> keeps;
    std::vector<FoldedParts> parts;  // of the forward
    // Of the backward.
    std::vector<float> dscores, added;  // per point; per point of each sink
    std::vector<int> captures;
    std::vector<long long> places;
  };

  Values run(HostMods::Forward function, const std::vector<Point>& points) const {
    const std::vector<float> scores = scores_of(points);
    const std::vector<int> where = where_of(points);
    Values out{.values = std::vector<float>(points.size()),
               .keeps = std::unique_ptr<bool[]>(new bool[points.size()]),
               .parts = std::vector<FoldedParts>(points.size())};
    function(table.data(), scores.data(), where.data(), out.values.data(), out.keeps.get(), out.parts.data(),
             static_cast<int>(points.size()));
    return out;
  }

  // `grads`: of the modified scores.
  Values run(HostMods::Backward function, const std::vector<Point>& points, const std::vector<float>& grads) const {
    const std::vector<float> scores = scores_of(points);
    const std::vector<int> where = where_of(points);
    std::vector<cuda::GradientView> gradients(table.size());
    for (std::size_t i = 0; i < views.size(); ++i) {
      long long stride = 1;
      for (int d = views[i].rank - 1; d >= 0; --d) {
        gradients[i].stride[d] = stride;
        stride *= views[i].extent[d];
      }
    }
    const std::size_t n = points.size();
    Values out{.values = std::vector<float>(n),
               .keeps = std::unique_ptr<bool[]>(new bool[n]),
               .parts = {},
               .dscores = std::vector<float>(n),
               .added = std::vector<float>(n * sinks),
               .captures = std::vector<int>(n * sinks),
               .places = std::vector<long long>(n * sinks)};
    function(table.data(), gradients.data(), scores.data(), grads.data(), where.data(), out.values.data(),
             out.keeps.get(), out.dscores.data(), out.added.data(), out.captures.data(), out.places.data(),
             static_cast<int>(n));
    return out;
  }

  dsl::ModifiedScores gold() const {
    return dsl::ModifiedScores(problem.score_mod, views, problem.mask_mod ? &*problem.mask_mod : nullptr, {});
  }

  // Whether float32 decides the element.
  bool decides(const Point& point, const dsl::ModifiedScore& expected) const {
    if (!expected.agree) return false;  // the judge's own tests look into that
    // A condition's own rounding is not in the bound of what it drops.
    if (mask_reads_score && std::abs(point.score) > 1e6) return false;
    // log2(e) carries the largest numbers out of float32's range.
    if (expected.keep && std::abs(expected.value) > 2e38 && std::isfinite(expected.value)) return false;
    return expected.poison || expected.hi != kInfinity;
  }
  // Of a decided element; `value` in natural units.
  static bool is_right(const dsl::ModifiedScore& expected, double value, bool keeps) {
    if (!expected.keep) return !keeps || value == -kInfinity;
    if (expected.poison) return keeps && (std::isnan(expected.value) ? std::isnan(value) : value == kInfinity);
    const double counted = keeps ? value : -kInfinity;  // a condition that float32 may see otherwise has that bound
    return counted >= expected.lo && counted <= expected.hi;
  }
  std::string at(const Point& point) const {
    std::ostringstream out;
    out << text << (mask.empty() ? "" : "\nmask_mod " + mask) << "\nscore " << point.score << " b " << point.b << " h "
        << point.h << " q " << point.q_idx << " kv " << point.kv_idx << ": ";
    return out.str();
  }

  // How many of the points a float32 evaluation decides; they have to be right.
  int judge(HostMods::Forward function, const std::vector<Point>& points) {
    const Values out = run(function, points);
    dsl::ModifiedScores scores = gold();
    int decided = 0, wrong = 0;
    for (std::size_t i = 0; i < points.size() && wrong < 3; ++i) {
      const dsl::ModifiedScore expected = scores.at(points[i], std::abs(points[i].score));
      if (!decides(points[i], expected)) continue;
      ++decided;
      const double value = static_cast<double>(out.values[i]) * kLn2;
      if (is_right(expected, value, out.keeps[i])) continue;
      ++wrong;
      ADD_FAILURE() << at(points[i]) << value << (out.keeps[i] ? "" : " dropped") << ", expected " << expected.value
                    << " in [" << expected.lo << ", " << expected.hi << "]" << (expected.keep ? "" : " dropped") << "\n"
                    << emitted(problem, accuracy).text;
    }
    return decided;
  }

  // Likewise of the folded form, each way that it offers, where the plain form is right. What is taken out of a sum is
  // rounded elsewhere, as large as it is by itself; `overflows`: parts may leave float32's range where the sum does
  // not.
  int judge_folded(HostMods::Forward plain, HostMods::Forward function, const std::vector<Point>& points,
                   bool overflows) {
    const Values from = run(plain, points), out = run(function, points);
    dsl::ModifiedScores scores = gold();
    int decided = 0, wrong = 0;
    for (std::size_t i = 0; i < points.size() && wrong < 3; ++i) {
      const dsl::ModifiedScore expected = scores.at(points[i], std::abs(points[i].score));
      EXPECT_EQ(out.keeps[i], from.keeps[i]) << at(points[i]);
      if (!decides(points[i], expected)) continue;
      if (!is_right(expected, static_cast<double>(from.values[i]) * kLn2, from.keeps[i])) continue;
      ++decided;
      const auto [shift, term, slope] = out.parts[i];
      const float s = static_cast<float>(points[i].score * score_factor);
      const auto expect = [&](const char* way, float rest) {
        const bool finite = std::isfinite(rest) && std::isfinite(shift);
        if (!finite && overflows && std::isfinite(expected.value)) return;
        dsl::ModifiedScore bound = expected;
        if (finite) {
          const double size = std::abs(rest) + std::abs(shift) + (folded.additive ? std::abs(rest - s) : 0.0f);
          bound.lo -= 8 * dsl::kUnit * size;
          bound.hi += 8 * dsl::kUnit * size;
        }
        const double value = (static_cast<double>(rest) + static_cast<double>(shift)) * kLn2;
        if (is_right(bound, value, out.keeps[i])) return;
        ++wrong;
        ADD_FAILURE() << at(points[i]) << way << " gives " << value << (out.keeps[i] ? "" : " dropped") << ", expected "
                      << expected.value << " in [" << bound.lo << ", " << bound.hi << "]"
                      << (expected.keep ? "" : " dropped") << "\n"
                      << emitted(problem, accuracy, false, ModForm::kFolded).text;
      };
      expect("score()", out.values[i]);
      if (folded.additive) expect("s + term()", s + term);
      if (folded.linear) expect("s + slope()", s + slope * static_cast<float>(points[i].q_idx - points[i].kv_idx));
    }
    return decided;
  }

  // Likewise of the backward: value, gradient of the score, and what is added to each element of captured gradients.
  // Returns how many gradients that are not 0 were decided.
  int judge(HostMods::Backward function, const std::vector<Point>& points) {
    dsl::ModifiedScores scores = gold();
    std::vector<float> grads;
    for (std::size_t i = 0; i < points.size(); ++i) {
      const bool keeps = scores.at(points[i], std::abs(points[i].score)).keep;
      const float sign = i % 2 == 0 ? 1.0f : -1.0f;
      grads.push_back(keeps && i % 4 != 0 ? sign * static_cast<float>(1 + i % 5) / 5 : 0.0f);
    }
    const Values out = run(function, points, grads);
    int decided = 0, wrong = 0;
    for (std::size_t i = 0; i < points.size() && wrong < 3; ++i) {
      const dsl::ModifiedScore expected = scores.at(points[i], std::abs(points[i].score));
      const dsl::Interval derivative = scores.differentiate();
      const bool is_decided = decides(points[i], expected);
      std::ostringstream faults;
      if (is_decided && !is_right(expected, out.values[i], out.keeps[i]))
        faults << "value " << out.values[i] << ", expected " << expected.value;
      const auto expect = [&](const std::string& what, double actual, const dsl::Interval& interval) {
        if (grads[i] != 0 && (!is_decided || expected.poison || !out.keeps[i])) return;
        const std::optional<bool> right = is_gradient(actual, grads[i], interval);
        if (!right) return;
        decided += grads[i] != 0 ? 1 : 0;
        if (!*right)
          faults << what << " " << actual << " of a gradient of " << grads[i] << ", expected times " << interval.value
                 << " in [" << interval.lo << ", " << interval.hi << "]; ";
      };
      expect("dscore", out.dscores[i], derivative);

      using Place = std::pair<int, long long>;
      std::map<Place, dsl::Interval> derivatives;
      bool places_unsure = false;
      for (const dsl::ReadDerivative& read : scores.read_derivatives()) {
        if (((problem.gradients >> read.capture) & 1) == 0) continue;
        places_unsure |= read.place_unsure;
        dsl::Interval& sum = derivatives[{read.capture, read.place}];
        sum = {sum.value + read.derivative.value, sum.lo + read.derivative.lo, sum.hi + read.derivative.hi, 0,
               sum.unsure || read.derivative.unsure};
      }
      std::map<Place, double> added;
      for (const auto& [place, unused] : derivatives) added[place] = 0;
      for (std::size_t k = i * sinks; k < (i + 1) * sinks; ++k) {
        const dsl::CaptureView& tensor = views[static_cast<std::size_t>(out.captures[k])];
        long long elements = 1;
        for (int d = 0; d < tensor.rank; ++d) elements *= tensor.extent[d];
        if (out.places[k] < 0 || out.places[k] >= elements) faults << "sink " << k % sinks << " leaves its tensor; ";
        added[{out.captures[k], out.places[k]}] += static_cast<double>(out.added[k]);
      }
      for (const auto& [place, sum] : added) {
        if (places_unsure && grads[i] != 0) break;
        expect("capture " + std::to_string(place.first) + "[" + std::to_string(place.second) + "]", sum,
               derivatives[place]);
      }
      if (faults.str().empty()) continue;
      ++wrong;
      ADD_FAILURE() << at(points[i]) << faults.str() << "\n" << emitted(problem, accuracy, true).text;
    }
    return decided;
  }

 private:
  // Whether `actual` is `grad` times a derivative in the interval; nothing where float32 does not decide that.
  static std::optional<bool> is_gradient(double actual, double grad, const dsl::Interval& derivative) {
    constexpr double kLarge = 1e37, kSmall = 1e-37;  // where float32 may overflow on the way, or vanish
    if (grad == 0) return actual == 0;
    if (derivative.unsure) return std::nullopt;
    if (std::isnan(derivative.lo)) return std::isnan(actual);
    const auto [lo, hi] = std::minmax(grad * derivative.lo, grad * derivative.hi);
    if (derivative.lo == derivative.hi && std::isinf(derivative.lo)) return actual == lo;
    const double most = std::max(std::abs(lo), std::abs(hi));
    if (most > kLarge) return std::nullopt;
    if (derivative.lo == 0 && derivative.hi == 0) return actual == 0;
    const double roundings = 4 * dsl::kUnit * most + kSmall;
    return actual >= lo - roundings && actual <= hi + roundings;
  }

  std::vector<float> scores_of(const std::vector<Point>& points) const {
    std::vector<float> scores;
    for (const Point& point : points) scores.push_back(static_cast<float>(point.score * score_factor));
    return scores;
  }
  static std::vector<int> where_of(const std::vector<Point>& points) {
    std::vector<int> where;
    for (const Point& point : points)
      for (const std::int64_t index : {point.b, point.h, point.q_idx, point.kv_idx})
        where.push_back(static_cast<int>(index));
    return where;
  }
};

// The number of random expressions; more of them on request.
int random_count() { return testing::random_count(160); }

enum class Direction : std::uint8_t { kForward, kBackward };

// Compiles the cases and judges each on the same points; returns how much was decided.
int judged(std::vector<Case>& cases, const std::vector<Point>& points, Direction direction) {
  std::vector<std::string> texts;
  for (Case& made : cases) texts.push_back(made.emit(direction == Direction::kBackward));
  const HostMods mods(texts, direction == Direction::kBackward);
  int decided = 0;
  for (std::size_t i = 0; i < cases.size() && mods.forward(i); ++i)
    decided += direction == Direction::kForward ? cases[i].judge(mods.forward(i), points)
                                                : cases[i].judge(mods.backward(i), points);
  return decided;
}

std::vector<Point> random_points(std::mt19937_64& random, int count) {
  std::vector<Point> points;
  for (int i = 0; i < count; ++i) {
    points.push_back(test::random_point(random));
    points.back().score = static_cast<float>(points.back().score);
  }
  return points;
}

// Makes `count` cases and judges each on the same random points. At least `least` results per point have to be decided.
void expect_right(std::mt19937_64& random, int count, Direction direction, double least,
                  const std::function<Case(int)>& make) {
  constexpr int kTogether = 80;
  for (int first = 0; first < count; first += kTogether) {
    std::vector<Case> cases;
    for (int i = first; i < std::min(count, first + kTogether); ++i) cases.push_back(make(i));
    const std::vector<Point> points = random_points(random, 100);
    const int decided = judged(cases, points, direction);
    EXPECT_GT(decided, least * static_cast<double>(cases.size() * points.size()));
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
  made.bind(i % 2 == 0, random() % 2 == 0, random() % 4 == 0);
  return made;
}

TEST(CompilerCudaMod, RandomExpressionsAreRight) {
  std::mt19937_64 random(20);
  expect_right(random, random_count(), Direction::kForward, 1.0 / 3,
               [&](int i) { return random_case(random, i, false); });
}

// With what they capture by name: `t` of (3, 5), `u` of 20 and the scalars `c` and `g` are float32, `off` is 20 int32.
std::vector<Case> written_cases(const std::vector<std::string>& texts) {
  const auto bytes = [](const auto& values) {
    std::vector<unsigned char> out(values.size() * sizeof(values[0]));
    std::memcpy(out.data(), values.data(), out.size());
    return out;
  };
  std::vector<float> t(15), u(20);
  std::vector<std::int32_t> off(20);
  for (std::size_t i = 0; i < 15; ++i) t[i] = static_cast<float>(i) / 4 - 2;
  for (std::size_t i = 0; i < 20; ++i) u[i] = static_cast<float>(i * 7 % 20) / 8 - 1;
  for (std::size_t i = 0; i < 20; ++i) off[i] = static_cast<std::int32_t>(i * i % 23) - 2;
  const test::Captures all{{"t", {.dtype = DType::kF32, .extent = {3, 5}, .bytes = bytes(t)}},
                           {"u", {.dtype = DType::kF32, .extent = {20}, .bytes = bytes(u)}},
                           {"c", {.dtype = DType::kF32, .extent = {}, .bytes = bytes(std::vector<float>{0.75f})}},
                           {"g", {.dtype = DType::kF32, .extent = {}, .bytes = bytes(std::vector<float>{-1.5f})}},
                           {"off", {.dtype = DType::kInt32, .extent = {20}, .bytes = bytes(off)}}};
  std::vector<Case> cases;
  for (const std::string& text : texts) {
    Case& made = cases.emplace_back(Case{.text = text, .mask = {}, .captures = all});
    made.problem.batch = 3;
    made.problem.num_heads = 5;
    made.problem.seqlen_q = made.problem.seqlen_kv = 20;
    made.bind(cases.size() % 2 == 0, true);
  }
  return cases;
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
  std::vector<Point> points = random_points(random, 300);
  for (std::size_t i = 0; i < points.size(); i += 30) points[i].score = std::nan("");
  std::vector<Case> cases = written_cases(texts);
  EXPECT_GT(judged(cases, points, Direction::kForward), 50 * static_cast<int>(texts.size()));
}

// Compiles the folded forms of the cases and judges each on the same points; returns how much was decided.
int judged_folded(std::vector<Case>& cases, const std::vector<Point>& points, bool overflows) {
  std::vector<std::string> texts;
  for (Case& made : cases) texts.push_back(made.emit());
  for (Case& made : cases) texts.push_back(made.emit(false, ModForm::kFolded));
  const HostMods mods(texts);
  int decided = 0;
  for (std::size_t i = 0; i < cases.size() && mods.forward(i); ++i)
    decided += cases[i].judge_folded(mods.forward(i), mods.forward(cases.size() + i), points, overflows);
  return decided;
}

// A sum of what goes to different places of the folded form, with what written_cases() captures.
std::string random_sum(std::mt19937_64& random) {
  constexpr const char* kWithScore[] = {"score", "score", "score", "softcap(5)", "score * c", "score * 0.25", "-score"};
  constexpr const char* kTerms[] = {"2 * h",
                                    "u[q_idx]",
                                    "t[b, h] * c",
                                    "3.25",
                                    "q_idx * 0.3",
                                    "u[off[q_idx]]",
                                    "u[kv_idx]",
                                    "u[kv_idx] * u[q_idx]",
                                    "(u[kv_idx] - u[q_idx])",
                                    "u[q_idx - kv_idx + 5]",
                                    "c * (kv_idx - q_idx)",
                                    "(q_idx - kv_idx)",
                                    "0.5 * (q_idx - kv_idx + 3)",
                                    "t[b, h] * (2 - q_idx + kv_idx) * g",
                                    "h * (q_idx - kv_idx) / 3",
                                    "(c * (q_idx - kv_idx) - t[b, h])",
                                    "2 * (kv_idx - q_idx)",
                                    "abs(q_idx - kv_idx)",
                                    "where(q_idx > kv_idx, c, g)",
                                    "(3 * kv_idx - q_idx)",
                                    "kv_idx * g"};
  const auto one_of = [&](const auto& texts) { return std::string(texts[random() % std::size(texts)]); };
  std::string text = one_of(kWithScore);
  for (std::uint64_t terms = 1 + random() % 3; terms > 0; --terms) {
    const std::string term = one_of(kTerms);
    switch (random() % 8) {
      case 0:
        text = term + " - (" + text + ")";
        break;
      case 1:
        text = term + " + (" + text + ")";
        break;
      case 2:
        text = "(" + text + " + " + term + ") * 0.75";
        break;
      case 3:
      case 4:
        text += " - " + term;
        break;
      default:
        text += " + " + term;
    }
  }
  return random() % 4 == 0 ? "where(q_idx + 2 >= kv_idx, " + text + ", -inf)" : text;
}

TEST(CompilerCudaMod, FoldedFormsAreRight) {
  std::mt19937_64 random(27);
  for (const bool overflows : {false, true}) {
    std::vector<Case> cases;
    for (int i = 0; i < random_count() / 2; ++i) cases.push_back(random_case(random, i, !overflows));
    EXPECT_GT(judged_folded(cases, random_points(random, 100), overflows), 100 * static_cast<int>(cases.size()) / 3);
  }
  std::vector<std::string> texts;
  for (int i = 0; i < random_count(); ++i) texts.push_back(random_sum(random));
  std::vector<Case> cases = written_cases(texts);
  EXPECT_GT(judged_folded(cases, random_points(random, 100), false), 90 * static_cast<int>(cases.size()));
  const auto share = [&](bool FoldedFacts::* fact) {
    return std::ranges::count_if(cases, [&](const Case& made) { return made.folded.*fact; }) * 100 / random_count();
  };
  EXPECT_GT(share(&FoldedFacts::has_shift), 30);
  EXPECT_GT(share(&FoldedFacts::additive), 10);
  EXPECT_GT(share(&FoldedFacts::linear), 2);
  EXPECT_GT(share(&FoldedFacts::drifts), 10);
}

// What neither drifts nor is linear does not move from key to key, if captured tensors don't.
TEST(CompilerCudaMod, WhatDoesNotDriftStaysAlongTheKeys) {
  std::mt19937_64 random(28);
  std::vector<std::string> texts, mods;
  for (int i = 0; i < random_count(); ++i) texts.push_back(random_sum(random));
  std::vector<Case> cases = written_cases(texts);
  for (Case& made : cases) {
    for (auto& [name, tensor] : made.captures)
      for (std::size_t byte = 4; byte < tensor.bytes.size(); ++byte) tensor.bytes[byte] = tensor.bytes[byte - 4];
    mods.push_back(made.emit(false, ModForm::kFolded));
  }
  const HostMods host(mods);
  int still = 0;
  for (std::size_t i = 0; i < cases.size(); ++i) {
    ASSERT_TRUE(host.forward(i));
    if (cases[i].folded.linear || cases[i].folded.drifts) continue;
    ++still;
    std::vector<Point> points;
    for (int kv = 0; kv < 20; ++kv) points.push_back({.score = 0.5, .b = 1, .h = 2, .q_idx = 9, .kv_idx = kv});
    const std::vector<float> values = cases[i].run(host.forward(i), points).values;
    for (const float value : values) EXPECT_EQ(value, values[0]) << texts[i] << "\n" << mods[i];
  }
  EXPECT_GT(still, random_count() / 10);
}

TEST(CompilerCudaMod, FoldsWhatSoftmaxCannotSee) {
  const auto facts = [](const char* text, const char* mask = "") {
    Case made = written_cases({text})[0];
    made.mask = mask;
    if (*mask) made.problem.mask_mod = *test::bound(mask, {}, dsl::ModKind::kMaskMod);
    made.emit(false, ModForm::kFolded);
    const FoldedFacts& f = made.folded;
    return std::string(f.has_shift ? "shift " : "") + (f.additive ? "additive " : "") + (f.linear ? "linear " : "") +
           (f.drifts ? "drifts " : "");
  };
  const std::vector<std::pair<const char*, std::string>> expected{
      {"score", ""},
      {"score + 2 * h", "shift "},
      {"score + t[b, h] - u[q_idx] * 3", "shift "},
      {"score + (q_idx - kv_idx)", "additive linear "},
      {"score + t[b, h] * (kv_idx - q_idx)", "additive linear "},
      {"score - 0.5 * (q_idx - kv_idx) + h", "shift additive linear "},
      {"score + (q_idx - kv_idx) * c - 2 * (q_idx - kv_idx)", "additive linear "},
      {"score + (q_idx - kv_idx + 3)", "shift additive linear "},
      {"score + 0.5 * (q_idx - kv_idx + 3)", "shift additive linear "},
      {"score + h * (q_idx - kv_idx + 3)", "shift additive linear "},
      // Of an infinite factor the parts are NaN where the whole need not be.
      {"score + t[b, h] * (q_idx - kv_idx + 3)", "additive drifts "},
      {"score + c * (t[b, h] - 0.5 * (q_idx - kv_idx))", "additive drifts "},
      {"score + (q_idx - kv_idx + 3) / c", "additive drifts "},
      // Where the sum is small, its parts are not.
      {"score + (q_idx - kv_idx + 300)", "additive drifts "},
      {"score + (q_idx - kv_idx + off[h])", "additive drifts "},
      {"score + (u[q_idx] - u[kv_idx])", "additive "},
      {"score + (c * q_idx - c * kv_idx)", "additive drifts "},
      {"score + c * q_idx - c * kv_idx", "shift additive drifts "},
      {"score - abs(q_idx - kv_idx)", "additive drifts "},
      {"score + u[kv_idx] + 1", "shift additive "},
      {"score + u[q_idx - kv_idx + 9]", "additive "},
      {"2 * score + h", "shift "},
      {"h - score", "shift "},
      {"t[b, h] - (u[kv_idx] - (score + h))", "shift additive "},
      {"2 * (score + t[b, h])", "shift "},
      {"softcap(30)", ""},
      {"softcap(30) + h", "shift "},
      {"softcap(30) + c * (q_idx - kv_idx)", "drifts "},
      {"score * t[b, h]", ""},
      {"score * kv_idx", "drifts "},
      {"score + score", ""},
      {"t[b, h]", "shift "},
      {"where(q_idx >= kv_idx, score + h, -inf)", "shift "},
      {"where(score > 0, score + h, -inf)", "shift "}};
  for (const auto& [text, fact] : expected) EXPECT_EQ(facts(text), fact) << text;
  EXPECT_EQ(facts("score + h", "q_idx >= kv_idx"), "shift ");
}

TEST(CompilerCudaMod, CountsWhatAScoreCosts) {
  constexpr Slots kNothing;
  const std::vector<Tensor> tensors{Tensor::of<float>("t", DType::kF32, {64}, std::vector<float>(64)),
                                    Tensor::of<float>("slope", DType::kF32, {8}, std::vector<float>(8)),
                                    Tensor::of<float>("m", DType::kF32, {64, 64}, std::vector<float>(64 * 64)),
                                    Tensor::of<std::int32_t>("ids", DType::kInt32, {64}, std::vector<int>(64))};
  const auto cost = [&](const char* text, CudaAccuracy accuracy, bool backward = false) {
    return emitted(Mod(text, tensors).problem, accuracy, backward).cost;
  };
  const auto full = [&](const char* text) { return cost(text, CudaAccuracy::kFull); };

  const ModCost noop = full("noop");
  for (const Slots& slots : {noop.score, noop.mask, noop.gradient, noop.diagonal, noop.column, noop.row})
    EXPECT_EQ(slots, kNothing);

  // A comparison per diagonal, and -inf where it says so.
  const ModCost causal = full("where(q_idx >= kv_idx, score, -inf)");
  EXPECT_EQ(causal.score, kNothing);
  EXPECT_EQ(causal.mask, (Slots{.alu = 1}));
  EXPECT_EQ(causal.diagonal, (Slots{.alu = 1}));
  const ModCost window = full("where(q_idx >= kv_idx and q_idx - kv_idx <= 5, score, -inf)");
  EXPECT_EQ(window.mask, (Slots{.alu = 1}));
  EXPECT_EQ(window.diagonal, (Slots{.alu = 2}));
  const ModCost prefix = full("where(kv_idx < 7 or q_idx >= kv_idx, score, -inf)");
  EXPECT_EQ(prefix.mask, (Slots{.alu = 2}));
  EXPECT_EQ(prefix.diagonal, (Slots{.alu = 1}));
  EXPECT_EQ(prefix.column, (Slots{.alu = 1}));
  const ModCost documents = full("where(ids[q_idx] == ids[kv_idx], score, -inf)");
  EXPECT_EQ(documents.mask, (Slots{.alu = 2}));
  EXPECT_EQ(documents.row, (Slots{.fma = 1, .load = 1}));
  // Its index is clamped: there are more keys than elements.
  EXPECT_EQ(documents.column, (Slots{.alu = 2, .fma = 1, .load = 1}));

  // One addition; the rest per diagonal, with the difference as a float that the kernel has.
  const ModCost rel = full("rel");
  EXPECT_EQ(rel.score, (Slots{.fma = 1}));
  EXPECT_EQ(rel.diagonal, (Slots{.fma = 1}));
  EXPECT_EQ(rel.mask, kNothing);
  const ModCost alibi = full("score + slope[h] * (kv_idx - q_idx)");
  EXPECT_EQ(alibi.score, (Slots{.fma = 1}));
  EXPECT_EQ(alibi.diagonal, (Slots{.fma = 1}));
  EXPECT_EQ(full("head_bias").score, (Slots{.fma = 1}));
  const ModCost folded = emitted(Mod("head_bias", tensors).problem, CudaAccuracy::kFull, false, ModForm::kFolded).cost;
  EXPECT_EQ(folded.score, kNothing);
  EXPECT_EQ(folded.row, kNothing);

  // tanh and the factor, whose quotient the scale has.
  EXPECT_EQ(full("softcap(30)").score, (Slots{.alu = 5, .fma = 10, .mufu = 2}));
  EXPECT_EQ(cost("softcap(30)", CudaAccuracy::kBFloat16).score, (Slots{.fma = 1, .mufu = 1}));
  EXPECT_EQ(cost("softcap(30)", CudaAccuracy::kFloat16).score, (Slots{.fma = 4, .mufu = 2}));

  // A product that is added is one instruction with the sum; used twice, it is its own.
  EXPECT_EQ(cost("tanh(score * score + 1) * 0.5", CudaAccuracy::kBFloat16).score, (Slots{.fma = 2, .mufu = 1}));
  EXPECT_EQ(cost("tanh(score * score + 1) * (score * score)", CudaAccuracy::kFull).score,
            (Slots{.alu = 5, .fma = 9 + 3 + 1, .mufu = 2}));
  // A load per element and its address; one by column, of which the element pays a sum.
  const ModCost element = full("score + m[q_idx, kv_idx]");
  EXPECT_EQ(element.score.load, 1);
  const ModCost column = full("score + t[kv_idx]");
  EXPECT_EQ(column.score, (Slots{.fma = 1}));
  // What is finite stays so in log2 units.
  EXPECT_EQ(column.column, (Slots{.alu = 2 + 3, .fma = 1 + 1, .load = 1}));

  // The score is in natural units. 1 - t * t, times grad, where grad is not 0.
  const ModCost gradient = cost("softcap(30)", CudaAccuracy::kBFloat16, true);
  EXPECT_EQ(gradient.score, (Slots{.fma = 2, .mufu = 1}));
  EXPECT_EQ(gradient.gradient, (Slots{.alu = 2, .fma = 2}));
  EXPECT_EQ(cost("rel", CudaAccuracy::kFull, true).gradient, kNothing);
}

// Their every point is decided, and nothing overflows.
TEST(CompilerCudaMod, ModerateExpressionsAreRight) {
  std::mt19937_64 random(21);
  expect_right(random, random_count(), Direction::kForward, 1.0 / 3,
               [&](int i) { return random_case(random, i, true); });
}

TEST(CompilerCudaMod, GradientsOfRandomExpressionsAreRight) {
  std::mt19937_64 random(24);
  expect_right(random, random_count(), Direction::kBackward, 1.0 / 3,
               [&](int i) { return random_case(random, i, false); });
  expect_right(random, random_count(), Direction::kBackward, 1.0 / 2,
               [&](int i) { return random_case(random, i, true); });
}

// What random texts hold seldom: kinks and the ties at them, poison that a choice keeps out, poles, reads that share a
// place, row shifts, and places of every level.
TEST(CompilerCudaMod, GradientsOfWrittenExpressionsAreRight) {
  const std::vector<std::string> texts{
      "1 / score",
      "where(score > 0, log(score), score)",
      "where(score > 0, sqrt(score) * c, -score / u[q_idx])",
      "where(q_idx >= kv_idx, score * score, -inf)",
      "where(q_idx >= kv_idx, score / (q_idx - kv_idx), score * nan)",
      "where(kv_idx > 10, score + inf * c, score + u[kv_idx])",
      "min(score, score) + max(score, c) * u[q_idx]",
      "max(score, 0) + relu(score) * c + abs(score) * g",
      "clamp(score, -1, 1) + clamp(score, t[b, h], c) + clamp(c, score, g)",
      "min(u[q_idx], u[kv_idx]) * score + max(t[b, h], c)",
      "floor(score) * c + ceil(score) + round(score * u[q_idx]) + sign(score) * g",
      "score % 0.7 + score % c + score // 3 + c % score",
      "abs(score) ** 0.25 + score ** 3 + score ** 2 + score ** 0 + (b + 2) ** score + abs(c) ** score",
      "sqrt(score) + rsqrt(score) + log(score) + log2(score) + log1p(score)",
      "exp(score) + exp2(score) + sin(score) * cos(score) + erf(score)",
      "gelu(score) + silu(score) + sigmoid(score * c) + tanh(score * g)",
      "softcap(30) + u[h] * (kv_idx - q_idx)",
      "score + t[b, h]",
      "score + u[q_idx] * c + g",
      "score + u[kv_idx] + u[q_idx]",
      "score + u[q_idx] * u[q_idx]",
      "score + u[kv_idx] * u[kv_idx]",
      "score * u[abs(q_idx - kv_idx)]",
      "score + u[q_idx - kv_idx + 5] * t[b, h]",
      "score + u[clamp(q_idx - kv_idx + 8, 0, 16)]",
      "score + u[off[q_idx]] + u[off[kv_idx]] * score",
      "score + u[int(score)] + t[int(score), h]",
      "score * sigmoid(t[b, h]) * c",
      "where(u[q_idx] > 0, score, u[q_idx]) + where(score > 1, u[kv_idx], t[b, kv_idx])",
      "c",
      "floor(score)",
      "-inf"};
  std::mt19937_64 random(25);
  std::vector<Point> points = random_points(random, 300);
  constexpr float kTies[] = {0.75f, -1.0f, 1.0f, 0.0f, -1.5f};
  for (std::size_t i = 0; i < points.size(); i += 7) points[i].score = kTies[i % 5];
  std::vector<Case> cases = written_cases(texts);
  EXPECT_GT(judged(cases, points, Direction::kBackward), 100 * static_cast<int>(texts.size()));
}

// The backward's p is of the LSE that the forward summed up only if both compute the same values: with the same
// approximations, also where the derivative has a jump that the value does not have.
TEST(CompilerCudaMod, TheBackwardApproximatesAsTheForwardDid) {
  std::mt19937_64 random(26);
  std::vector<std::string> texts{"softcap(30)",
                                 "min(softcap(30), 5)",
                                 "abs(softcap(20)) - relu(20 * tanh(score) + c)",
                                 "max(exp(score * 0.1), 1 / score) + score / c",
                                 "clamp(100 * tanh(score), -50, 50)",
                                 "1000 * tanh(score * 0.01)",
                                 "where(tanh(score) > c, score, 0)",
                                 "30 * tanh(score) ** 3",
                                 "sigmoid(score) * silu(score) + log(abs(score) + 1)"};
  for (const CudaAccuracy accuracy : {CudaAccuracy::kFloat16, CudaAccuracy::kBFloat16}) {
    std::vector<Case> cases = written_cases(texts);
    for (int i = 0; i < random_count() / 4; ++i) cases.push_back(random_case(random, i, true));
    std::vector<std::string> forwards, backwards;
    for (Case& made : cases) {
      made.accuracy = accuracy;
      backwards.push_back(made.emit(true));
    }
    const HostMods backward(backwards, true);
    std::vector<std::vector<float>> natural;
    const std::vector<Point> points = random_points(random, 100);
    for (std::size_t i = 0; i < cases.size(); ++i) {
      ASSERT_TRUE(backward.backward(i));
      natural.push_back(cases[i].run(backward.backward(i), points, std::vector<float>(points.size(), 1.0f)).values);
      forwards.push_back(cases[i].emit());
    }
    const HostMods forward(forwards);
    for (std::size_t i = 0; i < cases.size(); ++i) {
      ASSERT_TRUE(forward.forward(i));
      const Case::Values out = cases[i].run(forward.forward(i), points);
      dsl::ModifiedScores gold = cases[i].gold();
      for (std::size_t n = 0; n < points.size(); ++n) {
        const dsl::ModifiedScore exact = gold.at(points[n], std::abs(points[n].score));
        if (!exact.keep || !std::isfinite(exact.value) || !cases[i].decides(points[n], exact)) continue;
        EXPECT_NEAR(out.values[n] * kLn2, natural[i][n], exact.hi - exact.lo + 0x1p-22 * std::abs(exact.value))
            << cases[i].at(points[n]) << "\n"
            << forwards[i] << backwards[i];
      }
    }
  }
}

// In the backward, too, but not where the derivative jumps and the value does not: there the derivative's own operands
// are exact.
TEST(CompilerCudaMod, DerivativesApproximateAwayFromTheirJumps) {
  const auto bf16 = [](const char* text) { return emitted(Mod(text).problem, CudaAccuracy::kBFloat16, true).text; };
  EXPECT_THAT(bf16("softcap(30)"), AllOf(HasSubstr("tanh_approx(s * 0.033333335f)"), Not(HasSubstr("tanhf"))));
  EXPECT_THAT(bf16("min(softcap(30), 5)"), AllOf(HasSubstr("min_nan(tanh_approx("), HasSubstr("tanhf(")));
  EXPECT_THAT(bf16("1000 * tanh(score)"), Not(HasSubstr("tanh_approx")));
  EXPECT_THAT(bf16("log(abs(score) + 1)"), HasSubstr("log_approx"));
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
      ASSERT_TRUE(host.forward(i));
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
        FoldedParts none;
        host.forward(i)(nullptr, &score, where, &value, &keep, &none, 1);
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
