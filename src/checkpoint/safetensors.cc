#include "checkpoint/safetensors.h"

#include <algorithm>
#include <cstring>

#include "checkpoint/json.h"

namespace kda {

namespace {
constexpr size_t kMaxHeaderBytes = 100'000'000;  // the reference's own limit

struct Kind {
  const char* name;
  int bits;
  std::optional<Dtype> dtype;
};
// Every dtype the reference knows; the ones without a Dtype are checked for size but cannot be used.
const Kind kKinds[] = {{"F32", 32, Dtype::f32}, {"BF16", 16, Dtype::bf16},
                       {"F16", 16, Dtype::f16}, {"F64", 64, Dtype::f64},
                       {"I8", 8, Dtype::i8},    {"U8", 8, Dtype::u8},
                       {"I16", 16, Dtype::i16}, {"I32", 32, Dtype::i32},
                       {"I64", 64, Dtype::i64}, {"BOOL", 8, Dtype::boolean},
                       {"U16", 16, {}},         {"U32", 32, {}},
                       {"U64", 64, {}},         {"C64", 64, {}},
                       {"F8_E4M3", 8, {}},      {"F8_E5M2", 8, {}},
                       {"F8_E8M0", 8, {}},      {"F6_E2M3", 6, {}},
                       {"F6_E3M2", 6, {}},      {"F4", 4, {}}};

std::string show(const std::vector<int64_t>& shape) {
  std::string s = "[";
  for (size_t i = 0; i < shape.size(); ++i) s += cat(i ? "," : "", shape[i]);
  return s + "]";
}

// Elements of a shape, or an Error where 64 bits do not hold them.
uint64_t elements(const std::vector<int64_t>& shape, const std::string& what) {
  uint64_t n = 1;
  for (int64_t d : shape)
    KDA_CHECK(!__builtin_mul_overflow(n, uint64_t(d), &n) && n <= uint64_t(INT64_MAX), what, ": shape ", show(shape),
              " has more elements than 64 bits hold");
  return n;
}

uint64_t natural(const nlohmann::json& v, const std::string& what) {
  KDA_CHECK(v.is_number_unsigned() && v.get<uint64_t>() <= uint64_t(INT64_MAX), what,
            " must be whole numbers from 0 to 2^63-1");
  return v.get<uint64_t>();
}

SafetensorsEntry parse_entry(const nlohmann::json& value, const std::string& what, size_t data_start,
                             size_t data_bytes) {
  KDA_CHECK(value.is_object(), what, ": needed an object with dtype, shape and data_offsets");
  for (const auto& [key, unused] : value.items())
    KDA_CHECK(key == "dtype" || key == "shape" || key == "data_offsets", what, ": unknown field '", key, "'");
  const auto dtype = value.find("dtype"), shape = value.find("shape"), offsets = value.find("data_offsets");
  KDA_CHECK(dtype != value.end() && dtype->is_string(), what, ": dtype is missing or not a string");
  KDA_CHECK(shape != value.end() && shape->is_array(), what, ": shape is missing or not a list");
  KDA_CHECK(offsets != value.end() && offsets->is_array() && offsets->size() == 2, what,
            ": data_offsets is missing or not a list of two");
  SafetensorsEntry e;
  e.dtype_name = dtype->get<std::string>();
  for (const auto& d : *shape) e.shape.push_back(int64_t(natural(d, what + ": sizes in shape")));
  const uint64_t begin = natural((*offsets)[0], what + ": data_offsets");
  const uint64_t end = natural((*offsets)[1], what + ": data_offsets");
  KDA_CHECK(begin <= end && end <= data_bytes, what, ": data_offsets [", begin, ",", end, "] reach outside the file's ",
            data_bytes, " bytes of data");
  e.begin = data_start + begin;
  e.end = data_start + end;
  const uint64_t count = elements(e.shape, what);
  for (const Kind& k : kKinds) {
    if (e.dtype_name != k.name) continue;
    e.dtype = k.dtype;
    uint64_t bits;
    KDA_CHECK(!__builtin_mul_overflow(count, uint64_t(k.bits), &bits) && bits % 8 == 0 && bits / 8 == end - begin, what,
              ": ", e.dtype_name, " ", show(e.shape), " does not take the ", end - begin,
              " bytes its data_offsets span");
  }
  return e;
}
}  // namespace

SafetensorsHeader parse_safetensors(std::span<const std::byte> file, const std::string& where) {
  KDA_CHECK(file.size() >= 8, where, ": not a safetensors file: ", file.size(), " bytes, needed at least 8");
  uint64_t length = 0;
  for (int i = 7; i >= 0; --i) length = length << 8 | uint64_t(file[size_t(i)]);
  KDA_CHECK(length <= kMaxHeaderBytes, where, ": header of ", length, " bytes, at most ", kMaxHeaderBytes,
            " are allowed; not a safetensors file?");
  KDA_CHECK(length <= file.size() - 8, where, ": truncated: the header takes ", length, " bytes, the file has ",
            file.size() - 8, " behind its length");
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + 8, size_t(length));
  KDA_CHECK(!text.empty() && text[0] == '{', where, ": the header does not begin with '{'; not a safetensors file?");
  const nlohmann::json json = parse_json_object(text, where + ": header", 8);

  const size_t data_start = 8 + size_t(length), data_bytes = file.size() - data_start;
  SafetensorsHeader out;
  for (const auto& [name, value] : json.items()) {
    if (name == "__metadata__") {
      KDA_CHECK(value.is_object(), where, ": __metadata__ is not an object");
      for (const auto& [key, text_value] : value.items()) {
        KDA_CHECK(text_value.is_string(), where, ": __metadata__ '", key, "' is not a string");
        out.metadata[key] = text_value.get<std::string>();
      }
      continue;
    }
    out.tensors.emplace(name, parse_entry(value, cat(where, ": tensor '", name, "'"), data_start, data_bytes));
  }

  // Laid end to end the ranges must cover the data exactly.
  std::vector<std::pair<const std::string, SafetensorsEntry>*> order;
  for (auto& t : out.tensors) order.push_back(&t);
  std::stable_sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  size_t at = data_start;
  for (const auto* t : order) {
    KDA_CHECK(t->second.begin >= at, where, ": tensor '", t->first, "' overlaps the one before it");
    KDA_CHECK(t->second.begin == at, where, ": ", t->second.begin - at, " bytes before tensor '", t->first,
              "' belong to no tensor");
    at = t->second.end;
  }
  KDA_CHECK(at == file.size(), where, ": ", file.size() - at, " bytes behind the last tensor belong to no tensor");
  return out;
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : file_(MappedFile::open(path)) {
  header_ = parse_safetensors({file_->data(), file_->size()}, path.string());
}

Tensor SafetensorsFile::tensor(const std::string& name) const {
  const auto it = header_.tensors.find(name);
  KDA_CHECK(it != header_.tensors.end(), path().string(), ": no tensor '", name, "'");
  const auto& dims = it->second.shape;
  KDA_CHECK(dims.size() <= size_t(Shape::kMaxRank), path().string(), ": tensor '", name, "' has ", dims.size(),
            " dimensions, at most ", Shape::kMaxRank, " can be used");
  Shape shape;
  shape.rank = int(dims.size());
  std::copy(dims.begin(), dims.end(), shape.dim.begin());
  return tensor(name, shape);
}

Tensor SafetensorsFile::tensor(const std::string& name, const Shape& as) const {
  const auto it = header_.tensors.find(name);
  KDA_CHECK(it != header_.tensors.end(), path().string(), ": no tensor '", name, "'");
  const SafetensorsEntry& e = it->second;
  KDA_CHECK(e.dtype, path().string(), ": tensor '", name, "' has dtype ", e.dtype_name, ", which cannot be used here");
  const size_t width = size_of(*e.dtype);
  KDA_CHECK(size_t(as.size()) * width == e.end - e.begin, path().string(), ": tensor '", name, "' is ", show(e.shape),
            ", needed ", as);
  const std::byte* p = file_->data() + e.begin;
  if (reinterpret_cast<uintptr_t>(p) % width) {
    Tensor copy = host_tensor(*e.dtype, as);
    std::memcpy(copy.v.data, p, e.end - e.begin);
    return copy;
  }
  void* data = const_cast<std::byte*>(p);  // the mapping is read-only; Tensor has one pointer type
  return {std::shared_ptr<void>(std::const_pointer_cast<MappedFile>(file_), data), View{data, *e.dtype, as}};
}

}  // namespace kda
