// The numerics program: GoogleTest, or one pasted case by `--case '...'`.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstring>
#include <exception>
#include <string>

#include "tests/numerics/check.h"

namespace {

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

}  // namespace

int main(int argc, char** argv) {
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
  testing::InitGoogleTest(&argc, argv);
  return RUN_ALL_TESTS();
}
