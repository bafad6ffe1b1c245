// The CUDA driver, opened at run time: devices with their primary context, loaded kernels, launches. The only file of
// the runtime that knows the driver's functions is cuda_driver.cpp.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "runtime/status.h"

namespace attnjit::runtime {

using CudaStream = void*;  // a CUstream; null is the legacy default stream

// A 4-D tensor of 16-bit elements (feature, sequence, head, batch) that boxes are copied of: boxes of box[0] features
// in rows of 128 bytes, swizzled over them. What does not exist arrives as zero.
struct TensorMapLayout {
  const void* data = nullptr;    // aligned to 16 bytes
  bool bfloat16 = true;          // or float16
  std::uint64_t extent[4] = {};  // not 0
  std::uint64_t stride[3] = {};  // bytes, of all but features: multiples of 16 below 2^40
  std::uint32_t box[4] = {};     // at most 256; 64 features
};

// One GPU and its primary context, which is retained while the object lives and pushed only around calls. One object
// per ordinal, driver and `max_sms`, and process, at a time.
class CudaDevice {
 public:
  // ATTNJIT_ENVIRONMENT where there is no driver or the device cannot be used, with the reason. `library` is a path or
  // a name for the dynamic loader; empty: libcuda.so.1. It is opened once per process and stays open. `max_sms`: most
  // that num_sms() says; 0: all that there are.
  static Result<std::shared_ptr<CudaDevice>> get(int ordinal, std::string_view library = {}, int max_sms = 0);
  static int count(std::string_view library = {});  // 0 where there is no driver

  virtual ~CudaDevice() = default;
  virtual int ordinal() const = 0;
  virtual const std::string& name() const = 0;
  virtual int arch() const = 0;  // 10 * major + minor of the compute capability
  virtual int num_sms() const = 0;
  virtual int driver_version() const = 0;             // 1000 * major + 10 * minor of the CUDA it brings; 0: unknown
  virtual std::size_t max_shared_memory() const = 0;  // of one block, opted in
  virtual bool has_tensor_maps() const = 0;           // the driver encodes them, as those of CUDA 12 and later do

  // True while `stream` is being captured into a graph (and for a legacy stream that a capture forbids to touch). Does
  // not disturb the capture.
  virtual bool is_capturing(CudaStream stream) const = 0;
  // Stream-ordered. `size` in bytes, `value` a 32-bit pattern; address and size are multiples of 4.
  virtual Check fill(void* address, std::uint32_t value, std::size_t size, CudaStream stream) const = 0;
  // Writes the 128 bytes of a map, aligned to 64, that kernels copy by. Only where has_tensor_maps().
  virtual Check encode_tensor_map(const TensorMapLayout& layout, void* map) const = 0;
  // Points such a map to other memory, laid out as what it was encoded for; a small part of encoding's time.
  virtual Check move_tensor_map(const void* data, void* map) const = 0;

 private:
  friend class CudaScope;
  // Makes the primary context the thread's current one; false where it already was.
  virtual Check enter(bool* pushed) const = 0;
  virtual void leave() const = 0;
  // Sets how this thread's calls treat captures, and returns how they did. A driver's CUstreamCaptureMode.
  virtual int exchange_capture_mode(int mode) const = 0;
};

// Makes a device's primary context current in this thread while it lives, and puts back what was.
class CudaScope {
 public:
  enum class Use {
    kCall,   // stream-ordered work
    kSetup,  // loading, allocating: also allowed while some stream is captured, which then goes on undisturbed
  };
  explicit CudaScope(const CudaDevice& device, Use use = Use::kCall);
  ~CudaScope();
  CudaScope(const CudaScope&) = delete;
  CudaScope& operator=(const CudaScope&) = delete;

  // Why the context could not be made current.
  const Check& failure() const { return failure_; }

 private:
  const CudaDevice& device_;
  Check failure_;
  bool pushed_ = false;
  bool relaxed_ = false;
  int capture_mode_ = 0;
};

// One kernel of a loaded binary, ready to launch: loaded for real, its shared memory opted into. Keeps binary and
// device alive.
class CudaKernel {
 public:
  // `entry` of `cubin`. `shared_memory`: dynamic, in bytes. ATTNJIT_ENVIRONMENT with the driver's message on failure. A
  // capture that is under way in this thread goes on undisturbed.
  static Result<std::shared_ptr<const CudaKernel>> load(std::shared_ptr<CudaDevice> device, const std::string& cubin,
                                                        const std::string& entry, std::size_t shared_memory);
  virtual ~CudaKernel() = default;

  struct Grid {
    unsigned x = 1, y = 1, z = 1;
  };
  // `params`: the kernel's one parameter, copied before the call returns. Does not allocate or synchronise.
  virtual Check launch(Grid grid, unsigned threads, const void* params, CudaStream stream) const = 0;
};

// For trying kernels out, and for memory that a plan's kernels read: a stream of its own, memory and a clock. What it
// does is allowed while a stream is captured, which goes on undisturbed. For one thread at a time; keeps the device
// alive.
class CudaWorkbench {
 public:
  static Result<std::unique_ptr<CudaWorkbench>> create(std::shared_ptr<CudaDevice> device);
  virtual ~CudaWorkbench() = default;  // waits for its work, then frees its memory

  // Aligned to 256 bytes, freed with the object. ATTNJIT_OUT_OF_MEMORY where there is not enough.
  virtual Result<void*> allocate(std::size_t size) = 0;
  // Fills memory with `pattern` over and over. Both sizes in bytes, not 0.
  virtual Check fill(void* memory, std::size_t size, const void* pattern, std::size_t pattern_size) = 0;
  // What the device takes for the work that `enqueue` puts into the stream, in milliseconds. Waits for it.
  virtual Result<double> milliseconds(const std::function<Check(CudaStream)>& enqueue) = 0;
};

}  // namespace attnjit::runtime
