// Runs CUDA kernels on the host: a kernel's text is compiled as C++ with what this header defines, and every thread of
// a block is a fiber that runs until it waits for others, one block at a time. For plain kernels: shared memory of
// static size.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "support/float16.h"

// CUDA's own names.
// NOLINTBEGIN(readability-identifier-naming,bugprone-reserved-identifier)
namespace attnjit::emulation {

struct Dim {
  unsigned x = 0, y = 0, z = 0;
};
inline Dim threadIdx, blockIdx, blockDim, gridDim;

class Machine {
 public:
  static Machine& get() {
    static Machine machine;
    return machine;
  }

  // Threads take turns from first to last, or the other way round: a result that depends on it is a race.
  bool backwards = false;

  void run(Dim grid, unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    gridDim = grid;
    blockDim = {threads, 1, 1};
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    for (unsigned z = 0; z < grid.z; ++z) {
      for (unsigned y = 0; y < grid.y; ++y) {
        for (unsigned x = 0; x < grid.x; ++x) run_block({x, y, z}, threads);
      }
    }
  }

  // Waits for the block's threads that have not returned.
  void block_barrier() {
    const unsigned mine = ++fibers_[current_]->block_barriers;
    wait([&](const Fiber& other) { return other.done || other.block_barriers >= mine; }, 0, threads_);
  }

  // What lane `source` of the warp gives at its same exchange.
  std::uint32_t exchange(std::uint32_t value, unsigned source) {
    Fiber& own = *fibers_[current_];
    const unsigned mine = ++own.exchanges;
    own.slot[mine % 2] = value;
    const unsigned warp = current_ / 32 * 32;
    wait([&](const Fiber& other) { return other.exchanges >= mine; }, warp, std::min(warp + 32, threads_));
    if (warp + source >= threads_) throw std::logic_error("exchange with a lane that is not there");
    return fibers_[warp + source]->slot[mine % 2];
  }

 private:
  static constexpr std::size_t kStack = 128 << 10;
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack{new char[kStack]};
    bool done = true;
    unsigned block_barriers = 0, exchanges = 0;
    std::uint32_t slot[2] = {};
  };

  static void enter() {
    Machine& machine = get();
    (*machine.kernel_)();
    machine.fibers_[machine.current_]->done = true;
    swapcontext(&machine.fibers_[machine.current_]->context, &machine.main_);
  }

  void run_block(Dim index, unsigned threads) {
    threads_ = threads;
    blockIdx = index;
    for (unsigned t = 0; t < threads; ++t) {
      Fiber& fiber = *fibers_[t];
      fiber.done = false;
      fiber.block_barriers = fiber.exchanges = 0;
      getcontext(&fiber.context);
      fiber.context.uc_stack.ss_sp = fiber.stack.get();
      fiber.context.uc_stack.ss_size = kStack;
      fiber.context.uc_link = nullptr;
      makecontext(&fiber.context, &Machine::enter, 0);
    }
    for (unsigned left = threads; left > 0;) {
      left = 0;
      progress_ = false;
      for (unsigned i = 0; i < threads; ++i) {
        const unsigned t = backwards ? threads - 1 - i : i;
        if (fibers_[t]->done) continue;
        current_ = t;
        blockIdx = index;
        threadIdx = {t, 0, 0};
        swapcontext(&main_, &fibers_[t]->context);
        left += fibers_[t]->done ? 0 : 1;
        progress_ = progress_ || fibers_[t]->done;
      }
      if (left > 0 && !progress_) throw std::logic_error("the block's threads wait for each other");
    }
  }

  template <typename Arrived>
  void wait(const Arrived& arrived, unsigned begin, unsigned end) {
    const unsigned self = current_;
    progress_ = true;  // to have come here
    for (;;) {
      bool all = true;
      for (unsigned t = begin; all && t < end; ++t) all = arrived(*fibers_[t]);
      if (all) break;
      swapcontext(&fibers_[self]->context, &main_);
    }
    progress_ = true;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t main_;
  unsigned current_ = 0, threads_ = 0;
  bool progress_ = false;
};

inline void __syncthreads() { Machine::get().block_barrier(); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
// Fibers do not interrupt each other.
template <typename T>
T atomicAdd(T* at, T value) {
  return std::exchange(*at, *at + value);
}
template <typename T>
T atomicOr(T* at, T value) {
  return std::exchange(*at, *at | value);
}

inline unsigned lane() { return threadIdx.x % 32; }
inline float exchange(float x, int mask) {
  std::uint32_t bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits = Machine::get().exchange(bits, lane() ^ static_cast<unsigned>(mask));
  std::memcpy(&x, &bits, sizeof bits);
  return x;
}
inline unsigned vote(bool x) {
  unsigned votes = x ? 1u << lane() : 0u;
  for (unsigned mask = 1; mask < 32; mask *= 2) votes |= Machine::get().exchange(votes, lane() ^ mask);
  return votes;
}
inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;  // false for NaN
}
inline float log2_fast(float x) { return std::log2(x); }
inline float max_number(float a, float b) { return std::fmax(a, b); }
inline unsigned pack_f16(float first, float second) {
  return test::to_f16(first) | static_cast<unsigned>(test::to_f16(second)) << 16;
}
inline unsigned pack_bf16(float first, float second) {
  return test::to_bf16(first) | static_cast<unsigned>(test::to_bf16(second)) << 16;
}

}  // namespace attnjit::emulation

#define __device__
#define __global__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static
#define ATTNJIT_EMULATED
// NOLINTEND(readability-identifier-naming,bugprone-reserved-identifier)
