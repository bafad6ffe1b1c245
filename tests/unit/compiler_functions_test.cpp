// The language's functions as compiled code, over the whole of float, against double.
#include <bit>
#include <cmath>
#include <limits>

#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kSmallestNormal = std::numeric_limits<float>::min();

struct Function {
  const char* text;  // of `score`
  double (*exact)(double);
  double bound;                    // relative error
  double flush = kSmallestNormal;  // exact values below may come out as anything below: subnormals may be flushed
};

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x / (1 + std::exp(-x)); }
double gelu(double x) { return 0.5 * x * std::erfc(-x * 0.70710678118654752440); }
// Python's, of floats: fmod of two floats is exact in double.
double floor_mod(double x, double y) {
  const double remainder = std::fmod(x, y);
  return remainder != 0 && (remainder < 0) != (y < 0) ? remainder + y : remainder;
}
double sign(double x) { return std::isnan(x) ? x : (x > 0) - (x < 0); }

// docs/compiler.md shows the errors measured with ATTNJIT_TEST_FLOAT_STRIDE=1021: every 1021st float.
constexpr Function kFunctions[] = {
    {"exp(score)", [](double x) { return std::exp(x); }, 3e-7},
    {"exp2(score)", [](double x) { return std::exp2(x); }, 3e-7},
    {"log(score)", [](double x) { return std::log(x); }, 3e-7},
    {"log2(score)", [](double x) { return std::log2(x); }, 3e-7},
    {"log1p(score)", [](double x) { return std::log1p(x); }, 3e-7},
    {"sqrt(score)", [](double x) { return std::sqrt(x); }, 1.2e-7},
    {"rsqrt(score)", [](double x) { return 1 / std::sqrt(x); }, 2e-7},
    {"tanh(score)", [](double x) { return std::tanh(x); }, 4e-7},
    // The division goes into the scale of the scores: the bound is that of both.
    {"tanh(score / 30)", [](double x) { return std::tanh(x / 30); }, 4e-7},
    {"sigmoid(score)", [](double x) { return sigmoid(x); }, 4e-7},
    {"silu(score)", [](double x) { return silu(x); }, 4e-7, 3.2e-37},
    {"gelu(score)", [](double x) { return gelu(x); }, 6e-7},
    {"erf(score)", [](double x) { return std::erf(x); }, 4e-7},
    {"sin(score)", [](double x) { return std::sin(x); }, 3e-7},
    {"cos(score)", [](double x) { return std::cos(x); }, 3e-7},
    {"abs(score)", [](double x) { return std::fabs(x); }, 0},
    {"relu(score)", [](double x) { return std::isnan(x) ? x : std::fmax(x, 0.0); }, 0},
    {"floor(score)", [](double x) { return std::floor(x); }, 0},
    {"ceil(score)", [](double x) { return std::ceil(x); }, 0},
    {"round(score)", [](double x) { return std::nearbyint(x); }, 0},
    {"sign(score)", [](double x) { return sign(x); }, 0},
    {"float(isinf(score))", [](double x) { return std::isinf(x) ? 1.0 : 0.0; }, 0},
    {"float(isnan(score))", [](double x) { return std::isnan(x) ? 1.0 : 0.0; }, 0},
    {"score ** 2.5", [](double x) { return std::pow(x, 2.5); }, 2e-7},
    {"abs(score) ** -1.0", [](double x) { return std::pow(std::fabs(x), -1.0); }, 2e-7},
    {"score ** 3", [](double x) { return x * x * x; }, 2e-7},
    {"1.5 ** score", [](double x) { return std::pow(1.5, x); }, 2e-7},
    {"0.0 ** score", [](double x) { return std::pow(0.0, x); }, 0},
    {"(-2.0) ** score", [](double x) { return std::pow(-2.0, x); }, 2e-7},
    // Quotients from nothing to 2^277; one rounding, of the sum with the divisor.
    {"score % 3", [](double x) { return floor_mod(x, 3.0f); }, 6e-8},
    {"score % -0.7", [](double x) { return floor_mod(x, -0.7f); }, 6e-8},
    {"score % 16777213.0", [](double x) { return floor_mod(x, 16777213.0f); }, 6e-8},
    {"score % 3.3e-42", [](double x) { return floor_mod(x, 3.3e-42f); }, 6e-8},
    {"score % 3.3e38", [](double x) { return floor_mod(x, 3.3e38f); }, 6e-8},
    {"score % 0.0", [](double x) { return floor_mod(x, 0.0f); }, 6e-8},
    {"score % inf", [](double x) { return floor_mod(x, kInfinity); }, 6e-8},
    {"score % nan", [](double x) { return floor_mod(x, std::nan("")); }, 6e-8},
    {"3.3e38 % score", [](double x) { return floor_mod(3.3e38f, x); }, 6e-8},
    {"-1.9 % score", [](double x) { return floor_mod(-1.9f, x); }, 6e-8},
    {"inf % score", [](double x) { return floor_mod(kInfinity, x); }, 6e-8},
};

// Error of `actual` as Function counts it, infinite where NaN or infinity stand in the wrong place.
double error_of(double actual, double exact, double flush) {
  if (std::isnan(exact) || std::isnan(actual)) return std::isnan(exact) && std::isnan(actual) ? 0 : kInfinity;
  const double rounded = static_cast<float>(exact);
  if (std::isinf(rounded) || std::isinf(actual)) {
    if (rounded == actual) return 0;
    // Within a rounding of the largest float either is right.
    const double largest = std::numeric_limits<float>::max();
    return std::abs(exact) > largest * (1 - 4e-7) && std::abs(exact) < largest * (1 + 4e-7) ? 0 : kInfinity;
  }
  const double error = std::abs(actual - exact);
  const bool flushed = std::abs(exact) < flush && error <= flush;
  return flushed ? 0 : error / std::abs(exact);
}

TEST(CompilerFunctions, AreRightOverAllFloats) {
  std::vector<dsl::Point> points;
  const char* const stride = std::getenv("ATTNJIT_TEST_FLOAT_STRIDE");
  const std::uint64_t step = stride ? std::strtoull(stride, nullptr, 10) : 16411;
  for (std::uint64_t bits = 0; bits <= 0xffffffff; bits += step)
    points.push_back({.score = std::bit_cast<float>(static_cast<std::uint32_t>(bits))});
  for (const float x : {0.0f,
                        -0.0f,
                        1.0f,
                        -1.0f,
                        0.5f,
                        1.5f,
                        2.5f,
                        -2.5f,
                        3.0f,
                        88.7f,
                        88.8f,
                        -87.4f,
                        -104.0f,
                        128.0f,
                        std::numeric_limits<float>::infinity(),
                        -std::numeric_limits<float>::infinity(),
                        std::numeric_limits<float>::quiet_NaN(),
                        std::numeric_limits<float>::denorm_min(),
                        std::numeric_limits<float>::min(),
                        std::numeric_limits<float>::max(),
                        16777217.0f,
                        65536.0f})
    points.push_back({.score = x});
  for (const Function& function : kFunctions) {
    SCOPED_TRACE(function.text);
    // The factor cancels the log2(e) that the compiler puts in: their product is 1 exactly.
    const Mod mod("(" + std::string(function.text) + ") * 0.6931471805599453");
    std::vector<double> exact;
    exact.reserve(points.size());
    for (const dsl::Point& point : points) exact.push_back(function.exact(point.score));
    for (const CpuIsa isa : {CpuIsa::kSse2, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
      if (isa > host_cpu_isa()) continue;
      const Elementwise compiled(mod, isa);
      const std::vector<float> values = compiled.log2_values(points);
      double worst = 0, at = 0;
      for (std::size_t i = 0; i < points.size(); ++i) {
        const double error = error_of(values[i], exact[i], function.flush);
        if (!(error <= worst)) worst = error, at = points[i].score;
      }
      EXPECT_LE(worst, function.bound) << cpu_isa_name(isa) << " at " << std::hexfloat << at << std::defaultfloat
                                       << " = " << at;
      RecordProperty(std::string(function.text) + " " + std::string(cpu_isa_name(isa)), std::to_string(worst));
      if (stride)
        std::printf("%-24s %-8s %.3g at %.9g\n", function.text, std::string(cpu_isa_name(isa)).c_str(), worst, at);
    }
  }
}

// What a bound of relative errors leaves open, and people count on.
TEST(CompilerFunctions, AreExactAtTheirEnds) {
  constexpr struct {
    const char* text;
    double score, exact;
  } kPoints[] = {
      {"tanh(score)", kInfinity, 1},
      {"tanh(score)", -kInfinity, -1},
      {"tanh(score)", 20, 1},
      {"tanh(score)", -9.02, -1},
      {"tanh(score)", 0, 0},
      {"erf(score)", kInfinity, 1},
      {"erf(score)", -6, -1},
      {"sigmoid(score)", 20, 1},
      {"sigmoid(score)", kInfinity, 1},
      {"sigmoid(score)", -kInfinity, 0},
      {"sigmoid(score)", 0, 0.5},
      {"exp(score)", 0, 1},
      {"exp2(score)", -126, 0x1p-126},
      {"exp2(score)", 127, 0x1p127},
      {"log(score)", 1, 0},
      {"log2(score)", 0x1p-126, -126},
      {"log1p(score)", 0, 0},
      {"rsqrt(score)", 4, 0.5},
      {"cos(score)", 0, 1},
      {"2.0 ** score", 100, 0x1p100},
      {"score ** 0.5", 4, 2},
  };
  for (const auto& point : kPoints) {
    const Mod mod("(" + std::string(point.text) + ") * 0.6931471805599453");
    for (const CpuIsa isa : {CpuIsa::kSse2, CpuIsa::kAvx2, CpuIsa::kAvx512}) {
      if (isa > host_cpu_isa()) continue;
      const std::vector<dsl::Point> at = {{.score = point.score}};
      EXPECT_EQ(Elementwise(mod, isa).log2_values(at)[0], point.exact)
          << point.text << " of " << point.score << ", " << cpu_isa_name(isa);
    }
  }
}

}  // namespace
}  // namespace attnjit::compiler::testing
