// Micro-benchmarks of what the host adds to a call: prepared calls, plan lookups, compiles.
#include <attnjit/attnjit.h>
#include <benchmark/benchmark.h>
#include <fmt/format.h>

#include <cmath>

#include "bench/api.h"
#include "bench/cuda.h"
#include "bench/device_tensor.h"
#include "bench/problem.h"
#include "bench/tensor.h"

namespace attnjit::tool {
namespace {

// One query row against one key: nothing to compute.
struct Tiny {
  explicit Tiny(int threads) : context(make_context(threads)) {
    for (Tensor* tensor : {&q, &k, &v}) {
      for (std::int64_t i = 0; i < tensor->size(); ++i) tensor->set(i, 1.0);
    }
    for (std::int64_t i = 0; i < slopes.size(); ++i) slopes.set(i, 0.5);
    attention.q = &q_dl;
    attention.k = &k_dl;
    attention.v = &v_dl;
    attention.o = &o_dl;
  }
  Tiny(const Tiny&) = delete;
  Tiny& operator=(const Tiny&) = delete;

  ContextPtr context;
  Tensor q{ElementType::kFloat32, {1, 1, 1, 16}}, k{ElementType::kFloat32, {1, 1, 1, 16}},
      v{ElementType::kFloat32, {1, 1, 1, 16}}, o{ElementType::kFloat32, {1, 1, 1, 16}},
      slopes{ElementType::kFloat32, {1}};
  DLTensor q_dl = q.dl(), k_dl = k.dl(), v_dl = v.dl(), o_dl = o.dl(), slopes_dl = slopes.dl();
  attnjit_capture capture{"slopes", &slopes_dl};
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
};

void prepared_call(benchmark::State& state) {
  Tiny tiny(static_cast<int>(state.range(0)));
  tiny.attention.score_mod = "noop";
  if (state.range(1) != 0) {
    tiny.attention.score_mod = "score + slopes[h]";
    tiny.attention.captures = &tiny.capture;
    tiny.attention.num_captures = 1;
  }
  const PlanPtr plan = prepare(tiny.context.get(), tiny.attention);
  const std::size_t size = attnjit_plan_workspace_size(plan.get());
  Tensor workspace(ElementType::kUInt8, {static_cast<std::int64_t>(size)});
  while (state.KeepRunning()) check(attnjit_run(plan.get(), &tiny.attention, workspace.data(), size, nullptr));
}
BENCHMARK(prepared_call)->ArgNames({"threads", "captures"})->ArgsProduct({{1, 2}, {0, 1}})->UseRealTime();

void prepare_cached(benchmark::State& state) {
  Tiny tiny(1);
  tiny.attention.score_mod = "noop";
  const PlanPtr kept = prepare(tiny.context.get(), tiny.attention);
  while (state.KeepRunning()) prepare(tiny.context.get(), tiny.attention);
}
BENCHMARK(prepare_cached);

// A literal that no earlier text had: nothing is found in a cache.
void prepare_cold(benchmark::State& state, const char* form) {
  Tiny tiny(1);
  static int serial = 0;
  while (state.KeepRunning()) {
    const std::string text = fmt::format(fmt::runtime(form), ++serial);
    tiny.attention.score_mod = text.c_str();
    prepare(tiny.context.get(), tiny.attention);
  }
}
BENCHMARK_CAPTURE(prepare_cold, affine, "score + {} * (q_idx - kv_idx)")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(prepare_cold, causal, "where(q_idx + {} >= kv_idx, score, -inf)")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(prepare_cold, softcap, "{0} * tanh(score / {0})")->Unit(benchmark::kMillisecond);

// What a call on the GPU costs the thread that makes it. The GPU has next to nothing to do, and is waited for, untimed,
// before its queue is full. `moves`: every other call is of other memory.
void cuda_prepared_call(benchmark::State& state, attnjit_backend backend, bool captures, bool moves) {
  if (!Gpu::unavailable().empty()) return state.SkipWithError(Gpu::unavailable().c_str());
  constexpr int kQueued = 256;
  const ContextPtr context = make_context(1);
  const std::vector<std::int64_t> two_batches{2, 1, 64, 64};
  std::int64_t shape[] = {1, 1, 64, 64};
  constexpr std::uint64_t kBatchBytes = 64 * 64 * 2;
  Placed q(Tensor(ElementType::kBFloat16, two_batches), true), k(Tensor(ElementType::kBFloat16, two_batches), true),
      v(Tensor(ElementType::kBFloat16, two_batches), true), o(Tensor(ElementType::kBFloat16, two_batches), true),
      slopes(Tensor(ElementType::kFloat32, {1}), true);
  for (Placed* input : {&q, &k, &v, &slopes}) {
    fill_normal(input->host, 1);
    input->device.upload();
  }
  const DLTensor slopes_dl = slopes.device.dl();
  DLTensor q_dl = q.device.dl(), k_dl = k.device.dl(), v_dl = v.device.dl(), o_dl = o.device.dl();
  for (DLTensor* tensor : {&q_dl, &k_dl, &v_dl, &o_dl}) tensor->shape = shape;
  const attnjit_capture capture{"slopes", &slopes_dl};
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.score_mod = captures ? "score + slopes[h] * (kv_idx - q_idx)" : "noop";
  attention.q = &q_dl;
  attention.k = &k_dl;
  attention.v = &v_dl;
  attention.o = &o_dl;
  attention.captures = captures ? &capture : nullptr;
  attention.num_captures = captures ? 1 : 0;
  attention.backend = backend;
  const PlanPtr plan = prepare(context.get(), attention);
  const std::size_t size = attnjit_plan_workspace_size(plan.get());
  const Workspace workspace(size, true);
  const GpuStream stream;
  int queued = 0;
  while (state.KeepRunning()) {
    check(attnjit_run(plan.get(), &attention, workspace.data(), size, stream.handle()));
    if (moves) {
      for (DLTensor* tensor : {&q_dl, &k_dl, &v_dl, &o_dl}) tensor->byte_offset ^= kBatchBytes;
    }
    if (++queued % kQueued != 0) continue;
    state.PauseTiming();
    stream.synchronize();
    state.ResumeTiming();
  }
  stream.synchronize();
}
BENCHMARK_CAPTURE(cuda_prepared_call, sm90, ATTNJIT_BACKEND_SM90, false, false)->UseRealTime();
BENCHMARK_CAPTURE(cuda_prepared_call, sm90_moves, ATTNJIT_BACKEND_SM90, false, true)->UseRealTime();
BENCHMARK_CAPTURE(cuda_prepared_call, sm80, ATTNJIT_BACKEND_SM80, false, false)->UseRealTime();
BENCHMARK_CAPTURE(cuda_prepared_call, sm80_captures, ATTNJIT_BACKEND_SM80, true, false)->UseRealTime();
BENCHMARK_CAPTURE(cuda_prepared_call, math, ATTNJIT_BACKEND_MATH, false, false)->UseRealTime();

// A plan whose binary is on disk, in a process that has compiled before: more tiles of queries than multiprocessors, so
// that a mask's are given a schedule.
void cuda_prepare_found(benchmark::State& state, attnjit_backend backend, const char* mask_mod) {
  if (!Gpu::unavailable().empty()) return state.SkipWithError(Gpu::unavailable().c_str());
  const std::vector<std::int64_t> shape{4, 16, 1024, 64};
  Placed q(Tensor(ElementType::kBFloat16, shape), true), o(Tensor(ElementType::kBFloat16, shape), true);
  const DLTensor q_dl = q.device.dl();
  DLTensor o_dl = o.device.dl();
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.mask_mod = mask_mod;
  attention.q = attention.k = attention.v = &q_dl;
  attention.o = &o_dl;
  attention.backend = backend;
  prepare(make_context(1).get(), attention);
  while (state.KeepRunning()) {
    state.PauseTiming();
    const ContextPtr context = make_context(1);
    state.ResumeTiming();
    const PlanPtr plan = prepare(context.get(), attention);
  }
}
BENCHMARK_CAPTURE(cuda_prepare_found, sm90, ATTNJIT_BACKEND_SM90, nullptr)->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(cuda_prepare_found, sm90_causal, ATTNJIT_BACKEND_SM90, "causal")->Unit(benchmark::kMillisecond);
BENCHMARK_CAPTURE(cuda_prepare_found, sm90_window, ATTNJIT_BACKEND_SM90, "abs(q_idx - kv_idx) < 200")
    ->Unit(benchmark::kMillisecond);

}  // namespace
}  // namespace attnjit::tool

BENCHMARK_MAIN();
