// Tensors that the tool owns: element types by name, aligned memory, and a DLTensor to lend.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace attnjit::tool {

// What the library reads and writes.
enum class ElementType : std::uint8_t { kBool, kUInt8, kInt8, kInt16, kInt32, kInt64, kFloat16, kBFloat16, kFloat32 };

struct ElementTypeInfo {
  ElementType type;
  std::string_view name;         // "float32"
  std::string_view safetensors;  // "F32"
  std::uint8_t code;             // of DLDataType
  std::uint8_t bits;
};
std::span<const ElementTypeInfo> element_types();
const ElementTypeInfo& info(ElementType type);
// By the name of the language ("bfloat16") or a usual short one ("bf16", "i32"); nullopt if there is none.
std::optional<ElementType> element_type_named(std::string_view name);
// "bool, uint8, ...": for error messages.
std::string element_type_names();

float bfloat16_to_float(std::uint16_t bits);
std::uint16_t float_to_bfloat16(float value);  // round to nearest even, NaN stays NaN
float float16_to_float(std::uint16_t bits);
std::uint16_t float_to_float16(float value);  // round to nearest even, overflows to infinity, NaN stays NaN

// Unit roundoff of a floating type: 2^-24, 2^-11, 2^-8. 0 for the others.
double unit_roundoff(ElementType type);

// Whether Tensor::set stores `value` as it is: any number in a floating type (rounded), a whole one in the range of an
// integer type (of int64: up to 2^53, where doubles end), 0 or 1 in a bool.
bool holds(ElementType type, double value);

// A row-major tensor without memory, for a call that is prepared and not run. Points to `shape`.
DLTensor dl_without_data(ElementType type, const std::vector<std::int64_t>& shape);

// A tensor with memory of its own (64-byte aligned). Movable; a DLTensor lent out points into it and is good for as
// long as the object stays where it is.
class Tensor {
 public:
  Tensor() = default;
  // Row-major and uninitialised. Throws std::bad_alloc; `shape` is not negative and its product fits.
  Tensor(ElementType type, std::vector<std::int64_t> shape);
  // (batch, heads, sequence, feature) over memory ordered (batch, sequence, heads, feature), as a projection of
  // (batch, sequence, heads * feature) leaves it.
  static Tensor sequence_major(ElementType type, std::int64_t batch, std::int64_t heads, std::int64_t sequence,
                               std::int64_t feature);

  ElementType type() const { return type_; }
  const std::vector<std::int64_t>& shape() const { return shape_; }
  const std::vector<std::int64_t>& strides() const { return strides_; }  // in elements
  std::int64_t size() const;                                             // elements
  std::size_t bytes() const;
  std::byte* data() { return data_.get(); }
  const std::byte* data() const { return data_.get(); }

  // Element `offset` of the memory, widened or rounded. Bools and ints convert.
  double get(std::int64_t offset) const;
  void set(std::int64_t offset, double value);
  // As many neighbours from `offset` on as the span has: likewise, and many times faster. set() of floating types only.
  void get(std::int64_t offset, std::span<double> values) const;
  void set(std::int64_t offset, std::span<const float> values);

  DLTensor dl() const;

 private:
  struct Free {
    void operator()(std::byte* memory) const;
  };
  ElementType type_ = ElementType::kFloat32;
  std::vector<std::int64_t> shape_, strides_;
  std::unique_ptr<std::byte[], Free> data_;
};

}  // namespace attnjit::tool
