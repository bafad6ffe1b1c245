// Fused attention forward for compute capability 8.0 and later: mma.sync, ldmatrix, cp.async, online softmax.
//
// Follows FlashAttention-2 (arXiv 2307.08691): a block owns tile_m queries of one head and walks over the keys, each
// warp owning whole rows, so that the softmax needs no more than the four lanes that share a row. Scores never leave
// the registers (f32 elements: probabilities pass through shared memory). Compiled behind walk.cuh and tile.cuh.
namespace attnjit::sm80 {

using cuda::ForwardParams;

constexpr int kTileM = kConfig.tile_m;
constexpr int kTileN = kConfig.tile_n;
constexpr int kD = padded(kConfig.head_dim);
constexpr int kDv = padded(kConfig.head_dim_v);
constexpr int kQRowBytes = row_bytes(kElement, kConfig.head_dim);
constexpr int kVRowBytes = row_bytes(kElement, kConfig.head_dim_v);
constexpr int kORowBytes = kVRowBytes;
constexpr int kPRowBytes = p_row_floats(kConfig) * 4;
constexpr int kQTileBytes = q_bytes(kConfig);
constexpr int kKTileBytes = k_bytes(kConfig);
constexpr int kVTileBytes = v_bytes(kConfig);
constexpr int kStoreWidth = store_width(kConfig);
constexpr int kWarpRows = kTileM / kWarps;
constexpr int kMTiles = kWarpRows / 16;  // m16 tiles of a warp
constexpr int kRows = 2 * kMTiles;       // rows of a thread: lane / 4 + 8 * r of its warp's
constexpr int kNTiles = kTileN / 8;      // n8 tiles of the scores; a thread has two neighbouring columns of each
constexpr int kDvTiles = kDv / 8;        // n8 tiles of the output
constexpr float kLn2 = 0.693147180559945309f;

static_assert(kTileM % (16 * kWarps) == 0 && kTileN % 16 == 0);
static_assert(kConfig.stages == 1 || kConfig.stages == 2);

// ---- The block's place

struct Place {
  int b, h, first_query;
};

// Where the mask leaves tiles out, the last queries come first: they see most keys where masks look back. Read anew by
// every caller, since what only the epilogue needs would occupy registers all along.
__device__ __forceinline__ Place place_of_block(const ForwardParams& params) {
  int index;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(index));
  const int m_tiles = (params.seqlen_q + kTileM - 1) / kTileM;
  const HeadTile at = place_in_order(index, params.batch * params.num_heads, m_tiles,
                                     static_cast<long long>(max(params.seqlen_kv, 1)) * (kD + kDv) * kBytes,
                                     params.num_heads / params.num_heads_kv);
  const int b = at.head / params.num_heads;
  return {b, at.head - b * params.num_heads, (kLeavesOut ? m_tiles - 1 - at.tile : at.tile) * kTileM};
}

// That tile of queries by all keys.
__device__ __forceinline__ Tile tile_of_block(const ForwardParams& params, const Place& place) {
  return {.b = place.b,
          .h_first = place.h,
          .h_last = place.h,
          .q_first = params.q_idx_origin + place.first_query,
          .q_last = params.q_idx_origin + min(place.first_query + kTileM, params.seqlen_q) - 1,
          .kv_first = params.kv_idx_origin,
          .kv_last = params.kv_idx_origin + params.seqlen_kv - 1};
}

// ---- Arithmetic

// A sum of exponentials is never subnormal unless it is 0: unlike cuda::log2_approx, without the steps for those.
__device__ __forceinline__ float log2_flushed(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// ---- The two products

using Scores = Accumulators<kMTiles, kNTiles>;
using Output = Accumulators<kMTiles, kDvTiles>;

constexpr int kKSteps = kD / 16;
constexpr bool kQInRegisters = kConfig.q_in_registers && kElement != Element::kF32;
// Q's fragments of all steps, or none.
using QFragments = unsigned[kQInRegisters ? kMTiles : 1][kQInRegisters ? kKSteps : 1][4];

__device__ __forceinline__ void load_q(QFragments& fragments, Address q) {
  if constexpr (kQInRegisters) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int k = 0; k < kKSteps; ++k) load_matrices(fragments[m][k], q + m * 16 * kQRowBytes + k * 32);
    }
  }
}

// s = Q K^T. `q` points to this warp's rows as left_operand says, or to the first of this thread's; `k` to the tile.
__device__ __forceinline__ void multiply_qk(Scores& s, const QFragments& fragments, Address q, Address k) {
  if constexpr (kElement == Element::kF32) {
    multiply_transposed_f32<kD, kQRowBytes>(s, q, k);
  } else {
    const auto left = [&](unsigned (&a)[4], int m, int step) {
      if constexpr (kQInRegisters) {
#pragma unroll
        for (int i = 0; i < 4; ++i) a[i] = fragments[m][step][i];
      } else {
        load_matrices(a, q + m * 16 * kQRowBytes + step * 32);
      }
    };
    multiply_transposed<kKSteps, kQRowBytes>(s, left, k);
  }
}

// o += P V. Of f32, P passes through this warp's part of shared memory; `p_rows` is the first of this thread's rows.
__device__ __forceinline__ void multiply_pv(Output& o, const Scores& p, Address p_rows, Address v) {
  if constexpr (kElement == Element::kF32) {
    __syncwarp();
    store_accumulators<kPRowBytes>(p_rows, p);
    __syncwarp();
    multiply_plain_f32<kTileN, kPRowBytes, kVRowBytes>(o, p_rows, v);
  } else {
    multiply_plain<kTileN / 16, kVRowBytes>(o, [&](unsigned (&a)[4], int m, int step) { pack_left(a, p, m, step); }, v);
  }
}

// ---- The mod and the softmax

// Where the mod leaves the scores as they are, the scale is applied inside the exponential, in one fused operation. It
// is positive, so that the maximum of the products is that of the scores.
constexpr bool kIdentity = Mod::kIdentity;

struct RowState {
  float max;  // of the modified scores, in units of log2 over `factor`
  float sum;  // of the exponentials of this thread's columns
};

// Where not `kMasked`, nothing is dropped but what does not exist.
template <bool kMasked, typename Block, typename Row>
__device__ __forceinline__ void apply_mod(Scores& s, const ForwardParams& params, const Block& block,
                                          const Row (&rows)[kRows], int first_row, int kv_base) {
  const int kv_first = params.kv_idx_origin + kv_base + static_cast<int>(threadIdx.x) % 4 * 2;
  if (params.score_prescale != 1.0f) {
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) {
#pragma unroll
      for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
        for (int e = 0; e < 4; ++e) s[m][j][e] *= params.score_prescale;
      }
    }
  }
  if constexpr (!kIdentity || kMasked) {
    // Element (r, j) lies on diagonal r - j of those 8 apart: each j brings a new one, and the rows share the others.
    const int difference = first_row - kv_first;
    const float difference_float = static_cast<float>(difference);
    const auto diagonal = [&](int offset) {
      return Mod::diagonal(params.captured, block, difference + offset, difference_float + static_cast<float>(offset));
    };
    decltype(diagonal(0)) diagonals[2][kRows];
#pragma unroll
    for (int r = 1; r < kRows; ++r) {
#pragma unroll
      for (int e = 0; e < 2; ++e) diagonals[e][r - 1] = diagonal(8 * r - e);
    }
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const auto column = Mod::column(params.captured, block, kv_first + j * 8 + e);
#pragma unroll
        for (int r = kRows - 1; r > 0; --r) diagonals[e][r] = diagonals[e][r - 1];
        diagonals[e][0] = diagonal(-8 * j - e);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& element = s[r / 2][j][r % 2 * 2 + e];
          const float score = kIdentity && !Mod::kMaskReadsScore ? element : element * params.score_scale;
          float value = score;
          if constexpr (!kIdentity) value = Mod::score(params.captured, score, block, rows[r], column, diagonals[e][r]);
          if constexpr (kMasked) {
            if (!Mod::keep(params.captured, score, block, rows[r], column, diagonals[e][r])) value = -kInfinity;
          }
          element = value;
        }
      }
    }
  }
  // The columns of the last tile that are not there.
  const int keys_left = params.seqlen_kv - kv_base;
  if (keys_left < kTileN) {
    const int first = static_cast<int>(threadIdx.x) % 4 * 2;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (first + j * 8 + e >= keys_left) {
#pragma unroll
          for (int r = 0; r < kRows; ++r) s[r / 2][j][r % 2 * 2 + e] = -kInfinity;
        }
      }
    }
  }
}

// Turns scores into probabilities and rescales what was summed before. NaN loses against every maximum and shows in its
// exponential.
__device__ __forceinline__ void softmax(Scores& s, Output& o, RowState (&state)[kRows], float factor) {
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const int m = r / 2, c = r % 2 * 2;
    float max = state[r].max;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) max = fmaxf(max, fmaxf(s[m][j][c], s[m][j][c + 1]));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 1));
    max = fmaxf(max, __shfl_xor_sync(0xffffffffu, max, 2));
    // Every element so far dropped: any finite reference makes their exponentials 0.
    const float finite_max = max == -kInfinity ? 0.0f : max;
    const float reference = finite_max * factor;
    // Exactly 1 where the maximum stays: the sums and O are not rounded again by every tile.
    const float rescale = exp2_approx((state[r].max - finite_max) * factor);
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float& x = s[m][j][c + e];
        x = exp2_approx(kIdentity ? fmaf(x, factor, -reference) : x - reference);
        sum += x;
      }
    }
    state[r].sum = fmaf(state[r].sum, rescale, sum);
    state[r].max = max;
#pragma unroll
    for (int i = 0; i < kDvTiles; ++i) {
      o[m][i][c] *= rescale;
      o[m][i][c + 1] *= rescale;
    }
  }
}

// ---- Epilogue

// Normalises this warp's rows, passes them through its part of Q's memory, and writes o, lse and row_max.
__device__ __forceinline__ void store_output(const ForwardParams& params, Output& o, RowState (&state)[kRows],
                                             float factor, Address q) {
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto [b, h, first_query] = place_of_block(params);
  const int first_row = first_query + warp * kWarpRows;
  const Address rows = q + warp * kWarpRows * kORowBytes;
  __syncwarp();
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    float sum = state[r].sum;
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    const float max = state[r].max * factor;
    const bool empty = state[r].max == -kInfinity && sum == 0.0f;
    const float inverse = 1.0f / sum;
    const int m = r / 2, c = r % 2 * 2;
    const Address row = rows + (lane / 4 + r * 8) * kORowBytes + lane % 4 * 2 * kBytes;
#pragma unroll
    for (int i = 0; i < kDvTiles; ++i) {
      // 0 times a V that is not finite stays out of an empty row.
      const float x = empty ? 0.0f : o[m][i][c] * inverse;
      const float y = empty ? 0.0f : o[m][i][c + 1] * inverse;
      if constexpr (kElement == Element::kF32) {
        store_float2(row + i * 32, x, y);
      } else {
        asm volatile("st.shared.b32 [%0], %1;" ::"r"(row + i * 16), "r"(pack(x, y)) : "memory");
      }
    }
    const int query = first_row + lane / 4 + r * 8;
    if (lane % 4 == 0 && query < params.seqlen_q) {
      if (params.lse) {
        params.lse[b * params.lse_stride[0] + h * params.lse_stride[1] + query * params.lse_stride[2]] =
            empty ? -kInfinity : (max + log2_flushed(sum)) * kLn2;
      }
      if (params.row_max) {
        params.row_max[b * params.row_max_stride[0] + h * params.row_max_stride[1] + query * params.row_max_stride[2]] =
            sum != sum && max != kInfinity ? sum : max * kLn2;
      }
    }
  }
  __syncwarp();
  constexpr int kChunks = kDv * kBytes / 16;
  char* const to = static_cast<char*>(params.o) + (b * params.o_stride[0] + h * params.o_stride[1]) * kBytes;
#pragma unroll 4
  for (int i = lane; i < kWarpRows * kChunks; i += 32) {
    const int row = i / kChunks;
    const int chunk = i % kChunks;
    const int query = first_row + row;
    const int valid = kConfig.head_dim_v * kBytes - 16 * chunk;
    if (query >= params.seqlen_q || valid <= 0) continue;
    unsigned word[4];
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(word[0]), "=r"(word[1]), "=r"(word[2]), "=r"(word[3])
                 : "r"(rows + row * kORowBytes + 16 * chunk));
    store_pieces<kStoreWidth>(to + query * params.o_stride[2] * kBytes + 16 * chunk, word, valid);
  }
}

}  // namespace attnjit::sm80

extern "C" __global__ void __launch_bounds__(attnjit::sm80::kThreads, attnjit::sm80::kConfig.min_blocks)
    attnjit_forward(const __grid_constant__ attnjit::cuda::ForwardParams params) {
  using namespace attnjit::sm80;
  extern __shared__ __align__(128) char shared[];
  const Address q_tile = shared_address(shared);
  const Address k_tiles = q_tile + kQTileBytes;
  const Address v_tiles = k_tiles + kConfig.stages * kKTileBytes;
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;

  const Place place = place_of_block(params);
  const auto [b, h, first_query] = place;
  const int h_kv = h / (params.num_heads / params.num_heads_kv);

  const auto start = [&](const void* data, const long long (&stride)[3], int head_of, int row) {
    return static_cast<const char*>(data) + (b * stride[0] + head_of * stride[1] + row * stride[2]) * kBytes;
  };
  Loader<kTileN, kConfig.head_dim, kQRowBytes> k(start(params.k, params.k_stride, h_kv, 0), params.k_stride[2] * kBytes,
                                                 threadIdx.x);
  Loader<kTileN, kConfig.head_dim_v, kVRowBytes> v(start(params.v, params.v_stride, h_kv, 0),
                                                   params.v_stride[2] * kBytes, threadIdx.x);
  const auto load_k = [&](int tile, int stage) {
    k.load(k_tiles + stage * kKTileBytes, params.seqlen_kv - tile * kTileN);
  };
  const auto load_v = [&](int tile, int stage) {
    v.load(v_tiles + stage * kVTileBytes, params.seqlen_kv - tile * kTileN);
  };
  const auto skip = [&](int tiles) {
    if constexpr (kLeavesOut) {
      k.skip(tiles);
      v.skip(tiles);
    }
  };

  Loader<kTileM, kConfig.head_dim, kQRowBytes>(start(params.q, params.q_stride, h, first_query),
                                               params.q_stride[2] * kBytes, threadIdx.x)
      .load(q_tile, params.seqlen_q - first_query);
  const auto whole = [&] { return tile_of_block(params, {anew(b), anew(h), anew(first_query)}); };
  Walk<true, kTileN, decltype(whole)> walk(params.captured, params.seqlen_kv, whole);
  Step now = walk.first();
  skip(now.tile);
  if (walk.has(now)) load_k(now.tile, 0);
  if (kConfig.stages == 2 && walk.has(now)) load_v(now.tile, 0);
  async_commit();

  const int warp_query = first_query + warp * kWarpRows;
  const auto block = Mod::block(params.captured, b, h);
  const int first_row = params.q_idx_origin + warp_query + lane / 4;  // its logical position
  decltype(Mod::row(params.captured, block, 0)) rows[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    rows[r] = Mod::row(params.captured, block, first_row + r * 8);
  }
  const float factor = kIdentity ? params.score_scale : 1.0f;

  RowState state[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) state[r] = {-kInfinity, 0.0f};
  Output o = {};
  const Address q_fragment = left_operand(q_tile, warp * kWarpRows, kQRowBytes);
  const Address q_row = q_tile + (warp * kWarpRows + lane / 4) * kQRowBytes;
  const Address p_row = v_tiles + kConfig.stages * kVTileBytes + (warp * kWarpRows + lane / 4) * kPRowBytes;
  QFragments q_fragments;
  if constexpr (kQInRegisters) {
    async_wait<0>();
    __syncthreads();
    load_q(q_fragments, q_fragment);
  }

#pragma unroll 1
  for (int stage = 0; walk.has(now); stage = kConfig.stages == 1 ? 0 : 1 - stage) {
    // K of this tile is there, and everybody is done with what the next loads overwrite.
    async_wait<0>();
    __syncthreads();
    Step next;
    const auto go_on = [&] {
      next = walk.after(now);
      skip(next.tile - now.tile - 1);
    };
    if constexpr (kConfig.stages == 1) {
      load_v(now.tile, 0);
    } else {
      go_on();
      if (walk.has(next)) {
        load_k(next.tile, 1 - stage);
        load_v(next.tile, 1 - stage);
      }
    }
    async_commit();

    Scores s = {};
    const Address k_tile = k_tiles + stage * kKTileBytes;
    multiply_qk(s, q_fragments, kElement == Element::kF32 ? q_row : q_fragment, k_tile);
    const int kv_base = now.tile * kTileN;
    if constexpr (Mod::kKnowsTiles) {
      if (now.full) {
        apply_mod<false>(s, params, block, rows, first_row, kv_base);
      } else {
        apply_mod<true>(s, params, block, rows, first_row, kv_base);
      }
    } else {
      apply_mod<Mod::kHasMask>(s, params, block, rows, first_row, kv_base);
    }

    if constexpr (kConfig.stages == 1) {
      async_wait<0>();
      __syncthreads();
      go_on();
      if (walk.has(next)) load_k(next.tile, 0);
      async_commit();
    }
    softmax(s, o, state, factor);
    const Address v_tile = v_tiles + stage * kVTileBytes;
    multiply_pv(o, s, p_row, v_tile);
    now = next;
  }
  // Q's memory becomes O's; each warp writes over rows of Q that others may read where O's rows are longer.
  async_wait<0>();
  __syncthreads();
  store_output(params, o, state, factor, q_tile);
}
