// The language's functions in single precision, for code that the loop vectoriser widens: straight-line, no calls, no
// branches, tables only where nothing else serves. Linked with a compiled mod and inlined. NaN stays NaN everywhere,
// infinities and zeros give what C's functions give. docs/compiler.md holds the measured errors.
//
// Contraction to FMA is on; nothing below needs a product to be rounded on its own.

#define ATTNJIT_FUNCTION extern "C" __attribute__((always_inline))

namespace {

typedef unsigned long long uint64;

inline int bits_of(float x) { return __builtin_bit_cast(int, x); }
inline float float_of(int bits) { return __builtin_bit_cast(float, bits); }

constexpr float kInfinity = __builtin_inff();
constexpr float kNan = __builtin_nanf("");
constexpr float kLn2 = 0.693147180559945f;
constexpr float kLog2E = 1.44269504088896f;
// ln 2 in two parts: the high one times any exponent is exact.
constexpr float kLn2High = 0.693359375f;
constexpr float kLn2Low = -2.12194440e-4f;
// Added to a small float it leaves the nearest integer in the low bits.
constexpr float kRoundingMagic = 12582912.0f;

// e^r for |r| <= ln(2)/2 (Cephes' expf).
inline float exp_reduced(float r) {
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

// x * 2^n for n in [-160, 160], in two steps: one power of two cannot reach the ends.
inline float scale_by_power(float x, int n) {
  const int half = n >> 1;
  return x * float_of((half + 127) << 23) * float_of((n - half + 127) << 23);
}

// e^(x + tail), tail small against x.
inline float exp_of_sum(float x, float tail) {
  const float biased = x * kLog2E + kRoundingMagic;
  const float n = biased - kRoundingMagic;
  float r = x - n * kLn2High;
  r = r - n * kLn2Low;
  const float y = scale_by_power(exp_reduced(r + tail), bits_of(biased) - bits_of(kRoundingMagic));
  const float high = x > 88.7228394f ? kInfinity : y;
  return x < -103.9720840f ? 0.0f : high;
}

// x = 2^exponent * (1 + z), 1 + z in [sqrt(1/2), sqrt(2)), for positive x.
struct Split {
  float exponent;
  float z;
};
inline Split split(float x) {
  const bool tiny = x < 1.17549435e-38f;
  const float normal = x * 8388608.0f;
  const int bits = bits_of(tiny ? normal : x);
  const int exponent = (bits - 0x3f3504f3) >> 23;
  const float mantissa = float_of(bits - (exponent << 23));
  return {static_cast<float>(tiny ? exponent - 23 : exponent), mantissa - 1.0f};
}

// log(1 + z) - z + z^2/2 for the z of `split` (Cephes' logf).
inline float log_rest(float z) {
  float p = 7.0376836292e-2f;
  p = p * z - 1.1514610310e-1f;
  p = p * z + 1.1676998740e-1f;
  p = p * z - 1.2420140846e-1f;
  p = p * z + 1.4249322787e-1f;
  p = p * z - 1.6668057665e-1f;
  p = p * z + 2.0000714765e-1f;
  p = p * z - 2.4999993993e-1f;
  p = p * z + 3.3333331174e-1f;
  return p * z * (z * z);
}

// What a logarithm is outside the positive finite numbers.
inline float log_edges(float x, float y) {
  const float finite = x == kInfinity ? kInfinity : y;
  const float zero = x == 0.0f ? -kInfinity : finite;
  return x >= 0.0f ? zero : kNan;
}

// 32-bit windows of the bits of 4/pi, one per byte of the exponent; see reduce_large.
constexpr unsigned kFourOverPi[24] = {0xa2,       0xa2f9,     0xa2f983,   0xa2f9836e, 0xf9836e4e, 0x836e4e44,
                                      0x6e4e4415, 0x4e441529, 0x441529fc, 0x1529fc27, 0x29fc2757, 0xfc2757d1,
                                      0x2757d1f5, 0x57d1f534, 0xd1f534dd, 0xf534ddc0, 0x34ddc0db, 0xddc0db62,
                                      0xc0db6295, 0xdb629599, 0x6295993c, 0x95993c43, 0x993c4390, 0x3c439041};

// x = quadrant * pi/2 + r, |r| <= pi/4 (a little more at the ends).
struct Angle {
  int quadrant;
  float r;
};

// Any finite float ("Radian reduction for trigonometric functions", 1983): the 24 bits of the mantissa times the 96
// bits of 4/pi that matter.
inline Angle reduce_large(float x) {
  const unsigned bits = __builtin_bit_cast(unsigned, x);
  const unsigned* const window = kFourOverPi + ((bits >> 26) & 15);
  const unsigned mantissa = ((bits & 0xffffff) | 0x800000) << ((bits >> 23) & 7);
  const uint64 high = static_cast<uint64>(mantissa * window[0]) << 32;
  const uint64 middle = static_cast<uint64>(mantissa) * window[4];
  const uint64 low = static_cast<uint64>(mantissa) * window[8];
  const uint64 product = (high | (low >> 32)) + middle;
  const uint64 quadrant = (product + (1ull << 61)) >> 62;
  const long long rest = static_cast<long long>(product - (quadrant << 62));
  const float r = static_cast<float>(static_cast<double>(rest) * 0x1.921fb54442d18p-62);
  const bool negative = bits >> 31;
  return {negative ? -static_cast<int>(quadrant) : static_cast<int>(quadrant), negative ? -r : r};
}

inline Angle reduce(float x) {
  // Exact products of pi/2's first 33 bits with the quadrant; double carries the rest.
  const double magic = 6755399441055744.0;
  const double biased = x * 0.63661977236758134308 + magic;
  const double n = biased - magic;
  const double r = (x - n * 1.57079632673412561417e+00) - n * 6.07710050650619224932e-11;
  const int quadrant = static_cast<int>(__builtin_bit_cast(uint64, biased));
  const Angle large = reduce_large(x);
  const bool is_large = __builtin_fabsf(x) > 65536.0f;
  return {is_large ? large.quadrant : quadrant, is_large ? large.r : static_cast<float>(r)};
}

// sin(r + quadrant * pi/2) (Cephes' sinf and cosf on the reduced angle).
inline float sine_of(Angle angle) {
  const float r = angle.r, z = r * r;
  const float sine = ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z - 1.6666654611e-1f) * z * r + r;
  const float cosine =
      ((2.443315711809948e-5f * z - 1.388731625493765e-3f) * z + 4.166664568298827e-2f) * (z * z) - 0.5f * z + 1.0f;
  const float value = angle.quadrant & 1 ? cosine : sine;
  return angle.quadrant & 2 ? -value : value;
}

inline float nan_unless_finite(float x, float y) { return __builtin_fabsf(x) < kInfinity ? y : kNan; }

}  // namespace

ATTNJIT_FUNCTION float attnjit_exp(float x) { return exp_of_sum(x, 0.0f); }

ATTNJIT_FUNCTION float attnjit_exp2(float x) {
  const float biased = x + kRoundingMagic;
  const float r = (x - (biased - kRoundingMagic)) * kLn2;
  const float y = scale_by_power(exp_reduced(r), bits_of(biased) - bits_of(kRoundingMagic));
  const float high = x >= 128.0f ? kInfinity : y;
  return x < -150.0f ? 0.0f : high;
}

ATTNJIT_FUNCTION float attnjit_log(float x) {
  const Split s = split(x);
  const float rest = log_rest(s.z) + s.exponent * kLn2Low;
  return log_edges(x, s.exponent * kLn2High + (s.z + (rest - 0.5f * (s.z * s.z))));
}

ATTNJIT_FUNCTION float attnjit_log2(float x) {
  const Split s = split(x);
  const float y = log_rest(s.z) - 0.5f * (s.z * s.z);
  // log2(e) is 1 + 0.4427: the large part of the product stays exact.
  return log_edges(x, s.exponent + (s.z + (y + (s.z + y) * 0.44269504088896f)));
}

// log(u) for the rounded u = 1 + x, corrected by what the rounding lost.
ATTNJIT_FUNCTION float attnjit_log1p(float x) {
  const float u = 1.0f + x;
  const float lost = x - (u - 1.0f);
  const float y = attnjit_log(u);
  const float corrected = y + lost / u;
  const bool plain = u == 0.0f || u == kInfinity;
  return plain ? y : corrected;
}

// Odd, 9 over 8, fitted for the least relative error up to 8 (7e-9 before rounding).
ATTNJIT_FUNCTION float attnjit_tanh(float x) {
  // Where the quotient rounds to 1, with FMA and without: infinity gives 1, and nothing gives more.
  const float limit = 7.97838449f;
  const float low = x < -limit ? -limit : x;
  const float c = low > limit ? limit : low;
  const float z = c * c;
  float p = 1.523033149e-8f;
  p = p * z + 2.189460075e-5f;
  p = p * z + 3.571594330e-3f;
  p = p * z + 0.1344449487f;
  p = p * z + 1.0f;
  float q = 8.522411674e-7f;
  q = q * z + 3.411285961e-4f;
  q = q * z + 2.616442889e-2f;
  q = q * z + 0.4677782219f;
  q = q * z + 1.0f;
  return c * p / q;
}

// Two ranges; the upper one is 1 - e^(a polynomial).
ATTNJIT_FUNCTION float attnjit_erf(float x) {
  const float t = __builtin_fabsf(x), s = x * x;
  float r = -1.72853470e-5f * t + 3.83197126e-4f;
  const float u = -3.88396438e-3f * t + 2.42546219e-2f;
  r = r * s + u;
  r = r * t - 1.06777877e-1f;
  r = r * t - 6.34846687e-1f;
  r = r * t - 1.28717512e-1f;
  r = r * t - t;
  const float large = __builtin_copysignf(1.0f - attnjit_exp(r), x);
  float p = -5.96761703e-4f;
  p = p * s + 4.99119423e-3f;
  p = p * s - 2.67681349e-2f;
  p = p * s + 1.12819925e-1f;
  p = p * s - 3.76125336e-1f;
  p = p * s + 1.28379166e-1f;
  const float small = p * x + x;
  return t > 0.927734375f ? large : small;
}

// x/2 * erfc(-x/sqrt(2)): the form with 1 + erf cancels for negative x. erfc(z) is t * e^(-z^2 + a polynomial in t),
// t = 1/(1 + z/2) ("Numerical Recipes", erfcc); z^2 = x^2/2 is taken in two parts, from the unrounded x.
ATTNJIT_FUNCTION float attnjit_gelu(float x) {
  const float magnitude = __builtin_fabsf(x);
  const float m = magnitude > 20.0f ? 20.0f : magnitude;
  const float t = 1.0f / (m * 0.35355339059f + 1.0f);
  float p = 0.17087277f;
  p = p * t - 0.82215223f;
  p = p * t + 1.48851587f;
  p = p * t - 1.13520398f;
  p = p * t + 0.27886807f;
  p = p * t - 0.18628806f;
  p = p * t + 0.09678418f;
  p = p * t + 0.37409196f;
  p = p * t + 1.00002368f;
  p = p * t - 1.26551223f;
  const float high = float_of(bits_of(m) & ~0xfff);
  const float square = -0.5f * (high * high);
  const float tail = p - 0.5f * ((m - high) * (m + high));
  const float sum = square + tail;
  const float lost = (square - sum) + tail;
  const float y = t * exp_of_sum(sum, lost);
  return x * 0.5f * (x < 0.0f ? y : 2.0f - y);
}

ATTNJIT_FUNCTION float attnjit_sin(float x) { return nan_unless_finite(x, sine_of(reduce(x))); }

ATTNJIT_FUNCTION float attnjit_cos(float x) {
  Angle angle = reduce(x);
  angle.quadrant += 1;
  return nan_unless_finite(x, sine_of(angle));
}

// 2^(y log2|x|) in double, whose 53 bits leave the result's 24 right over the whole range.
ATTNJIT_FUNCTION float attnjit_pow(float x, float y) {
  const float magnitude = __builtin_fabsf(x);
  const Split s = split(magnitude);
  const double z = s.z;
  const double t = z / (2.0 + z), t2 = t * t;
  // 2/ln(2) * atanh(t), |t| < 0.172.
  double p = 2.8853900817779268 / 15.0;
  p = p * t2 + 2.8853900817779268 / 13.0;
  p = p * t2 + 2.8853900817779268 / 11.0;
  p = p * t2 + 2.8853900817779268 / 9.0;
  p = p * t2 + 2.8853900817779268 / 7.0;
  p = p * t2 + 2.8853900817779268 / 5.0;
  p = p * t2 + 2.8853900817779268 / 3.0;
  p = p * t2 + 2.8853900817779268;
  const double log2_finite = s.exponent + t * p;
  const double log2_zero = magnitude == 0.0f ? -static_cast<double>(kInfinity) : log2_finite;
  const double log2 = magnitude == kInfinity ? static_cast<double>(kInfinity) : log2_zero;
  const double product = log2 * y;
  const double low = product < -160.0 ? -160.0 : product;
  const double e = low > 160.0 ? 160.0 : low;
  const double magic = 6755399441055744.0;
  const double biased = e + magic;
  const double r = (e - (biased - magic)) * 0.69314718055994530942;
  double q = 1.0 / 362880.0;
  q = q * r + 1.0 / 40320.0;
  q = q * r + 1.0 / 5040.0;
  q = q * r + 1.0 / 720.0;
  q = q * r + 1.0 / 120.0;
  q = q * r + 1.0 / 24.0;
  q = q * r + 1.0 / 6.0;
  q = q * r + 0.5;
  q = q * r + 1.0;
  q = q * r + 1.0;
  const uint64 power = (__builtin_bit_cast(uint64, biased) + 1023) << 52;
  const float value = static_cast<float>(q * __builtin_bit_cast(double, power));
  // Signs and what C says of 1 and of exponent 0.
  const float y_magnitude = __builtin_fabsf(y);
  const bool small = y_magnitude < 16777216.0f;
  const int integer = static_cast<int>(small ? y : 0.0f);
  const bool is_integer = !small | (static_cast<float>(integer) == y);
  const bool odd = small & ((integer & 1) != 0);
  const float signed_value = odd ? -value : value;
  // -inf has a power of its own for every exponent, other negative bases for integers only.
  const float negative = is_integer || magnitude == kInfinity ? signed_value : kNan;
  const float any_sign = x < 0.0f ? negative : value;
  const float with_nan = __builtin_isunordered(x, y) ? kNan : any_sign;
  const bool one = (x == 1.0f) | (y == 0.0f) | ((x == -1.0f) & (y_magnitude == kInfinity));
  return one ? 1.0f : with_nan;
}

// For exponents too large to write the products out. A call with a loop, so a mod that has one is not widened, unless
// its base is the same for all elements of a loop.
extern "C" long long attnjit_ipowi(long long base, long long exponent) {
  uint64 result = 1, square = static_cast<uint64>(base);
  for (uint64 rest = static_cast<uint64>(exponent); rest != 0; rest >>= 1) {
    if (rest & 1) result *= square;
    square *= square;
  }
  return static_cast<long long>(result);
}

// Exact: in double, x is reduced by y * 2^(bits * step), from the step that the largest |x / y|, 2^277, needs down to
// 0. A quotient is below 2^bits and off by less than 3/4, so |x| ends below 3/4 of what it was reduced by, and is a
// multiple of the last place of x or y, which a float holds. The product is exact within an FMA, or in 53 bits.
ATTNJIT_FUNCTION float attnjit_fmod(float x, float y) {
#ifdef __FMA__
  constexpr int steps = 6;
  constexpr double power = 0x1p50, largest = 0x1p250;
#else
  constexpr int steps = 10;
  constexpr double power = 0x1p28, largest = 0x1p252;
#endif
  const double magic = 6755399441055744.0;
  const double magnitude = __builtin_fabsf(y);
  double rest = __builtin_fabsf(x);
  double divisor = magnitude * largest, reciprocal = 1.0 / divisor;
#pragma clang loop unroll(full)
  for (int step = 0; step < steps; ++step) {
    const double quotient = (rest * reciprocal + magic) - magic;
#ifdef __FMA__
    rest = __builtin_fma(-quotient, divisor, rest);
#else
    rest = rest - quotient * divisor;
#endif
    divisor *= 1.0 / power;
    reciprocal *= power;
  }
  const float remainder = static_cast<float>(rest < 0.0 ? rest + magnitude : rest);
  const bool whole = (magnitude == kInfinity) & (__builtin_fabsf(x) < kInfinity);
  return whole ? x : __builtin_copysignf(remainder, x);
}

ATTNJIT_FUNCTION float attnjit_widen_f16(unsigned short bits) {
#ifdef __F16C__
  return static_cast<float>(__builtin_bit_cast(_Float16, bits));
#else
  // The exponent moves by a product, which normalises subnormals, too.
  const int magnitude = (bits & 0x7fff) << 13;
  const float scaled = float_of(magnitude) * 0x1p112f;
  const int finite = bits_of(scaled);
  const int widened = (bits & 0x7c00) == 0x7c00 ? magnitude | 0x7f800000 : finite;
  return float_of(widened | ((bits & 0x8000) << 16));
#endif
}
