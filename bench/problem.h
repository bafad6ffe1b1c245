// Problems made up for `explain` and `bench`: option values, inputs and captured tensors from a seed, sampled rows.
#pragma once

#include <attnjit/attnjit.h>

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "bench/api.h"
#include "bench/report.h"
#include "bench/tensor.h"

namespace attnjit::tool {

// "16,2" is (16, 2): query heads and key/value heads; "16" is (16, 16).
std::pair<std::int64_t, std::int64_t> parse_heads(const std::string& text);
// "1,16,512,16,512,64", parentheses and spaces allowed, as a report shows it: (B, Hq, Sq, Hkv, Skv, D).
Shape parse_shape(const std::string& text);
// A floating type for q, k, v and o.
ElementType parse_dtype(const std::string& text);
attnjit_backend parse_backend(const std::string& text);

// A captured tensor as an option describes it: "slopes:float32:Hq", "ids:int32:B,Sq", "cap:float32:=30".
struct CaptureSpec {
  std::string name;
  ElementType type = ElementType::kFloat32;
  std::vector<std::string> dims{};  // a number, or B, Hq, Hkv, Sq, Skv, D of the shape
  std::optional<double> value{};    // of every element
};
CaptureSpec parse_capture(const std::string& text);
// All of an option's; two for one name are an error.
std::vector<CaptureSpec> parse_captures(std::span<const std::string> texts);

// A mod as attnjit_list_mods describes it.
struct RegisteredMod {
  std::string name;
  std::vector<std::string> parameters;
  std::string body;
};
std::vector<RegisteredMod> registered_mods(attnjit_context* context);
// `text` with every registered name and call replaced by its body, so that its captured reads can be seen.
std::string expand_mods(const std::string& text, std::span<const RegisteredMod> mods);

// Extents that fit the reads of `name` in an expanded text: an index that mentions b, h, q_idx or kv_idx (or their
// other names) gets the extents of those, added up; an index that mentions none gets the longest of the shape. nullopt
// if no read of that rank is found. Any extent is legal, since reads are clamped; these let most reads be exact.
std::optional<std::vector<std::int64_t>> infer_extents(std::string_view expanded, std::string_view name, int rank,
                                                       const Shape& shape);

// Captured tensors of one problem with their memory; `lent` points into `tensors`.
struct Captures {
  std::vector<std::string> names;
  std::vector<Tensor> tensors;
  std::vector<DLTensor> dl;
  std::vector<attnjit_capture> lent;
  std::string description;  // "slopes float32 (16)"; empty without captures
};
// One for each captured name: by its spec, else float32 (standard normal) with inferred extents; a scalar without a
// spec is left out, and the library will refuse the call with the names that it knows. Integers rise along the last
// dimension from 0 to 7, so that they divide it into runs, as document numbers do; bools alternate at random. Without a
// seed nothing is filled and the lent tensors have no data. A spec for a name that neither text reads is an error when
// `strict`.
Captures make_captures(attnjit_context* context, const char* score_mod, const char* mask_mod,
                       std::span<const CaptureSpec> specs, std::span<const RegisteredMod> mods, const Shape& shape,
                       std::optional<std::uint64_t> seed, bool strict);

// Standard normal values, rounded to the tensor's floating type; the same for the same seed, on any number of threads.
void fill_normal(Tensor& tensor, std::uint64_t seed);

// Distinct rows: the corners, the rows around a panel's edge, then random ones. At most `count`, and all there are
// where that is fewer.
std::vector<attnjit_row> sample_rows(const Shape& shape, std::size_t count, std::uint64_t seed);

// PyTorch's spellings `-mods`, `-nh`, `-dtype` (and `-mods=x`) as CLI11 reads them, `--mods`: it knows no long names
// behind one dash. Stops at "--".
std::vector<std::string> normalize_arguments(std::span<const char* const> arguments);
// An argument as a shell takes it back.
std::string shell_quoted(const std::string& text);

}  // namespace attnjit::tool
