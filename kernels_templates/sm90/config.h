// The configurations of the sm90 family's kernel, what it is launched with, and how it lays out shared memory. Shared
// by host and device. It includes nothing: cuda/params.h comes before it.
#pragma once

namespace attnjit::sm90 {

enum class Element : int { kF16 = 1, kBF16 = 2 };

struct ForwardConfig {
  Element element = Element::kBF16;
  int head_dim = 128;     // of q and k, as the problem has it; padded in shared memory
  int head_dim_v = 128;   // of v and o
  int warpgroups = 2;     // that compute, 64 queries each: 1 to 4; one more plans, loads and stores
  int tile_n = 128;       // keys of one step; a multiple of 16, at most 256
  int stages = 2;         // buffers for K and for V each
  int q_buffers = 2;      // for Q, and then O: with two the next Q comes meanwhile
  bool ping_pong = true;  // warpgroups, two or more, take turns at the tensor cores
  // The reference of the exponentials stays where the first steps put it, and a tile whose sums run too high is done
  // again; else it is the running maximum. Without it row_max is exact, and only then.
  bool frozen = true;
  // Of every eight exponentials of a frozen step, those computed without the special function unit: for mods that keep
  // that busy.
  int fma_exponentials = 0;
  // Those need no clamp: no two modified scores of a row are as far apart as the exponents of floats.
  bool bounded = false;
};

// A tensor map as the driver encodes it, of a 4-D tensor (feature, sequence, head, batch): boxes of 64 features,
// 128-byte swizzle. Rows and features that do not exist arrive as zero and are not written.
struct alignas(64) TensorMap {
  unsigned long long opaque[16];
};

// Division by what only the host knows, of dividends from 0 to 2^31 - 1.
struct Divisor {
  unsigned divisor, multiplier;
  int shift;
};
constexpr Divisor make_divisor(int divisor) {
  int bits = 0;  // of the next power of two
  while (1ll << bits < divisor) ++bits;
  const unsigned long long power = 1ull << (31 + bits);
  const unsigned d = static_cast<unsigned>(divisor);
  return {d, static_cast<unsigned>((power + d - 1) / d), 31 + bits};
}
constexpr int quotient(int dividend, const Divisor& by) {
  return static_cast<int>(static_cast<unsigned long long>(dividend) * by.multiplier >> by.shift);
}

// What wgmma's descriptors of shared memory have above their low word: 128-byte swizzle, 1024 bytes from 8 rows to the
// next.
inline constexpr unsigned kDescriptorsHigh = 1u << 30 | 64;

// One forward call: what a launch of one block per multiprocessor, at most `tiles`, takes.
struct ForwardParams {
  TensorMap q, k, v, o;  // boxes of 64, tile_n, tile_n and 64 rows
  cuda::ForwardParams call;
  // kDescriptorsHigh: as a constant ptxas would write it anew for each product.
  unsigned descriptors_high;
  // The tiles of each block, (rounds, blocks), -1 where a block has no more. Null: the first as the blocks are
  // numbered, the others as blocks take them off `counter`, which starts at 0; without one round robin.
  const int* schedule;
  int* counter;
  int rounds;
  int m_tiles;  // of a head
  int tiles;    // m_tiles * num_heads * batch
  // Heads, a divisor of num_heads * batch, whose tiles mods with a mask see by their rows, the last first.
  int section;
  // By m_tiles, num_heads, num_heads / num_heads_kv, section * m_tiles and section.
  Divisor by_m_tiles, by_heads, by_group, by_section_tiles, by_section;
};

// Where a tile of queries is: its head, of all batches, and its number there.
struct TilePlace {
  int head, m;
};
constexpr TilePlace plain_place(int number, const ForwardParams& params) {
  const int head = quotient(number, params.by_m_tiles);
  return {head, number - head * params.m_tiles};
}
// Of mods with a mask: the rows of the last queries, which see most keys where masks look back, come first, of as many
// heads together as the L2 cache holds.
constexpr TilePlace masked_place(int number, const ForwardParams& params) {
  const int section = quotient(number, params.by_section_tiles);
  const int rest = number - section * static_cast<int>(params.by_section_tiles.divisor);
  const int row = quotient(rest, params.by_section);
  return {(section - row) * params.section + rest, params.m_tiles - 1 - row};
}

// What tiles of keys that lie one behind the other are to a warpgroup: a bit for each of the first 31, and one for all
// others. Where tiles are known, they are full beyond the last. A tile with both: of each query all of its keys are
// kept, or none.
struct Kinds {
  unsigned skipped;  // it does not see the tile
  unsigned full;     // it need look at no mask, nor at the end of the keys
};
constexpr bool is_skipped(const Kinds& kinds, int bit) { return (kinds.skipped & ~kinds.full) >> bit & 1; }
constexpr bool is_full(const Kinds& kinds, int bit) { return (kinds.full & ~kinds.skipped) >> bit & 1; }
constexpr bool is_by_row(const Kinds& kinds, int bit) { return (kinds.full & kinds.skipped) >> bit & 1; }

// Zeros below the lowest one; 32 where there is none.
constexpr int lowest_one(unsigned bits) {
#ifdef __CUDA_ARCH__
  return bits == 0 ? 32 : __ffs(static_cast<int>(bits)) - 1;
#else
  return bits == 0 ? 32 : __builtin_ctz(bits);
#endif
}
constexpr unsigned ones_from(int bit) { return bit >= 32 ? 0 : ~0u << bit; }

// Ones side by side.
struct BitRun {
  int first, length;
};
// The lowest one of `bits`, which has some, and those above it.
constexpr BitRun lowest_run(unsigned bits) {
  const int first = lowest_one(bits);
  return {first, lowest_one(~(bits >> first))};
}
// Of the tiles of `run` alone, of 32.
constexpr Kinds cut_out(const Kinds& of_32, const BitRun& run) {
  return {of_32.skipped >> run.first & ~ones_from(run.length), of_32.full >> run.first | ones_from(run.length)};
}
// How many of the tiles from `number` on are of one kind, of `count` in all; one where it is skipped.
constexpr int same_from(const Kinds& kinds, int number, int count) {
  const int bit = number < 31 ? number : 31;
  if (is_skipped(kinds, bit)) return 1;
  // The bits that differ from this tile's.
  const auto differing = [&](unsigned bits) { return ((bits >> bit & 1) != 0 ? ~bits : bits) >> bit; };
  const unsigned others = differing(kinds.skipped) | differing(kinds.full);
  const int left = count - number;
  // Without another kind the last bit's goes on.
  return others == 0 || lowest_one(others) > left ? left : lowest_one(others);
}

constexpr int kRowsOfWarpgroup = 64;
constexpr int tile_m(const ForwardConfig& c) { return kRowsOfWarpgroup * c.warpgroups; }
constexpr int threads(const ForwardConfig& c) { return 128 * (c.warpgroups + 1); }

// Feature dimensions are computed in steps of 16, and lie in shared memory in columns of 64: [column][row][64].
constexpr int padded(int head_dim) { return (head_dim + 15) / 16 * 16; }
constexpr int columns(int head_dim) { return (head_dim + 63) / 64; }
constexpr int tile_bytes(int rows, int head_dim) { return columns(head_dim) * rows * 128; }

// Shared memory of a block, in order: Q by buffer, K and V by stage, barriers. O leaves from where its Q was. The start
// is aligned to 1024 bytes by the kernel, which may cost as many.
constexpr int q_bytes_of_warpgroup(const ForwardConfig& c) {
  const int q = tile_bytes(kRowsOfWarpgroup, c.head_dim);
  const int o = tile_bytes(kRowsOfWarpgroup, c.head_dim_v);
  return q > o ? q : o;
}
constexpr int q_bytes(const ForwardConfig& c) { return c.warpgroups * q_bytes_of_warpgroup(c); }
constexpr int k_bytes(const ForwardConfig& c) { return tile_bytes(c.tile_n, c.head_dim); }
constexpr int v_bytes(const ForwardConfig& c) { return tile_bytes(c.tile_n, c.head_dim_v); }
inline constexpr int kBarrierBytes = 1024;
inline constexpr int kTileAlignment = 1024;
constexpr int forward_shared_memory(const ForwardConfig& c) {
  return c.q_buffers * q_bytes(c) + c.stages * (k_bytes(c) + v_bytes(c)) + kBarrierBytes + kTileAlignment;
}

}  // namespace attnjit::sm90
