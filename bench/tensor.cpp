// Tensors that the tool owns.
#include "bench/tensor.h"

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <new>
#include <utility>

namespace attnjit::tool {

namespace {

constexpr std::uint8_t kDLBoolCode = 6;  // kDLBool of DLPack 0.8; the installed header may be older
constexpr std::align_val_t kAlignment{64};

constexpr std::array<ElementTypeInfo, 9> kTypes{{
    {ElementType::kBool, "bool", "BOOL", kDLBoolCode, 8},
    {ElementType::kUInt8, "uint8", "U8", kDLUInt, 8},
    {ElementType::kInt8, "int8", "I8", kDLInt, 8},
    {ElementType::kInt16, "int16", "I16", kDLInt, 16},
    {ElementType::kInt32, "int32", "I32", kDLInt, 32},
    {ElementType::kInt64, "int64", "I64", kDLInt, 64},
    {ElementType::kFloat16, "float16", "F16", kDLFloat, 16},
    {ElementType::kBFloat16, "bfloat16", "BF16", kDLBfloat, 16},
    {ElementType::kFloat32, "float32", "F32", kDLFloat, 32},
}};

constexpr std::pair<std::string_view, ElementType> kShortNames[] = {
    {"b1", ElementType::kBool},       {"u8", ElementType::kUInt8},     {"i8", ElementType::kInt8},
    {"i16", ElementType::kInt16},     {"i32", ElementType::kInt32},    {"i64", ElementType::kInt64},
    {"fp16", ElementType::kFloat16},  {"f16", ElementType::kFloat16},  {"half", ElementType::kFloat16},
    {"bf16", ElementType::kBFloat16}, {"fp32", ElementType::kFloat32}, {"f32", ElementType::kFloat32},
    {"float", ElementType::kFloat32},
};

template <typename T>
T load(const std::byte* at) {
  T value;
  std::memcpy(&value, at, sizeof value);
  return value;
}

template <typename T>
void store(std::byte* at, T value) {
  std::memcpy(at, &value, sizeof value);
}

}  // namespace

std::span<const ElementTypeInfo> element_types() { return kTypes; }

const ElementTypeInfo& info(ElementType type) { return kTypes[static_cast<std::size_t>(type)]; }

std::optional<ElementType> element_type_named(std::string_view name) {
  for (const ElementTypeInfo& row : kTypes) {
    if (row.name == name) return row.type;
  }
  for (const auto& [short_name, type] : kShortNames) {
    if (short_name == name) return type;
  }
  return std::nullopt;
}

std::string element_type_names() {
  std::string names;
  for (const ElementTypeInfo& row : kTypes) {
    if (!names.empty()) names += ", ";
    names += row.name;
  }
  return names;
}

float bfloat16_to_float(std::uint16_t bits) { return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16); }

std::uint16_t float_to_bfloat16(float value) {
  const std::uint32_t bits = std::bit_cast<std::uint32_t>(value);
  if (std::isnan(value)) return static_cast<std::uint16_t>(bits >> 16 | 0x40);
  return static_cast<std::uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

float float16_to_float(std::uint16_t bits) {
  const int exponent = bits >> 10 & 0x1f;
  const int mantissa = bits & 0x3ff;
  const float sign = bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa != 0 ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

std::uint16_t float_to_float16(float value) {
  const std::uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<std::uint16_t>(sign | 0x7e00);
  const double magnitude = std::fabs(static_cast<double>(value));
  if (magnitude >= 65520.0) return static_cast<std::uint16_t>(sign | 0x7c00);
  if (magnitude < 0x1p-14) {  // subnormal: a multiple of 2^-24; 1024 of them is the smallest normal number
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(std::nearbyint(magnitude * 0x1p24)));
  }
  int exponent = std::ilogb(magnitude);
  int mantissa = static_cast<int>(std::nearbyint(std::ldexp(magnitude, 10 - exponent)));
  if (mantissa == 2048) {
    mantissa = 1024;
    ++exponent;
  }
  return static_cast<std::uint16_t>(sign | (exponent + 15) << 10 | (mantissa - 1024));
}

double unit_roundoff(ElementType type) {
  switch (type) {
    case ElementType::kFloat32:
      return 0x1p-24;
    case ElementType::kFloat16:
      return 0x1p-11;
    case ElementType::kBFloat16:
      return 0x1p-8;
    default:
      return 0.0;
  }
}

bool holds(ElementType type, double value) {
  if (unit_roundoff(type) > 0.0) return true;
  const auto whole_between = [&](double low, double high) {
    return value == std::floor(value) && value >= low && value <= high;
  };
  switch (type) {
    case ElementType::kBool:
      return whole_between(0, 1);
    case ElementType::kUInt8:
      return whole_between(0, 255);
    case ElementType::kInt8:
      return whole_between(-128, 127);
    case ElementType::kInt16:
      return whole_between(-0x1p15, 0x1p15 - 1);
    case ElementType::kInt32:
      return whole_between(-0x1p31, 0x1p31 - 1);
    default:
      return whole_between(-0x1p53, 0x1p53);
  }
}

void Tensor::Free::operator()(std::byte* memory) const { ::operator delete[](memory, kAlignment); }

Tensor::Tensor(ElementType type, std::vector<std::int64_t> shape) : type_(type), shape_(std::move(shape)) {
  strides_.resize(shape_.size());
  std::int64_t stride = 1;
  for (std::size_t i = shape_.size(); i-- > 0;) {
    strides_[i] = stride;
    stride *= shape_[i];
  }
  // At least one byte, so that an empty tensor has an address.
  data_.reset(static_cast<std::byte*>(::operator new[](bytes() + 1, kAlignment)));
}

Tensor Tensor::sequence_major(ElementType type, std::int64_t batch, std::int64_t heads, std::int64_t sequence,
                              std::int64_t feature) {
  Tensor tensor(type, {batch, sequence, heads, feature});
  std::swap(tensor.shape_[1], tensor.shape_[2]);
  std::swap(tensor.strides_[1], tensor.strides_[2]);
  return tensor;
}

std::int64_t Tensor::size() const {
  std::int64_t product = 1;
  for (std::int64_t extent : shape_) product *= extent;
  return product;
}

std::size_t Tensor::bytes() const { return static_cast<std::size_t>(size()) * info(type_).bits / 8; }

double Tensor::get(std::int64_t offset) const {
  const std::byte* at = data_.get() + offset * (info(type_).bits / 8);
  switch (type_) {
    case ElementType::kBool:
      return load<std::uint8_t>(at) != 0;
    case ElementType::kUInt8:
      return load<std::uint8_t>(at);
    case ElementType::kInt8:
      return load<std::int8_t>(at);
    case ElementType::kInt16:
      return load<std::int16_t>(at);
    case ElementType::kInt32:
      return load<std::int32_t>(at);
    case ElementType::kInt64:
      return static_cast<double>(load<std::int64_t>(at));
    case ElementType::kFloat16:
      return float16_to_float(load<std::uint16_t>(at));
    case ElementType::kBFloat16:
      return bfloat16_to_float(load<std::uint16_t>(at));
    case ElementType::kFloat32:
      return load<float>(at);
  }
  return 0.0;
}

void Tensor::set(std::int64_t offset, double value) {
  std::byte* at = data_.get() + offset * (info(type_).bits / 8);
  switch (type_) {
    case ElementType::kBool:
      return store<std::uint8_t>(at, value != 0.0);
    case ElementType::kUInt8:
      return store(at, static_cast<std::uint8_t>(value));
    case ElementType::kInt8:
      return store(at, static_cast<std::int8_t>(value));
    case ElementType::kInt16:
      return store(at, static_cast<std::int16_t>(value));
    case ElementType::kInt32:
      return store(at, static_cast<std::int32_t>(value));
    case ElementType::kInt64:
      return store(at, static_cast<std::int64_t>(value));
    case ElementType::kFloat16:
      return store(at, float_to_float16(static_cast<float>(value)));
    case ElementType::kBFloat16:
      return store(at, float_to_bfloat16(static_cast<float>(value)));
    case ElementType::kFloat32:
      return store(at, static_cast<float>(value));
  }
}

void Tensor::get(std::int64_t offset, std::span<double> values) const {
  const std::byte* const from = data_.get() + offset * (info(type_).bits / 8);
  const auto widen = [&]<typename T>(T, const auto& convert) {
    for (std::size_t i = 0; i < values.size(); ++i) values[i] = convert(load<T>(from + i * sizeof(T)));
  };
  switch (type_) {
    case ElementType::kFloat16:
      return widen(std::uint16_t(), float16_to_float);
    case ElementType::kBFloat16:
      return widen(std::uint16_t(), [](std::uint16_t bits) { return bfloat16_to_float(bits); });
    case ElementType::kFloat32:
      return widen(float(), [](float value) { return value; });
    default:
      for (std::size_t i = 0; i < values.size(); ++i) values[i] = get(offset + static_cast<std::int64_t>(i));
  }
}

void Tensor::set(std::int64_t offset, std::span<const float> values) {
  std::byte* const to = data_.get() + offset * (info(type_).bits / 8);
  const auto round = [&](const auto& convert) {
    for (std::size_t i = 0; i < values.size(); ++i) store(to + i * sizeof(convert(values[i])), convert(values[i]));
  };
  switch (type_) {
    case ElementType::kFloat16:
      return round(float_to_float16);
    case ElementType::kBFloat16:
      return round([](float value) { return float_to_bfloat16(value); });
    default:
      return round([](float value) { return value; });
  }
}

DLTensor dl_without_data(ElementType type, const std::vector<std::int64_t>& shape) {
  return {.data = nullptr,
          .device = {kDLCPU, 0},
          .ndim = static_cast<int>(shape.size()),
          .dtype = {info(type).code, info(type).bits, 1},
          // DLPack has no const; nothing behind these pointers is written.
          .shape = const_cast<std::int64_t*>(shape.data()),
          .strides = nullptr,
          .byte_offset = 0};
}

DLTensor Tensor::dl() const {
  DLTensor tensor = dl_without_data(type_, shape_);
  tensor.data = data_.get();
  tensor.strides = const_cast<std::int64_t*>(strides_.data());
  return tensor;
}

}  // namespace attnjit::tool
