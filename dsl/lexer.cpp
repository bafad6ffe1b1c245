// Splits an expression's text into names, numbers and punctuation.
#include "dsl/lexer.h"

#include <algorithm>
#include <charconv>
#include <string>

namespace attnjit::dsl {
namespace {

// <cctype> depends on the locale.
bool is_digit(char c) { return c >= '0' && c <= '9'; }
bool is_hex_digit(char c) { return is_digit(c) || (c >= 'a' && c <= 'f') || (c >= 'A' && c <= 'F'); }
bool starts_name(char c) { return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }
bool continues_name(char c) { return starts_name(c) || is_digit(c); }

constexpr std::string_view kTwoCharacters[] = {"**", "//", "<=", ">=", "==", "!=", "<<", ">>",
                                               ":=", "&&", "||", "->", "+=", "-=", "*=", "/="};
constexpr std::string_view kOneCharacter = "+-*/%<>=()[],;&|~^@!?:.{}\"'";

class Lexer {
 public:
  explicit Lexer(std::string_view text) : text_(text) {}

  Expected<std::vector<Token>> run() {
    if (text_.size() > kMaxTextBytes) {
      return Error{
          "the text has " + std::to_string(text_.size()) + " bytes; the limit is " + std::to_string(kMaxTextBytes), {}};
    }
    for (;;) {
      skip_blanks();
      Token token{.location = location_};
      if (at_ == text_.size()) {
        tokens_.push_back(token);
        return std::move(tokens_);
      }
      const std::size_t begin = at_;
      const char c = text_[at_];
      if (is_digit(c) || (c == '.' && is_digit(peek(1)))) {
        if (!number(token)) return Error{error_, token.location};
      } else if (starts_name(c)) {
        token.kind = TokenKind::kName;
        while (continues_name(peek(0))) ++at_;
      } else if (!punctuation(token)) {
        return Error{error_, token.location};
      }
      token.text = text_.substr(begin, at_ - begin);
      location_.column += static_cast<int>(at_ - begin);
      tokens_.push_back(token);
    }
  }

 private:
  char peek(std::size_t ahead) const { return at_ + ahead < text_.size() ? text_[at_ + ahead] : '\0'; }

  void skip_blanks() {
    bool in_comment = false;
    for (; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (c == '\n') {
        in_comment = false;
        location_ = {.line = location_.line + 1, .column = 1};
        continue;
      }
      if (c == '#') in_comment = true;
      if (!in_comment && c != ' ' && c != '\t' && c != '\r') return;
      ++location_.column;
    }
  }

  bool punctuation(Token& token) {
    token.kind = TokenKind::kPunctuation;
    const std::string_view pair = text_.substr(at_, 2);
    if (std::find(std::begin(kTwoCharacters), std::end(kTwoCharacters), pair) != std::end(kTwoCharacters)) {
      at_ += 2;
      return true;
    }
    const char c = text_[at_];
    if (c != '\0' && kOneCharacter.find(c) != std::string_view::npos) {
      ++at_;
      return true;
    }
    const auto byte = static_cast<unsigned char>(c);
    if (byte > 0x20 && byte < 0x7f) {
      error_ = std::string("the character '") + c + "' has no meaning here";
    } else {
      constexpr char kHex[] = "0123456789abcdef";
      error_ = std::string("unexpected byte 0x") + kHex[byte >> 4] + kHex[byte & 15] + "; expressions are ASCII text";
    }
    return false;
  }

  bool number(Token& token) {
    const std::size_t begin = at_;
    if (text_[at_] == '0' && (peek(1) == 'x' || peek(1) == 'X')) {
      at_ += 2;
      while (is_hex_digit(peek(0))) ++at_;
      if (at_ == begin + 2) return fail("a hexadecimal number needs digits after 0x");
      return integer(token, text_.substr(begin + 2, at_ - begin - 2), 16) && ends(begin);
    }
    bool is_float = false;
    while (is_digit(peek(0))) ++at_;
    if (peek(0) == '.') {
      is_float = true;
      ++at_;
      while (is_digit(peek(0))) ++at_;
    }
    if (peek(0) == 'e' || peek(0) == 'E') {
      const std::size_t sign = peek(1) == '+' || peek(1) == '-' ? 1 : 0;
      if (is_digit(peek(1 + sign))) {
        is_float = true;
        at_ += 2 + sign;
        while (is_digit(peek(0))) ++at_;
      }
    }
    const std::string_view digits = text_.substr(begin, at_ - begin);
    if (is_float) return floating(token, digits) && ends(begin);
    if (digits.size() > 1 && digits[0] == '0' && ends(begin)) {
      return fail("leading zeros in '" + shortened(digits) +
                  "'; write the number without them, or hexadecimal as 0x...");
    }
    return integer(token, digits, 10) && ends(begin);
  }

  bool integer(Token& token, std::string_view digits, int base) {
    token.kind = TokenKind::kInt;
    const auto [end, status] = std::from_chars(digits.data(), digits.data() + digits.size(), token.int_value, base);
    if (status == std::errc()) return true;
    return fail("the integer '" + shortened(digits) + "' does not fit in 64 bits");
  }

  bool floating(Token& token, std::string_view digits) {
    token.kind = TokenKind::kFloat;
    const auto [end, status] = std::from_chars(digits.data(), digits.data() + digits.size(), token.float_value);
    if (status == std::errc()) return true;
    if (underflows(digits)) {
      token.float_value = 0.0;
      return true;
    }
    return fail("the number '" + shortened(digits) + "' is too large for a float; write inf for infinity");
  }

  // Of a literal that is out of range: whether it is too small rather than too large.
  static bool underflows(std::string_view digits) {
    const std::size_t e = digits.find_first_of("eE");
    long long exponent = 0;
    if (e != std::string_view::npos) {
      std::string_view text = digits.substr(e + 1);
      if (text.starts_with('+')) text.remove_prefix(1);
      const bool negative = text.starts_with('-');
      if (std::from_chars(text.data(), text.data() + text.size(), exponent).ec != std::errc()) return negative;
      // Far beyond any literal's digits, and safe to add to.
      exponent = std::clamp<long long>(exponent, -1'000'000'000, 1'000'000'000);
    }
    const std::string_view mantissa = digits.substr(0, e);
    const std::size_t point = std::min(mantissa.find('.'), mantissa.size());
    const std::size_t first = mantissa.find_first_of("123456789");
    if (first == std::string_view::npos) return true;
    return static_cast<long long>(point) - static_cast<long long>(first) + exponent < 0;
  }

  bool ends(std::size_t begin) {
    if (!continues_name(peek(0)) && peek(0) != '.') return true;
    std::size_t end = at_;
    while (end < text_.size() && (continues_name(text_[end]) || text_[end] == '.')) ++end;
    return fail("'" + shortened(text_.substr(begin, end - begin)) +
                "' is not a number; numbers are 12, 0x1f, 1.5, .5 and 1e-3");
  }

  bool fail(std::string message) {
    error_ = std::move(message);
    return false;
  }

  std::string_view text_;
  std::size_t at_ = 0;
  SourceLocation location_;
  std::vector<Token> tokens_;
  std::string error_;
};

}  // namespace

Expected<std::vector<Token>> lex(std::string_view text) { return Lexer(text).run(); }

bool is_name(std::string_view text) {
  return !text.empty() && starts_name(text[0]) && std::all_of(text.begin(), text.end(), continues_name);
}

}  // namespace attnjit::dsl
