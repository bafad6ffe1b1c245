// The driver's functions by dlopen, and devices and kernels over them.
#include "runtime/cuda_driver.h"

#include <dlfcn.h>
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>
#include <mutex>
#include <tuple>
#include <type_traits>
#include <utility>
#include <vector>

namespace attnjit::runtime {
namespace {

// What is used of cuda.h, by the driver's own names and values.
using CuResult = int;
using CuDevice = int;
using CuContext = void*;
using CuModule = void*;
using CuFunction = void*;
using CuStream = void*;
using CuEvent = void*;
using CuDevicePtr = unsigned long long;

constexpr CuResult kSuccess = 0;
constexpr CuResult kErrorInvalidValue = 1;
constexpr CuResult kErrorOutOfMemory = 2;
constexpr CuResult kErrorInvalidContext = 201;
constexpr CuResult kErrorInvalidHandle = 400;
constexpr CuResult kErrorStreamCaptureImplicit = 906;

constexpr int kAttributeMultiprocessors = 16;
constexpr int kAttributeMajor = 75;
constexpr int kAttributeMinor = 76;
constexpr int kAttributeMaxSharedOptin = 97;
constexpr int kFunctionNumRegisters = 4;
constexpr int kFunctionMaxDynamicShared = 8;
constexpr int kJitErrorLog = 5;
constexpr int kJitErrorLogSize = 6;
constexpr int kCaptureNone = 0;
constexpr int kCaptureModeRelaxed = 2;
constexpr unsigned kStreamNonBlocking = 1;
constexpr int kTensorMapFloat16 = 6;
constexpr int kTensorMapBfloat16 = 9;
constexpr int kTensorMapInterleaveNone = 0;
constexpr int kTensorMapSwizzle128 = 3;
constexpr int kTensorMapPromotion256 = 3;  // to the L2 cache, in bytes
constexpr int kTensorMapFillZero = 0;

struct Api {
  CuResult (*init)(unsigned) = nullptr;
  CuResult (*device_count)(int*) = nullptr;
  CuResult (*device_get)(CuDevice*, int) = nullptr;
  CuResult (*device_name)(char*, int, CuDevice) = nullptr;
  CuResult (*device_attribute)(int*, int, CuDevice) = nullptr;
  CuResult (*primary_retain)(CuContext*, CuDevice) = nullptr;
  CuResult (*primary_release)(CuDevice) = nullptr;
  CuResult (*context_current)(CuContext*) = nullptr;
  CuResult (*context_push)(CuContext) = nullptr;
  CuResult (*context_pop)(CuContext*) = nullptr;
  CuResult (*module_load)(CuModule*, const void*, unsigned, int*, void**) = nullptr;
  CuResult (*module_unload)(CuModule) = nullptr;
  CuResult (*module_function)(CuFunction*, CuModule, const char*) = nullptr;
  CuResult (*function_load)(CuFunction) = nullptr;  // null: a driver older than 12.4
  CuResult (*function_get)(int*, int, CuFunction) = nullptr;
  CuResult (*function_set)(CuFunction, int, int) = nullptr;
  CuResult (*launch)(CuFunction, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, CuStream, void**,
                     void**) = nullptr;
  // Both null: a driver older than 12.0.
  CuResult (*tensor_map_encode)(void*, int, unsigned, void*, const std::uint64_t*, const std::uint64_t*,
                                const std::uint32_t*, const std::uint32_t*, int, int, int, int) = nullptr;
  CuResult (*tensor_map_replace_address)(void*, void*) = nullptr;
  CuResult (*memset_d32)(CuDevicePtr, unsigned, std::size_t, CuStream) = nullptr;
  CuResult (*stream_is_capturing)(CuStream, int*) = nullptr;
  CuResult (*exchange_capture_mode)(int*) = nullptr;
  CuResult (*driver_version)(int*) = nullptr;
  CuResult (*memory_allocate)(CuDevicePtr*, std::size_t) = nullptr;
  CuResult (*memory_free)(CuDevicePtr) = nullptr;
  CuResult (*copy_to_device)(CuDevicePtr, const void*, std::size_t, CuStream) = nullptr;
  CuResult (*copy_on_device)(CuDevicePtr, CuDevicePtr, std::size_t, CuStream) = nullptr;
  CuResult (*stream_create)(CuStream*, unsigned) = nullptr;
  CuResult (*stream_destroy)(CuStream) = nullptr;
  CuResult (*stream_synchronize)(CuStream) = nullptr;
  CuResult (*event_create)(CuEvent*, unsigned) = nullptr;
  CuResult (*event_destroy)(CuEvent) = nullptr;
  CuResult (*event_record)(CuEvent, CuStream) = nullptr;
  CuResult (*event_synchronize)(CuEvent) = nullptr;
  CuResult (*event_elapsed)(float*, CuEvent, CuEvent) = nullptr;
  CuResult (*error_name)(CuResult, const char**) = nullptr;
  CuResult (*error_string)(CuResult, const char**) = nullptr;
};

// An opened driver; or why there is none.
struct Driver {
  Api api;
  std::string error;

  // "CUDA_ERROR_NO_DEVICE: no CUDA-capable device is detected".
  std::string describe(CuResult result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    if (!api.error_name || api.error_name(result, &name) != kSuccess || !name) {
      return fmt::format("CUDA error {}", result);
    }
    if (api.error_string(result, &text) != kSuccess || !text) return name;
    return fmt::format("{}: {}", name, text);
  }

  Failure failure(CuResult result, std::string_view what) const {
    return {result == kErrorOutOfMemory ? ATTNJIT_OUT_OF_MEMORY : ATTNJIT_ENVIRONMENT,
            fmt::format("{} failed: {}", what, describe(result))};
  }
};

constexpr const char* kDefaultLibrary = "libcuda.so.1";

// Never closed: contexts and the driver's own threads live to the end of the process.
void open_driver(const std::string& library, Driver* driver) {
  void* const handle = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    const char* const why = dlerror();
    driver->error = fmt::format("no CUDA driver: {}", why ? why : library);
    return;
  }
  Api& api = driver->api;
  const char* missing = nullptr;
  const auto find = [&](auto* function, const char* name) {
    *function = reinterpret_cast<std::remove_reference_t<decltype(*function)>>(dlsym(handle, name));
    return *function != nullptr;
  };
  const auto need = [&](auto* function, const char* name) {
    if (!find(function, name) && !missing) missing = name;
  };
  need(&api.init, "cuInit");
  need(&api.device_count, "cuDeviceGetCount");
  need(&api.device_get, "cuDeviceGet");
  need(&api.device_name, "cuDeviceGetName");
  need(&api.device_attribute, "cuDeviceGetAttribute");
  need(&api.primary_retain, "cuDevicePrimaryCtxRetain");
  need(&api.primary_release, "cuDevicePrimaryCtxRelease_v2");
  need(&api.context_current, "cuCtxGetCurrent");
  need(&api.context_push, "cuCtxPushCurrent_v2");
  need(&api.context_pop, "cuCtxPopCurrent_v2");
  need(&api.module_load, "cuModuleLoadDataEx");
  need(&api.module_unload, "cuModuleUnload");
  need(&api.module_function, "cuModuleGetFunction");
  find(&api.function_load, "cuFuncLoad");
  need(&api.function_get, "cuFuncGetAttribute");
  need(&api.function_set, "cuFuncSetAttribute");
  need(&api.launch, "cuLaunchKernel");
  find(&api.tensor_map_encode, "cuTensorMapEncodeTiled");
  find(&api.tensor_map_replace_address, "cuTensorMapReplaceAddress");
  need(&api.memset_d32, "cuMemsetD32Async");
  need(&api.stream_is_capturing, "cuStreamIsCapturing");
  need(&api.exchange_capture_mode, "cuThreadExchangeStreamCaptureMode");
  need(&api.driver_version, "cuDriverGetVersion");
  need(&api.memory_allocate, "cuMemAlloc_v2");
  need(&api.memory_free, "cuMemFree_v2");
  need(&api.copy_to_device, "cuMemcpyHtoDAsync_v2");
  need(&api.copy_on_device, "cuMemcpyDtoDAsync_v2");
  need(&api.stream_create, "cuStreamCreate");
  need(&api.stream_destroy, "cuStreamDestroy_v2");
  need(&api.stream_synchronize, "cuStreamSynchronize");
  need(&api.event_create, "cuEventCreate");
  need(&api.event_destroy, "cuEventDestroy_v2");
  need(&api.event_record, "cuEventRecord");
  need(&api.event_synchronize, "cuEventSynchronize");
  need(&api.event_elapsed, "cuEventElapsedTime");
  need(&api.error_name, "cuGetErrorName");
  need(&api.error_string, "cuGetErrorString");
  if (missing) {
    driver->error = fmt::format("no usable CUDA driver: {} has no {}", library, missing);
  } else if (const CuResult result = api.init(0); result != kSuccess) {
    driver->error = fmt::format("no usable CUDA driver: cuInit failed: {}", driver->describe(result));
  }
}

// One per library, opened by the first who asks; safe from several threads.
const Driver& driver_of(std::string_view library) {
  static std::mutex mutex;
  // Never destroyed: a plan of static storage may be released after it would be.
  static auto& drivers = *new std::map<std::string, Driver, std::less<>>;
  std::lock_guard lock(mutex);
  if (library.empty()) library = kDefaultLibrary;
  const auto [it, added] = drivers.try_emplace(std::string(library));
  if (added) open_driver(it->first, &it->second);
  return it->second;
}

class Device final : public CudaDevice {
 public:
  static Result<std::shared_ptr<CudaDevice>> create(const Driver& driver, int ordinal, int max_sms) {
    auto device = std::make_shared<Device>(driver, ordinal);
    const Api& api = driver.api;
    const auto refused = [&](CuResult result, std::string_view what) {
      Failure failure = driver.failure(result, what);
      failure.message.insert(0, fmt::format("CUDA device {} cannot be used: ", ordinal));
      return failure;
    };
    if (const CuResult result = api.device_get(&device->device_, ordinal); result != kSuccess) {
      return refused(result, "cuDeviceGet");
    }
    std::array<char, 256> name{};
    if (const CuResult result = api.device_name(name.data(), name.size(), device->device_); result != kSuccess) {
      return refused(result, "cuDeviceGetName");
    }
    device->name_ = name.data();
    int major = 0, minor = 0, shared = 0;
    const struct {
      int attribute;
      int* value;
    } attributes[] = {{kAttributeMajor, &major},
                      {kAttributeMinor, &minor},
                      {kAttributeMultiprocessors, &device->num_sms_},
                      {kAttributeMaxSharedOptin, &shared}};
    for (const auto& row : attributes) {
      if (const CuResult result = api.device_attribute(row.value, row.attribute, device->device_); result != kSuccess) {
        return refused(result, "cuDeviceGetAttribute");
      }
    }
    if (max_sms > 0) device->num_sms_ = std::min(device->num_sms_, max_sms);
    device->arch_ = 10 * major + minor;
    device->max_shared_memory_ = static_cast<std::size_t>(shared);
    if (const CuResult result = api.primary_retain(&device->context_, device->device_); result != kSuccess) {
      device->context_ = nullptr;
      return refused(result, "cuDevicePrimaryCtxRetain");
    }
    return std::shared_ptr<CudaDevice>(std::move(device));
  }

  Device(const Driver& driver, int ordinal) : driver_(driver), ordinal_(ordinal) {}
  // At the end of the process the driver may be gone: it says so, and there is nothing left to release.
  ~Device() override {
    if (context_) driver_.api.primary_release(device_);
  }
  Device(const Device&) = delete;
  Device& operator=(const Device&) = delete;

  int ordinal() const override { return ordinal_; }
  const std::string& name() const override { return name_; }
  int arch() const override { return arch_; }
  int num_sms() const override { return num_sms_; }
  int driver_version() const override {
    int version = 0;
    return api().driver_version(&version) == kSuccess ? version : 0;
  }
  std::size_t max_shared_memory() const override { return max_shared_memory_; }
  bool has_tensor_maps() const override { return api().tensor_map_encode && api().tensor_map_replace_address; }

  bool is_capturing(CudaStream stream) const override {
    const CudaScope scope(*this);
    if (scope.failure()) return false;
    int status = kCaptureNone;
    const CuResult result = api().stream_is_capturing(stream, &status);
    // A stream that is no stream is for the launch to refuse.
    return result == kErrorStreamCaptureImplicit || (result == kSuccess && status != kCaptureNone);
  }

  Check fill(void* address, std::uint32_t value, std::size_t size, CudaStream stream) const override {
    if (size == 0) return {};
    const CudaScope scope(*this);
    if (scope.failure()) return scope.failure();
    const CuResult result = api().memset_d32(reinterpret_cast<CuDevicePtr>(address), value, size / 4, stream);
    if (result != kSuccess) return call_failure(result, "cuMemsetD32Async");
    return {};
  }

  Check encode_tensor_map(const TensorMapLayout& layout, void* map) const override {
    const CudaScope scope(*this);
    if (scope.failure()) return scope.failure();
    constexpr std::uint32_t kElementStride[4] = {1, 1, 1, 1};
    const CuResult result = api().tensor_map_encode(map, layout.bfloat16 ? kTensorMapBfloat16 : kTensorMapFloat16, 4,
                                                    const_cast<void*>(layout.data), layout.extent, layout.stride,
                                                    layout.box, kElementStride, kTensorMapInterleaveNone,
                                                    kTensorMapSwizzle128, kTensorMapPromotion256, kTensorMapFillZero);
    if (result != kSuccess) return driver_.failure(result, "cuTensorMapEncodeTiled");
    return {};
  }

  Check move_tensor_map(const void* data, void* map) const override {
    const CudaScope scope(*this);
    if (scope.failure()) return scope.failure();
    const CuResult result = api().tensor_map_replace_address(map, const_cast<void*>(data));
    if (result != kSuccess) return driver_.failure(result, "cuTensorMapReplaceAddress");
    return {};
  }

  const Driver& driver() const { return driver_; }
  const Api& api() const { return driver_.api; }

  // Of a stream-ordered call, with what is most often wrong.
  Failure call_failure(CuResult result, std::string_view what) const {
    Failure failure = driver_.failure(result, what);
    if (result == kErrorInvalidHandle || result == kErrorInvalidContext || result == kErrorInvalidValue) {
      failure.message += fmt::format("; is `stream` one of device {}'s primary context?", ordinal_);
    }
    return failure;
  }

 private:
  Check enter(bool* pushed) const override {
    CuContext current = nullptr;
    // Mostly the caller works in the primary context already.
    if (api().context_current(&current) == kSuccess && current == context_) return {};
    if (const CuResult result = api().context_push(context_); result != kSuccess) {
      return driver_.failure(result, "cuCtxPushCurrent");
    }
    *pushed = true;
    return {};
  }
  void leave() const override {
    CuContext popped = nullptr;
    api().context_pop(&popped);
  }
  int exchange_capture_mode(int mode) const override {
    api().exchange_capture_mode(&mode);
    return mode;
  }

  const Driver& driver_;
  int ordinal_;
  CuDevice device_ = 0;
  CuContext context_ = nullptr;
  std::string name_;
  int arch_ = 0;
  int num_sms_ = 0;
  std::size_t max_shared_memory_ = 0;
};

class Kernel final : public CudaKernel {
 public:
  static Result<std::shared_ptr<const CudaKernel>> create(std::shared_ptr<const Device> device,
                                                          const std::string& cubin, const std::string& entry,
                                                          std::size_t shared_memory) {
    const CudaScope scope(*device, CudaScope::Use::kSetup);
    if (scope.failure()) return *scope.failure();
    const Api& api = device->api();
    auto kernel = std::make_shared<Kernel>(std::move(device));
    const auto refused = [&](CuResult result, std::string_view what) {
      Failure failure = kernel->device_->driver().failure(result, what);
      failure.message.insert(0, fmt::format("kernel {} does not load on device {} (sm_{}): ", entry,
                                            kernel->device_->ordinal(), kernel->device_->arch()));
      return failure;
    };
    std::array<char, 1024> log{};
    std::array<int, 2> options = {kJitErrorLog, kJitErrorLogSize};
    // The driver takes the size in place of a pointer.
    std::array<void*, 2> values = {log.data(),
                                   reinterpret_cast<void*>(log.size() - 1)};  // NOLINT(performance-no-int-to-ptr)
    if (const CuResult result =
            api.module_load(&kernel->module_, cubin.data(), options.size(), options.data(), values.data());
        result != kSuccess) {
      kernel->module_ = nullptr;
      Failure failure = refused(result, "cuModuleLoadDataEx");
      if (log[0]) failure.message += fmt::format(" ({})", log.data());
      return failure;
    }
    if (const CuResult result = api.module_function(&kernel->function_, kernel->module_, entry.c_str());
        result != kSuccess) {
      return refused(result, "cuModuleGetFunction");
    }
    // Code is loaded lazily, by default: at a first launch it would be loaded in the middle of a capture.
    if (api.function_load) {
      if (const CuResult result = api.function_load(kernel->function_); result != kSuccess) {
        return refused(result, "cuFuncLoad");
      }
    }
    int registers = 0;
    if (const CuResult result = api.function_get(&registers, kFunctionNumRegisters, kernel->function_);
        result != kSuccess) {
      return refused(result, "cuFuncGetAttribute");
    }
    if (shared_memory > 0) {
      if (const CuResult result =
              api.function_set(kernel->function_, kFunctionMaxDynamicShared, static_cast<int>(shared_memory));
          result != kSuccess) {
        return refused(result, fmt::format("asking for {} bytes of shared memory", shared_memory));
      }
    }
    kernel->shared_memory_ = static_cast<unsigned>(shared_memory);
    return std::shared_ptr<const CudaKernel>(std::move(kernel));
  }

  explicit Kernel(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  ~Kernel() override {
    if (!module_) return;
    const CudaScope scope(*device_, CudaScope::Use::kSetup);
    if (!scope.failure()) device_->api().module_unload(module_);
  }
  Kernel(const Kernel&) = delete;
  Kernel& operator=(const Kernel&) = delete;

  Check launch(Grid grid, unsigned threads, const void* params, CudaStream stream) const override {
    const CudaScope scope(*device_);
    if (scope.failure()) return scope.failure();
    void* arguments[] = {const_cast<void*>(params)};
    const CuResult result = device_->api().launch(function_, grid.x, grid.y, grid.z, threads, 1, 1, shared_memory_,
                                                  stream, arguments, nullptr);
    if (result != kSuccess) return device_->call_failure(result, "cuLaunchKernel");
    return {};
  }

 private:
  std::shared_ptr<const Device> device_;
  CuModule module_ = nullptr;
  CuFunction function_ = nullptr;
  unsigned shared_memory_ = 0;
};

class Workbench final : public CudaWorkbench {
 public:
  static Result<std::unique_ptr<CudaWorkbench>> create(std::shared_ptr<const Device> device) {
    const CudaScope scope(*device, CudaScope::Use::kSetup);
    if (scope.failure()) return *scope.failure();
    const Api& api = device->api();
    const Driver& driver = device->driver();
    auto bench = std::make_unique<Workbench>(std::move(device));
    // Nothing that others queue on the legacy default stream is waited for, or waits.
    if (const CuResult result = api.stream_create(&bench->stream_, kStreamNonBlocking); result != kSuccess) {
      bench->stream_ = nullptr;
      return driver.failure(result, "cuStreamCreate");
    }
    for (CuEvent* event : {&bench->begin_, &bench->end_}) {
      if (const CuResult result = api.event_create(event, 0); result != kSuccess) {
        *event = nullptr;
        return driver.failure(result, "cuEventCreate");
      }
    }
    return std::unique_ptr<CudaWorkbench>(std::move(bench));
  }

  explicit Workbench(std::shared_ptr<const Device> device) : device_(std::move(device)) {}
  ~Workbench() override {
    const CudaScope scope(*device_, CudaScope::Use::kSetup);
    if (scope.failure()) return;
    const Api& api = device_->api();
    if (stream_) api.stream_synchronize(stream_);
    for (const CuDevicePtr address : memory_) api.memory_free(address);
    for (const CuEvent event : {begin_, end_}) {
      if (event) api.event_destroy(event);
    }
    if (stream_) api.stream_destroy(stream_);
  }
  Workbench(const Workbench&) = delete;
  Workbench& operator=(const Workbench&) = delete;

  Result<void*> allocate(std::size_t size) override {
    const CudaScope scope(*device_, CudaScope::Use::kSetup);
    if (scope.failure()) return *scope.failure();
    memory_.reserve(memory_.size() + 1);
    CuDevicePtr address = 0;
    if (const CuResult result = device_->api().memory_allocate(&address, size); result != kSuccess) {
      return device_->driver().failure(result, fmt::format("allocating {} bytes of device memory", size));
    }
    memory_.push_back(address);
    return reinterpret_cast<void*>(address);  // NOLINT(performance-no-int-to-ptr)
  }

  Check fill(void* memory, std::size_t size, const void* pattern, std::size_t pattern_size) override {
    const CudaScope scope(*device_, CudaScope::Use::kSetup);
    if (scope.failure()) return scope.failure();
    const auto address = reinterpret_cast<CuDevicePtr>(memory);
    std::size_t filled = std::min(size, pattern_size);
    CuResult result = device_->api().copy_to_device(address, pattern, filled, stream_);
    while (result == kSuccess && filled < size) {
      // Twice as much each time. A multiple of the pattern stands before the last copy.
      const std::size_t next = std::min(filled, size - filled);
      result = device_->api().copy_on_device(address + filled, address, next, stream_);
      filled += next;
    }
    // `pattern` is the caller's again.
    if (result == kSuccess) result = device_->api().stream_synchronize(stream_);
    if (result != kSuccess) return device_->driver().failure(result, "filling device memory");
    return {};
  }

  Result<double> milliseconds(const std::function<Check(CudaStream)>& enqueue) override {
    const CudaScope scope(*device_, CudaScope::Use::kSetup);
    if (scope.failure()) return *scope.failure();
    const Api& api = device_->api();
    CuResult result = api.event_record(begin_, stream_);
    if (result == kSuccess) {
      if (Check failure = enqueue(stream_)) return *failure;
      result = api.event_record(end_, stream_);
    }
    if (result == kSuccess) result = api.event_synchronize(end_);
    float elapsed = 0;
    if (result == kSuccess) result = api.event_elapsed(&elapsed, begin_, end_);
    if (result != kSuccess) return device_->driver().failure(result, "timing a kernel");
    return static_cast<double>(elapsed);
  }

 private:
  std::shared_ptr<const Device> device_;
  CuStream stream_ = nullptr;
  CuEvent begin_ = nullptr, end_ = nullptr;
  std::vector<CuDevicePtr> memory_;
};

}  // namespace

Result<std::shared_ptr<CudaDevice>> CudaDevice::get(int ordinal, std::string_view library, int max_sms) {
  const Driver& driver = driver_of(library);
  if (!driver.error.empty()) return Failure{ATTNJIT_ENVIRONMENT, driver.error};
  const int devices = count(library);
  if (ordinal < 0 || ordinal >= devices) {
    return Failure{ATTNJIT_ENVIRONMENT,
                   fmt::format("there is no CUDA device {}; the driver shows {}", ordinal, devices)};
  }
  static std::mutex mutex;
  static auto& known = *new std::map<std::tuple<const Driver*, int, int>, std::weak_ptr<CudaDevice>>;
  std::lock_guard lock(mutex);
  std::weak_ptr<CudaDevice>& slot = known[{&driver, ordinal, max_sms}];
  if (std::shared_ptr<CudaDevice> device = slot.lock()) return device;
  Result<std::shared_ptr<CudaDevice>> device = Device::create(driver, ordinal, max_sms);
  if (device) slot = *device;
  return device;
}

int CudaDevice::count(std::string_view library) {
  const Driver& driver = driver_of(library);
  int devices = 0;
  if (!driver.error.empty() || driver.api.device_count(&devices) != kSuccess) return 0;
  return devices;
}

CudaScope::CudaScope(const CudaDevice& device, Use use) : device_(device) {
  failure_ = device.enter(&pushed_);
  if (failure_ || use == Use::kCall) return;
  capture_mode_ = device.exchange_capture_mode(kCaptureModeRelaxed);
  relaxed_ = true;
}

CudaScope::~CudaScope() {
  if (relaxed_) device_.exchange_capture_mode(capture_mode_);
  if (pushed_) device_.leave();
}

Result<std::shared_ptr<const CudaKernel>> CudaKernel::load(std::shared_ptr<CudaDevice> device, const std::string& cubin,
                                                           const std::string& entry, std::size_t shared_memory) {
  // The only devices there are.
  return Kernel::create(std::static_pointer_cast<const Device>(std::move(device)), cubin, entry, shared_memory);
}

Result<std::unique_ptr<CudaWorkbench>> CudaWorkbench::create(std::shared_ptr<CudaDevice> device) {
  return Workbench::create(std::static_pointer_cast<const Device>(std::move(device)));
}

}  // namespace attnjit::runtime
