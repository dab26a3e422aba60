// Any bytes as a tokenizer.json, and any bytes as a text for it. The input up to the first newline is the file (JSON
// needs no newline), the rest a text.
#include <cstdint>
#include <cstdlib>
#include <string>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "text/tokenizer.h"

namespace {

void check(bool ok) {
  if (!ok) std::abort();
}

void exercise(const kda::Tokenizer& t, std::string_view text) {
  std::vector<int32_t> ids;
  try {
    ids = t.encode(text);
    for (int32_t id : ids) check(id >= 0 && id < t.vocabulary() && t.has_token(id));
    check(t.encode(text) == ids);  // the words are known by now
  } catch (const kda::Error&) {
  }
  for (size_t i = 0; i < text.size() && i < 64; ++i)
    ids.push_back(static_cast<uint8_t>(text[i]) % (t.vocabulary() + 2) - 1);
  try {
    for (const bool skip : {false, true}) {
      kda::StreamDecoder stream(t, skip);
      std::string pieces;
      for (int32_t id : ids) pieces += stream.push(id);
      pieces += stream.finish();
      check(pieces == t.decode(ids, skip));
    }
  } catch (const kda::Error&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view all(reinterpret_cast<const char*>(data), size);
  const size_t line = all.find('\n');
  try {
    const auto t = kda::Tokenizer::from_json(all.substr(0, line));
    if (line != std::string_view::npos) exercise(t, all.substr(line + 1));
    exercise(t, "Hello  wörld's 123\n\n <s>\xf0\x9f\x98\x80");
    exercise(t, "");
  } catch (const kda::Error&) {
  }
  return 0;
}
