// Autotuning with kernels that are not compiled, on the fake driver's clock: who wins, and what is believed of the
// disk.
#include "runtime/autotune.h"

#include <gmock/gmock.h>
#include <unistd.h>

#include <filesystem>
#include <vector>

#include "runtime/plan.h"
#include "support/fake_cuda/fake_cuda.h"

namespace attnjit::runtime {
namespace {

using testing::HasSubstr;

class Autotune : public testing::Test {
 protected:
  void SetUp() override {
    fake_ = test::fake_cuda(ATTNJIT_FAKE_CUDA);
    ASSERT_NE(fake_, nullptr);
    fake_->reset();
    // A launch of 100 threads takes 100 us.
    fake_->kernel_ms = [](unsigned block, unsigned) { return 1e-3f * static_cast<float>(block); };
    environment_.cuda_driver = ATTNJIT_FAKE_CUDA;
    environment_.cache_dir = cache_;
    for (DLTensor* tensor : {&q_, &k_, &o_}) tensor->device = {kDLCUDA, 0};
  }
  void TearDown() override { std::filesystem::remove_all(cache_); }

  // A context of its own, with contestants of these numbers of threads; 0: one that cannot be made.
  Tuned tune(const std::vector<unsigned>& threads, std::string_view problem = "problem",
             std::string_view why_not = "") {
    Context context(environment_, 1);
    attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
    attention.q = &q_;
    attention.k = attention.v = &k_;
    attention.o = &o_;
    CheckedCall call;
    const Check failure = check_call(&attention, Purpose::kPrepare, &call);
    EXPECT_FALSE(failure) << (failure ? failure->message : "");
    const Mods mods;
    const DumpFiles files(context, "", "");
    const auto device = context.cuda_device(0);
    EXPECT_TRUE(device);
    std::vector<Contestant> contestants;
    contestants.reserve(threads.size());
    for (const unsigned number : threads) {
      contestants.push_back({std::to_string(number) + " threads", [number, &device]() -> Result<Contestant::Launch> {
                               if (number == 0) return Failure{ATTNJIT_UNSUPPORTED, "it spills"};
                               auto kernel = CudaKernel::load(*device, "image", "entry", 0);
                               if (!kernel) return kernel.failure();
                               return Contestant::Launch([kernel = *kernel, number](const ForwardCall&, CudaStream s) {
                                 const int nothing = 0;
                                 return kernel->launch({}, number, &nothing, s);
                               });
                             }});
    }
    launched_before_ = fake_->launched;
    return autotune({.context = context, .call = call, .mods = mods, .files = files}, *device, problem, contestants,
                    why_not, {});
  }
  bool timed() const { return fake_->launched > launched_before_; }

  test::FakeCuda* fake_ = nullptr;
  const std::filesystem::path cache_ =
      std::filesystem::temp_directory_path() / ("attnjit-autotune-unit-" + std::to_string(getpid()));
  Environment environment_;
  std::int64_t shape_[4] = {1, 2, 8, 16};
  DLTensor q_ = {nullptr, {kDLCUDA, 0}, 4, {kDLBfloat, 16, 1}, shape_, nullptr, 0}, k_ = q_, o_ = q_;
  int launched_before_ = 0;
};

TEST_F(Autotune, TheFastestWinsByAMargin) {
  EXPECT_EQ(tune({300, 200, 100, 400}, "a").winner, 2u);
  EXPECT_TRUE(timed());
  // Half a percent is noise.
  EXPECT_EQ(tune({201, 200}, "b").winner, 0u);
  EXPECT_EQ(tune({210, 200}, "c").winner, 1u);
  const Tuned tuned = tune({300, 0, 100}, "d");
  EXPECT_EQ(tuned.winner, 2u);
  EXPECT_EQ(tuned.description["candidates"][1]["left_out"], "it spills");
  EXPECT_NEAR(tuned.description["candidates"][2]["ms"].get<double>(), 0.1, 1e-4);
  EXPECT_EQ(tuned.description["why"], "the fastest of 2 timed");
  // Without the usual one there is nothing to compare with: whoever builds it says what is wrong.
  EXPECT_EQ(tune({0, 100}, "e").winner, 0u);
  EXPECT_EQ(fake_->modules_loaded, fake_->modules_unloaded);
  EXPECT_EQ(fake_->memory_allocated, fake_->memory_freed);
}

TEST_F(Autotune, WhatIsStoredIsTakenAsFarAsItIsAChoice) {
  EXPECT_EQ(tune({300, 100}).winner, 1u);
  EXPECT_EQ(tune({300, 200, 100}).winner, 2u) << "by name";
  EXPECT_FALSE(timed());
  EXPECT_EQ(tune({300, 100}, "problem", "a reason").description["why"], "the fastest, as stored");
  // Another problem, outputs' or driver's: another entry.
  tune({300, 100}, "other");
  EXPECT_TRUE(timed());
  // One that is no candidate any more is no winner, and replaced.
  EXPECT_EQ(tune({300, 200}).winner, 1u);
  EXPECT_TRUE(timed());
  EXPECT_EQ(tune({300, 200}).winner, 1u);
  EXPECT_FALSE(timed());
  // Nor is what is no winner at all.
  const DiskCache disk(cache_, std::uint64_t{1} << 20);
  const std::vector<DiskCache::Entry> entries = disk.list(true);
  ASSERT_EQ(entries.size(), 2u);
  for (const char* payload :
       {"", "no JSON", "[]", "{}", R"({"format":"attnjit autotune 2"})",
        R"({"format":"attnjit autotune 2","about":"","config":5,"candidates":[]})",
        R"({"format":"attnjit autotune 2","about":"","config":"200 threads","candidates":[{"config":"200 threads"}]})",
        R"({"format":"attnjit autotune 1","about":"","config":"200 threads","candidates":[]})",
        R"({"format":7,"about":"","config":"200 threads","candidates":[]})"}) {
    SCOPED_TRACE(payload);
    for (const DiskCache::Entry& entry : entries) ASSERT_TRUE(disk.put(entry.key, payload));
    EXPECT_FALSE(tuned_about(payload));
    EXPECT_EQ(tune({300, 200}).winner, 1u);
    EXPECT_TRUE(timed());
  }
}

TEST_F(Autotune, NothingToTime) {
  const Tuned tuned = tune({300, 100}, "problem", "a reason");
  EXPECT_EQ(tuned.winner, 0u);
  EXPECT_EQ(tuned.description["why"], "not tuned: a reason");
  EXPECT_FALSE(timed());
  fake_->failing["cuMemAlloc"] = 2;
  EXPECT_THAT(tune({300, 100}).description["why"].get<std::string>(), HasSubstr("not tuned: allocating 512 bytes"));
  fake_->failing.clear();
  EXPECT_EQ(tune({300}).description["why"], "not tuned: no other configuration fits");
  EXPECT_FALSE(timed());
  // A failure is not stored.
  EXPECT_EQ(tune({300, 100}).winner, 1u);
  EXPECT_TRUE(timed());
  // Without a disk cache it is timed each time.
  environment_.cache_dir.clear();
  environment_.cache_off = "off";
  EXPECT_EQ(tune({300, 100}).winner, 1u);
  EXPECT_TRUE(timed());
}

// Captured values that decide which tiles are computed rise along their dimension; all others are 1.
TEST_F(Autotune, WhatIsCaptured) {
  std::int64_t shape[] = {2, 50}, flags_shape[] = {50};
  std::int64_t padded[] = {64, 1}, transposed[] = {1, 2}, broadcast[] = {0, 1};
  const auto tensor = [](DLDataType type, std::int64_t* extents, int rank, std::int64_t* strides) {
    return DLTensor{nullptr, {kDLCUDA, 0}, rank, type, extents, strides, 0};
  };
  constexpr DLDataType kInt8 = {kDLInt, 8, 1}, kInt64 = {kDLInt, 64, 1};
  const DLTensor a = tensor(kInt64, shape, 2, padded), b = tensor(kInt8, shape, 2, transposed),
                 c = tensor(kInt8, shape, 2, broadcast), d = tensor({6, 8, 1}, flags_shape, 1, nullptr),
                 e = tensor(kInt64, shape, 2, nullptr);
  const attnjit_capture captures[] = {{"a", &a}, {"b", &b}, {"c", &c}, {"d", &d}, {"e", &e}};
  attnjit_attention attention = ATTNJIT_ATTENTION_INIT;
  attention.q = &q_;
  attention.k = attention.v = &k_;
  attention.o = &o_;
  attention.captures = captures;
  attention.num_captures = std::size(captures);
  Context context(environment_, 1);
  CheckedCall call;
  ASSERT_FALSE(check_call(&attention, Purpose::kPrepare, &call));
  const Mods mods;
  const DumpFiles files(context, "", "");
  const auto device = context.cuda_device(0);
  ASSERT_TRUE(device);
  int launches = 0;
  const auto look = [&](const ForwardCall& given, CudaStream) -> Check {
    ++launches;
    const auto at = [&](std::size_t capture, std::int64_t i, std::int64_t j) {
      const dsl::CaptureView& view = given.captures[capture];
      return dsl::read_as_int(view.data, view.dtype, i * view.stride[0] + j * view.stride[view.rank - 1]);
    };
    for (std::int64_t i = 0; i < 2; ++i) {
      for (std::int64_t j = 0; j < 50; ++j) {
        EXPECT_EQ(at(0, i, j), 8 * j / 50);
        EXPECT_EQ(at(1, i, j), 8 * j / 50);
        EXPECT_EQ(at(2, i, j), 8 * j / 50);
        EXPECT_EQ(at(3, 0, j), 1);
        EXPECT_EQ(at(4, i, j), 1);
      }
    }
    return {};
  };
  const auto make = [&]() -> Result<Contestant::Launch> { return Contestant::Launch(look); };
  const std::vector<Contestant> contestants = {{"one", make}, {"other", make}};
  const compiler::TileSummary summaries[] = {{0, 1}, {1, 1}, {2, 1}, {3, 0}};
  autotune({.context = context, .call = call, .mods = mods, .files = files}, *device, "problem", contestants, "",
           summaries);
  EXPECT_GT(launches, 0);
}

}  // namespace
}  // namespace attnjit::runtime
