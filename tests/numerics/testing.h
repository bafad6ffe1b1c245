// What the suite's tests share: the backends, and cases and problems made of lines; a wrong line fails the test.
#pragma once

#include <gtest/gtest.h>

#include <string>

#include "tests/numerics/problem.h"

namespace attnjit::numerics {

inline Case parse(const std::string& line) {
  Case spec;
  std::string error;
  EXPECT_TRUE(parse_case(line, &spec, &error)) << error << "\n" << line;
  return spec;
}

inline Problem make(const std::string& line) {
  Problem problem;
  std::string error;
  EXPECT_TRUE(make_problem(parse(line), &problem, &error)) << error << "\n" << line;
  return problem;
}

}  // namespace attnjit::numerics
