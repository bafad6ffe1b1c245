// How gradients of captured tensors are added up: in floats, or, where two runs have to give the same bits, in
// accumulators whose sum does not depend on the order of the additions.
//
// An accumulator is the exact sum in fixed point, from 2^-149 on, in 9 digits of 32 bits. Each digit is a signed 64-bit
// word of its own: an addition touches the two that the float's mantissa spans, carries nothing, and so is two integer
// atomics. There is room for 2^31 additions. The last word notes what is not finite.
namespace attnjit::cuda {

inline constexpr int kAccumulatorDigits = kAccumulatorWords - 1;
inline constexpr unsigned long long kHasNan = 1, kHasPlusInfinity = 2, kHasMinusInfinity = 4;

__device__ __forceinline__ void accumulate(unsigned long long* accumulator, float value) {
  const unsigned bits = __float_as_uint(value);
  const bool negative = (bits >> 31) != 0;
  const unsigned exponent = bits >> 23 & 0xffu;
  const unsigned fraction = bits & 0x7fffffu;
  if (exponent == 0xffu) {
    atomicOr(accumulator + kAccumulatorDigits, fraction != 0 ? kHasNan
                                               : negative    ? kHasMinusInfinity
                                                             : kHasPlusInfinity);
    return;
  }
  const unsigned shift = exponent == 0 ? 0 : exponent - 1;
  const unsigned long long mantissa = exponent == 0 ? fraction : fraction | 0x800000u;
  const unsigned long long placed = mantissa << shift % 32;
  const unsigned long long low = placed & 0xffffffffu, high = placed >> 32;
  unsigned long long* const digit = accumulator + shift / 32;
  if (low != 0) atomicAdd(digit, negative ? 0 - low : low);
  if (high != 0) atomicAdd(digit + 1, negative ? 0 - high : high);
}

// The sum, rounded once.
__device__ __forceinline__ float accumulated(const unsigned long long* accumulator) {
  const unsigned long long special = accumulator[kAccumulatorDigits];
  if (special != 0) {
    const unsigned quiet_nan = 0x7fffffffu, infinity = 0x7f800000u, sign = 0x80000000u;
    return __uint_as_float(special == kHasPlusInfinity    ? infinity
                           : special == kHasMinusInfinity ? infinity | sign
                                                          : quiet_nan);
  }
  unsigned digit[kAccumulatorDigits];
  long long carry = 0;
#pragma unroll
  for (int i = 0; i < kAccumulatorDigits; ++i) {
    carry += static_cast<long long>(accumulator[i]);
    digit[i] = static_cast<unsigned>(carry);
    carry >>= 32;
  }
  // The magnitude: two's complement, digit by digit.
  const bool negative = carry < 0;
  if (negative) {
    unsigned long long borrow = 1;
#pragma unroll
    for (int i = 0; i < kAccumulatorDigits; ++i) {
      borrow += static_cast<unsigned>(~digit[i]);
      digit[i] = static_cast<unsigned>(borrow);
      borrow >>= 32;
    }
    carry = ~carry + static_cast<long long>(borrow);
  }
  // The first digit that is not 0, the one below it, and whether anything follows.
  int first = -1;
  unsigned high = 0, low = 0;
  bool more = false;
#pragma unroll
  for (int i = kAccumulatorDigits - 1; i >= 0; --i) {
    if (first < 0) {
      if (digit[i] != 0) first = i;
      high = digit[i];
    } else if (first == i + 1) {
      low = digit[i];
    } else {
      more = more || digit[i] != 0;
    }
  }
  const unsigned sign = negative ? 0x80000000u : 0;
  if (first < 0 && carry == 0) return 0.0f;
  const int zeros = __clz(static_cast<int>(high));
  const int last = 32 * first + 31 - zeros - 23;  // the place of a 24-bit mantissa's last bit, in units of 2^-149
  if (carry != 0 || last > 253) return __uint_as_float(0x7f800000u | sign);
  if (last <= 0) return __uint_as_float(high | sign);  // subnormal, or the smallest exponent: exact
  const unsigned long long window = (static_cast<unsigned long long>(high) << 32 | low) << zeros;
  const unsigned mantissa = static_cast<unsigned>(window >> 40);
  const unsigned long long rest = window & 0xffffffffffull, half = 0x8000000000ull;
  const bool up = rest > half || (rest == half && (more || (mantissa & 1) != 0));
  // Rounded up to the next power of two, or to infinity, the mantissa's carry is the exponent's.
  return __uint_as_float(((static_cast<unsigned>(last) << 23) + mantissa + (up ? 1 : 0)) | sign);
}

// Adds to the element at `offset`.
template <bool kDeterministic, typename Offset>
__device__ __forceinline__ void add_gradient(const GradientView& view, Offset offset, float value) {
  if (value == 0.0f) return;
  if constexpr (kDeterministic) {
    accumulate(static_cast<unsigned long long*>(view.data) + static_cast<long long>(offset) * kAccumulatorWords, value);
  } else {
    atomicAdd(static_cast<float*>(view.data) + offset, value);
  }
}

// What an injective sink does in its place.
template <typename Offset>
__device__ __forceinline__ void store_gradient(const GradientView& view, Offset offset, float value) {
  if (value != 0.0f) static_cast<float*>(view.data)[offset] = value;
}

}  // namespace attnjit::cuda
