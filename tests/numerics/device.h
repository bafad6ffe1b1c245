// A problem's memory where the backend wants it: the host's own, or copies on the GPU, guards and gaps included.
#pragma once

#include <dlpack/dlpack.h>

#include <cstddef>
#include <list>
#include <memory>
#include <vector>

#include "bench/cuda.h"
#include "tests/numerics/tensor.h"

namespace attnjit::numerics {

// The tensors of one call. On a GPU every buffer is copied there with its guards, poison and gaps, byte by byte, and
// fetch() copies all of it back: what a kernel wrote where it may not shows in the host's memory, by the checks that
// are made there. Of sparse memory, which is too large for that, the rows of the tensor are copied.
class Lender {
 public:
  enum class Place {
    kHost,
    kGpu,
    kNowhere,  // said to be on a GPU, at the host's addresses: to prepare or explain a call only
  };
  explicit Lender(Place place) : place_(place) {}
  Lender(const Lender&) = delete;
  Lender& operator=(const Lender&) = delete;

  // Good while this object, and the tensor, exist.
  DLTensor* lend(Tensor& tensor);
  // On the host whatever the place is: a scalar is passed by value.
  DLTensor* lend_host(Tensor& tensor) { return tensor.dl(); }
  // A workspace's bytes.
  void* lend(Buffer& buffer);
  // Waits for the device and copies everything back.
  void fetch();

 private:
  struct Copy {
    Buffer* host;
    tool::GpuBuffer memory;
    std::vector<Tensor*> sparse;  // those whose rows are copied, one by one
  };
  Copy& copy_of(Buffer& buffer);

  Place place_;
  std::list<Copy> copies_;
  std::list<DLTensor> lent_;
};

}  // namespace attnjit::numerics
