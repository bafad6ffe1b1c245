// Where each lane's elements of the staged reads lie: compiled beside the tile of a mod that has such reads.
#include "kernels_templates/cpu/tile_abi.h"

// Writes the address of the element of each staged read to addresses[0], addresses[kPanelLanes], ...
extern "C" void attnjit_lane_rows(long long b, long long h, long long q_idx, long long kv_idx,
                                  const attnjit::cpu::CapturedView* captured, const void** addresses);

extern "C" void attnjit_rows(const attnjit::cpu::TileParams* params, const void** addresses) {
  for (int lane = 0; lane < attnjit::cpu::kPanelLanes; ++lane)
    attnjit_lane_rows(params->b, params->h, params->q_idx + lane, params->kv_idx, params->captured, addresses + lane);
}
