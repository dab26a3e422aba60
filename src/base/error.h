// base/error.h — the one error type. Library code throws it; only cli/ and server/ catch it.
#pragma once
#include <sstream>
#include <stdexcept>
#include <string>

namespace kda {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class... A>
std::string cat(const A&... a) {
  std::ostringstream s;
  (s << ... << a);
  return s.str();
}

}  // namespace kda

// For what a caller or a file can get wrong. Always on. Say: where, what is needed, what is there.
#define KDA_CHECK(cond, ...)                              \
  do {                                                    \
    if (!(cond)) throw ::kda::Error(::kda::cat(__VA_ARGS__)); \
  } while (0)
