// The functions of libcuda over FakeCuda's state.
#include "support/fake_cuda/fake_cuda.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string_view>

using attnjit::test::FakeCuda;

namespace {

constexpr int kInvalidValue = 1, kNoDevice = 100, kInvalidContext = 201, kInvalidImage = 200, kInvalidHandle = 400,
              kNotFound = 500, kCaptureUnsupported = 900, kCaptureImplicit = 906;
constexpr int kRelaxed = 2;
constexpr long kMaxDevices = 8;

// Never destroyed: programs may give back contexts and kernels on their way out.
template <typename T>
union Lasting {
  Lasting() noexcept : value() {}
  ~Lasting() {}
  T value;
};

Lasting<FakeCuda> lasting_state;
FakeCuda& state = lasting_state.value;

struct Module {
  std::string image;
  int device = 0;
};
struct Function {
  Module* module = nullptr;
  std::string entry;
  bool loaded = false;
  int shared = 48 * 1024;
};
Lasting<std::vector<std::unique_ptr<Module>>> lasting_modules;
Lasting<std::vector<std::unique_ptr<Function>>> lasting_functions;
auto& modules = lasting_modules.value;
auto& functions = lasting_functions.value;

// A thread's stack of contexts, each 1 + the device's ordinal.
constexpr int kMaxContexts = 16;
thread_local long contexts[kMaxContexts] = {};
thread_local int num_contexts = 0;
thread_local int capture_mode = 0;
float device_clock = 0.0f;  // milliseconds

int failing(const char* name) {
  if (state.failing.empty()) return 0;
  const auto it = state.failing.find(name);
  return it == state.failing.end() ? 0 : it->second;
}

// Work that may not happen while a stream is captured, unless the thread's mode allows it.
int forbidden_in_capture() {
  if (!state.capturing || capture_mode == kRelaxed) return 0;
  state.capture_broken = true;
  return kCaptureUnsupported;
}

long current() { return num_contexts == 0 ? 0 : contexts[num_contexts - 1]; }
int push(void* context) {
  if (num_contexts == kMaxContexts) return kInvalidContext;
  contexts[num_contexts++] = reinterpret_cast<std::intptr_t>(context);
  return 0;
}

template <typename T>
T* known(const std::vector<std::unique_ptr<T>>& all, void* handle) {
  const auto it = std::find_if(all.begin(), all.end(), [&](const auto& one) { return one.get() == handle; });
  return it == all.end() ? nullptr : it->get();
}

}  // namespace

// The driver's own names; its handles are numbers here.
// NOLINTBEGIN(readability-identifier-naming,performance-no-int-to-ptr)
#define FAKE extern "C" __attribute__((visibility("default")))
#define MAY_FAIL(name)               \
  std::lock_guard lock(state.mutex); \
  if (const int result = failing(name)) return result

FAKE FakeCuda* attnjit_fake_cuda() { return &state; }
FAKE long attnjit_fake_cuda_current() { return current(); }

FAKE int cuInit(unsigned) {
  MAY_FAIL("cuInit");
  return state.devices == 0 ? kNoDevice : 0;
}
FAKE int cuDeviceGetCount(int* count) {
  MAY_FAIL("cuDeviceGetCount");
  *count = state.devices;
  return 0;
}
FAKE int cuDeviceGet(int* device, int ordinal) {
  MAY_FAIL("cuDeviceGet");
  if (ordinal < 0 || ordinal >= state.devices || ordinal >= kMaxDevices) return kInvalidValue;
  *device = ordinal;
  return 0;
}
FAKE int cuDeviceGetName(char* name, int size, int) {
  MAY_FAIL("cuDeviceGetName");
  std::strncpy(name, "Fake GPU", static_cast<std::size_t>(size));
  return 0;
}
FAKE int cuDeviceGetAttribute(int* value, int attribute, int) {
  MAY_FAIL("cuDeviceGetAttribute");
  switch (attribute) {
    case 16:
      *value = state.sms;
      return 0;
    case 75:
      *value = state.major;
      return 0;
    case 76:
      *value = state.minor;
      return 0;
    case 97:
      *value = state.shared_memory;
      return 0;
    default:
      return kInvalidValue;
  }
}
FAKE int cuDevicePrimaryCtxRetain(void** context, int device) {
  MAY_FAIL("cuDevicePrimaryCtxRetain");
  ++state.contexts_retained;
  *context = reinterpret_cast<void*>(static_cast<std::intptr_t>(device) + 1);
  return 0;
}
FAKE int cuDevicePrimaryCtxRelease_v2(int) {
  MAY_FAIL("cuDevicePrimaryCtxRelease");
  ++state.contexts_released;
  return 0;
}
FAKE int cuCtxGetCurrent(void** context) {
  *context = reinterpret_cast<void*>(current());
  return 0;
}
FAKE int cuCtxPushCurrent_v2(void* context) {
  MAY_FAIL("cuCtxPushCurrent");
  return push(context);
}
FAKE int cuCtxPopCurrent_v2(void** context) {
  std::lock_guard lock(state.mutex);
  if (num_contexts == 0) {
    ++state.unbalanced_pops;
    return kInvalidContext;
  }
  *context = reinterpret_cast<void*>(contexts[--num_contexts]);
  return 0;
}
// An image is text here, or what the compiler made; anything that starts with "bad" is refused, with a log.
FAKE int cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
  if (state.before_load) state.before_load();
  MAY_FAIL("cuModuleLoadDataEx");
  if (current() == 0) return kInvalidContext;
  if (const int result = forbidden_in_capture()) return result;
  const char* const text = static_cast<const char*>(image);
  if (std::string_view(text).starts_with("bad")) {
    char* log = nullptr;
    std::size_t size = 0;
    for (unsigned i = 0; i < count; ++i) {
      if (options[i] == 5) log = static_cast<char*>(values[i]);
      if (options[i] == 6) size = reinterpret_cast<std::size_t>(values[i]);
    }
    if (log) std::strncpy(log, "device kernel image is bad", size);
    return kInvalidImage;
  }
  ++state.modules_loaded;
  modules.push_back(std::make_unique<Module>(Module{text, static_cast<int>(current()) - 1}));
  *module = modules.back().get();
  return 0;
}
FAKE int cuModuleUnload(void* module) {
  MAY_FAIL("cuModuleUnload");
  if (const int result = forbidden_in_capture()) return result;
  if (!known(modules, module)) return kInvalidHandle;
  std::erase_if(functions, [&](const auto& function) { return function->module == module; });
  std::erase_if(modules, [&](const auto& one) { return one.get() == module; });
  ++state.modules_unloaded;
  return 0;
}
FAKE int cuModuleGetFunction(void** function, void* module, const char* name) {
  MAY_FAIL("cuModuleGetFunction");
  Module* const found = known(modules, module);
  if (!found) return kInvalidHandle;
  if (std::string_view(name) == "no_such_entry") return kNotFound;
  functions.push_back(std::make_unique<Function>(Function{found, name, !state.lazy}));
  *function = functions.back().get();
  return 0;
}
FAKE int cuFuncLoad(void* function) {
  MAY_FAIL("cuFuncLoad");
  Function* const found = known(functions, function);
  if (!found) return kInvalidHandle;
  if (const int result = forbidden_in_capture()) return result;
  found->loaded = true;
  return 0;
}
FAKE int cuFuncGetAttribute(int* value, int attribute, void* function) {
  MAY_FAIL("cuFuncGetAttribute");
  Function* const found = known(functions, function);
  if (!found) return kInvalidHandle;
  *value = attribute == 8 ? found->shared : 128;
  return 0;
}
FAKE int cuFuncSetAttribute(void* function, int attribute, int value) {
  MAY_FAIL("cuFuncSetAttribute");
  Function* const found = known(functions, function);
  if (!found) return kInvalidHandle;
  if (attribute != 8 || value > state.shared_memory) return kInvalidValue;
  found->shared = value;
  return 0;
}
FAKE int cuLaunchKernel(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                        unsigned block_y, unsigned block_z, unsigned shared, void* stream, void** parameters,
                        void** extra) {
  MAY_FAIL("cuLaunchKernel");
  Function* const found = known(functions, function);
  if (!found) return kInvalidHandle;
  if (current() != found->module->device + 1) return kInvalidContext;
  if (grid_x == 0 || grid_y == 0 || grid_z == 0 || grid_y > 65535 || grid_z > 65535 || grid_x > 0x7fffffffu ||
      block_x * block_y * block_z > 1024 || static_cast<int>(shared) > found->shared || extra || !parameters) {
    return kInvalidValue;
  }
  const bool captured = state.capturing && stream == state.captured_stream;
  if (!found->loaded) {
    if (const int result = forbidden_in_capture()) return result;
    found->loaded = true;
  }
  ++state.launched;
  if (state.kernel_ms && !captured) device_clock += state.kernel_ms(block_x, shared);
  if (!state.record) return 0;
  FakeCuda::Launch launch{.entry = found->entry,
                          .image = found->module->image,
                          .device = found->module->device,
                          .grid = {grid_x, grid_y, grid_z},
                          .block = block_x,
                          .shared = shared,
                          .stream = stream,
                          .parameters = {},
                          .captured = captured};
  const auto* bytes = static_cast<const unsigned char*>(parameters[0]);
  const auto own = state.parameter_bytes_of.find(launch.entry);
  launch.parameters.assign(bytes,
                           bytes + (own != state.parameter_bytes_of.end() ? own->second : state.parameter_bytes));
  state.launches.push_back(std::move(launch));
  return 0;
}
#ifndef ATTNJIT_FAKE_CUDA_11
// Refuses what a driver does, as far as it is of 16-bit types.
FAKE int cuTensorMapEncodeTiled(void* map, int type, unsigned rank, void* data, const std::uint64_t* extents,
                                const std::uint64_t* strides, const std::uint32_t* box,
                                const std::uint32_t* element_strides, int interleave, int swizzle, int promotion,
                                int fill) {
  MAY_FAIL("cuTensorMapEncodeTiled");
  if (current() == 0) return kInvalidContext;
  if ((type != 6 && type != 9) || rank < 1 || rank > 5 || reinterpret_cast<std::uintptr_t>(map) % 64 != 0 ||
      reinterpret_cast<std::uintptr_t>(data) % 16 != 0 || data == nullptr) {
    return kInvalidValue;
  }
  for (unsigned d = 0; d < rank; ++d) {
    if (extents[d] == 0 || extents[d] > std::uint64_t{1} << 32 || box[d] == 0 || box[d] > 256 ||
        element_strides[d] == 0 || element_strides[d] > 8) {
      return kInvalidValue;
    }
    if (d > 0 && (strides[d - 1] % 16 != 0 || strides[d - 1] >= std::uint64_t{1} << 40)) return kInvalidValue;
  }
  if (swizzle == 3 && box[0] * 2 > 128) return kInvalidValue;
  if (!state.record) return 0;
  *static_cast<std::uint64_t*>(map) = state.maps.size();
  state.maps.push_back({.type = type,
                        .interleave = interleave,
                        .swizzle = swizzle,
                        .promotion = promotion,
                        .fill = fill,
                        .data = data,
                        .extents = {extents, extents + rank},
                        .strides = {strides, strides + rank - 1},
                        .box = {box, box + rank},
                        .element_strides = {element_strides, element_strides + rank}});
  return 0;
}
FAKE int cuTensorMapReplaceAddress(void* map, void* data) {
  MAY_FAIL("cuTensorMapReplaceAddress");
  if (current() == 0) return kInvalidContext;
  if (reinterpret_cast<std::uintptr_t>(map) % 64 != 0 || reinterpret_cast<std::uintptr_t>(data) % 16 != 0) {
    return kInvalidValue;
  }
  if (!state.record) return 0;
  auto& place = *static_cast<std::uint64_t*>(map);
  if (place >= state.maps.size()) return kInvalidValue;
  FakeCuda::TensorMap moved = state.maps[place];
  moved.data = data;
  moved.moved = true;
  place = state.maps.size();
  state.maps.push_back(std::move(moved));
  return 0;
}
#endif
FAKE int cuMemsetD32Async(unsigned long long address, unsigned value, std::size_t count, void*) {
  MAY_FAIL("cuMemsetD32Async");
  if (current() == 0) return kInvalidContext;
  std::fill_n(reinterpret_cast<std::uint32_t*>(address), count, value);
  return 0;
}
FAKE int cuStreamIsCapturing(void* stream, int* status) {
  MAY_FAIL("cuStreamIsCapturing");
  if (current() == 0) return kInvalidContext;
  // The legacy default stream waits for all others, so that it cannot be touched.
  if (state.capturing && stream == nullptr && state.captured_stream != nullptr) return kCaptureImplicit;
  *status = state.capturing && stream == state.captured_stream ? 1 : 0;
  return 0;
}
FAKE int cuThreadExchangeStreamCaptureMode(int* mode) {
  std::swap(*mode, capture_mode);
  return 0;
}
FAKE int cuGetErrorName(int error, const char** name) {
  switch (error) {
    case kInvalidValue:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return 0;
    case 2:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      return 0;
    case kNoDevice:
      *name = "CUDA_ERROR_NO_DEVICE";
      return 0;
    case kInvalidImage:
      *name = "CUDA_ERROR_INVALID_IMAGE";
      return 0;
    case kInvalidHandle:
      *name = "CUDA_ERROR_INVALID_HANDLE";
      return 0;
    case kNotFound:
      *name = "CUDA_ERROR_NOT_FOUND";
      return 0;
    default:
      *name = nullptr;
      return kInvalidValue;
  }
}
FAKE int cuGetErrorString(int error, const char** text) {
  *text = error == kInvalidHandle ? "invalid resource handle" : nullptr;
  return *text ? 0 : kInvalidValue;
}

// ---- What the tool and the tests need besides. Captures record nothing.

FAKE int cuDriverGetVersion(int* version) {
  MAY_FAIL("cuDriverGetVersion");
  *version = 13000;
  return 0;
}
FAKE int cuCtxSetCurrent(void* context) {
  MAY_FAIL("cuCtxSetCurrent");
  if (num_contexts > 0) --num_contexts;
  return push(context);
}
FAKE int cuCtxSynchronize() {
  MAY_FAIL("cuCtxSynchronize");
  return current() == 0 ? kInvalidContext : forbidden_in_capture();
}
FAKE int cuMemGetInfo_v2(std::size_t* free, std::size_t* total) {
  MAY_FAIL("cuMemGetInfo");
  *free = *total = std::size_t{1} << 30;
  return 0;
}
FAKE int cuMemAlloc_v2(unsigned long long* address, std::size_t size) {
  MAY_FAIL("cuMemAlloc");
  if (current() == 0) return kInvalidContext;
  if (size == 0) return kInvalidValue;
  if (const int result = forbidden_in_capture()) return result;
  *address = reinterpret_cast<unsigned long long>(std::aligned_alloc(256, (size + 255) / 256 * 256));
  if (*address == 0) return 2;
  ++state.memory_allocated;
  return 0;
}
FAKE int cuMemFree_v2(unsigned long long address) {
  MAY_FAIL("cuMemFree");
  ++state.memory_freed;
  std::free(reinterpret_cast<void*>(address));
  return 0;
}
FAKE int cuMemcpyHtoD_v2(unsigned long long to, const void* from, std::size_t size) {
  MAY_FAIL("cuMemcpyHtoD");
  if (current() == 0) return kInvalidContext;
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return 0;
}
FAKE int cuMemcpyHtoDAsync_v2(unsigned long long to, const void* from, std::size_t size, void*) {
  MAY_FAIL("cuMemcpyHtoDAsync");
  if (current() == 0) return kInvalidContext;
  std::memcpy(reinterpret_cast<void*>(to), from, size);
  return 0;
}
FAKE int cuMemcpyDtoDAsync_v2(unsigned long long to, unsigned long long from, std::size_t size, void*) {
  MAY_FAIL("cuMemcpyDtoDAsync");
  if (current() == 0) return kInvalidContext;
  std::memcpy(reinterpret_cast<void*>(to), reinterpret_cast<const void*>(from), size);
  return 0;
}
FAKE int cuMemcpyDtoH_v2(void* to, unsigned long long from, std::size_t size) {
  MAY_FAIL("cuMemcpyDtoH");
  if (current() == 0) return kInvalidContext;
  std::memcpy(to, reinterpret_cast<const void*>(from), size);
  return 0;
}
FAKE int cuMemsetD8_v2(unsigned long long address, unsigned char value, std::size_t size) {
  MAY_FAIL("cuMemsetD8");
  std::memset(reinterpret_cast<void*>(address), value, size);
  return 0;
}
FAKE int cuStreamCreate(void** stream, unsigned) {
  MAY_FAIL("cuStreamCreate");
  *stream = new char;
  return 0;
}
FAKE int cuStreamDestroy_v2(void* stream) {
  delete static_cast<char*>(stream);
  return 0;
}
FAKE int cuStreamSynchronize(void*) {
  MAY_FAIL("cuStreamSynchronize");
  return forbidden_in_capture();
}
FAKE int cuStreamBeginCapture_v2(void* stream, int) {
  MAY_FAIL("cuStreamBeginCapture");
  if (state.capturing) return kInvalidValue;
  state.capturing = true;
  state.captured_stream = stream;
  state.capture_broken = false;
  return 0;
}
FAKE int cuStreamEndCapture(void* stream, void** graph) {
  MAY_FAIL("cuStreamEndCapture");
  if (!state.capturing || stream != state.captured_stream) return kInvalidValue;
  state.capturing = false;
  if (state.capture_broken) return kCaptureUnsupported;
  *graph = new char;
  return 0;
}
FAKE int cuGraphDestroy(void* graph) {
  delete static_cast<char*>(graph);
  return 0;
}
FAKE int cuGraphInstantiateWithFlags(void** executable, void*, unsigned long long) {
  MAY_FAIL("cuGraphInstantiate");
  *executable = new char;
  return 0;
}
FAKE int cuGraphLaunch(void* executable, void*) {
  MAY_FAIL("cuGraphLaunch");
  return executable == nullptr ? kInvalidHandle : 0;
}
FAKE int cuGraphExecDestroy(void* executable) {
  delete static_cast<char*>(executable);
  return 0;
}
FAKE int cuEventCreate(void** event, unsigned) {
  MAY_FAIL("cuEventCreate");
  *event = new float(0.0f);
  return 0;
}
FAKE int cuEventDestroy_v2(void* event) {
  delete static_cast<float*>(event);
  return 0;
}
FAKE int cuEventRecord(void* event, void*) {
  MAY_FAIL("cuEventRecord");
  ++state.events_recorded;
  if (!state.kernel_ms) device_clock += 1.0f;
  *static_cast<float*>(event) = device_clock;
  return 0;
}
FAKE int cuEventSynchronize(void*) {
  MAY_FAIL("cuEventSynchronize");
  return forbidden_in_capture();
}
FAKE int cuEventElapsedTime(float* milliseconds, void* begin, void* end) {
  MAY_FAIL("cuEventElapsedTime");
  *milliseconds = *static_cast<float*>(end) - *static_cast<float*>(begin);
  return 0;
}
// NOLINTEND(readability-identifier-naming,performance-no-int-to-ptr)
