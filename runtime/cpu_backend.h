// The fused forward pass on the CPU: panels of query rows against blocks of keys around a compiled softmax tile.
#pragma once

#include <cstddef>

#include "compiler/compiler.h"
#include "runtime/forward.h"
#include "runtime/thread_pool.h"

namespace attnjit::runtime {

// Bytes of scratch that cpu_forward needs for `tile` on a pool of `threads`, for calls of these shapes and dtypes
// whatever their strides. 0 where there is nothing to compute.
std::size_t cpu_workspace_size(const ForwardCall& call, const compiler::CpuTile& tile, int threads);

// Computes o, and lse and row_max where wanted. `call` is validated: shapes agree, q, k, v and o have one dtype of f32,
// f16, bf16, head dims are 1 to 256, q's heads a multiple of k's. Strides of q, k, v are not negative. `tile` was
// compiled for this problem with ModProblem::seqlen_q at least 32 and for `isa`, which the machine has; it sees query
// positions from 0 to max(seqlen_q, 32) - 1. `workspace`: 64-byte aligned, of cpu_workspace_size(call, tile,
// pool.size()) bytes. Rows without a kept element get o = 0 and -inf for lse and row_max; a row with a NaN or +inf
// modified score gets NaN (row_max: the maximum, NaN where one of its scores is NaN and none is +inf).
void cpu_forward(const ForwardCall& call, const compiler::CpuTile& tile, compiler::CpuIsa isa, void* workspace,
                 ThreadPool& pool);

}  // namespace attnjit::runtime
