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

// acc[r][c] += the word at a + r * row_bytes + i * step_bytes, times lanes[i][c], for i < depth.
template <typename Math, int kRows>
inline void accumulate(const char* a, long long row_bytes, long long step_bytes, const float* lanes, long long depth,
                       Vector (&acc)[kRows][kColumns]) {
  for (long long i = 0; i < depth; ++i) {
    Vector broadcast[kRows];
    ATTNJIT_UNROLL
    for (int r = 0; r < kRows; ++r) {
      broadcast[r] = (Vector)(*(const Word*)(a + r * row_bytes + i * step_bytes) + UintVector{});
    }
    ATTNJIT_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const Vector lane = *(const Vector*)(lanes + i * kPanelLanes + c * kWidth);
      ATTNJIT_UNROLL
      for (int r = 0; r < kRows; ++r) Math::multiply_add(acc[r][c], broadcast[r], lane);
    }
  }
}

// scores[r][lane] = factor * sum over i < depth of the word i of row r times queries[i][lane].
template <typename Math, int kRows>
void qk_block(const char* k, long long row_bytes, long long depth, const float* queries, float factor, float* scores) {
  Vector acc[kRows][kColumns] = {};
  accumulate<Math, kRows>(k, row_bytes, 4, queries, depth, acc);
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
  accumulate<Math, kRows>(v, 4, row_bytes, weights, rows, acc);
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
inline void store_columns(const float* const (&rows)[4], long long width, float* panel) {
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

inline void store_columns(const float (&rows)[4][kMaxHeadDim], long long width, float* panel) {
  const float* const starts[4] = {rows[0], rows[1], rows[2], rows[3]};
  store_columns(starts, width, panel);
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

void store_panel(const float* panel, const float* factor, long long first, long long lanes, long long width, void* out,
                 Storage storage, long long out_stride) {
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
      switch (storage) {
        case Storage::kF32:
          __builtin_memcpy((float*)out + row * out_stride, rows[r], (unsigned long)width * 4);
          break;
        case Storage::kF16:
          narrow_row<Storage::kF16>(rows[r], width, (unsigned short*)out + row * out_stride);
          break;
        case Storage::kBF16:
          narrow_row<Storage::kBF16>(rows[r], width, (unsigned short*)out + row * out_stride);
          break;
      }
    }
  }
}

template <typename T>
void widen_integers(const void* in, long long width, void* out) {
  const T* const from = (const T*)in;
  Word* const to = (Word*)out;
  for (long long i = 0; i < width; ++i) to[i] = (unsigned int)(int)from[i];
}

void stage(const void* const* addresses, Element element, long long rows, void* panel) {
  for (int lane = 0; lane < kPanelLanes; lane += 4) {
    alignas(64) float wide[4][kMaxHeadDim];
    const float* columns[4];
    for (int r = 0; r < 4; ++r) {
      const void* const in = addresses[lane + r];
      columns[r] = wide[r];
      switch (element) {
        case Element::kF32:
        case Element::kInt32:
          columns[r] = (const float*)in;
          break;
        case Element::kF16:
          widen_row<Storage::kF16>((const unsigned short*)in, rows, wide[r]);
          break;
        case Element::kBF16:
          widen_row<Storage::kBF16>((const unsigned short*)in, rows, wide[r]);
          break;
        case Element::kInt16:
          widen_integers<short>(in, rows, wide[r]);
          break;
        case Element::kInt8:
          widen_integers<signed char>(in, rows, wide[r]);
          break;
        case Element::kUInt8:
          widen_integers<unsigned char>(in, rows, wide[r]);
          break;
      }
    }
    store_columns(columns, rows, (float*)panel + lane);
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

// Rounds rows 2i and 2i + 1 to the pairs of row i, in place.
void pair_weights(float* weights, long long rows) {
  typedef unsigned short Halves __attribute__((vector_size(64)));
  for (long long row = 0; row < rows; row += 2) {
    for (int c = 0; c < kPanelLanes; c += kWidth) {
      const Vector low = *(const Vector*)(weights + row * kPanelLanes + c);
      const Vector high = row + 1 < rows ? *(const Vector*)(weights + (row + 1) * kPanelLanes + c) : Vector{};
      Halves both;  // low's sixteen, then high's
      asm("vcvtne2ps2bf16 %2, %1, %0" : "=v"(both) : "v"(high), "v"(low));
      const Halves pairs = __builtin_shufflevector(both, both, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,
                                                   8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
      *(Vector*)(weights + row / 2 * kPanelLanes + c) = (Vector)pairs;
    }
  }
}

void pv_bf16(const float* v_pairs, long long rows, long long width, float* weights, const float* rescale, float* out) {
  pair_weights(weights, rows);
  pv_rows<Bf16Pairs>((const char*)v_pairs, width * 4, (rows + 1) / 2, width, weights, rescale, out);
}

#endif

}  // namespace

extern const Products ATTNJIT_PRODUCTS;
const Products ATTNJIT_PRODUCTS = {qk,      pv,      widen,          load_panel,     store_panel, stage,
#ifdef __AVX512BF16__
                                   qk_bf16, pv_bf16, pair_rows_bf16, load_panel_bf16
#endif
};

}  // namespace attnjit::cpu
