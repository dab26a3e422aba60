#include "base/file.h"

#include <gtest/gtest.h>
#include <unistd.h>
#include <sys/stat.h>

#include <cstring>

#include "base/error.h"
#include "tests/temp_folder.h"

namespace kda::test {
namespace {

TEST(ReadFile, WholeFilesAndPipes) {
  TempFolder folder;
  const std::string bytes = std::string("a\0b\r\n\xff", 6) + std::string(200'000, 'x');
  write_bytes(folder / "x", bytes);
  EXPECT_EQ(read_file(folder / "x"), bytes);
  EXPECT_THROW(read_file(folder / "x", bytes.size() - 1), Error);
  EXPECT_EQ(read_file(folder / "x", bytes.size()), bytes);
  write_bytes(folder / "empty", "");
  EXPECT_EQ(read_file(folder / "empty"), "");
  EXPECT_NE(read_file("/proc/self/status").find("Name:"), std::string::npos);  // says it is 0 bytes long
}

TEST(ReadFile, SaysWhatIsWrong) {
  TempFolder folder;
  for (const auto& p : {folder / "none", folder.path()}) {
    try {
      read_file(p);
      ADD_FAILURE() << p;
    } catch (const Error& e) {
      EXPECT_NE(std::string(e.what()).find(p.string()), std::string::npos) << e.what();
    }
    EXPECT_THROW(MappedFile::open(p), Error);
  }
}

TEST(PathExists, NeverThrows) {
  TempFolder folder;
  EXPECT_TRUE(path_exists(folder.path()));
  EXPECT_TRUE(is_folder(folder.path()));
  EXPECT_FALSE(path_exists(folder / "x"));
  EXPECT_FALSE(path_exists(std::string(10'000, 'x')));
  EXPECT_FALSE(is_folder(""));
}

TEST(MappedFile, ShowsTheFile) {
  TempFolder folder;
  write_bytes(folder / "x", "hello");
  const auto m = MappedFile::open(folder / "x");
  ASSERT_EQ(m->size(), 5u);
  EXPECT_EQ(std::memcmp(m->data(), "hello", 5), 0);
  write_bytes(folder / "empty", "");
  EXPECT_EQ(MappedFile::open(folder / "empty")->size(), 0u);
}

TEST(AtomicFile, AppearsWholeOrNotAtAll) {
  TempFolder folder;
  write_bytes(folder / "x", "old");
  {
    AtomicFile f(folder / "x");
    f.write("new");
    EXPECT_EQ(read_bytes(folder / "x"), "old");
    EXPECT_EQ(folder.names().size(), 2u);
  }  // without commit
  EXPECT_EQ(read_bytes(folder / "x"), "old");
  EXPECT_EQ(folder.names().size(), 1u);
  AtomicFile f(folder / "x");
  f.write("ne");
  f.write("w");
  f.commit();
  EXPECT_EQ(read_bytes(folder / "x"), "new");
  EXPECT_EQ(folder.names().size(), 1u);
}

TEST(AtomicFile, TwoWritersDoNotMix) {
  TempFolder folder;
  AtomicFile a(folder / "x"), b(folder / "x");
  a.write("aaaa");
  b.write("bb");
  b.commit();
  EXPECT_EQ(read_bytes(folder / "x"), "bb");
  a.commit();
  EXPECT_EQ(read_bytes(folder / "x"), "aaaa");
}

TEST(AtomicFile, NeedsAFolder) {
  TempFolder folder;
  EXPECT_THROW(AtomicFile(folder / "none/x"), Error);
}

TEST(AtomicFile, FollowsLinksKeepsPermissionsWritesToDevices) {
  namespace fs = std::filesystem;
  const fs::path folder = fs::path(testing::TempDir()) / cat("kda_atomic_", ::getpid());
  fs::create_directories(folder);
  const auto write = [](const fs::path& p, std::string_view text) {
    AtomicFile f(p);
    f.write(text);
    f.commit();
  };
  write(folder / "real", "old");
  fs::permissions(folder / "real", fs::perms::owner_read | fs::perms::owner_write);
  fs::create_symlink("real", folder / "link");
  write(folder / "link", "new");
  EXPECT_TRUE(fs::is_symlink(folder / "link"));
  EXPECT_EQ(read_file(folder / "real"), "new");
  EXPECT_EQ(fs::status(folder / "real").permissions(), fs::perms::owner_read | fs::perms::owner_write);
  write("/dev/null", "gone");
  EXPECT_TRUE(fs::is_character_file("/dev/null"));
  EXPECT_THROW(AtomicFile{folder}, Error);
  fs::remove_all(folder);
}

}  // namespace
}  // namespace kda::test
