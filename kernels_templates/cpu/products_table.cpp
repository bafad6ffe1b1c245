// Picks the native products of an instruction set.
#include "kernels_templates/cpu/products.h"

namespace attnjit::cpu {

extern const Products products_sse2;
extern const Products products_avx2;
extern const Products products_avx512;
extern const Products products_avx512bf16;

const Products& products(int isa) {
  switch (isa) {
    case 0:
      return products_sse2;
    case 1:
      return products_avx2;
    case 2:
      return products_avx512;
    default:
      return products_avx512bf16;
  }
}

}  // namespace attnjit::cpu
