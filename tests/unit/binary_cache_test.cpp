// Binaries by key with an injected compile function: one compile for many threads and processes, whatever happens to
// the disk. Also built by itself under ThreadSanitizer.
#include "runtime/binary_cache.h"

#include <gtest/gtest.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <csignal>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <latch>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/temporary_directory.h"

namespace attnjit::runtime {
namespace {

namespace fs = std::filesystem;
using compiler::CudaBinary;

constexpr const char* kKey = "00112233445566778899aabbccddeeff";
constexpr std::uint64_t kPlenty = std::uint64_t{1} << 30;

CudaBinary sample(const std::string& text = "bytes") {
  return {.cubin = std::string("cubin\0of ", 9) + text,
          .resources = {{.entry = "attnjit_forward",
                         .registers = 168,
                         .spill_store_bytes = 1,
                         .spill_load_bytes = 2,
                         .stack_bytes = 3,
                         .static_shared_bytes = 4},
                        {.entry = ""}},
          .warnings = {"a spill", ""}};
}

std::string bytes_of(const CudaBinary& binary) { return binary_to_bytes({.about = "about", .binary = binary}); }

bool same(const CudaBinary& a, const CudaBinary& b) { return bytes_of(a) == bytes_of(b); }

class BinaryCacheTest : public testing::Test {
 protected:
  fs::path directory() const { return root_ / "cache"; }
  DiskCache disk() const { return {directory(), kPlenty}; }
  fs::path entry() const { return directory() / (std::string(kKey) + ".attnjit"); }

  // One compile, counted across processes by the file's length.
  BinaryCache::Compile counting(const std::string& text = "bytes", int milliseconds = 0) const {
    return [=, log = (root_ / "compiles").string()](compiler::PhaseTimes* phases) -> Result<CudaBinary> {
      std::ofstream(log, std::ios::app) << 'c';
      std::this_thread::sleep_for(std::chrono::milliseconds(milliseconds));
      phases->emplace_back("compile", milliseconds);
      return sample(text);
    };
  }
  std::size_t compiles() const {
    std::error_code error;
    const auto size = fs::file_size(root_ / "compiles", error);
    return error ? 0 : size;
  }

  // Runs `body` in `count` processes at once; the number of them that did not return 0.
  template <typename Body>
  static int in_processes(int count, Body&& body) {
    std::vector<pid_t> children;
    for (int i = 0; i < count; ++i) {
      const pid_t child = ::fork();
      if (child == 0) ::_exit(body(i));
      children.push_back(child);
    }
    int wrong = 0;
    for (const pid_t child : children) {
      int status = 0;
      ::waitpid(child, &status, 0);
      wrong += status != 0;
    }
    return wrong;
  }

  const test::TemporaryDirectory temporary_;
  const fs::path root_ = temporary_.path();
  const Logger logger_{LogLevel::kOff};
};

std::vector<std::string> names(const compiler::PhaseTimes& phases) {
  std::vector<std::string> found;
  for (const auto& [name, milliseconds] : phases) found.push_back(name);
  return found;
}

// ---- Bytes

TEST(BinaryCacheBytes, ThereAndBack) {
  for (const CudaBinary& binary : {sample(), CudaBinary{}, sample(std::string(100000, '\xff'))}) {
    const StoredBinary stored = binary_from_bytes(bytes_of(binary)).value_or(StoredBinary{});
    EXPECT_EQ(stored.about, "about");
    const CudaBinary* back = &stored.binary;
    EXPECT_EQ(back->cubin, binary.cubin);
    EXPECT_EQ(back->warnings, binary.warnings);
    ASSERT_EQ(back->resources.size(), binary.resources.size());
    for (std::size_t i = 0; i < binary.resources.size(); ++i) {
      const auto &a = back->resources[i], &b = binary.resources[i];
      EXPECT_EQ(a.entry, b.entry);
      EXPECT_EQ(a.registers, b.registers);
      EXPECT_EQ(a.spill_store_bytes, b.spill_store_bytes);
      EXPECT_EQ(a.spill_load_bytes, b.spill_load_bytes);
      EXPECT_EQ(a.stack_bytes, b.stack_bytes);
      EXPECT_EQ(a.static_shared_bytes, b.static_shared_bytes);
    }
  }
}

// The disk's checksum comes first; these bytes are believed by nobody all the same.
TEST(BinaryCacheBytes, DamageIsRefusedOrAnotherBinaryOfTheSameSize) {
  const std::string good = bytes_of(sample());
  for (std::size_t i = 0; i < good.size(); ++i) {
    EXPECT_FALSE(binary_from_bytes(good.substr(0, i))) << "cut at " << i;
    for (int value = 0; value < 256; ++value) {
      std::string bad = good;
      bad[i] = static_cast<char>(value);
      if (bad == good) continue;
      const std::optional<StoredBinary> read = binary_from_bytes(bad);
      if (i < 4) {
        EXPECT_FALSE(read) << "another version";
      }
      if (read) {
        EXPECT_EQ(binary_to_bytes(*read), bad) << i;
      }
    }
  }
  EXPECT_FALSE(binary_from_bytes(good + '\0'));
  EXPECT_FALSE(binary_from_bytes(std::string(1000, '\xff')));
}

// ---- Where a binary comes from

TEST_F(BinaryCacheTest, CompiledThenMemoryThenDisk) {
  BinaryCache first(disk(), logger_);
  auto found = first.find(kKey, "about", counting());
  ASSERT_TRUE(found);
  EXPECT_EQ(found->origin, BinaryOrigin::kCompiled);
  EXPECT_EQ(found->key, kKey);
  EXPECT_EQ(names(found->phases), (std::vector<std::string>{"compile", "disk_write"}));
  EXPECT_TRUE(same(*found->binary, sample()));

  const auto again = first.find(kKey, "about", counting());
  ASSERT_TRUE(again);
  EXPECT_EQ(again->origin, BinaryOrigin::kMemory);
  EXPECT_EQ(again->binary, found->binary);
  EXPECT_TRUE(again->phases.empty());

  const auto other = BinaryCache(disk(), logger_).find(kKey, "about", counting());
  ASSERT_TRUE(other);
  EXPECT_EQ(other->origin, BinaryOrigin::kDisk);
  EXPECT_EQ(names(other->phases), (std::vector<std::string>{"disk_read"}));
  EXPECT_TRUE(same(*other->binary, sample()));
  EXPECT_EQ(compiles(), 1u);
}

TEST_F(BinaryCacheTest, WithoutADisk) {
  BinaryCache cache(DiskCache("", kPlenty), logger_);
  EXPECT_EQ(cache.find(kKey, "about", counting())->origin, BinaryOrigin::kCompiled);
  EXPECT_EQ(cache.find(kKey, "about", counting())->origin, BinaryOrigin::kMemory);
  EXPECT_EQ(compiles(), 1u);
}

TEST_F(BinaryCacheTest, ADiskThatRefusesCostsNoResult) {
  std::ofstream(directory()) << "a file in the directory's place";
  BinaryCache cache(disk(), logger_);
  const auto found = cache.find(kKey, "about", counting());
  ASSERT_TRUE(found);
  EXPECT_TRUE(same(*found->binary, sample()));
  EXPECT_EQ(cache.find(kKey, "about", counting())->origin, BinaryOrigin::kMemory);

  // It was fine when the cache was made.
  fs::remove(directory());
  BinaryCache later(disk(), logger_);
  std::ofstream(directory()) << "a file in the directory's place";
  EXPECT_TRUE(later.find(kKey, "about", counting()));
  EXPECT_EQ(compiles(), 2u);
}

TEST_F(BinaryCacheTest, ADamagedEntryIsCompiledAgainAndReplaced) {
  ASSERT_TRUE(BinaryCache(disk(), logger_).find(kKey, "about", counting()));
  const auto size = fs::file_size(entry());
  for (std::uintmax_t i = 0; i < size; i += 13) {
    std::fstream file(entry(), std::ios::binary | std::ios::in | std::ios::out);
    file.seekg(static_cast<std::streamoff>(i));
    const int byte = file.get();
    file.seekp(static_cast<std::streamoff>(i)).put(static_cast<char>(byte ^ 4));
    file.close();
    const std::size_t before = compiles();
    const auto found = BinaryCache(disk(), logger_).find(kKey, "about", counting());
    ASSERT_TRUE(found);
    ASSERT_EQ(found->origin, BinaryOrigin::kCompiled) << i;
    ASSERT_TRUE(same(*found->binary, sample())) << i;
    ASSERT_EQ(compiles(), before + 1);
    ASSERT_EQ(BinaryCache(disk(), logger_).find(kKey, "about", counting())->origin, BinaryOrigin::kDisk) << i;
  }
}

// Sound for the disk cache, but no binary: from another version of the library.
TEST_F(BinaryCacheTest, AnotherPayloadIsReplaced) {
  ASSERT_TRUE(disk().put(kKey, "something else"));
  const auto found = BinaryCache(disk(), logger_).find(kKey, "about", counting());
  ASSERT_TRUE(found);
  EXPECT_EQ(found->origin, BinaryOrigin::kCompiled);
  EXPECT_EQ(BinaryCache(disk(), logger_).find(kKey, "about", counting())->origin, BinaryOrigin::kDisk);
}

TEST_F(BinaryCacheTest, AFailureIsReportedAndNotKept) {
  BinaryCache cache(disk(), logger_);
  const auto failed = cache.find(kKey, "about", [](auto*) { return Failure{ATTNJIT_INTERNAL, "it does not compile"}; });
  ASSERT_FALSE(failed);
  EXPECT_EQ(failed.failure().message, "it does not compile");
  EXPECT_THROW((void)cache.find(kKey, "about", [](auto*) -> Result<CudaBinary> { throw std::runtime_error("no"); }),
               std::runtime_error);
  EXPECT_FALSE(fs::exists(entry()));
  EXPECT_EQ(cache.find(kKey, "about", counting())->origin, BinaryOrigin::kCompiled);
}

// ---- One compile

TEST_F(BinaryCacheTest, OneCompileForManyThreads) {
  constexpr int kThreads = 16;
  BinaryCache cache(disk(), logger_);
  std::atomic<int> compiled = 0, wrong = 0;
  std::latch start(kThreads);
  std::vector<std::thread> threads;
  threads.reserve(kThreads);
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      start.arrive_and_wait();
      const auto found = cache.find(kKey, "about", counting("bytes", 20));
      wrong += !found || !same(*found->binary, sample());
      compiled += found && found->origin == BinaryOrigin::kCompiled;
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compiles(), 1u);
  EXPECT_EQ(compiled, 1);
  EXPECT_EQ(wrong, 0);
}

// Two contexts of one process share the disk only.
TEST_F(BinaryCacheTest, OneCompileForManyCachesOfOneProcess) {
  std::atomic<int> wrong = 0;
  std::vector<std::thread> threads;
  threads.reserve(8);
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&] {
      const auto found = BinaryCache(disk(), logger_).find(kKey, "about", counting("bytes", 30));
      wrong += !found || !same(*found->binary, sample());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(compiles(), 1u);
  EXPECT_EQ(wrong, 0);
}

TEST_F(BinaryCacheTest, OneCompilePerKeyForManyProcesses) {
  constexpr int kProcesses = 16, kKeys = 5;
  const auto key = [](int which) { return std::string(kKey) + std::to_string(which); };
  EXPECT_EQ(in_processes(kProcesses,
                         [&](int process) {
                           BinaryCache cache(disk(), logger_);
                           int wrong = 0;
                           for (int i = 0; i < kKeys; ++i) {
                             const int which = (i + process) % kKeys;
                             const std::string text = std::to_string(which);
                             const auto found = cache.find(key(which), "about", counting(text, 20));
                             wrong |= !found || !same(*found->binary, sample(text));
                           }
                           return wrong;
                         }),
            0);
  EXPECT_EQ(compiles(), static_cast<std::size_t>(kKeys));
}

// The damaged entry is there when all of them start: each sees it, one replaces it.
TEST_F(BinaryCacheTest, OneCompileForManyProcessesThatFindADamagedEntry) {
  ASSERT_TRUE(BinaryCache(disk(), logger_).find(kKey, "about", counting()));
  fs::resize_file(entry(), fs::file_size(entry()) - 1);
  EXPECT_EQ(in_processes(16,
                         [&](int) {
                           const auto found = BinaryCache(disk(), logger_).find(kKey, "about", counting("bytes", 30));
                           return !found || !same(*found->binary, sample());
                         }),
            0);
  EXPECT_EQ(compiles(), 2u);
}

TEST_F(BinaryCacheTest, AProcessThatDiesWhileItCompilesIsReplaced) {
  const pid_t child = ::fork();
  if (child == 0) {
    (void)BinaryCache(disk(), logger_).find(kKey, "about", counting("bytes", 60000));
    ::_exit(0);
  }
  while (compiles() == 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
  std::thread killer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(50));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
  });
  const auto found = BinaryCache(disk(), logger_).find(kKey, "about", counting());
  killer.join();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->origin, BinaryOrigin::kCompiled);
  EXPECT_EQ(names(found->phases), (std::vector<std::string>{"wait_for_process", "compile", "disk_write"}));
  EXPECT_EQ(compiles(), 2u);
}

TEST_F(BinaryCacheTest, PatienceWithAnotherProcessEnds) {
  DiskCache::KeyLock lock = disk().lock(kKey);
  ASSERT_EQ(lock.try_acquire(), DiskCache::KeyLock::State::kHeld);
  const auto start = std::chrono::steady_clock::now();
  const auto found = BinaryCache(disk(), logger_, std::chrono::milliseconds(60)).find(kKey, "about", counting());
  const auto waited = std::chrono::steady_clock::now() - start;
  ASSERT_TRUE(found);
  EXPECT_EQ(found->origin, BinaryOrigin::kCompiled);
  EXPECT_GE(waited, std::chrono::milliseconds(60));
  EXPECT_LT(waited, std::chrono::seconds(20));
  EXPECT_TRUE(fs::exists(entry()));
}

// What the holder stores is taken at once, not when it lets go.
TEST_F(BinaryCacheTest, AnEntryThatAppearsEndsTheWait) {
  DiskCache::KeyLock lock = disk().lock(kKey);
  ASSERT_EQ(lock.try_acquire(), DiskCache::KeyLock::State::kHeld);
  std::thread writer([&] {
    std::this_thread::sleep_for(std::chrono::milliseconds(30));
    disk().put(kKey, bytes_of(sample("another")));
  });
  const auto start = std::chrono::steady_clock::now();
  const auto found = BinaryCache(disk(), logger_).find(kKey, "about", counting());
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(20)) << "it waited for the lock";
  writer.join();
  ASSERT_TRUE(found);
  EXPECT_EQ(found->origin, BinaryOrigin::kDisk);
  EXPECT_EQ(names(found->phases), (std::vector<std::string>{"wait_for_process"}));
  EXPECT_TRUE(same(*found->binary, sample("another")));
  EXPECT_EQ(compiles(), 0u);
}

}  // namespace
}  // namespace attnjit::runtime
