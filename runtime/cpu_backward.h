// The fused backward pass on the CPU: blocks of keys against panels of query rows around a compiled gradient tile.
#pragma once

#include <cstddef>

#include "compiler/compiler.h"
#include "runtime/backward.h"
#include "runtime/forward.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// Bytes of scratch that cpu_backward needs for `tile` on a pool of `threads`, for calls of these shapes and dtypes,
// whatever their strides, that want these gradients.
std::size_t cpu_backward_workspace_size(const ForwardCall& call, const WantedGradients& wants,
                                        const compiler::CpuGradientTile& tile, int threads);

// Computes the gradients that are wanted, of a problem with elements. `call` and `gradients` are validated as
// cpu_forward's call is; lse has data.
// `tile` was compiled for this problem, with ModProblem::seqlen_q at least 32, and for `isa`, which the machine has; it
// sees query positions from 0 to max(seqlen_q, 32) - 1. `workspace`: 64-byte aligned, of
// cpu_backward_workspace_size(...) bytes for pool.size() threads.
// The same bits in every run of a pool size.
void cpu_backward(const ForwardCall& call, const Gradients& gradients, const compiler::CpuGradientTile& tile,
                  compiler::CpuIsa isa, void* workspace, ThreadPool& pool);

}  // namespace attnjit::runtime
