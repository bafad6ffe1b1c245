// The eager backend's vector loops for AVX2.
#define ATTNJIT_PASSES avx2_passes
#define ATTNJIT_ISA "avx2"
#define ATTNJIT_LANES 8
#define ATTNJIT_MVEC _ZGVdN8
#include "runtime/math_passes.inc"
