// Code that travels inside the library: LLVM bitcode of the CPU templates, one per instruction set.
#pragma once

namespace attnjit::cpu {

// Borrowed bytes of static storage.
struct EmbeddedBitcode {
  const unsigned char* data;
  unsigned long size;
};

// The softmax tile of tile.cpp. `isa` is compiler::CpuIsa's number: 0 SSE2, 1 AVX2 + FMA + F16C, 2 AVX-512 (F, BW, DQ,
// VL), 3 AVX-512 with BF16.
EmbeddedBitcode tile_bitcode(int isa);
// The backward's tile of gradient_tile.cpp, likewise.
EmbeddedBitcode gradient_tile_bitcode(int isa);
// rows.cpp, likewise.
EmbeddedBitcode rows_bitcode(int isa);
// The language's functions of functions.cpp, likewise.
EmbeddedBitcode functions_bitcode(int isa);
// elementwise.cpp, in test programs only.
EmbeddedBitcode elementwise_bitcode(int isa);

}  // namespace attnjit::cpu
