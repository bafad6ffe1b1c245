// The eager backend's vector loops for SSE2.
#define ATTNJIT_PASSES sse2_passes
#define ATTNJIT_ISA "sse2"
#define ATTNJIT_LANES 4
#define ATTNJIT_MVEC _ZGVbN4
#include "runtime/math_passes.inc"
