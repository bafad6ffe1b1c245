// Picks the native products of an instruction set.
#include "kernels_templates/cpu/products.h"

namespace attnjit::cpu {

extern const Products kProductsSse2;
extern const Products kProductsAvx2;
extern const Products kProductsAvx512;
extern const Products kProductsAvx512Bf16;

const Products& products(int isa) {
  switch (isa) {
    case 0:
      return kProductsSse2;
    case 1:
      return kProductsAvx2;
    case 2:
      return kProductsAvx512;
    default:
      return kProductsAvx512Bf16;
  }
}

}  // namespace attnjit::cpu
