// A GPU for the tool and the tests: memory, copies, streams, graphs and events through the CUDA driver, which is opened
// at run time. Nothing of CUDA is needed to build it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace attnjit::tool {

// The first device that the process may use. Its primary context, which the library uses as well, becomes the current
// one of every thread that calls something here. Safe from several threads. Failures are the environment's.
class Gpu {
 public:
  // Why there is no usable one; empty where there is.
  static const std::string& unavailable();
  // Throws where there is none.
  static const Gpu& get();

  const std::string& name() const { return name_; }
  int arch() const { return arch_; }                      // 10 * major + minor of the compute capability
  int num_sms() const { return num_sms_; }                // multiprocessors
  int driver_version() const { return driver_version_; }  // of CUDA that it supports: 1000 * major + 10 * minor
  std::size_t free_memory() const;                        // bytes
  void synchronize() const;                               // waits for everything on the device

 private:
  friend struct GpuAccess;
  std::string name_;
  int arch_ = 0, num_sms_ = 0, driver_version_ = 0;
};

// Device memory, aligned to 256 bytes.
class GpuBuffer {
 public:
  GpuBuffer() = default;  // none
  explicit GpuBuffer(std::size_t bytes);
  ~GpuBuffer();
  GpuBuffer(GpuBuffer&& other) noexcept;
  GpuBuffer& operator=(GpuBuffer&& other) noexcept;

  std::byte* data() const { return data_; }  // an address of the device; null where there are no bytes
  std::size_t size() const { return size_; }

  // Copies of `bytes` bytes, `offset` into the buffer; done when they return. A download waits for streams made here.
  void upload(std::size_t offset, const void* from, std::size_t bytes) const;
  void download(std::size_t offset, void* to, std::size_t bytes) const;
  void fill(std::uint8_t byte) const;

 private:
  std::byte* data_ = nullptr;
  std::size_t size_ = 0;
};

// One that waits for the legacy default stream and is waited for by it.
class GpuStream {
 public:
  GpuStream();
  ~GpuStream();
  GpuStream(const GpuStream&) = delete;
  GpuStream& operator=(const GpuStream&) = delete;

  void* handle() const { return handle_; }  // a CUstream
  void synchronize() const;

 private:
  void* handle_ = nullptr;
};

class GpuEvent {
 public:
  GpuEvent();
  ~GpuEvent();
  GpuEvent(const GpuEvent&) = delete;
  GpuEvent& operator=(const GpuEvent&) = delete;

  void record(const GpuStream& stream) const;
  // Waits for this one. Milliseconds of the device between the two.
  double milliseconds_since(const GpuEvent& begin) const;

 private:
  void* handle_ = nullptr;
};

// What `body` enqueued on the stream, to be launched again and again.
class GpuGraph {
 public:
  // What `body` throws ends the capture and passes on.
  GpuGraph(const GpuStream& stream, const std::function<void()>& body);
  ~GpuGraph();
  GpuGraph(const GpuGraph&) = delete;
  GpuGraph& operator=(const GpuGraph&) = delete;

  void launch(const GpuStream& stream) const;

 private:
  void* executable_ = nullptr;
};

}  // namespace attnjit::tool
