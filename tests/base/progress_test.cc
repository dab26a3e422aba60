#include "base/progress.h"

#include <gtest/gtest.h>

#include <sstream>

namespace kda {
namespace {

TEST(Progress, Words) {
  EXPECT_EQ(with_prefix(0, "B"), "0 B");
  EXPECT_EQ(with_prefix(999, "B"), "999 B");
  EXPECT_EQ(with_prefix(1234567, "B"), "1.23 MB");
  EXPECT_EQ(with_prefix(999999, "B"), "1.00 MB");
  EXPECT_EQ(with_prefix(10.1e9, "B"), "10.1 GB");
  EXPECT_EQ(with_prefix(123456, "tok"), "123 ktok");
  EXPECT_EQ(with_prefix(2.5, "tok/s"), "2.50 tok/s");
  EXPECT_EQ(clock_time(75), "1:15");
  EXPECT_EQ(clock_time(4000), "1:06:40");
  EXPECT_EQ(clock_time(-1), "0:00");
}

TEST(Progress, LinesInALog) {
  std::ostringstream out;
  double t = 0;
  Progress p(out, ProgressStyle::lines, "reading", 1000, "B", [&] { return t; });
  for (int i = 0; i < 5; ++i) t += 5, p.advance(100);  // a line each 10 s
  EXPECT_EQ(out.str(),
            "reading 20%  200 B of 1.00 kB  20 B/s  0:40 left\n"
            "reading 40%  400 B of 1.00 kB  20 B/s  0:30 left\n");
  t += 25, p.advance(500);
  out.str("");
  p.finish();
  p.finish();
  p.advance(1);
  EXPECT_EQ(out.str(), "reading 1.00 kB in 0:50  20 B/s\n");
}

TEST(Progress, BarOnATerminal) {
  std::ostringstream out;
  double t = 0;
  {
    Progress p(out, ProgressStyle::bar, "x", 4, "tok", [&] { return t; });
    t = 1;
    p.set(1);
    EXPECT_EQ(out.str(), "\rx [#######.......................] 25%  1 tok of 4 tok  1 tok/s  0:03 left");
    const size_t drawn = out.str().size();
    t = 1.05;
    p.set(2);  // too soon to draw again
    EXPECT_EQ(out.str().size(), drawn);
    out.str("");
  }  // an error on the way: the line is cleared
  EXPECT_EQ(out.str().front(), '\r');
  EXPECT_EQ(out.str().back(), '\r');
}

TEST(Progress, SilentAndUnknownTotal) {
  std::ostringstream out;
  double t = 0;
  {
    Progress p(out, ProgressStyle::silent, "x", 4, "tok", [&] { return t; });
    t = 100;
    p.set(4);
    p.finish();
  }
  EXPECT_EQ(out.str(), "");
  Progress p(out, ProgressStyle::lines, "x", 0, "tok", [&] { return t; });
  t += 20;
  p.set(40);
  EXPECT_EQ(out.str(), "x 40 tok  2 tok/s\n");
}

}  // namespace
}  // namespace kda
