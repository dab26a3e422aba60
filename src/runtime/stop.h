// runtime/stop.h — stop texts in a stream of pieces.
#pragma once
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace kda {

// Finds the first stop text to be completed in a text that arrives in pieces; what comes out does not depend on where
// the pieces are cut. Of stop texts completed by the same byte the longest counts. Bytes are compared as they are; as
// long as stop texts and the whole text are UTF-8, no character is cut.
class StopMatcher {
 public:
  // Throws Error when one of them is empty.
  explicit StopMatcher(std::vector<std::string> stops);

  // The text that can be shown now: all of it but what may yet become a stop text, and nothing from a stop text on.
  std::string push(std::string_view piece);
  // The end of the text: what was held back. Empty after a stop.
  std::string finish();

  bool stopped() const { return hit_ >= 0; }
  int hit() const { return hit_; }  // index of the stop text found, else -1

 private:
  std::vector<std::string> stops_;
  std::string held_;
  int hit_ = -1;
};

}  // namespace kda
