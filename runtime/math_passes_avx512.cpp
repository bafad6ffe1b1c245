// The eager backend's vector loops for AVX-512.
#define ATTNJIT_PASSES avx512_passes
#define ATTNJIT_ISA "avx512"
#define ATTNJIT_LANES 16
#define ATTNJIT_MVEC _ZGVeN16
#include "runtime/math_passes.inc"
