// The configuration of the sm80 family's forward kernel: what its template is instantiated with. Shared by host and
// device; includes nothing.
#pragma once

namespace attnjit::sm80 {

enum class Element : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

constexpr int bytes_of(Element element) { return element == Element::kF32 ? 4 : 2; }

struct ForwardConfig {
  Element element = Element::kBF16;
  int head_dim = 128;    // of q and k, as the problem has it; padded in shared memory
  int head_dim_v = 128;  // of v and o
  int tile_m = 128;      // queries of one block; a multiple of 16 * warps
  int tile_n = 64;       // keys of one step; a multiple of 16
  int warps = 4;
  int stages = 1;               // K and V tiles in flight, beside the one in use
  bool q_in_registers = false;  // Q's fragments stay in registers; its shared memory is reused for K and V
  int load_bytes = 16;          // widest access that every row of q, k and v is aligned to: 2, 4, 8 or 16
  int store_bytes = 16;         // likewise for o
};

}  // namespace attnjit::sm80
