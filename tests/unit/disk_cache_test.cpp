// The disk cache against everything that may happen to its files: damage, other processes, full and read-only disks,
// strangers. Also built by itself under ThreadSanitizer.
#include "runtime/disk_cache.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/mount.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <chrono>
#include <csignal>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <iterator>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "tests/support/temporary_directory.h"

namespace attnjit::runtime {
namespace {

namespace fs = std::filesystem;
using State = DiskCache::KeyLock::State;

constexpr std::uint64_t kPlenty = std::uint64_t{1} << 30;
constexpr const char* kKey = "0123456789abcdef0123456789abcdef";

class DiskCacheTest : public testing::Test {
 protected:
  void TearDown() override { ::chmod(directory().c_str(), 0700); }

  fs::path directory() const { return root_ / "cache"; }
  fs::path entry(const std::string& key = kKey) const { return directory() / (key + ".attnjit"); }
  DiskCache cache(std::uint64_t max_bytes = kPlenty) const { return {directory(), max_bytes}; }

  static std::string read(const fs::path& path) {
    std::ifstream file(path, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  // In place: what a damaged disk or another program would do to an entry.
  static void write(const fs::path& path, const std::string& data) {
    std::ofstream(path, std::ios::binary | std::ios::trunc) << data;
  }
  // One byte of the entry, where it stands.
  void overwrite(std::size_t place, int byte) const {
    std::fstream file(entry(), std::ios::binary | std::ios::in | std::ios::out);
    file.seekp(static_cast<std::streamoff>(place)).put(static_cast<char>(byte));
  }
  static void set_age(const fs::path& path, std::chrono::seconds age) {
    fs::last_write_time(path, fs::file_time_type::clock::now() - age);
  }
  static std::chrono::seconds age(const fs::path& path) {
    return std::chrono::duration_cast<std::chrono::seconds>(fs::file_time_type::clock::now() -
                                                            fs::last_write_time(path));
  }
  std::set<std::string> names() const {
    std::set<std::string> found;
    for (const auto& row : fs::directory_iterator(directory())) found.insert(row.path().filename().string());
    return found;
  }

  const test::TemporaryDirectory temporary_;
  const fs::path root_ = temporary_.path();
};

std::string sample(std::size_t size, unsigned seed = 1) {
  std::string bytes(size, '\0');
  for (char& byte : bytes) byte = static_cast<char>((seed = seed * 1664525 + 1013904223) >> 24);
  return bytes;
}

// Runs `body` in a process of its own; its exit code, or 128 + a signal.
int in_child(const std::function<int()>& body) {
  const pid_t child = ::fork();
  if (child == 0) ::_exit(body());
  int status = 0;
  ::waitpid(child, &status, 0);
  return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

// ---- What is put is got

TEST_F(DiskCacheTest, PutAndGet) {
  const DiskCache a = cache();
  EXPECT_TRUE(a.enabled()) << a.reason();
  EXPECT_FALSE(fs::exists(directory())) << "made before anything is stored";
  EXPECT_EQ(a.get(kKey), std::nullopt);
  for (const std::size_t size : {0u, 1u, 100u, 100000u}) {
    std::string why;
    ASSERT_TRUE(a.put(kKey, sample(size), &why)) << why;
    EXPECT_EQ(a.get(kKey), sample(size));
    EXPECT_EQ(cache().get(kKey), sample(size));
  }
  EXPECT_EQ(a.get("00"), std::nullopt);
  EXPECT_EQ(fs::status(directory()).permissions(), fs::perms::owner_all);
  EXPECT_EQ(fs::status(entry()).permissions(), fs::perms::owner_read | fs::perms::owner_write);
  EXPECT_EQ(names(), (std::set<std::string>{std::string(kKey) + ".attnjit"})) << "something was left behind";
}

TEST_F(DiskCacheTest, MakesMissingParentsForTheUserAlone) {
  const DiskCache deep(root_ / "a" / "b" / "c/", kPlenty);
  ASSERT_TRUE(deep.put(kKey, "payload"));
  EXPECT_EQ(deep.get(kKey), "payload");
  EXPECT_EQ(fs::status(root_ / "a").permissions(), fs::perms::owner_all);
}

TEST_F(DiskCacheTest, KeysThatAreNoDigitsAreRefused) {
  const DiskCache a = cache();
  const std::string long_key(129, 'a');
  for (const std::string& key :
       {std::string(), std::string("../escape"), std::string("a/b"), std::string("/tmp/a"), std::string("A0"),
        std::string("g"), std::string("a b"), std::string("a\0b", 3), std::string("."), std::string("a\n"), long_key}) {
    std::string why;
    EXPECT_FALSE(a.put(key, "payload", &why)) << key;
    EXPECT_NE(why.find("digits"), std::string::npos) << why;
    EXPECT_EQ(a.get(key), std::nullopt) << key;
    EXPECT_FALSE(a.remove(key)) << key;
  }
  EXPECT_TRUE(a.put(std::string(128, 'a'), "payload"));
  EXPECT_EQ(a.get(std::string(128, 'a')), "payload");
  EXPECT_EQ(names().size(), 1u);
}

TEST_F(DiskCacheTest, SwitchedOff) {
  const DiskCache off("", kPlenty, "no reason");
  EXPECT_FALSE(off.enabled());
  EXPECT_EQ(off.reason(), "no reason");
  std::string why;
  EXPECT_FALSE(off.put(kKey, "payload", &why));
  EXPECT_EQ(why, "no reason");
  EXPECT_EQ(off.get(kKey), std::nullopt);
  EXPECT_EQ(off.lock(kKey).try_acquire(), State::kUnavailable);
  EXPECT_TRUE(off.list(true).empty());
  EXPECT_EQ(off.clear(), 0u);
}

// A change of the format needs another version, or old entries are taken for damaged ones and new ones by old readers.
TEST_F(DiskCacheTest, TheFormatIsFixed) {
  ASSERT_TRUE(cache().put("ab12", "payload"));
  const unsigned char expected[] = {'a',  't',  't',  'n',  'j',  'i',  't',  0,    1,    0,    0,    0,    4,
                                    0,    0,    0,    7,    0,    0,    0,    0,    0,    0,    0,    0xea, 0x57,
                                    0x67, 0x56, 0x6d, 0x81, 0xe9, 0x7b, 0x36, 0x6d, 0x1f, 0xcf, 0x70, 0x08, 0x37,
                                    0x65, 'a',  'b',  '1',  '2',  'p',  'a',  'y',  'l',  'o',  'a',  'd'};
  EXPECT_EQ(read(entry("ab12")), std::string(std::begin(expected), std::end(expected)));
}

// ---- Damage

TEST_F(DiskCacheTest, EveryFlippedByteAndEveryCutIsAMiss) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, sample(300)));
  const std::string good = read(entry());
  ASSERT_EQ(good.size(), 40 + std::string(kKey).size() + 300);
  for (std::size_t i = 0; i < good.size(); ++i) {
    for (const int bits : {0x01, 0x80, 0xff}) {
      overwrite(i, good[i] ^ bits);
      ASSERT_EQ(a.get(kKey), std::nullopt) << "byte " << i;
    }
    overwrite(i, good[i]);
  }
  ASSERT_EQ(a.get(kKey), sample(300)) << "the test's own writing is at fault";
  fs::resize_file(entry(), good.size() + 1);
  EXPECT_EQ(a.get(kKey), std::nullopt) << "grown";
  std::string zeroed = good;
  for (std::size_t i = good.size(); i-- > 0;) {
    fs::resize_file(entry(), i);
    ASSERT_EQ(a.get(kKey), std::nullopt) << "cut at " << i;
    zeroed[i] = '\0';
    fs::resize_file(entry(), good.size());
    if (zeroed != good) {
      ASSERT_EQ(a.get(kKey), std::nullopt) << "zeros from " << i;
    }
  }
}

TEST_F(DiskCacheTest, SampledDamageOfALargeEntryIsAMiss) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, sample(100000)));
  const std::string good = read(entry());
  for (std::size_t i = 0; i < good.size(); i += 499) {
    overwrite(i, good[i] ^ (1 << (i % 8)));
    ASSERT_EQ(a.get(kKey), std::nullopt) << "byte " << i;
    overwrite(i, good[i]);
  }
  ASSERT_EQ(a.get(kKey), sample(100000)) << "the test's own writing is at fault";
  for (std::size_t size = good.size(); size > 499; size -= 499) {
    fs::resize_file(entry(), size - 1);
    ASSERT_EQ(a.get(kKey), std::nullopt) << "cut at " << size - 1;
  }
}

TEST_F(DiskCacheTest, ADamagedEntryIsReplaced) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, "payload"));
  write(entry(), "damaged");
  EXPECT_EQ(a.get(kKey), std::nullopt);
  EXPECT_TRUE(a.put(kKey, "payload"));
  EXPECT_EQ(a.get(kKey), "payload");
}

TEST_F(DiskCacheTest, AnEntryUnderAnotherKeysNameIsAMiss) {
  const DiskCache a = cache();
  const std::string other(32, 'e');
  ASSERT_TRUE(a.put(kKey, "payload"));
  fs::copy_file(entry(), entry(other));
  ::chmod(entry(other).c_str(), 0600);
  EXPECT_EQ(a.get(other), std::nullopt);
  // Of another length, so that what is a key and what a payload could be mistaken.
  fs::copy_file(entry(), entry("ee"));
  ::chmod(entry("ee").c_str(), 0600);
  EXPECT_EQ(a.get("ee"), std::nullopt);
}

TEST_F(DiskCacheTest, WhatIsNoFileIsAMiss) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, "payload"));
  const std::string good = read(entry());

  // A link, even to a good entry; put replaces the link and leaves what it points to.
  fs::rename(entry(), root_ / "elsewhere");
  fs::create_symlink(root_ / "elsewhere", entry());
  EXPECT_EQ(a.get(kKey), std::nullopt);
  EXPECT_TRUE(a.put(kKey, "another"));
  EXPECT_EQ(a.get(kKey), "another");
  EXPECT_EQ(read(root_ / "elsewhere"), good);
  EXPECT_FALSE(fs::is_symlink(entry()));

  // A pipe would hold up a reader for ever.
  fs::remove(entry());
  ASSERT_EQ(::mkfifo(entry().c_str(), 0600), 0);
  EXPECT_EQ(a.get(kKey), std::nullopt);
  EXPECT_TRUE(a.put(kKey, "another"));
  EXPECT_EQ(a.get(kKey), "another");

  // A directory cannot be replaced: nothing is stored, nothing else happens.
  fs::remove(entry());
  fs::create_directory(entry());
  EXPECT_EQ(a.get(kKey), std::nullopt);
  EXPECT_FALSE(a.put(kKey, "payload"));
  EXPECT_TRUE(a.list(true).empty());
  EXPECT_EQ(a.clear(), 0u);
  EXPECT_EQ(names(), (std::set<std::string>{std::string(kKey) + ".attnjit"}));
}

TEST_F(DiskCacheTest, AnEntryThatOthersMayWriteIsAMiss) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, "payload"));
  for (const mode_t mode : {0620, 0602, 0666}) {
    ASSERT_EQ(::chmod(entry().c_str(), mode), 0);
    EXPECT_EQ(a.get(kKey), std::nullopt) << mode;
  }
  ASSERT_EQ(::chmod(entry().c_str(), 0644), 0);
  EXPECT_EQ(a.get(kKey), "payload");
}

// ---- Whose directory

TEST_F(DiskCacheTest, ADirectoryThatOthersMayWriteToIsRefused) {
  fs::create_directory(directory());
  for (const mode_t mode : {0720, 0702, 0777, 01777}) {
    ASSERT_EQ(::chmod(directory().c_str(), mode), 0);
    const DiskCache a = cache();
    EXPECT_FALSE(a.enabled()) << mode;
    EXPECT_NE(a.reason().find("others may write"), std::string::npos) << a.reason();
    EXPECT_FALSE(a.put(kKey, "payload"));
    EXPECT_EQ(a.get(kKey), std::nullopt);
  }
  EXPECT_TRUE(names().empty());
  ASSERT_EQ(::chmod(directory().c_str(), 0755), 0);
  EXPECT_TRUE(cache().enabled());
}

TEST_F(DiskCacheTest, ADirectoryIsJudgedAnewEachTime) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, "payload"));
  ASSERT_EQ(::chmod(directory().c_str(), 0770), 0);
  EXPECT_EQ(a.get(kKey), std::nullopt);
  EXPECT_FALSE(a.put(kKey, "payload"));
  EXPECT_FALSE(a.remove(kKey));
  EXPECT_EQ(a.clear(), 0u);
  ASSERT_EQ(::chmod(directory().c_str(), 0700), 0);
  EXPECT_EQ(a.get(kKey), "payload");
  // Removed altogether, it comes back.
  fs::remove_all(directory());
  EXPECT_EQ(a.get(kKey), std::nullopt);
  EXPECT_TRUE(a.put(kKey, "payload"));
  EXPECT_EQ(a.get(kKey), "payload");
}

TEST_F(DiskCacheTest, ALinkToADirectoryIsJudgedByWhereItLeads) {
  const fs::path target = root_ / "target";
  fs::create_directory(target);
  fs::create_directory_symlink(target, directory());
  ASSERT_EQ(::chmod(target.c_str(), 0700), 0);
  EXPECT_TRUE(cache().put(kKey, "payload"));
  EXPECT_TRUE(fs::exists(target / (std::string(kKey) + ".attnjit")));
  ASSERT_EQ(::chmod(target.c_str(), 0777), 0);
  EXPECT_FALSE(cache().enabled());
  EXPECT_NE(cache().reason().find("others may write"), std::string::npos) << cache().reason();
  ::chmod(target.c_str(), 0700);
  // To nowhere.
  fs::remove_all(target);
  std::string why;
  EXPECT_FALSE(cache().put(kKey, "payload", &why));
  EXPECT_FALSE(why.empty());
  fs::remove(directory());
}

TEST_F(DiskCacheTest, SomebodyElsesDirectoryIsRefused) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  constexpr uid_t kStranger = 12345;
  fs::create_directory(directory());
  ASSERT_EQ(::chmod(directory().c_str(), 0700), 0);
  ASSERT_EQ(::chown(directory().c_str(), kStranger, kStranger), 0);
  EXPECT_FALSE(cache().enabled());
  EXPECT_NE(cache().reason().find("belongs to user 12345"), std::string::npos) << cache().reason();
  EXPECT_FALSE(cache().put(kKey, "payload"));
  EXPECT_TRUE(names().empty());

  // Through a link of ours to it, and through a link of theirs to ours.
  fs::create_directory_symlink(directory(), root_ / "ours");
  EXPECT_FALSE(DiskCache(root_ / "ours", kPlenty).enabled());
  fs::create_directory(root_ / "mine");
  ASSERT_EQ(::chmod((root_ / "mine").c_str(), 0700), 0);
  fs::create_directory_symlink(root_ / "mine", root_ / "theirs");
  ASSERT_EQ(::lchown((root_ / "theirs").c_str(), kStranger, kStranger), 0);
  const DiskCache led(root_ / "theirs", kPlenty);
  EXPECT_NE(led.reason().find("symbolic link of user 12345"), std::string::npos) << led.reason();

  // An entry of somebody else in our directory.
  const DiskCache mine(root_ / "mine", kPlenty);
  ASSERT_TRUE(mine.put(kKey, "payload"));
  ASSERT_EQ(::chown((root_ / "mine" / (std::string(kKey) + ".attnjit")).c_str(), kStranger, kStranger), 0);
  EXPECT_EQ(mine.get(kKey), std::nullopt);
}

TEST_F(DiskCacheTest, ADirectoryThatIsAFileIsRefused) {
  write(directory(), "a file");
  EXPECT_FALSE(cache().enabled());
  EXPECT_NE(cache().reason().find("Not a directory"), std::string::npos) << cache().reason();
  EXPECT_FALSE(DiskCache(directory() / "below", kPlenty).put(kKey, "payload"));
}

// ---- Disks that refuse

// Root may write anywhere: the child becomes another user first.
TEST_F(DiskCacheTest, AReadOnlyDirectoryStillServes) {
  constexpr uid_t kUser = 12345;
  const bool root = ::geteuid() == 0;
  ASSERT_TRUE(cache().put(kKey, "payload"));
  set_age(entry(), std::chrono::hours(1));
  if (root) {
    ASSERT_EQ(::chmod(root_.c_str(), 0755), 0);
    for (const fs::path& path : {directory(), entry()}) ASSERT_EQ(::chown(path.c_str(), kUser, kUser), 0);
  }
  ASSERT_EQ(::chmod(directory().c_str(), 0500), 0);
  EXPECT_EQ(in_child([&] {
              if (root && ::setresuid(kUser, kUser, kUser) != 0) return 9;
              const DiskCache a = cache();
              if (!a.enabled()) return 1;
              if (a.get(kKey) != "payload") return 2;
              if (a.put("ab", "payload")) return 3;
              if (a.get("ab")) return 4;
              if (a.lock(kKey).try_acquire() != State::kUnavailable) return 5;
              if (std::string why; a.clear(&why) != 0 || why.find("Permission denied") == std::string::npos) return 6;
              return 0;
            }),
            0);
}

TEST_F(DiskCacheTest, AFullDiskStoresNothingAndLeavesNothing) {
  fs::create_directory(directory());
  const int code = in_child([&] {
    const uid_t user = ::geteuid();
    if (::unshare(CLONE_NEWNS | (user == 0 ? 0 : CLONE_NEWUSER)) != 0) return 77;
    ::mount(nullptr, "/", nullptr, MS_REC | MS_PRIVATE, nullptr);
    if (::mount("attnjit", directory().c_str(), "tmpfs", 0, "size=256k,mode=700") != 0) return 77;
    const DiskCache a = cache();
    if (!a.put("aa", sample(100000))) return 1;
    std::string why;
    if (a.put("bb", sample(200000), &why)) return 2;
    if (why.find("No space left") == std::string::npos) return 3;
    if (a.get("bb") || a.get("aa") != sample(100000)) return 4;
    if (names() != std::set<std::string>{"aa.attnjit"}) return 5;
    // An entry that cannot be replaced stays as it is.
    if (a.put("aa", sample(200000))) return 6;
    if (a.get("aa") != sample(100000)) return 7;
    return 0;
  });
  if (code == 77) GTEST_SKIP() << "no file system may be mounted here";
  EXPECT_EQ(code, 0);
}

TEST_F(DiskCacheTest, ALimitOfFileSizesEndsNoProcess) {
  EXPECT_EQ(in_child([&] {
              const rlimit limit{.rlim_cur = 4096, .rlim_max = 4096};
              if (::setrlimit(RLIMIT_FSIZE, &limit) != 0) return 9;
              const DiskCache a = cache();
              if (!a.put("aa", sample(1000))) return 1;
              if (a.put("bb", sample(5000))) return 2;
              return a.get("aa") == sample(1000) && !a.get("bb") ? 0 : 3;
            }),
            0);
}

TEST_F(DiskCacheTest, NoFileDescriptorsLeft) {
  ASSERT_TRUE(cache().put(kKey, "payload"));
  EXPECT_EQ(in_child([&] {
              const DiskCache a = cache();
              const rlimit limit{.rlim_cur = 64, .rlim_max = 64};
              if (::setrlimit(RLIMIT_NOFILE, &limit) != 0) return 9;
              while (::open("/dev/null", O_RDONLY) >= 0) {
              }
              if (a.get(kKey) || a.put("aa", "payload") || !a.list(true).empty() || a.clear() != 0) return 1;
              if (a.lock(kKey).try_acquire() != State::kUnavailable) return 2;
              // One is enough for the directory, and not for a file in it.
              ::close(20);
              if (a.get(kKey) || a.put("aa", "payload")) return 3;
              ::close(21);
              return a.get(kKey) == "payload" ? 0 : 4;
            }),
            0);
}

// ---- Size

TEST_F(DiskCacheTest, TheLeastRecentlyUsedGoesFirst) {
  // 1,000 bytes each with header and key.
  const auto put = [](const DiskCache& a, const std::string& key) {
    return a.put(key, sample(1000 - 40 - key.size()));
  };
  const DiskCache a = cache(3000);
  for (const char* key : {"aa", "bb", "cc"}) ASSERT_TRUE(put(a, key));
  set_age(entry("aa"), std::chrono::minutes(30));
  set_age(entry("bb"), std::chrono::minutes(20));
  set_age(entry("cc"), std::chrono::minutes(10));
  EXPECT_TRUE(a.get("aa"));  // bb is the oldest now
  ASSERT_TRUE(put(a, "dd"));
  EXPECT_FALSE(a.get("bb"));
  for (const char* key : {"aa", "cc", "dd"}) EXPECT_TRUE(a.get(key)) << key;

  const std::vector<DiskCache::Entry> list = a.list(false);
  ASSERT_EQ(list.size(), 3u);
  for (const DiskCache::Entry& row : list) EXPECT_EQ(row.bytes, 1000u);

  // A smaller limit, as by another process's setting; what was just stored stays.
  ASSERT_TRUE(put(cache(1000), "ee"));
  EXPECT_EQ(names(), (std::set<std::string>{"ee.attnjit"}));
  std::string why;
  EXPECT_FALSE(cache(999).put("ff", sample(958), &why));
  EXPECT_NE(why.find("more than the cache holds"), std::string::npos) << why;
  EXPECT_TRUE(cache(1000).get("ee"));
}

TEST_F(DiskCacheTest, AUseIsRecordedButNotEveryTime) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, "payload"));
  set_age(entry(), std::chrono::hours(5));
  ASSERT_TRUE(a.get(kKey));
  EXPECT_LT(age(entry()), std::chrono::seconds(30));
  set_age(entry(), std::chrono::seconds(40));
  ASSERT_TRUE(a.get(kKey));
  EXPECT_GE(age(entry()), std::chrono::seconds(40)) << "a write to the disk for every read";
  // A clock that was set back.
  set_age(entry(), -std::chrono::hours(1000));
  ASSERT_TRUE(a.get(kKey));
  EXPECT_GE(age(entry()), std::chrono::seconds(0));
  // To list or verify is no use.
  set_age(entry(), std::chrono::hours(5));
  ASSERT_EQ(a.list(true).size(), 1u);
  EXPECT_EQ(a.peek(kKey), "payload");
  EXPECT_GE(age(entry()), std::chrono::hours(4));
}

TEST_F(DiskCacheTest, FilesOfDeadWritersAreSwept) {
  const DiskCache a = cache();
  ASSERT_TRUE(a.put(kKey, "payload"));
  write(directory() / "tmp-old", "left behind");
  write(directory() / "tmp-new", "being written");
  write(directory() / "notes.txt", "not ours");
  set_age(directory() / "tmp-old", std::chrono::hours(1));
  set_age(directory() / "notes.txt", std::chrono::hours(1000));
  ASSERT_TRUE(a.put("aa", "payload"));
  EXPECT_EQ(names(), (std::set<std::string>{std::string(kKey) + ".attnjit", "aa.attnjit", "notes.txt", "tmp-new"}));
  EXPECT_EQ(a.clear(), 2u);
  EXPECT_EQ(names(), (std::set<std::string>{"notes.txt"}));
  EXPECT_EQ(a.get(kKey), std::nullopt);
}

TEST_F(DiskCacheTest, AKilledWriterLeavesNoEntry) {
  // Killed at some moment of its writing, again and again: what is there is whole.
  for (int round = 0; round < 20; ++round) {
    const pid_t child = ::fork();
    if (child == 0) {
      for (;;) cache().put(kKey, sample(200000, 7));
    }
    std::this_thread::sleep_for(std::chrono::microseconds(500 * round));
    ::kill(child, SIGKILL);
    ::waitpid(child, nullptr, 0);
    const std::optional<std::string> found = cache().get(kKey);
    ASSERT_TRUE(!found || *found == sample(200000, 7));
    if (fs::exists(entry())) {
      ASSERT_TRUE(found) << "an entry that is not whole";
    }
  }
}

TEST_F(DiskCacheTest, ListAndVerify) {
  const DiskCache a = cache();
  EXPECT_TRUE(a.list(true).empty());
  for (const char* key : {"aa", "bb", "cc"}) ASSERT_TRUE(a.put(key, sample(100)));
  set_age(entry("cc"), std::chrono::minutes(30));
  set_age(entry("aa"), std::chrono::minutes(20));
  set_age(entry("bb"), std::chrono::minutes(10));
  std::string bad = read(entry("aa"));
  bad[90] ^= 1;
  write(entry("aa"), bad);
  set_age(entry("aa"), std::chrono::minutes(20));
  const std::vector<DiskCache::Entry> list = a.list(true);
  ASSERT_EQ(list.size(), 3u);
  EXPECT_EQ(list[0].key, "cc");
  EXPECT_EQ(list[1].key, "aa");
  EXPECT_EQ(list[2].key, "bb");
  EXPECT_TRUE(list[0].valid);
  EXPECT_FALSE(list[1].valid);
  EXPECT_TRUE(list[2].valid);
  EXPECT_FALSE(a.list(false)[0].valid) << "not verified";
  EXPECT_TRUE(a.remove("aa"));
  EXPECT_FALSE(a.remove("aa"));
  EXPECT_EQ(a.list(false).size(), 2u);
}

// ---- Several at once

TEST_F(DiskCacheTest, ManyProcessesOneKey) {
  constexpr unsigned kProcesses = 16;
  constexpr int kRounds = 30;
  const auto payload = [](unsigned which) { return sample(5000 + 1000 * which, which); };
  std::set<std::string> allowed;
  for (unsigned i = 0; i < kProcesses; ++i) allowed.insert(payload(i));
  std::vector<pid_t> children;
  for (unsigned i = 0; i < kProcesses; ++i) {
    const pid_t child = ::fork();
    if (child == 0) {
      const DiskCache a = cache();
      int wrong = 0;
      for (int round = 0; round < kRounds; ++round) {
        if (!a.put(kKey, payload(i))) wrong |= 1;
        // Always there once somebody has put it: a replacement leaves no gap.
        const std::optional<std::string> found = a.get(kKey);
        if (!found) wrong |= 2;
        if (found && !allowed.contains(*found)) wrong |= 4;
      }
      ::_exit(wrong);
    }
    children.push_back(child);
  }
  for (const pid_t child : children) {
    int status = 0;
    ::waitpid(child, &status, 0);
    EXPECT_EQ(status, 0);
  }
  EXPECT_EQ(names(), (std::set<std::string>{std::string(kKey) + ".attnjit"}));
}

TEST_F(DiskCacheTest, EntriesThatVanishAreMisses) {
  // Writers beyond the limit, readers, listers and clearers at once.
  std::vector<std::thread> threads;
  threads.reserve(8);
  std::vector<int> wrong(8, 0);
  for (unsigned i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] {
      const DiskCache a = cache(20000);
      for (unsigned round = 0; round < 60; ++round) {
        const unsigned which = (round * 7 + i * 3) % 10;
        const std::string key = "a" + std::to_string(which);
        if (i < 3) a.put(key, sample(4000, which));
        const std::optional<std::string> found = a.get(key);
        if (found && *found != sample(4000, which)) ++wrong[i];
        if (i == 6) a.list(true);
        if (i == 7 && round % 10 == 0) a.clear();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, std::vector<int>(8, 0));
}

TEST_F(DiskCacheTest, LocksExcludeThreadsAndProcesses) {
  const DiskCache a = cache();
  DiskCache::KeyLock first = a.lock(kKey);
  DiskCache::KeyLock second = a.lock(kKey);
  DiskCache::KeyLock other = a.lock("aa");
  EXPECT_EQ(first.try_acquire(), State::kHeld);
  EXPECT_EQ(first.try_acquire(), State::kHeld);
  EXPECT_EQ(second.try_acquire(), State::kBusy);
  EXPECT_EQ(other.try_acquire(), State::kHeld) << "keys do not hinder each other";
  const auto from_outside = [&] { return in_child([&] { return static_cast<int>(a.lock(kKey).try_acquire()); }); };
  EXPECT_EQ(from_outside(), static_cast<int>(State::kBusy));
  first.release();
  EXPECT_EQ(from_outside(), static_cast<int>(State::kHeld));
  EXPECT_EQ(second.try_acquire(), State::kHeld) << "the child's lock outlived it";
  // Entries are not locked.
  EXPECT_TRUE(a.put(kKey, "payload"));
  EXPECT_EQ(a.get(kKey), "payload");
  EXPECT_EQ(a.clear(), 1u);
  EXPECT_EQ(first.try_acquire(), State::kBusy) << "clearing the cache broke the lock";
}

TEST_F(DiskCacheTest, ALockDiesWithItsHolder) {
  const DiskCache a = cache();
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    DiskCache::KeyLock held = a.lock(kKey);
    const char state = held.try_acquire() == State::kHeld;
    if (::write(ready[1], &state, 1) != 1) ::_exit(1);
    ::pause();
  }
  char state = 0;
  ASSERT_EQ(::read(ready[0], &state, 1), 1);
  EXPECT_EQ(state, 1);
  DiskCache::KeyLock lock = a.lock(kKey);
  EXPECT_EQ(lock.try_acquire(), State::kBusy);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
  EXPECT_EQ(lock.try_acquire(), State::kHeld);
  ::close(ready[0]);
  ::close(ready[1]);
}

// A process that is forked while a lock is held shares the open file: it must not keep the lock.
TEST_F(DiskCacheTest, AForkedChildKeepsNoLock) {
  const DiskCache a = cache();
  DiskCache::KeyLock lock = a.lock(kKey);
  ASSERT_EQ(lock.try_acquire(), State::kHeld);
  const pid_t child = ::fork();
  if (child == 0) {
    ::pause();
    ::_exit(0);
  }
  lock.release();
  EXPECT_EQ(a.lock(kKey).try_acquire(), State::kHeld);
  ::kill(child, SIGKILL);
  ::waitpid(child, nullptr, 0);
}

}  // namespace
}  // namespace attnjit::runtime
