// Checks the arguments of a call and turns them into what backends are given. Allocates only to report a failure.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <type_traits>

#include "compiler/compiler.h"
#include "dsl/expr.h"
#include "runtime/backward.h"
#include "runtime/forward.h"
#include "runtime/status.h"

namespace attnjit::runtime {

inline constexpr std::int64_t kMaxHeadDim = 256;
inline constexpr std::int64_t kMaxExtent = INT32_MAX;  // of any dimension of any tensor
inline constexpr std::size_t kWorkspaceAlignment = 64;
inline constexpr std::size_t kCudaWorkspaceAlignment = 256;
inline constexpr int kCpu = -1;           // in place of a CUDA device's ordinal
inline constexpr int kWidestAccess = 16;  // bytes that one thread of a GPU reads or writes at once

// Whether the configuration of a kernel is chosen by timing a few. CUDA only.
enum class AutotuneMode : std::uint8_t {
  kOff,
  kOn,
  kStored,  // asked for while nothing can be timed: what was found before is taken
};

// Where strides end that a tensor map holds.
inline constexpr std::int64_t kFarBytes = std::int64_t{1} << 40;

// What of a call a plan depends on, in plain bytes without padding: equal bytes, same plan.
struct Signature {
  struct Capture {
    std::int64_t extent[dsl::kMaxRank] = {};
    std::uint8_t dtype = 0;  // dsl::DType
    std::uint8_t rank = 0;
    std::uint8_t stride_class[dsl::kMaxRank] = {};  // compiler::StrideClass
    std::uint8_t offsets_fit_32 = 0;                // as compiler::CaptureInfo's; CUDA only
  };
  std::int64_t batch = 0, num_heads = 0, num_heads_kv = 0;
  std::int64_t seqlen_q = 0, seqlen_kv = 0;
  std::int64_t head_dim = 0, head_dim_v = 0;
  std::uint8_t dtype = 0;                                             // dsl::DType of q, k, v and o
  std::uint8_t backend = 0;                                           // attnjit_backend, as asked for
  std::uint8_t has_lse = 0, has_row_max = 0;                          // outputs wanted of a forward
  std::uint8_t q_stride[3] = {}, k_stride[3] = {}, v_stride[3] = {};  // compiler::StrideClass, all but the innermost
  std::uint8_t num_captures = 0;
  // CUDA only: bytes, a power of two up to kWidestAccess, that every row is aligned to of the inputs q, k and v, in a
  // backward o and grad_out, too, and of the outputs: o, or those of dq, dk and dv that are wanted. A call may be
  // aligned further than its plan.
  std::uint8_t load_bytes = 0, store_bytes = 0;
  std::int32_t device = kCpu;           // of all tensors: a CUDA ordinal, or kCpu
  std::uint32_t capture_gradients = 0;  // wanted of a backward, a bit by capture number
  std::uint8_t autotune = 0;            // AutotuneMode, off in a backward; a call runs with any plan's
  std::uint8_t backward = 0;            // what follows is 0 in a forward
  std::uint8_t wants_dq = 0, wants_dk = 0, wants_dv = 0;
  std::uint8_t has_grad_lse = 0;
  std::uint8_t deterministic = 0;
  std::uint8_t partial_keys = 0;
  // Forwards on CUDA only: 1 where no stride of q, k, v and o reaches kFarBytes. A call's may be nearer than its
  // plan's.
  std::int64_t near_strides = 0;
  Capture captures[dsl::kMaxCaptures] = {};  // sorted by name
};
static_assert(std::has_unique_object_representations_v<Signature>);
bool operator==(const Signature& a, const Signature& b);
// `call`, less what it has beyond `plan` that such a plan does not need.
void weaken(const Signature& plan, Signature* call);

// How much a call has to bring.
enum class Purpose : std::uint8_t {
  kPrepare,      // inputs and outputs; data is not looked at
  kExplain,      // q, k, v and captures; o, and what belongs to a backward, where they are given; data is not looked at
  kExplainCuda,  // likewise, as if the tensors were on CUDA device 0, wherever they are said to be
  kReference,    // inputs with data, on the CPU; o and lse are not looked at, nor is the data of a backward's outputs;
                 // a backward of a part of the keys needs o and lse, too
  kRun,          // inputs and outputs with data, which may not overlap
};

// A checked call. forward.captures points into this object: it stays where it is.
struct CheckedCall {
  CheckedCall() = default;
  CheckedCall(const CheckedCall&) = delete;
  CheckedCall& operator=(const CheckedCall&) = delete;

  Signature signature;
  ForwardCall forward;
  dsl::CaptureView captures[dsl::kMaxCaptures];       // sorted by name, as in the signature
  const char* capture_names[dsl::kMaxCaptures] = {};  // the caller's strings
  Gradients gradients;                                // of a backward; before there is data, see wanted_gradients()

  // What the rows of some tensors are aligned to; CUDA only.
  struct Rows {
    std::string_view name;
    std::uint8_t bytes = 0;
    bool output = false;
  };
  Rows rows[8];
  std::size_t num_rows = 0;
  std::string_view far;  // why near_strides is 0: a tensor's name

  // Bytes that the tensors of a kRun call reach over.
  struct Memory {
    std::string_view role, name;  // the role is "" or goes before the name
    const char* begin = nullptr;
    const char* end = nullptr;
  };
  Memory memory[10 + 2 * dsl::kMaxCaptures];
  std::size_t num_memory = 0;
};

// A caller's struct of `size` bytes, by its own word, of which this library knows the first `known`: complete, and
// nothing set behind. `init` names the macro to start from.
Check check_struct(std::string_view name, std::string_view init, const void* object, std::size_t size,
                   std::size_t known);

// A forward call.
Check check_call(const attnjit_attention* attention, Purpose purpose, CheckedCall* call);
// A backward call.
Check check_backward_call(const attnjit_attention* attention, const attnjit_gradients* gradients, Purpose purpose,
                          CheckedCall* call);

// "the CPU" or "CUDA device 0".
std::string device_text(int device);

// `call` was checked as kRun. The workspace is aligned, large enough, and apart from every tensor.
Check check_workspace(const CheckedCall& call, const void* workspace, std::size_t size, std::size_t needed);

}  // namespace attnjit::runtime
