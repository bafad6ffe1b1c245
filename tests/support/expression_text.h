// Helpers of the language's unit tests: a tree as nested lists, and one evaluation of a text.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "dsl/bind.h"
#include "dsl/functions.h"
#include "dsl/interpreter.h"
#include "dsl/parser.h"

namespace attnjit::test {

// `(+ score (* 2 h))`. Shared values are written out at each use: for small trees only.
inline std::string tree(const dsl::Expr& expr, dsl::NodeId id) {
  const dsl::Node& node = expr[id];
  std::string head(dsl::op_name(node.op));
  switch (node.op) {
    case dsl::Op::kInt:
      return std::to_string(node.int_value);
    case dsl::Op::kBool:
      return node.int_value ? "true" : "false";
    case dsl::Op::kFloat: {
      std::string text = std::to_string(node.float_value);
      while (text.ends_with("00")) text.pop_back();
      return text;
    }
    case dsl::Op::kRead:
      head = expr.captures[static_cast<std::size_t>(node.capture)].name;
      break;
    case dsl::Op::kCall:
      head = dsl::function_info(node.function).name;
      break;
    case dsl::Op::kNeg:
      head = "neg";
      break;
    default:
      break;
  }
  if (node.args.empty()) return head;
  for (const dsl::NodeId arg : node.args) head += " " + tree(expr, arg);
  return "(" + head + ")";
}

inline std::string tree(std::string_view text, dsl::ModKind kind = dsl::ModKind::kScoreMod,
                        const dsl::Registry& registry = dsl::Registry::builtin()) {
  const auto expr = dsl::parse(text, kind, registry);
  return expr ? tree(*expr, expr->root) : "error: " + expr.error().message;
}

// A captured tensor that owns its values: packed, innermost last.
struct Captured {
  dsl::DType dtype = dsl::DType::kF32;
  std::vector<std::int64_t> extent = {};
  std::vector<std::uint8_t> bytes = {};

  dsl::CaptureView view() const {
    dsl::CaptureView view{.data = bytes.data(), .dtype = dtype, .rank = static_cast<int>(extent.size())};
    std::int64_t stride = 1;
    for (std::size_t i = extent.size(); i-- > 0;) {
      view.extent[i] = extent[i];
      view.stride[i] = stride;
      stride *= extent[i];
    }
    return view;
  }
};

template <typename T>
Captured captured(dsl::DType dtype, std::vector<std::int64_t> extent, const std::vector<T>& values) {
  Captured result{.dtype = dtype, .extent = std::move(extent)};
  const auto* bytes = reinterpret_cast<const std::uint8_t*>(values.data());
  result.bytes.assign(bytes, bytes + values.size() * sizeof(T));
  return result;
}

using Captures = std::map<std::string, Captured>;

// Parses and binds; a failure is a test failure (and an empty expression).
inline dsl::Expected<dsl::Expr> bound(std::string_view text, const Captures& captures = {},
                                      dsl::ModKind kind = dsl::ModKind::kScoreMod) {
  const auto parsed = dsl::parse(text, kind);
  if (!parsed) return parsed.error();
  std::vector<dsl::CaptureBinding> bindings;
  for (const dsl::Capture& capture : parsed->captures) {
    const auto found = captures.find(capture.name);
    if (found == captures.end()) return dsl::Error{"the test binds no '" + capture.name + "'", capture.location};
    bindings.push_back({.dtype = found->second.dtype, .rank = static_cast<int>(found->second.extent.size())});
  }
  return dsl::bind(*parsed, bindings, kind);
}

inline std::vector<dsl::CaptureView> views(const dsl::Expr& expr, const Captures& captures) {
  std::vector<dsl::CaptureView> all;
  all.reserve(expr.captures.size());
  for (const dsl::Capture& capture : expr.captures) all.push_back(captures.at(capture.name).view());
  return all;
}

inline dsl::Element evaluate(std::string_view text, const dsl::Point& point = {}, const Captures& captures = {}) {
  const auto expr = bound(text, captures);
  if (!expr) {
    ADD_FAILURE() << dsl::format_error(expr.error(), text);
    return {};
  }
  return dsl::Interpreter(*expr, views(*expr, captures)).score_mod(point);
}

inline double value(std::string_view text, const dsl::Point& point = {}, const Captures& captures = {}) {
  return evaluate(text, point, captures).value;
}

inline bool mask(std::string_view text, const dsl::Point& point = {}, const Captures& captures = {}) {
  const auto expr = bound(text, captures, dsl::ModKind::kMaskMod);
  if (!expr) {
    ADD_FAILURE() << dsl::format_error(expr.error(), text);
    return false;
  }
  return dsl::Interpreter(*expr, views(*expr, captures)).mask_mod(point);
}

}  // namespace attnjit::test
