// The least and the largest values of captured tensors over stretches of one dimension. Compiled behind params.h and
// summaries.h.
namespace attnjit::cuda {

#ifndef ATTNJIT_EMULATED
__device__ __forceinline__ long long exchange(long long x, int mask) { return __shfl_xor_sync(0xffffffffu, x, mask); }
#endif

__device__ __forceinline__ long long summary_value(const SummaryTable& of, long long at) {
  switch (of.type) {
    case SummaryType::kBool:
      return static_cast<const unsigned char*>(of.data)[at] != 0;
    case SummaryType::kUInt8:
      return static_cast<const unsigned char*>(of.data)[at];
    case SummaryType::kInt8:
      return static_cast<const signed char*>(of.data)[at];
    case SummaryType::kInt16:
      return static_cast<const short*>(of.data)[at];
    case SummaryType::kInt32:
      return static_cast<const int*>(of.data)[at];
    default:
      return static_cast<const long long*>(of.data)[at];
  }
}

// The block's threads write one row.
template <typename T>
__device__ __forceinline__ void summarise_row(const SummaryTable& of, int row) {
  const int inner = row % of.inner, outer = row / of.inner;
  const long long start = outer * of.row_stride[0] + inner * of.row_stride[1];
  const long long part = static_cast<long long>(of.levels) * of.blocks;
  T* const table = static_cast<T*>(of.table) + 4 * part * row;
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kSummaryBlockValues;
  const int last = of.extent - 1;
#pragma unroll 4
  for (int block = thread / kSummaryBlockValues; block < of.blocks; block += kSummaryThreads / kSummaryBlockValues) {
    // Lanes behind the end repeat the last value.
    const int at = block * kSummaryBlockValues +
                   (last - block * kSummaryBlockValues < lane ? last - block * kSummaryBlockValues : lane);
    long long least = summary_value(of, start + at * of.stride), largest = least;
#pragma unroll
    for (int mask = 1; mask < kSummaryBlockValues; mask *= 2) {
      const long long other_least = exchange(least, mask), other_largest = exchange(largest, mask);
      least = other_least < least ? other_least : least;
      largest = other_largest > largest ? other_largest : largest;
    }
    if (lane < 4) table[lane * part + block] = static_cast<T>(lane < 2 ? least : largest);
  }
  // A level is made of the one before. What reaches over an end repeats the block there, which is in the stretch.
  for (int level = 1; level < of.levels; ++level) {
    __syncthreads();
    const int half = 1 << (level - 1);
    const T* const from = table + static_cast<long long>(level - 1) * of.blocks;
    T* const to = table + static_cast<long long>(level) * of.blocks;
    for (int block = thread; block < of.blocks; block += kSummaryThreads) {
      const int behind = block + half < of.blocks ? block + half : of.blocks - 1;
      const int before = block > half ? block - half : 0;
#pragma unroll
      for (int which = 0; which < 4; ++which) {
        const T a = from[which * part + block], b = from[which * part + (which % 2 == 0 ? behind : before)];
        to[which * part + block] = (which < 2) == (a < b) ? a : b;
      }
    }
  }
}

}  // namespace attnjit::cuda

extern "C" __global__ void __launch_bounds__(attnjit::cuda::kSummaryThreads)
    attnjit_summarize(const __grid_constant__ attnjit::cuda::SummaryParams params) {
  using namespace attnjit::cuda;
  const int row = static_cast<int>(blockIdx.x);
  if (row == 0 && threadIdx.x == 0) *params.counter = 0;
  int which = 0;
  while (which + 1 < params.count && params.tables[which + 1].first_row <= row) ++which;
  const SummaryTable& of = params.tables[which];
  if (of.type == SummaryType::kInt64) {
    summarise_row<long long>(of, row - of.first_row);
  } else {
    summarise_row<int>(of, row - of.first_row);
  }
}
