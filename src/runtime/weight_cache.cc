#include "runtime/weight_cache.h"

#include <sys/mman.h>
#include <unistd.h>

#include <map>

#include "base/error.h"
#include "base/file.h"
#include "checkpoint/safetensors.h"
#include "kernels/quantize.h"

namespace kda {

namespace {

constexpr const char* kFormat = "kda.cpp int8 weights 1";

// Tells the kernel that the whole pages of a mapped matrix nobody reads any more can go.
void give_back(const Tensor& t) {
  const uintptr_t page = uintptr_t(sysconf(_SC_PAGESIZE)), from = reinterpret_cast<uintptr_t>(t.v.data);
  const uintptr_t begin = (from + page - 1) / page * page, end = (from + t.v.bytes()) / page * page;
  if (end > begin) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_DONTNEED);
}

bool take_from(const std::filesystem::path& path, const std::string& fingerprint, Weights& weights) {
  const SafetensorsFile file = [&] {
    try {
      return SafetensorsFile(path);
    } catch (const Error& e) {
      throw Error(cat("the int8 weight cache cannot be read (delete it to have it made again): ", e.what()));
    }
  }();
  const auto is = [&](const char* key, const std::string& value) {
    const auto it = file.metadata().find(key);
    return it != file.metadata().end() && it->second == value;
  };
  KDA_CHECK(is("format", kFormat), path.string(), ": exists and is no int8 weight cache of this version; it was left alone");
  if (!is("fingerprint", fingerprint)) return false;
  for (const NamedLinear& m : quantizable(weights)) {
    const Tensor w = file.tensor(m.name), scale = file.tensor(m.name + ".scale");
    KDA_CHECK(w.dtype() == Dtype::i8 && w.shape() == m.linear->w.shape() && scale.dtype() == Dtype::f32 &&
                  scale.shape() == Shape{m.linear->N()},
              path.string(), ": ", m.name, " must be i8 ", m.linear->w.shape(), ", is ", name_of(w.dtype()), " ", w.shape());
    m.linear->w = w;
    m.linear->scale = scale;
  }
  return true;
}

}  // namespace

void make_int8(Context& ctx, Weights& weights, const std::string& fingerprint, const std::filesystem::path& cache,
               const std::function<void(const std::string&)>& report) {
  const auto say = [&](const std::string& line) {
    if (report) report(line);
  };
  if (!cache.empty() && path_exists(cache)) {
    if (take_from(cache, fingerprint, weights)) return;
    say(cat(cache.string(), " belongs to another checkpoint: making the int8 weights again"));
  }
  const auto matrices = quantizable(weights);
  std::map<std::string, ConstView> made;
  for (const NamedLinear& m : matrices) {
    const Tensor stored = m.linear->w;
    const QuantizedRows q = quantize_rows_i8(*ctx.pool, stored);
    m.linear->w = q.w;
    m.linear->scale = q.scale;
    made[m.name] = q.w;
    made[m.name + ".scale"] = q.scale;
    // Not a tied head's: the embedding goes on reading it.
    if (stored.v.data != weights.embedding.v.data) give_back(stored);
  }
  if (cache.empty()) return;
  save_safetensors(cache, made, {{"format", kFormat}, {"fingerprint", fingerprint}});
  say(cat("int8 weights kept in ", cache.string()));
}

}  // namespace kda
