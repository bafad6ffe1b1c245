// Case to text and back.
#include "tests/numerics/case.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdlib>
#include <iterator>
#include <numbers>
#include <utility>

namespace attnjit::numerics {
namespace {

template <typename Enum>
using Names = std::vector<std::pair<Enum, std::string_view>>;

const Names<Layout>& layouts() {
  static const Names<Layout> names = {{Layout::kPacked, "packed"},
                                      {Layout::kBshd, "bshd"},
                                      {Layout::kPadded, "padded"},
                                      {Layout::kAligned, "aligned"},
                                      {Layout::kBroadcastBatch, "broadcast_b"},
                                      {Layout::kBroadcastHead, "broadcast_h"},
                                      {Layout::kBroadcastSeq, "broadcast_s"},
                                      {Layout::kHuge, "huge"}};
  return names;
}

const Names<Inputs>& inputs() {
  static const Names<Inputs> names = {
      {Inputs::kNormal, "normal"},     {Inputs::kLarge, "large"},       {Inputs::kPositive, "positive"},
      {Inputs::kZero, "zero"},         {Inputs::kPoisoned, "poisoned"}, {Inputs::kRising, "rising"},
      {Inputs::kFalling, "falling"},   {Inputs::kSteep, "steep"},       {Inputs::kSteepFalling, "steep_falling"},
      {Inputs::kOutliers, "outliers"}, {Inputs::kInfinite, "infinite"}, {Inputs::kHugeValues, "huge_values"}};
  return names;
}

const Names<Fill>& fills() {
  static const Names<Fill> names = {{Fill::kNormal, "normal"},
                                    {Fill::kDocuments, "documents"},
                                    {Fill::kIndex, "index"},
                                    {Fill::kPoison, "poison"},
                                    {Fill::kBlocks, "blocks"}};
  return names;
}

const Names<dsl::DType>& dtypes() {
  static const Names<dsl::DType> names = [] {
    Names<dsl::DType> all;
    for (const auto dtype :
         {dsl::DType::kBool, dsl::DType::kInt8, dsl::DType::kInt16, dsl::DType::kInt32, dsl::DType::kInt64,
          dsl::DType::kUInt8, dsl::DType::kF16, dsl::DType::kBF16, dsl::DType::kF32}) {
      all.emplace_back(dtype, dsl::dtype_name(dtype));
    }
    return all;
  }();
  return names;
}

template <typename Enum>
std::string name_of(const Names<Enum>& names, Enum value) {
  for (const auto& [key, name] : names) {
    if (key == value) return std::string(name);
  }
  return "?";
}

template <typename Enum>
bool find(const Names<Enum>& names, std::string_view text, Enum* value) {
  for (const auto& [key, name] : names) {
    if (name == text) {
      *value = key;
      return true;
    }
  }
  return false;
}

template <typename Number>
bool number(std::string_view text, Number* value) {
  const auto [end, status] = std::from_chars(text.data(), text.data() + text.size(), *value);
  return status == std::errc() && end == text.data() + text.size();
}

std::vector<std::string_view> split(std::string_view text, char separator) {
  std::vector<std::string_view> parts;
  for (;;) {
    const std::size_t at = text.find(separator);
    parts.push_back(text.substr(0, at));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

bool parse_capture(std::string_view text, CaptureSpec* spec) {
  const auto parts = split(text, ':');
  if (parts.size() != 5 || parts[0].empty()) return false;
  spec->name = parts[0];
  if (!find(dtypes(), parts[1], &spec->dtype)) return false;
  if (!parts[2].empty()) {
    for (const std::string_view part : split(parts[2], 'x')) {
      std::int64_t extent = 0;
      if (!number(part, &extent) || extent < 1) return false;
      spec->extent.push_back(extent);
    }
  }
  return find(layouts(), parts[3], &spec->layout) && find(fills(), parts[4], &spec->fill);
}

std::string joined(const std::vector<std::string>& parts) {
  std::string text;
  for (const std::string& part : parts) text.append(text.empty() ? "" : ",").append(part);
  return text;
}

// The fields of a backward, through `field(name, value)`. Defaults are not written.
template <typename Field>
void write_backward(const BackwardSpec& backward, Field&& field) {
  if (!backward.wanted()) return;
  std::vector<std::string> wanted, captures;
  if (backward.dq) wanted.emplace_back("dq");
  if (backward.dk) wanted.emplace_back("dk");
  if (backward.dv) wanted.emplace_back("dv");
  for (const GradientSpec& capture : backward.captures) {
    captures.push_back(capture.name + ':' + name_of(layouts(), capture.layout));
  }
  if (!wanted.empty()) field("backward", joined(wanted));
  if (!captures.empty()) field("grads", joined(captures));
  if (!backward.row_shifts.empty()) field("row_shifts", joined(backward.row_shifts));
  if (backward.grad_lse) field("grad_lse", "1");
  if (backward.deterministic) field("deterministic", "1");
  if (backward.partial_keys) field("partial_keys", "1");
  if (backward.own_forward) field("forward", "own");
  const std::array<std::pair<std::string_view, Layout>, 4> placed = {{{"grad_out", backward.layout_grad_out},
                                                                      {"grad_q", backward.layout_dq},
                                                                      {"grad_k", backward.layout_dk},
                                                                      {"grad_v", backward.layout_dv}}};
  for (const auto& [name, layout] : placed) {
    if (layout != Layout::kPacked) field(name, name_of(layouts(), layout));
  }
}

// One field of a backward. `known`: whether it is one.
bool parse_backward(std::string_view name, std::string_view value, BackwardSpec* backward, bool* known) {
  const auto flag = [&](bool* set) { return *set = value == "1", value == "0" || value == "1"; };
  *known = true;
  if (name == "backward") {
    for (const std::string_view part : split(value, ',')) {
      bool* const wanted = part == "dq"   ? &backward->dq
                           : part == "dk" ? &backward->dk
                           : part == "dv" ? &backward->dv
                                          : nullptr;
      if (wanted == nullptr) return false;
      *wanted = true;
    }
    return true;
  }
  if (name == "grads") {
    for (const std::string_view part : split(value, ',')) {
      const std::size_t colon = part.find(':');
      GradientSpec& added = backward->captures.emplace_back();
      added.name = part.substr(0, colon);
      if (added.name.empty()) return false;
      if (colon != std::string_view::npos && !find(layouts(), part.substr(colon + 1), &added.layout)) return false;
    }
    return true;
  }
  if (name == "row_shifts") {
    for (const std::string_view part : split(value, ',')) backward->row_shifts.emplace_back(part);
    return true;
  }
  if (name == "grad_lse") return flag(&backward->grad_lse);
  if (name == "deterministic") return flag(&backward->deterministic);
  if (name == "partial_keys") return flag(&backward->partial_keys);
  if (name == "forward") return backward->own_forward = value == "own", value == "own" || value == "gold";
  if (name == "grad_out") return find(layouts(), value, &backward->layout_grad_out);
  if (name == "grad_q") return find(layouts(), value, &backward->layout_dq);
  if (name == "grad_k") return find(layouts(), value, &backward->layout_dk);
  if (name == "grad_v") return find(layouts(), value, &backward->layout_dv);
  return *known = false;
}

}  // namespace

bool BackwardSpec::shifts_rows(std::string_view name) const {
  return !partial_keys && std::find(row_shifts.begin(), row_shifts.end(), name) != row_shifts.end();
}

double Case::effective_scale() const {
  return scale ? static_cast<double>(*scale)
               : static_cast<double>(static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))));
}

std::string to_line(const Case& c) {
  std::string line;
  const auto field = [&](std::string_view name, const std::string& value) {
    if (!line.empty()) line += ' ';
    line.append(name).append("=").append(value);
  };
  const auto quoted = [](const std::string& text) {
    std::string result = "\"";
    for (const char character : text) result += character == '\n' ? ' ' : character;
    return result + '"';
  };
  const std::array<std::pair<std::string_view, std::int64_t>, 7> sizes = {{{"b", c.batch},
                                                                           {"hq", c.num_heads},
                                                                           {"hkv", c.num_heads_kv},
                                                                           {"sq", c.seqlen_q},
                                                                           {"skv", c.seqlen_kv},
                                                                           {"d", c.head_dim},
                                                                           {"dv", c.head_dim_v}}};
  for (const auto& [name, value] : sizes) field(name, std::to_string(value));
  field("dtype", name_of(dtypes(), c.dtype));
  field("q", name_of(layouts(), c.layout_q));
  field("k", name_of(layouts(), c.layout_k));
  field("v", name_of(layouts(), c.layout_v));
  field("o", name_of(layouts(), c.layout_o));
  field("inputs", name_of(inputs(), c.inputs));
  if (c.scale) {
    char text[48];
    const auto end = std::to_chars(std::begin(text), std::end(text), *c.scale).ptr;
    field("scale", std::string(text, end));
  }
  field("score_mod", quoted(c.score_mod));
  if (!c.mask_mod.empty()) field("mask_mod", quoted(c.mask_mod));
  for (const CaptureSpec& capture : c.captures) {
    std::string text = capture.name + ':' + name_of(dtypes(), capture.dtype) + ':';
    for (std::size_t i = 0; i < capture.extent.size(); ++i) {
      if (i > 0) text += 'x';
      text += std::to_string(capture.extent[i]);
    }
    field("capture", text + ':' + name_of(layouts(), capture.layout) + ':' + name_of(fills(), capture.fill));
  }
  write_backward(c.backward, field);
  field("device", c.device);
  field("backend", c.backend);
  field("threads", std::to_string(c.threads));
  field("rows", std::to_string(c.rows));
  field("seed", std::to_string(c.seed));
  return line;
}

bool parse_case(std::string_view line, Case* problem, std::string* error) {
  *problem = Case{};
  bool has_head_dim_v = false, has_num_heads_kv = false;
  while (true) {
    while (!line.empty() && (line.front() == ' ' || line.front() == '\n')) line.remove_prefix(1);
    if (line.empty()) break;
    const std::size_t equals = line.find('=');
    if (equals == std::string_view::npos) {
      *error = "expected name=value at '" + std::string(line) + "'";
      return false;
    }
    const std::string_view name = line.substr(0, equals);
    line.remove_prefix(equals + 1);
    const bool quoted = !line.empty() && line.front() == '"';
    if (quoted) line.remove_prefix(1);
    std::size_t end = line.find(quoted ? '"' : ' ');
    if (quoted && end == std::string_view::npos) {
      *error = "the value of " + std::string(name) + " has no closing quote";
      return false;
    }
    if (end == std::string_view::npos) end = line.size();
    const std::string_view value = line.substr(0, end);
    line.remove_prefix(end + (quoted ? 1 : 0));

    bool good = true, known = false;
    const bool read = parse_backward(name, value, &problem->backward, &known);
    if (known) {
      good = read;
    } else if (name == "b") {
      good = number(value, &problem->batch);
    } else if (name == "hq") {
      good = number(value, &problem->num_heads);
    } else if (name == "hkv") {
      good = has_num_heads_kv = number(value, &problem->num_heads_kv);
    } else if (name == "sq") {
      good = number(value, &problem->seqlen_q);
    } else if (name == "skv") {
      good = number(value, &problem->seqlen_kv);
    } else if (name == "d") {
      good = number(value, &problem->head_dim);
    } else if (name == "dv") {
      good = has_head_dim_v = number(value, &problem->head_dim_v);
    } else if (name == "dtype") {
      good = find(dtypes(), value, &problem->dtype);
    } else if (name == "q") {
      good = find(layouts(), value, &problem->layout_q);
    } else if (name == "k") {
      good = find(layouts(), value, &problem->layout_k);
    } else if (name == "v") {
      good = find(layouts(), value, &problem->layout_v);
    } else if (name == "o") {
      good = find(layouts(), value, &problem->layout_o);
    } else if (name == "inputs") {
      good = find(inputs(), value, &problem->inputs);
    } else if (name == "scale") {
      good = number(value, &problem->scale.emplace());
    } else if (name == "score_mod") {
      problem->score_mod = value;
    } else if (name == "mask_mod") {
      problem->mask_mod = value;
    } else if (name == "capture") {
      good = parse_capture(value, &problem->captures.emplace_back());
    } else if (name == "backend") {
      problem->backend = value;
      good = backend_of(value).has_value();
    } else if (name == "device") {
      problem->device = value;
      good = value == "cpu" || value == "cuda";
    } else if (name == "threads") {
      good = number(value, &problem->threads);
    } else if (name == "rows") {
      good = number(value, &problem->rows);
    } else if (name == "seed") {
      good = number(value, &problem->seed);
    } else {
      *error = "unknown field '" + std::string(name) + "'";
      return false;
    }
    if (!good) {
      *error = "bad value '" + std::string(value) + "' of field '" + std::string(name) + "'";
      return false;
    }
  }
  if (!has_num_heads_kv) problem->num_heads_kv = problem->num_heads;
  if (!has_head_dim_v) problem->head_dim_v = problem->head_dim;
  return true;
}

std::optional<attnjit_backend> backend_of(std::string_view name) {
  constexpr std::string_view kUnknown = "unknown backend";
  for (int i = 0;; ++i) {
    const auto backend = static_cast<attnjit_backend>(i);
    const std::string_view known = attnjit_backend_name(backend);
    if (known == kUnknown) return std::nullopt;
    if (known == name) return backend;
  }
}

std::uint64_t Random::next() {
  // splitmix64
  std::uint64_t z = state_ += 0x9e3779b97f4a7c15ull;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return z ^ (z >> 31);
}

std::int64_t Random::between(std::int64_t low, std::int64_t high) {
  return low + static_cast<std::int64_t>(next() % static_cast<std::uint64_t>(high - low + 1));
}

double Random::uniform() { return static_cast<double>(next() >> 11) * 0x1p-53; }

double Random::normal() {
  const double radius = std::sqrt(-2.0 * std::log(1.0 - uniform()));
  return radius * std::cos(2.0 * std::numbers::pi * uniform());
}

}  // namespace attnjit::numerics
