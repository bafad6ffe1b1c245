// Picks the native products of an instruction set.
#include "kernels_templates/cpu/products.h"

namespace attnjit::cpu {

extern const Products kProductsSse2;
extern const Products kProductsAvx2;
extern const Products kProductsAvx512;

const Products& products(int isa) {
  switch (isa) {
    case 0:
      return kProductsSse2;
    case 1:
      return kProductsAvx2;
    default:  // BF16 changes no fp32 code
      return kProductsAvx512;
  }
}

}  // namespace attnjit::cpu
