// Names and sizes of types, and how an expression error is shown.
#include "dsl/expr.h"

#include <algorithm>

namespace attnjit::dsl {

std::string_view type_name(Type type) {
  switch (type) {
    case Type::kBool: return "bool";
    case Type::kInt: return "int";
    case Type::kFloat: return "float";
  }
  return "?";
}

std::string_view dtype_name(DType dtype) {
  switch (dtype) {
    case DType::kBool: return "bool";
    case DType::kInt8: return "int8";
    case DType::kInt16: return "int16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kUInt8: return "uint8";
    case DType::kF16: return "float16";
    case DType::kBF16: return "bfloat16";
    case DType::kF32: return "float32";
  }
  return "?";
}

std::int64_t dtype_size(DType dtype) {
  switch (dtype) {
    case DType::kBool:
    case DType::kInt8:
    case DType::kUInt8: return 1;
    case DType::kInt16:
    case DType::kF16:
    case DType::kBF16: return 2;
    case DType::kInt32:
    case DType::kF32: return 4;
    case DType::kInt64: return 8;
  }
  return 0;
}

Type value_type(DType dtype) {
  switch (dtype) {
    case DType::kBool: return Type::kBool;
    case DType::kF16:
    case DType::kBF16:
    case DType::kF32: return Type::kFloat;
    default: return Type::kInt;
  }
}

std::string format_error(const Error& error, std::string_view text) {
  std::size_t begin = 0;
  for (int line = 1; line < error.location.line; ++line) {
    const std::size_t newline = text.find('\n', begin);
    if (newline == std::string_view::npos) break;
    begin = newline + 1;
  }
  const std::size_t end = std::min(text.find('\n', begin), text.size());
  std::string shown(text.substr(begin, end - begin));
  for (char& c : shown) {
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = ' ';
  }
  const std::size_t column = error.location.column > 0 ? static_cast<std::size_t>(error.location.column) - 1 : 0;
  return "line " + std::to_string(error.location.line) + ", column " + std::to_string(error.location.column) + ": " +
         error.message + "\n  " + shown + "\n  " + std::string(std::min(column, shown.size()), ' ') + "^";
}

}  // namespace attnjit::dsl
