// The tool's loop over tasks, and what becomes of those that fail.
#include "bench/parallel.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <cstdint>
#include <new>
#include <vector>

#include "bench/failure.h"

namespace attnjit::tool {
namespace {

TEST(Parallel, RunsEachTaskOnce) {
  std::vector<std::atomic<int>> runs(1000);
  parallel_for(1000, [&](std::int64_t i) { ++runs[static_cast<std::size_t>(i)]; });
  for (const std::atomic<int>& count : runs) EXPECT_EQ(count, 1);
}

// Whichever thread it happens in.
TEST(Parallel, WhatATaskThrowsIsThrown) {
  for (const std::int64_t bad : {0, 1, 500, 999}) {
    EXPECT_THROW(parallel_for(1000,
                              [&](std::int64_t i) {
                                if (i >= bad) throw std::bad_alloc();
                              }),
                 std::bad_alloc);
  }
}

TEST(Parallel, NoMemoryIsAnErrorThatSaysForWhat) {
  const auto allocate = [](std::int64_t) { const std::vector<double> most(std::vector<double>().max_size() + 1); };
  for (const bool too_long : {false, true}) {
    try {
      with_memory_for("shape (1, 2, 3)", [&] {
        parallel_for(3, [&](std::int64_t i) {
          if (too_long) allocate(i);
          throw std::bad_alloc();
        });
      });
      FAIL();
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.fault(), Fault::kEnvironment);
      EXPECT_STREQ(failure.what(), "out of memory for shape (1, 2, 3)");
    }
  }
}

}  // namespace
}  // namespace attnjit::tool
