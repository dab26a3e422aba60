#include "text/post_processor.h"

#include <utility>

#include "text/json.h"

namespace kda::text {

PostProcessor::PostProcessor(Json j, const std::vector<bool>& has_token) { add(j, has_token, 0); }

void PostProcessor::add(Json j, const std::vector<bool>& has_token, int depth) {
  const std::string_view where = "post_processor";
  KDA_CHECK(depth < kMaxNesting, "tokenizer: post_processors nested more than ", kMaxNesting, " deep");
  const auto type = type_of(j, where);
  if (type == "Sequence") {
    for (Json e : json_array(need(j, "processors", where), "post_processor.processors")) add(e, has_token, depth + 1);
    return;
  }
  if (type == "ByteLevel") return;  // trims offsets, which nobody here asks for
  KDA_CHECK(type == "TemplateProcessing", "tokenizer: post_processor of type \"", type,
            "\" is not supported (TemplateProcessing, ByteLevel and Sequence are)");
  const auto specials = find(j, "special_tokens", where);
  std::vector<int32_t> items;
  int texts = 0;
  for (Json e : json_array(need(j, "single", where), "post_processor.single")) {
    const std::string_view in = "an element of post_processor.single";
    if (const auto sequence = find(e, "Sequence", in)) {
      const auto id = need_string(*sequence, "id", in);
      KDA_CHECK(id == "A", "tokenizer: post_processor.single holds sequence \"", id, "\", only \"A\" is one text");
      items.push_back(kText);
      ++texts;
      continue;
    }
    const auto name = need_string(need(e, "SpecialToken", in), "id", in);
    const auto special = specials ? find(*specials, name, "post_processor.special_tokens") : std::nullopt;
    KDA_CHECK(special, "tokenizer: post_processor.single names \"", name, "\", which special_tokens has not");
    for (Json id : json_array(need(*special, "ids", "an element of post_processor.special_tokens"), "ids")) {
      const auto v = json_integer(id, cat("the id of \"", name, '"'), 0, static_cast<int64_t>(has_token.size()) - 1);
      KDA_CHECK(has_token[static_cast<size_t>(v)], "tokenizer: the id of \"", name, "\" is ", v,
                ", which has no token");
      items.push_back(static_cast<int32_t>(v));
    }
  }
  KDA_CHECK(texts <= 1, "tokenizer: post_processor.single holds the text ", texts, " times");
  KDA_CHECK(items.size() <= 4096 && templates_.size() < 16, "tokenizer: post_processor adds too many tokens");
  templates_.push_back(std::move(items));
}

std::vector<int32_t> PostProcessor::apply(std::vector<int32_t> ids) const {
  for (const auto& items : templates_) {
    std::vector<int32_t> out;
    out.reserve(ids.size() + items.size());
    for (int32_t item : items) {
      if (item == kText)
        out.insert(out.end(), ids.begin(), ids.end());
      else
        out.push_back(item);
    }
    ids = std::move(out);
  }
  return ids;
}

}  // namespace kda::text
