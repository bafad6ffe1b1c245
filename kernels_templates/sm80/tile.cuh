// What the sm80 family's kernels share: tiles between global and shared memory, and the products of tiles by mma.sync,
// or for f32 by fused multiply-adds. Compiled behind params.h, mod_defaults.cuh, config.h, the emitted Mod and kConfig.
namespace attnjit::sm80 {

using cuda::anew;
using cuda::exp2_approx;

constexpr Element kElement = kConfig.element;
constexpr int kBytes = bytes_of(kElement);
constexpr int kWarps = kConfig.warps;
constexpr int kThreads = 32 * kWarps;
constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);

// ---- Shared memory and global memory

using Address = unsigned;  // in the shared window

__device__ __forceinline__ Address shared_address(const void* pointer) {
  return static_cast<Address>(__cvta_generic_to_shared(pointer));
}

template <int kWidth>
__device__ __forceinline__ void async_copy(Address to, const char* from, int valid) {
  if constexpr (kWidth == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(valid));
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(from), "n"(kWidth), "r"(valid));
  }
}
__device__ __forceinline__ void async_commit() { asm volatile("cp.async.commit_group;"); }
template <int kPending>
__device__ __forceinline__ void async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 16 bytes to shared memory, of which the first `valid` come from `from` and the rest are zero. Nothing is read behind
// `valid`, wherever `from` points.
__device__ __forceinline__ void copy_chunk(Address to, const char* from, int valid) {
  constexpr int kWidth = kConfig.load_bytes < kBytes ? kBytes : kConfig.load_bytes;
  if constexpr (kWidth >= 4) {
#pragma unroll
    for (int i = 0; i < 16; i += kWidth) {
      const int left = valid - i;
      async_copy<kWidth>(to + i, from + i, left < 0 ? 0 : left > kWidth ? kWidth : left);
    }
  } else {
    unsigned word[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const unsigned short low = 4 * i < valid ? *reinterpret_cast<const unsigned short*>(from + 4 * i) : 0;
      const unsigned short high = 4 * i + 2 < valid ? *reinterpret_cast<const unsigned short*>(from + 4 * i + 2) : 0;
      word[i] = low | static_cast<unsigned>(high) << 16;
    }
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(word[0]), "r"(word[1]), "r"(word[2]),
                 "r"(word[3])
                 : "memory");
  }
}

// Copies tile after tile of `kTileRows` rows, as thread number `thread` of the block. Rows that do not exist, and
// columns that pad the head dim, become zero.
template <int kTileRows, int kHeadDim, int kRowBytes>
class Loader {
 public:
  __device__ __forceinline__ Loader(const char* from, long long stride_bytes, int thread)
      : source_(from + (kEven ? thread / kChunks * stride_bytes + thread % kChunks * 16 : 0)),
        stride_(stride_bytes),
        thread_(thread) {}

  // Leaves tiles out.
  __device__ __forceinline__ void skip(int tiles) { source_ += tiles * (kTileRows * stride_); }

  // The next tile, of which `rows` rows exist.
  __device__ __forceinline__ void load(Address to, int rows) {
    if constexpr (kEven) {
      const int row = thread_ / kChunks;
      const int chunk = thread_ % kChunks;
      to += row * kRowBytes + 16 * chunk;
#pragma unroll
      for (int i = 0; i < kTotal / kThreads; ++i) {
        copy_chunk(to + i * kStep * kRowBytes, source_, valid_bytes(row + i * kStep, chunk, rows));
        source_ += kStep * stride_;
      }
    } else {
#pragma unroll kUnroll
      for (int first = 0; first < kTotal; first += kThreads) {
        const int i = first + thread_;
        if (kTotal % kThreads != 0 && i >= kTotal) break;
        const int row = i / kChunks;
        const int chunk = i % kChunks;
        copy_chunk(to + row * kRowBytes + 16 * chunk, source_ + row * stride_ + 16 * chunk,
                   valid_bytes(row, chunk, rows));
      }
      source_ += kTileRows * stride_;
    }
  }

 private:
  static constexpr int kChunks = kRowBytes / 16 - 1;
  static constexpr int kTotal = kTileRows * kChunks;
  // A thread keeps to its chunk and walks down the rows where that comes out even.
  static constexpr bool kEven = kThreads % kChunks == 0 && kTotal % kThreads == 0;
  static constexpr int kStep = kThreads / kChunks;
  // The addresses of more pieces at once would not fit the registers.
  static constexpr int kUnroll = kTotal > 16 * kThreads ? 4 : 16;
  static constexpr bool kUnpadded = kHeadDim * kBytes == 16 * kChunks;

  static __device__ __forceinline__ int valid_bytes(int row, int chunk, int rows) {
    int valid = kHeadDim * kBytes - 16 * chunk;
    valid = kUnpadded || valid > 16 ? 16 : valid < 0 ? 0 : valid;
    return row < rows ? valid : 0;
  }

  const char* source_;
  const long long stride_;
  const int thread_;
};

__device__ __forceinline__ void load_matrices(unsigned (&r)[4], Address address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ void load_matrices_transposed(unsigned (&r)[4], Address address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address));
}
__device__ __forceinline__ float4 load_float4(Address address) {
  float4 x;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "r"(address));
  return x;
}
__device__ __forceinline__ float2 load_float2(Address address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address));
  return x;
}
__device__ __forceinline__ void store_float2(Address address, float x, float y) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(x), "f"(y) : "memory");
}

// ---- Arithmetic

// Two values rounded to the element type, the first in the low half.
__device__ __forceinline__ unsigned pack(float low, float high) {
  unsigned word;
  if constexpr (kElement == Element::kBF16) {
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  }
  return word;
}

// c += a * b for an m16n8k16 tile.
__device__ __forceinline__ void multiply(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  if constexpr (kElement == Element::kBF16) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, "
        "%2, %3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Accumulators as mma leaves them: of m tile m and n tile j, element 2 * r + e is row lane / 4 + 8 * r, column
// 2 * (lane % 4) + e. The f32 loops keep to the same places.
template <int kMTiles, int kNTiles>
using Accumulators = float[kMTiles][kNTiles][4];

// ---- Rows to global memory

template <int kWidth>
__device__ __forceinline__ void store_pieces(char* to, const unsigned (&word)[4], int valid) {
#pragma unroll
  for (int i = 0; i < 16; i += kWidth) {
    if (i >= valid) break;
    if constexpr (kWidth == 16) {
      *reinterpret_cast<uint4*>(to) = {word[0], word[1], word[2], word[3]};
    } else if constexpr (kWidth == 8) {
      *reinterpret_cast<uint2*>(to + i) = {word[i / 4], word[i / 4 + 1]};
    } else if constexpr (kWidth == 4) {
      *reinterpret_cast<unsigned*>(to + i) = word[i / 4];
    } else {
      *reinterpret_cast<unsigned short*>(to + i) = static_cast<unsigned short>(word[i / 4] >> i % 4 * 8);
    }
  }
}

// ---- Products of 16-bit elements

// Where this lane points ldmatrix to for the left operand: rows 0 to 15 by chunks 0 and 1.
__device__ __forceinline__ Address left_operand(Address tile, int row, int row_bytes) {
  const int lane = threadIdx.x % 32;
  return tile + (row + lane % 16) * row_bytes + lane / 16 * 16;
}

// c += a b^T. `right` is b's tile. left(fragment, m, step) gives a's of an m tile and a step of 16 features.
template <int kSteps, int kRowBytes, int kMTiles, int kNTiles, typename Left>
__device__ __forceinline__ void multiply_transposed(Accumulators<kMTiles, kNTiles>& c, const Left& left,
                                                    Address right) {
  const int lane = threadIdx.x % 32;
  // Two n tiles of 8 rows by two chunks.
  right += (lane % 8 + lane / 16 * 8) * kRowBytes + lane / 8 % 2 * 16;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    unsigned a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) left(a[m], m, step);
#pragma unroll
    for (int j = 0; j < kNTiles; j += 2) {
      unsigned b[4];
      load_matrices(b, right + j * 8 * kRowBytes + step * 32);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        multiply(c[m][j], a[m], b[0], b[1]);
        multiply(c[m][j + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// c += a b, likewise; a step is 16 rows of b.
template <int kSteps, int kRowBytes, int kMTiles, int kNTiles, typename Left>
__device__ __forceinline__ void multiply_plain(Accumulators<kMTiles, kNTiles>& c, const Left& left, Address right) {
  const int lane = threadIdx.x % 32;
  right += lane % 16 * kRowBytes + lane / 16 * 16;
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    unsigned a[kMTiles][4];
#pragma unroll
    for (int m = 0; m < kMTiles; ++m) left(a[m], m, step);
#pragma unroll
    for (int i = 0; i < kNTiles; i += 2) {
      unsigned b[4];
      load_matrices_transposed(b, right + step * 16 * kRowBytes + i * 16);
#pragma unroll
      for (int m = 0; m < kMTiles; ++m) {
        multiply(c[m][i], a[m], b[0], b[1]);
        multiply(c[m][i + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// Accumulators as a left operand of multiply_plain: two n tiles of them are one.
template <int kMTiles, int kNTiles>
__device__ __forceinline__ void pack_left(unsigned (&a)[4], const Accumulators<kMTiles, kNTiles>& c, int m, int step) {
  a[0] = pack(c[m][2 * step][0], c[m][2 * step][1]);
  a[1] = pack(c[m][2 * step][2], c[m][2 * step][3]);
  a[2] = pack(c[m][2 * step + 1][0], c[m][2 * step + 1][1]);
  a[3] = pack(c[m][2 * step + 1][2], c[m][2 * step + 1][3]);
}

// ---- Products of f32: fused multiply-adds, exact to f32 for every input, infinities included

// c += a b^T over `kFeatures`. `left` is the first of this thread's rows of a, `right` is b's tile.
template <int kFeatures, int kRowBytes, int kMTiles, int kNTiles>
__device__ __forceinline__ void multiply_transposed_f32(Accumulators<kMTiles, kNTiles>& c, Address left,
                                                        Address right) {
  constexpr int kRows = 2 * kMTiles;
  right += threadIdx.x % 4 * 2 * kRowBytes;
#pragma unroll 1
  for (int d = 0; d < kFeatures; d += 4) {
    float4 a[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) a[r] = load_float4(left + r * 8 * kRowBytes + d * 4);
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float4 b = load_float4(right + (j * 8 + e) * kRowBytes + d * 4);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          float& sum = c[r / 2][j][r % 2 * 2 + e];
          sum = fmaf(a[r].w, b.w, fmaf(a[r].z, b.z, fmaf(a[r].y, b.y, fmaf(a[r].x, b.x, sum))));
        }
      }
    }
  }
}

// c += a b over `kSteps` rows of b.
template <int kSteps, int kLeftRowBytes, int kRightRowBytes, int kMTiles, int kNTiles>
__device__ __forceinline__ void multiply_plain_f32(Accumulators<kMTiles, kNTiles>& c, Address left, Address right) {
  constexpr int kRows = 2 * kMTiles;
  right += threadIdx.x % 4 * 8;
#pragma unroll 1
  for (int k = 0; k < kSteps; k += 4) {
    float4 a[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) a[r] = load_float4(left + r * 8 * kLeftRowBytes + k * 4);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int i = 0; i < kNTiles; ++i) {
        const float2 b = load_float2(right + (k + n) * kRightRowBytes + i * 32);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          const float x = n == 0 ? a[r].x : n == 1 ? a[r].y : n == 2 ? a[r].z : a[r].w;
          float* const sum = &c[r / 2][i][r % 2 * 2];
          sum[0] = fmaf(x, b.x, sum[0]);
          sum[1] = fmaf(x, b.y, sum[1]);
        }
      }
    }
  }
}

// Writes accumulators to shared memory; `rows` is the first of this thread's rows.
template <int kRowBytes, int kMTiles, int kNTiles>
__device__ __forceinline__ void store_accumulators(Address rows, const Accumulators<kMTiles, kNTiles>& c) {
#pragma unroll
  for (int r = 0; r < 2 * kMTiles; ++r) {
#pragma unroll
    for (int j = 0; j < kNTiles; ++j) {
      store_float2(rows + r * 8 * kRowBytes + (j * 8 + threadIdx.x % 4 * 2) * 4, c[r / 2][j][r % 2 * 2],
                   c[r / 2][j][r % 2 * 2 + 1]);
    }
  }
}

}  // namespace attnjit::sm80
