// Parsing, joining and binding of a call's expressions.
#include "runtime/mods.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <ranges>
#include <span>
#include <string_view>
#include <utility>

#include "dsl/bind.h"
#include "dsl/parser.h"

namespace attnjit::runtime {
namespace {

constexpr const char* kNoop = "score";

Failure expression_failure(std::string_view argument, const dsl::Error& error, std::string_view text) {
  return {ATTNJIT_INVALID_EXPRESSION, fmt::format("{}, {}", argument, dsl::format_error(error, text))};
}

std::string indices(int rank) {
  return rank == 0 ? "without an index" : fmt::format("with {} {}", rank, rank == 1 ? "index" : "indices");
}

// Replaces the expression's own table by the joint one.
void renumber(dsl::Expr* expr, const std::vector<dsl::Capture>& joint) {
  std::vector<std::int32_t> number;
  for (const dsl::Capture& capture : expr->captures) {
    const auto it =
        std::find_if(joint.begin(), joint.end(), [&](const dsl::Capture& c) { return c.name == capture.name; });
    number.push_back(static_cast<std::int32_t>(it - joint.begin()));
  }
  for (dsl::Node& node : expr->nodes) {
    if (node.op == dsl::Op::kRead) node.capture = number[static_cast<std::size_t>(node.capture)];
  }
  expr->captures = joint;
}

}  // namespace

Result<Mods> parse_mods(const char* score_mod, const char* mask_mod, const dsl::Registry& registry) {
  const std::string_view score_text = score_mod ? score_mod : kNoop;
  Mods mods;
  dsl::Expected<dsl::Expr> score = dsl::parse(score_text, dsl::ModKind::kScoreMod, registry);
  if (!score) return expression_failure("score_mod", score.error(), score_text);
  mods.score_mod = std::move(*score);
  if (mask_mod) {
    dsl::Expected<dsl::Expr> mask = dsl::parse(mask_mod, dsl::ModKind::kMaskMod, registry);
    if (!mask) return expression_failure("mask_mod", mask.error(), mask_mod);
    mods.mask_mod = std::move(*mask);
  }

  std::map<std::string, dsl::Capture> by_name;
  for (const dsl::Capture& capture : mods.score_mod.captures) by_name.emplace(capture.name, capture);
  if (mods.mask_mod) {
    for (const dsl::Capture& capture : mods.mask_mod->captures) {
      const auto [it, added] = by_name.emplace(capture.name, capture);
      if (!added && it->second.rank != capture.rank) {
        return Failure{ATTNJIT_INVALID_EXPRESSION,
                       fmt::format("captured '{}' is read {} by score_mod and {} by mask_mod",
                                   dsl::shortened(capture.name), indices(it->second.rank), indices(capture.rank))};
      }
    }
  }
  if (by_name.size() > static_cast<std::size_t>(dsl::kMaxCaptures)) {
    return Failure{ATTNJIT_INVALID_EXPRESSION, fmt::format("score_mod and mask_mod capture {} names; allowed: {}",
                                                           by_name.size(), dsl::kMaxCaptures)};
  }
  std::vector<dsl::Capture> joint;
  joint.reserve(by_name.size());
  for (const auto& [name, capture] : by_name) joint.push_back(capture);
  renumber(&mods.score_mod, joint);
  if (mods.mask_mod) renumber(&*mods.mask_mod, joint);
  return mods;
}

Result<Mods> bind_mods(const Mods& parsed, const char* score_mod, const char* mask_mod, const dsl::Registry& registry,
                       const CheckedCall& call) {
  const std::vector<dsl::Capture>& names = parsed.captures();
  const std::size_t given = call.forward.num_captures;
  for (const dsl::Capture& capture : names) {
    const bool found = std::any_of(call.capture_names, call.capture_names + given,
                                   [&](const char* name) { return capture.name == name; });
    if (!found) {
      const std::vector<std::string> others(call.capture_names, call.capture_names + given);
      const std::string nearest = dsl::nearest_name(capture.name, others, registry);
      return Failure{
          ATTNJIT_INVALID_ARGUMENT,
          fmt::format("captures lacks '{}', which the expression reads {}; given: {}{}", dsl::shortened(capture.name),
                      indices(capture.rank), given == 0 ? "none" : listed(std::span(call.capture_names, given)),
                      nearest.empty() ? "" : fmt::format("; did you mean '{}'?", dsl::shortened(nearest)))};
    }
  }
  for (std::size_t i = 0; i < given; ++i) {
    const std::string_view name = call.capture_names[i];
    if (std::none_of(names.begin(), names.end(), [&](const dsl::Capture& c) { return c.name == name; })) {
      return Failure{ATTNJIT_INVALID_ARGUMENT,
                     fmt::format("captures has '{}', which no expression reads; read: {}", dsl::shortened(name),
                                 names.empty() ? "none" : listed(names | std::views::transform(&dsl::Capture::name)))};
    }
  }
  // Both sides are sorted by name and hold the same names now.
  std::vector<dsl::CaptureBinding> bindings;
  for (std::size_t i = 0; i < given; ++i) {
    const dsl::CaptureView& tensor = call.captures[i];
    if (tensor.rank != names[i].rank) {
      return Failure{ATTNJIT_INVALID_ARGUMENT, fmt::format("captured {} has {} dimension{}; the expression reads it {}",
                                                           dsl::shortened(names[i].name), tensor.rank,
                                                           tensor.rank == 1 ? "" : "s", indices(names[i].rank))};
    }
    bindings.push_back({.dtype = tensor.dtype, .rank = tensor.rank});
  }

  Mods bound;
  dsl::Expected<dsl::Expr> score = dsl::bind(parsed.score_mod, bindings, dsl::ModKind::kScoreMod);
  if (!score) return expression_failure("score_mod", score.error(), score_mod ? score_mod : kNoop);
  bound.score_mod = std::move(*score);
  if (parsed.mask_mod) {
    dsl::Expected<dsl::Expr> mask = dsl::bind(*parsed.mask_mod, bindings, dsl::ModKind::kMaskMod);
    if (!mask) return expression_failure("mask_mod", mask.error(), mask_mod ? mask_mod : "");
    bound.mask_mod = std::move(*mask);
  }
  return bound;
}

}  // namespace attnjit::runtime
