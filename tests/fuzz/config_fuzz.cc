// config.json and generation_config.json of any bytes, beside tensors of fixed names and changeable sizes: a model
// whose table can be made and whose written config reads back, or an Error.
// What stands before the first '{' (nothing, in a file that is a plain config) changes the tensors:
//   byte 0     their spelling, and which layers are KDA
//   bytes 1-4  sizes of layer 0: heads, q rows, v rows, o_norm
#include <algorithm>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/error.h"
#include "checkpoint/checkpoint.h"
#include "checkpoint/config.h"
#include "checkpoint/tensor_table.h"

namespace {

kda::TensorShapes shapes(const uint8_t* d) {
  kda::TensorShapes s;
  for (int l = 0; l < 4; ++l) {
    const std::string layer = "model.layers." + std::to_string(l), m = layer + (d[0] & 16 ? ".attn." : ".self_attn.");
    const auto size = [&](int i, int64_t usual) { return l == 0 && d[i] ? int64_t(1) << (d[i] % 63) : usual; };
    s[m + "q_proj.weight"] = {size(2, 64), 64};
    s[m + "v_proj.weight"] = {size(3, 64), 64};
    s[layer + ".mlp.up_proj.weight"] = {160, 64};
    if (!(d[0] >> l & 1)) continue;
    s[m + "A_log"] = {size(1, 2)};
    s[m + "o_norm.weight"] = {size(4, 32)};
  }
  return s;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string all_bytes(reinterpret_cast<const char*>(data), size);
  const size_t start = std::min(all_bytes.find('{'), size);
  const std::string text = all_bytes.substr(start);
  uint8_t controls[5] = {7, 0, 0, 0, 0};
  for (size_t i = 0; i < std::min<size_t>(start, 5); ++i) controls[i] = data[i];
  try {
    std::vector<std::string> warnings;
    kda::parse_generation_config(text, warnings);
  } catch (const kda::Error&) {
  }
  try {
    const auto c = kda::parse_config(text, shapes(controls));
    if (c.layers.size() != 4 || c.parameters() <= 0 || c.state_bytes() < 0 || c.kv_bytes_per_token(kda::Dtype::f32) < 0)
      std::abort();
    for (const auto& l : c.layers)
      if (l.mixer == kda::Mixer::full && l.rope) kda::rope_table(c.rope, l.head_dim);
    kda::TensorShapes all;
    for (const auto& t : kda::tensor_table(c)) {
      all[t.name] = t.file_shape;
      for (const auto& s : t.spellings)
        if (kda::canonical_name(s) != t.name) std::abort();
    }
    std::string written;
    try {
      written = kda::write_config(c);
    } catch (const kda::Error&) {
      return 0;  // a model that one config cannot express
    }
    const auto again = kda::parse_config(written, all);
    if (again.parameters() != c.parameters() || kda::write_config(again) != written) std::abort();
  } catch (const kda::Error&) {
  }
  return 0;
}
