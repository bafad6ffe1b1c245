// Prints random expressions with inputs, the interpreter's values and their derivatives, one JSON object per line.
// Usage: attnjit_expression_samples COUNT SEED
#include <cstdio>
#include <cstdlib>
#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "dsl/derivative.h"
#include "tests/support/expression_text.h"
#include "tests/support/random_expression.h"
#include "tests/support/random_inputs.h"

namespace {

using namespace attnjit;

// Exact, infinities and NaN included.
std::string hex(double x) {
  char text[64];
  std::snprintf(text, sizeof(text), "%a", x);
  return text;
}

std::string hex(const std::vector<std::uint8_t>& bytes) {
  std::string text;
  char byte[3];
  for (const std::uint8_t b : bytes) {
    std::snprintf(byte, sizeof(byte), "%02x", b);
    text += byte;
  }
  return text;
}

// By the score, and by each captured element by its name and its place in the packed tensor.
nlohmann::json gradients(const dsl::ElementGradient& gradient, const dsl::Expr& expr,
                         const std::vector<dsl::CaptureView>& views) {
  std::map<std::string, double> sums = {{"score", gradient.dscore}};
  for (const dsl::Contribution& each : gradient.contributions) {
    const auto capture = static_cast<std::size_t>(each.capture);
    std::int64_t place = 0;
    for (int i = 0; i < views[capture].rank; ++i) place = place * views[capture].extent[i] + each.index[i];
    sums[expr.captures[capture].name + "[" + std::to_string(place) + "]"] += each.value;
  }
  nlohmann::json result = nlohmann::json::object();
  for (const auto& [name, value] : sums) result[name] = hex(value);
  return result;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: %s COUNT SEED\n", argv[0]);
    return 1;
  }
  std::mt19937_64 random(std::strtoull(argv[2], nullptr, 10));
  for (long i = std::strtol(argv[1], nullptr, 10); i > 0; --i) {
    const bool is_mask = random() % 4 == 0;
    const auto expression = test::random_expression(
        random, {.size = 1 + static_cast<int>(random() % 40), .is_mask = is_mask, .moderate = random() % 3 == 0});
    const auto captures = test::random_captures(random, expression);
    const auto bound =
        test::bound(expression.text, captures, is_mask ? dsl::ModKind::kMaskMod : dsl::ModKind::kScoreMod);
    if (!bound) {
      std::fprintf(stderr, "%s\n", dsl::format_error(bound.error(), expression.text).c_str());
      return 1;
    }
    nlohmann::json line = {{"text", expression.text}, {"is_mask", is_mask}};
    line["captures"] = nlohmann::json::object();
    for (const auto& [name, tensor] : captures) {
      line["captures"][name] = {
          {"dtype", dsl::dtype_name(tensor.dtype)}, {"shape", tensor.extent}, {"bytes", hex(tensor.bytes)}};
    }
    const auto views = test::views(*bound, captures);
    dsl::Interpreter interpreter(*bound, views);
    dsl::Derivative derivative(*bound, views);
    for (int p = 0; p < 6; ++p) {
      const dsl::Point point = test::random_point(random);
      nlohmann::json sample = {{"score", hex(point.score)}, {"indices", {point.b, point.h, point.q_idx, point.kv_idx}}};
      if (is_mask) {
        sample["value"] = interpreter.mask_mod(point);
      } else {
        const dsl::Element element = interpreter.score_mod(point);
        sample["value"] = hex(element.value);
        sample["keep"] = element.keep;
        sample["gradients"] = gradients(derivative.at(point, 1.0), *bound, views);
      }
      line["points"].push_back(sample);
    }
    std::printf("%s\n", line.dump().c_str());
  }
  return 0;
}
