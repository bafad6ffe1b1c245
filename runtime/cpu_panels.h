// What the CPU's forward and backward share: panels of query rows, addresses, and the staging of captured reads.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <span>

#include "kernels_templates/cpu/products.h"
#include "runtime/forward.h"

namespace attnjit::runtime {

using cpu::kPanelLanes;
using cpu::kTileRows;

inline cpu::Storage storage_of(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kF16:
      return cpu::Storage::kF16;
    case dsl::DType::kBF16:
      return cpu::Storage::kBF16;
    default:
      return cpu::Storage::kF32;
  }
}

inline cpu::Element element_of(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kF16:
      return cpu::Element::kF16;
    case dsl::DType::kBF16:
      return cpu::Element::kBF16;
    case dsl::DType::kInt32:
      return cpu::Element::kInt32;
    case dsl::DType::kInt16:
      return cpu::Element::kInt16;
    case dsl::DType::kInt8:
      return cpu::Element::kInt8;
    case dsl::DType::kUInt8:
    case dsl::DType::kBool:
      return cpu::Element::kUInt8;
    default:
      return cpu::Element::kF32;
  }
}

// Address of (b, h, row, 0).
inline char* at(const TensorView& t, std::int64_t b, std::int64_t h, std::int64_t row) {
  const std::int64_t offset = b * t.stride[0] + h * t.stride[1] + row * t.stride[2];
  return static_cast<char*>(t.data) + offset * dsl::dtype_size(t.dtype);
}

// Where a panel lies. The last panel of a head that ends within it starts earlier, so that all its lanes are rows; only
// lanes from `first` on are its own to store. A head of fewer rows than lanes has lanes beyond its end.
struct Panel {
  std::int64_t start;
  std::int64_t first;
  std::int64_t lanes;
};

inline Panel panel_at(std::int64_t index, std::int64_t seqlen_q) {
  const std::int64_t start = std::max<std::int64_t>(0, std::min(index * kPanelLanes, seqlen_q - kPanelLanes));
  return {start, index * kPanelLanes - start, std::min<std::int64_t>(kPanelLanes, seqlen_q - start)};
}

// The captured tensors as the compiled code takes them.
using CapturedTable = std::array<cpu::CapturedView, dsl::kMaxCaptures>;
inline CapturedTable captured_table(const ForwardCall& call) {
  CapturedTable table;
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    table[i].data = call.captures[i].data;
    for (int d = 0; d < cpu::kMaxCaptureRank; ++d) {
      table[i].stride[d] = call.captures[i].stride[d];
      table[i].extent[d] = call.captures[i].extent[d];
    }
  }
  return table;
}

// ---- What the mask leaves

// Keys that a panel takes are trimmed to a multiple of these: whole steps of every product.
constexpr std::int64_t kKeyGrain = 16;

// A part of a block of keys, from the block's start.
struct KeySpan {
  std::int64_t first, count;
};

// Logical positions are places: a call on the CPU has no origins.
inline cpu::Tile tile_of(std::int64_t b, std::int64_t h, std::int64_t q, std::int64_t queries, std::int64_t kv,
                         std::int64_t keys) {
  return {.b = b,
          .h_first = h,
          .h_last = h,
          .q_first = q,
          .q_last = q + queries - 1,
          .kv_first = kv,
          .kv_last = kv + keys - 1};
}

// What the queries of a panel that are its own need of the keys [kv, kv + rows); none where the mask drops them all.
inline KeySpan needed_keys(const cpu::TileFacts& facts, const cpu::CapturedView* captured, std::int64_t b,
                           std::int64_t h, const Panel& panel, std::int64_t kv, std::int64_t rows) {
  const cpu::Tile tile = tile_of(b, h, panel.start + panel.first, panel.lanes - panel.first, kv, rows);
  if (facts.kind && facts.kind(&tile, captured) == cpu::TileKind::kSkip) return {0, 0};
  if (!facts.kv_range) return {0, rows};
  cpu::IndexRange range;
  facts.kv_range(&tile, captured, &range);
  if (range.first > range.last) return {0, 0};
  const std::int64_t first = (range.first - kv) / kKeyGrain * kKeyGrain;
  const std::int64_t end = std::min<std::int64_t>(rows, (range.last - kv + kKeyGrain) / kKeyGrain * kKeyGrain);
  return {first, end - first};
}

// ---- Staged reads

constexpr std::int64_t kStagedSize = kTileRows * kPanelLanes;

// Keys, at least, that a product takes between two prefetches of staged rows.
constexpr std::int64_t kKeysPerPrefetch = 8;

// For each staged read, where each lane's row of this block starts.
using RowAddresses = std::array<const void*, cpu::kMaxStagedReads * kPanelLanes>;

// Asks the caches for the rows of the lanes [first, last).
inline void prefetch_rows(std::span<const dsl::DType> staged, const RowAddresses& addresses, std::int64_t rows,
                          std::int64_t first, std::int64_t last) {
  constexpr std::int64_t kLine = 64;
  for (std::size_t i = 0; i < staged.size(); ++i) {
    const std::int64_t size = rows * dsl::dtype_size(staged[i]);
    for (std::int64_t lane = first; lane < last; ++lane) {
      const char* const start = static_cast<const char*>(addresses[i * kPanelLanes + static_cast<std::size_t>(lane)]);
      for (std::int64_t offset = 0; offset < size; offset += kLine) __builtin_prefetch(start + offset);
      __builtin_prefetch(start + size - 1);
    }
  }
}

// Puts the rows where the tile expects them: with the lanes side by side.
inline void stage_rows(const cpu::Products& products, std::span<const dsl::DType> staged, const RowAddresses& addresses,
                       std::int64_t rows, float* out) {
  for (std::size_t i = 0; i < staged.size(); ++i) {
    products.stage(addresses.data() + i * kPanelLanes, element_of(staged[i]), rows,
                   out + static_cast<std::int64_t>(i) * kStagedSize);
  }
}

// Keys that a product takes between two prefetches of staged rows.
inline std::int64_t keys_per_prefetch(const cpu::Products& products) {
  return (kKeysPerPrefetch + products.rows_at_once - 1) / products.rows_at_once * products.rows_at_once;
}

// Calls score(first, count) for pieces of `rows` keys that cover them, and puts what `row_addresses` names into
// `staged`. The rows lie in as many pages as there are lanes, which no hardware prefetcher foresees. Asked for a few
// lines at a time they come while the product runs; asked for at once, most are not fetched (bench/notes.md).
template <typename Score>
void score_and_stage(const cpu::Products& products, std::span<const dsl::DType> types, cpu::RowsFn row_addresses,
                     const cpu::TileParams& params, float* staged, Score&& score) {
  if (types.empty()) return score(0, params.rows);
  RowAddresses addresses;
  row_addresses(&params, addresses.data());
  const std::int64_t rows = params.rows;
  const std::int64_t step = keys_per_prefetch(products);
  for (std::int64_t first = 0; first < rows; first += step) {
    const std::int64_t count = std::min(step, rows - first);
    prefetch_rows(types, addresses, rows, first * kPanelLanes / rows, (first + count) * kPanelLanes / rows);
    score(first, count);
  }
  stage_rows(products, types, addresses, rows, staged);
}

}  // namespace attnjit::runtime
