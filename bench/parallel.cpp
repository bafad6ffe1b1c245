// A loop over independent tasks, on all processors.
#include "bench/parallel.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "bench/machine.h"

namespace attnjit::tool {

void parallel_for(std::int64_t tasks, const std::function<void(std::int64_t)>& task) {
  std::atomic<std::int64_t> next{0};
  std::atomic_flag failed;
  std::exception_ptr fault;
  const auto work = [&] {
    try {
      for (std::int64_t i = next++; i < tasks; i = next++) task(i);
    } catch (...) {
      next = tasks;
      if (!failed.test_and_set()) fault = std::current_exception();
    }
  };
  {
    std::vector<std::jthread> threads;
    const std::int64_t helpers = std::min<std::int64_t>(available_processors(), tasks) - 1;
    try {
      for (std::int64_t i = 0; i < helpers; ++i) threads.emplace_back(work);
    } catch (const std::system_error&) {
      // The system has no more threads: those there are do it.
    }
    work();
  }
  if (fault) std::rethrow_exception(fault);
}

}  // namespace attnjit::tool
