// The language's functions and captured reads on the device, where CUDA's own functions are not what the language asks
// for. Everything is total: no trap, no undefined result.
namespace attnjit::cuda {

inline constexpr float kMaxFloat = 3.402823466e38f;
inline constexpr float kInfinity = __builtin_bit_cast(float, 0x7f800000);
inline constexpr float kNan = __builtin_bit_cast(float, 0x7fffffff);

// ---- Integers: two's complement

__device__ __forceinline__ long long wrapping_add(long long a, long long b) {
  return static_cast<long long>(static_cast<unsigned long long>(a) + static_cast<unsigned long long>(b));
}
__device__ __forceinline__ long long wrapping_sub(long long a, long long b) {
  return static_cast<long long>(static_cast<unsigned long long>(a) - static_cast<unsigned long long>(b));
}
__device__ __forceinline__ long long wrapping_mul(long long a, long long b) {
  return static_cast<long long>(static_cast<unsigned long long>(a) * static_cast<unsigned long long>(b));
}
// base ** exponent for exponents too large to write the products out.
__device__ __forceinline__ long long wrapping_pow(long long base, long long exponent) {
  unsigned long long result = 1;
  unsigned long long square = static_cast<unsigned long long>(base);
  for (unsigned long long rest = static_cast<unsigned long long>(exponent); rest != 0; rest >>= 1) {
    if (rest & 1) result *= square;
    square *= square;
  }
  return static_cast<long long>(result);
}

// A divisor without a trap, and whether it stands for one: 0, or -1, under which the smallest integer overflows.
template <typename T>
struct Divisor {
  T safe;
  bool is_zero;
  bool is_minus_one;
};
template <typename T>
__device__ __forceinline__ Divisor<T> divisor(T b) {
  return {b == 0 || b == -1 ? T{1} : b, b == 0, b == -1};
}
// Rounded down; a // 0 is 0 and the smallest integer // -1 wraps.
template <typename T>
__device__ __forceinline__ T floor_div_of(T a, T b) {
  const Divisor<T> by = divisor(b);
  const T quotient = a / by.safe;
  const T rest = a - quotient * by.safe;
  const T floored = quotient - (rest != 0 && (rest < 0) != (by.safe < 0) ? 1 : 0);
  const T result = by.is_minus_one ? static_cast<T>(wrapping_sub(0, a)) : floored;
  return by.is_zero ? 0 : result;
}
// What floor_div leaves, with the divisor's sign; a % 0 is 0.
template <typename T>
__device__ __forceinline__ T floor_mod_of(T a, T b) {
  const Divisor<T> by = divisor(b);
  const T rest = a % by.safe;
  return rest != 0 && (rest < 0) != (by.safe < 0) ? rest + by.safe : rest;
}
__device__ __forceinline__ int floor_div(int a, int b) { return floor_div_of<int>(a, b); }
__device__ __forceinline__ int floor_mod(int a, int b) { return floor_mod_of<int>(a, b); }
__device__ __forceinline__ long long floor_div(long long a, long long b) { return floor_div_of<long long>(a, b); }
__device__ __forceinline__ long long floor_mod(long long a, long long b) { return floor_mod_of<long long>(a, b); }

// The largest n for which 2^n is not above x; 0 where x is below 1.
__device__ __forceinline__ int floor_log2(int x) { return 31 - __clz(max(x, 1)); }

// Truncates and saturates; NaN gives 0, which the conversion alone does not.
__device__ __forceinline__ long long to_int(float x) { return x == x ? __float2ll_rz(x) : 0; }

// ---- Floats

// x / c for a literal c far from float's ends, with reciprocal = 1 / c: rounded like the division (Markstein's step).
__device__ __forceinline__ float divide_by(float x, float c, float reciprocal) {
  const float quotient = x * reciprocal;
  const float corrected = fmaf(fmaf(-quotient, c, x), reciprocal, quotient);
  return fabsf(quotient) <= kMaxFloat ? corrected : quotient;
}

// x/2 * erfc(-x / sqrt(2)).
__device__ __forceinline__ float gelu(float x) { return x * normcdff(x); }

__device__ __forceinline__ float exp_approx(float x) { return exp2_approx(x * 1.44269504f); }
__device__ __forceinline__ float log_approx(float x) { return log2_approx(x) * 0.693147181f; }

// Within 2^-21, near 0, too: for float16, which sees the 2^-11 of tanh_approx.
__device__ __forceinline__ float tanh_by_exp2(float x) {
  return fmaf(-2.0f, reciprocal_approx(exp2_approx(x * 2.88539008f) + 1.0f), 1.0f);
}

// ---- Captured reads

struct Float16 {};
struct BFloat16 {};

// What an element is loaded as, and the value that the language sees.
template <typename T>
struct Stored;
template <>
struct Stored<bool> {
  using Bits = unsigned char;
  static __device__ __forceinline__ bool widen(Bits bits) { return bits != 0; }
};
template <>
struct Stored<signed char> {
  using Bits = unsigned char;
  static __device__ __forceinline__ int widen(Bits bits) { return static_cast<signed char>(bits); }
};
template <>
struct Stored<unsigned char> {
  using Bits = unsigned char;
  static __device__ __forceinline__ int widen(Bits bits) { return bits; }
};
template <>
struct Stored<short> {
  using Bits = unsigned short;
  static __device__ __forceinline__ int widen(Bits bits) { return static_cast<short>(bits); }
};
template <>
struct Stored<int> {
  using Bits = unsigned;
  static __device__ __forceinline__ int widen(Bits bits) { return static_cast<int>(bits); }
};
template <>
struct Stored<long long> {
  using Bits = unsigned long long;
  static __device__ __forceinline__ long long widen(Bits bits) { return static_cast<long long>(bits); }
};
template <>
struct Stored<Float16> {
  using Bits = unsigned short;
  static __device__ __forceinline__ float widen(Bits bits) { return widen_f16(bits); }
};
template <>
struct Stored<BFloat16> {
  using Bits = unsigned short;
  static __device__ __forceinline__ float widen(Bits bits) { return __uint_as_float(unsigned{bits} << 16); }
};
template <>
struct Stored<float> {
  using Bits = unsigned;
  static __device__ __forceinline__ float widen(Bits bits) { return __uint_as_float(bits); }
};

// In units of log2. What is finite stays so: beyond float's range 0 times it would be NaN.
__device__ __forceinline__ float in_log2(float x) {
  const float y = x * 1.44269504f;
  return fabsf(x) <= kMaxFloat && fabsf(y) > kMaxFloat ? copysignf(kMaxFloat, y) : y;
}

// The element at `offset`, counted in elements. Captured tensors do not change while a kernel runs.
template <typename T, typename Offset>
__device__ __forceinline__ auto load(const CapturedView& view, Offset offset) {
  return Stored<T>::widen(__ldg(static_cast<const typename Stored<T>::Bits*>(view.data) + offset));
}
// A scalar, from device memory or from the parameters.
template <typename T>
__device__ __forceinline__ auto load(const CapturedView& view) {
  using Bits = typename Stored<T>::Bits;
  return Stored<T>::widen(view.data ? __ldg(static_cast<const Bits*>(view.data)) : static_cast<Bits>(view.value));
}
// An index brought into [0, extent).
__device__ __forceinline__ int clamped(int index, int extent) { return max(min(index, extent - 1), 0); }
__device__ __forceinline__ int clamped(long long index, int extent) {
  return static_cast<int>(max(min(index, extent - 1ll), 0ll));
}
// For tensors whose every offset fits in 32 bits.
template <typename View>
__device__ __forceinline__ int stride32(const View& view, int dimension) {
  return static_cast<int>(view.stride[dimension]);
}

}  // namespace attnjit::cuda
