// One numerics problem as one line of text, which can be pasted back: `attnjit_numerics --case '...'`.
#pragma once

#include <attnjit/attnjit.h>

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "dsl/expr.h"
#include "tests/numerics/target.h"

namespace attnjit::numerics {

// How a 4-D tensor lies in memory.
enum class Layout : std::uint8_t {
  kPacked,          // B, H, S, D contiguous
  kBshd,            // B, S, H, D contiguous, seen as B, H, S, D
  kPadded,          // gaps of poison after every row, head and batch
  kAligned,         // the same in steps of eight elements: rows of 16-bit types stay aligned to 16 bytes
  kBroadcastBatch,  // stride 0 over batches; inputs only
  kBroadcastHead,   // stride 0 over heads; inputs only
  kBroadcastSeq,    // stride 0 over the sequence; inputs only
  kHuge,            // more than 2^31 elements from one batch to the next (sparse memory)
};

// What q, k and v hold.
enum class Inputs : std::uint8_t {
  kNormal,    // standard normal
  kLarge,     // q eight times as large: the softmax is near to one-hot
  kPositive,  // no cancellation: every sum's rounding errors are at their largest
  kZero,      // q is zero: every score is exactly 0
  kPoisoned,  // normal; K rows that no query keeps hold NaN and infinity
  // Scores that grow along the keys: what a softmax whose reference lags behind them cannot hold.
  kRising,        // k grows to 8 times as large
  kFalling,       // the same from the last key to the first
  kSteep,         // q and k are positive, k grows to 100 times as large
  kSteepFalling,  // the same from the last key to the first
  kOutliers,      // three keys of each head score 200, of every other one 5000, above the rest for most queries, below
                  // it for the others
  kInfinite,      // rising; every 50th key has an infinite feature: its scores are infinite, of either sign
  kHugeValues,    // rising; v is as large as its type holds, or its float32 sums can
};

// How a captured tensor is filled.
enum class Fill : std::uint8_t {
  kNormal,     // floats: standard normal; ints: uniform in [-4, 4]; bools: fair
  kDocuments,  // non-decreasing from 0 along the last dimension
  kIndex,      // uniform in [-2, 200]: positions, some out of range
  kPoison,     // like kNormal, one value in four NaN, infinity or the type's extreme
  kBlocks,     // i // 64 along the last dimension: documents as long as tiles
};

struct CaptureSpec {
  std::string name;
  dsl::DType dtype = dsl::DType::kF32;
  std::vector<std::int64_t> extent;
  Layout layout = Layout::kPacked;  // kPacked, kPadded (gaps), kBshd (dimensions reversed), kBroadcastBatch (dim 0)
  Fill fill = Fill::kNormal;
};

// A captured tensor whose gradient is wanted, and how that lies in memory (kPacked, kPadded, kBshd).
struct GradientSpec {
  std::string name;
  Layout layout = Layout::kPacked;
};

// What is asked of the backward. Nothing wanted: the case is one of the forward.
struct BackwardSpec {
  bool dq = false, dk = false, dv = false;
  std::vector<GradientSpec> captures = {};
  // Captured tensors that only shift whole rows: their gradients are the reduction of grad_lse, and zero without it.
  std::vector<std::string> row_shifts = {};
  bool grad_lse = false;
  bool deterministic = false;
  bool partial_keys = false;  // o and lse may be of more keys: row shifts are summed as any other
  bool own_forward = false;   // o and lse are the library's own, not gold ones rounded to their types
  Layout layout_grad_out = Layout::kPacked;
  Layout layout_dq = Layout::kPacked, layout_dk = Layout::kPacked, layout_dv = Layout::kPacked;

  bool wanted() const { return dq || dk || dv || !captures.empty(); }
  bool shifts_rows(std::string_view name) const;
};

struct Case {
  std::int64_t batch = 1, num_heads = 1, num_heads_kv = 1;
  std::int64_t seqlen_q = 1, seqlen_kv = 1;
  std::int64_t head_dim = 16, head_dim_v = 16;
  dsl::DType dtype = dsl::DType::kF32;
  Layout layout_q = Layout::kPacked, layout_k = Layout::kPacked, layout_v = Layout::kPacked;
  Layout layout_o = Layout::kPacked;
  Inputs inputs = Inputs::kNormal;
  std::optional<float> scale = {};  // none: 1 / sqrt(head_dim)
  std::string score_mod = "score";
  std::string mask_mod = {};  // empty: none
  std::vector<CaptureSpec> captures = {};
  BackwardSpec backward = {};
  std::string device = target().device;    // "cpu" or "cuda"
  std::string backend = target().fused();  // any that the library names
  int threads = 2;
  std::int64_t rows = 96;  // most query rows of a forward that are judged
  std::uint64_t seed = 1;

  double effective_scale() const;
};

// `b=2 hq=4 ... score_mod="score + bias[h]" capture=bias:float32:4:packed:normal seed=7`. Every field, in this order.
std::string to_line(const Case& problem);

// Fields may be left out and stand in any order. On a mistake returns false and says it in `error`.
bool parse_case(std::string_view line, Case* problem, std::string* error);

// The library's backend of that name; none where it knows no such name.
std::optional<attnjit_backend> backend_of(std::string_view name);

// A counter-based generator: the same numbers on every platform.
class Random {
 public:
  explicit Random(std::uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15ull + 0x632be59bd9b4e019ull) {}
  std::uint64_t next();
  std::int64_t between(std::int64_t low, std::int64_t high);  // both included
  double uniform();                                           // [0, 1)
  double normal();
  template <typename Container>
  const auto& pick(const Container& options) {
    return options[static_cast<std::size_t>(between(0, static_cast<std::int64_t>(std::size(options)) - 1))];
  }

 private:
  std::uint64_t state_;
};

}  // namespace attnjit::numerics
