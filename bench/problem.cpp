// Problems made up for `explain` and `bench`.
#include "bench/problem.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cctype>
#include <charconv>
#include <cmath>
#include <map>
#include <numbers>
#include <random>
#include <set>

#include "bench/parallel.h"
#include "bench/safetensors.h"

namespace attnjit::tool {

namespace {

constexpr std::int64_t kMaxExtent = std::int64_t{1} << 40;
constexpr std::int64_t kMaxCaptureElements = std::int64_t{1} << 28;
constexpr std::size_t kMaxExpandedBytes = 1 << 20;

std::string_view trimmed(std::string_view text) {
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.front()))) text.remove_prefix(1);
  while (!text.empty() && std::isspace(static_cast<unsigned char>(text.back()))) text.remove_suffix(1);
  return text;
}

std::vector<std::string> split(std::string_view text, char separator) {
  std::vector<std::string> parts;
  while (true) {
    const std::size_t at = text.find(separator);
    parts.emplace_back(trimmed(text.substr(0, at)));
    if (at == std::string_view::npos) return parts;
    text.remove_prefix(at + 1);
  }
}

std::optional<std::int64_t> parse_integer(std::string_view text) {
  std::int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size()) return std::nullopt;
  return value;
}

std::optional<std::int64_t> parse_extent(std::string_view text) {
  const std::optional<std::int64_t> value = parse_integer(text);
  if (!value || *value < 1 || *value > kMaxExtent) return std::nullopt;
  return value;
}

bool is_name_start(char c) { return std::isalpha(static_cast<unsigned char>(c)) || c == '_'; }
bool is_name_part(char c) { return std::isalnum(static_cast<unsigned char>(c)) || c == '_'; }

// The identifier that starts at `at`, which is not inside another one or a number; empty if there is none.
std::string_view name_at(std::string_view text, std::size_t at) {
  if (!is_name_start(text[at]) || (at > 0 && is_name_part(text[at - 1]))) return {};
  std::size_t end = at;
  while (end < text.size() && is_name_part(text[end])) ++end;
  return text.substr(at, end - at);
}

// Whether a name's next visible character is `c`; `at` moves there.
bool followed_by(std::string_view text, std::size_t& at, char c) {
  while (at < text.size() && std::isspace(static_cast<unsigned char>(text[at]))) ++at;
  return at < text.size() && text[at] == c;
}

// The top-level parts, separated by commas, of the bracket that opens at `at`, and the place behind its end.
struct Bracket {
  std::vector<std::string> parts;
  std::size_t end = 0;
};
std::optional<Bracket> read_bracket(std::string_view text, std::size_t at) {
  Bracket bracket;
  int depth = 0;
  std::size_t begin = at + 1;
  for (std::size_t i = at; i < text.size(); ++i) {
    const char c = text[i];
    if (c == '(' || c == '[') ++depth;
    if (c == ')' || c == ']') --depth;
    if ((c == ',' && depth == 1) || depth == 0) {
      const std::string_view part = trimmed(text.substr(begin, i - begin));
      if (!part.empty() || c == ',' || !bracket.parts.empty()) bracket.parts.emplace_back(part);
      begin = i + 1;
    }
    if (depth == 0) {
      bracket.end = i + 1;
      return bracket;
    }
  }
  return std::nullopt;
}

// `text` with whole identifiers replaced.
std::string substitute(std::string_view text, const std::map<std::string, std::string, std::less<>>& by_name) {
  std::string result;
  for (std::size_t i = 0; i < text.size();) {
    const std::string_view name = name_at(text, i);
    if (name.empty()) {
      result += text[i++];
      continue;
    }
    const auto found = by_name.find(name);
    result += found == by_name.end() ? std::string(name) : found->second;
    i += name.size();
  }
  return result;
}

// Mixes a seed and a number: neighbouring seeds give unrelated streams.
std::uint64_t mix(std::uint64_t seed, std::uint64_t number) {
  std::uint64_t z = seed + (number + 1) * 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

constexpr int kQuantiles = 1 << 16;

// The standard normal distribution's values at p = i / kQuantiles, the ends moved inside by half a step. A look-up and
// a line between two of them make a normal value in a nanosecond or two, for which the standard library takes twenty:
// the inputs of a report on a GPU have billions.
std::vector<float> normal_quantiles() {
  std::vector<float> quantiles(kQuantiles + 1);
  double x = 0.0;
  for (int i = kQuantiles / 2; i <= kQuantiles; ++i) {
    const double above = std::max(static_cast<double>(kQuantiles - i), 0.5) / kQuantiles;  // 1 - p
    for (int step = 0; step < 6; ++step) {  // Newton, from the last value
      const double density = std::exp(-0.5 * x * x) / std::sqrt(2.0 * std::numbers::pi);
      x += (0.5 * std::erfc(x / std::numbers::sqrt2) - above) / density;
    }
    quantiles[static_cast<std::size_t>(i)] = static_cast<float>(x);
    quantiles[static_cast<std::size_t>(kQuantiles - i)] = static_cast<float>(-x);
  }
  return quantiles;
}

void fill_capture(Tensor& tensor, const CaptureSpec& spec, std::uint64_t seed) {
  const std::int64_t size = tensor.size();
  if (spec.value) {
    for (std::int64_t i = 0; i < size; ++i) tensor.set(i, *spec.value);
  } else if (unit_roundoff(tensor.type()) > 0.0) {
    fill_normal(tensor, seed);
  } else if (tensor.type() == ElementType::kBool) {
    std::mt19937_64 random(seed);
    for (std::int64_t i = 0; i < size; ++i) tensor.set(i, static_cast<double>(random() >> 63));
  } else {
    const std::int64_t last = tensor.shape().empty() ? 1 : tensor.shape().back();
    for (std::int64_t i = 0; i < size; ++i) {
      const std::int64_t run = i % last * 8 / last;
      tensor.set(i, static_cast<double>(run));
    }
  }
}

std::int64_t resolve_dim(const CaptureSpec& spec, const std::string& dim, const Shape& shape) {
  const std::pair<std::string_view, std::int64_t> symbols[] = {
      {"B", shape.batch},     {"Hq", shape.heads_q},    {"Hkv", shape.heads_kv},
      {"Sq", shape.seqlen_q}, {"Skv", shape.seqlen_kv}, {"D", shape.head_dim},
  };
  for (const auto& [name, extent] : symbols) {
    if (name == dim) return extent;
  }
  if (const std::optional<std::int64_t> extent = parse_extent(dim)) return *extent;
  throw user_error(
      fmt::format("--captures: dimension {} of {} is not a number from 1 on, nor one of B, Hq, Hkv, Sq, "
                  "Skv, D",
                  in_quotes(dim), in_quotes(spec.name)));
}

}  // namespace

std::pair<std::int64_t, std::int64_t> parse_heads(const std::string& text) {
  const std::vector<std::string> parts = split(text, ',');
  std::vector<std::int64_t> heads;
  for (const std::string& part : parts) {
    if (const std::optional<std::int64_t> value = parse_extent(part)) heads.push_back(*value);
  }
  if (heads.size() != parts.size() || heads.size() > 2) {
    throw user_error(fmt::format(
        "-nh {}: give query heads and key/value heads as Hq,Hkv (16,2), or one number for both", in_quotes(text)));
  }
  if (heads.size() == 1) heads.push_back(heads[0]);
  if (heads[0] % heads[1] != 0) {
    throw user_error(fmt::format("-nh {}: {} query heads are no multiple of {} key/value heads", in_quotes(text),
                                 heads[0], heads[1]));
  }
  return {heads[0], heads[1]};
}

Shape parse_shape(const std::string& text) {
  std::string_view inner = trimmed(text);
  if (inner.size() >= 2 && inner.front() == '(' && inner.back() == ')') inner = inner.substr(1, inner.size() - 2);
  std::vector<std::int64_t> extents;
  const std::vector<std::string> parts = split(inner, ',');
  for (const std::string& part : parts) {
    if (const std::optional<std::int64_t> value = parse_extent(part)) extents.push_back(*value);
  }
  if (extents.size() != parts.size() || extents.size() != 6) {
    throw user_error(
        fmt::format("--shape {}: give six numbers from 1 on: B,Hq,Sq,Hkv,Skv,D (1,16,512,16,512,64)", in_quotes(text)));
  }
  return {extents[0], extents[1], extents[2], extents[3], extents[4], extents[5]};
}

ElementType parse_dtype(const std::string& text) {
  const std::optional<ElementType> type = element_type_named(text);
  if (!type || unit_roundoff(*type) == 0.0) {
    throw user_error(fmt::format("-dtype {}: allowed are float32, float16 and bfloat16", in_quotes(text)));
  }
  return *type;
}

attnjit_backend parse_backend(const std::string& text) {
  constexpr attnjit_backend kAll[] = {ATTNJIT_BACKEND_AUTO, ATTNJIT_BACKEND_SM90, ATTNJIT_BACKEND_SM80,
                                      ATTNJIT_BACKEND_MATH, ATTNJIT_BACKEND_CPU};
  for (attnjit_backend backend : kAll) {
    if (text == attnjit_backend_name(backend)) return backend;
  }
  throw user_error(fmt::format("--backend {}: allowed are auto, sm90, sm80, math and cpu", in_quotes(text)));
}

CaptureSpec parse_capture(const std::string& text) {
  const auto bad = [&](const std::string& what) {
    return user_error(
        fmt::format("--captures {}: {}. The form is NAME:DTYPE:DIMS[=VALUE], as in slopes:float32:Hq, "
                    "ids:int32:B,Sq or cap:float32:=30",
                    in_quotes(text), what));
  };
  CaptureSpec spec;
  std::string_view rest = text;
  if (const std::size_t equals = rest.find('='); equals != std::string_view::npos) {
    const std::string value(trimmed(rest.substr(equals + 1)));
    char* end = nullptr;
    spec.value = std::strtod(value.c_str(), &end);
    if (value.empty() || *end != '\0') throw bad(fmt::format("the value {} is not a number", in_quotes(value)));
    rest = rest.substr(0, equals);
  }
  const std::vector<std::string> parts = split(rest, ':');
  if (parts.size() < 2 || parts.size() > 3) throw bad("there are not two or three parts");
  spec.name = parts[0];
  if (name_at(spec.name + " ", 0) != spec.name || spec.name.empty()) {
    throw bad(fmt::format("{} is not a name", in_quotes(spec.name)));
  }
  const std::optional<ElementType> type = element_type_named(parts[1]);
  if (!type) throw bad(fmt::format("{} is not one of {}", in_quotes(parts[1]), element_type_names()));
  spec.type = *type;
  if (spec.value && !holds(spec.type, *spec.value)) {
    throw bad(fmt::format("the value {} is not a whole number that {} holds", *spec.value, info(spec.type).name));
  }
  if (parts.size() == 3 && !parts[2].empty()) spec.dims = split(parts[2], ',');
  return spec;
}

std::vector<CaptureSpec> parse_captures(std::span<const std::string> texts) {
  std::vector<CaptureSpec> specs;
  for (const std::string& text : texts) {
    specs.push_back(parse_capture(text));
    if (std::ranges::count(specs, specs.back().name, &CaptureSpec::name) > 1) {
      throw user_error(fmt::format("--captures {}: {} is given twice", in_quotes(text), in_quotes(specs.back().name)));
    }
  }
  return specs;
}

std::vector<RegisteredMod> registered_mods(attnjit_context* context) {
  std::vector<RegisteredMod> mods;
  for (const auto& row : list_mods(context)) mods.push_back({row.at("name"), row.at("parameters"), row.at("body")});
  return mods;
}

std::string expand_mods(const std::string& text, std::span<const RegisteredMod> mods) {
  std::string current = text;
  // Bodies may name other mods, never themselves: the depth is bounded by their number.
  for (std::size_t round = 0; round <= mods.size(); ++round) {
    std::string next;
    bool changed = false;
    for (std::size_t i = 0; i < current.size();) {
      const std::string_view name = name_at(current, i);
      const auto mod = name.empty() ? mods.end() : std::ranges::find(mods, name, &RegisteredMod::name);
      if (mod == mods.end()) {
        next += name.empty() ? std::string(1, current[i]) : std::string(name);
        i += std::max<std::size_t>(name.size(), 1);
        continue;
      }
      std::size_t after = i + name.size();
      std::map<std::string, std::string, std::less<>> arguments;
      if (std::size_t open = after; followed_by(current, open, '(')) {
        if (const std::optional<Bracket> bracket = read_bracket(current, open)) {
          for (std::size_t j = 0; j < std::min(bracket->parts.size(), mod->parameters.size()); ++j) {
            // A captured tensor's name stays a name; anything else keeps its precedence.
            const std::string& part = bracket->parts[j];
            const bool plain = std::ranges::all_of(part, is_name_part);
            arguments[mod->parameters[j]] = plain ? part : "(" + part + ")";
          }
          after = bracket->end;
        }
      }
      next += "(" + substitute(mod->body, arguments) + ")";
      i = after;
      changed = true;
    }
    current = std::move(next);
    if (!changed || current.size() > kMaxExpandedBytes) break;
  }
  return current;
}

std::optional<std::vector<std::int64_t>> infer_extents(std::string_view expanded, std::string_view name, int rank,
                                                       const Shape& shape) {
  const std::pair<std::string_view, std::int64_t> indices[] = {
      {"b", shape.batch},     {"h", shape.heads_q},          {"q_idx", shape.seqlen_q},
      {"m", shape.seqlen_q},  {"token_q", shape.seqlen_q},   {"kv_idx", shape.seqlen_kv},
      {"n", shape.seqlen_kv}, {"token_kv", shape.seqlen_kv},
  };
  const std::int64_t longest = std::max({shape.batch, shape.heads_q, shape.seqlen_q, shape.seqlen_kv});
  std::vector<std::int64_t> extents;
  for (std::size_t i = 0; i < expanded.size(); ++i) {
    if (name_at(expanded, i) != name) continue;
    std::size_t at = i + name.size();
    if (!followed_by(expanded, at, '[')) continue;
    const std::optional<Bracket> bracket = read_bracket(expanded, at);
    if (!bracket || bracket->parts.size() != static_cast<std::size_t>(rank)) continue;
    extents.resize(static_cast<std::size_t>(rank), 1);
    for (std::size_t d = 0; d < extents.size(); ++d) {
      std::int64_t reach = 0;
      const std::string& index = bracket->parts[d];
      std::set<std::string_view> seen;
      for (std::size_t j = 0; j < index.size(); ++j) {
        const std::string_view word = name_at(index, j);
        if (word.empty() || !seen.insert(word).second) continue;
        for (const auto& [index_name, extent] : indices) {
          if (index_name == word) reach += extent;
        }
      }
      extents[d] = std::max(extents[d], reach == 0 ? longest : reach);
    }
  }
  if (extents.empty()) return std::nullopt;
  return extents;
}

Captures make_captures(attnjit_context* context, const char* score_mod, const char* mask_mod,
                       std::span<const CaptureSpec> specs, std::span<const RegisteredMod> mods, const Shape& shape,
                       std::optional<std::uint64_t> seed, bool strict) {
  const std::vector<CapturedName> names = captured_names(context, score_mod, mask_mod);
  std::string expanded = expand_mods(score_mod != nullptr ? score_mod : "", mods);
  expanded += ' ';
  expanded += expand_mods(mask_mod != nullptr ? mask_mod : "", mods);

  if (strict) {
    for (const CaptureSpec& spec : specs) {
      if (std::ranges::find(names, spec.name, &CapturedName::name) != names.end()) continue;
      std::vector<std::string> known;
      known.reserve(names.size());
      for (const CapturedName& name : names) known.push_back(in_quotes(name.name));
      throw user_error(fmt::format("--captures: the expression reads no {}; it reads {}", in_quotes(spec.name),
                                   known.empty() ? "nothing captured" : fmt::format("{}", fmt::join(known, ", "))));
    }
  }

  Captures captures;
  for (const CapturedName& name : names) {
    CaptureSpec spec{.name = name.name};
    std::vector<std::int64_t> extents;
    const auto given = std::ranges::find(specs, name.name, &CaptureSpec::name);
    if (given != specs.end()) {
      spec = *given;
      for (const std::string& dim : spec.dims) extents.push_back(resolve_dim(spec, dim, shape));
      if (extents.size() != static_cast<std::size_t>(name.rank)) {
        throw user_error(fmt::format("--captures: {} is read with {} indices, but {} dimensions are given",
                                     in_quotes(name.name), name.rank, extents.size()));
      }
    } else if (name.rank == 0) {
      // A bare name nobody declared is most likely a slip: left out, the library words it with the nearest known name.
      continue;
    } else {
      const auto inferred = infer_extents(expanded, name.name, name.rank, shape);
      if (!inferred) {
        throw user_error(fmt::format("no extents can be guessed for {}: give --captures {}:float32:EXTENT,...",
                                     in_quotes(name.name), name.name));
      }
      extents = *inferred;
    }
    std::int64_t elements = 1;
    for (std::int64_t extent : extents) {
      if (__builtin_mul_overflow(elements, extent, &elements) || elements > kMaxCaptureElements) {
        throw user_error(
            fmt::format("the captured tensor {} ({}) has more than {} elements: give --captures {}:DTYPE:"
                        "EXTENT,...",
                        in_quotes(name.name), fmt::join(extents, ", "), kMaxCaptureElements, name.name));
      }
    }
    Tensor tensor(spec.type, extents);
    if (seed) fill_capture(tensor, spec, mix(*seed, 1000 + captures.tensors.size()));
    if (!captures.description.empty()) captures.description += ", ";
    captures.description += fmt::format("{} {} ({})", name.name, info(spec.type).name, fmt::join(extents, ", "));
    captures.names.push_back(name.name);
    captures.tensors.push_back(std::move(tensor));
  }
  for (const Tensor& tensor : captures.tensors) {
    captures.dl.push_back(tensor.dl());
    if (!seed) captures.dl.back().data = nullptr;
  }
  for (std::size_t i = 0; i < captures.names.size(); ++i) {
    captures.lent.push_back({captures.names[i].c_str(), &captures.dl[i]});
  }
  return captures;
}

void fill_normal(Tensor& tensor, std::uint64_t seed) {
  static const std::vector<float> quantiles = normal_quantiles();
  constexpr std::int64_t kBlock = std::int64_t{1} << 18, kPart = 256;  // even
  const std::int64_t size = tensor.size();
  // A value depends on the seed and on its place alone, never on which thread draws it.
  parallel_for((size + kBlock - 1) / kBlock, [&](std::int64_t block) {
    const std::int64_t end = std::min((block + 1) * kBlock, size);
    for (std::int64_t begin = block * kBlock; begin < end; begin += kPart) {
      std::array<float, kPart> values;
      const auto count = static_cast<std::size_t>(std::min(kPart, end - begin));
      std::uint64_t bits = 0;  // 32 for a value: 16 choose the step, 16 the place in it
      for (std::size_t i = 0; i < count; ++i) {
        bits = i % 2 == 0 ? mix(seed, static_cast<std::uint64_t>(begin) + i) : bits >> 32;
        const std::size_t at = bits >> 16 & (kQuantiles - 1);
        const float place = static_cast<float>(bits & 0xffff) * 0x1p-16f;
        values[i] = quantiles[at] + place * (quantiles[at + 1] - quantiles[at]);
      }
      tensor.set(begin, std::span<const float>(values).first(count));
    }
  });
}

std::vector<attnjit_row> sample_rows(const Shape& shape, std::size_t count, std::uint64_t seed) {
  std::set<std::array<std::int64_t, 3>> chosen;
  const std::int64_t b = shape.batch - 1, h = shape.heads_q - 1, q = shape.seqlen_q - 1;
  // Panels are 32 rows.
  const std::array<std::int64_t, 3> first[] = {
      {0, 0, 0}, {b, h, q}, {0, h, std::min<std::int64_t>(31, q)}, {b, 0, std::min<std::int64_t>(32, q)}, {0, 0, q}};
  for (const auto& row : first) {
    if (chosen.size() < count) chosen.insert(row);
  }
  const double all =
      static_cast<double>(shape.batch) * static_cast<double>(shape.heads_q) * static_cast<double>(shape.seqlen_q);
  std::mt19937_64 random(mix(seed, 2000));
  while (chosen.size() < count && static_cast<double>(chosen.size()) < all) {
    chosen.insert({std::uniform_int_distribution<std::int64_t>(0, b)(random),
                   std::uniform_int_distribution<std::int64_t>(0, h)(random),
                   std::uniform_int_distribution<std::int64_t>(0, q)(random)});
  }
  std::vector<attnjit_row> rows;
  rows.reserve(chosen.size());
  for (const auto& row : chosen) rows.push_back({row[0], row[1], row[2]});
  return rows;
}

std::vector<std::string> normalize_arguments(std::span<const char* const> arguments) {
  std::vector<std::string> normalized;
  bool options = true;
  for (const char* argument : arguments) {
    std::string text = argument;
    if (text == "--") options = false;
    for (std::string_view name : {"-mods", "-nh", "-dtype"}) {
      if (options && (text == name || text.starts_with(std::string(name) + "="))) {
        text.insert(0, "-");
        break;
      }
    }
    normalized.push_back(std::move(text));
  }
  return normalized;
}

std::string shell_quoted(const std::string& text) {
  const bool plain = !text.empty() && std::ranges::all_of(text, [](unsigned char c) {
    return std::isalnum(c) || std::string_view("_-=.,/:+%").find(static_cast<char>(c)) != std::string_view::npos;
  });
  if (plain) return text;
  std::string result = "'";
  for (char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

}  // namespace attnjit::tool
