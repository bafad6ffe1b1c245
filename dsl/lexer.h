// Text to tokens.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

#include "dsl/expr.h"

namespace attnjit::dsl {

enum class TokenKind : std::uint8_t { kName, kInt, kFloat, kPunctuation, kEnd };

struct Token {
  TokenKind kind = TokenKind::kEnd;
  std::string_view text = {};   // a slice of the lexed text; empty at the end
  std::uint64_t int_value = 0;  // kInt
  double float_value = 0.0;     // kFloat
  SourceLocation location;
};

// The tokens of `text`, kEnd last. Blanks, newlines and comments (`#` to the end of the line) separate tokens.
Expected<std::vector<Token>> lex(std::string_view text);

bool is_name(std::string_view text);  // a letter or `_`, then letters, digits and `_`

}  // namespace attnjit::dsl
