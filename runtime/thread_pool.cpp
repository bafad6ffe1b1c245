// Persistent threads that share the tasks of one call at a time.
#include "runtime/thread_pool.h"

#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>

namespace attnjit::runtime {
namespace {

// About 10 us: longer than the gap between calls of a tight loop, shorter than what a sleeping thread takes to wake.
constexpr int kSpins = 400;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Returns the first value of `state` that is not `old`.
std::uint32_t wait_while(const std::atomic<std::uint32_t>& state, std::uint32_t old) {
  for (int i = 0; i < kSpins; ++i) {
    const std::uint32_t value = state.load(std::memory_order_acquire);
    if (value != old) return value;
    pause();
  }
  for (;;) {
    state.wait(old, std::memory_order_acquire);
    const std::uint32_t value = state.load(std::memory_order_acquire);
    if (value != old) return value;
  }
}

// Blocks all signals of the calling thread for its lifetime: threads started meanwhile never run a user's handler.
class SignalsBlocked {
 public:
  SignalsBlocked() {
    sigset_t all;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before_);
  }
  ~SignalsBlocked() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }

 private:
  sigset_t before_;
};

}  // namespace

int available_processors() {
  cpu_set_t set;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) return std::max(1, CPU_COUNT(&set));
  // More processors than a cpu_set_t holds.
  return std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
}

ThreadPool::ThreadPool(int threads) : process_(getpid()) {
  if (threads <= 0) threads = available_processors();
  const SignalsBlocked blocked;
  for (int i = 1; i < threads; ++i) {
    auto worker = std::make_unique<Worker>();
    try {
      worker->thread = std::thread([this, worker = worker.get(), i] { serve(*worker, i); });
    } catch (const std::system_error&) {
      break;
    }
    workers_.push_back(std::move(worker));
  }
}

ThreadPool::~ThreadPool() {
  if (getpid() != process_) {
    // The threads are the parent's. Their handles point into stacks that fork may have unmapped here: given up, not
    // joined.
    for (auto& worker : workers_) {
      [[maybe_unused]] Worker* const given_up = worker.release();
    }
    return;
  }
  for (const auto& worker : workers_) {
    worker->state.store(kStop, std::memory_order_release);
    worker->state.notify_all();
  }
  for (const auto& worker : workers_) worker->thread.join();
}

void ThreadPool::work(int thread) {
  for (;;) {
    const std::int64_t task = next_.fetch_add(1, std::memory_order_relaxed);
    if (task >= tasks_) return;
    function_(context_, task, thread);
  }
}

void ThreadPool::serve(Worker& worker, int thread) {
  for (;;) {
    std::uint32_t state = wait_while(worker.state, kIdle);
    if (state == kStop) return;
    // Fails when the caller took the call back meanwhile.
    if (state != kCalled || !worker.state.compare_exchange_strong(state, kRunning, std::memory_order_acquire)) continue;
    work(thread);
    worker.state.store(kIdle, std::memory_order_release);
    worker.state.notify_all();
  }
}

void ThreadPool::run(std::int64_t tasks, Task function, void* context) {
  const std::int64_t helpers = std::min<std::int64_t>(static_cast<std::int64_t>(workers_.size()), tasks - 1);
  if (helpers <= 0 || busy_.exchange(true, std::memory_order_acquire)) {
    for (std::int64_t task = 0; task < tasks; ++task) function(context, task, 0);
    return;
  }
  function_ = function;
  context_ = context;
  tasks_ = tasks;
  next_.store(0, std::memory_order_relaxed);
  for (std::int64_t i = 0; i < helpers; ++i) {
    workers_[i]->state.store(kCalled, std::memory_order_release);
    workers_[i]->state.notify_all();
  }
  work(0);
  for (std::int64_t i = 0; i < helpers; ++i) {
    // A worker that has not started is not waited for: it may be asleep or not scheduled for a long time.
    std::uint32_t expected = kCalled;
    if (workers_[i]->state.compare_exchange_strong(expected, kIdle, std::memory_order_acquire)) continue;
    if (expected == kRunning) wait_while(workers_[i]->state, kRunning);
  }
  busy_.store(false, std::memory_order_release);
}

}  // namespace attnjit::runtime
