// What the kernel that summarises captured tensors is launched with. Shared by host and device. It includes nothing:
// cuda/params.h comes before it.
#pragma once

namespace attnjit::cuda {

// Values of a block: the compiler's kSummaryBlock.
inline constexpr int kSummaryBlockValues = 32;
inline constexpr int kSummaryThreads = 512;

// How values lie in memory.
enum class SummaryType : int { kBool, kUInt8, kInt8, kInt16, kInt32, kInt64 };

// One table, (rows, 4, levels, blocks) packed, as compiler::TileSummary says: of int64 values of long long, else of
// int. Rows are those of two dimensions of the captured tensor, the second of `inner` elements. Strides in elements.
struct SummaryTable {
  const void* data;
  void* table;
  long long stride;         // along the summarised dimension
  long long row_stride[2];  // of the others
  int extent;               // of the summarised dimension
  int inner;
  int blocks, levels;
  int first_row;  // the launch's block of the first row
  SummaryType type;
};

// A launch of one block per row of all tables.
struct SummaryParams {
  SummaryTable tables[kMaxCaptures];
  int count;
  int* counter;  // set to 0, for the kernel behind
};

}  // namespace attnjit::cuda
