// What the eager path's kernels are compiled and launched with; shared by host and device. It includes nothing:
// cuda/params.h comes before it.
//
// Translation units, behind cuda/params.h, this file and math/common.cuh:
//   math/mod.cuh      behind the emitted attnjit::cuda::Mod; one per expression, the same for every element type
//   math/kernels.cuh  behind a definition of attnjit::math::kConfig; one per element type
// and, in the place of the first, math/mod_backward.cuh behind cuda/gradients.cuh, a Mod of the backward and a
// definition of attnjit::math::kDeterministic.
//
// Scores are f32 of (B, Hq, Sq, pitch), scaled as Mod::score expects them before the mod and in log2 units after it.
// `pitch` is the number of keys rounded up to kVector, so that every row is aligned to 16 bytes; what lies beyond a
// row's keys is nobody's. Softmax leaves the probabilities in their place, in the type of the inputs: a row of them
// starts where the scores' row started, so that 16-bit ones have a pitch of 2 * pitch elements.
#pragma once

namespace attnjit::math {

enum class Element : int { kF32 = 0, kF16 = 1, kBF16 = 2 };

struct Config {
  Element element = Element::kBF16;  // of q, k, v, o and the probabilities
};

constexpr int bytes_of(Element element) { return element == Element::kF32 ? 4 : 2; }

// Probabilities are stored times this, and the product with V takes it back: most of those of a long row would be
// subnormal in f16.
constexpr float probability_scale(Element element) { return element == Element::kF16 ? 32768.0f : 1.0f; }

inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000u);
inline constexpr int kVector = 4;  // scores of one access

// attnjit_math_mod: up to `kModThreads` threads.
inline constexpr int kModThreads = 256;
inline constexpr int kModRows = 4;  // of one thread
struct ModParams {
  float* scores;  // in place
  long long pitch;
  float factor;  // on the stored scores
  int num_heads, seqlen_q, seqlen_kv;
  unsigned heads;                   // B * Hq; blocks along y take them in turn
  int q_idx_origin, kv_idx_origin;  // logical positions of the first query and key
  int log2_vectors;                 // a block is 2^log2_vectors threads wide, each with a vector
  unsigned kv_tiles;                // blocks along x: kv_tiles times the tiles of kModRows * the block's height queries
  cuda::CapturedView captured[cuda::kMaxCaptures];
};

// attnjit_math_mod_backward: a number of threads that warps divide, up to `kModThreads`. `scores` are scaled, in
// natural units.
struct ModBackwardParams {
  float* scores;           // becomes the probabilities, in the type of the inputs, as softmax leaves them
  float* gradients;        // of probabilities; becomes those of the scaled scores, likewise. Null where not wanted
  const float* row_lse;    // (B * Hq * Sq): +inf for a row without a kept element
  const float* row_delta;  // likewise: sum of grad_out * o along the row, less grad_lse
  const float* grad_lse;   // (B, Hq, Sq); null: zero
  long long grad_lse_stride[3];
  long long pitch;
  float factor;  // on the stored scores, and on the gradients that are left
  Element element;
  int num_heads, seqlen_q, seqlen_kv;
  unsigned heads;                   // B * Hq; blocks along y take them in turn
  int q_idx_origin, kv_idx_origin;  // logical positions of the first query and key
  int log2_vectors;                 // a block is 2^log2_vectors threads wide and as high as they allow
  cuda::CapturedView captured[cuda::kMaxCaptures];
  cuda::GradientView sums[cuda::kMaxCaptures];
};

// attnjit_math_delta, `kWarpThreads` threads, a warp per row: what the backward has of each row beside the scores.
struct DeltaParams {
  const void* o;
  const void* grad_out;   // (B, Hq, Sq, Dv)
  const float* lse;       // (B, Hq, Sq), natural logarithm
  const float* grad_lse;  // likewise; null: zero
  float* row_lse;         // ModBackwardParams'
  float* row_delta;
  long long o_stride[3], grad_out_stride[3], lse_stride[3], grad_lse_stride[3];
  unsigned rows;  // B * Hq * Sq, at most kMaxRows
  unsigned num_heads, seqlen_q;
  int head_dim_v;
};

// A row (b, h, q) of scores is counted through all of B, Hq and Sq: 64-bit divisions would cost as much as the rest of
// a short row.
inline constexpr long long kMaxRows = 0x7fffffff;

// attnjit_math_softmax_*: each takes rows of up to so many keys, from 0, and one launch all rows.
inline constexpr int kWarpThreads = 256;  // _warp2 and _warp8: a warp per row
inline constexpr int kMaxWarp2 = 2 * 32 * kVector;
inline constexpr int kMaxWarp8 = 8 * 32 * kVector;
inline constexpr int kBlockVectors = 8;  // _block: a block per row, of the fewest warps that hold it
inline constexpr int kMaxBlock = kBlockVectors * 1024 * kVector;
inline constexpr int kLongThreads = 512;  // _long: a block per row of any length
struct SoftmaxParams {
  float* scores;  // becomes the probabilities
  long long pitch;
  unsigned char* empty;  // (rows): 1 for a row without a kept element, else 0
  float* lse;            // (B, Hq, Sq), natural logarithm; null where not wanted
  float* row_max;        // (B, Hq, Sq), natural units; null where not wanted
  long long lse_stride[3], row_max_stride[3];
  unsigned rows;  // B * Hq * Sq, at most kMaxRows
  unsigned num_heads, seqlen_q;
  int seqlen_kv;
};

// attnjit_math_zero_rows, `kWarpThreads` threads, a lane per row: O of a row without a kept element is 0, whatever V
// holds.
struct ZeroParams {
  const unsigned char* empty;
  void* o;
  long long o_stride[3];
  unsigned rows;  // B * Hq * Sq, at most kMaxRows
  unsigned num_heads, seqlen_q;
  int head_dim_v;
};

// attnjit_math_copy, `kCopyThreads` threads: a tensor (B, H, S, D) to another layout. Strides in bytes.
inline constexpr int kCopyThreads = 256;
struct CopyParams {
  const void* from;
  void* to;
  long long from_stride[3], to_stride[3];
  unsigned rows;  // B * H * S, at most kMaxRows
  unsigned num_heads, seqlen;
  int pieces;       // of one row
  int piece_bytes;  // 2, 4, 8 or 16; both tensors are aligned to it throughout
  int log2_width;   // threads of one row; at most all of them
};

}  // namespace attnjit::math
