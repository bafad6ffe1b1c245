// What a backend is given of a backward call beside its ForwardCall.
#pragma once

#include <cstdint>

#include "dsl/expr.h"
#include "runtime/forward.h"

namespace attnjit::runtime {

// Which gradients a backward computes.
struct WantedGradients {
  bool dq = false, dk = false, dv = false;
  std::uint32_t captures = 0;  // a bit by number
  bool partial_keys = false;   // o and lse are of more keys than these
};

// Of a captured tensor whose gradient is wanted. Type, rank and extents are the captured tensor's.
struct CaptureGradient {
  void* data = nullptr;  // null: not wanted
  std::int64_t stride[dsl::kMaxRank] = {};
};

// The ForwardCall's o and lse are inputs here, and lse is always there; its row_max is not.
struct Gradients {
  TensorView grad_out;    // as o
  RowView grad_lse;       // data null: nothing flows into lse
  TensorView dq, dk, dv;  // as q, k, v; data null: not wanted, or empty
  // By capture number of the plan's joint table.
  CaptureGradient captures[dsl::kMaxCaptures];
};

}  // namespace attnjit::runtime
