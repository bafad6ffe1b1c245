// Fills the parameters of CUDA kernels.
#include "runtime/cuda_call.h"

#include <cmath>
#include <cstring>

namespace attnjit::runtime {

static_assert(cuda::kMaxCaptures == dsl::kMaxCaptures && cuda::kMaxCaptureRank == dsl::kMaxRank);

void fill_captured(const ForwardCall& call, cuda::CapturedView* views) {
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    const dsl::CaptureView& capture = call.captures[i];
    cuda::CapturedView& view = views[i];
    view.data = capture.data;
    view.value = 0;
    if (call.host_scalars >> i & 1u) {
      view.data = nullptr;
      // Little-endian, as every machine with a CUDA device is.
      std::memcpy(&view.value, capture.data, static_cast<std::size_t>(dsl::dtype_size(capture.dtype)));
    }
    for (int d = 0; d < cuda::kMaxCaptureRank; ++d) {
      view.stride[d] = d < capture.rank ? capture.stride[d] : 0;
      view.extent[d] = d < capture.rank ? static_cast<int>(capture.extent[d]) : 1;
    }
  }
}

cuda::ForwardParams forward_params(const ForwardCall& call, double score_factor) {
  cuda::ForwardParams params = {};
  params.q = call.q.data;
  params.k = call.k.data;
  params.v = call.v.data;
  params.o = call.o.data;
  params.lse = call.lse.data;
  params.row_max = call.row_max.data;
  // Kernels form the addresses of a whole tile's rows, aligned as every row that exists: the step to rows that do not
  // must not break that, and the stride of a single row may.
  const auto stride = [](const TensorView& tensor, int d) { return tensor.shape[d] > 1 ? tensor.stride[d] : 0; };
  for (int d = 0; d < 3; ++d) {
    params.q_stride[d] = stride(call.q, d);
    params.k_stride[d] = stride(call.k, d);
    params.v_stride[d] = stride(call.v, d);
    params.o_stride[d] = stride(call.o, d);
    params.lse_stride[d] = call.lse.stride[d];
    params.row_max_stride[d] = call.row_max.stride[d];
  }
  params.batch = static_cast<int>(call.q.shape[0]);
  params.num_heads = static_cast<int>(call.q.shape[1]);
  params.num_heads_kv = static_cast<int>(call.k.shape[1]);
  params.seqlen_q = static_cast<int>(call.q.shape[2]);
  params.seqlen_kv = static_cast<int>(call.k.shape[2]);
  const ScoreScale scale = score_scale(call.scale, score_factor);
  params.score_scale = scale.main == 0.0f ? 1.0f : std::fabs(scale.main);
  params.score_prescale = scale.main == 0.0f ? 0.0f : std::copysign(scale.rest, scale.main);
  fill_captured(call, params.captured);
  return params;
}

}  // namespace attnjit::runtime
