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

void run_task(const Pass& pass, std::int64_t task, int thread) {
  const ForwardCall& call = pass.call;
  const cpu::Products& products = pass.products;
  const Layout& l = pass.layout;
  const std::int64_t num_heads = call.q.shape[1];
  const std::int64_t seqlen_q = call.q.shape[2];
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t seqlen_kv = call.k.shape[2];
  const std::int64_t head_dim_v = call.v.shape[3];
  const std::int64_t head = task / pass.schedule.tasks_per_head;
  const std::int64_t b = head / num_heads;
  const std::int64_t h = head % num_heads;
  const std::int64_t first_panel = task % pass.schedule.tasks_per_head * pass.schedule.panels_per_task;
  const std::int64_t panels = std::min(pass.schedule.panels_per_task, pass.schedule.panels - first_panel);

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
  for (std::int64_t kv = 0; kv < seqlen_kv; kv += kTileRows) {
    const std::int64_t rows = std::min<std::int64_t>(kTileRows, seqlen_kv - kv);
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
      const cpu::TileParams params{.scores = scratch + l.scores,
                                   .row_max = scratch + l.row_max + p * kPanelLanes,
                                   .row_sum = scratch + l.row_sum + p * kPanelLanes,
                                   .rescale = scratch + l.rescale,
                                   .b = b,
                                   .h = h,
                                   .q_idx = panel_at(first_panel + p, seqlen_q).start,
                                   .kv_idx = kv,
                                   .rows = rows,
                                   .captured = pass.captured,
                                   .staged = scratch + l.staged};
      const float* const queries = scratch + l.queries + p * head_dim * kPanelLanes;
      float* const out = scratch + l.out + p * head_dim_v * kPanelLanes;
      const auto score_keys = [&](std::int64_t first, std::int64_t count) {
        float* const scores = params.scores + first * kPanelLanes;
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
        products.pv_bf16(values, rows, head_dim_v, params.scores, params.rescale, out);
      } else {
        products.pv(values, values_stride, rows, head_dim_v, params.scores, params.rescale, out);
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
                  .staged = tile.staged(),
                  .rows = tile.rows(),
                  .storage = storage,
                  .factor = score_scale(call.scale, tile.score_factor()),
                  // An odd head dim has no pairs.
                  .bf16 = storage == cpu::Storage::kBF16 && products.qk_bf16 && call.q.shape[3] % 2 == 0};
  pool.parallel_for(s.tasks, [&pass](std::int64_t task, int thread) { run_task(pass, task, thread); });
}

}  // namespace attnjit::runtime
