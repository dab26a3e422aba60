#include "train/stored_format.h"

#include "checkpoint/json.h"

namespace kda::stored {

namespace {
constexpr int64_t kMostTokens = int64_t(1) << 40;
}

int64_t check_row(const LogprobCodec& codec, const std::string& where, const uint8_t* p, uint64_t offset, uint64_t left,
                  int64_t number) {
  const auto at = [&] { return cat(where, ": offset ", offset, ": row ", number, ": "); };
  KDA_CHECK(left >= uint64_t(kRowHead + kRowTail), at(), "cut off, ", left, " bytes are left");
  KDA_CHECK(std::memcmp(p, kRowMark.data(), kRowMark.size()) == 0, at(), "does not begin with ", kRowMark);
  const int64_t tokens = load<uint32_t>(p + 4);
  const auto named = load<uint64_t>(p + 8);
  KDA_CHECK(named == uint64_t(number), at(), "calls itself row ", named);
  const int64_t bytes = row_bytes(codec, tokens);
  KDA_CHECK(uint64_t(bytes) <= left, at(), "needs ", bytes, " bytes for ", tokens, " tokens, ", left, " are left");
  const uint64_t sum = fnv1a(p, size_t(bytes - kRowTail));
  KDA_CHECK(load<uint64_t>(p + bytes - kRowTail) == sum, at(), "its checksum is wrong: the file is damaged");
  return tokens;
}

std::string write_header(const CaptureHeader& h, const Counts& counts) {
  return nlohmann::json{{"format", "kda capture 1"},
                        {"codec", nlohmann::json::parse(to_json(h.codec))},
                        {"model", h.model},
                        {"teacher", h.teacher},
                        {"tokenizer", h.tokenizer},
                        {"data", h.data},
                        {"sequence_length", h.sequence_length},
                        {"max_tokens", h.max_tokens},
                        {"rows", counts.rows},
                        {"tokens", counts.tokens}}
             .dump(2) +
         "\n";
}

CaptureHeader read_header(std::string_view text, const std::string& where, Counts* counts) {
  const nlohmann::json j = parse_json_object(text, where);
  const Fields f(j, where);
  const auto format = f.string("format");
  KDA_CHECK(format == "kda capture 1", where, ": needed format \"kda capture 1\", got ",
            format ? *format : std::string("none"));
  const auto codec = f.object("codec");
  KDA_CHECK(codec, where, ": needs codec");
  CaptureHeader h;
  h.codec = parse_codec_config(codec->raw().dump(), where + ".codec");
  h.model = f.string("model").value_or("");
  h.teacher = f.string("teacher").value_or("");
  h.tokenizer = f.string("tokenizer").value_or("");
  h.data = f.string("data").value_or("");
  h.sequence_length = f.integer("sequence_length", 0, kMostTokens).value_or(0);
  h.max_tokens = f.integer("max_tokens", 0, kMostTokens).value_or(0);
  const auto rows = f.integer("rows", 0, kMostTokens), tokens = f.integer("tokens", 0, kMostTokens);
  KDA_CHECK(rows && tokens, where, ": needs rows and tokens");
  *counts = {*rows, *tokens};
  return h;
}

}  // namespace kda::stored
