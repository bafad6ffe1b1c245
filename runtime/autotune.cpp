// The race, the memory it runs over, and what is stored of it.
#include "runtime/autotune.h"

#include <fmt/format.h>

#define XXH_INLINE_ALL
#include <xxhash.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <future>
#include <limits>
#include <random>
#include <utility>
#include <vector>

namespace attnjit::runtime {
namespace {

constexpr std::string_view kFormat = "attnjit autotune 2";

// Contestants take turns, so that a clock that drifts hits all of them; the shortest sample of each counts.
constexpr int kRounds = 7, kFewestRounds = 2;
constexpr double kBudgetMs = 1000;  // of the device; after it no further round begins
constexpr double kSampleMs = 0.5;   // as many launches as fill it: one alone may be shorter than the clock's step
constexpr int kMostLaunches = 64;
// What another one must be faster by than the usual one: less is noise.
constexpr double kMargin = 0.01;

// ---- Memory to run over

constexpr std::size_t kPatternBytes = std::size_t{1} << 20;
constexpr std::uint64_t kLargest = std::uint64_t{1} << 42;  // bytes of one tensor: no device has more

std::uint16_t to_f16(float value) {  // of |value| from 2^-14 to 65504, or 0
  std::uint32_t bits = 0;
  std::memcpy(&bits, &value, sizeof(bits));
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  const std::uint32_t half = magnitude < 0x38800000u ? 0 : (magnitude - 0x38000000u) >> 13;
  return static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | half);
}

// Numbers as attention has them: with zeros a GPU draws less power, and its clock rises.
std::vector<char> normal_pattern(dsl::DType dtype) {
  std::vector<char> pattern(kPatternBytes);
  const auto size = static_cast<std::size_t>(dsl::dtype_size(dtype));
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (std::size_t at = 0; at < pattern.size(); at += size) {
    const float value = normal(random);
    std::uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof(bits));
    if (dtype == dsl::DType::kBF16) bits >>= 16;
    if (dtype == dsl::DType::kF16) bits = to_f16(value);
    std::memcpy(&pattern[at], &bits, size);
  }
  return pattern;
}

// 1 in an element's type: a small index, a harmless factor or divisor, an element that is kept.
std::uint64_t one(dsl::DType dtype) {
  switch (dtype) {
    case dsl::DType::kF32:
      return 0x3f800000u;
    case dsl::DType::kF16:
      return 0x3c00u;
    case dsl::DType::kBF16:
      return 0x3f80u;
    default:
      return 1;
  }
}

// What is repeated over a captured tensor of integers whose values along `dimension` decide which tiles are computed:
// they rise from 0 to 7, as the numbers of documents do. With one value everywhere a mask would drop nothing, and what
// is timed would not be what runs. Empty where the pattern would be too long.
std::vector<char> rising_pattern(const dsl::CaptureView& view, int dimension) {
  constexpr std::int64_t kSteps = 8;
  constexpr std::int64_t kMostBytes = std::int64_t{1} << 26;
  const std::int64_t extent = view.extent[dimension], stride = view.stride[dimension];
  const std::int64_t size = dsl::dtype_size(view.dtype);
  // Over all that lies inside the dimension, up to where the next one around it steps.
  std::int64_t period = 0;
  if (stride == 0 || __builtin_mul_overflow(stride, extent, &period)) return {};
  std::int64_t around = 0;
  for (int d = 0; d < view.rank; ++d) {
    if (d == dimension || view.stride[d] < period) continue;
    around = around == 0 ? view.stride[d] : std::min(around, view.stride[d]);
  }
  period = std::max(period, around);
  if (period > kMostBytes / size) return {};
  std::vector<char> pattern(static_cast<std::size_t>(period * size));
  for (std::int64_t i = 0; i < period; ++i) {
    const std::int64_t value = kSteps * std::min(i / stride, extent - 1) / extent;
    // Little-endian, as every machine with a CUDA device is.
    std::memcpy(&pattern[static_cast<std::size_t>(i * size)], &value, static_cast<std::size_t>(size));
  }
  return pattern;
}

// Bytes from a tensor's first element to behind its last one.
std::uint64_t reach(const std::int64_t* shape, const std::int64_t* stride, int rank, std::uint64_t element) {
  std::uint64_t last = 0;
  for (int d = 0; d < rank; ++d) {
    if (shape[d] == 0) return 0;
    std::uint64_t step = 0;
    if (__builtin_mul_overflow(static_cast<std::uint64_t>(shape[d] - 1), static_cast<std::uint64_t>(stride[d]),
                               &step) ||
        __builtin_add_overflow(last, step, &last) || last > kLargest) {
      return std::numeric_limits<std::uint64_t>::max();
    }
  }
  return (last + 1) * element;
}

// A call like another one, on memory of a workbench.
class Rehearsal {
 public:
  Rehearsal(const CheckedCall& call, CudaWorkbench& bench, std::span<const compiler::TileSummary> summaries)
      : bench_(bench), signature_(call.signature), forward_(call.forward), summaries_(summaries) {}
  Rehearsal(const Rehearsal&) = delete;
  Rehearsal& operator=(const Rehearsal&) = delete;

  Check set_up() {
    const std::vector<char> pattern = normal_pattern(forward_.q.dtype);
    for (TensorView* tensor : {&forward_.q, &forward_.k, &forward_.v}) {
      if (Check failure = place(*tensor, pattern)) return failure;
    }
    if (Check failure = place(forward_.o, {})) return failure;
    if (signature_.has_lse) {
      if (Check failure = place(forward_.lse)) return failure;
    }
    if (signature_.has_row_max) {
      if (Check failure = place(forward_.row_max)) return failure;
    }
    for (std::size_t i = 0; i < forward_.num_captures; ++i) {
      if (Check failure = place(i)) return failure;
    }
    forward_.captures = captures_.data();
    return {};
  }
  const ForwardCall& forward() const { return forward_; }

 private:
  // `pattern` empty: memory that is written only.
  Result<void*> memory(std::uint64_t size, std::span<const char> pattern) {
    if (size > kLargest) return Failure{ATTNJIT_OUT_OF_MEMORY, "a tensor is larger than any device"};
    if (size == 0) return static_cast<void*>(nullptr);
    Result<void*> found = bench_.allocate(size);
    if (!found || pattern.empty()) return found;
    if (Check failure = bench_.fill(*found, size, pattern.data(), pattern.size())) return *failure;
    return found;
  }
  Check place(TensorView& tensor, std::span<const char> pattern) {
    const auto element = static_cast<std::uint64_t>(dsl::dtype_size(tensor.dtype));
    Result<void*> found = memory(reach(tensor.shape, tensor.stride, 4, element), pattern);
    if (!found) return found.failure();
    tensor.data = *found;
    return {};
  }
  Check place(RowView& rows) {
    Result<void*> found = memory(reach(forward_.o.shape, rows.stride, 3, sizeof(float)), {});
    if (!found) return found.failure();
    rows.data = static_cast<float*>(*found);
    return {};
  }
  Check place(std::size_t capture) {
    dsl::CaptureView& view = captures_[capture] = forward_.captures[capture];
    const auto size = static_cast<std::size_t>(dsl::dtype_size(view.dtype));
    values_[capture] = one(view.dtype);
    const auto* const bytes = reinterpret_cast<const char*>(&values_[capture]);
    view.data = bytes;
    if (forward_.host_scalars >> capture & 1u) return {};
    std::vector<char> pattern;
    const auto summary = std::ranges::find(summaries_, static_cast<int>(capture), &compiler::TileSummary::capture);
    if (summary != summaries_.end() && view.dtype != dsl::DType::kBool) {
      pattern = rising_pattern(view, summary->dimension);
    }
    if (pattern.empty()) {
      pattern.resize(kPatternBytes);
      for (std::size_t at = 0; at < pattern.size(); at += size) std::copy_n(bytes, size, &pattern[at]);
    }
    Result<void*> found = memory(reach(view.extent, view.stride, view.rank, size), pattern);
    if (!found) return found.failure();
    view.data = *found;
    return {};
  }

  CudaWorkbench& bench_;
  const Signature& signature_;
  ForwardCall forward_;
  std::span<const compiler::TileSummary> summaries_;
  std::array<dsl::CaptureView, dsl::kMaxCaptures> captures_;
  std::array<std::uint64_t, dsl::kMaxCaptures> values_{};
};

// ---- The race

struct Lane {
  Contestant::Launch launch;
  std::string left_out;  // why it does not run
  int launches = 1;      // of a sample
  double ms = std::numeric_limits<double>::infinity();
};

// Compiles take half a second each.
std::vector<Lane> make_all(std::span<const Contestant> contestants) {
  std::vector<std::future<Result<Contestant::Launch>>> made;
  made.reserve(contestants.size());
  for (const Contestant& contestant : contestants) made.push_back(std::async(contestant.make));
  std::vector<Lane> lanes;
  for (auto& future : made) {
    Result<Contestant::Launch> launch = future.get();
    Lane& lane = lanes.emplace_back();
    if (launch) {
      lane.launch = std::move(*launch);
    } else {
      lane.left_out = launch.failure().message;
    }
  }
  return lanes;
}

Check race(const Request& request, const std::shared_ptr<CudaDevice>& device,
           std::span<const compiler::TileSummary> summaries, std::vector<Lane>& lanes) {
  Result<std::unique_ptr<CudaWorkbench>> bench = CudaWorkbench::create(device);
  if (!bench) return bench.failure();
  Rehearsal rehearsal(request.call, **bench, summaries);
  if (Check failure = rehearsal.set_up()) return failure;
  const auto sample = [&](const Lane& lane, int launches) {
    return (*bench)->milliseconds([&](CudaStream stream) -> Check {
      for (int i = 0; i < launches; ++i) {
        if (Check failure = lane.launch(rehearsal.forward(), stream)) return failure;
      }
      return {};
    });
  };
  double spent = 0;
  for (Lane& lane : lanes) {
    if (!lane.launch) continue;
    // The first launch brings the code to the device.
    for (int i = 0; i < 2; ++i) {
      const Result<double> took = sample(lane, 1);
      if (!took) return took.failure();
      spent += *took;
      lane.launches = static_cast<int>(
          std::clamp(std::ceil(kSampleMs / std::max(*took, 1e-3)), 1.0, static_cast<double>(kMostLaunches)));
    }
  }
  for (int round = 0; round < kRounds && (round < kFewestRounds || spent < kBudgetMs); ++round) {
    for (Lane& lane : lanes) {
      if (!lane.launch) continue;
      const Result<double> took = sample(lane, lane.launches);
      if (!took) return took.failure();
      spent += *took;
      lane.ms = std::min(lane.ms, *took / lane.launches);
    }
  }
  return {};
}

std::size_t fastest(const std::vector<Lane>& lanes) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < lanes.size(); ++i) {
    if (lanes[i].ms < lanes[best].ms) best = i;
  }
  return lanes[0].ms <= lanes[best].ms * (1 + kMargin) ? 0 : best;
}

// ---- What is stored

// A candidate's row as autotune() writes it.
bool is_candidate(const Json& row) {
  return row.is_object() && row.contains("config") && row["config"].is_string() &&
         ((row.contains("ms") && row["ms"].is_number()) || (row.contains("left_out") && row["left_out"].is_string()));
}

std::optional<Json> parse_stored(std::string_view payload) {
  Json stored = Json::parse(payload, nullptr, false);
  if (!stored.is_object() || stored.value("format", Json()) != kFormat) return std::nullopt;
  for (const char* name : {"about", "config"}) {
    if (!stored.contains(name) || !stored[name].is_string()) return std::nullopt;
  }
  if (!stored.contains("candidates") || !stored["candidates"].is_array() ||
      !std::ranges::all_of(stored["candidates"], is_candidate)) {
    return std::nullopt;
  }
  return stored;
}

std::string key_of(const Request& request, const CudaDevice& device, std::string_view problem) {
  const Signature& s = request.call.signature;
  const std::string text = fmt::format("{}\n{}\n{}\n{}\n{} {}\n{}", kFormat, ATTNJIT_VERSION, device.name(),
                                       device.driver_version(), s.has_lse, s.has_row_max, problem);
  const XXH128_hash_t hash = XXH3_128bits(text.data(), text.size());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace

Tuned autotune(const Request& request, const std::shared_ptr<CudaDevice>& device, std::string_view problem,
               std::span<const Contestant> contestants, std::string_view why_not,
               std::span<const compiler::TileSummary> summaries) {
  const Logger& logger = request.context.logger();
  const auto log = [&](LogLevel level, std::string_view text) {
    if (!logger.enabled(level)) return;
    logger.log(level, fmt::format("autotune, {}: {}", shape_text(request.call.signature), text));
  };
  Tuned tuned;
  const auto finish = [&](std::string why) {
    tuned.description["config"] = contestants[tuned.winner].name;
    tuned.description["why"] = std::move(why);
    return std::move(tuned);
  };
  const auto not_tuned = [&](std::string_view reason) {
    const std::string why = fmt::format("not tuned: {}", reason);
    log(LogLevel::kInfo, why);
    return finish(why);
  };

  const DiskCache& disk = request.context.binaries().disk();
  std::string key;
  if (device && disk.enabled()) {
    key = key_of(request, *device, problem);
    if (const std::optional<std::string> payload = disk.get(key)) {
      Json stored = parse_stored(*payload).value_or(Json());
      const auto winner = std::ranges::find(contestants, stored.is_null() ? "" : stored["config"].get<std::string>(),
                                            &Contestant::name);
      if (winner != contestants.end()) {
        tuned.winner = static_cast<std::size_t>(winner - contestants.begin());
        tuned.description["candidates"] = std::move(stored["candidates"]);
        return finish("the fastest, as stored");
      }
      log(LogLevel::kDebug, fmt::format("entry {} of the disk cache is no winner among these", key));
    }
  }
  if (!why_not.empty()) return not_tuned(why_not);
  if (contestants.size() == 1) return not_tuned("no other configuration fits");

  const auto start = std::chrono::steady_clock::now();
  std::vector<Lane> lanes = make_all(contestants);
  if (!lanes[0].launch) return not_tuned(lanes[0].left_out);
  if (const Check failure = race(request, device, summaries, lanes)) return not_tuned(failure->message);
  tuned.winner = fastest(lanes);
  tuned.spent_ms = std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count();
  Json& candidates = tuned.description["candidates"] = Json::array();
  for (std::size_t i = 0; i < lanes.size(); ++i) {
    Json row = {{"config", contestants[i].name}};
    if (lanes[i].launch) {
      row["ms"] = lanes[i].ms;
    } else {
      row["left_out"] = lanes[i].left_out;
    }
    candidates.push_back(std::move(row));
  }
  const auto timed = std::ranges::count_if(lanes, [](const Lane& lane) { return lane.launch != nullptr; });
  const Lane& best = lanes[tuned.winner];
  log(LogLevel::kInfo, fmt::format("{} takes {:.4f} ms, the usual {} {:.4f} ms; {} timed",
                                   contestants[tuned.winner].name, best.ms, contestants[0].name, lanes[0].ms, timed));
  if (disk.enabled()) {
    const Json stored = {{"format", kFormat},
                         {"about", fmt::format("autotuned {} on {}: {}", shape_text(request.call.signature),
                                               device->name(), contestants[tuned.winner].name)},
                         {"config", contestants[tuned.winner].name},
                         {"candidates", candidates}};
    std::string why;
    if (!disk.put(key, stored.dump(-1, ' ', false, Json::error_handler_t::replace), &why)) {
      log(LogLevel::kDebug, fmt::format("the winner is not stored: {}", why));
    }
  }
  return finish(fmt::format("the fastest of {} timed", timed));
}

std::optional<std::string> tuned_about(std::string_view payload) {
  if (payload.find(kFormat) == std::string_view::npos) return std::nullopt;  // a binary, most likely
  const std::optional<Json> stored = parse_stored(payload);
  if (!stored) return std::nullopt;
  return (*stored)["about"].get<std::string>();
}

}  // namespace attnjit::runtime
