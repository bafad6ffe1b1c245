// The plan cache with an injected compile function: one compile per key, other keys unhindered, failures not kept.
// Also built by itself under ThreadSanitizer.
#include "runtime/plan_cache.h"

#include <gtest/gtest.h>

#include <atomic>
#include <latch>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

namespace attnjit::runtime {
namespace {

using Cache = PlanCache<std::optional<int>>;

TEST(PlanCache, OneCompileForManyThreads) {
  constexpr int kThreads = 16;
  Cache cache(8);
  std::atomic<int> compiles = 0;
  std::atomic<int> compiled_here = 0;
  std::latch start(kThreads);
  std::vector<std::thread> threads;
  std::vector<int> seen(kThreads, 0);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      start.arrive_and_wait();
      const Cache::Found found = cache.get("key", [&]() -> std::optional<int> {
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        return 40 + ++compiles;
      });
      compiled_here += found.compiled_here;
      seen[static_cast<std::size_t>(i)] = found.outcome.value_or(-1);
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compiles, 1);
  EXPECT_EQ(compiled_here, 1);
  EXPECT_EQ(seen, std::vector<int>(kThreads, 41));
}

TEST(PlanCache, OtherKeysAreNotHindered) {
  Cache cache(8);
  // "slow" finishes only after "fast" was compiled by another thread: a lock held across a compile would deadlock.
  std::latch slow_started(1), fast_done(1);
  std::thread slow([&] {
    cache.get("slow", [&]() -> std::optional<int> {
      slow_started.count_down();
      fast_done.wait();
      return 1;
    });
  });
  slow_started.wait();
  EXPECT_EQ(cache.get("fast", []() -> std::optional<int> { return 2; }).outcome, 2);
  EXPECT_EQ(cache.size(), 2u);
  fast_done.count_down();
  slow.join();
  EXPECT_EQ(cache.get("slow", []() -> std::optional<int> { return 3; }).outcome, 1);
}

TEST(PlanCache, ManyThreadsManyKeys) {
  constexpr int kThreads = 8, kKeys = 20, kRounds = 200;
  Cache cache(5);  // fewer than the keys: entries are evicted all the time
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&, i] {
      for (int round = 0; round < kRounds; ++round) {
        const int key = (round * 7 + i * 3) % kKeys;
        const auto found = cache.get(std::to_string(key), [&]() -> std::optional<int> { return key; });
        wrong += found.outcome != key;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_LE(cache.size(), 5u);
}

TEST(PlanCache, FailureReachesWaitersAndIsNotKept) {
  Cache cache(8);
  std::latch compiling(1);
  std::atomic<int> compiles = 0;
  std::thread first([&] {
    const Cache::Found found = cache.get("key", [&]() -> std::optional<int> {
      ++compiles;
      compiling.count_down();
      std::this_thread::sleep_for(std::chrono::milliseconds(50));
      return std::nullopt;
    });
    EXPECT_FALSE(found.outcome);
  });
  compiling.wait();
  const Cache::Found waited = cache.get("key", [&]() -> std::optional<int> {
    ++compiles;
    return 1;
  });
  first.join();
  // The second thread waited for the first one's failure, unless it came so late that it compiled itself.
  EXPECT_EQ(waited.outcome.has_value(), waited.compiled_here);
  EXPECT_EQ(cache.size(), waited.compiled_here ? 1u : 0u);
  EXPECT_EQ(cache.get("key", []() -> std::optional<int> { return 7; }).outcome, waited.compiled_here ? 1 : 7);
}

TEST(PlanCache, ExceptionReachesTheCallerAndIsNotKept) {
  Cache cache(8);
  EXPECT_THROW(cache.get("key", []() -> std::optional<int> { throw std::runtime_error("no"); }), std::runtime_error);
  EXPECT_EQ(cache.size(), 0u);
  EXPECT_EQ(cache.get("key", []() -> std::optional<int> { return 7; }).outcome, 7);
}

TEST(PlanCache, ForgetsTheLeastRecentlyUsed) {
  Cache cache(2);
  int compiles = 0;
  const auto get = [&](const std::string& key) {
    return cache.get(key, [&]() -> std::optional<int> { return ++compiles; }).compiled_here;
  };
  EXPECT_TRUE(get("a"));
  EXPECT_TRUE(get("b"));
  EXPECT_FALSE(get("a"));  // b is the oldest now
  EXPECT_TRUE(get("c"));
  EXPECT_FALSE(get("a"));
  EXPECT_TRUE(get("b"));
  EXPECT_EQ(cache.size(), 2u);
}

TEST(PlanCache, NeverForgetsWhatIsBeingCompiled) {
  Cache cache(1);
  std::latch started(1), others_done(1);
  std::thread slow([&] {
    cache.get("slow", [&]() -> std::optional<int> {
      started.count_down();
      others_done.wait();
      return 1;
    });
  });
  started.wait();
  cache.get("a", []() -> std::optional<int> { return 2; });
  cache.get("b", []() -> std::optional<int> { return 3; });
  std::atomic<bool> compiled_again = false;
  std::thread waiter(
      [&] { compiled_again = cache.get("slow", []() -> std::optional<int> { return 9; }).compiled_here; });
  others_done.count_down();
  slow.join();
  waiter.join();
  EXPECT_FALSE(compiled_again);
}

}  // namespace
}  // namespace attnjit::runtime
