// tests/golden.h — reference files: where they are, and a reader of its own (not the library's, which is under test).
#pragma once
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <vector>

#include "base/dtype.h"

namespace kda::test {

// KDA_GOLDEN_DIR, else ../shared/golden beside the source tree, else the copies in tests/golden; each name on its own,
// since the copies are fewer. Empty when there is none.
inline std::filesystem::path golden_path(const std::string& name) {
  namespace fs = std::filesystem;
  const fs::path source(KDA_SOURCE_DIR);
  std::vector<fs::path> roots;
  if (const char* dir = std::getenv("KDA_GOLDEN_DIR")) {
    roots = {dir};
  } else {
    roots = {source / "../shared/golden", source / "tests/golden"};
  }
  for (const auto& root : roots)
    if (fs::exists(root / name)) return root / name;
  return {};
}

// A file or folder of ../shared itself (nano-teacher, corpus, ..), or empty.
inline std::filesystem::path shared_path(const std::string& name) {
  const auto p = std::filesystem::path(KDA_SOURCE_DIR) / "../shared" / name;
  return std::filesystem::exists(p) ? p : std::filesystem::path();
}

#define KDA_NEED(path, name)                                                                   \
  const auto path = ::kda::test::golden_path(name);                                            \
  if (path.empty()) GTEST_SKIP() << "needs golden/" << name << " (KDA_GOLDEN_DIR, ../shared/golden or tests/golden)"

struct GoldenTensor {
  std::string dtype;
  std::vector<int64_t> shape;
  std::string bytes;

  int64_t size() const {
    int64_t n = 1;
    for (int64_t d : shape) n *= d;
    return n;
  }
  std::vector<double> values() const {
    std::vector<double> out(static_cast<size_t>(size()));
    const auto fill = [&](auto zero) {
      using T = decltype(zero);
      for (size_t i = 0; i < out.size(); ++i) {
        T x;
        std::memcpy(&x, bytes.data() + i * sizeof(T), sizeof(T));
        out[i] = static_cast<double>(static_cast<std::conditional_t<std::is_integral_v<T>, int64_t, double>>(x));
      }
    };
    if (dtype == "F32") fill(float());
    else if (dtype == "F64") fill(double());
    else if (dtype == "I64") fill(int64_t());
    else if (dtype == "I32") fill(int32_t());
    else if (dtype == "U8") fill(uint8_t());
    else if (dtype == "BF16" || dtype == "F16") {
      for (size_t i = 0; i < out.size(); ++i) {
        uint16_t u;
        std::memcpy(&u, bytes.data() + i * 2, 2);
        bf16 b;
        f16 h;
        b.bits = h.bits = u;
        out[i] = dtype == "BF16" ? double(float(b)) : double(float(h));
      }
    } else {
      throw std::runtime_error("golden: dtype " + dtype);
    }
    return out;
  }
  std::vector<float> floats() const {
    const auto v = values();
    return {v.begin(), v.end()};
  }
  std::vector<int32_t> ids() const {
    const auto v = values();
    return {v.begin(), v.end()};
  }
};

struct GoldenFile {
  std::map<std::string, GoldenTensor> tensors;
  nlohmann::json metadata;  // string values; `cases` and the like hold JSON of their own

  // One safetensors file, or a model folder: model.safetensors or its shards.
  explicit GoldenFile(const std::filesystem::path& path) {
    if (!std::filesystem::is_directory(path)) {
      read(path);
      return;
    }
    for (const auto& e : std::filesystem::directory_iterator(path))
      if (e.path().extension() == ".safetensors" && e.path().stem().string().starts_with("model")) read(e.path());
  }
  void read(const std::filesystem::path& path) {
    std::ifstream in(path, std::ios::binary);
    std::string all((std::istreambuf_iterator<char>(in)), {});
    uint64_t n;
    std::memcpy(&n, all.data(), 8);
    const auto header = nlohmann::json::parse(all.substr(8, n));
    for (const auto& [name, t] : header.items()) {
      if (name == "__metadata__") {
        metadata = t;
        continue;
      }
      const size_t from = t["data_offsets"][0], to = t["data_offsets"][1];
      tensors[name] = {t["dtype"], t["shape"], all.substr(8 + n + from, to - from)};
    }
  }
  const GoldenTensor& operator[](const std::string& name) const {
    const auto it = tensors.find(name);
    if (it == tensors.end()) throw std::runtime_error("golden: no tensor " + name);
    return it->second;
  }
  bool has(const std::string& name) const { return tensors.count(name) > 0; }
  nlohmann::json cases(const std::string& key = "cases") const {
    return nlohmann::json::parse(metadata.at(key).get<std::string>());
  }
};

}  // namespace kda::test
