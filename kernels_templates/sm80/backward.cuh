// Fused attention backward for compute capability 8.0 and later, after FlashAttention-2 (arXiv 2307.08691).
//
// Three kernels: one prepares what belongs to a row (lse, delta), one computes the gradients, one converts dq.
// In the main kernel a block owns tile_n keys of a key/value head and walks over the queries of the head's group. Each
// warp owns whole keys: with S^T = K Q^T and dP^T = V dO^T, P^T and dS^T lie in registers as the left operands of
// dV += P^T dO and dK += dS^T Q, which stay in registers from the first query to the last. Only dS passes through
// shared memory, for dQ = dS K. Blocks add their parts of dQ to dq_sum by atomics; where two runs have to give the same
// bits, a block walks over several tiles of keys, and adds to a dq_sum of its own. Compiled behind
// walk.cuh, tile.cuh and gradients.cuh.
namespace attnjit::sm80 {

using cuda::BackwardParams;
using cuda::SinkLevel;

constexpr int kTileM = kConfig.tile_m;
constexpr int kTileN = kConfig.tile_n;
constexpr int kStepM = kConfig.step_m;
constexpr int kSlices = kConfig.slices;
constexpr int kD = sliced(kConfig, kConfig.head_dim);
constexpr int kDv = sliced(kConfig, kConfig.head_dim_v);
constexpr int kSliceD = slice_width(kConfig, kConfig.head_dim);
constexpr int kSliceDv = slice_width(kConfig, kConfig.head_dim_v);
constexpr int kKRowBytes = row_bytes(kElement, kD);
constexpr int kVRowBytes = row_bytes(kElement, kDv);
constexpr int kDsRowBytes = ds_row_bytes(kConfig);
constexpr int kQTileBytes = kTileM * kKRowBytes;
constexpr int kGradTileBytes = kTileM * kVRowBytes;
constexpr int kWarpKeys = kTileN / kWarps;
constexpr int kMTiles = kWarpKeys / 16;  // m16 tiles of a warp's keys
constexpr int kRows = 2 * kMTiles;       // keys of a thread: lane / 4 + 8 * r of its warp's
constexpr int kNTiles = kStepM / 8;      // n8 tiles of queries; a thread has two neighbours of each
constexpr float kLog2E = 1.44269504088896341f;

static_assert(kTileN % (16 * kWarps) == 0 && kTileM % kStepM == 0 && kStepM % 16 == 0);
static_assert(kConfig.stages == 1 || kConfig.stages == 2);

// ---- What the mod asks for

template <int kNumber>
struct Number {
  static constexpr int kValue = kNumber;
};

template <int kIndex, typename F>
__device__ __forceinline__ void each_sink_from(cuda::SinkList<>, const F& f) {}
template <int kIndex, typename F, typename Sink, typename... Rest>
__device__ __forceinline__ void each_sink_from(cuda::SinkList<Sink, Rest...>, const F& f) {
  f(Sink{}, Number<kIndex>{});
  each_sink_from<kIndex + 1>(cuda::SinkList<Rest...>{}, f);
}
// Calls f(sink, number of the sink).
template <typename F>
__device__ __forceinline__ void each_sink(const F& f) {
  each_sink_from<0>(Mod::Sinks{}, f);
}

template <typename List>
struct SinkTable;
template <typename... Sink>
struct SinkTable<cuda::SinkList<Sink...>> {
  static constexpr int kSize = sizeof...(Sink);
  static constexpr SinkLevel kLevels[] = {Sink::kLevel..., SinkLevel::kBlock};
  static constexpr bool kShifts[] = {Sink::kRowShift..., true};
  // Those of a level before sink number `end` that the main kernel sums.
  static constexpr int count(SinkLevel level, int end = kSize) {
    int n = 0;
    for (int i = 0; i < end; ++i) n += kLevels[i] == level && !kShifts[i] ? 1 : 0;
    return n;
  }
  static constexpr bool any_shift() {
    for (int i = 0; i < kSize; ++i)
      if (kShifts[i]) return true;
    return false;
  }
};
using Table = SinkTable<typename Mod::Sinks>;

constexpr int kRowSinks = Table::count(SinkLevel::kRow);
constexpr int kDiagonalSinks = Table::count(SinkLevel::kDiagonal);
constexpr bool kSinks = Table::count(SinkLevel::kBlock) + Table::count(SinkLevel::kColumn) +
                            Table::count(SinkLevel::kElement) + kRowSinks + kDiagonalSinks >
                        0;
constexpr int kSinkSlots = Table::kSize > 0 ? Table::kSize : 1;
constexpr bool kNeedsGrad = kConfig.wants_dq || kConfig.wants_dk || kSinks;

constexpr Address kNothing = 0;

extern "C" {
extern __shared__ __align__(128) char attnjit_shared[];
}

__device__ __forceinline__ int thread_anew() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// ---- Global and shared memory

__device__ __forceinline__ float load_float(Address address) {
  float x;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(x) : "r"(address));
  return x;
}
__device__ __forceinline__ void store_float(Address address, float x) {
  asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(x) : "memory");
}
__device__ __forceinline__ void store_word(Address address, unsigned x) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

__device__ __forceinline__ const char* start_of(const void* data, const long long (&stride)[3], int b, int head,
                                                int row) {
  return static_cast<const char*>(data) + (b * stride[0] + head * stride[1] + row * stride[2]) * kBytes;
}

__device__ __forceinline__ int tiles_of(int length, int tile) { return (length + tile - 1) / tile; }

// Writes rows that lie in shared memory, `kWidth` elements of each from element `first` on, where the row has them.
// Called by `threads` threads, of which this is number `thread`.
template <int kWidth, int kHeadDim>
__device__ __forceinline__ void store_rows(char* to, long long stride_bytes, Address from, int rows, int first,
                                           int thread, int threads) {
  constexpr int kChunks = kWidth * kBytes / 16;
  constexpr int kStoreWidth = store_width(kConfig.store_bytes, kHeadDim * kBytes);
#pragma unroll 2
  for (int i = thread; i < rows * kChunks; i += threads) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int at = first * kBytes + 16 * chunk;
    const int valid = kHeadDim * kBytes - at;
    if (valid <= 0) continue;
    unsigned word[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(from + row * row_bytes(kElement, kWidth) + 16 * chunk));
    store_pieces<kStoreWidth>(to + row * stride_bytes + at, word, valid);
  }
}

// Accumulators times `factor` as elements in shared memory; `place` is this thread's first.
template <int kRowBytes, int kTiles, int kColumns>
__device__ __forceinline__ void stage_rows(Address place, const Accumulators<kTiles, kColumns>& c, float factor) {
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kColumns; ++j) {
      const float x = c[r / 2][j][r % 2 * 2] * factor, y = c[r / 2][j][r % 2 * 2 + 1] * factor;
      const Address to = place + r * 8 * kRowBytes + j * 8 * kBytes;
      if constexpr (kElement == Element::kF32) {
        store_float2(to, x, y);
      } else {
        store_word(to, pack(x, y));
      }
    }
  }
}

// ---- dQ

// Warps side by side over a tile's queries and over its features: the cut with the least work for a warp, and of those
// the one that reads the least.
struct DqCut {
  int warps_q, m_tiles, chunks;  // of a warp: m16 tiles of queries, chunks of 16 features
};
constexpr DqCut best_dq_cut() {
  DqCut best = {0, 0, 0};
  for (int warps_q = 1; warps_q <= kWarps; ++warps_q) {
    if (kWarps % warps_q != 0 || kTileM / 16 % warps_q != 0) continue;
    const int warps_d = kWarps / warps_q;
    const DqCut cut = {warps_q, kTileM / 16 / warps_q, (kSliceD / 16 + warps_d - 1) / warps_d};
    const int work = cut.m_tiles * cut.chunks, best_work = best.m_tiles * best.chunks;
    if (best.warps_q == 0 || work < best_work ||
        (work == best_work && cut.m_tiles + cut.chunks < best.m_tiles + best.chunks)) {
      best = cut;
    }
  }
  return best;
}
constexpr DqCut kDqCut = best_dq_cut();
constexpr int kUnitFloats = 256;  // of 16 x 16
constexpr int kDqTileFloats = kTileM * kSliceD;

// dq_sum is a sequence of tiles, of a slice each, and a tile of units of 16 x 16, in which every lane has its own eight
// floats: where they lie, so that a warp's access is to neighbours.
#if __CUDA_ARCH__ >= 900
constexpr bool kWideAtomics = true;
#else
constexpr bool kWideAtomics = false;
#endif
constexpr bool kWideSums = kWideAtomics || kConfig.deterministic;
__device__ __forceinline__ int place_in_unit(int n_tile, int i) {
  const int lane = threadIdx.x % 32;
  return kWideSums ? n_tile * 128 + lane * 4 + i : (n_tile * 4 + i) * 32 + lane;
}

__device__ __forceinline__ long long dq_tile(const BackwardParams& params, int split, int b, int h, int q_tile,
                                             int slice) {
  const long long head = (static_cast<long long>(split) * params.batch + b) * params.num_heads + h;
  return ((head * tiles_of(params.seqlen_q, kTileM) + q_tile) * kSlices + slice) * kDqTileFloats;
}

// `first`: there is nothing in this block's dq_sum yet.
__device__ __forceinline__ void add_to_dq(float* unit, const float (&c)[2][4], bool first) {
#pragma unroll
  for (int n = 0; n < 2; ++n) {
    if constexpr (kConfig.deterministic) {
      float4* const to = reinterpret_cast<float4*>(unit + place_in_unit(n, 0));
      float4 sum = first ? float4{0.0f, 0.0f, 0.0f, 0.0f} : *to;
      sum.x += c[n][0];
      sum.y += c[n][1];
      sum.z += c[n][2];
      sum.w += c[n][3];
      *to = sum;
    } else if constexpr (kWideAtomics) {
      asm volatile("red.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(unit + place_in_unit(n, 0)), "f"(c[n][0]),
                   "f"(c[n][1]), "f"(c[n][2]), "f"(c[n][3])
                   : "memory");
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) atomicAdd(unit + place_in_unit(n, i), c[n][i]);
    }
  }
}

// c += dS K of f32: `left` is the first of this thread's queries in dS^T.
template <int kTiles, int kColumns>
__device__ __forceinline__ void multiply_ds_k_f32(Accumulators<kTiles, kColumns>& c, Address left, Address right) {
  right += threadIdx.x % 4 * 8;
#pragma unroll 2
  for (int key = 0; key < kTileN; ++key) {
    float a[2 * kTiles];
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) a[r] = load_float(left + key * kDsRowBytes + r * 32);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) {
      const float2 b = load_float2(right + key * kKRowBytes + i * 32);
#pragma unroll
      for (int r = 0; r < 2 * kTiles; ++r) {
        float* const sum = &c[r / 2][i][r % 2 * 2];
        sum[0] = fmaf(a[r], b.x, sum[0]);
        sum[1] = fmaf(a[r], b.y, sum[1]);
      }
    }
  }
}

// This warp's part of a tile's dS K, added to `sums`, the tile of dq_sum. Where the features do not come out even,
// the last warps compute what nobody asks for, from what lies behind K's slice.
__device__ __forceinline__ void add_dq(Address ds, Address k, float* sums, bool first) {
  const int thread = thread_anew();
  const int lane = thread % 32;
  const int warp = thread / 32;
  const int m_tile = warp % kDqCut.warps_q * kDqCut.m_tiles;
  const int chunk = warp / kDqCut.warps_q * kDqCut.chunks;
  Accumulators<kDqCut.m_tiles, 2 * kDqCut.chunks> dq = {};
  k += chunk * 16 * kBytes;
  if constexpr (kElement == Element::kF32) {
    multiply_ds_k_f32(dq, ds + (m_tile * 16 + lane / 4) * 4, k);
  } else {
    // Keys are dS^T's rows: two by two matrices of eight by eight, transposed on the way.
    ds += (lane % 8 + lane / 16 * 8) * kDsRowBytes + (m_tile * 2 + lane / 8 % 2) * 16;
    multiply_plain<kTileN / 16, kKRowBytes>(
        dq,
        [&](unsigned (&a)[4], int m, int step) { load_matrices_transposed(a, ds + step * 16 * kDsRowBytes + m * 32); },
        k);
  }
#pragma unroll
  for (int m = 0; m < kDqCut.m_tiles; ++m) {
#pragma unroll
    for (int i = 0; i < kDqCut.chunks; ++i) {
      if (kSliceD / 16 % kDqCut.chunks != 0 || kSliceD / 16 / kDqCut.chunks * kDqCut.warps_q != kWarps) {
        if (chunk + i >= kSliceD / 16) break;
      }
      float unit[2][4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int x = 0; x < 4; ++x) unit[n][x] = dq[m][2 * i + n][x];
      }
      add_to_dq(sums + ((m_tile + m) * (kSliceD / 16) + chunk + i) * kUnitFloats, unit, first);
    }
  }
}

// ---- Sums of captured gradients

template <typename Sink>
__device__ __forceinline__ void add_to_sink(const BackwardParams& params, long long offset, float value) {
  const cuda::GradientView& view = params.gradients[Sink::kCapture];
  if constexpr (Sink::kInjective) {
    cuda::store_gradient(view, offset, value);
  } else {
    cuda::add_gradient<kConfig.deterministic>(view, offset, value);
  }
}

// What a thread holds of a head's sums until the head's end.
struct SinkSums {
  float block[kSinkSlots];
  float column[kSinkSlots][kRows];
  float diagonal[kSinkSlots][kMTiles];  // of the diagonals that the next 16 queries go on with
};

// Sums the diagonals of 16 keys by 16 queries, adds those that end here, and keeps the others. `buffer` holds the
// elements; `first` is the first query less the first key, in positions.
template <typename Sink, typename Block>
__device__ __forceinline__ void add_diagonals(const BackwardParams& params, const Block& block, Address buffer,
                                              int first, bool last, float& carried) {
  const int lane = threadIdx.x % 32;
  float sum = 0.0f;
  if (!last) {
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) sum += load_float(buffer + (i * kDiagonalRow + lane) * 4);
    __syncwarp();
  }
  const float ending = sum + carried;
  carried = __shfl_down_sync(0xffffffffu, sum, 16);
  if (lane < 16 && ending != 0.0f) {
    const int difference = first - 15 + lane;
    const auto diagonal = Mod::diagonal(params.captured, block, difference, static_cast<float>(difference));
    const decltype(Mod::row(params.captured, block, 0)) row = {};
    const decltype(Mod::column(params.captured, block, 0)) column = {};
    add_to_sink<Sink>(params, Sink::offset(params.captured, params.gradients, 0.0f, block, row, column, diagonal),
                      ending);
  }
}

// ---- The elements

// Where this thread's elements of a step lie.
struct ElementPlace {
  Address lse, delta;           // of the step's first query
  int q_idx;                    // position of this thread's first query
  int key;                      // this thread's first
  int warp_q_idx, warp_kv_idx;  // positions of the step's first query and the warp's first key
  bool collects;                // captured gradients are this block's to sum
  Address row_sums;             // of this warp, at the step's first query
  Address diagonals;            // this warp's room
};

// From scores and dP^T to P^T and dS^T, in place. Where not `kMasked`, the mask drops nothing of the tile.
template <bool kMasked, typename Block, typename Column>
__device__ __forceinline__ void apply_mod(Accumulators<kMTiles, kNTiles>& s, Accumulators<kMTiles, kNTiles>& dp,
                                          const BackwardParams& params, const Block& block,
                                          const Column (&columns)[kRows], const ElementPlace& at, SinkSums& sums) {
  // The scores go straight into the exponential, and nothing else sees an element.
  constexpr bool kPlain = Mod::kIdentity && !kMasked && Mod::kUnitDerivative && !kSinks;
  const int lane = threadIdx.x % 32;
  const float scale = params.scale;
  // Element (r, j) lies on diagonal j - r of those 8 apart: each j brings a new one, and the keys share the others.
  const int difference = at.q_idx - (params.kv_idx_origin + at.key);
  const float difference_float = static_cast<float>(difference);
  const auto diagonal = [&](int offset) {
    return Mod::diagonal(params.captured, block, difference + offset, difference_float + static_cast<float>(offset));
  };
  decltype(diagonal(0)) diagonals[2][kRows];
#pragma unroll
  for (int r = 1; r < kRows; ++r) {
#pragma unroll
    for (int e = 0; e < 2; ++e) diagonals[e][r - 1] = diagonal(e - 8 * r);
  }
#pragma unroll
  for (int j = 0; j < kNTiles; ++j) {
    const float2 lse = load_float2(at.lse + (j * 8 + lane % 4 * 2) * 4);
    const float2 delta = load_float2(at.delta + (j * 8 + lane % 4 * 2) * 4);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float row_lse = e == 0 ? lse.x : lse.y;
      const float row_delta = e == 0 ? delta.x : delta.y;
      const auto row = Mod::row(params.captured, block, at.q_idx + j * 8 + e);
#pragma unroll
      for (int r = kRows - 1; r > 0; --r) diagonals[e][r] = diagonals[e][r - 1];
      diagonals[e][0] = diagonal(8 * j + e);
      float row_part[kSinkSlots] = {};
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        float& s_element = s[r / 2][j][r % 2 * 2 + e];
        float& dp_element = dp[r / 2][j][r % 2 * 2 + e];
        if constexpr (kPlain) {
          // The lse of a query that does not exist is infinite, and so its p 0, unless q . k is not finite for a key:
          // the gradients of such a K or V are unspecified (docs/numerics.md, rule 3).
          const float p = exp2_approx(fmaf(s_element, scale, -row_lse) * kLog2E);
          dp_element = p * (dp_element - row_delta);
          s_element = p;
        } else {
          const float score = s_element * scale;
          const float value =
              Mod::kIdentity ? score : Mod::score(params.captured, score, block, row, columns[r], diagonals[e][r]);
          float p = exp2_approx((Mod::kIdentity ? fmaf(s_element, scale, -row_lse) : value - row_lse) * kLog2E);
          // A row that does not exist, or keeps nothing, has an lse of infinity.
          bool kept = row_lse != kInfinity;
          if constexpr (kSinks) kept = kept && at.key + r * 8 < params.seqlen_kv;
          if constexpr (kMasked) {
            kept = kept && Mod::keep(params.captured, score, block, row, columns[r], diagonals[e][r]);
          }
          p = kept ? p : 0.0f;
          s_element = p;
          if constexpr (kNeedsGrad) {
            float grad = p * (dp_element - row_delta);
            // 0 times a dP that is not finite stays out. Where nothing is dropped such a dP is in o, and so everywhere.
            if constexpr (Mod::kHasMask || kSinks) grad = p == 0.0f ? 0.0f : grad;
            dp_element = Mod::kUnitDerivative
                             ? grad
                             : Mod::dscore(params.captured, score, grad, block, row, columns[r], diagonals[e][r]);
            if constexpr (kSinks) {
              const float collected = kSlices == 1 || at.collects ? grad : 0.0f;
              each_sink([&](auto sink, auto number) {
                using Sink = decltype(sink);
                constexpr int kNumber = decltype(number)::kValue;
                if constexpr (!Sink::kRowShift) {
                  const float x =
                      Sink::value(params.captured, score, collected, block, row, columns[r], diagonals[e][r]);
                  if constexpr (Sink::kLevel == SinkLevel::kBlock) {
                    sums.block[kNumber] += x;
                  } else if constexpr (Sink::kLevel == SinkLevel::kColumn) {
                    sums.column[kNumber][r] += x;
                  } else if constexpr (Sink::kLevel == SinkLevel::kRow) {
                    row_part[kNumber] += x;
                  } else if constexpr (Sink::kLevel == SinkLevel::kDiagonal) {
                    constexpr int kBefore = Table::count(SinkLevel::kDiagonal, kNumber);
                    const int key = lane / 4 + r % 2 * 8;
                    const int query = j % 2 * 8 + lane % 4 * 2 + e;
                    store_float(at.diagonals + kBefore * diagonal_bytes(kConfig) +
                                    ((r / 2 * 16 + key) * kDiagonalRow + query - key + 15) * 4,
                                x);
                  } else {
                    add_to_sink<Sink>(
                        params,
                        Sink::offset(params.captured, params.gradients, score, block, row, columns[r], diagonals[e][r]),
                        x);
                  }
                }
              });
            }
          }
        }
      }
      each_sink([&](auto sink, auto number) {
        using Sink = decltype(sink);
        constexpr int kNumber = decltype(number)::kValue;
        if constexpr (!Sink::kRowShift && Sink::kLevel == SinkLevel::kRow) {
          float x = row_part[kNumber];
          x += __shfl_xor_sync(0xffffffffu, x, 4);
          x += __shfl_xor_sync(0xffffffffu, x, 8);
          x += __shfl_xor_sync(0xffffffffu, x, 16);
          constexpr int kBefore = Table::count(SinkLevel::kRow, kNumber);
          if (lane < 4) {
            store_float(at.row_sums + kBefore * row_sums_bytes(kConfig) + (j * 8 + lane * 2 + e) * 4, x);
          }
        }
      });
    }
    if (j % 2 == 1) {
      each_sink([&](auto sink, auto number) {
        using Sink = decltype(sink);
        constexpr int kNumber = decltype(number)::kValue;
        if constexpr (!Sink::kRowShift && Sink::kLevel == SinkLevel::kDiagonal) {
          constexpr int kBefore = Table::count(SinkLevel::kDiagonal, kNumber);
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            add_diagonals<Sink>(
                params, block, at.diagonals + kBefore * diagonal_bytes(kConfig) + m * 16 * kDiagonalRow * 4,
                at.warp_q_idx + (j - 1) * 8 - (at.warp_kv_idx + m * 16), false, sums.diagonal[kNumber][m]);
          }
        }
      });
    }
  }
}

// ---- The main kernel

struct Memory {
  Address k, v, q, grad, rows, ds, row_sums, diagonals;
};
// Read anew by every caller, likewise.
__device__ __forceinline__ Memory layout() {
  Memory at;
  asm volatile("mov.u32 %0, attnjit_shared;" : "=r"(at.k));
  at.v = at.k + kTileN * kKRowBytes;
  at.q = at.v + kTileN * kVRowBytes;
  at.grad = at.q + kConfig.stages * kQTileBytes;
  at.rows = at.grad + kConfig.stages * kGradTileBytes;
  at.ds = at.rows + kConfig.stages * kTileM * 8;
  at.row_sums = at.ds + ds_bytes(kConfig);
  at.diagonals = at.row_sums + kRowSinks * row_sums_bytes(kConfig);
  return at;
}

// lse and delta of a tile, side by side.
__device__ __forceinline__ void load_row_values(Address to, const float* lse, const float* delta, int thread) {
#pragma unroll
  for (int begin = 0; begin < kTileM / 2; begin += kThreads) {
    const int i = begin + thread;
    if (i >= kTileM / 2) break;
    const int chunk = i % (kTileM / 4);
    const float* const from = (i < kTileM / 4 ? lse : delta) + chunk * 4;
    async_copy<16>(to + i * 16, reinterpret_cast<const char*>(from), 16);
  }
}

struct Place {
  int b, h_kv, slice, n_block, n_blocks;
};
// Where the mask leaves tiles out, the first keys come first: most queries see them where masks look back. Read anew by
// every caller, since what only the epilogue needs would occupy registers all along.
__device__ __forceinline__ Place place_of_block(const BackwardParams& params) {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  Place place;
  int head;
  if constexpr (splits_dq(kConfig)) {
    // Much the same work for all of them.
    place.n_blocks = params.splits;
    head = index / place.n_blocks;
    place.n_block = index - head * place.n_blocks;
  } else {
    place.n_blocks = tiles_of(params.seqlen_kv, kTileN);
    const HeadTile at = place_in_order(index, params.batch * params.num_heads_kv * kSlices, place.n_blocks,
                                       static_cast<long long>(max(params.seqlen_q, 1)) *
                                           (params.num_heads / params.num_heads_kv) * (kD + kDv) * kBytes,
                                       kSlices);
    head = at.head;
    place.n_block = at.tile;
  }
  place.slice = head % kSlices;
  place.b = head / kSlices / params.num_heads_kv;
  place.h_kv = head / kSlices - place.b * params.num_heads_kv;
  return place;
}

// Of the query heads of this block's group.
__device__ __forceinline__ int first_head(const BackwardParams& params) {
  return place_of_block(params).h_kv * (params.num_heads / params.num_heads_kv);
}
__device__ __forceinline__ int last_head(const BackwardParams& params) {
  return (place_of_block(params).h_kv + 1) * (params.num_heads / params.num_heads_kv) - 1;
}

// All queries of a head by the keys of a tile.
__device__ __forceinline__ Tile tile_of_keys(const BackwardParams& params, int b, int h, int first_key) {
  return {.b = b,
          .h_first = h,
          .h_last = h,
          .q_first = params.q_idx_origin,
          .q_last = params.q_idx_origin + params.seqlen_q - 1,
          .kv_first = params.kv_idx_origin + first_key,
          .kv_last = params.kv_idx_origin + min(first_key + kTileN, params.seqlen_kv) - 1};
}

// Sets to zero what a walk leaves out of a head's part of dq_sum.
template <typename OverQueries>
__device__ __forceinline__ void zero_dq_beside(const BackwardParams& params, OverQueries walk, int split, int b, int h,
                                               int slice) {
  const int q_tiles = tiles_of(params.seqlen_q, kTileM);
  int tile = 0;
#pragma unroll 1
  for (Step step = walk.first(); tile < q_tiles; step = walk.after(step)) {
    const int end = walk.has(step) ? step.tile : q_tiles;
#pragma unroll 1
    for (; tile < end; ++tile) {
      float4* const sums = reinterpret_cast<float4*>(params.dq_sum + dq_tile(params, split, b, h, tile, slice));
      for (int i = threadIdx.x; i < kDqTileFloats / 4; i += kThreads) sums[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
    ++tile;
  }
}

// Writes this warp's rows of a tile's dK and dV.
__device__ __forceinline__ void store_gradients(const BackwardParams& params,
                                                const Accumulators<kMTiles, kSliceD / 8>& dk,
                                                const Accumulators<kMTiles, kSliceDv / 8>& dv, int n_tile) {
  const int thread = thread_anew();
  const int lane = thread % 32;
  const int first_of_warp = thread / 32 * kWarpKeys;
  const Memory memory = layout();
  const auto [b, h_kv, slice, n_block, n_blocks] = place_of_block(params);
  const int key = (splits_dq(kConfig) ? n_tile : n_block) * kTileN + first_of_warp;
  const int rows = min(params.seqlen_kv - key, kWarpKeys);
  if constexpr (kConfig.wants_dk) {
    constexpr int kRowBytes = row_bytes(kElement, kSliceD);
    const Address staged = memory.k + first_of_warp * kRowBytes;
    stage_rows<kRowBytes>(staged + lane / 4 * kRowBytes + lane % 4 * 2 * kBytes, dk, params.scale);
    __syncwarp();
    store_rows<kSliceD, kConfig.head_dim>(const_cast<char*>(start_of(params.dk, params.dk_stride, b, h_kv, key)),
                                          params.dk_stride[2] * kBytes, staged, rows, slice * kSliceD, lane, 32);
  }
  if constexpr (kConfig.wants_dv) {
    constexpr int kRowBytes = row_bytes(kElement, kSliceDv);
    const Address staged = memory.v + first_of_warp * kRowBytes;
    stage_rows<kRowBytes>(staged + lane / 4 * kRowBytes + lane % 4 * 2 * kBytes, dv, 1.0f);
    __syncwarp();
    store_rows<kSliceDv, kConfig.head_dim_v>(const_cast<char*>(start_of(params.dv, params.dv_stride, b, h_kv, key)),
                                             params.dv_stride[2] * kBytes, staged, rows, slice * kSliceDv, lane, 32);
  }
}

// This thread's first row of a tile by keys, and what it gives the products as their left operand.
__device__ __forceinline__ Address own_row(Address tile, int row_bytes, int thread) {
  return tile + (thread / 32 * kWarpKeys + thread % 32 / 4) * row_bytes;
}
__device__ __forceinline__ Address left_rows(Address tile, int row_bytes) {
  const int thread = thread_anew();
  return kElement == Element::kF32 ? own_row(tile, row_bytes, thread)
                                   : left_operand(tile, thread / 32 * kWarpKeys, row_bytes);
}

// One tile of keys.
__device__ __forceinline__ void backward_tile(const BackwardParams& params, int n_tile) {
  const Memory memory = layout();
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto [b, h_kv, slice, n_block, n_blocks] = place_of_block(params);
  const int first_key = n_tile * kTileN;
  Loader<kTileN, kConfig.head_dim, kKRowBytes>(start_of(params.k, params.k_stride, b, h_kv, first_key),
                                               params.k_stride[2] * kBytes, threadIdx.x)
      .load(memory.k, params.seqlen_kv - first_key);
  Loader<kTileN, kConfig.head_dim_v, kVRowBytes>(start_of(params.v, params.v_stride, b, h_kv, first_key),
                                                 params.v_stride[2] * kBytes, threadIdx.x)
      .load(memory.v, params.seqlen_kv - first_key);
  async_commit();

  const int q_tiles = tiles_of(params.seqlen_q, kTileM);
  const int warp_key = first_key + warp * kWarpKeys;
  const int key = warp_key + lane / 4;  // this thread's first
  if constexpr (kConfig.wants_dq && kElement != Element::kF32) {
    // A key that does not exist has no part in dQ, whatever its P is.
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (key + r * 8 < params.seqlen_kv) continue;
#pragma unroll 1
      for (int i = lane % 4; i < kTileM / 2; i += 4) {
        store_word(own_row(memory.ds, kDsRowBytes, threadIdx.x) + r * 8 * kDsRowBytes + i * 4, 0);
      }
    }
  }

  Accumulators<kMTiles, kSliceD / 8> dk = {};
  Accumulators<kMTiles, kSliceDv / 8> dv = {};
#pragma unroll 1
  for (int h = first_head(params); h <= last_head(params); ++h) {
    const auto block = Mod::block(params.captured, b, h);
    decltype(Mod::column(params.captured, block, 0)) columns[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      columns[r] = Mod::column(params.captured, block, params.kv_idx_origin + key + r * 8);
    }
    SinkSums sums = {};
    const auto load = [&](int tile, int stage) {
      const int first = anew(tile) * kTileM;
      const int thread = thread_anew(), b_anew = anew(b), h_anew = anew(h);
      Loader<kTileM, kConfig.head_dim, kKRowBytes>(start_of(params.q, params.q_stride, b_anew, h_anew, first),
                                                   params.q_stride[2] * kBytes, thread)
          .load(memory.q + stage * kQTileBytes, params.seqlen_q - first);
      Loader<kTileM, kConfig.head_dim_v, kVRowBytes>(
          start_of(params.grad_out, params.grad_out_stride, b_anew, h_anew, first), params.grad_out_stride[2] * kBytes,
          thread)
          .load(memory.grad + stage * kGradTileBytes, params.seqlen_q - first);
      const long long row = (static_cast<long long>(b_anew) * params.num_heads + h_anew) * q_tiles * kTileM + first;
      load_row_values(memory.rows + stage * kTileM * 8, params.row_lse + row, params.row_delta + row, thread);
      async_commit();
    };
    // Adds what is left of the diagonals that the tile of queries number `tile` would go on with.
    const auto end_diagonals = [&](int tile) {
      each_sink([&](auto sink, auto number) {
        using Sink = decltype(sink);
        if constexpr (!Sink::kRowShift && Sink::kLevel == SinkLevel::kDiagonal) {
#pragma unroll
          for (int m = 0; m < kMTiles; ++m) {
            add_diagonals<Sink>(params, block, kNothing,
                                params.q_idx_origin + tile * kTileM - (params.kv_idx_origin + warp_key + m * 16), true,
                                sums.diagonal[decltype(number)::kValue][m]);
          }
        }
      });
    };
    // Everybody is done with the last head's tiles: they were last read before a barrier.
    const auto whole = [&] { return tile_of_keys(params, anew(b), anew(h), anew(first_key)); };
    Walk<false, kTileM, decltype(whole)> walk(params.captured, params.seqlen_q, whole);
    if constexpr (splits_dq(kConfig) && kLeavesOut) {
      if (n_tile == n_block) zero_dq_beside(params, walk, anew(n_block), anew(b), anew(h), anew(slice));
    }
    Step now = walk.first();
    if (walk.has(now)) load(now.tile, 0);

#pragma unroll 1
    for (int stage = 0; walk.has(now); stage = kConfig.stages == 1 ? 0 : 1 - stage) {
      const int tile = now.tile;
      const Address q_tile = memory.q + stage * kQTileBytes;
      const Address grad_tile = memory.grad + stage * kGradTileBytes;
      // This tile is there, and everybody is done with dS, with the sums of rows and with what the next load
      // overwrites.
      async_wait<0>();
      __syncthreads();
      Step next;
      if constexpr (kConfig.stages == 2) {
        next = walk.after(now);
        if (walk.has(next)) load(next.tile, 1 - stage);
      }

#pragma unroll 1
      for (int step = 0; step < kTileM; step += kStepM) {
        const Address q_rows = q_tile + step * kKRowBytes;
        const Address grad_rows = grad_tile + step * kVRowBytes;
        const Address k_rows = left_rows(memory.k, kKRowBytes), v_rows = left_rows(memory.v, kVRowBytes);
        Accumulators<kMTiles, kNTiles> s = {}, dp = {};
        if constexpr (kElement == Element::kF32) {
          multiply_transposed_f32<kD, kKRowBytes>(s, k_rows, q_rows);
          if constexpr (kNeedsGrad) multiply_transposed_f32<kDv, kVRowBytes>(dp, v_rows, grad_rows);
        } else {
          multiply_transposed<kD / 16, kKRowBytes>(
              s, [&](unsigned (&a)[4], int m, int i) { load_matrices(a, k_rows + m * 16 * kKRowBytes + i * 32); },
              q_rows);
          if constexpr (kNeedsGrad) {
            multiply_transposed<kDv / 16, kVRowBytes>(
                dp, [&](unsigned (&a)[4], int m, int i) { load_matrices(a, v_rows + m * 16 * kVRowBytes + i * 32); },
                grad_rows);
          }
        }
        const int step_q = tile * kTileM + step;
        const ElementPlace at = {.lse = memory.rows + stage * kTileM * 8 + step * 4,
                                 .delta = memory.rows + stage * kTileM * 8 + (kTileM + step) * 4,
                                 .q_idx = params.q_idx_origin + step_q + lane % 4 * 2,
                                 .key = key,
                                 .warp_q_idx = params.q_idx_origin + step_q,
                                 .warp_kv_idx = params.kv_idx_origin + warp_key,
                                 .collects = slice == 0,
                                 .row_sums = memory.row_sums + (warp * kTileM + step) * 4,
                                 .diagonals = memory.diagonals + warp * kWarpKeys * kDiagonalRow * 4};
        // Sums of gradients take far more than the mask does: they are compiled once.
        if constexpr (Mod::kKnowsTiles && !kSinks) {
          if (now.full) {
            apply_mod<false>(s, dp, params, block, columns, at, sums);
          } else {
            apply_mod<true>(s, dp, params, block, columns, at, sums);
          }
        } else {
          apply_mod<Mod::kHasMask>(s, dp, params, block, columns, at, sums);
        }

        const Address ds_rows = own_row(memory.ds, kDsRowBytes, thread_anew());
        const Address grad_slice = grad_rows + slice * kSliceDv * kBytes;
        const Address q_slice = q_rows + slice * kSliceD * kBytes;
        if constexpr (kElement == Element::kF32) {
          // Through this warp's rows of shared memory.
          if constexpr (kConfig.wants_dv) {
            store_accumulators<kDsRowBytes>(ds_rows + step * 4, s);
            __syncwarp();
            multiply_plain_f32<kStepM, kDsRowBytes, kVRowBytes>(dv, ds_rows + step * 4, grad_slice);
            __syncwarp();
          }
          if constexpr (kConfig.wants_dq || kConfig.wants_dk) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              if (key + r * 8 < params.seqlen_kv) continue;
#pragma unroll
              for (int j = 0; j < kNTiles; ++j) dp[r / 2][j][r % 2 * 2] = dp[r / 2][j][r % 2 * 2 + 1] = 0.0f;
            }
            store_accumulators<kDsRowBytes>(ds_rows + step * 4, dp);
            __syncwarp();
          }
          if constexpr (kConfig.wants_dk) {
            multiply_plain_f32<kStepM, kDsRowBytes, kKRowBytes>(dk, ds_rows + step * 4, q_slice);
          }
        } else {
          if constexpr (kConfig.wants_dq) {
#pragma unroll
            for (int r = 0; r < kRows; ++r) {
              if (key + r * 8 >= params.seqlen_kv) continue;  // stays zero
#pragma unroll
              for (int j = 0; j < kNTiles; ++j) {
                store_word(ds_rows + r * 8 * kDsRowBytes + (step + j * 8 + lane % 4 * 2) * 2,
                           pack(dp[r / 2][j][r % 2 * 2], dp[r / 2][j][r % 2 * 2 + 1]));
              }
            }
          }
          if constexpr (kConfig.wants_dv) {
            multiply_plain<kStepM / 16, kVRowBytes>(
                dv, [&](unsigned (&a)[4], int m, int i) { pack_left(a, s, m, i); }, grad_slice);
          }
          if constexpr (kConfig.wants_dk) {
            multiply_plain<kStepM / 16, kKRowBytes>(
                dk, [&](unsigned (&a)[4], int m, int i) { pack_left(a, dp, m, i); }, q_slice);
          }
        }
      }

      // dS and the sums of rows are there, and everybody is done with this tile.
      __syncthreads();
      if constexpr (kConfig.stages == 1) {
        next = walk.after(now);
        if (walk.has(next)) load(next.tile, 0);
      }
      if constexpr (kConfig.wants_dq) {
        add_dq(
            memory.ds, memory.k + slice * kSliceD * kBytes,
            params.dq_sum + dq_tile(params, kConfig.deterministic ? n_block : 0, anew(b), anew(h), anew(tile), slice),
            n_tile == n_block);
      }
      each_sink([&](auto sink, auto number) {
        using Sink = decltype(sink);
        if constexpr (!Sink::kRowShift && Sink::kLevel == SinkLevel::kRow) {
          constexpr int kBefore = Table::count(SinkLevel::kRow, decltype(number)::kValue);
          for (int i = threadIdx.x; i < kTileM; i += kThreads) {
            float sum = 0.0f;
#pragma unroll
            for (int w = 0; w < kWarps; ++w) {
              sum += load_float(memory.row_sums + kBefore * row_sums_bytes(kConfig) + (w * kTileM + i) * 4);
            }
            if (sum != 0.0f) {
              const auto row = Mod::row(params.captured, block, params.q_idx_origin + tile * kTileM + i);
              const decltype(Mod::diagonal(params.captured, block, 0, 0.0f)) diagonal = {};
              const decltype(Mod::column(params.captured, block, 0)) column = {};
              add_to_sink<Sink>(
                  params, Sink::offset(params.captured, params.gradients, 0.0f, block, row, column, diagonal), sum);
            }
          }
        }
      });
      // No tile goes on with what this one leaves.
      if (Mod::kKnowsTiles && (next.tile != tile + 1 || !walk.has(next))) end_diagonals(tile + 1);
      now = next;
    }
    if constexpr (!Mod::kKnowsTiles) end_diagonals(walk.end());

    each_sink([&](auto sink, auto number) {
      using Sink = decltype(sink);
      constexpr int kNumber = decltype(number)::kValue;
      const decltype(Mod::row(params.captured, block, 0)) row = {};
      const decltype(Mod::diagonal(params.captured, block, 0, 0.0f)) diagonal = {};
      if constexpr (Sink::kRowShift) {
      } else if constexpr (Sink::kLevel == SinkLevel::kBlock) {
        float x = sums.block[kNumber];
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
        if (lane == 0) {
          add_to_sink<Sink>(params,
                            Sink::offset(params.captured, params.gradients, 0.0f, block, row, columns[0], diagonal), x);
        }
      } else if constexpr (Sink::kLevel == SinkLevel::kColumn) {
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float x = sums.column[kNumber][r];
          x += __shfl_xor_sync(0xffffffffu, x, 1);
          x += __shfl_xor_sync(0xffffffffu, x, 2);
          if (lane % 4 == 0) {
            add_to_sink<Sink>(
                params, Sink::offset(params.captured, params.gradients, 0.0f, block, row, columns[r], diagonal), x);
          }
        }
      }
    });
  }

  // K's and V's memory becomes dK's and dV's; each warp writes over rows of K that others may read.
  async_wait<0>();
  __syncthreads();
  store_gradients(params, dk, dv, n_tile);
}

// ---- The kernel before

constexpr int kRowLanes = 8;  // that share a row
constexpr int kRowsAtOnce = kRowsThreads / kRowLanes;

template <int kWidth>
__device__ __forceinline__ auto load_piece(const char* from) {
  if constexpr (kWidth == 16) {
    return *reinterpret_cast<const uint4*>(from);
  } else if constexpr (kWidth == 8) {
    return *reinterpret_cast<const uint2*>(from);
  } else if constexpr (kWidth == 4) {
    return *reinterpret_cast<const unsigned*>(from);
  } else {
    return *reinterpret_cast<const unsigned short*>(from);
  }
}
__device__ __forceinline__ float dot(unsigned short a, unsigned short b, float sum) {
  if constexpr (kElement == Element::kBF16) {
    return fmaf(__uint_as_float(unsigned{a} << 16), __uint_as_float(unsigned{b} << 16), sum);
  } else {
    return fmaf(cuda::widen_f16(a), cuda::widen_f16(b), sum);
  }
}
__device__ __forceinline__ float dot(unsigned a, unsigned b, float sum) {
  if constexpr (kElement == Element::kF32) {
    return fmaf(__uint_as_float(a), __uint_as_float(b), sum);
  } else {
    sum = dot(static_cast<unsigned short>(a), static_cast<unsigned short>(b), sum);
    return dot(static_cast<unsigned short>(a >> 16), static_cast<unsigned short>(b >> 16), sum);
  }
}
__device__ __forceinline__ float dot(uint2 a, uint2 b, float sum) { return dot(a.y, b.y, dot(a.x, b.x, sum)); }
__device__ __forceinline__ float dot(uint4 a, uint4 b, float sum) {
  return dot(a.w, b.w, dot(a.z, b.z, dot(a.y, b.y, dot(a.x, b.x, sum))));
}

}  // namespace attnjit::sm80

// Fills row_lse and row_delta, sets dq_sum to zero where parts are added to it by atomics, and sums what row shifts
// get. A block has kRowsOfBlock rows of a head, of those that tiles are padded with, too.
extern "C" __global__ void __launch_bounds__(attnjit::sm80::kRowsThreads)
    attnjit_backward_rows(const __grid_constant__ attnjit::cuda::BackwardParams params) {
  using namespace attnjit::sm80;
  const int rows = tiles_of(params.seqlen_q, kTileM) * kTileM;
  const int blocks = tiles_of(rows, kRowsOfBlock);
  const int head = static_cast<int>(blockIdx.x) / blocks;
  const int first = (static_cast<int>(blockIdx.x) - head * blocks) * kRowsOfBlock;
  const int b = head / params.num_heads;
  const int h = head - b * params.num_heads;
  const int lane = static_cast<int>(threadIdx.x) % kRowLanes;
  const long long packed = static_cast<long long>(head) * rows;
  constexpr int kRowBytes = kConfig.head_dim_v * kBytes;
  constexpr int kWidth = store_width(kConfig.load_bytes < kBytes ? kBytes : kConfig.load_bytes, kRowBytes);

  const auto block = Mod::block(params.captured, b, h);
  float block_sum[kSinkSlots] = {};
#pragma unroll
  for (int i = 0; i < kRowsOfBlock / kRowsAtOnce; ++i) {
    const int row = first + i * kRowsAtOnce + static_cast<int>(threadIdx.x) / kRowLanes;
    const bool exists = row < params.seqlen_q;
    float sum = 0.0f;
    if (exists) {
      const char* const o = start_of(params.o, params.o_stride, b, h, row);
      const char* const grad = start_of(params.grad_out, params.grad_out_stride, b, h, row);
#pragma unroll
      for (int at = 0; at < kRowBytes; at += kRowLanes * kWidth) {
        const int byte = at + lane * kWidth;
        if (byte < kRowBytes) sum = dot(load_piece<kWidth>(o + byte), load_piece<kWidth>(grad + byte), sum);
      }
    }
#pragma unroll
    for (int mask = kRowLanes / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, mask);
    if (lane == 0 && row < rows) {
      float lse = kInfinity, delta = 0.0f;
      if (exists) {
        const float given =
            params.lse[b * params.lse_stride[0] + h * params.lse_stride[1] + row * params.lse_stride[2]];
        if (given != -kInfinity) {
          const float grad_lse = params.grad_lse
                                     ? params.grad_lse[b * params.grad_lse_stride[0] + h * params.grad_lse_stride[1] +
                                                       row * params.grad_lse_stride[2]]
                                     : 0.0f;
          lse = given;
          delta = sum - grad_lse;
          // Exactly nothing where nothing flows into lse.
          if (Table::any_shift() && grad_lse != 0.0f) {
            const auto of_row = Mod::row(params.captured, block, params.q_idx_origin + row);
            const decltype(Mod::column(params.captured, block, 0)) column = {};
            const decltype(Mod::diagonal(params.captured, block, 0, 0.0f)) diagonal = {};
            each_sink([&](auto sink, auto number) {
              using Sink = decltype(sink);
              if constexpr (Sink::kRowShift) {
                const float x = Sink::value(params.captured, 0.0f, grad_lse, block, of_row, column, diagonal);
                if constexpr (Sink::kLevel == SinkLevel::kBlock) {
                  block_sum[decltype(number)::kValue] += x;
                } else {
                  add_to_sink<Sink>(
                      params, Sink::offset(params.captured, params.gradients, 0.0f, block, of_row, column, diagonal),
                      x);
                }
              }
            });
          }
        }
      }
      params.row_lse[packed + row] = lse;
      params.row_delta[packed + row] = delta;
    }
  }
  if constexpr (kConfig.wants_dq) {
    if (!kConfig.deterministic || params.seqlen_kv == 0) {
      float4* const zero = reinterpret_cast<float4*>(params.dq_sum + (packed + first) * kD);
      const int vectors = min(kRowsOfBlock, rows - first) * (kD / 4);
      for (int i = threadIdx.x; i < vectors; i += kRowsThreads) zero[i] = {0.0f, 0.0f, 0.0f, 0.0f};
    }
  }
  if constexpr (Table::any_shift()) {
    __shared__ float of_warp[kSinkSlots][kRowsThreads / 32];
    each_sink([&](auto sink, auto number) {
      using Sink = decltype(sink);
      constexpr int kNumber = decltype(number)::kValue;
      if constexpr (Sink::kRowShift && Sink::kLevel == SinkLevel::kBlock) {
        float x = block_sum[kNumber];
#pragma unroll
        for (int mask = 16; mask > 0; mask /= 2) x += __shfl_xor_sync(0xffffffffu, x, mask);
        if (threadIdx.x % 32 == 0) of_warp[kNumber][threadIdx.x / 32] = x;
        __syncthreads();
        if (threadIdx.x == 0) {
          x = 0.0f;
#pragma unroll
          for (int w = 0; w < kRowsThreads / 32; ++w) x += of_warp[kNumber][w];
          const decltype(Mod::row(params.captured, block, 0)) row = {};
          const decltype(Mod::column(params.captured, block, 0)) column = {};
          const decltype(Mod::diagonal(params.captured, block, 0, 0.0f)) diagonal = {};
          add_to_sink<Sink>(params, Sink::offset(params.captured, params.gradients, 0.0f, block, row, column, diagonal),
                            x);
        }
      }
    });
  }
}

// A block for each tile of keys of each key/value head and slice; where sums are split, one for each split.
extern "C" __global__ void __launch_bounds__(attnjit::sm80::kThreads, 1)
    attnjit_backward(const __grid_constant__ attnjit::cuda::BackwardParams params) {
  using namespace attnjit::sm80;
  if constexpr (kDiagonalSinks > 0) {
    // Beside its diagonals a row stays zero.
    const int lane = threadIdx.x % 32;
    const Address room = layout().diagonals + threadIdx.x / 32 * kWarpKeys * kDiagonalRow * 4;
    for (int sink = 0; sink < kDiagonalSinks; ++sink) {
      for (int i = lane; i < kWarpKeys * kDiagonalRow; i += 32) {
        store_float(room + sink * diagonal_bytes(kConfig) + i * 4, 0.0f);
      }
    }
    __syncwarp();
  }
  if constexpr (splits_dq(kConfig)) {
#pragma unroll 1
    for (int tile = place_of_block(params).n_block; tile < tiles_of(params.seqlen_kv, kTileN);) {
      // Everybody is done with the last tile's memory.
      __syncthreads();
      backward_tile(params, tile);
      const Place place = place_of_block(params);
      tile = tile_after(tile, place.n_block, place.n_blocks);
    }
  } else {
    backward_tile(params, place_of_block(params).n_block);
  }
}

// dq from the sums: a block for each tile of queries of each head and slice.
extern "C" __global__ void __launch_bounds__(attnjit::sm80::kThreads)
    attnjit_backward_dq(const __grid_constant__ attnjit::cuda::BackwardParams params) {
  using namespace attnjit::sm80;
  const Address rows = shared_address(attnjit_shared);
  const int lane = threadIdx.x % 32;
  constexpr int kRowBytes = row_bytes(kElement, kSliceD);
  const int q_tiles = tiles_of(params.seqlen_q, kTileM);
  const int slice = static_cast<int>(blockIdx.x) % kSlices;
  const int head = static_cast<int>(blockIdx.x) / kSlices / q_tiles;
  const int tile = static_cast<int>(blockIdx.x) / kSlices - head * q_tiles;
  const int b = head / params.num_heads;
  const int h = head - b * params.num_heads;
  const float* const sums = params.dq_sum + static_cast<long long>(blockIdx.x) * kDqTileFloats;
  const long long split = static_cast<long long>(gridDim.x) * kDqTileFloats;
  for (int unit = threadIdx.x / 32; unit < kDqTileFloats / kUnitFloats; unit += kWarps) {
    Accumulators<1, 2> dq = {};
    for (int s = 0; s < params.splits; ++s) {
      const float* const from = sums + s * split + unit * kUnitFloats;
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) dq[0][n][i] += from[place_in_unit(n, i)];
      }
    }
    const int m_tile = unit / (kSliceD / 16);
    const int chunk = unit % (kSliceD / 16);
    stage_rows<kRowBytes>(rows + (m_tile * 16 + lane / 4) * kRowBytes + (chunk * 16 + lane % 4 * 2) * kBytes, dq,
                          params.scale);
  }
  __syncthreads();
  store_rows<kSliceD, kConfig.head_dim>(
      const_cast<char*>(start_of(params.dq, params.dq_stride, b, h, tile * kTileM)), params.dq_stride[2] * kBytes, rows,
      min(params.seqlen_q - tile * kTileM, kTileM), slice * kSliceD, threadIdx.x, kThreads);
}
