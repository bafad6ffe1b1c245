// The driver's functions that the tool and the tests need.
#include "bench/cuda.h"

#include <dlfcn.h>

#include <array>
#include <cstdlib>
#include <exception>
#include <type_traits>
#include <utility>

#include "bench/failure.h"

namespace attnjit::tool {

namespace {

// From the driver's interface: handles are pointers, device addresses 64-bit integers.
using Result = int;
using Address = std::uint64_t;

constexpr int kMultiprocessors = 16, kMajor = 75, kMinor = 76;  // CU_DEVICE_ATTRIBUTE_...
constexpr int kCaptureThreadLocal = 1;                          // other threads' calls do not break a capture
constexpr unsigned kDefaultFlags = 0;

}  // namespace

// The opened driver, and the device's primary context, which is kept to the end of the process: buffers of static
// storage may outlive anything else.
struct GpuAccess {
  Result (*init)(unsigned);
  Result (*driver_version)(int*);
  Result (*device_count)(int*);
  Result (*device_get)(int*, int);
  Result (*device_name)(char*, int, int);
  Result (*device_attribute)(int*, int, int);
  Result (*primary_context_retain)(void**, int);
  Result (*context_set)(void*);
  Result (*context_synchronize)();
  Result (*memory_info)(std::size_t*, std::size_t*);
  Result (*allocate)(Address*, std::size_t);
  Result (*release)(Address);
  Result (*copy_to_device)(Address, const void*, std::size_t);
  Result (*copy_to_host)(void*, Address, std::size_t);
  Result (*fill_bytes)(Address, unsigned char, std::size_t);
  Result (*stream_create)(void**, unsigned);
  Result (*stream_destroy)(void*);
  Result (*stream_synchronize)(void*);
  Result (*begin_capture)(void*, int);
  Result (*end_capture)(void*, void**);
  Result (*graph_destroy)(void*);
  Result (*graph_instantiate)(void**, void*, unsigned long long);
  Result (*graph_launch)(void*, void*);
  Result (*executable_destroy)(void*);
  Result (*event_create)(void**, unsigned);
  Result (*event_destroy)(void*);
  Result (*event_record)(void*, void*);
  Result (*event_synchronize)(void*);
  Result (*event_elapsed)(float*, void*, void*);
  Result (*error_name)(Result, const char**);
  Result (*error_string)(Result, const char**);

  void* context = nullptr;
  Gpu gpu;
  std::string unavailable;

  GpuAccess() { unavailable = open(); }

  std::string text_of(Result result) const {
    const char* name = nullptr;
    const char* text = nullptr;
    if (error_name(result, &name) != 0 || name == nullptr) return "CUDA error " + std::to_string(result);
    if (error_string(result, &text) != 0 || text == nullptr) return name;
    return std::string(name) + ": " + text;
  }

  void check(Result result, const char* what) const {
    if (result != 0) throw environment_error(std::string(what) + ": " + text_of(result));
  }

  // Empty, or why there is no device.
  std::string open() {
    const char* const name = std::getenv("ATTNJIT_CUDA_DRIVER");  // that of the library
    void* const library = dlopen(name != nullptr && *name != '\0' ? name : "libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) return std::string("no CUDA driver: ") + dlerror();
    const char* missing = nullptr;
    const auto find = [&](auto& function, const char* name) {
      function = reinterpret_cast<std::remove_reference_t<decltype(function)>>(dlsym(library, name));
      if (function == nullptr && missing == nullptr) missing = name;
    };
    find(init, "cuInit");
    find(driver_version, "cuDriverGetVersion");
    find(device_count, "cuDeviceGetCount");
    find(device_get, "cuDeviceGet");
    find(device_name, "cuDeviceGetName");
    find(device_attribute, "cuDeviceGetAttribute");
    find(primary_context_retain, "cuDevicePrimaryCtxRetain");
    find(context_set, "cuCtxSetCurrent");
    find(context_synchronize, "cuCtxSynchronize");
    find(memory_info, "cuMemGetInfo_v2");
    find(allocate, "cuMemAlloc_v2");
    find(release, "cuMemFree_v2");
    find(copy_to_device, "cuMemcpyHtoD_v2");
    find(copy_to_host, "cuMemcpyDtoH_v2");
    find(fill_bytes, "cuMemsetD8_v2");
    find(stream_create, "cuStreamCreate");
    find(stream_destroy, "cuStreamDestroy_v2");
    find(stream_synchronize, "cuStreamSynchronize");
    find(begin_capture, "cuStreamBeginCapture_v2");
    find(end_capture, "cuStreamEndCapture");
    find(graph_destroy, "cuGraphDestroy");
    find(graph_instantiate, "cuGraphInstantiateWithFlags");
    find(graph_launch, "cuGraphLaunch");
    find(executable_destroy, "cuGraphExecDestroy");
    find(event_create, "cuEventCreate");
    find(event_destroy, "cuEventDestroy_v2");
    find(event_record, "cuEventRecord");
    find(event_synchronize, "cuEventSynchronize");
    find(event_elapsed, "cuEventElapsedTime");
    find(error_name, "cuGetErrorName");
    find(error_string, "cuGetErrorString");
    if (missing != nullptr) return std::string("the CUDA driver is too old: it has no ") + missing;

    int count = 0, device = 0, major = 0, minor = 0;
    std::array<char, 256> device_text{};
    if (const Result result = init(kDefaultFlags); result != 0) return "cuInit: " + text_of(result);
    if (const Result result = device_count(&count); result != 0) return "cuDeviceGetCount: " + text_of(result);
    if (count == 0) return "the CUDA driver has no device";
    Result result = device_get(&device, 0);
    if (result == 0) result = device_name(device_text.data(), static_cast<int>(device_text.size()), device);
    if (result == 0) result = device_attribute(&major, kMajor, device);
    if (result == 0) result = device_attribute(&minor, kMinor, device);
    if (result == 0) result = device_attribute(&gpu.num_sms_, kMultiprocessors, device);
    if (result == 0) result = driver_version(&gpu.driver_version_);
    if (result == 0) result = primary_context_retain(&context, device);
    if (result != 0) return "CUDA device 0 cannot be used: " + text_of(result);
    gpu.name_ = device_text.data();
    gpu.arch_ = 10 * major + minor;
    return "";
  }

  // Never destroyed, see above.
  static const GpuAccess& opened() {
    static const GpuAccess& access = *new GpuAccess;
    return access;
  }

  // Opened, there, and current in this thread.
  static const GpuAccess& current() {
    const GpuAccess& access = opened();
    if (!access.unavailable.empty()) throw environment_error(access.unavailable);
    access.check(access.make_current(), "cuCtxSetCurrent");
    return access;
  }

  // For destructors of what current() helped to make: they do not throw, and a driver that is gone has freed it.
  static const GpuAccess& last() {
    const GpuAccess& access = opened();
    access.make_current();
    return access;
  }

  Result make_current() const {
    thread_local bool set = false;
    if (set) return 0;
    const Result result = context_set(context);
    set = result == 0;
    return result;
  }
};

namespace {

Address address_of(const std::byte* data) { return reinterpret_cast<Address>(data); }

}  // namespace

const std::string& Gpu::unavailable() { return GpuAccess::opened().unavailable; }

const Gpu& Gpu::get() { return GpuAccess::current().gpu; }

std::size_t Gpu::free_memory() const {
  const GpuAccess& access = GpuAccess::current();
  std::size_t free = 0, total = 0;
  access.check(access.memory_info(&free, &total), "cuMemGetInfo");
  return free;
}

void Gpu::synchronize() const {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.context_synchronize(), "cuCtxSynchronize");
}

GpuBuffer::GpuBuffer(std::size_t bytes) : size_(bytes) {
  if (bytes == 0) return;  // which the driver refuses
  const GpuAccess& access = GpuAccess::current();
  Address address = 0;
  access.check(access.allocate(&address, bytes), ("allocating " + std::to_string(bytes) + " bytes on the GPU").c_str());
  data_ = reinterpret_cast<std::byte*>(address);
}

GpuBuffer::~GpuBuffer() {
  if (data_ != nullptr) GpuAccess::last().release(address_of(data_));
}

GpuBuffer::GpuBuffer(GpuBuffer&& other) noexcept
    : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}

GpuBuffer& GpuBuffer::operator=(GpuBuffer&& other) noexcept {
  std::swap(data_, other.data_);
  std::swap(size_, other.size_);
  return *this;
}

void GpuBuffer::upload(std::size_t offset, const void* from, std::size_t bytes) const {
  if (bytes == 0) return;
  const GpuAccess& access = GpuAccess::current();
  access.check(access.copy_to_device(address_of(data_ + offset), from, bytes), "copying to the GPU");
}

void GpuBuffer::download(std::size_t offset, void* to, std::size_t bytes) const {
  if (bytes == 0) return;
  const GpuAccess& access = GpuAccess::current();
  access.check(access.copy_to_host(to, address_of(data_ + offset), bytes), "copying from the GPU");
}

void GpuBuffer::fill(std::uint8_t byte) const {
  if (size_ == 0) return;
  const GpuAccess& access = GpuAccess::current();
  access.check(access.fill_bytes(address_of(data_), byte, size_), "filling memory of the GPU");
}

GpuStream::GpuStream() {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.stream_create(&handle_, kDefaultFlags), "cuStreamCreate");
}

GpuStream::~GpuStream() { GpuAccess::last().stream_destroy(handle_); }

void GpuStream::synchronize() const {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.stream_synchronize(handle_), "cuStreamSynchronize");
}

GpuEvent::GpuEvent() {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.event_create(&handle_, kDefaultFlags), "cuEventCreate");
}

GpuEvent::~GpuEvent() { GpuAccess::last().event_destroy(handle_); }

void GpuEvent::record(const GpuStream& stream) const {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.event_record(handle_, stream.handle()), "cuEventRecord");
}

double GpuEvent::milliseconds_since(const GpuEvent& begin) const {
  const GpuAccess& access = GpuAccess::current();
  float milliseconds = 0.0f;
  access.check(access.event_synchronize(handle_), "cuEventSynchronize");
  access.check(access.event_elapsed(&milliseconds, begin.handle_, handle_), "cuEventElapsedTime");
  return static_cast<double>(milliseconds);
}

GpuGraph::GpuGraph(const GpuStream& stream, const std::function<void()>& body) {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.begin_capture(stream.handle(), kCaptureThreadLocal), "cuStreamBeginCapture");
  std::exception_ptr thrown;
  try {
    body();
  } catch (...) {
    thrown = std::current_exception();
  }
  void* graph = nullptr;
  Result result = access.end_capture(stream.handle(), &graph);
  if (!thrown && result == 0) result = access.graph_instantiate(&executable_, graph, 0);
  if (graph != nullptr) access.graph_destroy(graph);
  if (thrown) std::rethrow_exception(thrown);
  access.check(result, "capturing a CUDA graph");
}

GpuGraph::~GpuGraph() { GpuAccess::last().executable_destroy(executable_); }

void GpuGraph::launch(const GpuStream& stream) const {
  const GpuAccess& access = GpuAccess::current();
  access.check(access.graph_launch(executable_, stream.handle()), "cuGraphLaunch");
}

}  // namespace attnjit::tool
