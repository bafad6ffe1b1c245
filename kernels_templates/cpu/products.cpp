// The products, conversions and transposes of products.h, in vector extensions that clang and GCC share. Compiled once
// per instruction set: ATTNJIT_PRODUCTS is the table's name, ATTNJIT_VECTOR_WIDTH the set's vector in floats.
#include "kernels_templates/cpu/products.h"

#ifdef __clang__
#define ATTNJIT_UNROLL _Pragma("clang loop unroll(full)")
#else
#define ATTNJIT_UNROLL _Pragma("GCC unroll 32")
#endif

namespace attnjit::cpu {
namespace {

constexpr int kWidth = ATTNJIT_VECTOR_WIDTH;

typedef float Vector __attribute__((vector_size(kWidth * 4), may_alias));
typedef unsigned int UintVector __attribute__((vector_size(kWidth * 4), may_alias));
typedef unsigned short HalfVector __attribute__((vector_size(kWidth * 2), may_alias));
typedef float Quad __attribute__((vector_size(16), may_alias));
// 32 bits of a tensor: one float or two 16-bit values.
typedef unsigned int Word __attribute__((may_alias, aligned(2)));

template <typename T>
inline T load(const void* p) {
  T value;
  __builtin_memcpy(&value, p, sizeof(T));
  return value;
}

template <typename T>
inline void store(void* p, T value) {
  __builtin_memcpy(p, &value, sizeof(T));
}

// ---- Products -------------------------------------------------------------------------------------------------------

// Register blocks, chosen by measurement (bench/notes.md, "CPU kernels"): kBlock rows by kColumns vectors of
// accumulators, one broadcast register per row and one for the lanes. AVX-512 has 32 registers, the others 16.
#if ATTNJIT_VECTOR_WIDTH == 16
constexpr int kColumns = 2;
constexpr int kBlock = 8;
#elif ATTNJIT_VECTOR_WIDTH == 8
constexpr int kColumns = 4;
constexpr int kBlock = 3;
#else
constexpr int kColumns = 4;
constexpr int kBlock = 2;
#endif
constexpr int kGroup = kColumns * kWidth;  // lanes of one block
static_assert(kPanelLanes % kGroup == 0);

// What one accumulator makes of a word of a tensor and a word per lane.
struct Fp32 {
  static void multiply_add(Vector& acc, Vector a, Vector b) { acc += a * b; }
};

#ifdef __AVX512BF16__
struct Bf16Pairs {
  static void multiply_add(Vector& acc, Vector a, Vector b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc) : "v"(a), "v"(b));
  }
};
#endif

// acc[r][c] += the word at a + r * row_bytes + i * step_bytes, times lanes[i][c], for i < depth. Rows of `lanes` are
// `lanes_stride` apart.
template <typename Math, int kRows, int kCols>
inline void accumulate(const char* a, long long row_bytes, long long step_bytes, const float* lanes,
                       long long lanes_stride, long long depth, Vector (&acc)[kRows][kCols]) {
  for (long long i = 0; i < depth; ++i) {
    Vector broadcast[kRows];
    ATTNJIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      broadcast[r] = (Vector)(*(const Word*)(a + r * row_bytes + i * step_bytes) + UintVector{});
    }
    ATTNJIT_UNROLL
    for (int c = 0; c < kCols; ++c) {
      const Vector lane = load<Vector>(lanes + i * lanes_stride + c * kWidth);
      ATTNJIT_UNROLL
      for (int r = 0; r < kRows; ++r) Math::multiply_add(acc[r][c], broadcast[r], lane);
    }
  }
}

// scores[r][lane] = factor * sum over i < depth of the word i of row r times queries[i][lane].
template <typename Math, int kRows>
void qk_block(const char* k, long long row_bytes, long long depth, const float* queries, float factor, float* scores) {
  Vector acc[kRows][kColumns] = {};
  accumulate<Math>(k, row_bytes, 4, queries, kPanelLanes, depth, acc);
  ATTNJIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ATTNJIT_UNROLL
    for (int c = 0; c < kColumns; ++c) *(Vector*)(scores + r * kPanelLanes + c * kWidth) = acc[r][c] * factor;
  }
}

// The last rows, fewer than kRows + 1.
template <typename Math, int kRows>
void qk_rest(const char* k, long long row_bytes, long long rows, long long depth, const float* queries, float factor,
             float* scores) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      qk_block<Math, kRows>(k, row_bytes, depth, queries, factor, scores);
    } else {
      qk_rest<Math, kRows - 1>(k, row_bytes, rows, depth, queries, factor, scores);
    }
  }
}

template <typename Math>
void qk_rows(const char* k, long long row_bytes, long long rows, long long depth, const float* queries, float factor,
             float* scores) {
  for (int lane = 0; lane < kPanelLanes; lane += kGroup) {
    long long row = 0;
    for (; row + kBlock <= rows; row += kBlock) {
      qk_block<Math, kBlock>(k + row * row_bytes, row_bytes, depth, queries + lane, factor,
                             scores + row * kPanelLanes + lane);
    }
    qk_rest<Math, kBlock - 1>(k + row * row_bytes, row_bytes, rows - row, depth, queries + lane, factor,
                              scores + row * kPanelLanes + lane);
  }
}

// out[r][lane] = out[r][lane] * rescale[lane] + sum over rows of the word r of the row times weights[row][lane].
template <typename Math, int kRows>
void pv_block(const char* v, long long row_bytes, long long rows, const float* weights, const float* rescale,
              float* out) {
  Vector acc[kRows][kColumns];
  ATTNJIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ATTNJIT_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      acc[r][c] = *(const Vector*)(out + r * kPanelLanes + c * kWidth) * *(const Vector*)(rescale + c * kWidth);
    }
  }
  accumulate<Math>(v, 4, row_bytes, weights, kPanelLanes, rows, acc);
  ATTNJIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ATTNJIT_UNROLL
    for (int c = 0; c < kColumns; ++c) *(Vector*)(out + r * kPanelLanes + c * kWidth) = acc[r][c];
  }
}

template <typename Math, int kRows>
void pv_rest(const char* v, long long row_bytes, long long rows, long long width, const float* weights,
             const float* rescale, float* out) {
  if constexpr (kRows > 0) {
    if (width == kRows) {
      pv_block<Math, kRows>(v, row_bytes, rows, weights, rescale, out);
    } else {
      pv_rest<Math, kRows - 1>(v, row_bytes, rows, width, weights, rescale, out);
    }
  }
}

template <typename Math>
void pv_rows(const char* v, long long row_bytes, long long rows, long long width, const float* weights,
             const float* rescale, float* out) {
  for (int lane = 0; lane < kPanelLanes; lane += kGroup) {
    long long i = 0;
    for (; i + kBlock <= width; i += kBlock) {
      pv_block<Math, kBlock>(v + i * 4, row_bytes, rows, weights + lane, rescale + lane, out + i * kPanelLanes + lane);
    }
    pv_rest<Math, kBlock - 1>(v + i * 4, row_bytes, rows, width - i, weights + lane, rescale + lane,
                              out + i * kPanelLanes + lane);
  }
}

// out[r][i] += sum over the `depth` words of row r of weights times the rows of `in`.
template <typename Math, int kRows, int kCols>
void lanes_block(const float* in, long long in_stride, long long depth, const float* weights, float* out,
                 long long out_stride) {
  Vector acc[kRows][kCols];
  ATTNJIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ATTNJIT_UNROLL
    for (int c = 0; c < kCols; ++c) acc[r][c] = load<Vector>(out + r * out_stride + c * kWidth);
  }
  accumulate<Math>((const char*)weights, depth * 4, 4, in, in_stride, depth, acc);
  ATTNJIT_UNROLL
  for (int r = 0; r < kRows; ++r) {
    ATTNJIT_UNROLL
    for (int c = 0; c < kCols; ++c) store(out + r * out_stride + c * kWidth, acc[r][c]);
  }
}

template <typename Math, int kRows, int kCols>
void lanes_rest(const float* in, long long in_stride, long long depth, long long rows, const float* weights, float* out,
                long long out_stride) {
  if constexpr (kRows > 0) {
    if (rows == kRows) {
      lanes_block<Math, kRows, kCols>(in, in_stride, depth, weights, out, out_stride);
    } else {
      lanes_rest<Math, kRows - 1, kCols>(in, in_stride, depth, rows, weights, out, out_stride);
    }
  }
}

template <typename Math, int kCols>
void lanes_columns(const float* in, long long in_stride, long long depth, long long rows, const float* weights,
                   float* out, long long out_stride) {
  long long row = 0;
  for (; row + kBlock <= rows; row += kBlock) {
    lanes_block<Math, kBlock, kCols>(in, in_stride, depth, weights + row * depth, out + row * out_stride, out_stride);
  }
  lanes_rest<Math, kBlock - 1, kCols>(in, in_stride, depth, rows - row, weights + row * depth, out + row * out_stride,
                                      out_stride);
}

template <typename Math>
void lanes_rows(const float* in, long long in_stride, long long depth, long long rows, long long width,
                const float* weights, float* out, long long out_stride) {
  long long i = 0;
  for (; i + kGroup <= width; i += kGroup)
    lanes_columns<Math, kColumns>(in + i, in_stride, depth, rows, weights, out + i, out_stride);
  for (; i + kGroup / 2 <= width; i += kGroup / 2)
    lanes_columns<Math, kColumns / 2>(in + i, in_stride, depth, rows, weights, out + i, out_stride);
}

void add_lanes(const float* in, long long in_stride, long long rows, long long width, const float* weights, float* out,
               long long out_stride) {
  lanes_rows<Fp32>(in, in_stride, kPanelLanes, rows, width, weights, out, out_stride);
}

void qk(const float* k, long long k_stride, long long rows, long long depth, const float* queries, float factor,
        float* scores) {
  qk_rows<Fp32>((const char*)k, k_stride * 4, rows, depth, queries, factor, scores);
}

void pv(const float* v, long long v_stride, long long rows, long long width, const float* weights, const float* rescale,
        float* out) {
  pv_rows<Fp32>((const char*)v, v_stride * 4, rows, width, weights, rescale, out);
}

// ---- Conversions ----------------------------------------------------------------------------------------------------

inline Vector widen_bf16(HalfVector in) { return (Vector)(__builtin_convertvector(in, UintVector) << 16); }

// Bits as one of two by a comparison's lanes (all ones or all zeros).
inline UintVector choose(UintVector mask, UintVector yes, UintVector no) { return (mask & yes) | (~mask & no); }

// Nearest even; a NaN keeps its sign and the upper payload and becomes quiet.
inline HalfVector narrow_bf16(Vector in) {
  const UintVector bits = (UintVector)in;
  const UintVector rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const UintVector nan = (bits >> 16) | 0x40;
  return __builtin_convertvector(choose((UintVector)((bits & 0x7fffffff) > 0x7f800000), nan, rounded), HalfVector);
}

#ifdef __F16C__

typedef short EightHalves __attribute__((vector_size(16)));
typedef float EightFloats __attribute__((vector_size(32)));

// Clang knows the widening instruction as a plain conversion only, GCC as a builtin only.
inline EightFloats widen_eight(EightHalves in) {
#ifdef __clang__
  typedef _Float16 EightFloat16 __attribute__((vector_size(16)));
  return __builtin_convertvector((EightFloat16)in, EightFloats);
#else
  return __builtin_ia32_vcvtph2ps256(in);
#endif
}

inline Vector widen_f16(HalfVector in) {
  Vector out;
  ATTNJIT_UNROLL
  for (int i = 0; i < kWidth; i += 8) {
    const EightFloats part = widen_eight(load<EightHalves>((const char*)&in + i * 2));
    __builtin_memcpy((char*)&out + i * 4, &part, 32);
  }
  return out;
}

inline HalfVector narrow_f16(Vector in) {
  HalfVector out;
  ATTNJIT_UNROLL
  for (int i = 0; i < kWidth; i += 8) {
    const EightHalves part = __builtin_ia32_vcvtps2ph256(load<EightFloats>((const char*)&in + i * 4), 0);
    __builtin_memcpy((char*)&out + i * 2, &part, 16);
  }
  return out;
}

#else

inline Vector widen_f16(HalfVector in) {
  typedef int IntVector __attribute__((vector_size(kWidth * 4)));
  const UintVector bits = __builtin_convertvector(in, UintVector);
  const UintVector magnitude = bits & 0x7fff;
  const UintVector normal = (magnitude << 13) + (112u << 23);
  const UintVector special = (magnitude << 13) + (224u << 23);
  // Through an integer: the shifted bits would be a denormal, which the caller's mode may flush.
  const UintVector tiny = (UintVector)(__builtin_convertvector((IntVector)magnitude, Vector) * 0x1p-24f);
  UintVector out = choose((UintVector)(magnitude < 0x400), tiny, normal);
  out = choose((UintVector)(magnitude >= 0x7c00), special, out);
  return (Vector)(out | ((bits & 0x8000) << 16));
}

inline HalfVector narrow_f16(Vector in) {
  const UintVector bits = (UintVector)in;
  const UintVector magnitude = bits & 0x7fffffff;
  const UintVector normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
  // The sum's last place is the half's: 2^-24.
  const UintVector tiny = (UintVector)((Vector)magnitude + 0.5f) - 0x3f000000;
  UintVector out = choose((UintVector)(magnitude < 0x38800000), tiny, normal);
  out = choose((UintVector)(magnitude >= 0x477ff000), UintVector{} + 0x7c00, out);  // 65520 rounds to infinity
  out = choose((UintVector)(magnitude > 0x7f800000), 0x7e00 | ((magnitude >> 13) & 0x3ff), out);
  return __builtin_convertvector(out | ((bits >> 16) & 0x8000), HalfVector);
}

#endif

template <Storage kStorage>
inline Vector widen_one(HalfVector in) {
  return kStorage == Storage::kBF16 ? widen_bf16(in) : widen_f16(in);
}

template <Storage kStorage>
void widen_row(const unsigned short* in, long long width, float* out) {
  long long i = 0;
  for (; i + kWidth <= width; i += kWidth) store(out + i, widen_one<kStorage>(load<HalfVector>(in + i)));
  if (i < width) {
    HalfVector rest = {};
    __builtin_memcpy(&rest, in + i, (unsigned long)(width - i) * 2);
    const Vector wide = widen_one<kStorage>(rest);
    __builtin_memcpy(out + i, &wide, (unsigned long)(width - i) * 4);
  }
}

template <Storage kStorage>
void narrow_row(const float* in, long long width, unsigned short* out) {
  const auto narrow = [](Vector value) { return kStorage == Storage::kBF16 ? narrow_bf16(value) : narrow_f16(value); };
  long long i = 0;
  for (; i + kWidth <= width; i += kWidth) store(out + i, narrow(load<Vector>(in + i)));
  if (i < width) {
    Vector rest = {};
    __builtin_memcpy(&rest, in + i, (unsigned long)(width - i) * 4);
    const HalfVector half = narrow(rest);
    __builtin_memcpy(out + i, &half, (unsigned long)(width - i) * 2);
  }
}

void widen(const void* in, Storage storage, long long in_stride, long long rows, long long width, float* out,
           long long out_stride) {
  for (long long row = 0; row < rows; ++row) {
    switch (storage) {
      case Storage::kF32:
        __builtin_memcpy(out + row * out_stride, (const float*)in + row * in_stride, (unsigned long)width * 4);
        break;
      case Storage::kF16:
        widen_row<Storage::kF16>((const unsigned short*)in + row * in_stride, width, out + row * out_stride);
        break;
      case Storage::kBF16:
        widen_row<Storage::kBF16>((const unsigned short*)in + row * in_stride, width, out + row * out_stride);
        break;
    }
  }
}

// ---- Panels ---------------------------------------------------------------------------------------------------------

inline void transpose(Quad (&m)[4]) {
  const Quad a = __builtin_shufflevector(m[0], m[1], 0, 4, 1, 5);
  const Quad b = __builtin_shufflevector(m[2], m[3], 0, 4, 1, 5);
  const Quad c = __builtin_shufflevector(m[0], m[1], 2, 6, 3, 7);
  const Quad d = __builtin_shufflevector(m[2], m[3], 2, 6, 3, 7);
  m[0] = __builtin_shufflevector(a, b, 0, 1, 4, 5);
  m[1] = __builtin_shufflevector(a, b, 2, 3, 6, 7);
  m[2] = __builtin_shufflevector(c, d, 0, 1, 4, 5);
  m[3] = __builtin_shufflevector(c, d, 2, 3, 6, 7);
}

// Four rows as columns: panel[i][lane + r] = rows[r][i], every bit kept.
inline void store_columns(const float (&rows)[4][kMaxHeadDim], long long width, float* panel) {
  long long i = 0;
  for (; i + 4 <= width; i += 4) {
    Quad m[4];
    for (int r = 0; r < 4; ++r) m[r] = load<Quad>(rows[r] + i);
    transpose(m);
    for (int r = 0; r < 4; ++r) *(Quad*)(panel + (i + r) * kPanelLanes) = m[r];
  }
  for (; i < width; ++i) {
    for (int r = 0; r < 4; ++r) *(Word*)(panel + i * kPanelLanes + r) = *(const Word*)(rows[r] + i);
  }
}

void load_panel(const void* in, Storage storage, long long in_stride, long long lanes, long long width, float* panel) {
  const long long size = storage == Storage::kF32 ? 4 : 2;
  for (int lane = 0; lane < kPanelLanes; lane += 4) {
    alignas(16) float rows[4][kMaxHeadDim];
    for (int r = 0; r < 4; ++r) {
      if (lane + r < lanes) {
        widen((const char*)in + (lane + r) * in_stride * size, storage, 0, 1, width, rows[r], 0);
      } else {
        __builtin_memset(rows[r], 0, (unsigned long)width * 4);
      }
    }
    store_columns(rows, width, panel + lane);
  }
}

// One row of at most kMaxHeadDim, as `storage`.
void narrow_to(const float* in, long long width, void* out, Storage storage) {
  switch (storage) {
    case Storage::kF32:
      __builtin_memcpy(out, in, (unsigned long)width * 4);
      break;
    case Storage::kF16:
      narrow_row<Storage::kF16>(in, width, (unsigned short*)out);
      break;
    case Storage::kBF16:
      narrow_row<Storage::kBF16>(in, width, (unsigned short*)out);
      break;
  }
}

void narrow(const float* in, long long in_stride, float factor, long long rows, long long width, void* out,
            Storage storage, long long out_stride) {
  const long long size = storage == Storage::kF32 ? 4 : 2;
  for (long long row = 0; row < rows; ++row) {
    alignas(64) float scaled[kMaxHeadDim];
    for (long long i = 0; i < width; ++i) scaled[i] = in[row * in_stride + i] * factor;
    narrow_to(scaled, width, (char*)out + row * out_stride * size, storage);
  }
}

void store_panel(const float* panel, const float* factor, long long first, long long lanes, long long width, void* out,
                 Storage storage, long long out_stride) {
  const long long size = storage == Storage::kF32 ? 4 : 2;
  for (long long lane = first & ~3LL; lane < lanes; lane += 4) {
    alignas(16) float rows[4][kMaxHeadDim];
    const Quad scale = *(const Quad*)(factor + lane);
    long long i = 0;
    for (; i + 4 <= width; i += 4) {
      Quad m[4];
      for (int r = 0; r < 4; ++r) m[r] = *(const Quad*)(panel + (i + r) * kPanelLanes + lane) * scale;
      transpose(m);
      for (int r = 0; r < 4; ++r) *(Quad*)(rows[r] + i) = m[r];
    }
    for (; i < width; ++i) {
      for (int r = 0; r < 4; ++r) rows[r][i] = panel[i * kPanelLanes + lane + r] * scale[r];
    }
    for (int r = 0; r < 4; ++r) {
      const long long row = lane + r;
      if (row < first || row >= lanes) continue;
      narrow_to(rows[r], width, (char*)out + row * out_stride * size, storage);
    }
  }
}

// ---- Captured gradients ---------------------------------------------------------------------------------------------

void sum_rows(const float* panel, long long rows, float* sums) {
  for (int lane = 0; lane < kPanelLanes; lane += kGroup) {
    Vector acc[kColumns];
    for (int c = 0; c < kColumns; ++c) acc[c] = Vector{};
    for (long long row = 0; row < rows; ++row) {
      ATTNJIT_UNROLL
      for (int c = 0; c < kColumns; ++c) acc[c] += *(const Vector*)(panel + row * kPanelLanes + lane + c * kWidth);
    }
    for (int c = 0; c < kColumns; ++c) {
      float* const sum = sums + lane + c * kWidth;
      store(sum, load<Vector>(sum) + acc[c]);
    }
  }
}

void sum_lanes(const float* panel, long long rows, float* sums) {
  for (long long row = 0; row < rows; ++row) {
    Quad sum = {};
    ATTNJIT_UNROLL
    for (int lane = 0; lane < kPanelLanes; lane += 4) sum += *(const Quad*)(panel + row * kPanelLanes + lane);
    sums[row] += (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
}

// Each row is shifted by one lane against the one before: so is the window of the diagonals that it reaches, in memory
// that is taken four rows at a time, each row's in an array of its own. One array would be loaded before it is stored.
void sum_diagonals(const float* panel, long long rows, float* sums) {
  constexpr int kWays = 4;
  alignas(64) float parts[kWays][kTileRows + kPanelLanes] = {};
  for (long long row = 0; row < rows; ++row) {
    float* const window = parts[row % kWays] + (rows - 1 - row);
    ATTNJIT_UNROLL
    for (int lane = 0; lane < kPanelLanes; lane += kWidth) {
      const Vector sum = load<Vector>(window + lane) + *(const Vector*)(panel + row * kPanelLanes + lane);
      store(window + lane, sum);
    }
  }
  for (long long i = 0; i < rows + kPanelLanes - 1; ++i)
    sums[i] += (parts[0][i] + parts[1][i]) + (parts[2][i] + parts[3][i]);
}

// ---- Staged reads ---------------------------------------------------------------------------------------------------

template <Element kElement>
inline constexpr int kElementSize = kElement == Element::kF32 || kElement == Element::kInt32    ? 4
                                    : kElement == Element::kInt8 || kElement == Element::kUInt8 ? 1
                                                                                                : 2;

// kWidth elements, each as a word.
template <Element kElement>
inline Vector load_words(const void* in) {
  typedef short ShortVector __attribute__((vector_size(kWidth * 2)));
  typedef signed char ByteVector __attribute__((vector_size(kWidth)));
  typedef unsigned char UnsignedByteVector __attribute__((vector_size(kWidth)));
  typedef int IntVector __attribute__((vector_size(kWidth * 4)));
  if constexpr (kElement == Element::kF16) {
    return widen_f16(load<HalfVector>(in));
  } else if constexpr (kElement == Element::kBF16) {
    return widen_bf16(load<HalfVector>(in));
  } else if constexpr (kElement == Element::kInt16) {
    return (Vector) __builtin_convertvector(load<ShortVector>(in), IntVector);
  } else if constexpr (kElement == Element::kInt8) {
    return (Vector) __builtin_convertvector(load<ByteVector>(in), IntVector);
  } else if constexpr (kElement == Element::kUInt8) {
    return (Vector) __builtin_convertvector(load<UnsignedByteVector>(in), UintVector);
  } else {
    return load<Vector>(in);
  }
}

// The same words of every 128 bits of two vectors: of `a` from 0 on, of `b` from kWidth on.
#if ATTNJIT_VECTOR_WIDTH == 16
#define ATTNJIT_PICK(a, b, i, j, k, l)                                                                              \
  __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4, (i) + 8, (j) + 8, (k) + 8, (l) + 8, \
                          (i) + 12, (j) + 12, (k) + 12, (l) + 12)
#elif ATTNJIT_VECTOR_WIDTH == 8
#define ATTNJIT_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l, (i) + 4, (j) + 4, (k) + 4, (l) + 4)
#else
#define ATTNJIT_PICK(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#endif

// m[i][j] and m[j][i] change places. In 128-bit quarters first, whose shuffles are the cheap ones, then the quarters.
inline void transpose_square(Vector (&m)[kWidth]) {
  ATTNJIT_UNROLL
  for (int i = 0; i < kWidth; i += 4) {
    const Vector a = ATTNJIT_PICK(m[i], m[i + 1], 0, kWidth, 1, kWidth + 1);
    const Vector b = ATTNJIT_PICK(m[i + 2], m[i + 3], 0, kWidth, 1, kWidth + 1);
    const Vector c = ATTNJIT_PICK(m[i], m[i + 1], 2, kWidth + 2, 3, kWidth + 3);
    const Vector d = ATTNJIT_PICK(m[i + 2], m[i + 3], 2, kWidth + 2, 3, kWidth + 3);
    m[i] = ATTNJIT_PICK(a, b, 0, 1, kWidth, kWidth + 1);
    m[i + 1] = ATTNJIT_PICK(a, b, 2, 3, kWidth + 2, kWidth + 3);
    m[i + 2] = ATTNJIT_PICK(c, d, 0, 1, kWidth, kWidth + 1);
    m[i + 3] = ATTNJIT_PICK(c, d, 2, 3, kWidth + 2, kWidth + 3);
  }
#if ATTNJIT_VECTOR_WIDTH == 16
#define ATTNJIT_EVEN(a, b) __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27)
#define ATTNJIT_ODD(a, b) __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31)
  ATTNJIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vector a = ATTNJIT_EVEN(m[i], m[i + 4]), b = ATTNJIT_EVEN(m[i + 8], m[i + 12]);
    const Vector c = ATTNJIT_ODD(m[i], m[i + 4]), d = ATTNJIT_ODD(m[i + 8], m[i + 12]);
    m[i] = ATTNJIT_EVEN(a, b);
    m[i + 4] = ATTNJIT_EVEN(c, d);
    m[i + 8] = ATTNJIT_ODD(a, b);
    m[i + 12] = ATTNJIT_ODD(c, d);
  }
#undef ATTNJIT_EVEN
#undef ATTNJIT_ODD
#elif ATTNJIT_VECTOR_WIDTH == 8
  ATTNJIT_UNROLL
  for (int i = 0; i < 4; ++i) {
    const Vector a = m[i], b = m[i + 4];
    m[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11);
    m[i + 4] = __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15);
  }
#endif
}
#undef ATTNJIT_PICK

void unstage(const float* panel, long long rows, long long first, long long lanes, bool store_only,
             float* const* rows_of) {
  for (long long lane = first / kWidth * kWidth; lane < lanes; lane += kWidth) {
    for (long long row = 0; row < rows; row += kWidth) {
      Vector square[kWidth];
      for (int r = 0; r < kWidth; ++r)
        square[r] = row + r < rows ? *(const Vector*)(panel + (row + r) * kPanelLanes + lane) : Vector{};
      transpose_square(square);
      const long long count = rows - row < kWidth ? rows - row : kWidth;
      for (int r = 0; r < kWidth; ++r) {
        if (lane + r < first || lane + r >= lanes) continue;
        float* const out = rows_of[lane + r] + row;
        if (count == kWidth) {
          store(out, store_only ? square[r] : square[r] + load<Vector>(out));
        } else {
          for (long long i = 0; i < count; ++i) out[i] = store_only ? square[r][i] : out[i] + square[r][i];
        }
      }
    }
  }
}

// Whole squares: every cache line of a row is read once, however many rows fall into the same lines of the cache.
template <Element kElement>
void stage_rows(const void* const* addresses, long long rows, float* panel) {
  constexpr int kSize = kElementSize<kElement>;
  for (int lane = 0; lane < kPanelLanes; lane += kWidth) {
    long long row = 0;
    for (; row + kWidth <= rows; row += kWidth) {
      Vector square[kWidth];
      ATTNJIT_UNROLL
      for (int r = 0; r < kWidth; ++r) square[r] = load_words<kElement>((const char*)addresses[lane + r] + row * kSize);
      transpose_square(square);
      ATTNJIT_UNROLL
      for (int r = 0; r < kWidth; ++r) *(Vector*)(panel + (row + r) * kPanelLanes + lane) = square[r];
    }
    if (row < rows) {
      Vector square[kWidth];
      for (int r = 0; r < kWidth; ++r) {
        char rest[kWidth * kSize] = {};
        __builtin_memcpy(rest, (const char*)addresses[lane + r] + row * kSize, (unsigned long)((rows - row) * kSize));
        square[r] = load_words<kElement>(rest);
      }
      transpose_square(square);
      for (int r = 0; r < rows - row; ++r) *(Vector*)(panel + (row + r) * kPanelLanes + lane) = square[r];
    }
  }
}

void stage(const void* const* addresses, Element element, long long rows, void* panel) {
  float* const words = (float*)panel;
  switch (element) {
    case Element::kF32:
    case Element::kInt32:
      return stage_rows<Element::kF32>(addresses, rows, words);
    case Element::kF16:
      return stage_rows<Element::kF16>(addresses, rows, words);
    case Element::kBF16:
      return stage_rows<Element::kBF16>(addresses, rows, words);
    case Element::kInt16:
      return stage_rows<Element::kInt16>(addresses, rows, words);
    case Element::kInt8:
      return stage_rows<Element::kInt8>(addresses, rows, words);
    case Element::kUInt8:
      return stage_rows<Element::kUInt8>(addresses, rows, words);
  }
}

// ---- BF16 pairs -----------------------------------------------------------------------------------------------------

#ifdef __AVX512BF16__

void load_panel_bf16(const unsigned short* in, long long in_stride, long long lanes, long long width, float* panel) {
  for (int lane = 0; lane < kPanelLanes; lane += 4) {
    alignas(16) float rows[4][kMaxHeadDim];
    for (int r = 0; r < 4; ++r) {
      if (lane + r < lanes) {
        __builtin_memcpy(rows[r], in + (lane + r) * in_stride, (unsigned long)width * 2);
      } else {
        __builtin_memset(rows[r], 0, (unsigned long)width * 2);
      }
    }
    store_columns(rows, width / 2, panel + lane);
  }
}

void pair_rows_bf16(const unsigned short* in, long long in_stride, long long rows, long long width, float* out) {
  for (long long row = 0; row < rows; row += 2) {
    const unsigned short* const low = in + row * in_stride;
    const unsigned short* const high = low + in_stride;
    Word* const pairs = (Word*)out + row / 2 * width;
    const bool alone = row + 1 == rows;
    long long i = 0;
    for (; i + kWidth <= width; i += kWidth) {
      UintVector pair = __builtin_convertvector(load<HalfVector>(low + i), UintVector);
      if (!alone) pair |= __builtin_convertvector(load<HalfVector>(high + i), UintVector) << 16;
      store(pairs + i, pair);
    }
    for (; i < width; ++i) pairs[i] = low[i] | (alone ? 0u : (unsigned int)high[i] << 16);
  }
}

void qk_bf16(const unsigned short* k, long long k_stride, long long rows, long long depth, const float* queries,
             float factor, float* scores) {
  qk_rows<Bf16Pairs>((const char*)k, k_stride * 2, rows, depth / 2, queries, factor, scores);
}

typedef unsigned short Halves __attribute__((vector_size(64)));

// low's sixteen, then high's.
inline Halves round_both(Vector low, Vector high) {
  Halves both;
  asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
  return both;
}

// Rounds rows 2i and 2i + 1 to the pairs of row i, in place.
void pair_weights(float* weights, long long rows) {
  for (long long row = 0; row < rows; row += 2) {
    for (int c = 0; c < kPanelLanes; c += kWidth) {
      const Vector low = *(const Vector*)(weights + row * kPanelLanes + c);
      const Vector high = row + 1 < rows ? *(const Vector*)(weights + (row + 1) * kPanelLanes + c) : Vector{};
      const Halves both = round_both(low, high);
      const Halves pairs = __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      *(Vector*)(weights + row / 2 * kPanelLanes + c) = (Vector)pairs;
    }
  }
}

void pair_lanes_bf16(const float* weights, long long rows, float* pairs) {
  static_assert(kPanelLanes == 2 * kWidth);
  for (long long row = 0; row < rows; ++row) {
    const float* const lanes = weights + row * kPanelLanes;
    *(Vector*)(pairs + row * kWidth) = (Vector)round_both(*(const Vector*)lanes, *(const Vector*)(lanes + kWidth));
  }
}

void add_lanes_bf16(const float* in_pairs, long long in_stride, long long rows, long long width,
                    const float* weight_pairs, float* out, long long out_stride) {
  lanes_rows<Bf16Pairs>(in_pairs, in_stride, kPanelLanes / 2, rows, width, weight_pairs, out, out_stride);
}

void pv_bf16(const float* v_pairs, long long rows, long long width, float* weights, const float* rescale, float* out) {
  pair_weights(weights, rows);
  pv_rows<Bf16Pairs>((const char*)v_pairs, width * 4, (rows + 1) / 2, width, weights, rescale, out);
}

#endif

}  // namespace

extern const Products ATTNJIT_PRODUCTS;
const Products ATTNJIT_PRODUCTS = {
    .qk = qk,
    .pv = pv,
    .add_lanes = add_lanes,
    .widen = widen,
    .load_panel = load_panel,
    .store_panel = store_panel,
    .narrow = narrow,
    .sum_rows = sum_rows,
    .sum_lanes = sum_lanes,
    .sum_diagonals = sum_diagonals,
    .unstage = unstage,
    .stage = stage,
    .rows_at_once = kBlock,
#ifdef __AVX512BF16__
    .qk_bf16 = qk_bf16,
    .pv_bf16 = pv_bf16,
    .pair_rows_bf16 = pair_rows_bf16,
    .add_lanes_bf16 = add_lanes_bf16,
    .pair_lanes_bf16 = pair_lanes_bf16,
    .load_panel_bf16 = load_panel_bf16,
#endif
};

}  // namespace attnjit::cpu
