// The device templates as they travel in the library.
#include <gtest/gtest.h>

#include <fstream>
#include <sstream>
#include <string>

#include "kernels_templates/cuda/embedded.h"

namespace attnjit::cuda {
namespace {

std::string text_of(const char* path) {
  const EmbeddedText text = template_text(path);
  return {text.data, text.size};
}

TEST(KernelsText, IsTheFileWithoutItsGuard) {
  for (const char* path : {"cuda/params.h", "cuda/mod_defaults.cuh", "sm80/config.h"}) {
    std::ifstream file(std::string(ATTNJIT_SOURCE_DIR "/kernels_templates/") + path);
    std::stringstream content;
    content << file.rdbuf();
    std::string expected = content.str();
    const std::string guard = "#pragma once\n\n";
    if (const std::size_t at = expected.find(guard); at != std::string::npos) expected.erase(at, guard.size());
    ASSERT_FALSE(expected.empty()) << path;
    EXPECT_EQ(text_of(path), expected) << path;
  }
}

TEST(KernelsText, IsEmptyForUnknownNames) {
  EXPECT_EQ(template_text("cuda/embedded.h").size, 0u);
  EXPECT_EQ(template_text("").size, 0u);
  EXPECT_EQ(template_text("params.h").size, 0u);
}

}  // namespace
}  // namespace attnjit::cuda
