// Persistent threads that share the tasks of one call at a time.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

namespace attnjit::runtime {

// Processors that this process may run on (its affinity mask), at least 1.
int available_processors();

// parallel_for may be called from any number of threads: one call gets the workers, the others meanwhile run in their
// calling thread alone. So do all calls in a forked child, which has no workers.
class ThreadPool {
 public:
  // `threads` counts the caller; 0 or less: available_processors(). Starts with fewer where the system refuses.
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  // Thread numbers that tasks can see are below this.
  int size() const { return static_cast<int>(workers_.size()) + 1; }

  // Calls function(task, thread) once for each 0 <= task < tasks, in no fixed order, and returns when all are done.
  // Tasks with one `thread` number never overlap within a call; numbers are below `tasks`, too. `function` must not
  // throw. Allocates nothing; a single task, or a pool of one, wakes nobody.
  template <typename Function>
  void parallel_for(std::int64_t tasks, Function&& function) {
    using Plain = std::remove_reference_t<Function>;
    run(
        tasks,
        [](void* context, std::int64_t task, int thread) noexcept { (*static_cast<Plain*>(context))(task, thread); },
        const_cast<void*>(static_cast<const void*>(&function)));
  }

 private:
  using Task = void (*)(void* context, std::int64_t task, int thread) noexcept;
  enum State : std::uint32_t { kIdle, kCalled, kRunning, kStop };
  struct alignas(64) Worker {
    std::atomic<std::uint32_t> state{kIdle};
    std::thread thread;
  };

  void run(std::int64_t tasks, Task function, void* context);
  void work(int thread);
  void serve(Worker& worker, int thread);

  const int process_;  // that has the workers
  alignas(64) std::atomic<bool> busy_{false};
  // The current call's; written only while no worker runs.
  Task function_ = nullptr;
  void* context_ = nullptr;
  std::int64_t tasks_ = 0;
  std::vector<std::unique_ptr<Worker>> workers_;
  alignas(64) std::atomic<std::int64_t> next_{0};
};

}  // namespace attnjit::runtime
