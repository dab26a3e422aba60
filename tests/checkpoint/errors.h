// tests/checkpoint/errors.h — the message an Error comes with.
#pragma once
#include <gtest/gtest.h>

#include <string>

#include "base/error.h"

namespace kda::test {

// f throws Error and its message holds `part`.
template <class F>
testing::AssertionResult fails_with(const std::string& part, F&& f) {
  try {
    f();
  } catch (const Error& e) {
    if (std::string(e.what()).find(part) != std::string::npos) return testing::AssertionSuccess();
    return testing::AssertionFailure() << "the message does not hold '" << part << "': " << e.what();
  }
  return testing::AssertionFailure() << "no error, needed one with '" << part << "'";
}

}  // namespace kda::test
