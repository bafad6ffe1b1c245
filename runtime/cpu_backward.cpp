// The fused backward pass on the CPU: blocks of keys against panels of query rows around a compiled gradient tile.
#include "runtime/cpu_backward.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <span>
#include <utility>
#include <vector>

#include "kernels_templates/cpu/products.h"
#include "runtime/cpu_panels.h"

namespace attnjit::runtime {
namespace {

using compiler::CpuPlaces;
using compiler::SinkFacts;
using compiler::SinkLevel;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// A chunk of keys is what a task holds of K, V, dK and dV while it walks over the queries: as much as leaves room in a
// core's second cache, so that loading a panel of queries is paid by several tiles.
constexpr std::int64_t kChunkBytes = 512 * 1024;
constexpr std::int64_t kMaxChunkRows = 1024;
// What splitting the keys costs a task, in tiles of work per panel.
constexpr double kSplitCost = 0.3;
// Elements of captured gradients that a task adds up at once; a multiple of the widest run that is converted at once.
constexpr std::int64_t kBlockElements = 8192;

// Factors of what was added up so far.
alignas(64) constexpr std::array<float, kPanelLanes> kKept = [] {
  std::array<float, kPanelLanes> ones{};
  ones.fill(1.0f);
  return ones;
}();

constexpr std::int64_t round_up(std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; }
constexpr std::int64_t ceil_div(std::int64_t n, std::int64_t by) { return (n + by - 1) / by; }

std::int64_t elements(const dsl::CaptureView& capture) {
  std::int64_t n = 1;
  for (int d = 0; d < capture.rank; ++d) n *= capture.extent[d];
  return n;
}

// Whether a captured tensor's gradient lies in memory as an accumulator does.
bool is_packed_f32(const dsl::CaptureView& capture, const CaptureGradient& gradient) {
  std::int64_t stride = 1;
  for (int d = capture.rank; d-- > 0;) {
    if (capture.extent[d] != 1 && gradient.stride[d] != stride) return false;
    stride *= capture.extent[d];
  }
  return capture.dtype == dsl::DType::kF32;
}

// How one call is cut. A task has the keys of one split of one (batch, key/value head), and all queries of the head's
// group: dK and dV are its own. Splits have a buffer of dQ each, which are added up in their order. Of masks that look
// back the first keys are seen by most queries: the first splits of all heads are the first tasks.
struct Schedule {
  std::int64_t panels = 0;  // of one query head
  std::int64_t group = 1;   // query heads of a key/value head
  std::int64_t splits = 1;
  std::int64_t split_rows = 0;  // keys of a split; the last may have fewer
  std::int64_t chunk_rows = 0;  // keys of a chunk, likewise
  std::int64_t tasks = 0;
  // Runs of tasks that one thread takes in order, see task_of_run. Where captured gradients are added up, each run has
  // accumulators of its own, and there are no more runs than threads.
  std::int64_t runs = 0;
};

// The task that a run does in its round: there and back, so that long and short ones add up to much the same.
std::int64_t task_of_run(const Schedule& s, std::int64_t run, std::int64_t round) {
  return round * s.runs + (round % 2 == 0 ? run : s.runs - 1 - run);
}

// Where a captured tensor's gradient is added up.
struct Accumulator {
  bool wanted = false;
  std::int64_t elements = 0;
  std::int64_t copies =
      0;                   // one per run; one for all where each element is written once; none where nothing adds to it
  std::int64_t start = 0;  // in floats from the start of the workspace
  std::int64_t stride = 0;  // from copy to copy, in floats
};

// The workspace, in floats from its start; every part is a multiple of 64 bytes.
struct Layout {
  // Shared.
  std::int64_t row_lse = 0;    // [batch * head][panel][kPanelLanes], as GradientTileParams has it
  std::int64_t row_delta = 0;  // likewise
  std::int64_t dq_sum = 0;     // [split][batch * head][panel][head_dim][kPanelLanes]
  std::int64_t dq_split = 0;   // size of a split's part
  std::array<Accumulator, dsl::kMaxCaptures> captures;
  // Of each thread, from threads + thread * thread_size.
  std::int64_t threads = 0, thread_size = 0;
  // Where the products are computed on BF16 itself, words are pairs: features, or rows, 2i and 2i + 1.
  std::int64_t queries = 0;        // [head_dim][kPanelLanes]
  std::int64_t query_rows = 0;     // [kPanelLanes][padded head_dim]
  std::int64_t grad_out = 0;       // [head_dim_v][kPanelLanes]
  std::int64_t grad_out_rows = 0;  // [kPanelLanes][padded head_dim_v]
  std::int64_t scores = 0;         // [kTileRows][kPanelLanes]
  std::int64_t gradients = 0;
  std::int64_t keys = 0;    // [chunk][head_dim]
  std::int64_t values = 0;  // [chunk][head_dim_v]
  std::int64_t dk = 0;      // [chunk][padded head_dim]
  std::int64_t dv = 0;      // [chunk][padded head_dim_v]
  std::int64_t staged = 0;
  std::int64_t contributions = 0;  // [sink][kTileRows][kPanelLanes]
  std::int64_t places = 0;         // [sink][kTileRows][kPanelLanes] of 64 bits, where the tile gives some
  std::int64_t level_sums = 0;     // of each sink, what its level distinguishes within a chunk
  std::int64_t level_size = 0;
  std::int64_t offsets = 0;  // [sink] of 64 bits
  std::int64_t shifts = 0;   // [sink]
  std::int64_t size = 0;
};

WantedGradients wanted(const ForwardCall& call, const Gradients& gradients) {
  WantedGradients wants{gradients.dq.data != nullptr, gradients.dk.data != nullptr, gradients.dv.data != nullptr};
  for (std::size_t i = 0; i < call.num_captures; ++i)
    if (gradients.captures[i].data) wants.captures |= 1u << i;
  return wants;
}

// Rows that add_lanes takes.
std::int64_t padded(std::int64_t width) { return round_up(width, 16); }

// `uneven`: splits may have different amounts of work.
Schedule schedule(const ForwardCall& call, bool accumulates, bool uneven, int threads) {
  Schedule s;
  s.panels = ceil_div(call.q.shape[2], kPanelLanes);
  const std::int64_t heads_kv = call.k.shape[0] * call.k.shape[1];
  s.group = call.q.shape[1] / call.k.shape[1];
  const std::int64_t tiles = ceil_div(call.k.shape[2], kTileRows);
  double best = std::numeric_limits<double>::infinity();
  // A short task goes with a long one.
  const std::int64_t least = uneven ? std::min(tiles, ceil_div(2 * std::int64_t{threads}, heads_kv)) : 1;
  for (std::int64_t splits = std::max<std::int64_t>(least, 1);
       splits <= std::min<std::int64_t>(tiles, 2 * std::int64_t{threads}); ++splits) {
    const auto rounds = static_cast<double>(ceil_div(heads_kv * splits, threads));
    const double time = rounds * (static_cast<double>(ceil_div(tiles, splits)) + kSplitCost);
    if (time >= best) continue;
    best = time;
    s.splits = splits;
  }
  s.split_rows = ceil_div(tiles, s.splits) * kTileRows;
  s.splits = ceil_div(call.k.shape[2], s.split_rows);
  const std::int64_t row_bytes = (call.q.shape[3] + call.v.shape[3]) * 2 * static_cast<std::int64_t>(sizeof(float));
  s.chunk_rows = std::clamp<std::int64_t>(kChunkBytes / row_bytes / kTileRows * kTileRows, kTileRows, kMaxChunkRows);
  s.chunk_rows = std::min(s.chunk_rows, s.split_rows);
  s.tasks = heads_kv * s.splits;
  s.runs = accumulates ? std::min<std::int64_t>(s.tasks, threads) : s.tasks;
  return s;
}

// Whether something is added up in accumulators of a run.
bool accumulates(std::span<const SinkFacts> sinks) {
  return std::any_of(sinks.begin(), sinks.end(), [](const SinkFacts& sink) { return !sink.injective; });
}

// What a level distinguishes within a chunk: places of the sums, in floats.
std::int64_t level_places(SinkLevel level, const ForwardCall& call, const Schedule& s) {
  const std::int64_t rows = std::max<std::int64_t>(call.q.shape[2], kPanelLanes);
  switch (level) {
    case SinkLevel::kBlock:
      return kPanelLanes;
    case SinkLevel::kRow:
      return rows;
    case SinkLevel::kColumn:
      return s.chunk_rows;
    case SinkLevel::kDiagonal:
      return rows + s.chunk_rows;
    case SinkLevel::kElement:
      return 0;
  }
  return 0;
}

Layout layout(const ForwardCall& call, const WantedGradients& wants, const compiler::CpuGradientTile& tile,
              const Schedule& s, int threads) {
  Layout l;
  std::int64_t size = 0;
  const auto take = [&size](std::int64_t floats) {
    const std::int64_t start = size;
    size += round_up(floats, 16);
    return start;
  };
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t head_dim_v = call.v.shape[3];
  const std::int64_t heads = call.q.shape[0] * call.q.shape[1];
  const std::vector<SinkFacts>& sinks = tile.facts().sinks;

  l.row_lse = take(heads * s.panels * kPanelLanes);
  l.row_delta = take(heads * s.panels * kPanelLanes);
  l.dq_split = heads * s.panels * head_dim * kPanelLanes;
  l.dq_sum = take(wants.dq ? s.splits * l.dq_split : 0);
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    Accumulator& a = l.captures[i];
    a.wanted = (wants.captures >> i & 1) != 0;
    if (!a.wanted) continue;
    a.elements = elements(call.captures[i]);
    for (const SinkFacts& sink : sinks)
      if (sink.capture == static_cast<int>(i)) a.copies = sink.injective ? 1 : s.runs;
    a.stride = round_up(a.elements, 16);
    a.start = take(a.copies * a.stride);
  }

  l.threads = size;
  size = 0;
  l.queries = take(head_dim * kPanelLanes);
  l.query_rows = take(padded(head_dim) * kPanelLanes);
  l.grad_out = take(head_dim_v * kPanelLanes);
  l.grad_out_rows = take(padded(head_dim_v) * kPanelLanes);
  l.scores = take(kTileRows * kPanelLanes);
  l.gradients = take(kTileRows * kPanelLanes);
  l.keys = take(s.chunk_rows * head_dim);
  l.values = take(s.chunk_rows * head_dim_v);
  l.dk = take(wants.dk ? s.chunk_rows * padded(head_dim) : 0);
  l.dv = take(wants.dv ? s.chunk_rows * padded(head_dim_v) : 0);
  l.staged = take(static_cast<std::int64_t>(tile.staged().size()) * kStagedSize);
  const auto num_sinks = static_cast<std::int64_t>(sinks.size());
  l.contributions = take(num_sinks * kTileRows * kPanelLanes);
  const bool placed = std::ranges::count(tile.places(), CpuPlaces::kTile) > 0;
  l.places = take(placed ? num_sinks * kTileRows * kPanelLanes * 2 : 0);
  l.level_sums = size;
  for (const SinkFacts& sink : sinks) take(level_places(sink.level, call, s));
  l.level_size = size - l.level_sums;
  l.offsets = take(num_sinks * 2);
  l.shifts = take(num_sinks);
  l.thread_size = size;
  // Fewer runs than threads keep the rest of them idle.
  l.size = l.threads + l.thread_size * std::min<std::int64_t>(threads, s.runs);
  return l;
}

// Everything tasks share.
struct Pass {
  const ForwardCall& call;
  const Gradients& gradients;
  const cpu::Products& products;
  const compiler::CpuGradientTile& tile;
  cpu::TileFacts facts;
  std::span<const SinkFacts> sinks;
  WantedGradients wants;
  Schedule schedule;
  Layout layout;
  float* workspace;
  const cpu::CapturedView* captured;
  // By capture number: in the workspace, or where one copy is all and it has the type and order for it the gradient.
  std::array<float*, dsl::kMaxCaptures> accumulators;
  cpu::Storage storage;
  ScoreScale factor;  // on the scores
  bool bf16;          // the products are computed on BF16 itself
};

// ---- What the tiles need of the forward

// lse as the tile takes it, and delta: both of one panel.
void prepare_panel(const Pass& pass, std::int64_t head, std::int64_t index) {
  const ForwardCall& call = pass.call;
  const RowView& grad_lse = pass.gradients.grad_lse;
  const std::int64_t head_dim_v = call.v.shape[3];
  const std::int64_t b = head / call.q.shape[1], h = head % call.q.shape[1];
  const Panel panel = panel_at(index, call.q.shape[2]);
  const std::int64_t start = (head * pass.schedule.panels + index) * kPanelLanes;
  float* const lse = pass.workspace + pass.layout.row_lse + start;
  float* const delta = pass.workspace + pass.layout.row_delta + start;
  std::fill_n(lse, kPanelLanes, kInfinity);
  std::fill_n(delta, kPanelLanes, 0.0f);
  for (std::int64_t lane = panel.first; lane < panel.lanes; ++lane) {
    const std::int64_t row = panel.start + lane;
    const float value = call.lse.data[b * call.lse.stride[0] + h * call.lse.stride[1] + row * call.lse.stride[2]];
    // A row that keeps nothing contributes nothing.
    if (value == -kInfinity) continue;
    // +inf means that to the tile; a row with such a score has no gradients.
    lse[lane] = value == kInfinity ? std::numeric_limits<float>::quiet_NaN() : value;
    alignas(64) float out[cpu::kMaxHeadDim], grad_out[cpu::kMaxHeadDim];
    pass.products.widen(at(call.o, b, h, row), pass.storage, 0, 1, head_dim_v, out, 0);
    pass.products.widen(at(pass.gradients.grad_out, b, h, row), pass.storage, 0, 1, head_dim_v, grad_out, 0);
    double sums[8] = {};
    for (std::int64_t i = 0; i < head_dim_v; ++i) sums[i % 8] += static_cast<double>(out[i]) * grad_out[i];
    double sum = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    if (grad_lse.data) sum -= grad_lse.data[b * grad_lse.stride[0] + h * grad_lse.stride[1] + row * grad_lse.stride[2]];
    delta[lane] = static_cast<float>(sum);
  }
}

// ---- Captured gradients

// A query head's elements within a chunk of keys, and who works on them.
struct Place {
  std::int64_t b, h;
  std::int64_t chunk;       // first key of the chunk
  std::int64_t chunk_rows;  // that it has
  std::int64_t run;
  float* scratch;  // the thread's
};

float* accumulator_of(const Pass& pass, const SinkFacts& sink, std::int64_t run) {
  const Accumulator& a = pass.layout.captures[static_cast<std::size_t>(sink.capture)];
  return pass.accumulators[static_cast<std::size_t>(sink.capture)] + (sink.injective ? 0 : run * a.stride);
}

// Where each sink has an element's place.
const long long* offsets_at(const Pass& pass, const Place& place, std::int64_t q_idx, std::int64_t kv_idx) {
  auto* const offsets = reinterpret_cast<long long*>(place.scratch + pass.layout.offsets);
  pass.tile.sink_offsets()(place.b, place.h, q_idx, kv_idx, pass.captured, offsets);
  return offsets;
}

// Adds up what a tile has written to its contributions: of what its level does not distinguish, to the level's sums;
// element by element to the accumulator.
void add_tile(const Pass& pass, const Place& place, const Panel& panel, std::int64_t kv_in_chunk, std::int64_t rows) {
  const Layout& l = pass.layout;
  const cpu::Products& products = pass.products;
  float* sums = place.scratch + l.level_sums;
  for (std::size_t i = 0; i < pass.sinks.size(); ++i) {
    const SinkFacts& sink = pass.sinks[i];
    const auto part = static_cast<std::int64_t>(i) * kStagedSize;
    const float* const values = place.scratch + l.contributions + part;
    if (!sink.row_shift) {
      switch (sink.level) {
        case SinkLevel::kBlock:
          products.sum_rows(values, rows, sums);
          break;
        case SinkLevel::kRow:
          products.sum_rows(values, rows, sums + panel.start);
          break;
        case SinkLevel::kColumn:
          products.sum_lanes(values, rows, sums + kv_in_chunk);
          break;
        case SinkLevel::kDiagonal:
          products.sum_diagonals(values, rows,
                                 sums + panel.start - (kv_in_chunk + rows - 1) + pass.schedule.chunk_rows - 1);
          break;
        case SinkLevel::kElement: {
          float* const out = accumulator_of(pass, sink, place.run);
          if (pass.tile.places()[i] == CpuPlaces::kTile) {
            const auto* const places = reinterpret_cast<const long long*>(place.scratch + l.places) + part;
            for (std::int64_t row = 0; row < rows; ++row) {
              for (std::int64_t lane = panel.first; lane < panel.lanes; ++lane)
                out[places[row * kPanelLanes + lane]] += values[row * kPanelLanes + lane];
            }
          } else {
            float* rows_of[kPanelLanes] = {};
            for (std::int64_t lane = panel.first; lane < panel.lanes; ++lane)
              rows_of[lane] = out + offsets_at(pass, place, panel.start + lane, place.chunk + kv_in_chunk)[i];
            products.unstage(values, rows, panel.first, panel.lanes, sink.injective, rows_of);
          }
          break;
        }
      }
    }
    sums += round_up(level_places(sink.level, pass.call, pass.schedule), 16);
  }
}

// Adds a chunk's sums of the sinks of one level to the accumulators: `count` of them from `first` on, each at the place
// of the element that position(index) gives.
template <typename Position>
void add_level(const Pass& pass, const Place& place, SinkLevel level, std::int64_t first, std::int64_t count,
               Position&& position) {
  const auto of_level = [level](const SinkFacts& sink) { return sink.level == level && !sink.row_shift; };
  if (std::ranges::none_of(pass.sinks, of_level)) return;
  for (std::int64_t index = first; index < first + count; ++index) {
    const auto [q_idx, kv_idx] = position(index);
    const long long* const offsets = offsets_at(pass, place, q_idx, kv_idx);
    const float* sums = place.scratch + pass.layout.level_sums;
    for (std::size_t i = 0; i < pass.sinks.size(); ++i) {
      const SinkFacts& sink = pass.sinks[i];
      if (of_level(sink)) {
        float sum = sums[index];
        if (level == SinkLevel::kBlock)
          for (std::int64_t lane = 1; lane < kPanelLanes; ++lane) sum += sums[lane];
        accumulator_of(pass, sink, place.run)[offsets[i]] += sum;
      }
      sums += round_up(level_places(sink.level, pass.call, pass.schedule), 16);
    }
  }
}

void add_levels(const Pass& pass, const Place& place) {
  using Position = std::pair<std::int64_t, std::int64_t>;
  const std::int64_t seqlen_q = pass.call.q.shape[2];
  const std::int64_t chunk = place.chunk;
  add_level(pass, place, SinkLevel::kBlock, 0, 1, [&](std::int64_t) { return Position(0, chunk); });
  add_level(pass, place, SinkLevel::kRow, 0, seqlen_q, [&](std::int64_t q) { return Position(q, chunk); });
  add_level(pass, place, SinkLevel::kColumn, 0, place.chunk_rows,
            [&](std::int64_t kv) { return Position(0, chunk + kv); });
  // The difference 0, counted from the chunk's first key.
  const std::int64_t zero = pass.schedule.chunk_rows - 1;
  add_level(pass, place, SinkLevel::kDiagonal, zero - (place.chunk_rows - 1), seqlen_q + place.chunk_rows - 1,
            [&](std::int64_t index) {
              const std::int64_t q = std::max<std::int64_t>(0, index - zero);
              return Position(q, chunk + q - (index - zero));
            });
}

// What flows into lse reaches the terms that softmax does not see, once per row.
void add_row_shifts(const Pass& pass, const Place& place) {
  const RowView& grad_lse = pass.gradients.grad_lse;
  if (!pass.tile.row_shifts() || !grad_lse.data) return;
  float* const values = place.scratch + pass.layout.shifts;
  const RowView& lse = pass.call.lse;
  for (std::int64_t row = 0; row < pass.call.q.shape[2]; ++row) {
    const float gradient =
        grad_lse.data[place.b * grad_lse.stride[0] + place.h * grad_lse.stride[1] + row * grad_lse.stride[2]];
    const bool empty = lse.data[place.b * lse.stride[0] + place.h * lse.stride[1] + row * lse.stride[2]] == -kInfinity;
    if (empty || gradient == 0.0f) continue;
    pass.tile.row_shifts()(place.b, place.h, row, pass.captured, gradient, values);
    const long long* const offsets = offsets_at(pass, place, row, 0);
    for (std::size_t i = 0; i < pass.sinks.size(); ++i)
      if (pass.sinks[i].row_shift) accumulator_of(pass, pass.sinks[i], place.run)[offsets[i]] += values[i];
  }
}

// Adds up a captured gradient's accumulators over [first, first + count), and writes it in the tensor's type and order.
void store_capture(const Pass& pass, std::size_t number, std::int64_t first, std::int64_t count) {
  const Accumulator& a = pass.layout.captures[number];
  const dsl::CaptureView& capture = pass.call.captures[number];
  const CaptureGradient& gradient = pass.gradients.captures[number];
  const std::int64_t size = dsl::dtype_size(capture.dtype);
  const std::int64_t last_extent = capture.rank ? capture.extent[capture.rank - 1] : 1;
  const std::int64_t last_stride = capture.rank ? gradient.stride[capture.rank - 1] : 1;
  for (std::int64_t done = 0; done < count;) {
    // A run along the innermost dimension.
    std::int64_t rest = first + done;
    std::int64_t offset = 0;
    for (int d = capture.rank; d-- > 0;) {
      offset += rest % capture.extent[d] * gradient.stride[d];
      rest /= capture.extent[d];
    }
    const std::int64_t run =
        std::min({std::int64_t{cpu::kMaxHeadDim}, count - done, last_extent - (first + done) % last_extent});
    alignas(64) float sums[cpu::kMaxHeadDim] = {};
    for (std::int64_t copy = 0; copy < a.copies; ++copy) {
      const float* const from = pass.accumulators[number] + copy * a.stride + first + done;
      for (std::int64_t i = 0; i < run; ++i) sums[i] += from[i];
    }
    char* const out = static_cast<char*>(gradient.data) + offset * size;
    if (last_stride == 1) {
      pass.products.narrow(sums, 0, 1.0f, 1, run, out, storage_of(capture.dtype), 0);
    } else {
      alignas(64) char packed[cpu::kMaxHeadDim * sizeof(float)];
      pass.products.narrow(sums, 0, 1.0f, 1, run, packed, storage_of(capture.dtype), 0);
      for (std::int64_t i = 0; i < run; ++i)
        std::memcpy(out + i * last_stride * size, packed + i * size, static_cast<std::size_t>(size));
    }
    done += run;
  }
}

// ---- The passes

// The lanes of a panel of q or grad_out: the features' columns, and the rows. Lanes beyond the end are 0 in both.
void load_lanes(const Pass& pass, const TensorView& t, const Place& place, const Panel& panel, float* columns,
                float* rows) {
  const std::int64_t width = t.shape[3];
  const void* const from = at(t, place.b, place.h, panel.start);
  if (pass.bf16) {
    // Columns that pad a row are the next row's, or what stands behind: what comes of them is not stored.
    const auto* const halves = static_cast<const std::uint16_t*>(from);
    pass.products.load_panel_bf16(halves, t.stride[2], panel.lanes, width, columns);
    pass.products.pair_rows_bf16(halves, t.stride[2], panel.lanes, width, rows);
    const std::int64_t pairs = (panel.lanes + 1) / 2;
    std::fill_n(rows + pairs * width, (kPanelLanes / 2 - pairs) * width, 0.0f);
  } else {
    pass.products.load_panel(from, pass.storage, t.stride[2], panel.lanes, width, columns);
    pass.products.widen(from, pass.storage, t.stride[2], panel.lanes, width, rows, padded(width));
    for (std::int64_t lane = panel.lanes; lane < kPanelLanes; ++lane)
      std::fill_n(rows + lane * padded(width), width, 0.0f);
  }
}

// out[row][lane] = factor times the product of rows of k or v, from `first` in the chunk on, and a panel's columns.
void transposed_product(const Pass& pass, const TensorView& t, const Place& place, std::int64_t first,
                        std::int64_t rows, const float* chunk, const float* columns, float factor, float* out) {
  const std::int64_t width = t.shape[3];
  if (pass.bf16) {
    const char* const from = at(t, place.b, place.h / pass.schedule.group, place.chunk + first);
    pass.products.qk_bf16(reinterpret_cast<const std::uint16_t*>(from), t.stride[2], rows, width, columns, factor, out);
  } else {
    pass.products.qk(chunk + first * width, width, rows, width, columns, factor, out);
  }
}

// A panel's number in all heads.
std::int64_t panel_number(const Pass& pass, const Place& place, std::int64_t index) {
  return (place.b * pass.call.q.shape[1] + place.h) * pass.schedule.panels + index;
}

// Where a panel's dQ of a split is summed.
float* dq_of(const Pass& pass, const Place& place, std::int64_t index, std::int64_t split) {
  return pass.workspace + pass.layout.dq_sum + split * pass.layout.dq_split +
         panel_number(pass, place, index) * pass.call.q.shape[3] * kPanelLanes;
}

// One panel of queries of a head against a chunk of keys.
void run_panel(const Pass& pass, const Place& place, std::int64_t index, std::int64_t split) {
  const ForwardCall& call = pass.call;
  const cpu::Products& products = pass.products;
  const Layout& l = pass.layout;
  float* const scratch = place.scratch;
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t head_dim_v = call.v.shape[3];
  const Panel panel = panel_at(index, call.q.shape[2]);
  const std::int64_t number = panel_number(pass, place, index);
  const bool scores_matter = pass.wants.dq || pass.wants.dk || !pass.sinks.empty();

  float* const dq = dq_of(pass, place, index, split);
  bool loaded = false;

  for (std::int64_t block = 0; block < place.chunk_rows; block += kTileRows) {
    const KeySpan span = needed_keys(pass.facts, pass.captured, place.b, place.h, panel, place.chunk + block,
                                     std::min<std::int64_t>(kTileRows, place.chunk_rows - block));
    if (span.count == 0) continue;
    const std::int64_t kv = block + span.first, rows = span.count;
    if (!loaded) {
      load_lanes(pass, call.q, place, panel, scratch + l.queries, scratch + l.query_rows);
      load_lanes(pass, pass.gradients.grad_out, place, panel, scratch + l.grad_out, scratch + l.grad_out_rows);
      loaded = true;
    }
    const cpu::GradientTileParams params{.scores = scratch + l.scores,
                                         .gradients = scratch + l.gradients,
                                         .lse = pass.workspace + l.row_lse + number * kPanelLanes,
                                         .delta = pass.workspace + l.row_delta + number * kPanelLanes,
                                         .b = place.b,
                                         .h = place.h,
                                         .q_idx = panel.start,
                                         .kv_idx = place.chunk + kv,
                                         .rows = rows,
                                         .captured = pass.captured,
                                         .staged = scratch + l.staged,
                                         .contributions = scratch + l.contributions,
                                         .places = reinterpret_cast<long long*>(scratch + l.places)};
    const cpu::TileParams lanes{.b = params.b,
                                .h = params.h,
                                .q_idx = params.q_idx,
                                .kv_idx = params.kv_idx,
                                .rows = rows,
                                .captured = params.captured};
    score_and_stage(products, pass.tile.staged(), pass.tile.rows(), lanes, scratch + l.staged,
                    [&](std::int64_t first, std::int64_t count) {
                      float* const scores = params.scores + first * kPanelLanes;
                      transposed_product(pass, pass.call.k, place, kv + first, count, scratch + l.keys,
                                         scratch + l.queries, pass.factor.main, scores);
                      if (pass.factor.rest != 1.0f)
                        for (std::int64_t i = 0; i < count * kPanelLanes; ++i) scores[i] *= pass.factor.rest;
                    });
    if (scores_matter) {
      transposed_product(pass, pass.call.v, place, kv, rows, scratch + l.values, scratch + l.grad_out, 1.0f,
                         params.gradients);
    } else {
      std::fill_n(params.gradients, rows * kPanelLanes, 0.0f);
    }
    pass.tile.function()(&params);
    if (!pass.sinks.empty()) add_tile(pass, place, panel, kv, rows);
    float* const dv = scratch + l.dv + kv * padded(head_dim_v);
    float* const dk = scratch + l.dk + kv * padded(head_dim);
    if (pass.bf16) {
      if (pass.wants.dv) {
        products.pair_lanes_bf16(params.scores, rows, params.scores);
        products.add_lanes_bf16(scratch + l.grad_out_rows, head_dim_v, rows, padded(head_dim_v), params.scores, dv,
                                padded(head_dim_v));
      }
      if (pass.wants.dk) {
        // P is spent.
        products.pair_lanes_bf16(params.gradients, rows, params.scores);
        products.add_lanes_bf16(scratch + l.query_rows, head_dim, rows, padded(head_dim), params.scores, dk,
                                padded(head_dim));
      }
      if (pass.wants.dq)
        products.pv_bf16(scratch + l.keys + kv / 2 * head_dim, rows, head_dim, params.gradients, kKept.data(), dq);
    } else {
      if (pass.wants.dv) {
        products.add_lanes(scratch + l.grad_out_rows, padded(head_dim_v), rows, padded(head_dim_v), params.scores, dv,
                           padded(head_dim_v));
      }
      if (pass.wants.dk) {
        products.add_lanes(scratch + l.query_rows, padded(head_dim), rows, padded(head_dim), params.gradients, dk,
                           padded(head_dim));
      }
      if (pass.wants.dq)
        products.pv(scratch + l.keys + kv * head_dim, head_dim, rows, head_dim, params.gradients, kKept.data(), dq);
    }
  }
}

// The queries of a head that may see some key of a chunk.
cpu::IndexRange queries_of(const Pass& pass, const Place& place) {
  const std::int64_t seqlen_q = pass.call.q.shape[2];
  cpu::IndexRange range = {0, seqlen_q - 1};
  if (!pass.facts.q_range || seqlen_q == 0) return range;
  const cpu::Tile tile = tile_of(place.b, place.h, 0, seqlen_q, place.chunk, place.chunk_rows);
  pass.facts.q_range(&tile, pass.captured, &range);
  return range;
}

void run_task(const Pass& pass, std::int64_t task, std::int64_t run, int thread) {
  const ForwardCall& call = pass.call;
  const Schedule& s = pass.schedule;
  const Layout& l = pass.layout;
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t head_dim_v = call.v.shape[3];
  const std::int64_t heads_kv = s.tasks / s.splits;
  const std::int64_t split = task / heads_kv;
  const std::int64_t head = task % heads_kv;
  const std::int64_t b = head / call.k.shape[1], head_kv = head % call.k.shape[1];
  const std::int64_t end = std::min((split + 1) * s.split_rows, call.k.shape[2]);
  float* const scratch = pass.workspace + l.threads + thread * l.thread_size;
  // The columns that pad rows; nothing else writes there.
  std::fill_n(scratch + l.query_rows, kPanelLanes * padded(head_dim), 0.0f);
  std::fill_n(scratch + l.grad_out_rows, kPanelLanes * padded(head_dim_v), 0.0f);

  for (std::int64_t chunk = split * s.split_rows; chunk < end; chunk += s.chunk_rows) {
    const std::int64_t rows = std::min(s.chunk_rows, end - chunk);
    const char* const k = at(call.k, b, head_kv, chunk);
    if (pass.bf16) {
      pass.products.pair_rows_bf16(reinterpret_cast<const std::uint16_t*>(k), call.k.stride[2], rows, head_dim,
                                   scratch + l.keys);
    } else {
      pass.products.widen(k, pass.storage, call.k.stride[2], rows, head_dim, scratch + l.keys, head_dim);
      pass.products.widen(at(call.v, b, head_kv, chunk), pass.storage, call.v.stride[2], rows, head_dim_v,
                          scratch + l.values, head_dim_v);
    }
    if (pass.wants.dk) std::fill_n(scratch + l.dk, rows * padded(head_dim), 0.0f);
    if (pass.wants.dv) std::fill_n(scratch + l.dv, rows * padded(head_dim_v), 0.0f);
    for (std::int64_t i = 0; i < s.group; ++i) {
      const Place place{
          .b = b, .h = head_kv * s.group + i, .chunk = chunk, .chunk_rows = rows, .run = run, .scratch = scratch};
      std::fill_n(scratch + l.level_sums, l.level_size, 0.0f);
      const cpu::IndexRange queries = queries_of(pass, place);
      for (std::int64_t index = 0; index < s.panels; ++index) {
        if (pass.wants.dq && chunk == split * s.split_rows)
          std::fill_n(dq_of(pass, place, index, split), head_dim * kPanelLanes, 0.0f);
        const Panel panel = panel_at(index, call.q.shape[2]);
        if (panel.start + panel.first <= queries.last && panel.start + panel.lanes > queries.first)
          run_panel(pass, place, index, split);
      }
      add_levels(pass, place);
      if (chunk == 0) add_row_shifts(pass, place);
    }
    if (pass.wants.dk) {
      const TensorView& dk = pass.gradients.dk;
      pass.products.narrow(scratch + l.dk, padded(head_dim), call.scale, rows, head_dim, at(dk, b, head_kv, chunk),
                           pass.storage, dk.stride[2]);
    }
    if (pass.wants.dv) {
      const TensorView& dv = pass.gradients.dv;
      pass.products.narrow(scratch + l.dv, padded(head_dim_v), 1.0f, rows, head_dim_v, at(dv, b, head_kv, chunk),
                           pass.storage, dv.stride[2]);
    }
  }
}

// Adds up the splits of dq of one panel, and stores it.
void store_dq(const Pass& pass, std::int64_t head, std::int64_t index) {
  const ForwardCall& call = pass.call;
  const Layout& l = pass.layout;
  const TensorView& dq = pass.gradients.dq;
  const std::int64_t head_dim = call.q.shape[3];
  const std::int64_t size = head_dim * kPanelLanes;
  float* const sum = pass.workspace + l.dq_sum + (head * pass.schedule.panels + index) * size;
  for (std::int64_t split = 1; split < pass.schedule.splits; ++split) {
    const float* const part = sum + split * l.dq_split;
    for (std::int64_t i = 0; i < size; ++i) sum[i] += part[i];
  }
  alignas(64) float factor[kPanelLanes];
  std::fill_n(factor, kPanelLanes, call.scale);
  const Panel panel = panel_at(index, call.q.shape[2]);
  const std::int64_t b = head / call.q.shape[1], h = head % call.q.shape[1];
  pass.products.store_panel(sum, factor, panel.first, panel.lanes, head_dim, at(dq, b, h, panel.start), pass.storage,
                            dq.stride[2]);
}

}  // namespace

std::size_t cpu_backward_workspace_size(const ForwardCall& call, const WantedGradients& wants,
                                        const compiler::CpuGradientTile& tile, int threads) {
  const Schedule s = schedule(call, accumulates(tile.facts().sinks), tile.facts().knows_tiles, threads);
  return static_cast<std::size_t>(layout(call, wants, tile, s, threads).size) * sizeof(float);
}

void cpu_backward(const ForwardCall& call, const Gradients& gradients, const compiler::CpuGradientTile& tile,
                  compiler::CpuIsa isa, void* workspace, ThreadPool& pool) {
  const CapturedTable captured = captured_table(call);
  const std::span<const SinkFacts> sinks = tile.facts().sinks;
  const Schedule s = schedule(call, accumulates(sinks), tile.facts().knows_tiles, pool.size());
  const WantedGradients wants = wanted(call, gradients);
  const cpu::Products& products = cpu::products(static_cast<int>(isa));
  const cpu::Storage storage = storage_of(call.q.dtype);
  const Layout l = layout(call, wants, tile, s, pool.size());
  std::array<float*, dsl::kMaxCaptures> accumulators{};
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    const bool in_place = l.captures[i].copies == 1 && is_packed_f32(call.captures[i], gradients.captures[i]);
    accumulators[i] = in_place ? static_cast<float*>(gradients.captures[i].data)
                               : static_cast<float*>(workspace) + l.captures[i].start;
  }
  const Pass pass{.call = call,
                  .gradients = gradients,
                  .products = products,
                  .tile = tile,
                  .facts = tile.tile_facts(),
                  .sinks = sinks,
                  .wants = wants,
                  .schedule = s,
                  .layout = l,
                  .workspace = static_cast<float*>(workspace),
                  .captured = captured.data(),
                  .accumulators = accumulators,
                  .storage = storage,
                  .factor = score_scale(call.scale, 1.0),
                  // An odd head dim has no pairs.
                  .bf16 = storage == cpu::Storage::kBF16 && products.qk_bf16 && call.q.shape[3] % 2 == 0 &&
                          call.v.shape[3] % 2 == 0};
  const std::int64_t heads = call.q.shape[0] * call.q.shape[1];
  const std::int64_t rows = heads * s.panels;
  pool.parallel_for(rows, [&](std::int64_t task, int) { prepare_panel(pass, task / s.panels, task % s.panels); });
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    const Accumulator& a = l.captures[i];
    const std::int64_t size = a.copies > 1 ? a.copies * a.stride : a.copies * a.elements;
    pool.parallel_for(ceil_div(size, kBlockElements), [&](std::int64_t task, int) {
      const std::int64_t first = task * kBlockElements;
      std::fill_n(pass.accumulators[i] + first, std::min(kBlockElements, size - first), 0.0f);
    });
  }
  pool.parallel_for(s.runs, [&](std::int64_t run, int thread) {
    for (std::int64_t round = 0; round * s.runs < s.tasks; ++round)
      if (const std::int64_t task = task_of_run(s, run, round); task < s.tasks) run_task(pass, task, run, thread);
  });
  if (pass.wants.dq)
    pool.parallel_for(rows, [&](std::int64_t task, int) { store_dq(pass, task / s.panels, task % s.panels); });
  for (std::size_t i = 0; i < call.num_captures; ++i) {
    const Accumulator& a = l.captures[i];
    if (!a.wanted || pass.accumulators[i] == gradients.captures[i].data) continue;
    pool.parallel_for(ceil_div(a.elements, kBlockElements), [&](std::int64_t task, int) {
      const std::int64_t first = task * kBlockElements;
      store_capture(pass, i, first, std::min(kBlockElements, a.elements - first));
    });
  }
}

}  // namespace attnjit::runtime
