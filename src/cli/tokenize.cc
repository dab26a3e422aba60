// cli/tokenize.cc — `kda tokenize` and `kda detokenize`: need nothing but a tokenizer.json.
#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <memory>
#include <string_view>
#include <vector>

#include "base/error.h"
#include "base/file.h"
#include "cli/commands.h"
#include "cli/json_input.h"
#include "cli/options.h"
#include "text/tokenizer.h"

namespace kda::cli {
namespace {

struct Options {
  std::string model, file, text, ids, jsonl;
  bool json = false, no_special = false, skip_special = false;
};

void write(const std::string& s) {
  std::cout.write(s.data(), static_cast<std::streamsize>(s.size()));
  std::cout.flush();
  KDA_CHECK(std::cout.good(), "writing to standard output failed");
}

Tokenizer open(const Options& o) {
  std::error_code ignored;
  const bool file = std::filesystem::is_regular_file(o.model, ignored);
  auto t = Tokenizer::load(file ? std::filesystem::path(o.model) : model_folder(o.model));
  for (const auto& note : t.notes()) std::cerr << note << '\n';
  return t;
}

void append(std::string& out, const std::vector<int32_t>& ids, const char* separator) {
  for (size_t i = 0; i < ids.size(); ++i) {
    if (i > 0) out += separator;
    out += std::to_string(ids[i]);
  }
}

std::vector<nlohmann::json> read_json_lines(const std::string& file) {
  std::ifstream in(file);
  KDA_CHECK(in.good(), file, ": cannot be opened");
  std::vector<nlohmann::json> out;
  for (std::string line; std::getline(in, line);) {
    out.push_back(parse_json(line, cat(file, ": line ", out.size() + 1)));
  }
  return out;
}

// The value itself, or what an object has under `key`.
const nlohmann::json& member(const nlohmann::json& j, const char* key) {
  return j.is_object() && j.contains(key) ? j[key] : j;
}

// A text on each line; all are read before the clock starts and written after it stops.
void tokenize_lines(const Tokenizer& tokenizer, const Options& o) {
  std::vector<std::string> texts;
  for (const auto& line : read_json_lines(o.jsonl)) {
    const auto& text = member(line, "text");
    KDA_CHECK(text.is_string(), o.jsonl, ": line ", texts.size() + 1,
              " must be a JSON string or an object with a string \"text\"");
    texts.push_back(text.get<std::string>());
  }
  size_t bytes = 0, tokens = 0;
  std::vector<std::vector<int32_t>> ids;
  ids.reserve(texts.size());
  const auto start = std::chrono::steady_clock::now();
  for (const auto& text : texts) {
    ids.push_back(tokenizer.encode(text, !o.no_special));
    bytes += text.size();
    tokens += ids.back().size();
  }
  const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - start;
  std::string out;
  for (const auto& line : ids) {
    out += "{\"tokens\":[";
    append(out, line, ",");
    out += "]}\n";
  }
  write(out);
  std::fprintf(stderr, "%zu texts, %zu bytes, %zu tokens in %.4f s: %.2f MB/s\n", texts.size(), bytes, tokens,
               seconds.count(), double(bytes) / 1e6 / seconds.count());
}

void tokenize(const Options& o, bool has_text) {
  const auto tokenizer = open(o);
  if (!o.jsonl.empty()) return tokenize_lines(tokenizer, o);
  const std::string text = has_text ? o.text : read_text(o.file.empty() ? "-" : o.file);
  std::vector<int32_t> ids;
  try {
    ids = tokenizer.encode(text, !o.no_special);
  } catch (const Error& e) {
    throw Error(cat(has_text ? "-p" : o.file.empty() ? "standard input" : o.file, ": ", e.what()));
  }
  std::string out = o.json ? "{\"tokens\":[" : "";
  append(out, ids, o.json ? "," : " ");
  write(out + (o.json ? "]}\n" : "\n"));
}

// A JSON list, or an object with a list `tokens`.
std::vector<int32_t> ids_of_json(const nlohmann::json& j, const std::string& where) {
  return json_ids(member(j, "tokens"), where);
}

// JSON, or numbers between commas and white space.
std::vector<int32_t> ids_of_text(const std::string& s, const std::string& where) {
  std::vector<int32_t> ids;
  const size_t first = s.find_first_not_of(" \t\r\n");
  if (first != std::string::npos && (s[first] == '[' || s[first] == '{'))
    return ids_of_json(parse_json(s, where), where);
  for (size_t i = 0; i < s.size();) {
    if (std::string_view(" \t\r\n,").find(s[i]) != std::string_view::npos) {
      ++i;
      continue;
    }
    int64_t v = 0;
    const size_t from = i;
    for (; i < s.size() && s[i] >= '0' && s[i] <= '9'; ++i) {
      v = v * 10 + (s[i] - '0');
      KDA_CHECK(v <= INT32_MAX, where, ": the id at byte ", from, " is out of range");
    }
    KDA_CHECK(i > from, where, ": byte ", i, " is neither a digit, a comma nor white space");
    ids.push_back(static_cast<int32_t>(v));
  }
  return ids;
}

std::string decode(const Tokenizer& tokenizer, const std::vector<int32_t>& ids, const std::string& where, bool skip) {
  for (int32_t id : ids)
    KDA_CHECK(tokenizer.has_token(id), where, ": the tokenizer has no token with id ", id, " (its ids are below ",
              tokenizer.vocabulary(), ")");
  return tokenizer.decode(ids, skip);
}

void detokenize(const Options& o, bool has_ids) {
  const auto tokenizer = open(o);
  if (!o.jsonl.empty()) {
    size_t line = 0;
    std::string out;
    for (const auto& j : read_json_lines(o.jsonl)) {
      const std::string where = cat(o.jsonl, ": line ", ++line);
      out += json_line({{"text", decode(tokenizer, ids_of_json(j, where), where, o.skip_special)}});
    }
    return write(out);
  }
  const std::string where = has_ids ? "--ids" : o.file.empty() ? "standard input" : o.file;
  const auto ids = ids_of_text(has_ids ? o.ids : read_text(o.file.empty() ? "-" : o.file), where);
  const std::string text = decode(tokenizer, ids, where, o.skip_special);
  write(o.json ? json_line({{"text", text}}) : text);
}

CLI::App* add(CLI::App& app, const char* name, const char* what, const std::shared_ptr<Options>& o) {
  CLI::App* sub = app.add_subcommand(name, what);
  sub->add_option(
         "-m,--model", o->model,
         "model folder (its tokenizer.json is enough), that file, or owner/name in the local Hugging Face cache")
      ->required();
  return sub;
}

}  // namespace

void add_tokenize(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  CLI::App* sub = add(app, "tokenize", "print the token ids of a text", o);
  auto* text = sub->add_option("-p,--prompt", o->text, "the text");
  auto* file =
      sub->add_option("-f,--file", o->file, "a file with the text, taken byte for byte (default: standard input)");
  auto* jsonl = sub->add_option(
      "--jsonl", o->jsonl, "a file with a text on each line: a JSON string or {\"text\":..}; prints a line for each");
  sub->add_flag("--json", o->json, "print {\"tokens\":[..]}");
  sub->add_flag("--no-special", o->no_special, "without the tokens that the tokenizer puts around a text");
  text->excludes(file);
  text->excludes(jsonl);
  file->excludes(jsonl);
  sub->callback([o, text] { tokenize(*o, text->count() > 0); });
}

void add_detokenize(CLI::App& app) {
  const auto o = std::make_shared<Options>();
  CLI::App* sub = add(app, "detokenize", "print the text of token ids", o);
  auto* ids = sub->add_option("--ids", o->ids, "the ids: 1,2,3 or a JSON list");
  auto* file =
      sub->add_option("-f,--file", o->file, "a file with ids between white space, or JSON (default: standard input)");
  sub->add_flag("--json", o->json, "print {\"text\":..}");
  sub->add_flag("--skip-special", o->skip_special, "leave special tokens out");
  auto* jsonl = sub->add_option(
      "--jsonl", o->jsonl,
      "a file with a list of ids on each line: [..] or {\"tokens\":[..]}; prints {\"text\":..} for each");
  ids->excludes(file);
  ids->excludes(jsonl);
  file->excludes(jsonl);
  sub->callback([o, ids] { detokenize(*o, ids->count() > 0); });
}

}  // namespace kda::cli
