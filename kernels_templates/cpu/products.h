// Native vector code around the compiled tiles: the matrix products of a panel, conversions, transposes and sums. Built
// once per instruction set; the caller picks the table that the machine can run.
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
  // out[row * out_stride + i] += sum over lanes of weights[row][lane] * in[lane * in_stride + i], for i < width, a
  // multiple of 16.
  void (*add_lanes)(const float* in, long long in_stride, long long rows, long long width, const float* weights,
                    float* out, long long out_stride);
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

  // out[row * out_stride + i] = in[row * in_stride + i] * factor, rounded to nearest even; width <= kMaxHeadDim.
  void (*narrow)(const float* in, long long in_stride, float factor, long long rows, long long width, void* out,
                 Storage storage, long long out_stride);

  // Sums over a panel of `rows` <= kTileRows rows, added to what is there: per lane, over rows; per row, over lanes;
  // per diagonal, sums[rows - 1 + lane - row] of rows + kPanelLanes - 1.
  void (*sum_rows)(const float* panel, long long rows, float* sums);
  void (*sum_lanes)(const float* panel, long long rows, float* sums);
  void (*sum_diagonals)(const float* panel, long long rows, float* sums);
  // rows_of[lane][row] += panel[row][lane] for first <= lane < lanes; or = where `store`.
  void (*unstage)(const float* panel, long long rows, long long first, long long lanes, bool store,
                  float* const* rows_of);

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
  // As add_lanes; in[i] holds lanes 2i and 2i + 1, and so do the kPanelLanes / 2 words of a row of weights.
  void (*add_lanes_bf16)(const float* in_pairs, long long in_stride, long long rows, long long width,
                         const float* weight_pairs, float* out, long long out_stride) = nullptr;
  // Those words from weights[row][lane], rounded; `pairs` may be `weights`.
  void (*pair_lanes_bf16)(const float* weights, long long rows, float* pairs) = nullptr;
  // panel[width / 2][kPanelLanes] from rows of Q; even width.
  void (*load_panel_bf16)(const unsigned short* in, long long in_stride, long long lanes, long long width,
                          float* panel) = nullptr;
};

inline constexpr int kMaxHeadDim = 256;

// `isa` is compiler::CpuIsa's number; see embedded.h.
const Products& products(int isa);

}  // namespace attnjit::cpu
