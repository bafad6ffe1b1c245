// CUDA text to a binary through memory, disk and NVRTC, with real compiles of a small kernel where there is an NVRTC.
#include "runtime/cuda_binaries.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "runtime/context.h"
#include "tests/support/temporary_directory.h"

namespace attnjit::runtime {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

compiler::CudaSource small_kernel(int constant = 1) {
  compiler::CudaSource source;
  source.header = "// score_mod: score + " + std::to_string(constant) + "\n// a small kernel\n";
  source.text =
      "extern \"C\" __global__ void attnjit_small(float* x) { x[threadIdx.x] += " + std::to_string(constant) + "; }\n";
  source.entries = {"attnjit_small"};
  return source;
}

class CudaBinariesTest : public testing::Test {
 protected:
  // As a program would start with these settings.
  std::unique_ptr<Context> context(const std::string& nvrtc = "") const {
    Environment environment;
    environment.cache_dir = directory_;
    environment.nvrtc = nvrtc;
    return std::make_unique<Context>(std::move(environment), 1);
  }
  Result<FoundBinary> find(Context& context, const compiler::CudaSource& source, int arch = 80,
                           const compiler::CompileOptions& options = {}) const {
    return find_cuda_binary(context, source, {.number = arch}, options);
  }

  const test::TemporaryDirectory temporary_;
  const fs::path directory_ = temporary_.path();
};

TEST_F(CudaBinariesTest, WithoutNvrtcTheMessageNamesIt) {
  const auto found = find(*context("/nonexistent/libnvrtc.so"), small_kernel());
  ASSERT_FALSE(found);
  EXPECT_EQ(found.failure().status, ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(found.failure().message, HasSubstr("/nonexistent/libnvrtc.so"));
}

class CudaBinariesCompileTest : public CudaBinariesTest {
 protected:
  void SetUp() override {
    CudaBinariesTest::SetUp();
    // In a process of its own: the others below are forked from one that has no NVRTC in it.
    if (in_processes(1, [&](int) {
          std::string error;
          return compiler::load_nvrtc(nvrtc_, &error) == nullptr;
        })[0] != 0) {
      GTEST_SKIP() << "no NVRTC";
    }
  }

  // The exit codes of `body` in `count` processes at once.
  template <typename Body>
  static std::vector<int> in_processes(int count, Body&& body) {
    std::vector<pid_t> children;
    for (int i = 0; i < count; ++i) {
      const pid_t child = ::fork();
      if (child == 0) ::_exit(body(i));
      children.push_back(child);
    }
    std::vector<int> codes;
    for (const pid_t child : children) {
      int status = 0;
      ::waitpid(child, &status, 0);
      codes.push_back(WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status));
    }
    return codes;
  }

  const std::string nvrtc_ = std::getenv("ATTNJIT_NVRTC") ? std::getenv("ATTNJIT_NVRTC") : "";
};

TEST_F(CudaBinariesCompileTest, OneCompilePerKeyForManyProcesses) {
  constexpr int kProcesses = 16, kKernels = 3;
  // A bit for each kernel that was compiled here, and another one for a failure.
  const std::vector<int> codes = in_processes(kProcesses, [&](int process) {
    const auto own = context(nvrtc_);
    int code = 0;
    for (int i = 0; i < kKernels; ++i) {
      const int which = (i + process) % kKernels;
      const auto found = find(*own, small_kernel(which));
      if (!found || found->binary->cubin.empty()) return 1 << kKernels;
      if (found->origin == BinaryOrigin::kCompiled) code |= 1 << which;
    }
    return code;
  });
  std::array<int, kKernels + 1> compiles{};
  for (const int code : codes) {
    for (int i = 0; i <= kKernels; ++i) compiles[static_cast<std::size_t>(i)] += (code >> i) & 1;
  }
  EXPECT_THAT(compiles, testing::ElementsAre(1, 1, 1, 0));
}

TEST_F(CudaBinariesCompileTest, CompiledThenMemoryThenDisk) {
  const auto first = context(nvrtc_);
  const auto compiled = find(*first, small_kernel());
  ASSERT_TRUE(compiled) << compiled.failure().message;
  EXPECT_EQ(compiled->origin, BinaryOrigin::kCompiled);
  EXPECT_THAT(compiled->binary->cubin, testing::StartsWith("\x7f"
                                                           "ELF"));
  ASSERT_EQ(compiled->binary->resources.size(), 1u);
  EXPECT_EQ(compiled->binary->resources[0].entry, "attnjit_small");
  EXPECT_GT(compiled->binary->resources[0].registers, 0);
  EXPECT_EQ(compiled->key.size(), 32u);
  EXPECT_EQ(find(*first, small_kernel())->origin, BinaryOrigin::kMemory);

  const auto second = context(nvrtc_);
  const auto read = find(*second, small_kernel());
  ASSERT_TRUE(read);
  EXPECT_EQ(read->origin, BinaryOrigin::kDisk);
  EXPECT_EQ(read->key, compiled->key);
  EXPECT_EQ(read->binary->cubin, compiled->binary->cubin);
  EXPECT_EQ(read->binary->resources[0].registers, compiled->binary->resources[0].registers);

  // Another text and another architecture are other binaries.
  EXPECT_NE(find(*second, small_kernel(2))->key, compiled->key);
  EXPECT_NE(find(*second, small_kernel(), 90)->key, compiled->key);
  EXPECT_EQ(second->binaries().disk().list(true).size(), 3u);
  const auto stored = binary_from_bytes(second->binaries().disk().peek(compiled->key).value_or(""));
  EXPECT_EQ(stored.value_or(StoredBinary{}).about, "sm_80: attnjit_small\nscore_mod: score + 1\na small kernel");
}

TEST_F(CudaBinariesCompileTest, ADumpIsOfACompile) {
  const auto own = context(nvrtc_);
  compiler::CompileOptions options;
  int dumps = 0;
  options.dump = [&](std::string_view, std::string_view text) { dumps += !text.empty(); };
  for (int round = 0; round < 2; ++round) {
    const auto found = find(*own, small_kernel(), 80, options);
    ASSERT_TRUE(found);
    EXPECT_EQ(found->origin, BinaryOrigin::kCompiled);
    EXPECT_GT(std::exchange(dumps, 0), 0);
  }
  EXPECT_TRUE(own->binaries().disk().list(false).empty());
}

TEST_F(CudaBinariesCompileTest, Refusals) {
  const auto own = context(nvrtc_);
  const auto arch = find(*own, small_kernel(), 35);
  ASSERT_FALSE(arch);
  EXPECT_EQ(arch.failure().status, ATTNJIT_ENVIRONMENT);
  EXPECT_THAT(arch.failure().message, HasSubstr("sm_35"));

  compiler::CudaSource wrong = small_kernel();
  wrong.text += "nonsense";
  const auto text = find(*own, wrong);
  ASSERT_FALSE(text);
  EXPECT_EQ(text.failure().status, ATTNJIT_INTERNAL);
  EXPECT_THAT(text.failure().message, HasSubstr("nonsense"));
  EXPECT_TRUE(own->binaries().disk().list(false).empty()) << "a failure was kept";
}

// Damage at sampled places of a real entry: what comes back is the same cubin, compiled anew.
TEST_F(CudaBinariesCompileTest, ADamagedEntryNeverGivesAWrongBinary) {
  const auto compiled = find(*context(nvrtc_), small_kernel());
  ASSERT_TRUE(compiled);
  const fs::path entry = directory_ / (compiled->key + ".attnjit");
  const auto size = fs::file_size(entry);
  for (std::uintmax_t i = 0; i < size; i += size / 25) {
    if (i % 2 == 0) {
      std::fstream file(entry, std::ios::binary | std::ios::in | std::ios::out);
      file.seekg(static_cast<std::streamoff>(i));
      const int byte = file.get();
      file.seekp(static_cast<std::streamoff>(i)).put(static_cast<char>(byte ^ (1 << (i % 7))));
    } else {
      fs::resize_file(entry, i);
    }
    const auto found = find(*context(nvrtc_), small_kernel());
    ASSERT_TRUE(found);
    EXPECT_EQ(found->origin, BinaryOrigin::kCompiled) << i;
    EXPECT_EQ(found->binary->cubin, compiled->binary->cubin) << i;
    EXPECT_EQ(fs::file_size(entry), size) << "not replaced";
  }
  EXPECT_EQ(find(*context(nvrtc_), small_kernel())->origin, BinaryOrigin::kDisk);
}

}  // namespace
}  // namespace attnjit::runtime
