// A forward call in the words of the CUDA kernels.
#pragma once

#include "kernels_templates/cuda/params.h"
#include "runtime/forward.h"

namespace attnjit::runtime {

// Captured tensors and scalars, by capture number. Values of scalars in CPU memory are read here. Of `views`, which has
// cuda::kMaxCaptures, the rest is left alone.
void fill_captured(const ForwardCall& call, cuda::CapturedView* views);

// The whole call, for a kernel of compiler::CudaSource::score_factor.
cuda::ForwardParams forward_params(const ForwardCall& call, double score_factor);

}  // namespace attnjit::runtime
