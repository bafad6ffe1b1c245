// ThreadPool: every task once, thread numbers never shared, concurrent callers, cheap small calls.
#include "runtime/thread_pool.h"

#include <gtest/gtest.h>
#include <sched.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <set>
#include <thread>
#include <vector>

namespace attnjit::runtime {
namespace {

TEST(ThreadPool, RunsEveryTaskOnce) {
  for (const int threads : {1, 2, 5}) {
    ThreadPool pool(threads);
    ASSERT_EQ(pool.size(), threads);
    for (const std::int64_t tasks : {0, 1, 2, 3, 7, 1000}) {
      std::vector<std::atomic<int>> seen(static_cast<std::size_t>(tasks));
      pool.parallel_for(tasks, [&](std::int64_t task, int thread) {
        EXPECT_GE(thread, 0);
        EXPECT_LT(thread, pool.size());
        EXPECT_LT(thread, tasks);
        ++seen[static_cast<std::size_t>(task)];
      });
      for (const auto& count : seen) EXPECT_EQ(count, 1);
    }
  }
}

TEST(ThreadPool, ThreadNumberIsNeverSharedWithinACall) {
  ThreadPool pool(4);
  std::vector<std::atomic<int>> inside(4);
  std::atomic<bool> shared{false};
  for (int call = 0; call < 200; ++call) {
    pool.parallel_for(16, [&](std::int64_t, int thread) {
      if (++inside[static_cast<std::size_t>(thread)] != 1) shared = true;
      std::this_thread::yield();
      --inside[static_cast<std::size_t>(thread)];
    });
  }
  EXPECT_FALSE(shared);
}

TEST(ThreadPool, WorkersTakePart) {
  ThreadPool pool(2);
  // The first task waits for the second, which only a worker can run.
  std::atomic<int> arrived{0};
  pool.parallel_for(2, [&](std::int64_t, int) {
    ++arrived;
    while (arrived < 2) std::this_thread::yield();
  });
  EXPECT_EQ(arrived, 2);
}

TEST(ThreadPool, OneTaskStaysInTheCaller) {
  ThreadPool pool(3);
  for (int call = 0; call < 100; ++call) {
    std::thread::id ran;
    pool.parallel_for(1, [&](std::int64_t, int) { ran = std::this_thread::get_id(); });
    EXPECT_EQ(ran, std::this_thread::get_id());
  }
}

TEST(ThreadPool, ConcurrentCallersEachGetTheirOwnTasks) {
  ThreadPool pool(3);
  std::atomic<int> wrong{0};
  std::vector<std::thread> callers;
  callers.reserve(4);
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&, caller] {
      for (int call = 0; call < 300; ++call) {
        const std::int64_t tasks = 1 + (caller + call) % 9;
        std::vector<int> value(static_cast<std::size_t>(tasks), -1);
        pool.parallel_for(tasks, [&](std::int64_t task, int) {
          value[static_cast<std::size_t>(task)] = static_cast<int>(task) + caller;
        });
        for (std::int64_t task = 0; task < tasks; ++task) {
          if (value[static_cast<std::size_t>(task)] != static_cast<int>(task) + caller) ++wrong;
        }
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  EXPECT_EQ(wrong, 0);
}

TEST(ThreadPool, NestedCallsRunInPlace) {
  ThreadPool pool(2);
  std::atomic<int> sum{0};
  pool.parallel_for(4, [&](std::int64_t, int) { pool.parallel_for(3, [&](std::int64_t task, int) { sum += task; }); });
  EXPECT_EQ(sum, 12);
}

TEST(ThreadPool, JoinsWhetherIdleOrJustUsed) {
  for (int round = 0; round < 50; ++round) {
    ThreadPool pool(3);
    if (round % 2) pool.parallel_for(5, [](std::int64_t, int) {});
  }
}

TEST(ThreadPool, DefaultFollowsTheAffinityMask) {
  cpu_set_t before;
  ASSERT_EQ(sched_getaffinity(0, sizeof(before), &before), 0);
  EXPECT_EQ(available_processors(), CPU_COUNT(&before));
  int first = 0;
  while (!CPU_ISSET(first, &before)) ++first;
  cpu_set_t one;
  CPU_ZERO(&one);
  CPU_SET(first, &one);
  ASSERT_EQ(sched_setaffinity(0, sizeof(one), &one), 0);
  EXPECT_EQ(available_processors(), 1);
  EXPECT_EQ(ThreadPool().size(), 1);
  ASSERT_EQ(sched_setaffinity(0, sizeof(before), &before), 0);
}

}  // namespace
}  // namespace attnjit::runtime
