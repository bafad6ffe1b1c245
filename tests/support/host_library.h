// Emitted CUDA compiled for the host, with CUDA's words defined away (cuda_host.h), and its functions.
#pragma once

#include <dlfcn.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <fstream>
#include <string>

#include "kernels_templates/cuda/embedded.h"
#include "tests/support/temporary_directory.h"

namespace attnjit::test {

// What stands in front of every emitted mod.
inline std::string host_prelude() {
  const auto file = [](const char* path) {
    const cuda::EmbeddedText text = cuda::template_text(path);
    return std::string(text.data, text.size) + "\n";
  };
  return "#include \"tests/support/cuda_host.h\"\n" + file("cuda/params.h") + file("cuda/functions.cuh") +
         file("cuda/mod_defaults.cuh");
}

class HostLibrary {
 public:
  // Fails the test where `text` does not compile.
  explicit HostLibrary(const std::string& text) {
    const std::string directory = directory_.path().string();
    const std::string source = directory + "/mods.cpp", library = directory + "/mods.so", log = directory + "/log";
    std::ofstream(source) << text;
    // What would be undefined traps.
    const std::string command =
        ATTNJIT_TEST_CLANGXX
        " -std=c++20 -O1 -shared -fPIC -Wall -Wextra -Werror -Wno-unused-parameter -Wno-unused-const-variable"
        " -Wno-tautological-compare -Wno-bitwise-instead-of-logical -ffp-contract=fast -fno-math-errno"
        " -fsanitize=signed-integer-overflow,integer-divide-by-zero,shift-exponent,float-cast-overflow"
        " -fsanitize-trap=all -I" ATTNJIT_SOURCE_DIR " -o " +
        library + " " + source + " >" + log + " 2>&1";
    if (std::system(command.c_str()) != 0) {  // NOLINT(bugprone-command-processor)
      std::ifstream file(log);
      std::string line;
      std::string message;
      for (int i = 0; i < 40 && std::getline(file, line); ++i) message += line + "\n";
      ADD_FAILURE() << message;
      return;
    }
    library_ = dlopen(library.c_str(), RTLD_NOW | RTLD_LOCAL);
    EXPECT_TRUE(library_) << dlerror();
  }
  ~HostLibrary() {
    if (library_) dlclose(library_);
  }
  HostLibrary(const HostLibrary&) = delete;
  HostLibrary& operator=(const HostLibrary&) = delete;

  // Null where there is none.
  void* find(const std::string& function) const { return library_ ? dlsym(library_, function.c_str()) : nullptr; }

 private:
  const TemporaryDirectory directory_;
  void* library_ = nullptr;
};

}  // namespace attnjit::test
