// The fused forward pass on the CPU: panels of query rows against blocks of keys around a compiled softmax tile.
#include "runtime/cpu_backend.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>

#include "kernels_templates/cpu/products.h"
#include "runtime/cpu_panels.h"

namespace attnjit::runtime {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// Panels of one task share each block of K and V: its conversion, and its way through the caches.
constexpr std::int64_t kMaxPanels = 8;
// Tasks a thread should have for the threads to end together.
constexpr std::int64_t kTasksPerThread = 4;
// How one call is cut into tasks: (batch, query head, group of panels).
struct Schedule {
  std::int64_t panels = 0;           // of one head
  std::int64_t panels_per_task = 1;  // the last task of a head may have fewer
  std::int64_t tasks_per_head = 0;
  std::int64_t tasks = 0;
};

Schedule schedule(const ForwardCall& call, int threads) {
  Schedule s;
  const std::int64_t heads = call.q.shape[0] * call.q.shape[1];
  s.panels = (call.q.shape[2] + kPanelLanes - 1) / kPanelLanes;
  if (heads == 0 || s.panels == 0) return s;
  s.panels_per_task = std::min(kMaxPanels, s.panels);
  while (s.panels_per_task > 1 &&
         heads * ((s.panels + s.panels_per_task - 1) / s.panels_per_task) < kTasksPerThread * threads) {
    s.panels_per_task /= 2;
  }
  s.tasks_per_head = (s.panels + s.panels_per_task - 1) / s.panels_per_task;
  s.tasks = heads * s.tasks_per_head;
  return s;
}

// One thread's scratch, in floats from its start; every part is a multiple of 64 bytes.
struct Layout {
  std::int64_t queries = 0;  // [panel][head_dim][kPanelLanes]
  std::int64_t out = 0;      // [panel][head_dim_v][kPanelLanes]
  std::int64_t row_max = 0;  // [panel][kPanelLanes]
  std::int64_t row_sum = 0;
  std::int64_t rescale = 0;  // [kPanelLanes]
  std::int64_t scores = 0;   // [kTileRows][kPanelLanes]
  std::int64_t keys = 0;     // [kTileRows][head_dim]
  std::int64_t values = 0;   // [kTileRows][head_dim_v]
  std::int64_t staged = 0;   // [staged reads][kTileRows][kPanelLanes]
  std::int64_t size = 0;
};

Layout layout(const ForwardCall& call, const compiler::CpuTile& tile, const Schedule& s) {
  Layout l;
  const auto take = [&l](std::int64_t floats) {
    const std::int64_t start = l.size;
    l.size += (floats + 15) / 16 * 16;
    return start;
  };
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t head_dim_v = call.v.shape[3];
  l.queries = take(s.panels_per_task * head_dim * kPanelLanes);
  l.out = take(s.panels_per_task * head_dim_v * kPanelLanes);
  l.row_max = take(s.panels_per_task * kPanelLanes);
  l.row_sum = take(s.panels_per_task * kPanelLanes);
  l.rescale = take(kPanelLanes);
  l.scores = take(kTileRows * kPanelLanes);
  if (call.k.dtype != dsl::DType::kF32) l.keys = take(kTileRows * head_dim);
  l.values = take(kTileRows * head_dim_v);
  l.staged = take(static_cast<std::int64_t>(tile.staged().size()) * kStagedSize);
  return l;
}

// Rows of V this far apart fall into so few sets of the first cache that walking down a column of 128 of them evicts
// what it is about to use: packing the block first is cheaper (bench/notes.md, "CPU kernels").
bool strides_collide(std::int64_t stride_in_floats) { return stride_in_floats * 4 % 2048 == 0; }

// Everything tasks share.
struct Pass {
  const ForwardCall& call;
  const cpu::Products& products;
  cpu::TileFn tile;
  Schedule schedule;
  Layout layout;
  float* workspace;
  const cpu::CapturedView* captured;
  cpu::TileFacts facts;
  std::span<const dsl::DType> staged;
  cpu::RowsFn rows;  // where there are staged reads
  cpu::Storage storage;
  ScoreScale factor;  // on the scores
  bool bf16;          // the products are computed on BF16 itself
};

// Divides by the row sums, stores o, lse and row_max of one panel. Overwrites row_sum.
void store_panel(const Pass& pass, std::int64_t b, std::int64_t h, const Panel& panel, float* out, const float* row_max,
                 float* row_sum) {
  const ForwardCall& call = pass.call;
  const std::int64_t head_dim_v = call.v.shape[3];
  const float ln2 = std::numbers::ln2_v<float>;
  for (std::int64_t lane = panel.first; lane < panel.lanes; ++lane) {
    const float max = row_max[lane];
    const float sum = row_sum[lane];
    const bool empty = max == -kInfinity && sum == 0.0f;
    const std::int64_t row = panel.start + lane;
    if (call.lse.data) {
      call.lse.data[b * call.lse.stride[0] + h * call.lse.stride[1] + row * call.lse.stride[2]] =
          empty ? -kInfinity : max * ln2 + std::log(sum);
    }
    if (call.row_max.data) {
      call.row_max.data[b * call.row_max.stride[0] + h * call.row_max.stride[1] + row * call.row_max.stride[2]] =
          std::isnan(sum) && max != kInfinity ? sum : max * ln2;
    }
    // 0 times a V that is not finite stays out of an empty row.
    if (empty) {
      for (std::int64_t i = 0; i < head_dim_v; ++i) out[i * kPanelLanes + lane] = 0.0f;
    }
    row_sum[lane] = empty ? 0.0f : 1.0f / sum;
  }
  pass.products.store_panel(out, row_sum, panel.first, panel.lanes, head_dim_v, at(call.o, b, h, panel.start),
                            pass.storage, call.o.stride[2]);
}

// A task's head, and its panels of that. Where there is a mask the last queries, which see most keys where masks look
// back, come first of all heads: what is left at the end, for some threads to wait for, is short.
struct TaskPlace {
  std::int64_t head, first_panel, panels;
};

TaskPlace place_of(const Pass& pass, std::int64_t task) {
  const Schedule& s = pass.schedule;
  std::int64_t head = task / s.tasks_per_head, part = task % s.tasks_per_head;
  if (pass.facts.kind) {
    const std::int64_t heads = s.tasks / s.tasks_per_head;
    head = task % heads;
    part = s.tasks_per_head - 1 - task / heads;
  }
  const std::int64_t first_panel = part * s.panels_per_task;
  return {head, first_panel, std::min(s.panels_per_task, s.panels - first_panel)};
}

// The blocks of keys that some panel of a task may see: from a multiple of kTileRows on.
KeySpan blocks_of(const Pass& pass, const TaskPlace& place, std::int64_t b, std::int64_t h) {
  const std::int64_t seqlen_q = pass.call.q.shape[2], seqlen_kv = pass.call.k.shape[2];
  if (!pass.facts.kv_range || seqlen_kv == 0) return {0, seqlen_kv};
  const std::int64_t first = place.first_panel * kPanelLanes;
  const std::int64_t end = std::min(seqlen_q, (place.first_panel + place.panels) * kPanelLanes);
  const cpu::Tile tile = tile_of(b, h, first, end - first, 0, seqlen_kv);
  cpu::IndexRange range;
  pass.facts.kv_range(&tile, pass.captured, &range);
  if (range.first > range.last) return {0, 0};
  const std::int64_t start = range.first / kTileRows * kTileRows;
  return {start, range.last + 1 - start};
}

void run_task(const Pass& pass, std::int64_t task, int thread) {
  const ForwardCall& call = pass.call;
  const cpu::Products& products = pass.products;
  const Layout& l = pass.layout;
  const std::int64_t num_heads = call.q.shape[1];
  const std::int64_t seqlen_q = call.q.shape[2];
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t seqlen_kv = call.k.shape[2];
  const std::int64_t head_dim_v = call.v.shape[3];
  const TaskPlace place = place_of(pass, task);
  const std::int64_t b = place.head / num_heads;
  const std::int64_t h = place.head % num_heads;
  const std::int64_t first_panel = place.first_panel;
  const std::int64_t panels = place.panels;

  float* const scratch = pass.workspace + thread * l.size;
  for (std::int64_t p = 0; p < panels; ++p) {
    const Panel panel = panel_at(first_panel + p, seqlen_q);
    const void* const q = at(call.q, b, h, panel.start);
    float* const queries = scratch + l.queries + p * head_dim * kPanelLanes;
    if (pass.bf16) {
      products.load_panel_bf16(static_cast<const std::uint16_t*>(q), call.q.stride[2], panel.lanes, head_dim, queries);
    } else {
      products.load_panel(q, pass.storage, call.q.stride[2], panel.lanes, head_dim, queries);
    }
  }
  std::fill_n(scratch + l.out, panels * head_dim_v * kPanelLanes, 0.0f);
  std::fill_n(scratch + l.row_max, panels * kPanelLanes, -kInfinity);
  std::fill_n(scratch + l.row_sum, panels * kPanelLanes, 0.0f);

  const std::int64_t head_kv = h / (num_heads / call.k.shape[1]);
  const bool widen = pass.storage != cpu::Storage::kF32 && !pass.bf16;
  const bool pack_values = widen || strides_collide(call.v.stride[2]);
  const KeySpan blocks = blocks_of(pass, place, b, h);
  for (std::int64_t kv = blocks.first; kv < blocks.first + blocks.count; kv += kTileRows) {
    const std::int64_t rows = std::min<std::int64_t>(kTileRows, seqlen_kv - kv);
    std::array<KeySpan, kMaxPanels> needed;
    bool needs = false;
    for (std::int64_t p = 0; p < panels; ++p) {
      KeySpan& span = needed[static_cast<std::size_t>(p)];
      span = needed_keys(pass.facts, pass.captured, b, h, panel_at(first_panel + p, seqlen_q), kv, rows);
      needs = needs || span.count > 0;
    }
    if (!needs) continue;
    const void* const k = at(call.k, b, head_kv, kv);
    const void* const v = at(call.v, b, head_kv, kv);
    const float* keys = static_cast<const float*>(k);
    const float* values = static_cast<const float*>(v);
    std::int64_t keys_stride = call.k.stride[2];
    std::int64_t values_stride = call.v.stride[2];
    if (widen) {
      keys = scratch + l.keys;
      keys_stride = head_dim;
      products.widen(k, pass.storage, call.k.stride[2], rows, head_dim, scratch + l.keys, head_dim);
    }
    if (pass.bf16) {
      values = scratch + l.values;
      products.pair_rows_bf16(static_cast<const std::uint16_t*>(v), call.v.stride[2], rows, head_dim_v,
                              scratch + l.values);
    } else if (pack_values) {
      values = scratch + l.values;
      values_stride = head_dim_v;
      products.widen(v, pass.storage, call.v.stride[2], rows, head_dim_v, scratch + l.values, head_dim_v);
    }
    for (std::int64_t p = 0; p < panels; ++p) {
      const KeySpan span = needed[static_cast<std::size_t>(p)];
      if (span.count == 0) continue;
      const cpu::TileParams params{.scores = scratch + l.scores,
                                   .row_max = scratch + l.row_max + p * kPanelLanes,
                                   .row_sum = scratch + l.row_sum + p * kPanelLanes,
                                   .rescale = scratch + l.rescale,
                                   .b = b,
                                   .h = h,
                                   .q_idx = panel_at(first_panel + p, seqlen_q).start,
                                   .kv_idx = kv + span.first,
                                   .rows = span.count,
                                   .captured = pass.captured,
                                   .staged = scratch + l.staged};
      const float* const queries = scratch + l.queries + p * head_dim * kPanelLanes;
      float* const out = scratch + l.out + p * head_dim_v * kPanelLanes;
      const auto score_keys = [&](std::int64_t first, std::int64_t count) {
        float* const scores = params.scores + first * kPanelLanes;
        first += span.first;
        if (pass.bf16) {
          products.qk_bf16(static_cast<const std::uint16_t*>(k) + first * call.k.stride[2], call.k.stride[2], count,
                           head_dim, queries, pass.factor.main, scores);
        } else {
          products.qk(keys + first * keys_stride, keys_stride, count, head_dim, queries, pass.factor.main, scores);
        }
        if (pass.factor.rest != 1.0f) {
          for (std::int64_t i = 0; i < count * kPanelLanes; ++i) scores[i] *= pass.factor.rest;
        }
      };
      score_and_stage(products, pass.staged, pass.rows, params, scratch + l.staged, score_keys);
      pass.tile(&params);
      if (pass.bf16) {
        products.pv_bf16(values + span.first / 2 * head_dim_v, span.count, head_dim_v, params.scores, params.rescale,
                         out);
      } else {
        products.pv(values + span.first * values_stride, values_stride, span.count, head_dim_v, params.scores,
                    params.rescale, out);
      }
    }
  }

  for (std::int64_t p = 0; p < panels; ++p) {
    store_panel(pass, b, h, panel_at(first_panel + p, seqlen_q), scratch + l.out + p * head_dim_v * kPanelLanes,
                scratch + l.row_max + p * kPanelLanes, scratch + l.row_sum + p * kPanelLanes);
  }
}

}  // namespace

std::size_t cpu_workspace_size(const ForwardCall& call, const compiler::CpuTile& tile, int threads) {
  const Schedule s = schedule(call, threads);
  if (s.tasks == 0) return 0;
  // Fewer tasks than threads keep the rest of them idle.
  const std::int64_t working = std::min<std::int64_t>(threads, s.tasks);
  return static_cast<std::size_t>(layout(call, tile, s).size) * sizeof(float) * static_cast<std::size_t>(working);
}

void cpu_forward(const ForwardCall& call, const compiler::CpuTile& tile, compiler::CpuIsa isa, void* workspace,
                 ThreadPool& pool) {
  const Schedule s = schedule(call, pool.size());
  if (s.tasks == 0) return;
  const CapturedTable captured = captured_table(call);
  const cpu::Products& products = cpu::products(static_cast<int>(isa));
  const cpu::Storage storage = storage_of(call.q.dtype);
  const Pass pass{.call = call,
                  .products = products,
                  .tile = tile.function(),
                  .schedule = s,
                  .layout = layout(call, tile, s),
                  .workspace = static_cast<float*>(workspace),
                  .captured = captured.data(),
                  .facts = tile.tile_facts(),
                  .staged = tile.staged(),
                  .rows = tile.rows(),
                  .storage = storage,
                  .factor = score_scale(call.scale, tile.score_factor()),
                  // An odd head dim has no pairs.
                  .bf16 = storage == cpu::Storage::kBF16 && products.qk_bf16 && call.q.shape[3] % 2 == 0};
  pool.parallel_for(s.tasks, [&pass](std::int64_t task, int thread) { run_task(pass, task, thread); });
}

}  // namespace attnjit::runtime
