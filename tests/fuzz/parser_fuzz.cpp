// Any text: parse it, and whatever parses must print and read back as the same tree, bind without a fault for any
// captured types, keep the bound tree's promises and evaluate. Whatever does not parse has an error inside the text.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <string_view>

#include "dsl/bind.h"
#include "dsl/functions.h"
#include "dsl/interpreter.h"
#include "dsl/parser.h"
#include "dsl/printer.h"

namespace {

using namespace attnjit::dsl;

void require(bool condition, const char* what, std::string_view text) {
  if (condition) return;
  std::fprintf(stderr, "%s:\n%.*s\n", what, static_cast<int>(text.size()), text.data());
  std::abort();
}

void check_error(const Error& error, std::string_view text) {
  int line = 1;
  for (const char c : text) line += c == '\n';
  require(!error.message.empty() && error.message.size() < 1000, "a message of a strange size", text);
  require(error.location.line >= 1 && error.location.line <= line && error.location.column >= 1 &&
              static_cast<std::size_t>(error.location.column) <= text.size() + 1,
          "an error outside the text", text);
  format_error(error, text);
}

void check_bound(const Expr& bound, ModKind kind, std::string_view text) {
  for (std::size_t n = 0; n < bound.nodes.size(); ++n) {
    const Node& node = bound.nodes[n];
    for (const NodeId arg : node.args) require(arg < static_cast<NodeId>(n), "an argument behind its user", text);
    const auto type = [&](std::size_t i) { return bound[node.args[i]].type; };
    switch (node.op) {
      case Op::kSelect:
        require(type(0) == Type::kBool && type(1) == type(2) && type(1) == node.type, "an ill-typed choice", text);
        break;
      case Op::kRead:
        for (std::size_t i = 0; i < node.args.size(); ++i) require(type(i) == Type::kInt, "an index not an int", text);
        break;
      default:
        if (node.args.size() == 2) require(type(0) == type(1), "operands of two types", text);
        break;
    }
  }
  require(bound[bound.root].type == (kind == ModKind::kScoreMod ? Type::kFloat : Type::kBool), "the root's type", text);
}

void evaluate(const Expr& bound, std::span<const CaptureBinding> bindings, ModKind kind, std::string_view text) {
  // Three elements in each of five dimensions, eight bytes each.
  static const auto data = [] {
    std::string bytes(243 * 8, '\0');
    for (std::size_t i = 0; i < bytes.size(); ++i) bytes[i] = static_cast<char>(i * 37);
    return bytes;
  }();
  std::vector<CaptureView> views;
  for (const CaptureBinding& binding : bindings) {
    CaptureView view{.data = data.data(), .dtype = binding.dtype, .rank = binding.rank};
    std::int64_t stride = 1;
    for (int i = 0; i < binding.rank; ++i, stride *= 3) {
      view.extent[i] = 3;
      view.stride[i] = stride;
    }
    views.push_back(view);
  }
  Interpreter interpreter(bound, views);
  const Point points[] = {{.score = 0.5, .b = 1, .h = 2, .q_idx = 3, .kv_idx = 4},
                          {.score = -std::numeric_limits<double>::infinity(), .q_idx = 100000},
                          {.score = std::numeric_limits<double>::quiet_NaN(), .h = 7, .kv_idx = 1 << 30}};
  for (const Point& point : points) {
    if (kind == ModKind::kMaskMod) {
      interpreter.mask_mod(point);
    } else {
      const Element element = interpreter.score_mod(point);
      require(element.keep || element.value == -std::numeric_limits<double>::infinity(), "a dropped value", text);
    }
  }
}

void check(std::string_view text, ModKind kind) {
  const auto expr = parse(text, kind);
  if (!expr) return check_error(expr.error(), text);
  require(expr->nodes.size() <= kMaxNodes && expr->captures.size() <= kMaxCaptures, "limits", text);
  const std::string printed = print(*expr);
  // Printed text may be longer than what was written: one name for a long one, no blanks.
  if (printed.size() <= kMaxTextBytes) {
    const auto again = parse(printed, kind);
    require(static_cast<bool>(again), "printed text does not parse", printed);
    require(same_structure(*expr, *again), "printed text is another tree", printed);
  }
  for (int shift = 0; shift < 3; ++shift) {
    constexpr DType kTypes[] = {DType::kF32, DType::kInt32, DType::kBool, DType::kBF16, DType::kInt64,
                                DType::kF16, DType::kUInt8, DType::kInt8, DType::kInt16};
    std::vector<CaptureBinding> bindings;
    for (const Capture& capture : expr->captures) {
      bindings.push_back(
          {.dtype = kTypes[(bindings.size() * 3 + static_cast<std::size_t>(shift)) % 9], .rank = capture.rank});
    }
    const auto bound = bind(*expr, bindings, kind);
    if (!bound) {
      check_error(bound.error(), text);
      continue;
    }
    check_bound(*bound, kind, text);
    evaluate(*bound, bindings, kind, text);
    const std::string typed = print(*bound);
    if (typed.size() > kMaxTextBytes || bound->nodes.size() > kMaxNodes) continue;
    const auto again = parse(typed, kind);
    require(static_cast<bool>(again), "printed bound text does not parse", typed);
    // A let may name captures in another order.
    std::vector<CaptureBinding> reordered;
    for (const Capture& capture : again->captures) {
      for (std::size_t i = 0; i < bindings.size(); ++i) {
        if (expr->captures[i].name == capture.name) reordered.push_back(bindings[i]);
      }
    }
    const auto rebound = bind(*again, reordered, kind);
    require(rebound && same_structure(*bound, *rebound), "printed bound text is another tree", typed);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  check(text, ModKind::kScoreMod);
  check(text, ModKind::kMaskMod);
  Registry registry;
  if (!registry.add({.name = "fuzzed", .parameters = {"k"}, .body = std::string(text)})) {
    const auto expr = parse("fuzzed(w)", ModKind::kScoreMod, registry);
    if (!expr) check_error(expr.error(), "fuzzed(w)");
  }
  return 0;
}
