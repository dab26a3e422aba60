// text/post_processor.h — the special tokens around an encoded text.
#pragma once
#include <simdjson.h>

#include <cstdint>
#include <vector>

namespace kda::text {

// TemplateProcessing (its `single`), ByteLevel (concerns offsets only) and Sequence of these.
class PostProcessor {
 public:
  PostProcessor() = default;
  // Throws Error for other types, and for a template with an id that has no token. `has_token`: by id.
  PostProcessor(simdjson::dom::element, const std::vector<bool>& has_token);

  std::vector<int32_t> apply(std::vector<int32_t> ids) const;

 private:
  static constexpr int32_t kText = -1;  // the place of the text in a template
  void add(simdjson::dom::element, const std::vector<bool>& has_token, int depth);
  std::vector<std::vector<int32_t>> templates_;  // applied one after another
};

}  // namespace kda::text
