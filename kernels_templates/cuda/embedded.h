// Device templates as text: they travel inside the library and are compiled by NVRTC.
#pragma once

namespace attnjit::cuda {

// Borrowed text of static storage.
struct EmbeddedText {
  const char* data = nullptr;
  unsigned long size = 0;
};

// By the file's path below kernels_templates/, e.g. "sm80/forward.cuh"; empty where there is none of that name.
EmbeddedText template_text(const char* path);

}  // namespace attnjit::cuda
