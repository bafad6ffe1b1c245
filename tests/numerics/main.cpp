// The numerics program: GoogleTest, or one pasted case by `--case '...'`.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "bench/cuda.h"
#include "tests/numerics/check.h"
#include "tests/numerics/target.h"

namespace {

using attnjit::numerics::target;

// Exit status 0: accepted, 1: rejected, 2: not a case.
int run_case(const std::string& line) {
  using namespace attnjit::numerics;
  Case spec;
  std::string error;
  if (!parse_case(line, &spec, &error)) {
    std::fprintf(stderr, "--case: %s\n", error.c_str());
    return 2;
  }
  const Check check = check_case(spec);
  std::printf("%s\n%s\n", to_line(spec).c_str(), check.message.c_str());
  return check.accepted ? 0 : 1;
}

// After --compile-only: what was done, and a failure's cases.
int report_compiles() {
  const attnjit::numerics::CompileCounts& counts = attnjit::numerics::compile_counts();
  for (const std::string& failure : counts.failures) std::fprintf(stderr, "%s\n", failure.c_str());
  std::printf("%lld problems: %lld compiled, %lld found, %lld failed\n", static_cast<long long>(counts.problems),
              static_cast<long long>(counts.compiled), static_cast<long long>(counts.found),
              static_cast<long long>(counts.failed));
  return counts.failed == 0 && counts.problems > 0 ? 0 : 1;
}

// Of a partial backend: how often it ran. 1 where it never did, though there were problems.
int report_served() {
  const attnjit::numerics::ServedCounts& counts = attnjit::numerics::served_counts();
  std::printf("%s ran %lld times\n", target().fused().c_str(), static_cast<long long>(counts.served));
  for (const auto& [reason, count] : counts.elsewhere) {
    std::printf("  %lld problems were another backend's: %s\n", static_cast<long long>(count), reason.c_str());
  }
  return counts.served == 0 && !counts.elsewhere.empty() ? 1 : 0;
}

}  // namespace

// Beside GoogleTest's options: --device, --backend and --compile-only (target.h), and --case. Exit status 77: the tests
// want a GPU, and there is none.
int main(int argc, char** argv) {
  if (const std::string wrong = attnjit::numerics::take_target(&argc, argv); !wrong.empty()) {
    std::fprintf(stderr, "%s\n", wrong.c_str());
    return 2;
  }
  const bool compile_only = !target().compile_only.empty();
  if (target().on_gpu() && !compile_only) {
    if (const std::string& why = attnjit::tool::Gpu::unavailable(); !why.empty()) {
      std::printf("skipped: %s\n", why.c_str());
      return 77;
    }
    if (target().is_partial() && attnjit::tool::Gpu::get().arch() != 90) {
      std::printf("skipped: %s is for compute capability 9.0\n", target().fused().c_str());
      return 77;
    }
  }
  for (int i = 1; i + 1 < argc; ++i) {
    if (std::strcmp(argv[i], "--case") == 0) {
      try {
        return run_case(argv[i + 1]);
      } catch (const std::exception& fault) {
        std::fprintf(stderr, "%s\n", fault.what());
        return 1;
      }
    }
  }
  // What the device has no part in is tested without it.
  if (target().on_gpu()) {
    GTEST_FLAG_SET(
        filter,
        "*NumericsExpression*:*NumericsRandom*:*NumericsGenerated*:*NumericsRelation*:*NumericsEdge*:*"
        "NumericsReference*:"
        "*NumericsBackward*-*Slow*:*NumericsBackwardJudge*:*NumericsBackwardOracle*:*NumericsBackwardWrong*");
  }
  testing::InitGoogleTest(&argc, argv);
  if (!compile_only) {
    const int result = RUN_ALL_TESTS();
    return target().is_partial() ? std::max(result, report_served()) : result;
  }
  // Nothing is run, so nothing that a test expects holds.
  auto& listeners = testing::UnitTest::GetInstance()->listeners();
  delete listeners.Release(listeners.default_result_printer());
  static_cast<void>(RUN_ALL_TESTS());
  if (target().is_partial()) report_served();
  return report_compiles();
}
