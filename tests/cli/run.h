// tests/cli/run.h — runs the program under test as a user would.
#pragma once
#include <sys/wait.h>

#include <array>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>

namespace kda::test {

struct Ran {
  int status = -1;  // exit status; 128 + signal when it was killed
  std::string out, err;
};

// `arguments` as a shell line.
inline Ran run_kda(const std::string& arguments, const std::string& before = "") {
  const auto err_file = std::filesystem::path(testing::TempDir()) / ("kda_err_" + std::to_string(::getpid()));
  const std::string line = before + " '" KDA_PROGRAM "' " + arguments + " 2>'" + err_file.string() + "' </dev/null";
  Ran r;
  std::FILE* pipe = popen(line.c_str(), "r");
  if (!pipe) return r;
  std::array<char, 65536> buffer;
  for (size_t n; (n = std::fread(buffer.data(), 1, buffer.size(), pipe)) > 0;) r.out.append(buffer.data(), n);
  const int status = pclose(pipe);
  r.status = WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
  std::ifstream in(err_file, std::ios::binary);
  r.err.assign(std::istreambuf_iterator<char>(in), {});
  std::filesystem::remove(err_file);
  return r;
}

}  // namespace kda::test
