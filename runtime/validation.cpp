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
  std::string_view name;
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
  int device = kCpu;        // where it has to be
  bool any_device = false;  // or anywhere
};

Check check_tensor(std::string_view name, const DLTensor* given, const Demand& demand, Tensor* out) {
  if (!given) return invalid(fmt::format("{} is NULL; a tensor is needed", name));
  int device = kCpu;
  if (Check failure = check_device(name, given->device, &device)) return failure;
  if (device != demand.device && !demand.any_device) {
    return invalid(fmt::format("{} is on {} and q on {}; all tensors of a call are on one device{}", name,
                               device_text(device), device_text(demand.device),
                               given->ndim == 0 ? ", or a scalar on the CPU" : ""));
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
                                 t.name, show(t.extent, t.rank), show(t.stride, t.rank)));
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
  return invalid(
      fmt::format("{} shares memory with {}; an output must lie apart", output.name, dsl::shortened(other.name)));
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
                              .any_device = any_device},
                             &t);
    }
    if (!failure && t.empty) {
      failure = invalid(
          fmt::format("{} has shape {}; a captured tensor needs at least one element", t.name, show(t.extent, t.rank)));
    }
    if (failure) {
      // It starts with the name.
      failure->message.replace(0, std::strlen(sorted[i]->name), "captured " + dsl::shortened(sorted[i]->name));
      return failure;
    }
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
  for (std::size_t i = 0; i < call->num_captures; ++i) {
    std::uint8_t& fits = call->captures[i].offsets_fit_32;
    fits = std::min(fits, plan.captures[i].offsets_fit_32);
  }
}

std::string device_text(int device) {
  return device == kCpu ? std::string("the CPU") : fmt::format("CUDA device {}", device);
}

Check check_call(const attnjit_attention* attention, Purpose purpose, CheckedCall* call) {
  if (!attention) return invalid("attention is NULL");
  if (Check failure = check_struct("attention", "ATTNJIT_ATTENTION_INIT", attention, attention->struct_size,
                                   sizeof(attnjit_attention))) {
    return failure;
  }
  const bool needs_data = purpose == Purpose::kReference || purpose == Purpose::kRun;
  const bool explains = purpose == Purpose::kExplain || purpose == Purpose::kExplainCuda;
  const bool needs_outputs =
      purpose == Purpose::kPrepare || purpose == Purpose::kRun || (explains && attention->o != nullptr);

  // q, k, v.
  constexpr std::string_view kDimensions = "(batch, heads, sequence, head_dim)";
  // q says where the call is.
  const bool any_device = purpose == Purpose::kExplainCuda;
  int device = any_device ? 0 : kCpu;
  if (!any_device && attention->q) {
    if (Check failure = check_device("q", attention->q->device, &device)) return failure;
    if (purpose == Purpose::kReference && device != kCpu) {
      return invalid(fmt::format("q is on {}; the reference reads CPU memory", device_text(device)));
    }
  }
  const Demand input{.dimensions = kDimensions,
                     .rank = 4,
                     .allowed_types = kFloatTypes,
                     .needs_data = needs_data,
                     .device = device,
                     .any_device = any_device};
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

  // o, lse, row_max.
  Tensor outputs[3];
  int num_outputs = 0;
  if (needs_outputs) {
    Tensor& o = outputs[num_outputs++];
    if (Check failure = check_tensor("o", attention->o, input, &o)) return failure;
    if (o.dtype != q.dtype) {
      return invalid(
          fmt::format("o has dtype {}; it needs q's, {}", dsl::dtype_name(o.dtype), dsl::dtype_name(q.dtype)));
    }
    if (Check failure = check_shape(o, "(batch, heads, seqlen_q, head_dim_v)", {batch, heads, seqlen_q, head_dim_v},
                                    " from q and v")) {
      return failure;
    }
    if (Check failure = check_innermost(o)) return failure;
    const struct {
      std::string_view name;
      const DLTensor* tensor;
      RowView* view;
      std::uint8_t* wanted;
    } rows[2] = {{"lse", attention->lse, &call->forward.lse, &call->signature.has_lse},
                 {"row_max", attention->row_max, &call->forward.row_max, &call->signature.has_row_max}};
    for (const auto& row : rows) {
      if (!row.tensor) continue;
      Tensor& t = outputs[num_outputs++];
      const Demand row_demand{.dimensions = "(batch, heads, seqlen_q)",
                              .rank = 3,
                              .allowed_types = "float32",
                              .needs_data = needs_data,
                              .device = device,
                              .any_device = any_device};
      if (Check failure = check_tensor(row.name, row.tensor, row_demand, &t)) return failure;
      if (Check failure = check_shape(t, "(batch, heads, seqlen_q)", {batch, heads, seqlen_q}, " from q")) {
        return failure;
      }
      *row.wanted = 1;
      row.view->data = reinterpret_cast<float*>(t.data);
      std::copy_n(t.stride, 3, row.view->stride);
    }
    for (int i = 0; i < num_outputs; ++i) {
      if (Check failure = check_no_self_overlap(outputs[i])) return failure;
    }
    call->forward.o = view(o);
  }

  Tensor captured[dsl::kMaxCaptures];
  if (Check failure = check_captures(*attention, needs_data, device, any_device, call, captured)) return failure;

  if (purpose == Purpose::kRun) {
    const auto note = [&](const Tensor& t) {
      call->memory[call->num_memory++] = {t.name, t.data, t.empty ? t.data : t.data + t.bytes};
    };
    for (const Tensor* t : {&q, &k, &v}) note(*t);
    for (int i = 0; i < num_outputs; ++i) note(outputs[i]);
    for (std::size_t c = 0; c < attention->num_captures; ++c) note(captured[c]);
    for (int i = 0; i < num_outputs; ++i) {
      for (const Tensor* t : {&q, &k, &v}) {
        if (Check failure = check_apart(outputs[i], *t)) return failure;
      }
      for (std::size_t c = 0; c < attention->num_captures; ++c) {
        if (Check failure = check_apart(outputs[i], captured[c])) return failure;
      }
      for (int j = 0; j < i; ++j) {
        if (Check failure = check_apart(outputs[i], outputs[j])) return failure;
      }
    }
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
  if (backend < ATTNJIT_BACKEND_AUTO || backend > ATTNJIT_BACKEND_SM80) {
    return invalid(fmt::format("backend is {}; allowed: {} (auto), {} (math), {} (cpu), {} (sm80)", backend,
                               static_cast<int>(ATTNJIT_BACKEND_AUTO), static_cast<int>(ATTNJIT_BACKEND_MATH),
                               static_cast<int>(ATTNJIT_BACKEND_CPU), static_cast<int>(ATTNJIT_BACKEND_SM80)));
  }
  if (attention->max_autotune != 0 && attention->max_autotune != 1) {
    return invalid(fmt::format("max_autotune is {}; allowed: 0 and 1", attention->max_autotune));
  }

  call->forward.q = view(q);
  call->forward.k = view(k);
  call->forward.v = view(v);
  call->forward.captures = call->captures;
  call->forward.num_captures = attention->num_captures;
  Signature& s = call->signature;
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
  if (device != kCpu) {
    s.autotune = static_cast<std::uint8_t>(attention->max_autotune ? AutotuneMode::kOn : AutotuneMode::kOff);
    // An o that is not there is a compact one.
    Tensor compact = {.dtype = q.dtype, .rank = 2, .extent = {2, head_dim_v}, .stride = {head_dim_v, 1}};
    const std::array<const Tensor*, 4> rows = {&q, &k, &v, num_outputs > 0 ? &outputs[0] : &compact};
    for (std::size_t i = 0; i < rows.size(); ++i) {
      call->row_bytes[i] = static_cast<std::uint8_t>(row_bytes(*rows[i]));
    }
    s.load_bytes = std::min({call->row_bytes[0], call->row_bytes[1], call->row_bytes[2]});
    s.store_bytes = call->row_bytes[3];
  }
  for (int i = 0; i < 3; ++i) {
    s.q_stride[i] = stride_class(q.extent[i], q.stride[i]);
    s.k_stride[i] = stride_class(k.extent[i], k.stride[i]);
    s.v_stride[i] = stride_class(v.extent[i], v.stride[i]);
  }
  return {};
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
      return invalid(fmt::format("workspace shares memory with {}; it must lie apart", dsl::shortened(memory.name)));
    }
  }
  return {};
}

}  // namespace attnjit::runtime
