// Known answers of FIPS 180-4 and its validation vectors.
#include "base/sha256.h"

#include <gtest/gtest.h>

namespace kda {
namespace {

std::string hash(const std::string& s) { return Sha256().add(s).hex(); }

TEST(Sha256, KnownAnswers) {
  EXPECT_EQ(hash(""), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(hash("abc"), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(hash("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(hash(std::string(1'000'000, 'a')), "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, TheProcessorsInstructionsAndPlainCodeAgree) {
  std::string s;
  for (int n = 0; n < 300; ++n) {
    EXPECT_EQ(Sha256(false).add(s).hex(), hash(s)) << n;
    s += char(n * 37 + n / 7);
  }
}

TEST(Sha256, PiecesMakeTheWhole) {
  const std::string s(300, 'x');
  for (size_t cut : {0, 1, 55, 56, 63, 64, 65, 128, 299, 300})
    EXPECT_EQ(Sha256().add(s.substr(0, cut)).add(s.substr(cut)).hex(), hash(s)) << cut;
}

}  // namespace
}  // namespace kda
