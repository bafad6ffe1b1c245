// Native vector code around the softmax tile: both matrix products of a panel, conversions and transposes. Built once
// per instruction set; the caller picks the table that the machine can run.
#pragma once

#include "kernels_templates/cpu/tile_abi.h"

namespace attnjit::cpu {

// Element types that conversions read and write.
enum class Storage : unsigned char { kF32, kF16, kBF16 };

// Element types that `stage` reads; bool is kUInt8.
enum class Element : unsigned char { kF32, kF16, kBF16, kInt32, kInt16, kInt8, kUInt8 };

// Everything is fp32 unless a Storage says otherwise; strides in elements; "panel" arrays are [n][kPanelLanes], 64-byte
// aligned; nothing else needs alignment.
struct Products {
  // scores[row][lane] = factor * sum over i < depth of k[row * k_stride + i] * queries[i][lane]. Overwrites `scores`.
  void (*qk)(const float* k, long long k_stride, long long rows, long long depth, const float* queries, float factor,
             float* scores);
  // out[i][lane] = out[i][lane] * rescale[lane] + sum over row < rows of v[row * v_stride + i] * weights[row][lane],
  // for i < width.
  void (*pv)(const float* v, long long v_stride, long long rows, long long width, const float* weights,
             const float* rescale, float* out);
  // out[row * out_stride + i] = in[row * in_stride + i], widened.
  void (*widen)(const void* in, Storage storage, long long in_stride, long long rows, long long width, float* out,
                long long out_stride);
  // panel[i][lane] = in[lane * in_stride + i] for lane < lanes, 0 for the others; i < width <= kMaxHeadDim.
  void (*load_panel)(const void* in, Storage storage, long long in_stride, long long lanes, long long width,
                     float* panel);
  // out[lane * out_stride + i] = panel[i][lane] * factor[lane], rounded to nearest even, for first <= lane < lanes;
  // i < width <= kMaxHeadDim.
  void (*store_panel)(const float* panel, const float* factor, long long first, long long lanes, long long width,
                      void* out, Storage storage, long long out_stride);

  // panel[row][lane] = element `row` from addresses[lane] on, for row < rows <= kTileRows: a float as f32, an integer
  // as a signed 32-bit one. Reads nothing else.
  void (*stage)(const void* const* addresses, Element element, long long rows, void* panel);

  // How many rows qk and qk_bf16 take at once: in pieces of a multiple of it they are as fast as in one.
  int rows_at_once;

  // The same on BF16 itself, at twice the speed; null where the instruction set cannot. Words are pairs of BF16, the
  // earlier value in the low half; queries[i] holds features 2i and 2i + 1, v_pairs[i] rows 2i and 2i + 1 (the last
  // one's partner, if missing, is 0).
  void (*qk_bf16)(const unsigned short* k, long long k_stride, long long rows, long long depth, const float* queries,
                  float factor, float* scores) = nullptr;  // even depth
  // Rounds `weights` to BF16, in place.
  void (*pv_bf16)(const float* v_pairs, long long rows, long long width, float* weights, const float* rescale,
                  float* out) = nullptr;
  // out[(rows + 1) / 2][width] from rows of V.
  void (*pair_rows_bf16)(const unsigned short* in, long long in_stride, long long rows, long long width,
                         float* out) = nullptr;
  // panel[width / 2][kPanelLanes] from rows of Q; even width.
  void (*load_panel_bf16)(const unsigned short* in, long long in_stride, long long lanes, long long width,
                          float* panel) = nullptr;
};

inline constexpr int kMaxHeadDim = 256;

// `isa` is compiler::CpuIsa's number; see embedded.h.
const Products& products(int isa);

}  // namespace attnjit::cpu
