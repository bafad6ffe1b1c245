// The products of the sm90 family: wgmma names every register of its operands, so that its text depends on the tile.
#pragma once

#include <string>

#include "kernels_templates/cuda/params.h"
#include "kernels_templates/sm90/config.h"

namespace attnjit::compiler {

// For the namespace attnjit::sm90, a warpgroup's:
//   multiply_qk(s, q, k): S = Q K^T under way; q and k describe shared memory
//   multiply_pv(o, p, v): O += P V under way
//   wait_for_scores(s): for the products before the last; wait_for_output(o) and wait_for_all(s, o): for all
std::string wgmma_products(const sm90::ForwardConfig& config);

}  // namespace attnjit::compiler
