// attnjit in C++20: values, spans and Result over the C interface of attnjit.h. Header-only; throws nothing of its own.
//
//   auto context = attnjit::Context::create();
//   attnjit::Status status = context->register_mod(
//       "soft", [](auto score, auto b, auto h, auto q_idx, auto kv_idx) { return 30 * tanh(score / 30); });
//   status = context->forward({.q = {q, {1, 8, 512, 64}}, .k = {k, {1, 8, 512, 64}}, .v = {v, {1, 8, 512, 64}},
//                              .o = {o, {1, 8, 512, 64}}, .score_mod = "soft", .mask_mod = "causal"});
//   if (!status) std::cerr << status.message() << '\n';
#pragma once

#include <attnjit/attnjit.h>

#include <algorithm>
#include <array>
#include <attnjit/expr.hpp>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <initializer_list>
#include <memory>
#include <new>
#include <optional>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

namespace attnjit {

// ---- Status and Result ----------------------------------------------------------------------------------------------

// How a call ended, with the message of a failure.
class [[nodiscard]] Status {
 public:
  Status() = default;  // fine
  Status(attnjit_status code, std::string message) : code_(code), message_(std::move(message)) {}
  // Of a C call that this thread just made.
  static Status of(attnjit_status code) { return code == ATTNJIT_OK ? Status() : Status(code, attnjit_last_error()); }

  explicit operator bool() const { return code_ == ATTNJIT_OK; }
  attnjit_status code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  attnjit_status code_ = ATTNJIT_OK;
  std::string message_;
};

// A value, or the Status of why there is none. Look before you dereference.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : state_(std::move(value)) {}
  Result(Status status) : state_(std::move(status)) {}
  explicit operator bool() const { return std::holds_alternative<T>(state_); }
  T& operator*() & { return *std::get_if<T>(&state_); }
  const T& operator*() const& { return *std::get_if<T>(&state_); }
  T&& operator*() && { return std::move(*std::get_if<T>(&state_)); }
  T* operator->() { return std::get_if<T>(&state_); }
  const T* operator->() const { return std::get_if<T>(&state_); }
  // Fine where there is a value.
  Status status() const { return *this ? Status() : *std::get_if<Status>(&state_); }

 private:
  std::variant<T, Status> state_;
};

// ---- Tensors --------------------------------------------------------------------------------------------------------

enum class DType : std::uint8_t { kBool, kInt8, kInt16, kInt32, kInt64, kUInt8, kFloat16, kBFloat16, kFloat32 };

// The DType of a C++ type; 16-bit floats have none in C++20: name theirs.
template <typename T>
constexpr DType dtype_of() {
  using U = std::remove_cv_t<T>;
  static_assert(std::is_same_v<U, bool> || std::is_same_v<U, float> || std::is_same_v<U, std::uint8_t> ||
                    (std::is_integral_v<U> && std::is_signed_v<U>),
                "no attnjit dtype for this type; pass a DType");
  if constexpr (std::is_same_v<U, bool>) return DType::kBool;
  if constexpr (std::is_same_v<U, float>) return DType::kFloat32;
  if constexpr (std::is_same_v<U, std::uint8_t>) return DType::kUInt8;
  if constexpr (sizeof(U) == 1) return DType::kInt8;
  if constexpr (sizeof(U) == 2) return DType::kInt16;
  if constexpr (sizeof(U) == 4) return DType::kInt32;
  return DType::kInt64;
}

// Somebody's memory, seen as a tensor. Borrows data; keeps a copy of shape and strides. Strides count elements; without
// them the tensor is compact, the last dimension innermost. It is CPU memory unless on_cuda() says otherwise.
class TensorRef {
 public:
  static constexpr std::size_t kMaxRank = 5;
  using Extents = std::initializer_list<std::int64_t>;

  TensorRef() = default;  // no tensor
  template <typename T>
    requires(!std::is_void_v<T>)
  TensorRef(T* data, Extents shape, Extents strides = {})
      : TensorRef(data, dtype_of<T>(), std::span(shape.begin(), shape.size()),
                  std::span(strides.begin(), strides.size())) {}
  TensorRef(const void* data, DType dtype, Extents shape, Extents strides = {})
      : TensorRef(data, dtype, std::span(shape.begin(), shape.size()), std::span(strides.begin(), strides.size())) {}
  // `strides` is empty or as long as `shape`: any other length is refused by the call that gets the tensor.
  TensorRef(const void* data, DType dtype, std::span<const std::int64_t> shape,
            std::span<const std::int64_t> strides = {})
      : data_(const_cast<void*>(data)),
        dtype_(dtype),
        rank_(strides.empty() || strides.size() == shape.size() ? static_cast<std::int32_t>(shape.size()) : -1),
        has_strides_(!strides.empty()),
        given_(true) {
    std::copy_n(shape.begin(), std::min(shape.size(), kMaxRank), shape_.begin());
    std::copy_n(strides.begin(), std::min(strides.size(), kMaxRank), strides_.begin());
  }

  // The same tensor in the memory of a CUDA device.
  TensorRef on_cuda(int ordinal = 0) const {
    TensorRef tensor = *this;
    tensor.device_ = {kDLCUDA, ordinal};
    return tensor;
  }

  explicit operator bool() const { return given_; }
  void* data() const { return data_; }
  DType dtype() const { return dtype_; }
  DLDevice device() const { return device_; }
  std::span<const std::int64_t> shape() const {
    return {shape_.data(), std::min(static_cast<std::size_t>(std::max(rank_, 0)), kMaxRank)};
  }

  // Points into this object.
  DLTensor dlpack() const {
    return {.data = data_,
            .device = device_,
            .ndim = rank_,
            .dtype = dl_type(dtype_),
            .shape = const_cast<std::int64_t*>(shape_.data()),
            .strides = has_strides_ ? const_cast<std::int64_t*>(strides_.data()) : nullptr,
            .byte_offset = 0};
  }

 private:
  static DLDataType dl_type(DType dtype) {
    constexpr std::uint8_t kBool = 6;  // kDLBool, which older dlpack.h files lack
    switch (dtype) {
      case DType::kBool:
        return {kBool, 8, 1};
      case DType::kInt8:
        return {kDLInt, 8, 1};
      case DType::kInt16:
        return {kDLInt, 16, 1};
      case DType::kInt32:
        return {kDLInt, 32, 1};
      case DType::kInt64:
        return {kDLInt, 64, 1};
      case DType::kUInt8:
        return {kDLUInt, 8, 1};
      case DType::kFloat16:
        return {kDLFloat, 16, 1};
      case DType::kBFloat16:
        return {kDLBfloat, 16, 1};
      case DType::kFloat32:
        return {kDLFloat, 32, 1};
    }
    return {kDLFloat, 32, 1};
  }

  void* data_ = nullptr;
  DLDevice device_ = {kDLCPU, 0};
  DType dtype_ = DType::kFloat32;
  std::int32_t rank_ = 0;  // -1: strides and shape disagree
  bool has_strides_ = false;
  bool given_ = false;
  std::array<std::int64_t, kMaxRank> shape_{};
  std::array<std::int64_t, kMaxRank> strides_{};
};

// ---- One attention call ---------------------------------------------------------------------------------------------

enum class Backend {
  kAuto = ATTNJIT_BACKEND_AUTO,
  kMath = ATTNJIT_BACKEND_MATH,
  kCpu = ATTNJIT_BACKEND_CPU,
  kSm80 = ATTNJIT_BACKEND_SM80,
  kSm90 = ATTNJIT_BACKEND_SM90,
};

// An expression: text, a registered name, a lambda (expr.hpp: of five values as a score_mod, of four as a mask_mod), or
// none.
class Mod {
 public:
  Mod() = default;
  Mod(const char* text) : text_(text ? std::optional<std::string>(text) : std::nullopt) {}  // NULL: none
  Mod(std::string text) : text_(std::move(text)) {}
  Mod(const ScoreMod& mod) : text_(mod.text()) {}
  Mod(const MaskMod& mod) : text_(mod.text()) {}
  template <typename Lambda>
    requires std::is_invocable_v<Lambda&, Value, Value, Value, Value, Value>
  Mod(Lambda&& lambda) : Mod(attnjit::score_mod(std::forward<Lambda>(lambda))) {}
  template <typename Lambda>
    requires std::is_invocable_v<Lambda&, Value, Value, Value, Value>
  Mod(Lambda&& lambda) : Mod(attnjit::mask_mod(std::forward<Lambda>(lambda))) {}
  const char* c_str() const { return text_ ? text_->c_str() : nullptr; }

 private:
  std::optional<std::string> text_;
};

// A captured tensor or scalar (shape {}), by the name the expression gives it.
struct Capture {
  std::string name;
  TensorRef tensor;
};

// The arguments of a call; attnjit_attention in attnjit.h says what each must be.
struct Attention {
  TensorRef q, k, v;       // (B, Hq, Sq, D), (B, Hkv, Skv, D), (B, Hkv, Skv, Dv)
  TensorRef o = {};        // (B, Hq, Sq, Dv)
  TensorRef lse = {};      // (B, Hq, Sq) float32, wanted where given
  TensorRef row_max = {};  // likewise
  Mod score_mod = {};
  Mod mask_mod = {};
  std::vector<Capture> captures = {};
  std::optional<float> scale = {};  // none: 1 / sqrt(D)
  Backend backend = Backend::kAuto;
  bool max_autotune = false;  // on a GPU, the configuration is found by timing a few when a plan is made
};

// A captured tensor whose gradient is wanted.
struct CaptureGradient {
  std::string name;
  TensorRef tensor;  // of the captured tensor's shape and type
};

// What a backward is given beside its Attention, and what it computes: see attnjit_gradients. The Attention's o and lse
// are what the forward computed. Outputs that are left out are not wanted.
struct Gradients {
  TensorRef grad_out;
  TensorRef grad_lse = {};
  TensorRef dq = {};
  TensorRef dk = {};
  TensorRef dv = {};
  std::vector<CaptureGradient> captures = {};
  bool deterministic = false;  // two runs on one machine give the same bits
  bool partial_keys = false;   // k and v are a part of the keys that o and lse are of
};

// What Context::reference_backward gives, packed: of one batch and key/value head. Beside each gradient stands what a
// float32 kernel may be off by.
struct ReferenceGradients {
  std::vector<double> dq, dq_bound;                           // (Hq / Hkv, Sq, D)
  std::vector<double> dk, dk_bound;                           // (Skv, D)
  std::vector<double> dv, dv_bound;                           // (Skv, Dv)
  std::vector<std::vector<double>> captures, capture_bounds;  // in the order of Gradients::captures
};

namespace detail {

inline constexpr std::size_t kMaxCaptures = 16;

// The C structs of an Attention, on the stack; points into it and into itself.
class CAttention {
 public:
  explicit CAttention(const Attention& a) {
    const std::array<const TensorRef*, 6> given = {&a.q, &a.k, &a.v, &a.o, &a.lse, &a.row_max};
    std::array<DLTensor*, 6> pointers{};
    for (std::size_t i = 0; i < given.size(); ++i) {
      if (!*given[i]) continue;
      tensors_[i] = given[i]->dlpack();
      pointers[i] = &tensors_[i];
    }
    for (std::size_t i = 0; i < std::min(a.captures.size(), captures_.size()); ++i) {
      captured_[i] = a.captures[i].tensor.dlpack();
      captures_[i] = {a.captures[i].name.c_str(), a.captures[i].tensor ? &captured_[i] : nullptr};
    }
    attention_.score_mod = a.score_mod.c_str();
    attention_.mask_mod = a.mask_mod.c_str();
    attention_.q = pointers[0];
    attention_.k = pointers[1];
    attention_.v = pointers[2];
    attention_.o = pointers[3];
    attention_.lse = pointers[4];
    attention_.row_max = pointers[5];
    // More than the array holds is more than the library allows: it refuses before it reads any.
    attention_.captures = captures_.data();
    attention_.num_captures = a.captures.size();
    attention_.scale = a.scale ? &*a.scale : nullptr;
    attention_.backend = static_cast<attnjit_backend>(a.backend);
    attention_.max_autotune = a.max_autotune ? 1 : 0;
  }
  CAttention(const CAttention&) = delete;
  CAttention& operator=(const CAttention&) = delete;
  const attnjit_attention* get() const { return &attention_; }

 private:
  // Only those that are given are ever filled in and pointed to.
  std::array<DLTensor, 6> tensors_;
  std::array<DLTensor, kMaxCaptures> captured_;
  std::array<attnjit_capture, kMaxCaptures> captures_{};
  attnjit_attention attention_ = ATTNJIT_ATTENTION_INIT;
};

// Likewise of Gradients.
class CGradients {
 public:
  explicit CGradients(const Gradients& g) {
    const std::array<const TensorRef*, 5> given = {&g.grad_out, &g.grad_lse, &g.dq, &g.dk, &g.dv};
    std::array<DLTensor*, 5> pointers{};
    for (std::size_t i = 0; i < given.size(); ++i) {
      if (!*given[i]) continue;
      tensors_[i] = given[i]->dlpack();
      pointers[i] = &tensors_[i];
    }
    for (std::size_t i = 0; i < std::min(g.captures.size(), captures_.size()); ++i) {
      captured_[i] = g.captures[i].tensor.dlpack();
      captures_[i] = {g.captures[i].name.c_str(), g.captures[i].tensor ? &captured_[i] : nullptr};
    }
    gradients_.grad_out = pointers[0];
    gradients_.grad_lse = pointers[1];
    gradients_.dq = pointers[2];
    gradients_.dk = pointers[3];
    gradients_.dv = pointers[4];
    gradients_.captures = captures_.data();
    gradients_.num_captures = g.captures.size();
    gradients_.deterministic = g.deterministic ? 1 : 0;
    gradients_.partial_keys = g.partial_keys ? 1 : 0;
  }
  CGradients(const CGradients&) = delete;
  CGradients& operator=(const CGradients&) = delete;
  const attnjit_gradients* get() const { return &gradients_; }

 private:
  std::array<DLTensor, 5> tensors_;
  std::array<DLTensor, kMaxCaptures> captured_;
  std::array<attnjit_capture_gradient, kMaxCaptures> captures_{};
  attnjit_gradients gradients_ = ATTNJIT_GRADIENTS_INIT;
};

// Takes over a text that the library allocated.
inline Result<std::string> take(attnjit_status status, char* text) {
  if (status != ATTNJIT_OK) return Status::of(status);
  std::string copy(text);
  attnjit_free(text);
  return copy;
}

}  // namespace detail

// ---- Workspace, Plan, Context ---------------------------------------------------------------------------------------

// Somebody's scratch memory: on a plan's CUDA device, aligned to 256 bytes.
struct WorkspaceRef {
  void* data = nullptr;
  std::size_t size = 0;
};

// Scratch memory with the alignment that a run on the CPU needs.
class Workspace {
 public:
  Workspace() = default;
  explicit Workspace(std::size_t size)
      : memory_(size ? ::operator new(size, kAlignment, std::nothrow) : nullptr), size_(memory_ ? size : 0) {}
  void* data() const { return memory_.get(); }
  std::size_t size() const { return size_; }  // 0 where there was no memory
  operator WorkspaceRef() const { return {memory_.get(), size_}; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(void* memory) const { ::operator delete(memory, kAlignment); }
  };
  std::unique_ptr<void, Free> memory_;
  std::size_t size_ = 0;
};

// Compiled code for one problem. Usable from several threads at once, each with its own workspace; outlives its
// context.
class Plan {
 public:
  explicit Plan(attnjit_plan* plan) : plan_(plan) {}

  std::size_t workspace_size() const { return attnjit_plan_workspace_size(plan_.get()); }
  Backend backend() const { return static_cast<Backend>(attnjit_plan_backend(plan_.get())); }
  std::string description() const { return attnjit_plan_description(plan_.get()); }  // JSON

  // Shapes, dtypes, texts and captured names are those that were prepared; data, captured values and scale may change.
  // `stream`: of a plan on a CUDA device, the CUstream that the work is queued on, null being the legacy default
  // stream; null on the CPU.
  Status run(const Attention& attention, WorkspaceRef workspace = {}, void* stream = nullptr) const {
    const detail::CAttention c(attention);
    return Status::of(attnjit_run(plan_.get(), c.get(), workspace.data, workspace.size, stream));
  }

  // Likewise with a plan of a backward. Which gradients are wanted is as prepared.
  Status run_backward(const Attention& attention, const Gradients& gradients, WorkspaceRef workspace = {},
                      void* stream = nullptr) const {
    const detail::CAttention c(attention);
    const detail::CGradients g(gradients);
    return Status::of(attnjit_run_backward(plan_.get(), c.get(), g.get(), workspace.data, workspace.size, stream));
  }

  attnjit_plan* get() const { return plan_.get(); }

 private:
  struct Destroy {
    void operator()(attnjit_plan* plan) const { attnjit_plan_destroy(plan); }
  };
  std::unique_ptr<attnjit_plan, Destroy> plan_;
};

// What a training step runs.
struct TrainingPlans {
  Plan forward;
  Plan backward;
};

struct ContextOptions {
  int num_threads = 0;                 // of one call, the caller's included; 0: one per processor this process may use
  std::vector<Backend> backends = {};  // those that may be picked; none: what ATTNJIT_BACKENDS says, or all
};

// One query row of a problem.
using Row = attnjit_row;

// Registered mods, compiled plans and threads. Usable from several threads at once.
class Context {
 public:
  static Result<Context> create(const ContextOptions& options = {}) {
    attnjit_context_options c = ATTNJIT_CONTEXT_OPTIONS_INIT;
    c.num_threads = options.num_threads;
    for (const Backend backend : options.backends) c.backends |= 1u << static_cast<unsigned>(backend);
    attnjit_context* context = nullptr;
    if (const attnjit_status status = attnjit_context_create(&c, &context); status != ATTNJIT_OK) {
      return Status::of(status);
    }
    return Context(context);
  }

  // Names an expression; later texts may use `name`, or `name(argument, ...)` where it has parameters.
  Status register_mod(const std::string& name, const Mod& body, const std::vector<std::string>& parameters = {}) {
    return add(name, body, parameters, 0);
  }
  // The same for a condition that says which elements are kept.
  Status register_mask(const std::string& name, const Mod& body, const std::vector<std::string>& parameters = {}) {
    return add(name, body, parameters, 1);
  }

  // Validates and compiles, or finds the compiled plan. Data is not looked at.
  Result<Plan> prepare(const Attention& attention) const {
    const detail::CAttention c(attention);
    attnjit_plan* plan = nullptr;
    if (const attnjit_status status = attnjit_prepare(context_.get(), c.get(), &plan); status != ATTNJIT_OK) {
      return Status::of(status);
    }
    return Plan(plan);
  }

  // The same for the backward.
  Result<Plan> prepare_backward(const Attention& attention, const Gradients& gradients) const {
    const detail::CAttention c(attention);
    const detail::CGradients g(gradients);
    attnjit_plan* plan = nullptr;
    const attnjit_status status = attnjit_prepare_backward(context_.get(), c.get(), g.get(), nullptr, &plan);
    if (status != ATTNJIT_OK) return Status::of(status);
    return Plan(plan);
  }

  // Both, compiled at the same time.
  Result<TrainingPlans> prepare_training(const Attention& attention, const Gradients& gradients) const {
    const detail::CAttention c(attention);
    const detail::CGradients g(gradients);
    attnjit_plan *forward = nullptr, *backward = nullptr;
    const attnjit_status status = attnjit_prepare_backward(context_.get(), c.get(), g.get(), &forward, &backward);
    if (status != ATTNJIT_OK) return Status::of(status);
    return TrainingPlans{Plan(forward), Plan(backward)};
  }

  // Prepares, allocates a workspace and runs, on the CPU. To call again and again, keep the Plan and the Workspace
  // instead.
  Status forward(const Attention& attention) const {
    return with_workspace(prepare(attention), attention,
                          [&](const Plan& plan, const Workspace& workspace) { return plan.run(attention, workspace); });
  }
  Status backward(const Attention& attention, const Gradients& gradients) const {
    return with_workspace(prepare_backward(attention, gradients), attention,
                          [&](const Plan& plan, const Workspace& workspace) {
                            return plan.run_backward(attention, gradients, workspace);
                          });
  }

  // The same with what the caller has: a workspace, and on a CUDA device the stream to queue on. While the stream is
  // being captured, what was not prepared is refused with ATTNJIT_NOT_PREPARED.
  Status forward(const Attention& attention, WorkspaceRef workspace, void* stream = nullptr) const {
    const detail::CAttention c(attention);
    return Status::of(attnjit_forward(context_.get(), c.get(), workspace.data, workspace.size, stream));
  }
  Status backward(const Attention& attention, const Gradients& gradients, WorkspaceRef workspace,
                  void* stream = nullptr) const {
    const detail::CAttention c(attention);
    const detail::CGradients g(gradients);
    return Status::of(attnjit_backward(context_.get(), c.get(), g.get(), workspace.data, workspace.size, stream));
  }

  // The double-precision oracle: o (rows, Dv), lse and row_max (rows), each of that size or empty.
  Status reference(const Attention& attention, std::span<const Row> rows, std::span<double> o,
                   std::span<double> lse = {}, std::span<double> row_max = {}) const {
    const std::size_t o_size = rows.size() * head_dim_v(attention);
    if (!fits(o, o_size)) return wrong_size("o", o.size(), o_size);
    if (!fits(lse, rows.size())) return wrong_size("lse", lse.size(), rows.size());
    if (!fits(row_max, rows.size())) return wrong_size("row_max", row_max.size(), rows.size());
    const detail::CAttention c(attention);
    return Status::of(attnjit_reference(context_.get(), c.get(), rows.data(), rows.size(), data_or_null(o),
                                        data_or_null(lse), data_or_null(row_max)));
  }

  // What a float32 kernel may be off the oracle by: o_bound (rows, Dv), lse_bound and decided (rows), each of that size
  // or empty. `decided` is 0 in rows that float32 does not decide; there the bounds are infinite.
  Status reference_bounds(const Attention& attention, std::span<const Row> rows, std::span<double> o_bound,
                          std::span<double> lse_bound = {}, std::span<unsigned char> decided = {}) const {
    const std::size_t o_size = rows.size() * head_dim_v(attention);
    if (!fits(o_bound, o_size)) return wrong_size("o_bound", o_bound.size(), o_size);
    if (!fits(lse_bound, rows.size())) return wrong_size("lse_bound", lse_bound.size(), rows.size());
    if (!fits(decided, rows.size())) return wrong_size("decided", decided.size(), rows.size());
    const detail::CAttention c(attention);
    return Status::of(attnjit_reference_bounds(context_.get(), c.get(), rows.data(), rows.size(), data_or_null(o_bound),
                                               data_or_null(lse_bound), data_or_null(decided)));
  }

  // The oracle of gradients. Outputs of `gradients` need no data, and those of captures no tensor.
  Result<ReferenceGradients> reference_backward(const Attention& attention, const Gradients& gradients, std::int64_t b,
                                                std::int64_t h_kv) const {
    // Where a shape is not what it has to be, nothing is written.
    const auto extent = [](const TensorRef& tensor, std::size_t dimension) {
      const std::span<const std::int64_t> shape = tensor.shape();
      return shape.size() == 4 ? static_cast<std::size_t>(std::max<std::int64_t>(shape[dimension], 0)) : 0;
    };
    const std::size_t heads_kv = extent(attention.k, 1), seqlen_kv = extent(attention.k, 2);
    const std::size_t heads = heads_kv > 0 ? extent(attention.q, 1) / heads_kv : 0;
    ReferenceGradients result;
    try {
      result.dq.resize(heads * extent(attention.q, 2) * extent(attention.q, 3));
      result.dk.resize(seqlen_kv * extent(attention.q, 3));
      result.dv.resize(seqlen_kv * extent(attention.v, 3));
      for (const CaptureGradient& wanted : gradients.captures) {
        std::size_t size = 0;
        for (const Capture& capture : attention.captures) {
          if (capture.name != wanted.name) continue;
          size = 1;
          for (const std::int64_t e : capture.tensor.shape())
            size *= static_cast<std::size_t>(std::max<std::int64_t>(e, 0));
        }
        result.captures.emplace_back(size);
      }
      result.dq_bound = result.dq;
      result.dk_bound = result.dk;
      result.dv_bound = result.dv;
      result.capture_bounds = result.captures;
    } catch (const std::exception&) {  // more than there is, or than a vector holds
      return Status(ATTNJIT_OUT_OF_MEMORY, "out of memory for the gradients of " + std::to_string(heads) +
                                               " query heads of " + std::to_string(extent(attention.q, 2)) +
                                               " rows and one key/value head of " + std::to_string(seqlen_kv));
    }
    std::vector<double*> captures, capture_bounds;
    for (std::vector<double>& values : result.captures) captures.push_back(values.data());
    for (std::vector<double>& values : result.capture_bounds) capture_bounds.push_back(values.data());
    attnjit_reference_gradients out = ATTNJIT_REFERENCE_GRADIENTS_INIT;
    out.dq = result.dq.data();
    out.dk = result.dk.data();
    out.dv = result.dv.data();
    out.captures = captures.data();
    out.dq_bound = result.dq_bound.data();
    out.dk_bound = result.dk_bound.data();
    out.dv_bound = result.dv_bound.data();
    out.capture_bounds = capture_bounds.data();
    const detail::CAttention c(attention);
    const detail::CGradients g(gradients);
    const attnjit_status status = attnjit_reference_backward(context_.get(), c.get(), g.get(), b, h_kv, &out);
    if (status != ATTNJIT_OK) return Status::of(status);
    return result;
  }

  // JSON: what the compiler makes of a problem; with `dump`, its intermediate texts too. `arch` "sm_80" and the like:
  // of its CUDA kernels, on any machine; empty: of what runs where the tensors are.
  Result<std::string> explain(const Attention& attention, bool dump = false, const std::string& arch = {}) const {
    return explain(attention, nullptr, dump, arch);
  }
  // Likewise of its backward.
  Result<std::string> explain(const Attention& attention, const Gradients& gradients, bool dump = false,
                              const std::string& arch = {}) const {
    return explain(attention, detail::CGradients(gradients).get(), dump, arch);
  }
  // JSON: which captured reads of these rows were clamped.
  Result<std::string> clamped_reads(const Attention& attention, std::span<const Row> rows) const {
    const detail::CAttention c(attention);
    char* json = nullptr;
    const attnjit_status status = attnjit_clamped_reads(context_.get(), c.get(), rows.data(), rows.size(), &json);
    return detail::take(status, json);
  }
  // JSON: the registered mods.
  Result<std::string> list_mods() const {
    char* json = nullptr;
    const attnjit_status status = attnjit_list_mods(context_.get(), &json);
    return detail::take(status, json);
  }
  // JSON: the names that expressions capture.
  Result<std::string> captures(const Mod& score_mod, const Mod& mask_mod = {}) const {
    char* json = nullptr;
    const attnjit_status status = attnjit_captures(context_.get(), score_mod.c_str(), mask_mod.c_str(), &json);
    return detail::take(status, json);
  }

  // JSON: the GPU binaries kept on disk; with `verify`, each is read, and removed where it is damaged.
  Result<std::string> cache_list(bool verify = false) const {
    char* json = nullptr;
    const attnjit_status status = attnjit_cache_list(context_.get(), verify ? 1 : 0, &json);
    return detail::take(status, json);
  }
  // Removes them; their number.
  Result<std::size_t> cache_clear() const {
    std::size_t removed = 0;
    if (const attnjit_status status = attnjit_cache_clear(context_.get(), &removed); status != ATTNJIT_OK) {
      return Status::of(status);
    }
    return removed;
  }

  attnjit_context* get() const { return context_.get(); }

 private:
  struct Destroy {
    void operator()(attnjit_context* context) const { attnjit_context_destroy(context); }
  };
  explicit Context(attnjit_context* context) : context_(context) {}

  template <typename Run>
  static Status with_workspace(const Result<Plan>& plan, const Attention& attention, Run&& run) {
    if (!plan) return plan.status();
    if (plan->workspace_size() > 0 && attention.q.device().device_type != kDLCPU) {
      return Status(ATTNJIT_INVALID_ARGUMENT, "the plan needs a workspace of " +
                                                  std::to_string(plan->workspace_size()) +
                                                  " bytes in device memory; pass one");
    }
    const Workspace workspace(plan->workspace_size());
    if (workspace.size() < plan->workspace_size()) {
      return Status(ATTNJIT_OUT_OF_MEMORY,
                    "no memory for a workspace of " + std::to_string(plan->workspace_size()) + " bytes");
    }
    return run(*plan, workspace);
  }

  Result<std::string> explain(const Attention& attention, const attnjit_gradients* gradients, bool dump,
                              const std::string& arch) const {
    const detail::CAttention c(attention);
    attnjit_explain_options options = ATTNJIT_EXPLAIN_OPTIONS_INIT;
    options.arch = arch.empty() ? nullptr : arch.c_str();
    options.dump = dump ? 1 : 0;
    options.gradients = gradients;
    char* json = nullptr;
    const attnjit_status status = attnjit_explain(context_.get(), c.get(), &options, &json);
    return detail::take(status, json);
  }

  static std::size_t head_dim_v(const Attention& attention) {
    const std::span<const std::int64_t> v = attention.v.shape();
    return v.size() == 4 && v[3] > 0 ? static_cast<std::size_t>(v[3]) : 1;
  }
  template <typename T>
  static bool fits(std::span<T> values, std::size_t needed) {
    return values.empty() || values.size() == needed;
  }
  static Status wrong_size(const char* name, std::size_t size, std::size_t needed) {
    return Status(ATTNJIT_INVALID_ARGUMENT, std::string(name) + " has " + std::to_string(size) +
                                                " elements; it needs " + std::to_string(needed) + ", or none");
  }
  template <typename T>
  static T* data_or_null(std::span<T> values) {
    return values.empty() ? nullptr : values.data();
  }

  Status add(const std::string& name, const Mod& body, const std::vector<std::string>& parameters, int is_mask) {
    std::vector<const char*> names;
    names.reserve(parameters.size());
    for (const std::string& parameter : parameters) names.push_back(parameter.c_str());
    return Status::of(
        attnjit_register_mod(context_.get(), name.c_str(), names.data(), names.size(), body.c_str(), is_mask));
  }

  std::unique_ptr<attnjit_context, Destroy> context_;
};

inline const char* version() { return attnjit_version(); }

}  // namespace attnjit
