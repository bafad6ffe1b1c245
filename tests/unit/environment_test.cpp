// The cache's environment variables: what decides the directory, and what is refused.
#include "runtime/environment.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>

namespace attnjit::runtime {
namespace {

namespace fs = std::filesystem;
using testing::HasSubstr;

// A variable's value for the time of a test; nothing: not set.
class Variable {
 public:
  Variable(const char* name, const std::optional<std::string>& value) : name_(name) {
    if (const char* old = std::getenv(name)) old_ = old;
    set(value);
  }
  Variable(Variable&&) = delete;
  ~Variable() { set(old_); }

 private:
  void set(const std::optional<std::string>& value) {
    if (value) {
      ::setenv(name_, value->c_str(), 1);
    } else {
      ::unsetenv(name_);
    }
  }
  const char* name_;
  std::optional<std::string> old_;
};

class EnvironmentTest : public testing::Test {
 protected:
  const std::string home_ = fs::temp_directory_path() / ("attnjit-home-" + std::to_string(::getpid()));
  void SetUp() override { fs::create_directory(home_); }
  void TearDown() override { fs::remove_all(home_); }

  Variable home{"HOME", home_}, xdg{"XDG_CACHE_HOME", {}}, directory{"ATTNJIT_CACHE_DIR", {}},
      disable{"ATTNJIT_DISABLE_CACHE", {}}, max{"ATTNJIT_CACHE_MAX_BYTES", {}}, nvrtc{"ATTNJIT_NVRTC", {}},
      cublas{"ATTNJIT_CUBLAS", {}};
};

TEST_F(EnvironmentTest, CacheDirectory) {
  EXPECT_EQ(read_environment()->cache_dir, home_ + "/.cache/attnjit");
  EXPECT_EQ(read_environment()->cache_max_bytes, std::uint64_t{1} << 30);
  {
    const Variable relative("XDG_CACHE_HOME", "relative");
    EXPECT_EQ(read_environment()->cache_dir, home_ + "/.cache/attnjit") << "the specification has it ignored";
  }
  const Variable xdg_set("XDG_CACHE_HOME", "/var/xdg");
  EXPECT_EQ(read_environment()->cache_dir, "/var/xdg/attnjit");
  {
    const Variable own("ATTNJIT_CACHE_DIR", "/var/own");
    EXPECT_EQ(read_environment()->cache_dir, "/var/own");
  }
  const Variable own("ATTNJIT_CACHE_DIR", "below/here");
  EXPECT_EQ(read_environment()->cache_dir, fs::current_path() / "below/here");
  EXPECT_FALSE(fs::exists(home_ + "/.cache")) << "reading creates nothing";
}

TEST_F(EnvironmentTest, WithoutAHomeOfTheUsersOwn) {
  // "/" may be root's: then another user's is asked for. Both end at the passwd entry, or without a cache.
  for (const std::optional<std::string>& value : {std::optional<std::string>(), std::optional<std::string>("relative"),
                                                  std::optional<std::string>("/nonexistent/home")}) {
    const Variable none("HOME", value);
    const Result<Environment> environment = read_environment();
    ASSERT_TRUE(environment);
    EXPECT_THAT(environment->cache_dir.string(), testing::Not(HasSubstr("relative")));
    EXPECT_EQ(environment->cache_dir.empty(), !environment->cache_off.empty());
    EXPECT_TRUE(environment->cache_dir.empty() || environment->cache_dir.is_absolute());
  }
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a directory away";
  ASSERT_EQ(::chown(home_.c_str(), 12345, 12345), 0);
  EXPECT_THAT(read_environment()->cache_dir.string(), testing::Not(HasSubstr(home_))) << "a home kept by sudo";
}

TEST_F(EnvironmentTest, DisabledAndBounded) {
  {
    const Variable off("ATTNJIT_DISABLE_CACHE", "1");
    EXPECT_TRUE(read_environment()->cache_dir.empty());
    EXPECT_THAT(read_environment()->cache_off, HasSubstr("ATTNJIT_DISABLE_CACHE"));
  }
  {
    const Variable on("ATTNJIT_DISABLE_CACHE", "0"), bytes("ATTNJIT_CACHE_MAX_BYTES", "12345678901");
    EXPECT_FALSE(read_environment()->cache_dir.empty());
    EXPECT_EQ(read_environment()->cache_max_bytes, 12345678901u);
  }
  for (const auto& [name, value] : {std::pair{"ATTNJIT_DISABLE_CACHE", "yes"},
                                    {"ATTNJIT_CACHE_MAX_BYTES", "1G"},
                                    {"ATTNJIT_CACHE_MAX_BYTES", "-1"},
                                    {"ATTNJIT_CACHE_MAX_BYTES", "99999999999999999999"}}) {
    const Variable bad(name, value);
    const Result<Environment> environment = read_environment();
    ASSERT_FALSE(environment) << name << " " << value;
    EXPECT_EQ(environment.failure().status, ATTNJIT_ENVIRONMENT);
    EXPECT_THAT(environment.failure().message, HasSubstr(name));
    EXPECT_THAT(environment.failure().message, HasSubstr(value));
  }
}

TEST_F(EnvironmentTest, Libraries) {
  EXPECT_EQ(read_environment()->nvrtc, "");
  const Variable set("ATTNJIT_NVRTC", "/opt/libnvrtc.so.13");
  EXPECT_EQ(read_environment()->nvrtc, "/opt/libnvrtc.so.13");
  EXPECT_EQ(read_environment()->cublas, "");
  const Variable set_cublas("ATTNJIT_CUBLAS", "/opt/libcublas.so.13");
  EXPECT_EQ(read_environment()->cublas, "/opt/libcublas.so.13");
}

}  // namespace
}  // namespace attnjit::runtime
