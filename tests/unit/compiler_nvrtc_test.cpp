// NVRTC: its log, what identifies it, and compiles where one is installed.
#include <gmock/gmock.h>

#include <thread>

#include "compiler/nvrtc_log.h"
#include "tests/unit/compiler_testing.h"

namespace attnjit::compiler::testing {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// As printed by 13.0, for one kernel after another.
TEST(CompilerNvrtc, LogTellsResourcesByKernel) {
  const ParsedLog parsed = parse_nvrtc_log(
      "ptxas info    : 28 bytes gmem, 16 bytes cmem[4]\n"
      "ptxas info    : Compiling entry function 'first' for 'sm_80'\n"
      "ptxas info    : Function properties for first\n"
      "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
      "ptxas info    : Used 29 registers, used 0 barriers, 1024 bytes smem, 384 bytes cmem[0], 8 bytes cmem[2]\n"
      "ptxas info    : Compile time = 18.146 ms\n"
      "ptxas info    : Compiling entry function 'second' for 'sm_80'\n"
      "ptxas info    : Function properties for second\n"
      "    16 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads\n"
      "ptxas info    : Function properties for helper\n"
      "    8 bytes stack frame, 4 bytes spill stores, 0 bytes spill loads\n"
      "ptxas info    : Used 255 registers, used 1 barriers, 16 bytes cumulative stack size\n"
      "ptxas info    : Compile time = 1.854 ms\n");
  ASSERT_EQ(parsed.resources.size(), 2u);
  EXPECT_EQ(parsed.resources[0].entry, "first");
  EXPECT_EQ(parsed.resources[0].registers, 29);
  EXPECT_EQ(parsed.resources[0].static_shared_bytes, 1024);
  EXPECT_EQ(parsed.resources[0].stack_bytes, 0);
  EXPECT_EQ(parsed.resources[1].registers, 255);
  EXPECT_EQ(parsed.resources[1].stack_bytes, 16);
  EXPECT_EQ(parsed.resources[1].spill_store_bytes, 16);
  EXPECT_EQ(parsed.resources[1].spill_load_bytes, 20);
  EXPECT_NEAR(parsed.ptxas_ms, 20.0, 1e-9);
  EXPECT_THAT(parsed.warnings, ElementsAre("second spills registers: 16 bytes of stores, 20 of loads"));
}

TEST(CompilerNvrtc, LogTellsWhatIsSlowerThanWritten) {
  const ParsedLog parsed = parse_nvrtc_log(
      "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to x\n"
      "ptxas info    : (C7519) warpgroup.arrive is injected in around line 5\n"
      "ptxas info    : (C7504) Potential Performance Loss: 'setmaxnreg' ignored\n"
      "ptxas warning : Value of threads per SM is out of range\n"
      "attnjit.cu(3): warning #177-D: variable \"x\" was declared but never referenced\n");
  EXPECT_THAT(parsed.warnings, ElementsAre(HasSubstr("C7510: Potential Performance Loss: wgmma"), HasSubstr("C7504"),
                                           HasSubstr("out of range"), HasSubstr("#177-D")));
  EXPECT_THAT(parse_nvrtc_log("").warnings, IsEmpty());
}

TEST(CompilerNvrtc, SaysWhyThereIsNone) {
  std::string error;
  EXPECT_EQ(load_nvrtc("libnvrtc_that_is_not_there.so", &error), nullptr);
  EXPECT_THAT(error, HasSubstr("libnvrtc_that_is_not_there.so"));
  EXPECT_EQ(load_nvrtc("libm.so.6", &error), nullptr);
  EXPECT_THAT(error, HasSubstr("libm.so.6 has no nvrtcVersion"));
}

std::string message(const CompileResult<CudaBinary>& result) {
  return result.error ? result.error->message : std::string();
}

const Nvrtc* any_nvrtc() { return load_nvrtc(ATTNJIT_TEST_NVRTC, nullptr); }
#define SKIP_WITHOUT_NVRTC() \
  if (!any_nvrtc()) GTEST_SKIP() << "no NVRTC 12.8 or later on this machine"

CudaSource source(const std::string& body) {
  return {.header = {}, .text = "extern \"C\" __global__ void kernel(float* x) {" + body + "}", .entries = {"kernel"}};
}

TEST(CompilerNvrtc, IsIdentifiedByItsBuild) {
  SKIP_WITHOUT_NVRTC();
  const Nvrtc& nvrtc = *any_nvrtc();
  EXPECT_EQ(any_nvrtc(), &nvrtc);
  EXPECT_GE(nvrtc_version(nvrtc), 1208);
  const std::string version =
      std::to_string(nvrtc_version(nvrtc) / 100) + "." + std::to_string(nvrtc_version(nvrtc) % 100);
  EXPECT_THAT(std::string(nvrtc_identity(nvrtc)), ::testing::StartsWith("nvrtc " + version + " "));
  EXPECT_THAT(std::string(nvrtc_identity(nvrtc)), ::testing::ContainsRegex("build-id [0-9a-f]{16}|hash [0-9a-f]{32}"));
  EXPECT_TRUE(nvrtc_supports(nvrtc, {80}));
  EXPECT_TRUE(nvrtc_supports(nvrtc, {90, true}));
  EXPECT_FALSE(nvrtc_supports(nvrtc, {80, true}));
  EXPECT_FALSE(nvrtc_supports(nvrtc, {35}));
  EXPECT_EQ(cuda_arch_name({90, true}), "sm_90a");
  EXPECT_EQ(cuda_arch_name({120}), "sm_120");
}

TEST(CompilerNvrtc, CompilesAndDumps) {
  SKIP_WITHOUT_NVRTC();
  PhaseTimes phases;
  std::vector<std::pair<std::string, std::string>> dumps;
  const CompileOptions options{
      .dump = [&](std::string_view kind, std::string_view text) { dumps.emplace_back(kind, text); }};
  const auto binary =
      compile_cuda(*any_nvrtc(), source("x[threadIdx.x] = tanhf(x[threadIdx.x]);"), {80}, options, &phases);
  ASSERT_EQ(message(binary), "");
  EXPECT_THAT(binary.value.cubin, ::testing::StartsWith("\x7f"
                                                        "ELF"));
  ASSERT_EQ(binary.value.resources.size(), 1u);
  EXPECT_EQ(binary.value.resources[0].entry, "kernel");
  EXPECT_GT(binary.value.resources[0].registers, 4);
  EXPECT_THAT(binary.value.warnings, IsEmpty());
  ASSERT_EQ(dumps.size(), 2u);
  EXPECT_EQ(dumps[0].first, "ptx");
  EXPECT_THAT(dumps[0].second, HasSubstr(".target sm_80"));
  EXPECT_EQ(dumps[1], std::pair(std::string("cubin"), binary.value.cubin));
  ASSERT_EQ(phases.size(), 2u);
  EXPECT_EQ(phases[0].first, "nvrtc");
  EXPECT_GT(phases[0].second, 0.0);
  EXPECT_EQ(phases[1].first, "ptxas");
  EXPECT_GT(phases[1].second, 0.0);
}

TEST(CompilerNvrtc, ReportsSpills) {
  SKIP_WITHOUT_NVRTC();
  // 200 values alive under a bound of 32 registers.
  std::string body =
      "float v[200];\n#pragma unroll\nfor (int i = 0; i < 200; ++i) v[i] = x[i];\n"
      "#pragma unroll\nfor (int i = 0; i < 200; ++i) x[i] = v[i] * v[199 - i];";
  CudaSource spilling = source(body);
  spilling.text.insert(spilling.text.find("kernel"), "__launch_bounds__(256, 8) ");
  const auto binary = compile_cuda(*any_nvrtc(), spilling, {80});
  ASSERT_EQ(message(binary), "");
  EXPECT_GT(binary.value.resources.at(0).spill_store_bytes, 0);
  EXPECT_THAT(binary.value.warnings, ElementsAre(HasSubstr("kernel spills registers")));
}

TEST(CompilerNvrtc, ReportsErrors) {
  SKIP_WITHOUT_NVRTC();
  const auto wrong = compile_cuda(*any_nvrtc(), source("x[0] = unknown;"), {80});
  EXPECT_THAT(message(wrong), HasSubstr("identifier \"unknown\" is undefined"));
  const auto arch = compile_cuda(*any_nvrtc(), source(""), {35});
  EXPECT_THAT(message(arch), HasSubstr("does not compile for sm_35"));
}

TEST(CompilerNvrtc, KeyHoldsAllThatDecides) {
  SKIP_WITHOUT_NVRTC();
  const Nvrtc& nvrtc = *any_nvrtc();
  const CudaSource a = source("x[0] = 1;");
  const std::string key = cuda_binary_key(nvrtc, a, {80});
  EXPECT_THAT(key, ::testing::MatchesRegex("[0-9a-f]{32}"));
  EXPECT_EQ(key, cuda_binary_key(nvrtc, a, {80}));
  EXPECT_NE(key, cuda_binary_key(nvrtc, source("x[0] = 2;"), {80}));
  EXPECT_NE(key, cuda_binary_key(nvrtc, a, {90}));
  EXPECT_NE(cuda_binary_key(nvrtc, a, {90}), cuda_binary_key(nvrtc, a, {90, true}));
  CudaSource headed = a;
  headed.header = "// another problem with the same code\n";
  EXPECT_EQ(key, cuda_binary_key(nvrtc, headed, {80}));
}

TEST(CompilerNvrtc, CompilesInSeveralThreads) {
  SKIP_WITHOUT_NVRTC();
  std::vector<CompileResult<CudaBinary>> results(4);
  std::vector<std::thread> threads;
  threads.reserve(results.size());
  for (std::size_t i = 0; i < results.size(); ++i)
    threads.emplace_back([&results, i] {
      results[i] = compile_cuda(*any_nvrtc(), source("x[0] = " + std::to_string(i % 2) + ";"), {80});
    });
  for (std::thread& thread : threads) thread.join();
  for (const auto& result : results) ASSERT_FALSE(result.error);
  EXPECT_EQ(results[0].value.cubin, results[2].value.cubin);
  EXPECT_EQ(results[1].value.cubin, results[3].value.cubin);
}

}  // namespace
}  // namespace attnjit::compiler::testing
