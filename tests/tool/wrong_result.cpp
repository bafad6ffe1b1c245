// Loaded before the library by cli_test.py: makes the results of fused calls wrong, as ATTNJIT_TEST_WRONG says, to show
// that the tool notices. The tool itself has no such hook.
#include <attnjit/attnjit.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <string_view>

namespace {

std::int64_t size_of(const DLTensor* tensor) {
  std::int64_t size = 1;
  for (int i = 0; i < tensor->ndim; ++i) size *= tensor->shape[i];
  return size;
}

// float32 only: the tests ask for it.
float* values(const DLTensor* tensor) { return static_cast<float*>(tensor->data); }

}  // namespace

extern "C" __attribute__((visibility("default"))) attnjit_status attnjit_run(attnjit_plan* plan,
                                                                             const attnjit_attention* attention,
                                                                             void* workspace, size_t workspace_size,
                                                                             void* stream) {
  static const auto run = reinterpret_cast<decltype(&attnjit_run)>(::dlsym(RTLD_NEXT, "attnjit_run"));
  const attnjit_status status = run(plan, attention, workspace, workspace_size, stream);
  const char* variable = std::getenv("ATTNJIT_TEST_WRONG");
  const std::string_view wrong = variable != nullptr ? variable : "";
  if (attention->backend == ATTNJIT_BACKEND_MATH) return status;
  const std::int64_t size = size_of(attention->o);
  if (wrong == "half_percent") {
    for (std::int64_t i = 0; i < size; ++i) values(attention->o)[i] *= 1.005f;
  } else if (wrong == "lse") {
    for (std::int64_t i = 0; i < size_of(attention->lse); ++i) values(attention->lse)[i] += 0.001f;
  } else if (wrong == "one_element") {
    values(attention->o)[size / 3] += 0.5f;  // in a row that is most likely not sampled
  } else if (wrong == "one_lse") {
    values(attention->lse)[size_of(attention->lse) / 3] += 0.01f;
  } else if (wrong == "not_written") {
    values(attention->o)[size / 3] = NAN;
  }
  return status;
}

extern "C" __attribute__((visibility("default"))) attnjit_status
attnjit_run_backward(attnjit_plan* plan, const attnjit_attention* attention, const attnjit_gradients* gradients,
                     void* workspace, size_t workspace_size, void* stream) {
  static const auto run = reinterpret_cast<decltype(&attnjit_run_backward)>(::dlsym(RTLD_NEXT, "attnjit_run_backward"));
  const attnjit_status status = run(plan, attention, gradients, workspace, workspace_size, stream);
  const char* variable = std::getenv("ATTNJIT_TEST_WRONG");
  const std::string_view wrong = variable != nullptr ? variable : "";
  if (attention->backend == ATTNJIT_BACKEND_MATH) return status;
  if (wrong == "dq_half_percent") {
    for (std::int64_t i = 0; i < size_of(gradients->dq); ++i) values(gradients->dq)[i] *= 1.005f;
  } else if (wrong == "dk_scale") {
    for (std::int64_t i = 0; i < size_of(gradients->dk); ++i) values(gradients->dk)[i] *= 2.0f;
  } else if (wrong == "dv_one_element") {
    values(gradients->dv)[size_of(gradients->dv) / 3] += 0.5f;
  } else if (wrong == "dk_not_written") {
    values(gradients->dk)[size_of(gradients->dk) / 3] = NAN;
  }
  return status;
}
