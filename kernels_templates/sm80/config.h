// The configurations of the sm80 family's kernels, forward and backward: what their templates are instantiated with,
// and how they lay out shared memory. Shared by host and device; includes nothing.
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
  int stages = 1;               // buffers for K and for V each: 1, or 2 for a step's load to have a whole step's time
  bool q_in_registers = false;  // 16-bit elements: Q's fragments are read from shared memory once, not at every step
  int min_blocks = 1;           // blocks that have to fit one multiprocessor: bounds the registers
  int load_bytes = 16;          // widest access that every row of q, k and v is aligned to: 2, 4, 8 or 16
  int store_bytes = 16;         // likewise for o
};

// Likewise of the backward. A block owns tile_n keys of a key/value head and walks over the queries of its group. Where
// head dims are too large for its accumulators, a block computes the gradients of one of `slices` parts of them.
struct BackwardConfig {
  Element element = Element::kBF16;
  int head_dim = 128;    // of q, k, dq and dk
  int head_dim_v = 128;  // of v, o, grad_out and dv
  int tile_m = 64;       // queries of one step; a multiple of step_m
  int tile_n = 128;      // keys of a block; a multiple of 16 * warps
  int warps = 8;
  int step_m = 64;  // queries whose scores a warp has in registers at once; a multiple of 16
  int stages = 2;   // buffers for Q and for grad_out each: 1, or 2 for a step's load to have a whole step's time
  int slices = 1;
  int load_bytes = 16;   // as ForwardConfig's, of q, k, v, o and grad_out
  int store_bytes = 16;  // of dq, dk and dv
  bool wants_dq = true, wants_dk = true, wants_dv = true;
  bool deterministic = false;
};

// Feature dimensions are computed in steps of 16.
constexpr int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }

// Bytes from row to row of a tile in shared memory: an odd number of 16-byte chunks, so that the same chunk of eight
// rows, which is what ldmatrix reads at once, lies in eight different groups of banks.
constexpr int row_bytes(Element element, int head_dim) { return padded(head_dim) * bytes_of(element) + 16; }

// Bytes of one store of o: nothing behind a row's end is written.
constexpr int store_width(int store_bytes, int row) {
  while (row % store_bytes != 0) store_bytes /= 2;
  return store_bytes;
}
constexpr int store_width(const ForwardConfig& c) {
  return store_width(c.store_bytes, c.head_dim_v * bytes_of(c.element));
}

// Shared memory of a block, in order: Q (later O), K and V by stage, and for f32 the probabilities.
constexpr int q_bytes(const ForwardConfig& c) {
  const int q = row_bytes(c.element, c.head_dim);
  const int o = row_bytes(c.element, c.head_dim_v);
  return c.tile_m * (q > o ? q : o);
}
constexpr int k_bytes(const ForwardConfig& c) { return c.tile_n * row_bytes(c.element, c.head_dim); }
constexpr int v_bytes(const ForwardConfig& c) { return c.tile_n * row_bytes(c.element, c.head_dim_v); }
constexpr int p_row_floats(const ForwardConfig& c) { return c.tile_n + 4; }
constexpr int p_bytes(const ForwardConfig& c) {
  return c.element == Element::kF32 ? c.tile_m * p_row_floats(c) * 4 : 0;
}
constexpr int forward_shared_memory(const ForwardConfig& c) {
  return q_bytes(c) + c.stages * (k_bytes(c) + v_bytes(c)) + p_bytes(c);
}

// ---- Backward

// Of the kernel before the main one: rows of a head that a block has, and its threads.
inline constexpr int kRowsOfBlock = 64;
inline constexpr int kRowsThreads = 256;

// Features of one slice, and of all of them, in shared memory and in dq_sum.
constexpr int slice_width(const BackwardConfig& c, int head_dim) {
  return padded((head_dim + c.slices - 1) / c.slices);
}
constexpr int sliced(const BackwardConfig& c, int head_dim) { return c.slices * slice_width(c, head_dim); }

// Whether a block walks over every n-th tile of keys, for dQ to be summed in as many parts, in order.
constexpr bool splits_dq(const BackwardConfig& c) { return c.deterministic && c.wants_dq; }

// dS^T, a row for each key; of f32, P^T passes through it, too.
constexpr int ds_row_bytes(const BackwardConfig& c) { return c.tile_m * bytes_of(c.element) + 16; }
constexpr int ds_bytes(const BackwardConfig& c) {
  return c.wants_dq || c.element == Element::kF32 ? c.tile_n * ds_row_bytes(c) : 0;
}
// A warp sums diagonals of 16 x 16 elements: each in a column of its own, of rows that are shifted against each other.
// Eight rows by four pairs of neighbours fall on banks twice at most.
constexpr int kDiagonalRow = 37;
constexpr int diagonal_bytes(const BackwardConfig& c) { return c.tile_n * kDiagonalRow * 4; }
constexpr int row_sums_bytes(const BackwardConfig& c) { return c.warps * c.tile_m * 4; }

// Shared memory of a block of the main kernel, in order: K (later dK), V (later dV), by stage Q and grad_out, by stage
// lse and delta, dS, and for each sink of that level the sums of rows by warp, or room for diagonals.
constexpr int backward_shared_memory(const BackwardConfig& c, int row_sinks, int diagonal_sinks) {
  const int row = row_bytes(c.element, sliced(c, c.head_dim)) + row_bytes(c.element, sliced(c, c.head_dim_v));
  return c.tile_n * row + c.stages * c.tile_m * (row + 8) + ds_bytes(c) + row_sinks * row_sums_bytes(c) +
         diagonal_sinks * diagonal_bytes(c);
}
// Of the kernel that finishes dq.
constexpr int backward_dq_shared_memory(const BackwardConfig& c) {
  return c.tile_m * row_bytes(c.element, slice_width(c, c.head_dim));
}

}  // namespace attnjit::sm80
