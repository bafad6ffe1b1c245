// The least and the largest values of captured tensors over stretches of one dimension. Compiled behind params.h and
// summaries.h.
namespace attnjit::cuda {

#ifndef ATTNJIT_EMULATED
template <typename T>
__device__ __forceinline__ T exchange(T x, int mask) {
  return __shfl_xor_sync(0xffffffffu, x, mask);
}
#endif

// A bool as it lies in memory: true where its byte is not 0.
struct StoredBool {
  unsigned char byte;
  __device__ __forceinline__ operator int() const { return byte != 0; }
};

// A level is made of the one before, read from here where two fit: a trip to memory and back per level is what a row of
// a few thousand values would take longest for. (blocks, 4).
inline constexpr int kLevelBytes = 16384;

// The block's threads write one row; four of them see to the four parts of a block of values. `levels`: 2 * kLevelBytes
// of shared memory.
template <typename Value, typename T>
__device__ __forceinline__ void summarise_row(const SummaryTable& of, int row, char* levels) {
  constexpr int kParts = 4, kOwnValues = kSummaryBlockValues / kParts;
  const int inner = row % of.inner, outer = row / of.inner;
  const Value* const values = static_cast<const Value*>(of.data) + outer * of.row_stride[0] + inner * of.row_stride[1];
  const long long part = static_cast<long long>(of.levels) * of.blocks;
  T* const table = static_cast<T*>(of.table) + kParts * part * row;
  const bool at_hand = of.blocks <= kLevelBytes / static_cast<int>(kParts * sizeof(T));
  const auto level_at_hand = [&](int level) { return reinterpret_cast<T*>(levels + level % 2 * kLevelBytes); };
  const int thread = static_cast<int>(threadIdx.x), which = thread % kParts;
  for (int first = 0; first < of.blocks; first += kSummaryThreads / kParts) {
    const int block = first + thread / kParts;
    T least = 0, largest = 0;
#pragma unroll
    for (int i = 0; i < kOwnValues; ++i) {
      // Behind the end the last value is repeated.
      const long long at = static_cast<long long>(block) * kSummaryBlockValues + which * kOwnValues + i;
      // NOLINTNEXTLINE(bugprone-signed-char-misuse): an int8 is a number
      const T value = static_cast<T>(values[(at < of.extent ? at : of.extent - 1) * of.stride]);
      least = i > 0 && least < value ? least : value;
      largest = i > 0 && largest > value ? largest : value;
    }
#pragma unroll
    for (int mask = 1; mask < kParts; mask *= 2) {
      const T other_least = exchange(least, mask), other_largest = exchange(largest, mask);
      least = other_least < least ? other_least : least;
      largest = other_largest > largest ? other_largest : largest;
    }
    if (block >= of.blocks) continue;
    const T value = which < 2 ? least : largest;
    table[which * part + block] = value;
    if (at_hand) level_at_hand(0)[kParts * block + which] = value;
  }
  // What reaches over an end repeats the block there, which is in the stretch.
#pragma unroll 1
  for (int level = 1; level < of.levels; ++level) {
    __syncthreads();
    const int half = 1 << (level - 1);
    const T* const from = at_hand ? level_at_hand(level - 1) : table + static_cast<long long>(level - 1) * of.blocks;
    const long long block_step = at_hand ? kParts : 1, part_step = at_hand ? 1 : part;
    T* const to = table + static_cast<long long>(level) * of.blocks;
#pragma unroll 1
    for (int i = thread; i < kParts * of.blocks; i += kSummaryThreads) {
      const int block = i / kParts;
      const int behind = block + half < of.blocks ? block + half : of.blocks - 1;
      const int before = block > half ? block - half : 0;
      const T a = from[which * part_step + block * block_step];
      const T b = from[which * part_step + (which % 2 == 0 ? behind : before) * block_step];
      const T value = (which < 2) == (a < b) ? a : b;
      to[which * part + block] = value;
      if (at_hand) level_at_hand(level)[i] = value;
    }
  }
}

}  // namespace attnjit::cuda

extern "C" __global__ void __launch_bounds__(attnjit::cuda::kSummaryThreads)
    attnjit_summarize(const __grid_constant__ attnjit::cuda::SummaryParams params) {
  using namespace attnjit::cuda;
  alignas(8) __shared__ char levels[2 * kLevelBytes];
  const int row = static_cast<int>(blockIdx.x);
  if (row == 0 && threadIdx.x == 0) *params.counter = 0;
  int which = 0;
  while (which + 1 < params.count && params.tables[which + 1].first_row <= row) ++which;
  const SummaryTable& of = params.tables[which];
  const int own_row = row - of.first_row;
  switch (of.type) {
    case SummaryType::kBool:
      return summarise_row<StoredBool, int>(of, own_row, levels);
    case SummaryType::kUInt8:
      return summarise_row<unsigned char, int>(of, own_row, levels);
    case SummaryType::kInt8:
      return summarise_row<signed char, int>(of, own_row, levels);
    case SummaryType::kInt16:
      return summarise_row<short, int>(of, own_row, levels);
    case SummaryType::kInt32:
      return summarise_row<int, int>(of, own_row, levels);
    default:
      return summarise_row<long long, long long>(of, own_row, levels);
  }
}
