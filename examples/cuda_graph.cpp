// A CUDA graph: the call is captured once and replayed, and reads a new value of a captured scalar at each replay.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <attnjit/attnjit.hpp>
#include <cstdio>
#include <memory>
#include <vector>

#include "common.h"

namespace {

constexpr std::int64_t kHeads = 8, kSeqlen = 500, kDim = 64;
constexpr int kSkipped = 77;  // what CTest is told to take for "skipped"

// The first CUDA call that failed. Later ones are tried all the same: they fail, too.
cudaError_t first_error = cudaSuccess;
void check(cudaError_t error) {
  if (first_error == cudaSuccess) first_error = error;
}

struct Free {
  void operator()(float* memory) const { cudaFree(memory); }
};
using DeviceFloats = std::unique_ptr<float, Free>;

DeviceFloats to_device(const std::vector<float>& values) {
  void* memory = nullptr;
  check(cudaMalloc(&memory, values.size() * sizeof(float)));
  check(cudaMemcpy(memory, values.data(), values.size() * sizeof(float), cudaMemcpyHostToDevice));
  return DeviceFloats(static_cast<float*>(memory));
}

int fail(const char* what, const char* why) { return std::fprintf(stderr, "%s: %s\n", what, why), 1; }

}  // namespace

int main() {
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) {
    std::printf("no CUDA device: nothing to show\n");
    return kSkipped;
  }
  const std::vector<float> q = random_values(kHeads * kSeqlen * kDim, 1);
  const std::vector<float> k = random_values(kHeads * kSeqlen * kDim, 2);
  const std::vector<float> v = random_values(kHeads * kSeqlen * kDim, 3);
  std::vector<float> o(q.size()), expected(q.size());
  float value = 0.0f;

  auto context = attnjit::Context::create();
  if (!context) return fail("context", context.status().message().c_str());
  // `slope` in the expression is whatever scalar is given under that name.
  const auto slope = attnjit::captured("slope");
  attnjit::Status status = context->register_mod("tilted", [&](auto score, auto b, auto h, auto q_idx, auto kv_idx) {
    return attnjit::where(q_idx >= kv_idx, score - slope * (q_idx - kv_idx), -attnjit::inf);
  });
  if (!status) return fail("register_mod", status.message().c_str());

  const DeviceFloats device_q = to_device(q), device_k = to_device(k), device_v = to_device(v), device_o = to_device(o);
  const DeviceFloats device_slope = to_device({value});
  const auto tensor = [](const float* data) { return attnjit::TensorRef(data, {1, kHeads, kSeqlen, kDim}).on_cuda(); };
  const attnjit::Attention attention{
      .q = tensor(device_q.get()),
      .k = tensor(device_k.get()),
      .v = tensor(device_v.get()),
      .o = tensor(device_o.get()),
      .score_mod = "tilted",
      // In device memory: a scalar on the CPU would be kept in the graph with the value it has now.
      .captures = {{"slope", attnjit::TensorRef(device_slope.get(), {}).on_cuda()}}};

  // Compiled and loaded here: nothing of that may happen during a capture, and a run never does it.
  const auto plan = context->prepare(attention);
  if (!plan) return fail("prepare", plan.status().message().c_str());

  cudaStream_t stream = nullptr;
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t replay = nullptr;
  check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  check(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  status = plan->run(attention, {}, stream);
  check(cudaStreamEndCapture(stream, &graph));
  if (!status) return fail("run", status.message().c_str());
  check(cudaGraphInstantiate(&replay, graph, 0));

  float difference = 0.0f;
  for (const float next : {0.0f, 0.125f, 2.0f}) {
    value = next;
    check(cudaMemcpyAsync(device_slope.get(), &value, sizeof(value), cudaMemcpyHostToDevice, stream));
    check(cudaGraphLaunch(replay, stream));
    check(cudaMemcpyAsync(o.data(), device_o.get(), o.size() * sizeof(float), cudaMemcpyDeviceToHost, stream));
    check(cudaStreamSynchronize(stream));

    // The same on the CPU.
    const attnjit::Attention reference{.q = {q.data(), {1, kHeads, kSeqlen, kDim}},
                                       .k = {k.data(), {1, kHeads, kSeqlen, kDim}},
                                       .v = {v.data(), {1, kHeads, kSeqlen, kDim}},
                                       .o = {expected.data(), {1, kHeads, kSeqlen, kDim}},
                                       .score_mod = "tilted",
                                       .captures = {{"slope", {&value, {}}}}};
    status = context->forward(reference);
    if (!status) return fail("forward", status.message().c_str());
    difference = std::max(difference, largest_difference(o, expected));
  }
  // The plan is there for as long as the graph.
  check(cudaGraphExecDestroy(replay));
  check(cudaGraphDestroy(graph));
  check(cudaStreamDestroy(stream));
  if (first_error != cudaSuccess) return fail("CUDA", cudaGetErrorString(first_error));
  std::printf("largest difference between three replays and the CPU: %.2g\n", difference);
  return difference < 1e-4f ? 0 : 1;
}
