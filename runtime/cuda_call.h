// A forward call in the words of the CUDA kernels.
#pragma once

#include "kernels_templates/cuda/params.h"
#include "runtime/forward.h"

namespace attnjit::runtime {

// Captured tensors and scalars, by capture number. Values of scalars in CPU memory are read here. Of `views`, which has
// cuda::kMaxCaptures, the rest is left alone.
void fill_captured(const ForwardCall& call, cuda::CapturedView* views);

// The whole call, for a kernel whose Mod::kScoresInLog2 is `scores_in_log2`.
cuda::ForwardParams forward_params(const ForwardCall& call, bool scores_in_log2);

}  // namespace attnjit::runtime
