// A small attention problem with buffers of its own, for the tests of the C interface.
#pragma once

#include <attnjit/attnjit.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../support/handles.h"

namespace attnjit::test {

inline constexpr DLDataType kF32 = {kDLFloat, 32, 1};
inline constexpr DLDataType kI32 = {kDLInt, 32, 1};

// A DLTensor with the arrays it points to.
struct Tensor {
  std::vector<std::int64_t> shape, strides;
  DLTensor dl = {nullptr, {kDLCPU, 0}, 0, kF32, nullptr, nullptr, 0};

  Tensor() = default;
  Tensor(void* data, std::vector<std::int64_t> extents, DLDataType dtype = kF32, std::vector<std::int64_t> steps = {})
      : shape(std::move(extents)), strides(std::move(steps)) {
    dl.data = data;
    dl.dtype = dtype;
    sync();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;

  // Call after a change of shape or strides.
  void sync() {
    dl.ndim = static_cast<int>(shape.size());
    dl.shape = shape.data();
    dl.strides = strides.empty() ? nullptr : strides.data();
  }
};

inline ContextPtr make_context(int num_threads = 2) {
  attnjit_context_options options = ATTNJIT_CONTEXT_OPTIONS_INIT;
  options.num_threads = num_threads;
  attnjit_context* context = nullptr;
  EXPECT_EQ(attnjit_context_create(&options, &context), ATTNJIT_OK) << attnjit_last_error();
  return ContextPtr(context);
}

// Float32 q, k, v of B=2, Hq=4, Hkv=2, Sq=40, Skv=50, D=16, Dv=24, filled with a fixed pattern; outputs hold NaN.
struct Problem {
  static constexpr std::int64_t kB = 2, kHq = 4, kHkv = 2, kSq = 40, kSkv = 50, kD = 16, kDv = 24;

  std::vector<float> q_data, k_data, v_data, o_data, lse_data, row_max_data;
  Tensor q, k, v, o, lse, row_max;
  std::vector<std::unique_ptr<Tensor>> captured;
  std::vector<attnjit_capture> captures;
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;

  Problem()
      : q_data(pattern(kB * kHq * kSq * kD, 1)),
        k_data(pattern(kB * kHkv * kSkv * kD, 2)),
        v_data(pattern(kB * kHkv * kSkv * kDv, 3)),
        o_data(kB * kHq * kSq * kDv, NAN),
        lse_data(kB * kHq * kSq, NAN),
        row_max_data(kB * kHq * kSq, NAN),
        q(q_data.data(), {kB, kHq, kSq, kD}),
        k(k_data.data(), {kB, kHkv, kSkv, kD}),
        v(v_data.data(), {kB, kHkv, kSkv, kDv}),
        o(o_data.data(), {kB, kHq, kSq, kDv}),
        lse(lse_data.data(), {kB, kHq, kSq}),
        row_max(row_max_data.data(), {kB, kHq, kSq}) {
    attention.q = &q.dl;
    attention.k = &k.dl;
    attention.v = &v.dl;
    attention.o = &o.dl;
    attention.lse = &lse.dl;
    attention.row_max = &row_max.dl;
  }
  Problem(const Problem&) = delete;
  Problem& operator=(const Problem&) = delete;

  static std::vector<float> pattern(std::int64_t count, std::uint32_t seed) {
    std::vector<float> values(static_cast<std::size_t>(count));
    std::uint32_t state = seed * 2654435761u + 12345u;
    for (float& value : values) {
      state = state * 1664525u + 1013904223u;
      value = static_cast<float>(state >> 8) / static_cast<float>(1 << 23) - 1.0f;
    }
    return values;
  }

  // `name` must outlive the problem.
  Tensor& capture(const char* name, void* data, std::vector<std::int64_t> shape, DLDataType dtype = kF32,
                  std::vector<std::int64_t> strides = {}) {
    captured.push_back(std::make_unique<Tensor>(data, std::move(shape), dtype, std::move(strides)));
    captures.push_back({name, &captured.back()->dl});
    attention.captures = captures.data();
    attention.num_captures = captures.size();
    return *captured.back();
  }
};

// The same problem's backward: every gradient of q, k and v is wanted, and those of captures that are asked for.
// Outputs hold NaN. o and lse are filled in by a forward().
struct GradientProblem : Problem {
  std::vector<float> grad_out_data, grad_lse_data, dq_data, dk_data, dv_data;
  Tensor grad_out, grad_lse, dq, dk, dv;
  std::vector<std::unique_ptr<Tensor>> capture_gradients;
  std::vector<attnjit_capture_gradient> wanted;
  attnjit_gradients gradients = ATTNJIT_GRADIENTS_INIT;

  GradientProblem()
      : grad_out_data(pattern(kB * kHq * kSq * kDv, 4)),
        grad_lse_data(pattern(kB * kHq * kSq, 5)),
        dq_data(q_data.size(), NAN),
        dk_data(k_data.size(), NAN),
        dv_data(v_data.size(), NAN),
        grad_out(grad_out_data.data(), {kB, kHq, kSq, kDv}),
        grad_lse(grad_lse_data.data(), {kB, kHq, kSq}),
        dq(dq_data.data(), {kB, kHq, kSq, kD}),
        dk(dk_data.data(), {kB, kHkv, kSkv, kD}),
        dv(dv_data.data(), {kB, kHkv, kSkv, kDv}) {
    gradients.grad_out = &grad_out.dl;
    gradients.grad_lse = &grad_lse.dl;
    gradients.dq = &dq.dl;
    gradients.dk = &dk.dl;
    gradients.dv = &dv.dl;
  }

  // `name` must outlive the problem.
  Tensor& gradient(const char* name, void* data, std::vector<std::int64_t> extents, DLDataType dtype = kF32,
                   std::vector<std::int64_t> strides = {}) {
    capture_gradients.push_back(std::make_unique<Tensor>(data, std::move(extents), dtype, std::move(strides)));
    wanted.push_back({name, &capture_gradients.back()->dl});
    gradients.captures = wanted.data();
    gradients.num_captures = wanted.size();
    return *capture_gradients.back();
  }

  // Without keys: nothing is compiled.
  void remove_keys() {
    for (Tensor* tensor : {&k, &v, &dk, &dv}) tensor->shape[2] = 0;
  }
};

// Scratch for `plan`, aligned as it needs.
class Scratch {
 public:
  explicit Scratch(const attnjit_plan* plan)
      : size(attnjit_plan_workspace_size(plan)), memory_(size + 64), data(align(memory_.data())) {}

 private:
  static void* align(std::byte* memory) { return memory + (64 - reinterpret_cast<std::uintptr_t>(memory) % 64) % 64; }

 public:
  const std::size_t size;

 private:
  std::vector<std::byte> memory_;

 public:
  void* const data;
};

inline PlanPtr prepare(const ContextPtr& context, const attnjit_attention& attention) {
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare(context.get(), &attention, &plan), ATTNJIT_OK) << attnjit_last_error();
  return PlanPtr(plan);
}

inline PlanPtr prepare_backward(const ContextPtr& context, const GradientProblem& p) {
  attnjit_plan* plan = nullptr;
  EXPECT_EQ(attnjit_prepare_backward(context.get(), &p.attention, &p.gradients, nullptr, &plan), ATTNJIT_OK)
      << attnjit_last_error();
  return PlanPtr(plan);
}

// Prepares and runs; false (and a test failure) where that fails.
inline bool forward(const ContextPtr& context, const attnjit_attention& attention) {
  const PlanPtr plan = prepare(context, attention);
  if (!plan) return false;
  const Scratch scratch(plan.get());
  const attnjit_status status = attnjit_run(plan.get(), &attention, scratch.data, scratch.size, nullptr);
  EXPECT_EQ(status, ATTNJIT_OK) << attnjit_last_error();
  return status == ATTNJIT_OK;
}

}  // namespace attnjit::test
