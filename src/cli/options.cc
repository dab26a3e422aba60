#include "cli/options.h"

#include <charconv>
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <iterator>

#include "base/file.h"

namespace kda::cli {

namespace {
std::string environment(const char* name) {
  const char* v = std::getenv(name);
  return v ? v : "";
}

std::filesystem::path hub_cache() {
  if (const std::string dir = environment("HF_HUB_CACHE"); !dir.empty()) return dir;
  if (const std::string home = environment("HF_HOME"); !home.empty()) return std::filesystem::path(home) / "hub";
  if (const std::string cache = environment("XDG_CACHE_HOME"); !cache.empty())
    return std::filesystem::path(cache) / "huggingface/hub";
  return std::filesystem::path(environment("HOME")) / ".cache/huggingface/hub";
}
}  // namespace

void add_model_folder(CLI::App& app, std::string& model) {
  app.add_option("-m,--model", model, "model folder, or owner/name in the local Hugging Face cache")->required();
}

void add_model_options(CLI::App& app, ModelOptions& o) {
  add_model_folder(app, o.model);
  app.add_option("--device", o.device, "where to run; auto: a GPU if one answers, else the CPU")->check(CLI::IsMember({"auto", "cpu", "cuda"}))->capture_default_str();
  app.add_option("--precision", o.precision, "fast: bf16 products where the CPU has them; exact: fp32")
      ->check(CLI::IsMember({"fast", "exact"}))
      ->capture_default_str();
  app.add_option("-t,--threads", o.threads, "threads; 0: one per core")
      ->check(CLI::Range(0, 4096))
      ->capture_default_str();
  app.add_option("--weights", o.weights, "stored: as in the files (on a GPU bf16); int8 and, on a GPU, fp8: made at load, one scale per row")
      ->check(CLI::IsMember({"stored", "int8", "fp8"}))
      ->capture_default_str();
  app.add_option("--weight-cache", o.weight_cache,
                 "with int8: a file to keep the converted weights in (`auto`: kda-int8.safetensors in the model folder)");
}

std::filesystem::path user_cache() {
  if (const std::string cache = environment("XDG_CACHE_HOME"); !cache.empty()) return std::filesystem::path(cache) / "kda";
  const std::string home = environment("HOME");
  return std::filesystem::path(home.empty() ? "." : home) / ".cache/kda";
}

std::filesystem::path model_folder(const std::string& model) { return resolve_model(model, hub_cache()); }

EngineOptions engine_options(const ModelOptions& o) {
  EngineOptions e;
  e.precision = o.precision == "exact" ? Precision::exact : Precision::fast;
  e.threads = o.threads;
  e.device = o.device == "cpu" ? DeviceKind::cpu : o.device == "cuda" ? DeviceKind::cuda : DeviceKind::automatic;
  e.weights = o.weights == "int8" ? WeightKind::int8 : o.weights == "fp8" ? WeightKind::fp8 : WeightKind::stored;
  KDA_CHECK(o.weight_cache.empty() || e.weights == WeightKind::int8, "--weight-cache needs --weights int8");
  e.weight_cache = o.weight_cache;
  if (o.weight_cache == "auto") e.weight_cache = model_folder(o.model) / "kda-int8.safetensors";
  e.report = [](const std::string& line) { std::cerr << line << '\n'; };
  return e;
}

std::unique_ptr<Engine> open_engine(const ModelOptions& o) {
  auto engine = std::make_unique<Engine>(model_folder(o.model), engine_options(o));
  for (const std::string& w : engine->warnings()) std::cerr << "warning: " << w << '\n';
  return engine;
}

std::string read_text(const std::string& path) {
  if (path != "-") return read_file(path);
  return {std::istreambuf_iterator<char>(std::cin), {}};
}

void check_output(const std::string& path, const std::filesystem::path& model) {
  const std::filesystem::path p(path), folder = p.has_parent_path() ? p.parent_path() : std::filesystem::path(".");
  std::error_code ignored;
  KDA_CHECK(!path_exists(p) || !std::filesystem::equivalent(folder, model, ignored), path,
            ": is a file of the model, which was left as it is");
  const AtomicFile probe{p};  // and removed again
}

namespace {
// A number check: `fits` sees the value once the whole text is one.
CLI::Validator number_check(const std::string& needed, std::function<bool(double)> fits) {
  return CLI::Validator(
      [needed, fits = std::move(fits)](std::string& text) {
        double x = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
        const bool number = error == std::errc() && end == text.data() + text.size() && std::isfinite(x);
        return number && fits(x) ? std::string() : "must be " + needed + ", is \"" + text + "\"";
      },
      "");
}
}  // namespace

CLI::Validator whole_number(uint64_t lowest) {
  return CLI::Validator(
      [lowest](std::string& text) {
        uint64_t x = 0;
        const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), x);
        const bool number = error == std::errc() && end == text.data() + text.size() && x <= uint64_t(INT64_MAX);
        return number && x >= lowest ? std::string()
                                     : cat("must be a whole number from ", lowest, " to ", INT64_MAX, ", is \"", text, "\"");
      },
      "");
}

CLI::Validator at_least(double lowest) {
  return number_check(cat("a number from ", lowest), [lowest](double x) { return x >= lowest; });
}
CLI::Validator above_zero() {
  return number_check("a number above 0", [](double x) { return x > 0; });
}
CLI::Validator share() {
  return number_check("a number from 0 to 1", [](double x) { return x >= 0 && x <= 1; });
}

std::vector<int32_t> parse_ids(const std::string& text, const char* option) {
  std::vector<int32_t> ids;
  for (size_t at = 0; at <= text.size();) {
    const size_t comma = std::min(text.find(',', at), text.size());
    size_t from = at, to = comma;
    while (from < to && text[from] == ' ') ++from;
    while (to > from && text[to - 1] == ' ') --to;
    int32_t id = 0;
    const auto [end, error] = std::from_chars(text.data() + from, text.data() + to, id);
    KDA_CHECK(from < to && error == std::errc() && end == text.data() + to, option,
              ": ids must be numbers with commas between, got \"", text.substr(at, comma - at), "\"");
    ids.push_back(id);
    at = comma + 1;
  }
  return ids;
}

}  // namespace kda::cli
