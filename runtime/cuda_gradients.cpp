// Sums of captured gradients: their memory, and the kernel that finishes them.
#include "runtime/cuda_gradients.h"

#include <fmt/format.h>

#include <algorithm>
#include <iterator>
#include <limits>
#include <utility>

#include "runtime/cuda_binaries.h"

namespace attnjit::runtime {
namespace {

constexpr std::size_t kAlignment = 256;
constexpr const char* kFinishEntry = "attnjit_finish_gradient";
constexpr std::int64_t kThreads = 256;
constexpr std::int64_t kMaxBlocks = 8192;  // of a launch that walks over more elements than it has threads

cuda::GradientType type_of(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kF16:
      return cuda::GradientType::kF16;
    case dsl::DType::kBF16:
      return cuda::GradientType::kBF16;
    default:
      return cuda::GradientType::kF32;
  }
}

}  // namespace

Result<std::optional<FoundBinary>> find_finish_kernel(const Request& request, compiler::CudaArch arch,
                                                      compiler::PhaseTimes* phases) {
  if (request.call.signature.capture_gradients == 0) return std::optional<FoundBinary>();
  Result<FoundBinary> found = find_cuda_binary(request.context, compiler::cuda_finish_gradients(), arch, {});
  if (!found) return found.failure();
  add_phases(found->phases, phases);
  return std::optional(std::move(*found));
}

void add_finish_kernel(const std::optional<FoundBinary>& finish, Json* kernels) {
  if (finish) kernels->push_back(binary_json(*finish, kFinishEntry));
}

CudaGradientSums::CudaGradientSums(const ForwardCall& problem, std::uint32_t wanted,
                                   const std::vector<compiler::SinkFacts>& sinks, bool deterministic) {
  for (std::size_t i = 0; i < problem.num_captures; ++i) {
    if ((wanted >> i & 1u) == 0) continue;
    const dsl::CaptureView& capture = problem.captures[i];
    const bool is_stored_to = std::ranges::any_of(
        sinks, [&](const compiler::SinkFacts& sink) { return sink.capture == static_cast<int>(i) && sink.injective; });
    Sum sum{.capture = i, .offset = size_, .accumulators = deterministic && !is_stored_to};
    for (int d = capture.rank - 1; d >= 0; --d) {
      sum.stride[d] = sum.elements;
      sum.elements *= capture.extent[d];
    }
    const std::size_t bytes = sum.accumulators ? cuda::kAccumulatorWords * sizeof(std::uint64_t) : sizeof(float);
    size_ += (static_cast<std::size_t>(sum.elements) * bytes + kAlignment - 1) / kAlignment * kAlignment;
    sums_.push_back(sum);
  }
}

std::string CudaGradientSums::describe() const {
  std::string text;
  for (const Sum& sum : sums_) {
    text += fmt::format("gradient of capture {} from {}\n", sum.capture,
                        sum.accumulators ? "exact accumulators" : "float32 sums");
  }
  return text;
}

Check CudaGradientSums::load(std::shared_ptr<CudaDevice> device, const std::optional<FoundBinary>& finish) {
  std::shared_ptr<const CudaKernel> kernel;
  if (finish) {
    auto loaded = CudaKernel::load(device, finish->binary->cubin, kFinishEntry, 0);
    if (!loaded) return loaded.failure();
    kernel = std::move(*loaded);
  }
  use(std::move(device), std::move(kernel));
  return {};
}

void CudaGradientSums::use(std::shared_ptr<CudaDevice> device, std::shared_ptr<const CudaKernel> finish) {
  device_ = std::move(device);
  kernel_ = std::move(finish);
}

Check CudaGradientSums::clear(void* memory, CudaStream stream) const { return device_->fill(memory, 0, size_, stream); }

void CudaGradientSums::fill_views(void* memory, cuda::GradientView* views) const {
  for (const Sum& sum : sums_) {
    cuda::GradientView& view = views[sum.capture];
    view.data = static_cast<char*>(memory) + sum.offset;
    std::copy(std::begin(sum.stride), std::end(sum.stride), view.stride);
  }
}

Check CudaGradientSums::finish(const ForwardCall& call, const Gradients& gradients, void* memory,
                               CudaStream stream) const {
  for (const Sum& sum : sums_) {
    const dsl::CaptureView& capture = call.captures[sum.capture];
    const CaptureGradient& gradient = gradients.captures[sum.capture];
    cuda::FinishParams params{.sums = static_cast<const char*>(memory) + sum.offset,
                              .to = gradient.data,
                              .elements = sum.elements,
                              .stride = {},
                              .extent = {},
                              .type = type_of(capture.dtype),
                              .accumulators = sum.accumulators};
    std::fill(std::begin(params.extent), std::end(params.extent), 1);
    // Neighbouring dimensions that lie one behind the other are one: the kernel divides for each.
    int d = cuda::kMaxCaptureRank;
    for (int i = capture.rank - 1; i >= 0; --i) {
      if (capture.extent[i] == 1) continue;
      const std::int64_t joint = d < cuda::kMaxCaptureRank ? params.extent[d] * capture.extent[i] : 0;
      if (d < cuda::kMaxCaptureRank && gradient.stride[i] == params.stride[d] * params.extent[d] &&
          joint <= std::numeric_limits<int>::max()) {
        params.extent[d] = static_cast<int>(joint);
      } else {
        --d;
        params.extent[d] = static_cast<int>(capture.extent[i]);
        params.stride[d] = gradient.stride[i];
      }
    }
    const auto blocks = std::clamp<std::int64_t>((sum.elements + kThreads - 1) / kThreads, 1, kMaxBlocks);
    if (Check failure = kernel_->launch({.x = static_cast<unsigned>(blocks)}, kThreads, &params, stream))
      return failure;
  }
  return {};
}

}  // namespace attnjit::runtime
