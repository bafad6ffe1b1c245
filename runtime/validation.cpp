// Every check of a caller's tensors, one function per rule, each failure naming the argument.
#include "runtime/validation.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <string_view>

namespace attnjit::runtime {
namespace {

using compiler::StrideClass;
using dsl::DType;

// DLPack's code for bool, younger than some dlpack.h files.
constexpr int kDlBool = 6;

constexpr std::string_view kFloatTypes = "float32, float16, bfloat16";
constexpr std::string_view kCaptureTypes = "bool, int8, int16, int32, int64, uint8, float16, bfloat16, float32";

Failure invalid(std::string message) { return {ATTNJIT_INVALID_ARGUMENT, std::move(message)}; }

// A tensor after the checks that all tensors share. Strides are filled in where the caller gave none, and where an
// extent is at most 1 (nobody may rely on such a stride) they are what a compact tensor has.
struct Tensor {
  std::string_view role, name;  // the role is "" or goes before the name
  char* data = nullptr;
  std::uintptr_t address = 0;  // of the first element, by what was given: also where data is not looked at
  DType dtype = DType::kF32;
  int rank = 0;
  std::int64_t extent[dsl::kMaxRank] = {};
  std::int64_t stride[dsl::kMaxRank] = {};
  bool empty = false;
  std::int64_t bytes = 0;  // from the first byte to behind the last one
};

std::string show(const std::int64_t* values, int count) {
  return fmt::format("({}{})", fmt::join(values, values + count, ", "), count == 1 ? "," : "");
}

std::string show_dtype(const DLDataType& type) {
  static constexpr std::array<std::string_view, 7> kCodes = {"int",    "uint",    "float", "handle",
                                                             "bfloat", "complex", "bool"};
  const std::string code =
      type.code < kCodes.size() ? std::string(kCodes[type.code]) : fmt::format("type code {}, bits ", type.code);
  return fmt::format("{}{}{}", code, type.bits, type.lanes == 1 ? "" : fmt::format(" with {} lanes", type.lanes));
}

// False: a type that attnjit has no use for.
bool to_dtype(const DLDataType& type, DType* dtype) {
  struct Row {
    int code, bits;
    DType dtype;
  };
  static constexpr Row kRows[] = {
      {kDlBool, 8, DType::kBool},  {kDLInt, 8, DType::kInt8},     {kDLInt, 16, DType::kInt16},
      {kDLInt, 32, DType::kInt32}, {kDLInt, 64, DType::kInt64},   {kDLUInt, 8, DType::kUInt8},
      {kDLFloat, 16, DType::kF16}, {kDLBfloat, 16, DType::kBF16}, {kDLFloat, 32, DType::kF32},
  };
  if (type.lanes != 1) return false;
  for (const Row& row : kRows) {
    if (row.code == type.code && row.bits == type.bits) {
      *dtype = row.dtype;
      return true;
    }
  }
  return false;
}

bool is_float(DType dtype) { return dtype == DType::kF32 || dtype == DType::kF16 || dtype == DType::kBF16; }

// Where DLPack says that a tensor is.
Check check_device(std::string_view name, const DLDevice& given, int* device) {
  switch (static_cast<int>(given.device_type)) {
    case kDLCPU:
    case kDLCUDAHost:
      *device = kCpu;
      return {};
    case kDLCUDA:
    case kDLCUDAManaged:
      if (given.device_id < 0) {
        return invalid(fmt::format("{} is on CUDA device {}; allowed: 0 and up", name, given.device_id));
      }
      *device = given.device_id;
      return {};
    default:
      return invalid(
          fmt::format("{} is on device type {}; allowed: {} (CPU), {} (CUDA), {} (CUDA, pinned CPU memory), "
                      "{} (CUDA, managed)",
                      name, static_cast<int>(given.device_type), static_cast<int>(kDLCPU), static_cast<int>(kDLCUDA),
                      static_cast<int>(kDLCUDAHost), static_cast<int>(kDLCUDAManaged)));
  }
}

// What is asked of one tensor beyond the common rules.
struct Demand {
  std::string_view dimensions;  // how an error spells the expected shape; empty: any rank from 0 to kMaxRank
  int rank = 0;
  std::string_view allowed_types;
  bool needs_data = false;
  int device = kCpu;         // where it has to be
  bool any_device = false;   // or anywhere
  bool host_scalar = false;  // or, of rank 0, on the CPU
};

Check check_tensor(std::string_view name, const DLTensor* given, const Demand& demand, Tensor* out) {
  if (!given) return invalid(fmt::format("{} is NULL; a tensor is needed", name));
  int device = kCpu;
  if (Check failure = check_device(name, given->device, &device)) return failure;
  if (device != demand.device && !demand.any_device) {
    return invalid(fmt::format("{} is on {} and q on {}; all tensors of a call are on one device{}", name,
                               device_text(device), device_text(demand.device),
                               demand.host_scalar && given->ndim == 0 ? ", or a scalar on the CPU" : ""));
  }
  if (demand.dimensions.empty()) {
    if (given->ndim < 0 || given->ndim > dsl::kMaxRank) {
      return invalid(fmt::format("{} has {} dimensions; allowed: 0 to {}", name, given->ndim, dsl::kMaxRank));
    }
  } else if (given->ndim != demand.rank) {
    return invalid(
        fmt::format("{} has {} dimensions; it needs {}: {}", name, given->ndim, demand.rank, demand.dimensions));
  }
  out->name = name;
  if (!to_dtype(given->dtype, &out->dtype) || (demand.allowed_types != kCaptureTypes && !is_float(out->dtype))) {
    return invalid(fmt::format("{} has dtype {}; allowed: {}", name, show_dtype(given->dtype), demand.allowed_types));
  }
  if (demand.allowed_types == "float32" && out->dtype != DType::kF32) {
    return invalid(fmt::format("{} has dtype {}; allowed: float32", name, dsl::dtype_name(out->dtype)));
  }
  out->rank = given->ndim;
  if (given->ndim > 0 && !given->shape) return invalid(fmt::format("{} has a NULL shape", name));
  std::int64_t count = 1;
  for (int i = 0; i < out->rank; ++i) {
    out->extent[i] = given->shape[i];
    if (out->extent[i] < 0 || out->extent[i] > kMaxExtent) {
      return invalid(
          fmt::format("{} has shape {}; allowed extents: 0 to {}", name, show(given->shape, out->rank), kMaxExtent));
    }
    out->empty = out->empty || out->extent[i] == 0;
    if (__builtin_mul_overflow(count, std::max<std::int64_t>(out->extent[i], 1), &count)) {
      return invalid(
          fmt::format("{} has shape {}: the number of elements exceeds 64 bits", name, show(given->shape, out->rank)));
    }
  }
  const std::int64_t size = dsl::dtype_size(out->dtype);
  const auto too_large = [&] {
    return invalid(fmt::format("{} has shape {}{}: its size in bytes exceeds 64 bits", name,
                               show(given->shape, out->rank),
                               given->strides ? " and strides " + show(given->strides, out->rank) : ""));
  };
  std::int64_t last = 0;  // offset of the last element
  std::int64_t compact = 1;
  for (int i = out->rank - 1; i >= 0; --i) {
    out->stride[i] = given->strides && out->extent[i] > 1 ? given->strides[i] : compact;
    if (out->stride[i] < 0) {
      return invalid(
          fmt::format("{} has strides {}; a negative one is not allowed", name, show(given->strides, out->rank)));
    }
    std::int64_t reach = 0;
    if (__builtin_mul_overflow(out->stride[i], std::max<std::int64_t>(out->extent[i], 1), &compact)) return too_large();
    if (out->empty || out->extent[i] <= 1) continue;
    if (__builtin_mul_overflow(out->extent[i] - 1, out->stride[i], &reach) ||
        __builtin_add_overflow(last, reach, &last)) {
      return too_large();
    }
  }
  if (__builtin_add_overflow(last, std::int64_t{1}, &last) || __builtin_mul_overflow(last, size, &out->bytes)) {
    return too_large();
  }
  out->address = reinterpret_cast<std::uintptr_t>(given->data) + given->byte_offset;
  if (!demand.needs_data || out->empty) return {};
  if (!given->data) return invalid(fmt::format("{} has a NULL data pointer", name));
  out->data = static_cast<char*>(given->data) + given->byte_offset;
  if (reinterpret_cast<std::uintptr_t>(out->data) % static_cast<std::uintptr_t>(size) != 0) {
    return invalid(fmt::format("{} has data at {}, byte_offset included; {} needs a multiple of {} bytes", name,
                               static_cast<const void*>(out->data), dsl::dtype_name(out->dtype), size));
  }
  return {};
}

// Puts the role of a caller's name into a message that starts with the name.
Failure with_role(Failure failure, std::string_view role, std::string_view name) {
  failure.message.replace(0, name.size(), fmt::format("{}{}", role, dsl::shortened(name)));
  return failure;
}

std::string spelled(const Tensor& t) { return fmt::format("{}{}", t.role, dsl::shortened(t.name)); }

Check check_innermost(const Tensor& t) {
  const int last = t.rank - 1;
  if (t.extent[last] <= 1 || t.stride[last] == 1) return {};
  return invalid(fmt::format("{} has strides {}; the innermost one must be 1", t.name, show(t.stride, t.rank)));
}

Check check_shape(const Tensor& t, std::string_view dimensions, std::initializer_list<std::int64_t> expected,
                  std::string_view because) {
  if (std::equal(expected.begin(), expected.end(), t.extent)) return {};
  return invalid(fmt::format("{} has shape {}; it needs {} = {}{}", t.name, show(t.extent, t.rank), dimensions,
                             show(expected.begin(), static_cast<int>(expected.size())), because));
}

// An output may not reach one element by two indices. Sorted by stride, each stride steps over all that lies inside.
Check check_no_self_overlap(const Tensor& t) {
  if (t.empty) return {};
  std::array<int, dsl::kMaxRank> order{};
  int count = 0;
  for (int i = t.rank - 1; i >= 0; --i) {
    if (t.extent[i] > 1) order[static_cast<std::size_t>(count++)] = i;
  }
  std::sort(order.begin(), order.begin() + count, [&](int a, int b) { return t.stride[a] < t.stride[b]; });
  std::int64_t inside = 0;
  for (int k = 0; k < count; ++k) {
    const int i = order[static_cast<std::size_t>(k)];
    if (t.stride[i] <= inside) {
      return invalid(fmt::format("{} has shape {} and strides {}: its elements overlap; an output needs one place each",
                                 spelled(t), show(t.extent, t.rank), show(t.stride, t.rank)));
    }
    inside += (t.extent[i] - 1) * t.stride[i];
  }
  return {};
}

// Where the byte ranges of two tensors meet, they can still be apart: interleaved slices of one buffer, as in a packed
// qkv. Take from each the contiguous bytes inside, and the greatest common divisor of all strides outside: slices that
// are apart modulo it never meet.
bool provably_apart(const Tensor& a, const Tensor& b) {
  if (a.empty || b.empty) return true;
  if (a.data + a.bytes <= b.data || b.data + b.bytes <= a.data) return true;
  std::int64_t period = 0;
  std::int64_t run[2] = {};
  const Tensor* both[2] = {&a, &b};
  for (int n = 0; n < 2; ++n) {
    const Tensor& t = *both[n];
    run[n] = dsl::dtype_size(t.dtype);
    std::array<int, dsl::kMaxRank> order{};
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.begin() + t.rank, [&](int i, int j) { return t.stride[i] < t.stride[j]; });
    for (int k = 0; k < t.rank; ++k) {
      const int i = order[static_cast<std::size_t>(k)];
      if (t.extent[i] <= 1 || t.stride[i] == 0) continue;
      const std::int64_t step = t.stride[i] * dsl::dtype_size(t.dtype);
      if (step == run[n]) {
        run[n] *= t.extent[i];
      } else {
        period = std::gcd(period, step);
      }
    }
  }
  if (period == 0 || run[0] > period || run[1] > period) return false;
  const std::int64_t apart = ((b.data - a.data) % period + period) % period;
  return apart >= run[0] && apart + run[1] <= period;
}

Check check_apart(const Tensor& output, const Tensor& other) {
  if (provably_apart(output, other)) return {};
  return invalid(fmt::format("{} shares memory with {}; an output must lie apart", spelled(output), spelled(other)));
}

std::uint8_t stride_class(std::int64_t extent, std::int64_t stride) {
  const StrideClass found = extent <= 1   ? StrideClass::kAny
                            : stride == 0 ? StrideClass::kZero
                            : stride == 1 ? StrideClass::kUnit
                                          : StrideClass::kAny;
  return static_cast<std::uint8_t>(found);
}

TensorView view(const Tensor& t) {
  TensorView result{.data = t.data, .dtype = t.dtype};
  std::copy_n(t.extent, 4, result.shape);
  std::copy_n(t.stride, 4, result.stride);
  return result;
}

// The widest access that every row of `t` allows.
int row_bytes(const Tensor& t) {
  if (t.empty) return kWidestAccess;
  const std::int64_t size = dsl::dtype_size(t.dtype);
  std::uint64_t bits = t.address | kWidestAccess;
  for (int i = 0; i < t.rank - 1; ++i) {
    if (t.extent[i] > 1) bits |= static_cast<std::uint64_t>(t.stride[i] * size);
  }
  // A pointer that is not even aligned to its element is refused by the run.
  return std::max(static_cast<int>(bits & (~bits + 1)), static_cast<int>(size));
}

bool is_far(const Tensor& t) {
  for (int i = 0; i < t.rank - 1; ++i) {
    if (t.extent[i] > 1 && t.stride[i] >= kFarBytes / dsl::dtype_size(t.dtype)) return true;
  }
  return false;
}

bool offsets_fit_32(const Tensor& t) {
  return t.bytes / dsl::dtype_size(t.dtype) - 1 <= std::numeric_limits<std::int32_t>::max();
}

// Sorted by name, so that the order in which a caller lists captures does not matter.
// `device` is where the call's other tensors are.
Check check_captures(const attnjit_attention& attention, bool needs_data, int device, bool any_device,
                     CheckedCall* call, Tensor* tensors) {
  const std::size_t count = attention.num_captures;
  if (count > static_cast<std::size_t>(dsl::kMaxCaptures)) {
    return invalid(fmt::format("num_captures is {}; allowed: 0 to {}", count, dsl::kMaxCaptures));
  }
  if (count > 0 && !attention.captures) return invalid(fmt::format("captures is NULL, but num_captures is {}", count));
  std::array<const attnjit_capture*, dsl::kMaxCaptures> sorted{};
  for (std::size_t i = 0; i < count; ++i) {
    const attnjit_capture& capture = attention.captures[i];
    if (!capture.name) return invalid(fmt::format("captures[{}].name is NULL", i));
    std::size_t place = i;
    for (; place > 0; --place) {
      const int order = std::strcmp(sorted[place - 1]->name, capture.name);
      if (order == 0) return invalid(fmt::format("captures has '{}' twice", dsl::shortened(capture.name)));
      if (order < 0) break;
      sorted[place] = sorted[place - 1];
    }
    sorted[place] = &capture;
  }
  call->signature.num_captures = static_cast<std::uint8_t>(count);
  call->forward.captures = call->captures;
  call->forward.num_captures = count;
  for (std::size_t i = 0; i < count; ++i) {
    Tensor& t = tensors[i];
    const DLTensor* const given = sorted[i]->tensor;
    int place = device;
    Check failure;
    // A scalar may stay on the CPU.
    if (device != kCpu && !any_device && given && given->ndim == 0) {
      failure = check_device(sorted[i]->name, given->device, &place);
      if (!failure && place == kCpu) call->forward.host_scalars |= 1u << i;
      if (place != kCpu) place = device;
    }
    if (!failure) {
      failure = check_tensor(sorted[i]->name, given,
                             {.dimensions = "",
                              .allowed_types = kCaptureTypes,
                              .needs_data = needs_data,
                              .device = place,
                              .any_device = any_device,
                              .host_scalar = true},
                             &t);
    }
    if (!failure && t.empty) {
      failure = invalid(
          fmt::format("{} has shape {}; a captured tensor needs at least one element", t.name, show(t.extent, t.rank)));
    }
    if (failure) return with_role(std::move(*failure), "captured ", sorted[i]->name);
    Signature::Capture& signature = call->signature.captures[i];
    dsl::CaptureView& captured = call->captures[i];
    call->capture_names[i] = sorted[i]->name;
    signature.dtype = static_cast<std::uint8_t>(t.dtype);
    signature.rank = static_cast<std::uint8_t>(t.rank);
    captured.data = t.data;
    captured.dtype = t.dtype;
    captured.rank = t.rank;
    if (device != kCpu) signature.offsets_fit_32 = offsets_fit_32(t) ? 1 : 0;
    for (int d = 0; d < t.rank; ++d) {
      // An extent of 1 is read at index 0 only: the same as a broadcast, and cheaper code.
      const std::int64_t stride = t.extent[d] == 1 ? 0 : t.stride[d];
      captured.extent[d] = signature.extent[d] = t.extent[d];
      captured.stride[d] = stride;
      signature.stride_class[d] = static_cast<std::uint8_t>(stride == 0   ? StrideClass::kZero
                                                            : stride == 1 ? StrideClass::kUnit
                                                                          : StrideClass::kAny);
    }
  }
  return {};
}

// What of a call's checks is shared by its parts.
struct Common {
  Purpose purpose = Purpose::kPrepare;
  int device = kCpu;
  bool any_device = false;
  bool needs_data = false;
  DType dtype = DType::kF32;  // q's

  Demand demand(std::string_view dimensions, int rank, std::string_view allowed_types) const {
    return {.dimensions = dimensions,
            .rank = rank,
            .allowed_types = allowed_types,
            .needs_data = needs_data,
            .device = device,
            .any_device = any_device};
  }
};

// A tensor of q's type and a shape that q, k and v leave no choice of.
Check check_feature_tensor(std::string_view name, const DLTensor* given, const Demand& demand, DType dtype,
                           std::string_view dimensions, std::initializer_list<std::int64_t> expected,
                           std::string_view because, Tensor* t) {
  if (Check failure = check_tensor(name, given, demand, t)) return failure;
  if (t->dtype != dtype) {
    return invalid(
        fmt::format("{} has dtype {}; it needs q's, {}", name, dsl::dtype_name(t->dtype), dsl::dtype_name(dtype)));
  }
  if (Check failure = check_shape(*t, dimensions, expected, because)) return failure;
  return check_innermost(*t);
}

// (batch, heads, seqlen_q) of float32.
Check check_row_tensor(std::string_view name, const DLTensor* given, const Common& common, const Tensor& q, Tensor* t,
                       RowView* view) {
  constexpr std::string_view kDimensions = "(batch, heads, seqlen_q)";
  if (Check failure = check_tensor(name, given, common.demand(kDimensions, 3, "float32"), t)) return failure;
  if (Check failure = check_shape(*t, kDimensions, {q.extent[0], q.extent[1], q.extent[2]}, " from q")) return failure;
  view->data = reinterpret_cast<float*>(t->data);
  std::copy_n(t->stride, 3, view->stride);
  return {};
}

// Tensors of a call by what is done to them.
struct TensorList {
  const Tensor* at[10 + dsl::kMaxCaptures];
  std::size_t count = 0;

  void add(const Tensor& t) { at[count++] = &t; }
  std::span<const Tensor* const> all() const { return {at, count}; }
};

// Every output is apart from all else.
Check check_outputs_apart(const TensorList& inputs, const TensorList& outputs) {
  for (std::size_t i = 0; i < outputs.count; ++i) {
    for (const Tensor* input : inputs.all()) {
      if (Check failure = check_apart(*outputs.at[i], *input)) return failure;
    }
    for (std::size_t j = 0; j < i; ++j) {
      if (Check failure = check_apart(*outputs.at[i], *outputs.at[j])) return failure;
    }
  }
  return {};
}

void note_memory(const TensorList& tensors, CheckedCall* call) {
  for (const Tensor* t : tensors.all()) {
    call->memory[call->num_memory++] = {t->role, t->name, t->data, t->empty ? t->data : t->data + t->bytes};
  }
}

// The rows of an input, or of an output, on CUDA. A tensor that is not there is a compact one.
void note_rows(std::string_view name, const Tensor* t, bool output, CheckedCall* call) {
  std::uint8_t bytes = kWidestAccess;
  if (t) bytes = static_cast<std::uint8_t>(row_bytes(*t));
  call->rows[call->num_rows++] = {name, bytes, output};
  std::uint8_t& least = output ? call->signature.store_bytes : call->signature.load_bytes;
  least = std::min(least, bytes);
}

// Captured tensors of floating types by name: what a gradient can be asked of.
std::string differentiable(const CheckedCall& call) {
  std::string names;
  for (std::size_t c = 0; c < call.forward.num_captures; ++c) {
    if (!is_float(call.captures[c].dtype)) continue;
    names += fmt::format("{}{}", names.empty() ? "" : ", ", dsl::shortened(call.capture_names[c]));
  }
  return names.empty() ? "none" : names;
}

// Of the captured tensors, which are checked. `tensors` has kMaxCaptures; those of wanted gradients are added to
// `outputs`.
Check check_capture_gradients(const attnjit_gradients& gradients, const Common& common, CheckedCall* call,
                              Tensor* tensors, TensorList* outputs) {
  const std::size_t count = gradients.num_captures;
  if (count > static_cast<std::size_t>(dsl::kMaxCaptures)) {
    return invalid(fmt::format("gradients.num_captures is {}; allowed: 0 to {}", count, dsl::kMaxCaptures));
  }
  if (count > 0 && !gradients.captures) {
    return invalid(fmt::format("gradients.captures is NULL, but gradients.num_captures is {}", count));
  }
  for (std::size_t i = 0; i < count; ++i) {
    const attnjit_capture_gradient& wanted = gradients.captures[i];
    if (!wanted.name) return invalid(fmt::format("gradients.captures[{}].name is NULL", i));
    std::size_t c = 0;
    while (c < call->forward.num_captures && std::strcmp(call->capture_names[c], wanted.name) != 0) ++c;
    if (c == call->forward.num_captures) {
      return invalid(fmt::format("gradients.captures has '{}', which captures lacks; allowed: {}",
                                 dsl::shortened(wanted.name), differentiable(*call)));
    }
    const dsl::CaptureView& captured = call->captures[c];
    if (!is_float(captured.dtype)) {
      return invalid(fmt::format("gradients.captures has '{}', which is captured as {}; allowed, of {}: {}",
                                 dsl::shortened(wanted.name), dsl::dtype_name(captured.dtype), kFloatTypes,
                                 differentiable(*call)));
    }
    const std::uint32_t bit = 1u << c;
    if (call->signature.capture_gradients & bit) {
      return invalid(fmt::format("gradients.captures has '{}' twice", dsl::shortened(wanted.name)));
    }
    call->signature.capture_gradients |= bit;
    // The oracle writes elsewhere.
    if (common.purpose == Purpose::kReference && !wanted.tensor) continue;
    constexpr std::string_view kRole = "the gradient of ";
    Tensor& t = tensors[c];
    Check failure = check_tensor(wanted.name, wanted.tensor, common.demand("", 0, kFloatTypes), &t);
    if (!failure && t.dtype != captured.dtype) {
      failure = invalid(fmt::format("{} has dtype {}; it needs the captured tensor's, {}", t.name,
                                    dsl::dtype_name(t.dtype), dsl::dtype_name(captured.dtype)));
    }
    if (!failure &&
        (t.rank != captured.rank || !std::equal(captured.extent, captured.extent + captured.rank, t.extent))) {
      failure = invalid(fmt::format("{} has shape {}; it needs the captured tensor's, {}", t.name,
                                    show(t.extent, t.rank), show(captured.extent, captured.rank)));
    }
    if (failure) return with_role(std::move(*failure), kRole, wanted.name);
    t.role = kRole;
    CaptureGradient& gradient = call->gradients.captures[c];
    gradient.data = t.data;
    std::copy_n(t.stride, t.rank, gradient.stride);
    outputs->add(t);
  }
  return {};
}

// What a backward has beside its attention: `inputs` and `outputs` are the call's tensors, in a kRun with what is added
// here apart from each other.
Check check_gradients(const attnjit_gradients& gradients, const Common& common, const Tensor& q, const Tensor& k,
                      const Tensor& v, TensorList* inputs, CheckedCall* call) {
  const bool explains = common.purpose == Purpose::kExplain || common.purpose == Purpose::kExplainCuda;
  const bool on_cuda = common.device != kCpu;
  Signature& s = call->signature;
  Tensor grad_out, grad_lse;
  const bool has_grad_out = gradients.grad_out || !explains;
  if (has_grad_out) {
    constexpr std::string_view kDimensions = "(batch, heads, seqlen_q, head_dim_v)";
    if (Check failure = check_feature_tensor(
            "grad_out", gradients.grad_out, common.demand(kDimensions, 4, kFloatTypes), common.dtype, kDimensions,
            {q.extent[0], q.extent[1], q.extent[2], v.extent[3]}, " from q and v", &grad_out)) {
      return failure;
    }
    call->gradients.grad_out = view(grad_out);
    inputs->add(grad_out);
  }
  if (on_cuda) note_rows("grad_out", has_grad_out ? &grad_out : nullptr, false, call);
  if (gradients.grad_lse) {
    if (Check failure =
            check_row_tensor("grad_lse", gradients.grad_lse, common, q, &grad_lse, &call->gradients.grad_lse)) {
      return failure;
    }
    s.has_grad_lse = 1;
    inputs->add(grad_lse);
  }

  Common common_out = common;
  common_out.needs_data = common.purpose == Purpose::kRun;
  TensorList outputs;
  Tensor dq, dk, dv;
  const struct {
    std::string_view name;
    const DLTensor* given;
    const Tensor& of;
    std::string_view because;
    Tensor& t;
    TensorView& view;
    std::uint8_t& wanted;
  } features[] = {{"dq", gradients.dq, q, ", q's", dq, call->gradients.dq, s.wants_dq},
                  {"dk", gradients.dk, k, ", k's", dk, call->gradients.dk, s.wants_dk},
                  {"dv", gradients.dv, v, ", v's", dv, call->gradients.dv, s.wants_dv}};
  for (const auto& f : features) {
    if (!f.given) continue;
    constexpr std::string_view kDimensions = "(batch, heads, sequence, head_dim)";
    const std::int64_t* const e = f.of.extent;
    if (Check failure = check_feature_tensor(f.name, f.given, common_out.demand(kDimensions, 4, kFloatTypes),
                                             common.dtype, kDimensions, {e[0], e[1], e[2], e[3]}, f.because, &f.t)) {
      return failure;
    }
    f.wanted = 1;
    f.view = view(f.t);
    outputs.add(f.t);
    if (on_cuda) note_rows(f.name, &f.t, true, call);
  }
  Tensor captured[dsl::kMaxCaptures];
  if (Check failure = check_capture_gradients(gradients, common_out, call, captured, &outputs)) return failure;
  for (const Tensor* t : outputs.all()) {
    if (Check failure = check_no_self_overlap(*t)) return failure;
  }
  if (outputs.count == 0 && (common.purpose == Purpose::kPrepare || common.purpose == Purpose::kRun)) {
    return invalid("gradients asks for none; at least one of dq, dk, dv and captures is needed");
  }
  const struct {
    std::string_view name;
    int given;
    std::uint8_t& flag;
  } flags[] = {{"deterministic", gradients.deterministic, s.deterministic},
               {"partial_keys", gradients.partial_keys, s.partial_keys}};
  for (const auto& f : flags) {
    if (f.given != 0 && f.given != 1) {
      return invalid(fmt::format("gradients.{} is {}; allowed: 0 and 1", f.name, f.given));
    }
    f.flag = static_cast<std::uint8_t>(f.given);
  }
  if (common.purpose != Purpose::kRun) return {};
  note_memory(*inputs, call);
  note_memory(outputs, call);
  return check_outputs_apart(*inputs, outputs);
}

// `gradients`: of a backward, where there is one.
Check check_tensors(const attnjit_attention* attention, const attnjit_gradients* gradients, Purpose purpose,
                    CheckedCall* call) {
  if (!attention) return invalid("attention is NULL");
  if (Check failure = check_struct("attention", "ATTNJIT_ATTENTION_INIT", attention, attention->struct_size,
                                   sizeof(attnjit_attention))) {
    return failure;
  }
  const bool needs_data = purpose == Purpose::kReference || purpose == Purpose::kRun;
  const bool explains = purpose == Purpose::kExplain || purpose == Purpose::kExplainCuda;
  const bool needs_results = purpose == Purpose::kPrepare || purpose == Purpose::kRun ||
                             (explains && attention->o != nullptr) ||
                             (purpose == Purpose::kReference && gradients && gradients->partial_keys == 1);

  // q, k, v.
  constexpr std::string_view kDimensions = "(batch, heads, sequence, head_dim)";
  Common common{.purpose = purpose, .needs_data = needs_data};
  // q says where the call is.
  common.any_device = purpose == Purpose::kExplainCuda;
  if (common.any_device) {
    common.device = 0;
  } else if (attention->q) {
    if (Check failure = check_device("q", attention->q->device, &common.device)) return failure;
    if (purpose == Purpose::kReference && common.device != kCpu) {
      return invalid(fmt::format("q is on {}; the reference reads CPU memory", device_text(common.device)));
    }
  }
  const int device = common.device;
  const Demand input = common.demand(kDimensions, 4, kFloatTypes);
  Tensor q, k, v;
  if (Check failure = check_tensor("q", attention->q, input, &q)) return failure;
  if (Check failure = check_tensor("k", attention->k, input, &k)) return failure;
  if (Check failure = check_tensor("v", attention->v, input, &v)) return failure;
  for (const Tensor* t : {&k, &v}) {
    if (t->dtype != q.dtype) {
      return invalid(fmt::format("{} has dtype {}; it needs q's, {}", t->name, dsl::dtype_name(t->dtype),
                                 dsl::dtype_name(q.dtype)));
    }
  }
  const std::int64_t batch = q.extent[0], heads = q.extent[1], seqlen_q = q.extent[2], head_dim = q.extent[3];
  const std::int64_t heads_kv = k.extent[1], seqlen_kv = k.extent[2], head_dim_v = v.extent[3];
  for (const Tensor* t : {&q, &v}) {
    if (t->extent[3] < 1 || t->extent[3] > kMaxHeadDim) {
      return invalid(
          fmt::format("{} has shape {}; allowed head dimensions: 1 to {}", t->name, show(t->extent, 4), kMaxHeadDim));
    }
  }
  if (Check failure = check_shape(k, "(batch, heads, sequence, head_dim)", {batch, heads_kv, seqlen_kv, head_dim},
                                  ", batch and head_dim as q's")) {
    return failure;
  }
  if (Check failure = check_shape(v, "(batch, heads, sequence, head_dim)", {batch, heads_kv, seqlen_kv, head_dim_v},
                                  ", batch, heads and sequence as k's")) {
    return failure;
  }
  if (heads_kv == 0 ? heads != 0 : heads % heads_kv != 0) {
    return invalid(fmt::format("q has {} heads and k has {}; q's must be a multiple of k's", heads, heads_kv));
  }
  for (const Tensor* t : {&q, &k, &v}) {
    if (Check failure = check_innermost(*t)) return failure;
  }

  common.dtype = q.dtype;

  // o, lse, row_max: outputs, but of a backward, which does not look at row_max.
  Tensor o, lse, row_max;
  TensorList results;
  if (needs_results) {
    if (Check failure = check_feature_tensor("o", attention->o, input, q.dtype, "(batch, heads, seqlen_q, head_dim_v)",
                                             {batch, heads, seqlen_q, head_dim_v}, " from q and v", &o)) {
      return failure;
    }
    call->forward.o = view(o);
    results.add(o);
    if (attention->lse || (gradients && !explains)) {
      if (Check failure = check_row_tensor("lse", attention->lse, common, q, &lse, &call->forward.lse)) return failure;
      call->signature.has_lse = gradients ? 0 : 1;
      results.add(lse);
    }
    if (attention->row_max && !gradients) {
      if (Check failure =
              check_row_tensor("row_max", attention->row_max, common, q, &row_max, &call->forward.row_max)) {
        return failure;
      }
      call->signature.has_row_max = 1;
      results.add(row_max);
    }
    if (!gradients) {
      for (const Tensor* t : results.all()) {
        if (Check failure = check_no_self_overlap(*t)) return failure;
      }
    }
  }

  Tensor captured[dsl::kMaxCaptures];
  if (Check failure = check_captures(*attention, needs_data, device, common.any_device, call, captured)) return failure;

  Signature& s = call->signature;
  if (device != kCpu) {
    s.load_bytes = s.store_bytes = kWidestAccess;
    for (const Tensor* t : {&q, &k, &v}) note_rows(t->name, t, false, call);
    note_rows("o", results.count > 0 ? &o : nullptr, gradients == nullptr, call);
    s.near_strides = gradients ? 0 : 1;
    for (const Tensor* t : {&q, &k, &v, &o}) {
      if (gradients || (t == &o && results.count == 0) || !is_far(*t)) continue;
      s.near_strides = 0;
      call->far = t->name;
    }
  }
  TensorList inputs;
  for (const Tensor* t : {&q, &k, &v}) inputs.add(*t);
  if (gradients) {
    for (const Tensor* t : results.all()) inputs.add(*t);
  }
  for (std::size_t c = 0; c < attention->num_captures; ++c) inputs.add(captured[c]);
  if (gradients) {
    s.backward = 1;
    if (Check failure = check_gradients(*gradients, common, q, k, v, &inputs, call)) return failure;
  } else if (purpose == Purpose::kRun) {
    note_memory(inputs, call);
    note_memory(results, call);
    if (Check failure = check_outputs_apart(inputs, results)) return failure;
  }

  if (attention->scale) {
    if (!std::isfinite(*attention->scale)) {
      return invalid(fmt::format("scale is {}; any finite number is allowed", *attention->scale));
    }
    call->forward.scale = *attention->scale;
  } else {
    call->forward.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  }
  const int backend = static_cast<int>(attention->backend);
  if (backend < ATTNJIT_BACKEND_AUTO || backend > ATTNJIT_BACKEND_SM90) {
    return invalid(fmt::format("backend is {}; allowed: {} (auto), {} (math), {} (cpu), {} (sm80), {} (sm90)", backend,
                               static_cast<int>(ATTNJIT_BACKEND_AUTO), static_cast<int>(ATTNJIT_BACKEND_MATH),
                               static_cast<int>(ATTNJIT_BACKEND_CPU), static_cast<int>(ATTNJIT_BACKEND_SM80),
                               static_cast<int>(ATTNJIT_BACKEND_SM90)));
  }
  if (attention->max_autotune != 0 && attention->max_autotune != 1) {
    return invalid(fmt::format("max_autotune is {}; allowed: 0 and 1", attention->max_autotune));
  }

  call->forward.q = view(q);
  call->forward.k = view(k);
  call->forward.v = view(v);
  s.batch = batch;
  s.num_heads = heads;
  s.num_heads_kv = heads_kv;
  s.seqlen_q = seqlen_q;
  s.seqlen_kv = seqlen_kv;
  s.head_dim = head_dim;
  s.head_dim_v = head_dim_v;
  s.dtype = static_cast<std::uint8_t>(q.dtype);
  s.backend = static_cast<std::uint8_t>(backend);
  s.device = device;
  if (device != kCpu && !gradients) {
    s.autotune = static_cast<std::uint8_t>(attention->max_autotune ? AutotuneMode::kOn : AutotuneMode::kOff);
  }
  for (int i = 0; i < 3; ++i) {
    s.q_stride[i] = stride_class(q.extent[i], q.stride[i]);
    s.k_stride[i] = stride_class(k.extent[i], k.stride[i]);
    s.v_stride[i] = stride_class(v.extent[i], v.stride[i]);
  }
  return {};
}

}  // namespace

Check check_struct(std::string_view name, std::string_view init, const void* object, std::size_t size,
                   std::size_t known) {
  // Far above what any header will have: a size beyond it was never set.
  constexpr std::size_t kMaxSize = 4096;
  if (size < known || size > kMaxSize) {
    return invalid(fmt::format("{}.struct_size is {}; it needs {}: start from {}", name, size, known, init));
  }
  // A caller built against a later header: what this library does not know must be left at zero.
  const auto* bytes = static_cast<const unsigned char*>(object);
  if (std::any_of(bytes + known, bytes + size, [](unsigned char byte) { return byte != 0; })) {
    return invalid(fmt::format("{} sets a field that this library (struct of {} bytes) does not know", name, known));
  }
  return {};
}

bool operator==(const Signature& a, const Signature& b) { return std::memcmp(&a, &b, sizeof(Signature)) == 0; }

void weaken(const Signature& plan, Signature* call) {
  call->autotune = plan.autotune;
  call->load_bytes = std::min(call->load_bytes, plan.load_bytes);
  call->store_bytes = std::min(call->store_bytes, plan.store_bytes);
  call->near_strides = std::min(call->near_strides, plan.near_strides);
  for (std::size_t i = 0; i < call->num_captures; ++i) {
    std::uint8_t& fits = call->captures[i].offsets_fit_32;
    fits = std::min(fits, plan.captures[i].offsets_fit_32);
  }
}

std::string device_text(int device) {
  return device == kCpu ? std::string("the CPU") : fmt::format("CUDA device {}", device);
}

Check check_call(const attnjit_attention* attention, Purpose purpose, CheckedCall* call) {
  return check_tensors(attention, nullptr, purpose, call);
}

Check check_backward_call(const attnjit_attention* attention, const attnjit_gradients* gradients, Purpose purpose,
                          CheckedCall* call) {
  if (!gradients) return invalid("gradients is NULL");
  if (Check failure = check_struct("gradients", "ATTNJIT_GRADIENTS_INIT", gradients, gradients->struct_size,
                                   sizeof(attnjit_gradients))) {
    return failure;
  }
  return check_tensors(attention, gradients, purpose, call);
}

Check check_workspace(const CheckedCall& call, const void* workspace, std::size_t size, std::size_t needed) {
  if (size < needed) return invalid(fmt::format("workspace_size is {}; the plan needs {}", size, needed));
  if (needed == 0) return {};
  if (!workspace) return invalid(fmt::format("workspace is NULL; the plan needs {} bytes", needed));
  const std::size_t alignment = call.signature.device == kCpu ? kWorkspaceAlignment : kCudaWorkspaceAlignment;
  if (reinterpret_cast<std::uintptr_t>(workspace) % alignment != 0) {
    return invalid(fmt::format("workspace is at {}; it needs a multiple of {} bytes", workspace, alignment));
  }
  const char* begin = static_cast<const char*>(workspace);
  for (std::size_t i = 0; i < call.num_memory; ++i) {
    const CheckedCall::Memory& memory = call.memory[i];
    if (memory.begin < begin + needed && begin < memory.end) {
      return invalid(fmt::format("workspace shares memory with {}{}; it must lie apart", memory.role,
                                 dsl::shortened(memory.name)));
    }
  }
  return {};
}

}  // namespace attnjit::runtime
