// The safetensors reader and writer: what is written reads back, and no wrong file gets through.
#include "bench/safetensors.h"

#include <fmt/format.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>
#include <random>

#include "bench/failure.h"
#include "tests/support/temporary_directory.h"

namespace attnjit::tool {
namespace {

using ::testing::HasSubstr;

// A folder of its own for each test.
class Safetensors : public ::testing::Test {
 protected:
  std::string path(const std::string& name) const { return folder_ / name; }

  std::string write(const std::string& bytes) const {
    std::ofstream(path("in"), std::ios::binary) << bytes;
    return path("in");
  }

  static std::string with_header(const std::string& header, std::size_t data_bytes) {
    std::string bytes(8, '\0');
    const std::uint64_t size = header.size();
    std::memcpy(bytes.data(), &size, 8);
    return bytes + header + std::string(data_bytes, 'x');
  }

  // The message of the refusal; empty if the file was accepted.
  std::string refusal(const std::string& bytes) const {
    try {
      SafetensorsReader reader(write(bytes));
      return "";
    } catch (const Failure& failure) {
      EXPECT_EQ(failure.fault(), Fault::kUser);
      return failure.what();
    }
  }

  const test::TemporaryDirectory temporary_;
  const std::filesystem::path folder_ = temporary_.path();
};

TEST_F(Safetensors, WrittenFileReadsBack) {
  Tensor a(ElementType::kFloat32, {2, 3});
  for (int i = 0; i < 6; ++i) a.set(i, i * 0.5);
  Tensor b(ElementType::kBool, {});
  b.set(0, 1);
  Tensor c(ElementType::kInt64, {0, 4});
  Tensor d(ElementType::kBFloat16, {3});
  for (int i = 0; i < 3; ++i) d.set(i, i - 1.5);
  write_safetensors(path("out"), {{"a", &a}, {"b", &b}, {"c", &c}, {"d", &d}}, {{"score_mod", "score + \"x\""}});

  SafetensorsReader reader(path("out"));
  EXPECT_EQ(reader.entries().size(), 4u);
  EXPECT_EQ(reader.metadata().at("score_mod"), "score + \"x\"");
  const Tensor a2 = reader.read(*reader.find("a"));
  EXPECT_EQ(a2.shape(), (std::vector<std::int64_t>{2, 3}));
  for (int i = 0; i < 6; ++i) EXPECT_EQ(a2.get(i), i * 0.5);
  EXPECT_EQ(reader.read(*reader.find("b")).get(0), 1);
  EXPECT_EQ(reader.read(*reader.find("c")).size(), 0);
  EXPECT_EQ(reader.read(*reader.find("d")).get(2), 0.5);
  EXPECT_EQ(reader.find("e"), nullptr);

  // The format asks that the data begin on 8 bytes.
  std::ifstream file(path("out"), std::ios::binary);
  std::uint64_t header = 0;
  file.read(reinterpret_cast<char*>(&header), 8);
  EXPECT_EQ(header % 8, 0u);
}

TEST_F(Safetensors, AWriteLeavesOneWholeFile) {
  Tensor a(ElementType::kInt8, {4});
  for (int i = 0; i < 4; ++i) a.set(i, i);
  std::ofstream(path("target")) << "old";
  std::filesystem::create_symlink("target", path("link"));
  write_safetensors(path("link"), {{"a", &a}}, {});
  EXPECT_TRUE(std::filesystem::is_symlink(path("link")));
  EXPECT_EQ(SafetensorsReader(path("target")).entries().size(), 1u);
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 2);

  EXPECT_THROW(write_safetensors(path("no/such/folder"), {{"a", &a}}, {}), Failure);
  EXPECT_THROW(write_safetensors("/dev/null", {{"a", &a}}, {}), Failure);
  EXPECT_TRUE(std::filesystem::exists("/dev/null"));
  EXPECT_EQ(std::distance(std::filesystem::directory_iterator(folder_), {}), 2);
}

TEST_F(Safetensors, RefusesWrongFilesAndSaysWhy) {
  const std::string good = R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})";
  EXPECT_EQ(refusal(with_header(good, 8)), "");
  EXPECT_EQ(refusal(with_header(good + "   ", 8)), "");
  EXPECT_EQ(refusal(with_header("{}", 0)), "");

  const auto one = [](const std::string& dtype, const std::string& shape, const std::string& offsets) {
    return fmt::format(R"({{"a":{{"dtype":{},"shape":{},"data_offsets":{}}}}})", dtype, shape, offsets);
  };
  const struct {
    std::string bytes, message;
  } cases[] = {
      {"", "0 bytes"},
      {"1234567", "7 bytes"},
      {std::string(8, '\xff'), "its header claims 18446744073709551615 bytes, but only 0 follow"},
      {with_header(good, 8).substr(0, 20), "but only 12 follow"},
      {with_header("", 0), "not JSON"},
      {with_header("[]", 0), "an array where a JSON object is due"},
      {with_header("3", 0), "a number where a JSON object is due"},
      {with_header(good.substr(0, good.size() - 1), 8), "not JSON"},
      {with_header(good + "{}", 8), "not JSON"},
      {with_header(std::string(100'000, '['), 0), "an array where a JSON object is due"},
      {with_header(R"({"a":)" + std::string(100'000, '['), 0), "'a' is an array"},
      {with_header("{\"\xff\":1}", 0), "not JSON"},
      {with_header(R"({"a":null})", 0), "'a' is null"},
      {with_header(R"({"a":{}})", 0), "'dtype' is missing"},
      {with_header(R"({"a":{"dtype":"F32","shape":[]}})", 0), "'data_offsets' is missing"},
      {with_header(R"({"a":{"dtype":"F32","color":[]}})", 0), "unknown field 'color'"},
      {with_header(R"({"a":{"dtype":"F32","dtype":"F32"}})", 0), "'dtype' appears twice"},
      {with_header(R"({"__metadata__":{"k":1}})", 0), "'k' is a number where a string is due"},
      {with_header(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                   R"("a":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                   2),
       "the name 'a' appears twice"},
      {with_header(one("7", "[2]", "[0,8]"), 8), "'dtype' is a number"},
      {with_header(one("\"F33\"", "[2]", "[0,8]"), 8), "unknown dtype 'F33'"},
      {with_header(one("\"F32\"", "[2.5]", "[0,8]"), 8), "'shape' contains a number that is no unsigned"},
      {with_header(one("\"F32\"", "[-2]", "[0,8]"), 8), "'shape' contains a negative number"},
      {with_header(one("\"F32\"", "[[2]]", "[0,8]"), 8), "'shape' contains an array"},
      {with_header(one("\"F32\"", "[18446744073709551615]", "[0,8]"), 8), "larger than 2^63"},
      {with_header(one("\"F32\"", "[4611686018427387904,4]", "[0,8]"), 8), "takes too many bytes"},
      {with_header(one("\"F32\"", "[4611686018427387904,4,0]", "[0,0]"), 0), "takes too many bytes"},
      {with_header(one("\"F32\"", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8), "more than 8 dimensions"},
      {with_header(one("\"F32\"", "[3]", "[0,8]"), 8), "takes 12 bytes, but its data_offsets span 8"},
      {with_header(one("\"F32\"", "[2]", "[0]"), 8), "not two numbers"},
      {with_header(one("\"F32\"", "[2]", "[0,8,8]"), 8), "more than two numbers"},
      {with_header(one("\"F32\"", "[2]", "[0,8]"), 7), "leave the file's 7 bytes"},
      {with_header(one("\"F32\"", "[2]", "[8,0]"), 8), "leave the file's 8 bytes"},
      {with_header(one("\"F32\"", "[2]", "[0,8]"), 9), "1 bytes at its end belong to no tensor"},
      {with_header(one("\"F32\"", "[2]", "[1,9]"), 9), "there is a hole"},
      {with_header(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]},)"
                   R"("b":{"dtype":"U8","shape":[2],"data_offsets":[1,3]}})",
                   3),
       "tensors overlap"},
  };
  for (const auto& [bytes, message] : cases) EXPECT_THAT(refusal(bytes), HasSubstr(message));
}

TEST_F(Safetensors, RefusesTypesThatTheLibraryDoesNotRead) {
  SafetensorsReader reader(write(with_header(R"({"a":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}})", 8)));
  try {
    reader.read(*reader.find("a"));
    FAIL() << "float64 was read";
  } catch (const Failure& failure) {
    EXPECT_THAT(failure.what(), HasSubstr("float64"));
    EXPECT_THAT(failure.what(), HasSubstr("convert it to float32"));
  }
}

TEST_F(Safetensors, RefusesWhatIsNoFile) {
  EXPECT_THROW(SafetensorsReader(path("missing")), Failure);
  EXPECT_THROW(SafetensorsReader(folder_.string()), Failure);
  EXPECT_THROW(SafetensorsReader("/dev/zero"), Failure);
  ASSERT_EQ(::mkfifo(path("pipe").c_str(), 0600), 0);
  EXPECT_THROW(SafetensorsReader(path("pipe")), Failure);
}

// Whatever a byte is turned into, a file is refused or read, within its bounds (the asan build sees to that).
TEST_F(Safetensors, SurvivesRandomDamage) {
  Tensor a(ElementType::kFloat32, {3, 2}), b(ElementType::kInt16, {});
  for (int i = 0; i < 6; ++i) a.set(i, i);
  b.set(0, 7);
  write_safetensors(path("good"), {{"a", &a}, {"b", &b}}, {{"k", "v"}});
  std::ifstream file(path("good"), std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(file)), {});
  std::mt19937 random(7);
  // In memory: a file system would make this a matter of seconds.
  const int memory = ::memfd_create("damaged", 0);
  ASSERT_GE(memory, 0);
  int refused = 0;
  for (int round = 0; round < 3000; ++round) {
    std::string bytes = good;
    if (round % 5 == 0) bytes.resize(random() % bytes.size());
    for (unsigned i = 0; !bytes.empty() && i < 1 + random() % 3; ++i) {
      bytes[random() % bytes.size()] =
          static_cast<char>(random() % 2 == 0 ? random() : "0123456789[]{},:\"-"[random() % 18]);
    }
    try {
      ASSERT_EQ(::ftruncate(memory, 0), 0);
      ASSERT_EQ(::pwrite(memory, bytes.data(), bytes.size(), 0), static_cast<ssize_t>(bytes.size()));
      SafetensorsReader reader(fmt::format("/proc/self/fd/{}", memory));
      for (const SafetensorsEntry& entry : reader.entries()) (void)reader.read(entry).size();
    } catch (const Failure& failure) {
      ++refused;
      EXPECT_EQ(failure.fault(), Fault::kUser) << failure.what();
    }
  }
  ::close(memory);
  EXPECT_GT(refused, 1000);
}

TEST(InQuotes, ShowsNoControlCharactersAndCutsWholeCharacters) {
  EXPECT_EQ(in_quotes("a\n\x1b[1m"), "'a??[1m'");
  EXPECT_EQ(in_quotes(std::string(59, 'a') + "\xc3\xa9"), "'" + std::string(59, 'a') + "...'");
}

}  // namespace
}  // namespace attnjit::tool
